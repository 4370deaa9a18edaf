"""The cost model's laws: closed forms, exact ledgers, monotony, arrays equal to points."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.backward import gradient_exchange, training
from narrows.capture import bundled, capture
from narrows.cost import CAUSES, cost, total
from narrows.costmodel import achieved, op_seconds, op_time, rests_on, tile_use, wired
from narrows.diagnose import as_json, diagnose, seconds
from narrows.footprint import footprint
from narrows.graph import BF16, FP16, FP32, Graph, Op, at
from narrows.kinds import KINDS
from narrows.machine import machine, machines
from narrows.parallel import tensor_parallel
from narrows.step import Step

H100 = machine("h100-sxm")
STEPS = (Step.prefill(2, 512), Step.decode(4, 1000), Step.train(1, 256))


def matrix_flop(graph: Graph, step: Step) -> float:
    return sum(op.spec.flop(op.sized(step)) * op.repeat for op in graph if KINDS[op.kind].matmul and op.kind != "attention")


def test_llama_costs_two_flop_a_parameter_and_token() -> None:
    graph, step = capture("llama-3.1-8b"), Step.forward(1, 100)
    embeddings = 128256 * 4096
    norms = (32 * 2 + 1) * 4096
    assert graph.parameters == 8_030_261_248
    assert matrix_flop(graph, step) == 2 * (graph.parameters - embeddings - norms) * 100


def test_causal_attention_is_counted_as_executed() -> None:
    graph, step = capture("llama-3.1-8b"), Step.prefill(1, 1000)
    (attention,) = graph.find("attention")
    assert cost(attention, step).flop == 32 * 2 * 32 * (128 + 128) * 1000 * 1001 / 2
    assert any("half" in note for note in graph.notes)


def test_decode_reads_every_weight_once_and_the_whole_cache() -> None:
    graph, step = capture("llama-3.1-8b"), Step.decode(3, 999)
    work = total(graph, step)
    assert work.weight_bytes == pytest.approx(graph.weight_bytes - 128256 * 4096 * 2 + 3 * 4096 * 2)
    assert work.cache_bytes == 3 * 1000 * 32 * 8 * 256 * 2
    assert footprint(graph, step).kv_bytes == work.cache_bytes


def test_a_batch_touches_more_experts_than_a_token() -> None:
    graph = capture("mixtral-8x7b")
    one, many = (total(graph, Step.decode(b, 100)).weight_bytes for b in (1, 64))
    assert one < 0.3 * graph.weight_bytes
    assert many > 0.97 * graph.weight_bytes


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "mamba-2.8b", "gpt-oss-20b", "gemma-3-27b"])
@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.phase)
def test_the_ledger_sums_to_the_step(name: str, step: Step) -> None:
    found = diagnose(capture(name), H100, step, devices=8)
    data = as_json(found)
    assert math.fsum(entry["seconds"] for entry in data["ledger"]) == data["step_seconds"]
    assert sum(op["seconds"] for op in data["ops"]) == pytest.approx(data["step_seconds"], rel=1e-12)
    assert set(found.ledger) <= set(CAUSES)
    low, high = found.interval
    assert low <= found.seconds <= high
    assert found.bound_seconds <= found.seconds


@pytest.mark.parametrize("name", machines())
def test_every_machine_gives_a_finite_answer(name: str) -> None:
    found = diagnose(capture("bert-base"), machine(name), Step.forward(1, 64))
    assert 0 < found.seconds < 1e4


@given(st.sampled_from(["compute", "bandwidth", "link"]), st.floats(1.01, 10), st.sampled_from(STEPS))
@settings(max_examples=30, deadline=None)
def test_more_of_a_resource_never_slows(resource: str, factor: float, step: Step) -> None:
    graph = capture("llama-3.2-1b")
    assert seconds(graph, H100.scaled(**{resource: factor}), step, 2)[0] <= seconds(graph, H100, step, 2)[0] * (1 + 1e-12)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v2-lite", "mixtral-8x7b", "gemma-2-9b", "falcon-h1-7b"])
def test_an_array_of_steps_equals_the_steps_one_by_one(name: str) -> None:
    graph, batches = capture(name), [1, 7, 64, 500]
    many = seconds(graph, H100, Step.decode([[b] for b in batches], 777))
    for i, batch in enumerate(batches):
        one = seconds(graph, H100, Step.decode(batch, 777))
        assert [float(np.broadcast_to(m, 4)[i]) for m in many] == pytest.approx([float(t) for t in one], rel=1e-12)


def test_every_bundled_model_runs_in_its_steps() -> None:
    for name in bundled():
        graph = capture(name)
        found = diagnose(graph, H100, Step.forward(1, 64, 64))
        assert found.seconds > 0, name
        assert math.isfinite(found.seconds), name


def test_tiles_waste_what_lies_outside_the_matrix() -> None:
    assert tile_use(4096, 4096, 1, H100) > 0.85
    assert tile_use(1, 4096, 1, H100) < 0.2
    assert 0 < tile_use(np.array([1, 17, 129]), 4096, 1, H100).min() <= 1


def test_what_a_kernel_costs_before_its_work_counts_as_launch_and_leaves_other_formats_alone() -> None:
    share = {"dispatch-matmul-bf16": {"median": 0.04, "low": 0.04, "high": 0.04}}
    plain = replace(machine("desktop-avx2"), efficiency={"matmul": {"median": 1.0, "low": 1.0, "high": 1.0}}, sources={})
    slow = replace(plain, efficiency={**plain.efficiency, **share})
    dims = {"rows": 1, "inputs": 512, "outputs": 64}
    for form, extra in ((BF16, plain.kernel_seconds * (1 / 0.04 - 1)), (FP32, 0.0)):
        op = Op("l", "linear", dims, act=form, weight=form, repeat=3)
        one, two = (op_time(op, Step.forward(), m) for m in (plain, slow))
        assert two.causes["launch"] - one.causes["launch"] == pytest.approx(3 * extra)
        assert two.seconds - one.seconds == pytest.approx(3 * extra)


def test_a_norm_of_several_eager_kernels_streams_as_pointwise_ones_do() -> None:
    own = {name: {"median": m, "low": m, "high": m} for name, m in (("memory-norm", 0.1), ("memory-pointwise", 0.8))}
    here = replace(machine("desktop-avx2"), efficiency=own, launch_seconds=1e-12, sources={})
    fused, several = (Op("n", "norm", {"rows": 4096, "width": 768}, act=FP32, kernels=kernels) for kernels in (1, 6))
    moved = {op: cost(op, Step.forward(), eager=True) for op in (fused, several)}
    rate = here.memory.bandwidth_bytes_per_s
    for op, reached in ((fused, 0.1), (several, 0.8)):
        expected = float(moved[op].read_bytes + moved[op].write_bytes) / rate / reached
        assert op_time(op, Step.forward(), here, eager=True).seconds == pytest.approx(expected, rel=1e-3)
    assert rests_on(several, "activations", here, eager=True) == "memory-pointwise-fp32-fp32"
    assert {rests_on(fused, "activations", here, True), rests_on(several, "activations", here)} == {"memory-norm-fp32"}


def test_a_training_step_is_three_forwards_and_an_update() -> None:
    graph, step = capture("llama-3.2-1b"), Step.train(1, 512)
    forward, whole = matrix_flop(graph, step), training(graph)
    backward = [op for op in whole if op.phase == "backward" and op.kind == "linear"]
    assert sum(float(cost(op, step).flop) for op in backward) == 2 * forward
    (update,) = [op for op in whole if op.phase == "update"]
    assert update["elements"] == graph.parameters
    assert training(whole) is whole
    kept = footprint(graph, step)
    assert kept.gradient_bytes == 2 * graph.parameters
    assert kept.optimizer_bytes == 12 * graph.parameters  # fp32 master copy and two moments


def test_gradients_are_exchanged_once() -> None:
    whole = gradient_exchange(training(capture("llama-3.2-1b")), 8)
    (exchange,) = [op for op in whole if op.kind == "all_reduce"]
    assert cost(exchange, Step.train(1, 8)).link_bytes == 2 * capture("llama-3.2-1b").parameters * 2 * 7 / 8


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x7b", "gpt2", "falcon-40b"])
def test_devices_share_the_work_of_a_model(name: str) -> None:
    graph, step = capture(name), Step.prefill(1, 512)
    cut = tensor_parallel(graph, 4)
    assert total(cut, step).flop == pytest.approx(total(graph, step).flop / 4, rel=0.02)
    assert cut.weight_bytes == pytest.approx(graph.weight_bytes / 4, rel=0.06)
    layers = max(op.repeat for op in graph)
    reduces = sum(op.repeat for op in cut if op.kind == "all_reduce" and op.repeat > 1)
    assert reduces in (layers, 2 * layers)  # after attention and after the MLP; one where both share a residual


def test_what_a_device_does_to_its_share_is_a_share() -> None:
    """Activations, rotations and scans between a column cut and a row cut work on one part of n; residuals and norms on all."""
    step = Step.prefill(1, 512)
    for name, kinds in (
        ("llama-3.1-8b", ("act_fn", "rope")),
        ("qwen3-8b", ("q_norm",)),
        ("mamba-2.8b", ("scan", "conv1d", "gate")),
    ):
        graph = capture(name)
        whole = {op.name: op for op in graph}
        for op in tensor_parallel(graph, 4):
            if op.name.endswith(kinds):
                assert cost(op, step).write_bytes == pytest.approx(cost(whole[op.name], step).write_bytes / 4), op.name
    state = [footprint(g, step).kv_bytes for g in (capture("mamba-2.8b"), tensor_parallel(capture("mamba-2.8b"), 4))]
    assert state[1] == pytest.approx(state[0] / 4)


def test_the_inputs_of_cut_products_are_kept_whole() -> None:
    """Korthikanti et al. (2022), equation 2: without sequence parallelism norms and their results are kept by each device."""
    graph, step = capture("llama-3.1-8b"), Step.train(1, 2048)
    kept = lambda n: sum(at(op.saved, step) * op.repeat for op in tensor_parallel(graph, n))  # noqa: E731
    whole = 4 * 4096 * 2048 * 32 + 2 * 4096 * 2048  # per layer two norms' inputs and results; the last norm's, the head's
    assert kept(8) == whole + (kept(1) - whole) / 8


def test_training_keeps_the_logits_of_the_loss() -> None:
    graph, step = capture("llama-3.2-1b"), Step.train(2, 512)
    logits = 2 * 512 * 128256 * 4
    assert footprint(graph, step).temporary_bytes > logits
    kept = sum(at(op.saved, step) * op.repeat for op in graph) * 2
    assert footprint(graph, step).activation_bytes == kept + logits


@pytest.mark.parametrize("name", ["whisper-large-v3", "t5-base"])
def test_an_encoder_does_not_run_in_decode(name: str) -> None:
    found = diagnose(capture(name), H100, Step.decode(4, 100, 512))
    assert math.isfinite(found.seconds)
    assert not [o.op.name for o in found.ops if "encoder.layers" in o.op.name or "encoder.block" in o.op.name]
    assert float(found.cost.weight_bytes) < 0.7 * float(found.footprint.weights_bytes)


def test_inference_holds_what_is_read_later() -> None:
    """At the widest place of a gated MLP: the residual stream, both halves and their product (the norm's result is done with)."""
    found = footprint(capture("llama-3.1-8b"), Step.prefill(1, 2048))
    assert found.activation_bytes == 2048 * (4096 + 3 * 14336) * 2


def test_a_graph_that_says_not_what_it_saves_keeps_every_result() -> None:
    found = diagnose(capture("resnet-50"), H100, Step.train(8))
    assert 8 * 80e6 < found.footprint.activation_bytes < 8 * 180e6
    assert any("every result" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "reduces"),
    [("llama-3.1-70b", 2 * 80 + 1), ("falcon-40b", 60 + 1), ("deepseek-v3", 2 * 61 + 1), ("mixtral-8x7b", 2 * 32 + 1)],
)
def test_partial_sums_are_reduced_once(name: str, reduces: int) -> None:
    """Per layer after attention and after the MLP, once where both meet in one residual or experts are shared; the embedding."""
    cut = tensor_parallel(capture(name), 8)
    assert sum(op.repeat for op in cut if op.kind == "all_reduce") == reduces


