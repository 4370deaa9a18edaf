import pytest
import torch
from torch import nn

from narrows.backward import gradient_exchange, training
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.errors import NarrowsError
from narrows.graph import DType, Graph
from narrows.modules.adapted_linear import AdaptedLinear
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.sparsity_pruning.deft_density_efficient_fine_tuning import Deft


def test_only_adapters_and_the_output_layer_are_trained_and_exchanged() -> None:
    """As many numbers are updated in the graph as the module trains."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.lm_head = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 20)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.lm_head(self.act(self.up(input)))
            return answer

    model = Model()
    graph = gradient_exchange(training(from_module(model, Step.forward(4), {"input": torch.randn(4, 32)})), 2)
    changed = Deft(rank=4).rewrite(graph)
    optimizer = Deft(rank=4).attach(model, lr=1e-3)
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert trained == 4 * (32 + 64) + 65 * 20
    assert isinstance(model.up, AdaptedLinear) and type(model.lm_head) is nn.Linear
    for kind in ("optimizer", "all_reduce"):
        assert sum(op["elements"] for op in changed if op.kind == kind) == trained


def test_what_cannot_be_tuned_is_refused() -> None:
    graph = training(capture("bert-base"))
    packed = graph.map(lambda op: op.but(weight=DType("int4", 4, 64, 16)) if op.kind == "linear" else op)
    for verdict in (Deft().check(graph, None, Step.forward(1, 8)), Deft().check(packed, None, Step.train(1, 8)),
                    Deft(rank=4096).check(graph, None, Step.train(1, 8))):  # fmt: skip
        assert isinstance(verdict, No)
    with pytest.raises(NarrowsError, match="activation"):
        Deft().attach(nn.Linear(32, 32))
    with pytest.raises(NarrowsError, match="inputs and outputs"):
        Deft().attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    broken = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(NarrowsError, match="NaN"):
        Deft().attach(broken)


def test_an_empty_graph_stays_empty() -> None:
    assert Deft().rewrite(Graph("empty", ())).ops == ()


@pytest.mark.parametrize("wrong", [{"strength": -1}, {"width": 0}, {"rank": 0}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(NarrowsError):
        Deft(**wrong)
