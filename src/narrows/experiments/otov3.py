"""What OTOv3 claims: zero groups go without a trace, and half the channels go while a network trains, at little loss."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from narrows import samples
from narrows.experiments.digit_network import STEPS, correct, dense, fresh, train
from narrows.experiments.steady import one_thread, time_ratio
from narrows.modules.channels import scale
from narrows.techniques.sparsity_pruning.otov3 import OTOv3


def _networks() -> list[tuple[nn.Module, dict[str, Any]]]:
    """Networks of every kind of binding, each with an input: depthwise, residual, heads, shared key heads, flattened."""
    generator = torch.Generator().manual_seed(0)
    llama, batches = samples.tiny_llama(2, tokens=16)
    return [
        (samples.efficientnet(), {"inputs": torch.randn(1, 3, 224, 224, generator=generator)}),
        (samples.minilm()[0], {"input_ids": torch.randint(1000, 20_000, (1, 24), generator=generator)}),
        (llama.eval(), {**batches[0], "use_cache": False}),
        (fresh().eval(), {"input": samples.digits()[0][:4]}),
    ]


def _answer(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    out = getattr(out, "logits", getattr(out, "last_hidden_state", out))
    return out  # type: ignore[no-any-return]


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def zero_groups_error(technique: OTOv3) -> float:
    """Largest distance between the answers of a network with zero groups and of the one without them, over the largest answer.

    Batch norms are given statistics as training leaves them. Infinite where a network did not lose parameters.
    """
    technique, worst = replace(technique, heads=True), 0.0
    for model, inputs in _networks():
        generator = torch.Generator().manual_seed(1)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            norm.weight.uniform_(1, 2, generator=generator)
            norm.bias.normal_(0, 0.5, generator=generator)
        for family, count in technique.chosen(model, [inputs]):
            stays = torch.randperm(family.count, generator=generator) < count
            scale(model, family, stays.float())
        before, size = _answer(model, inputs), sum(p.numel() for p in model.parameters())
        model = technique.apply(model, [inputs])
        if sum(p.numel() for p in model.parameters()) >= size:
            return math.inf
        worst = max(worst, float((_answer(model, inputs) - before).abs().max() / before.abs().max()))
    return worst


@cache
def _pruned(technique: OTOv3) -> nn.Module:
    """Trained once, from the same start for the same number of steps, and cut afterwards without any tuning."""
    model = fresh()
    forgetting = technique.forgetting(model, [{"input": samples.digits()[0][:1]}], start=STEPS // 4, steps=STEPS // 2)
    train(model, forgetting.step)
    return technique.apply(model, [{"input": samples.digits()[0][:1]}])


@one_thread()
def accuracy_lost(technique: OTOv3) -> float:
    """Percentage points of the digits that the narrow network gets wrong beyond those of one that is trained whole."""
    return correct(dense()) - correct(_pruned(technique))


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def speed_within_three_points(technique: OTOv3) -> float:
    """Time of the whole network's forward pass over that of the narrow one; 1 where that loses more than three points."""
    if accuracy_lost(technique) > 3:
        return 1.0
    images = samples.digits()[0][:256]
    whole, narrow = dense(), _pruned(technique)
    return time_ratio(lambda: whole(images), lambda: narrow(images))
