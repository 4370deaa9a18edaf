"""The steps of a plan alone and together."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from narrows import ablation, verify
from narrows.machine import machine
from narrows.plan import Plan
from narrows.report.ablation import ablation_table
from narrows.report.terminal import show_ablation

PLAN = Plan.parse("llm-drop:attention=1 + bf16 + int8")


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 128, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    batches = [{"input_ids": torch.randint(128, (1, 32), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = ablation.ablate(model, PLAN, machine("h100-sxm"), 16, 16, batches[:2], batches[2:], rounds=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = PLAN.apply(model, batches[:2])
    return made, verify.perplexity(changed, batches[2:]), verify.resident_bytes(changed), before


def test_each_step_alone_and_the_plan_up_to_each(found):
    made, perplexity, size, before = found
    assert [one.plan for one in made.alone] == ["llm-drop:attention=1", "bf16", "int8"]
    assert [one.plan for one in made.up_to] == ["llm-drop:attention=1", "llm-drop:attention=1 + bf16", str(PLAN)]
    assert made.alone[0] == made.up_to[0] and made.measure == "perplexity"
    plain = sum(t.nbytes for t in before.values())
    assert made.up_to[-1].bytes == pytest.approx(size / plain, rel=0.02)  # the rotary table is no weight
    assert made.alone[1].bytes == pytest.approx(0.5, abs=0.01)
    original = perplexity / made.up_to[-1].quality
    assert 1 < original < 1000
    assert all(v > 0 for one in made.alone for v in (*one.speed.values(), *(p for p, _, _ in one.predicted.values())))


def test_the_product_is_that_of_the_single_steps(found):
    made = found[0]
    for of, product in made.products.items():
        assert product.of_steps == pytest.approx(math.prod(one.gain(of) for one in made.alone))
        assert product.interaction == pytest.approx(made.up_to[-1].gain(of) / product.of_steps)
    assert made.products["bytes"].interaction > 1  # int8 saves less of what is bf16 already
    assert {"quality", "bytes", "prefill", "decode"} == made.products.keys()
    assert made.products["bytes"].predicted_whole is None and made.products["decode"].predicted_whole > 0


def test_it_is_printed_and_kept(found):
    made = found[0]
    assert json.loads(json.dumps(ablation.as_json(made)))["products"]["decode"]["interaction"] > 0
    table = ablation_table(made)
    assert len(table.rows) == 3 + 2 + 2 and {len(row) for row in table.rows} == {len(table.columns)}
    screen = Console(record=True, width=120)
    show_ablation(made, screen)
    assert "product of the steps" in screen.export_text()
    single = replace(made, alone=made.alone[:1], up_to=made.up_to[:1])
    assert single.products["decode"].interaction == 1


def test_a_recovery_counts_with_what_it_adds_to_the_steps_before_it():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    batches = [{"input_ids": torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    plan = Plan.parse("llm-drop:attention=1 + recover:steps=8,rate=0.01 + int8")
    made = ablation.ablate(model, plan, machine("h100-sxm"), 8, 8, batches[:2], batches[2:], 1, training=batches[2:])
    dropped, recovery, packed = made.alone
    assert [one.plan for one in made.alone] == str(plan).split(" + ")
    assert recovery.quality == pytest.approx(made.up_to[1].quality / made.up_to[0].quality) and recovery.quality != 1
    assert [one.added for one in made.alone] == [False, True, False] and "recover:steps=8,rate=0.01 added" in str(
        ablation_table(made)
    )
    assert recovery.bytes == 1 and {said[0] for said in recovery.predicted.values()} == {1}
    assert made.products["quality"].of_steps == pytest.approx(dropped.quality * recovery.quality * packed.quality)
    original = verify.perplexity(model, batches[2:])
    whole = verify.perplexity(plan.apply(model, batches[:2], batches[2:]), batches[2:])
    assert made.up_to[-1].quality == pytest.approx(whole / original, rel=1e-6)  # step by step is what it does at once
