"""Greenformer factors what its rule allows, on the graph and on the module alike."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn

from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.graph import FP32, Graph, Op
from narrows.plan import Plan, parse
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.low_rank_codebook_sharing.greenformer import SOLVERS, Greenformer

FORWARD = Step.forward(2, 16)
IDS = [{"input_ids": torch.arange(32).view(2, 16)}]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
WIDE = {"hidden_size": 64, "intermediate_size": 128, **SIZES}
NETWORKS = {
    "bert": (hf.BertModel, hf.BertConfig(**WIDE)),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=1)),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(num_key_value_heads=2, **WIDE)),
    "llama, tied": (hf.LlamaForCausalLM, hf.LlamaConfig(tie_word_embeddings=True, **WIDE)),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("technique", [Greenformer(), Greenformer(rank=7, solver="random")], ids=str)
def test_the_square_commutes(network, technique):
    kind, config = NETWORKS[network]
    torch.manual_seed(0)
    model = kind(config).eval()
    graph = from_module(model, FORWARD)
    assert technique.check(graph, None, FORWARD) is True
    changed = technique.apply(model, IDS)
    assert total(technique.rewrite(graph), FORWARD) == total(from_module(changed, FORWARD), FORWARD)
    assert changed(**IDS[0])[0].isfinite().all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_solver_on_the_example(solver):
    example, technique = Greenformer.example(), Greenformer(rank_ratio=0.75, solver=solver)
    before = from_module(example.model, example.step)
    truth = example.model(**example.data[0])
    changed = technique.apply(example.model, example.data)
    assert total(technique.rewrite(before), example.step) == total(from_module(changed, example.step), example.step)
    error = (changed(**example.data[0]) - truth).norm() / truth.norm()
    assert error < (0.5 if solver in ("svd", "activation") else 3)


RANKS = [(512, 512, 0.5, 128), (300, 10, 0.5, 4), (2, 2, 0.5, 0), (512, 512, 1.0, 0)]


@pytest.mark.parametrize("inputs, outputs, ratio, rank", RANKS)
def test_the_rule_of_the_rank(inputs, outputs, ratio, rank):
    assert Greenformer(rank_ratio=ratio).rank_of(inputs, outputs) == rank


def test_a_linear_and_a_convolution_on_the_graph():
    linear = Op("a", "linear", {"rows": 3, "inputs": 64, "outputs": 64, "bias": 1}, act=FP32, weight=FP32)
    conv = Op("c", "conv", {"positions": 25, "in_positions": 100, "in_channels": 16, "out_channels": 32, "kernel": 9, "bias": 1},
              act=FP32, weight=FP32)  # fmt: skip
    grouped = conv.but(name="g", groups=2)
    ops = Greenformer(rank=5).rewrite(Graph("x", (linear, conv, grouped))).ops
    assert ops == (
        linear.but(name="a.0", outputs=5, bias=0),
        linear.but(name="a.1", inputs=5),
        conv.but(name="c.0", out_channels=5, bias=0),
        conv.but(name="c.1", in_positions=25, in_channels=5, kernel=1),
        grouped,
    )


def test_heads_tied_or_named_stay_whole():
    for name in ("llama-3.2-1b", "llama-2-7b"):
        graph = Greenformer().rewrite(capture(name))
        assert [op.name for op in graph if op.name.startswith("lm_head")] == ["lm_head"]


def test_refusals_have_reasons_and_leave_the_model():
    model = nn.Sequential(nn.Linear(8, 8))
    verdict = Greenformer(rank=6).check(from_module(model, Step.forward(2)), None, FORWARD)
    assert isinstance(verdict, No) and "rank=6" in verdict.reason
    weight = model[0].weight.clone()
    with pytest.raises(NarrowsError, match="no layer has fewer parameters"):
        Greenformer(rank=6).apply(model, [])
    assert torch.equal(model[0].weight, weight)
    assert isinstance(Greenformer().check(Graph("x", ()), None, FORWARD), No)


def test_the_baseline_factors_nothing():
    graph = capture("bert-base")
    assert Greenformer().baseline().rewrite(graph) == graph


@pytest.mark.parametrize("wrong", [{"solver": "sdv"}, {"rank_ratio": 0.0}, {"rank_ratio": 1.5}, {"rank": -1}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(NarrowsError, match="greenformer"):
        Greenformer(**wrong)


def test_activation_needs_data_and_says_so():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(NarrowsError, match="calibration"):
        Greenformer(solver="activation").apply(model, [])
    assert type(model[0]) is nn.Linear


def test_its_text_rebuilds_it():
    assert str(Plan((Greenformer(rank_ratio=0.25, solver="snmf"),))) == "greenformer:rank_ratio=0.25,solver=snmf"
    assert all(parse(str(Plan((t,)))) == t for t in Greenformer.space())  # type: ignore[arg-type]


def test_a_blank_model_gets_the_same_structure():
    kind, config = NETWORKS["bert"]
    with torch.device("meta"):
        blank = Greenformer().restructure(kind(config))
    full = Greenformer().apply(copy.deepcopy(kind(config)), [])
    assert {n: t.shape for n, t in blank.state_dict().items()} == {n: t.shape for n, t in full.state_dict().items()}


def test_convolutions_are_factored_for_the_patches_they_see():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    smooth = nn.functional.interpolate(torch.randn(12, 3, 6, 6), size=24, mode="bilinear")
    batches, held_out = [{"input": x} for x in smooth[:8].split(4)], smooth[8:]
    with torch.no_grad():
        truth = model(held_out)
        errors = {}
        for solver in ("svd", "activation"):
            changed = Greenformer(solver=solver).apply(copy.deepcopy(model), batches)
            errors[solver] = float((changed(held_out) - truth).norm() / truth.norm())
    assert errors["activation"] < 0.5 * errors["svd"], errors
