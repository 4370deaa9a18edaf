"""A budget in the user's units: what it says, what meets it, and which limit binds where nothing does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrows.cli import cli
from narrows.errors import NarrowsError
from narrows.plan import Plan
from narrows.search.budget import Budget, Menu, _harms, find, said
from narrows.verify import resident_bytes

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def test_a_budget_is_read_in_the_user_s_units() -> None:
    read = Budget.parse("size<=60%, decode>=1.25x, prefill >= 2, perplexity<=+3%", 1e9).most
    assert read == pytest.approx({"size": 0.6, "decode": 0.8, "prefill": 0.5, "perplexity": 1.03})
    assert Budget.parse("size<=250MB", 1e9).most == {"size": 0.25}
    assert Budget.parse("perplexity<=1.1x", 1).most == pytest.approx({"perplexity": 1.1})
    assert Budget.parse("perplexity<=+3%", 1).minimised == "decode"
    assert [said(n, r) for n, r in read.items()] == ["size 60 %", "decode 1.25 x", "prefill 2.00 x", "perplexity +3.0 %"]


@pytest.mark.parametrize("text", ["", "size", "size>=60%", "decode<=2x", "decode>=0x", "speed>=2x", "size<=many", "decode>=20%"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(NarrowsError, match="budget"):
        Budget.parse(text, 1e9)


def menu() -> Menu:
    size = np.tile([0.4, 0.2, 0.1], (2, 1))
    harm = np.array([[0.0, 0.01, 0.1], [0.0, 0.02, 0.4]])
    costs = {"size": size, "perplexity": harm, "decode": size, "prefill": 1 - size}
    return Menu(("a", "b"), ("plain", "int8", "int4g32"), costs, {"size": 0.2, "decode": 0.2, "prefill": 0.2, "perplexity": 0.0})


def test_the_least_harm_within_a_size() -> None:
    chosen, ratios, bound = menu().choose({"size": 0.5}, "perplexity")
    assert chosen.tolist() == [2, 1]
    assert ratios["size"] == pytest.approx(0.5) and ratios["perplexity"] == pytest.approx(np.exp(0.12))
    assert bound <= ratios["perplexity"] + 1e-12
    assert menu().technique(chosen).format_of("a").bits == 4
    assert menu().technique(np.array([0, 0])) is None


def test_limits_that_cannot_be_kept_together_are_named_with_their_distance() -> None:
    most = {"size": 0.5, "perplexity": 1.05}
    assert menu().choose(most, "perplexity")[0] is None or menu().choose(most, "perplexity")[1]["perplexity"] > 1.05
    size, perplexity = menu().shortfalls(most)
    assert size == "size 60 % at best with the other limits kept, size 50 % asked"
    assert perplexity == "perplexity +12.7 % at best with the other limits kept, perplexity +5.0 % asked"


def test_a_measurement_corrects_the_estimates() -> None:
    before = menu()
    estimated = before.ratios(np.array([1, 1]))
    after = before.corrected(estimated, {**estimated, "decode": estimated["decode"] + 0.1, "perplexity": np.exp(0.06)})
    again = after.ratios(np.array([1, 1]))
    assert again["decode"] == pytest.approx(estimated["decode"] + 0.1)
    assert again["perplexity"] == pytest.approx(np.exp(0.06))


def test_a_model_within_its_budget_or_none() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [{"input_ids": torch.randint(96, (1, 32))} for _ in range(4)]
    found = find(model, Plan(), Budget.parse("size<=24%, perplexity<=+5%", resident_bytes(model)), batches[:2], batches[2:])
    assert found.model is not None and found.plan is not None and "int4" in str(found.plan)
    assert resident_bytes(found.model) <= 0.24 * resident_bytes(model)
    assert found.measured["perplexity"] <= 1.05 and found.bound <= found.estimated["perplexity"] + 1e-9
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    none = find(model, Plan(), Budget.parse("size<=10%", resident_bytes(model)), batches[:2], batches[2:])
    assert none.model is None and none.plan is None and "size 10 % asked" in none.shortfalls[0]


def test_compensated_rounding_is_another_menu() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    seen = [{"input_ids": torch.randint(96, (1, 32))} for _ in range(4)]
    formats = ("plain", "int8", "int4g32")
    plain, better = (_harms(model, formats, seen, lambda *said: None, compensate) for compensate in (False, True))
    embedding = len(plain) - 1  # its rows are looked up: no errors cancel
    assert plain.shape == (16, 3) and (plain[:, 0] == 0).all()
    assert np.array_equal(plain[:, :2], better[:, :2]) and plain[embedding, 2] == better[embedding, 2] > 0
    assert better[:embedding, 2].sum() < 0.8 * plain[:embedding, 2].sum()
    assert replace(menu(), compensate=True).technique(np.array([2, 1])).compensate


def test_a_plan_and_a_budget_exclude_each_other() -> None:
    for options in ([], ["--plan", "bf16", "--budget", "size<=60%"]):
        with pytest.raises(NarrowsError, match="plan or a budget"):
            cli(["apply", "smollm2-135m", "--out", "nowhere", *options], standalone_mode=False)
