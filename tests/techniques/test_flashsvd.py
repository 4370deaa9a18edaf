"""FlashSVD: what it refuses, that files come back, and that gradients still flow."""

from dataclasses import replace

import pytest
import torch
from transformers import BertConfig, BertModel

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.directory import load, save
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.plan import Plan
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.low_rank_codebook_sharing.flashsvd import FlashSVD

STEP = Step.forward(2, 20)
IDS = torch.arange(40).view(2, 20)
MASK = (torch.arange(20) < torch.tensor([[20], [11]])).long()


def bert(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 100}
    return BertModel(BertConfig(**sizes, **options)).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_streamed_factors_compute_what_the_factors_do(attention):
    ours, unfused = (FlashSVD(tile=64, stream=s).apply(bert(attn_implementation=attention)) for s in (True, False))
    with torch.no_grad():
        a, b = (m(input_ids=IDS, attention_mask=MASK).last_hidden_state for m in (ours, unfused))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    trained = ours(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(trained, a, rtol=1e-5, atol=1e-5)
    trained.sum().backward()
    assert all(p.grad is not None for n, p in ours.named_parameters() if "pooler" not in n)


def test_the_prediction_has_the_smaller_peak():
    graph, step = capture("bert-base"), Step.forward(8, 512)
    graph = replace(graph, ops=tuple(op for op in graph if ".encoder." in op.name))  # the logits of a vocabulary outweigh it
    streamed, unfused = (FlashSVD(stream=s).rewrite(graph) for s in (True, False))
    matrices = [sum(op.spec.matmul and total(replace(g, ops=(op,)), step).flop for op in g) for g in (streamed, unfused)]
    assert matrices[0] == pytest.approx(matrices[1], rel=1e-9)
    assert footprint(streamed, step).activation_bytes < 0.5 * footprint(unfused, step).activation_bytes


def test_a_saved_model_comes_back(tmp_path):
    plan = Plan((FlashSVD(tile=64),))
    model = plan.apply(bert())
    save(model, None, tmp_path / "out", plan)
    again, _ = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, again(IDS).last_hidden_state)


def test_what_it_cannot_stream_is_refused():
    graph = from_module(bert(), STEP)
    odd = FlashSVD(tile=100).check(graph, None, STEP)
    assert isinstance(odd, No) and "no multiple of tile=100" in odd.reason
    assert isinstance(FlashSVD().check(capture("llama-3.2-1b"), None, Step.prefill(1, 64)), No)
    with pytest.raises(NarrowsError, match="no multiple of 100"):
        FlashSVD(tile=100).apply(bert())
    streamed = FlashSVD(tile=64).apply(bert())
    with pytest.raises(NarrowsError, match="BERT"):
        FlashSVD(tile=64).apply(streamed)
    with pytest.raises(NarrowsError, match="ratio"):
        FlashSVD(rank_ratio=1.5)
