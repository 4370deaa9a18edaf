"""Findings are what-ifs of the cost model, and an explanation's figures are those of `cost`."""

import json
import re
from dataclasses import fields, replace

import pytest
from click.testing import CliRunner

from narrows.capture import bundled, capture
from narrows.cli import cli
from narrows.cost import Cost, cost
from narrows.costmodel import op_time
from narrows.diagnose import Diagnosis, diagnose, prepared
from narrows.errors import NarrowsError
from narrows.explain import LEAST, Finding, explain, explanations, findings
from narrows.formulas import FORMULAS, formulas, with_values
from narrows.graph import BF16, FP32, Graph, Op, Size
from narrows.kinds import KINDS
from narrows.machine import machine
from narrows.step import Step

H100 = machine("h100-sxm")
TOKENS = Size.of(tokens=1)


def one(*ops: Op, eager: bool = False, tokens: int = 8192) -> Diagnosis:
    return diagnose(Graph("made", ops, eager=eager), H100, Step.forward(1, tokens))


def linear(rows: Size | int = TOKENS, inputs: int = 4096, outputs: int = 4096, **rest: object) -> Op:
    return Op("layer", "linear", {"rows": rows, "inputs": inputs, "outputs": outputs}, weight=BF16, **rest)  # type: ignore[arg-type]


def found(d: Diagnosis, words: str) -> Finding:
    (only,) = (f for f in findings(d) if words in f.problem)
    return only


def value(text: str) -> float:
    plain = re.sub(r",(?! )", "", text)  # commas inside of a number; those between two arguments have a blank behind them
    plain = plain.replace(" x ", " * ").replace(" ^ ", " ** ")
    return float(eval(plain, {"__builtins__": {}, "min": min}))  # noqa: S307  the text is ours: figures and signs


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("step", [Step.prefill(2, 300), Step.decode(3, 700), Step.train(2, 128)], ids=lambda s: s.phase)
@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v2-lite", "falcon-h1-7b", "resnet-50", "gpt-oss-20b", "gpt2"]
)
def test_the_text_of_a_formula_gives_the_cost(name: str, step: Step, eager: bool) -> None:
    graph = prepared(capture(name), step, H100, 2 if name in ("llama-3.1-8b", "mixtral-8x7b") else 1)
    for op in graph:
        if not op.runs(step):
            continue
        work, texts = cost(op, step, eager), formulas(op, step, eager)
        for field in fields(Cost):
            if field.name != "launches":
                shown = value(with_values(texts[field.name], op, step)) if field.name in texts else 0.0
                assert shown == pytest.approx(float(getattr(work, field.name)), rel=1e-4), (op.name, op.phase, field.name)


def test_every_kind_has_its_formulas_as_text() -> None:
    assert set(FORMULAS) == set(KINDS)


def test_an_unaligned_head_costs_what_the_model_says_of_its_neighbours() -> None:
    def scores(head: float, many: float) -> Op:
        sides = {"rows": 8192 * many, "inputs": head, "outputs": 2048, "matrices": 4 * many}
        return Op("scores", "matmul", sides)

    d = one(scores(108, 20))
    finding = found(d, "head size 108")
    others = {size: op_time(scores(size, 20 * 108 / size), d.step, H100) for size in (96, 104, 112, 128)}
    best = min(float(t.seconds) for t in others.values())
    assert finding.loss_seconds == pytest.approx(d.seconds - best, rel=0.02)
    assert finding.gain == pytest.approx(d.seconds / (d.seconds - finding.loss_seconds))
    assert all(f"{size}: -" in finding.remedy for size in others)
    assert not [f for f in findings(one(scores(128, 16))) if "head size" in f.problem]


def test_fused_attention_names_a_head_that_is_no_multiple_of_64() -> None:
    def attention(head: int, heads: int) -> Op:
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": head, "value_dim": head}
        return Op("attention", "attention", {**sizes, "queries": TOKENS, "pairs": Size.of(pairs=1), "context": TOKENS})

    assert found(one(attention(72, 16)), "head size 72").gain > 1
    assert not [f for f in findings(one(attention(128, 16))) if "head size" in f.problem]


def test_a_vocabulary_of_odd_width_is_no_finding() -> None:
    """What it costs was never measured here: the penalty of odd heads does not carry over to a weight."""
    assert not [f for f in findings(one(linear(outputs=50257))) if "outputs" in f.problem]


