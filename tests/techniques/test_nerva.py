"""The random graphs that Nerva trains: their size, their place, and where they are refused."""

import pytest
import torch
from torch import nn

from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.modules.sparse_linear import SparseLinear
from narrows.step import Step
from narrows.techniques.sparsity_pruning.nerva import Nerva


def test_a_layer_keeps_as_many_weights_for_each_neuron_and_their_variance() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(1024, 512)
    spread = float(dense.weight.detach().std())
    (layer,) = Nerva(6.0).apply(nn.Sequential(dense))
    assert isinstance(layer, SparseLinear)
    assert layer.values.numel() == 6 * (1024 + 512)
    sums = layer.weight.square().sum(1).mean()  # what an output's variance is made of
    assert float(sums) == pytest.approx(1024 * spread**2, rel=0.1)


def test_small_layers_stay_full_and_patterns_differ_by_name() -> None:
    model = Nerva(6.0).apply(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)))
    first, second, last = (layer.weight != 0 for layer in model)  # type: ignore[union-attr]
    assert last.all()
    assert not torch.equal(first, second)


def test_where_it_does_not_pay_it_says_so() -> None:
    graph, step = from_module(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), Step.forward(64)), Step.train(64, 1)
    assert "per_neuron=6, 0.812" in str(Nerva().check(graph, None, Step.decode(64, 1)))
    assert "per_neuron=24, 0.25" in str(Nerva(24.0).check(graph, None, step))
    assert "runs on CPUs" in str(Nerva().check(graph, machine("h100-sxm"), step))
    with pytest.raises(NarrowsError, match="per_neuron=-1"):
        Nerva(-1.0)
