"""What Ladder Residual claims: runs on ranks over gloo, a 70B model on the schedule engine, and two small models trained."""

import math
from functools import cache
from typing import Any

from narrows.capture import capture
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.parallel import tensor_parallel
from narrows.run.check import TOLERANCE, check
from narrows.run.job import Run
from narrows.simulate.network import wire
from narrows.step import Step
from narrows.techniques.training_parallelism.ladder_residual import LadderResidual, timeline

_STEPS, _BATCH, _TOKENS, _HELD_OUT = 200, 16, 48, 64


def overlapped(technique: LadderResidual) -> float:
    """Products that ran beside a sum over those that could have, the least over 2 and 4 ranks."""
    found = []
    for ranks in (2, 4):
        one = check(Run(Layout(tensor=ranks), ladder=technique.ladder))
        if one.error > TOLERANCE or abs(one.volume - 1) > 0.01:
            return math.nan
        could = (
            7 * int(one.run.model["num_hidden_layers"]) - 4
        )  # four products of each attention but the first, three of the rest
        found += [rank.overlapped / could for rank in one.ran]
    return min(found)


def speedup(technique: LadderResidual) -> float:
    """Seconds of a generation with the usual residual over ours, on NVLink."""
    return _generation("dgx-h100", False) / _generation("dgx-h100", technique.ladder)


def slow_links(technique: LadderResidual) -> float:
    """How much more it gains over PCIe."""
    return _generation("8x-l40s-pcie", False) / _generation("8x-l40s-pcie", technique.ladder) / speedup(technique)


@cache
def _generation(group: str, ladder: bool) -> float:
    """Seconds to read 64 prompts and to write 512 tokens each, at their mean context."""
    cut, on = tensor_parallel(capture("llama-3.1-70b"), 8), wire(cluster(group), 1, 8)
    read, write = Step.prefill(64, 1024), Step.decode(64, 1024 + 256)
    return timeline(cut, on, read, ladder).seconds + 512 * timeline(cut, on, write, ladder).seconds


def loss(technique: LadderResidual) -> float:
    """Held-out loss over that of a model with the usual residual, from the same weights and batches."""
    if not technique.ladder:
        return math.nan  # `overlapped` shows that it hides nothing
    return _trained(True) / _trained(False)


@cache
def _trained(ladder: bool) -> float:
    """Loss on held-out text after training on the sample text."""
    import torch

    from narrows.modules.decoder import Stage
    from narrows.samples import text

    config: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                              "num_key_value_heads": 4, "vocab_size": 128, "rms_norm_eps": 1e-5}  # fmt: skip
    data = torch.tensor(list(text()[1][:200_000].encode("ascii", "replace")), dtype=torch.long)
    windows = data.unfold(0, _TOKENS + 1, _TOKENS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are not worth a second one
    torch.manual_seed(0)
    model = Stage(config, range(4), ladder=ladder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(1)

    def of(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    for _ in range(_STEPS):
        optimizer.zero_grad()
        of(windows[torch.randint(0, len(windows) - _HELD_OUT, (_BATCH,), generator=draw)]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        found = float(of(windows[-_HELD_OUT:]))
    torch.set_num_threads(threads)
    return found
