"""What OTOv3 claims: zero groups go without a trace, and half the channels go while a network trains, at little loss."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.experiments.steady import one_thread, time_ratio
from narrows.modules.channels import scale
from narrows.techniques.sparsity_pruning.otov3 import OTOv3

_TRAINING, _BATCH, _EPOCHS = 8000, 100, 3


def _networks() -> list[tuple[nn.Module, dict[str, Any]]]:
    """Networks of every kind of binding, each with an input: depthwise, residual, heads, shared key heads, flattened."""
    generator = torch.Generator().manual_seed(0)
    llama, batches = samples.tiny_llama(2, tokens=16)
    return [
        (samples.efficientnet(), {"inputs": torch.randn(1, 3, 224, 224, generator=generator)}),
        (samples.minilm()[0], {"input_ids": torch.randint(1000, 20_000, (1, 24), generator=generator)}),
        (llama.eval(), {**batches[0], "use_cache": False}),
        (_fresh().eval(), {"input": samples.digits()[0][:4]}),
    ]


def _fresh() -> nn.Sequential:
    """A network for digits; always the same one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


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


def _train(model: nn.Module, after: Callable[[], None] = lambda: None) -> None:
    """Adam with a falling rate over the training digits; `after` is called after each step."""
    images, labels = samples.digits()
    steps = _EPOCHS * _TRAINING // _BATCH
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(_EPOCHS):
        for batch in torch.randperm(_TRAINING, generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            after()
            schedule.step()
    model.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def _correct(model: nn.Module) -> float:
    """Percent of the digits right that it was not trained on."""
    images, labels = samples.digits()
    right = model(images[_TRAINING:]).argmax(1) == labels[_TRAINING:]
    return 100 * float(right.float().mean())


@cache
def _dense() -> nn.Sequential:
    model = _fresh()
    _train(model)
    return model


@cache
def _pruned(technique: OTOv3) -> nn.Module:
    """Trained once, from the same start for the same number of steps, and cut afterwards without any tuning."""
    model, steps = _fresh(), _EPOCHS * _TRAINING // _BATCH
    forgetting = technique.forgetting(model, [{"input": samples.digits()[0][:1]}], start=steps // 4, steps=steps // 2)
    _train(model, forgetting.step)
    return technique.apply(model, [{"input": samples.digits()[0][:1]}])


@one_thread()
def accuracy_lost(technique: OTOv3) -> float:
    """Percentage points of the digits that the narrow network gets wrong beyond those of one that is trained whole."""
    lost: float = _correct(_dense()) - _correct(_pruned(technique))
    return lost


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def speed_within_three_points(technique: OTOv3) -> float:
    """Time of the whole network's forward pass over that of the narrow one; 1 where that loses more than three points."""
    if accuracy_lost(technique) > 3:
        return 1.0
    images = samples.digits()[0][:256]
    dense, narrow = _dense(), _pruned(technique)
    return time_ratio(lambda: dense(images), lambda: narrow(images))
