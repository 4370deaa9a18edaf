"""What Megatron-LM's composition of parallelisms claims: runs on ranks over gloo, and published models on Selene."""

from typing import Any

from narrows.capture.config import from_config
from narrows.experiments.context_runs import farthest
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.run.check import Checked, check
from narrows.run.job import Run
from narrows.simulate.pipeline import Work
from narrows.simulate.training import step_seconds
from narrows.techniques.training_parallelism.megatron_lm_ptd_p import MegatronPTDP

_LAYOUTS = ("tensor=2", "tensor=4", "pipeline=2,chunks=2,accumulate=4", "tensor=2,pipeline=2,accumulate=4")


def _gpt(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": 51200,
            "n_positions": 2048, "torch_dtype": "float16"}  # fmt: skip


def _runs(technique: MegatronPTDP) -> list[Checked]:
    return [check(Run(Layout.parse(text), exchange="" if technique.compose else "alone")) for text in _LAYOUTS]


def error(technique: MegatronPTDP) -> float:
    """The largest difference from one process."""
    return max(one.error for one in _runs(technique))


def sent_bytes(technique: MegatronPTDP) -> float:
    """Bytes over those of the graph."""
    return farthest([one.volume for one in _runs(technique)])


def in_order(technique: MegatronPTDP) -> float:
    """The share of passes that ran in their place in interleaved 1F1B."""
    right = total = 0
    for ranks in (2, 4):
        wanted = MegatronPTDP(2).order(Work.of(2 * ranks, 8)).to_actions()
        schedule = "1f1b" if technique.compose else "gpipe"
        ran = check(Run(Layout(pipeline=ranks, chunks=2 if technique.compose else 1, accumulate=8, schedule=schedule))).ran
        for rank, row in wanted.items():
            executed = ran[rank].executed
            right += sum(a == b for a, b in zip(row, executed, strict=False))
            total += max(len(row), len(executed))
    return right / total


def of_peak(technique: MegatronPTDP) -> float:
    """The paper's FLOP of an iteration, over what 3,072 devices could do in our seconds of it."""
    width, layers, tokens, words = 25600, 128, 2048, 51200
    selene = cluster("selene")
    composed = "tensor=8,pipeline=64,data=6,accumulate=512,recompute=full"
    layout = Layout.parse(composed if technique.compose else "data=3072,shard=3,recompute=full")
    seconds = sum(step_seconds(from_config(_gpt(width, layers, 160), "gpt-1t"), selene, layout, tokens).values())
    flop = 96 * layout.batch * tokens * layers * width**2 * (1 + tokens / (6 * width) + words / (16 * layers * width))
    return flop / seconds / layout.devices / selene.machine.peak_flop_per_s["fp16"]


def interleaving(technique: MegatronPTDP) -> float:
    """Seconds of a step with one chunk over those with several."""
    graph, selene = from_config(_gpt(12288, 96, 96), "gpt-175b"), cluster("selene")
    plain = Layout(tensor=8, pipeline=12, accumulate=24, recompute="full")
    several = Layout(tensor=8, pipeline=12, accumulate=24, recompute="full", chunks=technique.chunks)
    one, many = (sum(step_seconds(graph, selene, layout, 2048).values()) for layout in (plain, several))
    return one / many