def test_eager_is_slower_where_launches_limit() -> None:
    from dataclasses import replace

    graph, step = capture("smollm2-135m"), Step.decode(1, 100)
    eager = diagnose(replace(graph, eager=True), H100, step)
    assert eager.limit == "launch"
    assert eager.seconds > 2 * diagnose(graph, H100, step).seconds


def test_op_time_of_a_checkpoint_is_nothing() -> None:
    from narrows.backward import checkpoint_op

    op = checkpoint_op("c", 100, capture("gpt2").ops[1], 4)
    assert op_time(op, Step.train(1, 8), H100).seconds == 0


def test_peers_over_the_host_have_constants_of_their_own() -> None:
    """A card without NVLink sends through the host at a smaller share of the link; what a machine says of itself comes first."""
    l40s = machine("l40s")
    assert (wired(H100), wired(l40s)) == ("link", "pcie")
    own = replace(l40s, efficiency={"link": {"median": 0.9, "low": 0.9, "high": 0.9}})
    op = Op("sum", "all_reduce", {"elements": 2**28, "ranks": 4}, act=FP16)
    through, direct = (float(op_time(op, Step.forward(1, 1), m, eager=True).seconds) for m in (l40s, own))
    assert wired(own) == "link"
    assert through > 2 * direct
    sent = 2 * 2**28 * 2 * 3 / 4
    assert through == pytest.approx(sent / (achieved(l40s, "pcie").median * 31.5e9), rel=0.05)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "deepseek-v2-lite", "jamba-v0.1"])
def test_seconds_alone_are_the_sum_of_the_causes(name: str) -> None:
    step = Step(np.array([1, 4])[:, None], 2048, 0, phase="train")
    for op in training(capture(name)):
        for eager in (False, True):
            one = op_time(op, step, H100, eager)
            assert op_seconds(op, step, H100, eager) == pytest.approx(one.seconds, rel=1e-12), op.name
