"""Calibrating: a machine that is known gives itself back, and nothing is written before all of it is measured."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from narrows import calibrate as calibrating
from narrows import probes
from narrows.calibrate import Bench, bench_of, cpu_seconds, interval, measured, predicted
from narrows.cli import cli
from narrows.costmodel import achieved, achieved_at, dispatch_seconds, op_time
from narrows.errors import NarrowsError
from narrows.gain import parts
from narrows.graph import BF16, FP32, Graph, Op
from narrows.machine import Machine, Memory, machine
from narrows.step import Step


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": median * 0.9, "high": median * 1.1}


def known(kind: str = "cpu") -> Machine:
    """A machine whose every kernel takes what the cost model says."""
    reached = {"memory": 0.9, "memory-bf16": 0.6, "memory-norm-bf16": 0.2, "memory-pointwise-fp32": 0.5, "vector": 0.03,
               "matmul-bf16-at8": 0.05, "matmul-bf16-at128": 0.5, "matmul-bf16-at512": 1.0, "matmul-fp32": 1.0,
               "matmul-int8": 0.3, "matmul-int4": 0.1, "attention": 0.4, "matmul-conv": 0.7,
               "memory-bf16-bf16-conv": 0.1}  # fmt: skip
    return replace(
        machine("desktop-avx2"), name="here", kind=kind, peak_flop_per_s={"fp32": 1.5e11, "bf16": 1e12}, units=1, tile=(1, 1),
        memories=(Memory("dram", 1e10, 2e10),), launch_seconds=1e-5, kernel_seconds=1e-6,
        efficiency={name: spread(value) for name, value in reached.items()}, sources={},
    )  # fmt: skip


TRUTH = known()


def sourced(efficiency: dict[str, dict[str, float]]) -> Machine:
    found = replace(TRUTH, efficiency=efficiency, sources={})
    return replace(found, sources=dict.fromkeys(found.figures(), "a test"))


@dataclass(frozen=True)
class Known(Bench):
    """A bench on which nothing runs: probes take what a known machine's cost model says, times `slower` in whole networks."""

    truth: Machine = TRUTH
    slower: float = 1.0

    def seconds(self, probe: probes.Probe) -> float:
        return predicted(probe, self.truth) * (self.slower if probe.name.startswith("a") and len(probe.ops) > 1 else 1.0)


@pytest.fixture
def few_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probes.networks
    monkeypatch.setattr(probes, "networks", lambda device: islice(whole(device), 3))


def bench(truth: Machine, slower: float = 1.0) -> Known:
    return Known("cpu", "a stand-in", truth.kind, 1e10, 1, cpu_seconds, truth=truth, slower=slower)


def test_a_file_from_before_gains_were_judged_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = ({name: spread(1.0) for name in names} for names in (("step",), ("step", "gain")))
    monkeypatch.setenv("NARROWS_HOME", str(tmp_path))
    monkeypatch.setattr(calibrating, "calibrate", lambda progress: sourced(new))
    for kept, found in ((old, new), (new, new), ({}, {})):
        sourced(kept).save(tmp_path / "here.toml")
        assert calibrating.here().efficiency == found == machine(tmp_path / "here.toml").efficiency


@pytest.mark.usefixtures("few_networks")
def test_a_known_machine_gives_itself_back(tmp_path: Path) -> None:
    truth = known()
    found = measured(bench(truth))
    found.save(tmp_path / "here.toml")
    assert machine(tmp_path / "here.toml") == found
    assert found.peak("bf16") == pytest.approx(truth.peak("bf16"), rel=0.05)
    cases = [
        Op("l", "linear", {"rows": 32, "inputs": 768, "outputs": 3072}, act=BF16, weight=BF16),
        Op("l", "linear", {"rows": 1, "inputs": 768, "outputs": 3072}, act=BF16, weight=BF16),
        Op("l", "linear", {"rows": 300, "inputs": 768, "outputs": 3072}, act=FP32, weight=FP32),
        Op("n", "norm", {"rows": 4096, "width": 768}, act=BF16),
        Op("p", "elementwise", {"elements": 1e6, "reads": 2e6}, act=FP32),
        Op("g", "elementwise", {"elements": 1e6, "reads": 1e6, "flop_per_element": 8}, act=FP32),
        Op("c", "conv", {"positions": 3136, "in_positions": 3136, "in_channels": 64, "out_channels": 64, "kernel": 9},
           act=BF16, weight=BF16),
    ]  # fmt: skip
    for op in cases:
        ours, true = (float(op_time(op, Step.forward(), m, eager=True).seconds) for m in (found, truth))
        assert ours == pytest.approx(true, rel=0.3), op


@pytest.mark.usefixtures("few_networks")
def test_what_a_product_costs_before_its_first_byte_is_told_from_its_bandwidth() -> None:
    """A library that takes 30 us to start a product in bf16: small matrices show it, and bandwidth does not."""
    slow = {"dispatch-matmul-bf16": spread(1e-6 / 31e-6)}
    truth = replace(known(), efficiency={**known().efficiency, **slow}, sources={})
    found = measured(bench(truth))
    op = Op("l", "linear", {"rows": 1, "inputs": 640, "outputs": 160}, act=BF16, weight=BF16)
    assert dispatch_seconds(op, found) == pytest.approx(30e-6, rel=0.2)
    assert dispatch_seconds(replace(op, act=FP32, weight=FP32), found) < 1e-6
    ours, true = (float(op_time(op, Step.forward(), m, eager=True).seconds) for m in (found, truth))
    assert ours == pytest.approx(true, rel=0.15)


