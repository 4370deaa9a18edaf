"""What ZeCO claims: runs of a small gated linear-attention model on ranks over gloo, and the cost model on a cluster."""

import math

from narrows.experiments.context_runs import LAYERS, STATE, errors, linear_step, run
from narrows.techniques.training_parallelism.zeco import ZeCO


def error(technique: ZeCO) -> float:
    """The largest difference from one process, on 2 and 4 ranks."""
    return errors("ring", technique.exchange, "gated")


def sent_bytes(technique: ZeCO) -> float:
    """Bytes of states that four ranks sent, over those that three of them must send."""
    sequences, width, passes = 1, 8, 2
    return run("ring", technique.exchange, 4, "gated").sent.get("send", 0.0) / (3 * passes * LAYERS * STATE * sequences * width)


def rank_growth(technique: ZeCO) -> float:
    """Bytes over each of the links between neighbours with twice the ranks and four times the tokens; NaN if there are none."""
    few, many = (run("ring", technique.exchange, ranks, "gated", tokens).sent.get("send", 0.0) / (ranks - 1)
                 for ranks, tokens in ((2, 32), (4, 128)))  # fmt: skip
    return many / few if few else math.nan


def weak_scaling(technique: ZeCO) -> float:
    """Seconds of a step on 64 devices over one device's with a 64th of the tokens."""
    if technique.exchange == "none":
        return math.inf  # devices that know nothing of each other: `error` shows that this is another function
    return linear_step("selene", 2**20, 64, technique.exchange) / linear_step("selene", 2**14, 1, technique.exchange)
