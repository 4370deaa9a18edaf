"""OTOv3 on real structures: the graph and the model shrink alike, and what it cannot do it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows import samples
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.modules.channel_graph import groups
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.sparsity_pruning.otov3 import OTOv3


def resnet() -> tuple[nn.Module, dict[str, Any], Step]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], num_labels=5)
    return ResNetForImageClassification(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}, Step.forward()


def llama() -> tuple[nn.Module, dict[str, Any], Step]:
    model, batches = samples.tiny_llama(2, tokens=16)
    return model.eval(), dict(batches[0]), Step.decode(2, 16)


def minilm() -> tuple[nn.Module, dict[str, Any], Step]:
    return samples.minilm()[0], {"input_ids": torch.arange(1, 17)[None]}, Step.forward(1, 16)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("make", [resnet, llama, minilm])
def test_the_square_commutes_on_real_structures(make: Any, heads: bool) -> None:
    model, batch, step = make()
    technique = OTOv3(0.5, heads)
    given = batch if "pixel_values" in batch else None
    before = from_module(model, step, inputs=given)
    assert technique.check(before, None, step) is True
    predicted = total(technique.rewrite(before), step)
    found = from_module(technique.apply(model, [batch]), step, inputs=given)
    assert total(found, step).flop == pytest.approx(predicted.flop, rel=1e-9)
    assert total(found, step).flop < 0.95 * total(before, step).flop
    assert found.weight_bytes == pytest.approx(technique.rewrite(before).weight_bytes, rel=1e-9)


def test_the_structure_for_saved_weights_is_the_same() -> None:
    (first, batch, _), (second, *_) = llama(), llama()
    pruned = OTOv3(0.25, heads=True).apply(first, [batch])
    structure = OTOv3(0.25, heads=True).restructure(second)
    structure.load_state_dict(pruned.state_dict())
    assert torch.equal(structure(**batch).logits, pruned(**batch).logits)


def test_which_channels_of_published_models_can_go() -> None:
    def removable(name: str, kind: str, heads: bool = False) -> dict[str, int]:
        graph = capture(name)
        return {
            op.name.split(".")[-1]: made for op, (_, made) in zip(graph, groups(graph, heads), strict=True) if op.kind == kind
        }

    llama = removable("llama-3.2-1b", "linear")
    assert (llama["gate_proj"], llama["up_proj"], llama["down_proj"], llama["q_proj"], llama["lm_head"]) == (8192, 8192, 0, 0, 0)
    assert removable("llama-3.2-1b", "linear", heads=True)["q_proj"] == 8
    assert removable("gpt2", "linear", heads=True)["c_attn"] == 0  # queries, keys and values in one: not told apart


def test_refusals_name_the_reason() -> None:
    graph = from_module(nn.Sequential(nn.Linear(8, 4)), Step.forward(1, 2))
    verdict = OTOv3().check(graph, None, Step.forward(1, 2))
    assert isinstance(verdict, No)
    assert "answer" in verdict.reason
    with pytest.raises(NarrowsError, match="share"):
        OTOv3(share=1.0)
    with pytest.raises(NarrowsError, match="batch of data"):
        OTOv3().apply(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)))
    with pytest.raises(NarrowsError, match="none of its channels"):
        OTOv3().apply(nn.Sequential(nn.Linear(8, 4)), [{"input": torch.randn(1, 8)}])
    spoilt = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    nn.init.constant_(spoilt[0].bias, torch.nan)
    with pytest.raises(NarrowsError, match="NaN"):
        OTOv3().apply(spoilt, [{"input": torch.randn(1, 8)}])


class Stated(nn.Module):
    """Its own code says how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu().view(-1, 6))
        return y


def test_sizes_that_the_code_states_are_named() -> None:
    with pytest.raises(NarrowsError, match="states sizes"):
        OTOv3().apply(Stated(), [{"x": torch.randn(1, 8)}])
