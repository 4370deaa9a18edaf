"""What AQT claims: wide in 4 bits beats narrow in bf16 at equal cost, and training with the rounding beats rounding after."""

import math
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.capture.torch import from_module
from narrows.cost import cost
from narrows.experiments.digit_network import BATCH, correct, train
from narrows.experiments.steady import one_thread
from narrows.modules.quantized_training import InputCodes, products, quantize
from narrows.step import Step
from narrows.techniques.quantization.aqt_pareto_4_bit_resnet import AQT, PLAIN

TRAINED = 4000


class _Block(nn.Module):  # type: ignore[misc]
    """Two convolutions with what they are given added."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.second, self.last_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last_norm(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(y + self.skip(x))


def _network(width: int) -> nn.Sequential:
    """A residual network for images [B, 1, 28, 28] whose first maps have `width` channels; always the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


@cache
@one_thread()
def _trained(technique: AQT, width: int) -> nn.Module:
    """The network after its training; the same batches each time."""
    model = _network(width)
    train(model, optimizer=technique.attach(model, lr=5e-3), count=TRAINED)
    return model


def _cost(technique: AQT, width: int) -> float:
    """Multiply-adds of one image, each as its bits over 16."""
    step = Step.forward(1)
    ops = technique.deployed(from_module(_network(width), step)).find("conv", "linear")
    return sum(
        float(cost(op, step).flop) / 2 * (int(op.compute.removeprefix("int")) if op.compute else PLAIN) / PLAIN for op in ops
    )


def gain_at_equal_cost(technique: AQT) -> float:
    """Points that it gains over bf16 at a width where that costs as much: the least over two such pairs.

    It takes the widest network of twice or once the width that costs no more.
    """
    gains: list[float] = []
    for narrow in (2, 4):
        most = _cost(technique.baseline(), narrow)
        width = next(w for w in (2 * narrow, narrow) if _cost(technique, w) <= 1.01 * most)
        gains.append(correct(_trained(technique, width)) - correct(_trained(technique.baseline(), narrow)))
    return min(gains)


def gain_over_rounding_afterwards(technique: AQT) -> float:
    """Points over the network that was trained plain and then rounded, its bounds taken from five batches."""
    plain = deepcopy(_trained(technique.baseline(), 4))
    quantize(plain, technique.widths(products(plain)), technique.spread)
    for codes in (m for m in plain.modules() if isinstance(m, InputCodes)):
        codes.train()
    with torch.no_grad():
        for images in samples.digits()[0][: 5 * BATCH].split(BATCH):
            plain(images)
    gain: float = correct(_trained(technique, 4)) - correct(plain.eval())
    return gain


def integer_error(technique: AQT) -> float:
    """Largest distance of a layer's outputs from products of its integers, over its largest output; infinite without any."""
    model = _trained(technique, 8)
    worst, found = 0.0, [m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def compare(layer: Any, given: tuple[Tensor, ...], y: Tensor) -> None:
        nonlocal worst
        codes = layer.parametrizations.weight[0]
        step = codes.step(layer.parametrizations.weight.original)
        whole, x = (layer.weight / step).round().long(), (given[0] / layer.input_codes.step).round().long()
        if isinstance(layer, nn.Conv2d):
            exact, bias = F.conv2d(x.double(), whole.double(), None, layer.stride, layer.padding), 0.0
        else:
            exact, bias = x.double() @ whole.double().T, layer.bias
        scaled = exact * layer.input_codes.step * step.flatten().view(1, -1, *[1] * (y.dim() - 2)) + bias
        worst = max(worst, float((scaled - y).abs().max() / y.abs().max()))

    rounded = [layer for layer in found if hasattr(layer, "input_codes")]
    hooks = [layer.register_forward_hook(compare) for layer in rounded]
    with torch.no_grad():
        model(samples.digits()[0][:64])
    for hook in hooks:
        hook.remove()
    return worst if len(rounded) == len(found) else math.inf
