"""What LASP-2 claims: runs of a small linear-attention model on ranks over gloo, and the cost model on a cluster."""

from narrows.experiments.context_runs import LAYERS, errors, linear_step, run
from narrows.techniques.training_parallelism.lasp_2 import LASP2

_DEVICES, _TOKENS = 64, 2048 * 1024


def error(technique: LASP2) -> float:
    """The largest difference from one process, plain and gated, on 2 and 4 ranks."""
    return max(errors("ring", technique.exchange, linear) for linear in ("plain", "gated"))


def gathers(technique: LASP2) -> float:
    """All-gathers of a rank over layers and passes."""
    return run("ring", technique.exchange, 4, "plain").ran[0].calls.get("all_gather", 0) / LAYERS / 2


def length_growth(technique: LASP2) -> float:
    """Bytes of states for four times the tokens, over those for one; NaN if it sends none."""
    short, long = (run("ring", technique.exchange, 4, "plain", tokens).sent.get("all_gather", 0.0) for tokens in (32, 128))
    return long / short if short else float("nan")


def over_ring(technique: LASP2) -> float:
    """Seconds of a step whose keys and values go round a ring over ours."""
    return _over(technique, "ring")


def over_lasp(technique: LASP2) -> float:
    """Seconds of a step whose states go from device to device over ours."""
    return _over(technique, "chain")


def _over(technique: LASP2, other: str) -> float:
    if technique.exchange == "none":
        return 0.0  # devices that know nothing of each other: `error` shows that this is another function
    theirs, ours = (linear_step("selene", _TOKENS, _DEVICES, by) for by in (other, technique.exchange))
    return theirs / ours
