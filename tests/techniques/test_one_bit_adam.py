"""1-bit Adam: signs and scales that add up, graphs before and after, refusals, and runs that resume bit-equal."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from narrows.backward import gradient_exchange, training
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.experiments.one_bit_adam import train
from narrows.footprint import footprint
from narrows.graph import FP32, Graph, Op, Size
from narrows.machine import machine
from narrows.modules.one_bit_adam import OneBitAdamOptimizer
from narrows.modules.sign_exchange import SignMean, compress, decompress, sign_mean
from narrows.modules.sign_layout import Layout
from narrows.plan import Plan
from narrows.step import Step
from narrows.techniques.communication.one_bit_adam import OneBitAdam

STEP = Step.train(batch=4, tokens=64)


def _graph(ranks: int = 4) -> Graph:
    layer = Op("layer", "linear", {"rows": Size.of(tokens=1), "inputs": 512, "outputs": 512}, act=FP32, weight=FP32)
    return gradient_exchange(training(Graph("one layer", (layer,))), ranks)


@pytest.mark.parametrize("elements,ranks,chunk", [(1, 2, 8), (100_003, 4, 8192), (64, 2, 16), (8_000_001, 64, 65536)])
def test_layout_covers_every_number_with_little_padding(elements: int, ranks: int, chunk: int) -> None:
    cut = Layout(elements, ranks, chunk)
    assert cut.piece * ranks >= elements
    assert cut.piece * ranks - elements < 8 * ranks * cut.chunks
    assert cut.piece % (8 * cut.chunks) == 0 and cut.piece // cut.chunks <= chunk + 7


def test_compress_keeps_sign_and_mean_magnitude_and_ignores_padding() -> None:
    values = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 32)
    real[2, 20:] = 0
    message = compress(values, real, chunks=2)
    assert message.dtype == torch.uint8 and message.shape == (3, 32 // 8 + 4 * 2)
    back = decompress(message, real, chunks=2)
    torch.testing.assert_close(back[0, :16], values[0, :16].sign() * values[0, :16].abs().mean())
    torch.testing.assert_close(back[2, 16:20].abs(), values[2, 16:20].abs().mean().expand(4))
    assert back[2, 20:].count_nonzero() == 0


def _compare(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    elements, chunk = 8 * ranks * 6, 16
    mean = SignMean(elements, chunk, True, dist.group.WORLD, torch.zeros(1))
    errors, server_error = torch.zeros(ranks, elements), torch.zeros(elements)
    generator = torch.Generator().manual_seed(7)
    for _ in range(5):
        vectors = torch.randn(ranks, elements, generator=generator)
        ours = mean(vectors[rank])
        reference, errors, server_error = sign_mean(vectors, errors, server_error, chunk)
        torch.testing.assert_close(ours, reference)
        torch.testing.assert_close(mean.worker_error.view(-1), errors[rank])
        torch.testing.assert_close(mean.server_error[0], server_error.view(ranks, -1)[rank])
    dist.destroy_process_group()


def test_the_exchange_equals_its_plain_reference_on_four_ranks(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_compare, args=(rank, 4, str(tmp_path))) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4


def test_what_rounding_leaves_out_is_in_the_errors() -> None:
    generator = torch.Generator().manual_seed(1)
    errors, server, given, came = torch.zeros(2, 64), torch.zeros(64), torch.zeros(64), torch.zeros(64)
    for _ in range(50):
        vectors = torch.randn(2, 64, generator=generator)
        answer, errors, server = sign_mean(vectors, errors, server, 32)
        given, came = given + vectors.mean(0), came + answer
    torch.testing.assert_close(given, came + errors.mean(0) + server, rtol=0, atol=1e-4)


def test_a_run_is_deterministic_resumes_bit_equal_and_counts_the_bytes_of_the_rewrite() -> None:
    technique = OneBitAdam(warmup=4)
    whole, resumed = train([(technique, 0), (technique, 7)], ranks=2, steps=10)
    assert resumed == whole
    assert whole["spread"] == 0.0
    gradients = Op("gradients", "all_reduce", {"elements": whole["parameters"], "ranks": 2}, act=FP32, phase="update")
    before = Graph("g", (gradients,))
    after = technique.rewrite(before)
    assert total(after, STEP).link_bytes == whole["last_step_bytes"]
    assert 4 * total(before, STEP).link_bytes + 6 * total(after, STEP).link_bytes == whole["sent_bytes"]


def test_rewrite_sends_signs_in_two_stages_and_keeps_errors() -> None:
    before, technique = _graph(), OneBitAdam()
    after = technique.rewrite(before)
    assert [op.kind for op in after if op.phase == "update"] == ["elementwise", "all_to_all", "all_gather", "optimizer"]
    assert 31 < total(before, STEP).link_bytes / total(after, STEP).link_bytes <= 32
    assert total(after, STEP).flop >= total(before, STEP).flop
    more = footprint(after, STEP).optimizer_bytes - footprint(before, STEP).optimizer_bytes
    assert more == 4 * 512 * 512 * (1 + 1 / 4)
    assert technique.baseline().rewrite(before) == before
    assert replace(technique, feedback=False).rewrite(before).ops[-1] == before.ops[-1]


def test_rewrite_works_on_half_precision_and_leaves_forward_all_reduces() -> None:
    inner = Op("tensor parallel", "all_reduce", {"elements": Size.of(tokens=512), "ranks": 2})
    graph = _graph()
    graph = replace(graph, ops=(inner, *graph.ops))
    assert OneBitAdam().rewrite(graph).ops[0] == inner


def test_check_refuses_with_a_reason() -> None:
    technique, slow = OneBitAdam(), machine("v100-sxm2-32gb").scaled(link=1e-3)
    assert technique.check(_graph(), slow, STEP) is True
    assert technique.check(_graph(), None, STEP) is True
    assert "forward" in technique.check(_graph(), slow, Step.forward(1, 64)).reason
    assert "one device" in technique.check(training(Graph("g", _graph().ops[:1])), slow, STEP).reason
    assert "%" in technique.check(_graph(), slow.scaled(link=1e9, compute=1e-3), STEP).reason


def test_attach_refuses_what_it_cannot_do_and_its_warm_up_is_adam(tmp_path: Path) -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(NarrowsError, match="DistributedDataParallel"):
        OneBitAdam().attach(layer)
    with pytest.raises(NarrowsError, match="Did you mean lr"):
        OneBitAdam().attach(layer, l=1.0)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        with pytest.raises(NarrowsError, match="world size is 1"):
            OneBitAdam().attach(torch.nn.parallel.DistributedDataParallel(layer))
        _warm_up_is_adam(layer)
    finally:
        dist.destroy_process_group()


def _warm_up_is_adam(layer: torch.nn.Linear) -> None:
    other = torch.nn.Linear(4, 4)
    other.load_state_dict(layer.state_dict())
    model = torch.nn.parallel.DistributedDataParallel(layer)
    ours = OneBitAdamOptimizer(model, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, warmup=9, chunk=8, feedback=True)
    adam = torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1)
    for x in torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(3)):
        for net, optimizer in ((model, ours), (other, adam)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, other.weight)
    assert not ours.compressing and ours.sent_bytes == 0
    with pytest.raises(NarrowsError, match="worker_error"):
        ours.load_state_dict({**ours.state_dict(), "flat": {"momentum": ours.momentum, "variance": ours.variance}})


@pytest.mark.parametrize("field,value", [("warmup", 0), ("chunk", 0), ("chunk", 12)])
def test_bad_options_are_named(field: str, value: int) -> None:
    with pytest.raises(NarrowsError, match=field):
        OneBitAdam(**{field: value})


def test_round_trip_through_the_command_line_form() -> None:
    plan = Plan((OneBitAdam(warmup=100, chunk=2048),))
    assert str(plan) == "1-bit-adam:warmup=100,chunk=2048"
    assert Plan.parse(str(plan)) == plan
    assert len(OneBitAdam.space()) == 9
