"""What DeepSpeed-Ulysses claims: runs of a small Llama on ranks over gloo, and the cost model on clusters."""

from narrows.backward import training
from narrows.capture import capture
from narrows.capture.config import from_config
from narrows.cost import total
from narrows.experiments.context_runs import errors, farthest, volumes
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.modules.split_sequence import exchanged
from narrows.simulate.training import step_seconds
from narrows.step import Step
from narrows.techniques.training_parallelism.deepspeed_ulysses import Ulysses

_GPT_30B = {"model_type": "gpt2", "n_embd": 7168, "n_layer": 48, "n_head": 64, "vocab_size": 50304, "n_positions": 131072,
            "torch_dtype": "float16"}  # fmt: skip


def error(technique: Ulysses) -> float:
    """The largest difference from one process, on 2 and 4 ranks."""
    return errors("ulysses", technique.exchange)


def sent_bytes(technique: Ulysses) -> float:
    """Bytes of all-to-alls over those of the graph, on 2 and 4 ranks."""
    return farthest(volumes("ulysses", technique.exchange, "all_to_all"))


def volume_growth(technique: Ulysses) -> float:
    """How a device's bytes grow when tokens and devices both become four times as many; NaN if it sends none."""
    graph, machine = capture("llama-2-7b"), cluster("selene").machine
    few, many = (exchanged(graph, machine, Step.train(1, 8192 * n), n, technique.exchange).sent_bytes for n in (8, 32))
    return many / few if few else float("nan")


def speed(technique: Ulysses) -> float:
    """FLOP/s over those of Megatron-LM's way, at four times its length."""
    graph, group = from_config(_GPT_30B, "gpt-30b"), cluster("selene")
    if technique.exchange == "none":
        return 0.0  # tokens that see their own device's part alone: `error` shows that this is another function

    def reached(layout: str, tokens: int) -> float:
        work = float(total(training(graph), Step.train(1, tokens)).flop)
        return work / sum(step_seconds(graph, group, Layout.parse(layout), tokens).values())

    ours = reached(f"context=64,context_by={technique.exchange},shard=3,recompute=full", 131072)
    return ours / reached("tensor=64,sequence=true,recompute=full", 32768)