def test_rows_that_do_not_fill_tiles_are_told_with_better_ones() -> None:
    d = one(linear(), tokens=1100)
    shown = [f for f in findings(d) if "1,100 rows" in f.problem]
    assert d.ledger["partial tiles"] > 0.1 * d.seconds
    assert shown and shown[0].gain > 1 and "rows a step" in shown[0].remedy


def test_experts_with_few_tokens_are_told_what_a_full_tile_gives() -> None:
    finding = found(diagnose(capture("mixtral-8x7b"), H100, Step.decode(8, 1000)), "tokens per expert")
    assert "and 1 more" in finding.problem and "128 tokens" in finding.remedy and finding.gain > 2


def test_short_rows_of_keys_are_a_finding_of_attention_alone() -> None:
    sizes = {"heads": 32, "kv_heads": 32, "head_dim": 128, "value_dim": 128}
    window = {"queries": TOKENS, "pairs": Size.of({"pairs[window=128]": 1}), "context": TOKENS}
    assert "keys" in found(one(Op("attention", "attention", {**sizes, **window})), "a query meets").remedy


def test_small_kernels_are_compiled_or_fused() -> None:
    small = Op("act", "elementwise", {"elements": TOKENS, "reads": TOKENS}, kernels=6, repeat=100)
    eager, compiled = one(small, eager=True, tokens=64), one(small, tokens=64)
    assert found(eager, "600 kernels").gain == pytest.approx(eager.seconds / compiled.seconds)
    assert "half as many" in found(compiled, "100 kernels").remedy


@pytest.mark.parametrize("name", bundled())
def test_findings_of_every_model_are_worth_telling(name: str) -> None:
    d = diagnose(capture(name), H100, Step.forward(2, 200, 64))
    shown = findings(d)
    assert [f.gain for f in shown] == sorted((f.gain for f in shown), reverse=True)
    names = {entry.op.name for entry in d.ops}
    for f in shown:
        assert LEAST * d.seconds <= f.loss_seconds < d.seconds and f.gain > 1
        assert f.op in names


def test_an_op_is_found_by_name_end_layer_and_glob() -> None:
    d = diagnose(capture("llama-3.1-8b"), H100, Step.decode(1, 1000))
    for name in ("model.layers.*.self_attn.q_proj", "q_proj", "self_attn.q_proj", "model.layers.3.self_attn.q_proj", "*q_proj"):
        assert explain(d, name).startswith("model.layers.*.self_attn.q_proj (linear, forward, 32 x)"), name
    assert len(explanations(d, "*_proj")) == 7
    with pytest.raises(NarrowsError, match="Did you mean q_proj"):
        explain(d, "q_prjo")


def test_an_explanation_says_where_its_constants_come_from() -> None:
    step = Step.prefill(1, 512)
    text = explain(diagnose(capture("llama-3.1-8b"), H100, step), "gate_proj")
    assert "FLOP       = 2 x rows x inputs x outputs x repeat" in text
    assert "2 x 512 x 4,096 x 14,336 x 32" in text
    assert "989 TFLOP/s" in text and "hopper: 96 rows" in text
    own = replace(H100, efficiency={"matmul": {"median": 0.5, "low": 0.4, "high": 0.6}})
    assert "0.5 is reached (0.4 to 0.6; given with this machine)" in explain(diagnose(capture("gpt2"), own, step), "mlp.c_fc")
    other = explain(diagnose(capture("gpt2"), machine("tpu-v4"), step), "mlp.c_fc")
    assert "any: assumption" in other and "not measured on this generation" in other


def test_nothing_is_found_where_there_is_nothing_to_do() -> None:
    assert findings(one(Op("kept", "checkpoint", {"elements": 4}, act=FP32))) == []


def test_the_command_line_explains_and_lists_findings() -> None:
    base = ["diagnose", "gpt2", "--machine", "h100-sxm", "--prefill", "--batch", "16"]
    run = CliRunner()
    data = json.loads(run.invoke(cli, [*base, "--json", "--explain", "mlp.c_fc"], catch_exceptions=False).output)
    assert data["explanation"][0].startswith("transformer.h.*.mlp.c_fc (linear")
    assert {"op", "problem", "loss_seconds", "remedy", "gain"} <= set(data["findings"][0])
    assert "explanation" not in json.loads(run.invoke(cli, [*base, "--json"], catch_exceptions=False).output)
    assert run.invoke(cli, [*base, "--explain", "lm_head"], catch_exceptions=False).output.startswith("lm_head (linear")
    assert "What the shapes cost" in run.invoke(cli, base, catch_exceptions=False).output