def test_the_interval_of_gains_is_what_ratios_of_networks_were_off_by() -> None:
    """Three networks in two formats: one 10 % slower than predicted in either of them, and one in both alike."""
    each = [Op("l", "linear", {"rows": 1, "inputs": 512, "outputs": 4096}, act=act, weight=act) for act in (FP32, BF16)]
    whole = [probes.Probe("", (op,), list, Step.decode(1, 8), network) for network in ("one", "two", "three") for op in each]
    off = np.log([1.1, 1.0, 1.0, 1.1, 0.9, 0.9])
    alike = replace(
        TRUTH, efficiency={**TRUTH.efficiency, "gain": {"median": 1.0, "low": 1 / math.e, "high": math.e}}, sources={}
    )
    one, two = (parts(Graph("", (op,), eager=True), alike, Step.decode(1, 8)) for op in each)
    apart = one.distance(two)
    found = calibrating._gains(TRUTH, whole, off)
    rms = math.sqrt(2 * math.log(1.1) ** 2 / 3)
    assert math.log(found["high"]) == pytest.approx(calibrating._half_width(4) * rms / apart)
    assert found["low"] == pytest.approx(1 / found["high"])
    assert calibrating._gains(TRUTH, whole[::2], off[::2]) == {}


@pytest.mark.usefixtures("few_networks")
def test_what_networks_lose_against_kernels_alone_is_seen() -> None:
    plain, loses = measured(bench(known())), measured(bench(known(), slower=1.3))
    ratio = achieved(plain, "vector-fp32").median / achieved(loses, "vector-fp32").median
    assert ratio == pytest.approx(1.3, rel=0.15)


@pytest.mark.usefixtures("few_networks")
def test_a_gpu_is_measured_by_the_same_probes_without_packed_weights() -> None:
    found = measured(bench(known("gpu")))
    assert found.kind == "gpu" and found.memory.name == "hbm"
    assert found.kernel_seconds < found.launch_seconds
    assert not any("int4" in name for name in found.efficiency)


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_of("auto").device == "cpu"
    with pytest.raises(NarrowsError, match="no CUDA device"):
        bench_of("cuda")


def test_a_cuda_device_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch's side of a GPU: work is queued and is done only once somebody waits."""
    torch = pytest.importorskip("torch")
    now, queue = [0.0], []

    def wait() -> None:
        now[0] += sum(queue)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(calibrating.time, "perf_counter", lambda: now[0])
    assert calibrating.cuda_seconds(lambda: queue.append(0.002), rounds=3, least=0.01) == pytest.approx([0.002] * 3)


def test_probes_are_the_ops_they_say() -> None:
    """FLOP and bytes of a probe's op are those of the tensors that its call reads and makes."""
    probe = next(p for p in probes.products(FP32, "cpu") if p.op["rows"] == 8)
    assert next(probe.calls())().shape == (8, probe.op["outputs"])  # type: ignore[attr-defined]
    for depthwise in (False, True):
        for probe in probes.convolutions(FP32, "cpu", depthwise):
            out = next(probe.calls())()
            assert out.shape[0] * out.shape[2] * out.shape[3] == probe.op["positions"]  # type: ignore[attr-defined]
            assert out.shape[1] == probe.op["out_channels"]  # type: ignore[attr-defined]


def test_an_interrupted_calibration_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(device: str) -> Iterator[probes.Probe]:
        raise KeyboardInterrupt

    monkeypatch.setenv("NARROWS_HOME", str(tmp_path))
    monkeypatch.setattr(calibrating, "bench_of", lambda device: bench(known()))
    monkeypatch.setattr(probes, "networks", stopped)
    assert CliRunner().invoke(cli, ["calibrate"]).exit_code != 0
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=5, unique=True), st.integers(1, 10_000))
def test_between_measured_sizes_the_constant_lies_between_theirs(sizes: list[int], asked: int) -> None:
    own = {f"matmul-fp32-at{size}": spread(size / 5000) for size in sizes}
    own["matmul-bf16"] = spread(0.7)
    found = achieved_at(replace(known(), efficiency=own, sources={}), "matmul-fp32-fp32", float(asked))
    assert found.low <= found.median <= found.high
    below, above = [s for s in sizes if s <= asked], [s for s in sizes if s >= asked]
    assert found.median >= (max(below) if below else min(sizes)) / 5000 * 0.999
    assert found.median <= (min(above) if above else max(sizes)) / 5000 * 1.001
    many = achieved_at(replace(known(), efficiency=own, sources={}), "matmul-fp32-fp32", np.array([float(asked), 1.0]))
    assert many.median[0] == pytest.approx(found.median)


def test_an_interval_from_few_steps_holds_four_of_five_further_ones() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(2000):
        *seen, other = np.exp(rng.normal(0.1, 0.2, 15))
        ends = interval(seen)
        inside.append(ends["low"] <= other <= ends["high"])
    assert 0.77 < np.mean(inside) < 0.83


def test_the_interval_of_a_step_is_what_calibration_was_off_by() -> None:
    own = {"step": {"median": 1.0, "low": 0.8, "high": 1.3}}
    op = Op("l", "linear", {"rows": 32, "inputs": 768, "outputs": 3072}, act=BF16, weight=BF16)
    time = op_time(op, Step.forward(), replace(known(), efficiency=own, sources={}))
    assert (time.low, time.high) == (pytest.approx(0.8 * time.seconds), pytest.approx(1.3 * time.seconds))
    assert math.isfinite(time.high)
