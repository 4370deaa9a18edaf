"""Waterline analysis: known answers on a block of two layers, blocks found by path, and timers that add up."""

import pytest
import torch

from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.experiments.convfirst_waterline_analysis import _convnext
from narrows.experiments.networks import network
from narrows.graph import FP16, Graph, Op
from narrows.machine import machine
from narrows.plan import parse
from narrows.step import Step
from narrows.techniques.profiling_cost_models.convfirst_waterline_analysis import Waterline, block_of

A10, STEP = machine("a10"), Step.forward(16)


def _conv(name: str, inputs: int, outputs: int) -> Op:
    dims = {"positions": 4096, "in_positions": 4096, "in_channels": inputs, "out_channels": outputs, "kernel": 1}
    return Op(name, "conv", dims, act=FP16, weight=FP16)


@pytest.mark.parametrize("name,block", [
    ("encoder.stages.0.layers.2.dwconv", "encoder.stages.0.layers.2"),
    ("encoder.stages.*.layers.*.pwconv1", "encoder.stages.*.layers.*"),
    ("layer1.0.downsample.0", "layer1.0"),
    ("features.3.conv.1.2", "features.3"),
    ("0.conv", "0"),
    ("conv1", "conv1"),
    ("features.0", "features.0"),
])  # fmt: skip
def test_a_block_is_what_lies_under_one_index(name: str, block: str) -> None:
    assert block_of(name) == block


def test_a_fused_block_reads_its_input_and_weights_and_writes_its_output() -> None:
    graph = Graph("block", (_conv("b.0.up", 64, 256), _conv("b.0.down", 256, 64)))
    values = Waterline().measure(graph, A10, STEP).values
    weights, thin, wide = 2 * 64 * 256 * 2, 4096 * 64 * 2, 4096 * 256 * 2
    assert values["bytes"] == weights + 2 * thin + 2 * wide
    assert values["fused_bytes"] == weights + 2 * thin
    peak, bandwidth = A10.peak("fp16"), A10.memory.bandwidth_bytes_per_s
    flop = 2 * 2 * 4096 * 64 * 256
    assert values["waterline"] == pytest.approx(flop / peak / (values["bytes"] / bandwidth))
    assert values["fused_waterline"] == pytest.approx(min(1.0, flop / peak / (values["fused_bytes"] / bandwidth)))


def test_blocks_whose_weights_do_not_fit_the_chip_stay_apart() -> None:
    graph = Graph("wide", (_conv("b.0.up", 2048, 8192), _conv("b.0.down", 8192, 2048)))
    assert graph.weight_bytes > A10.memories[1].capacity_bytes
    assert Waterline().measure(graph, A10, STEP).values["fusion_traffic"] == 1.0


def test_rows_add_up_and_latency_is_operations_over_peak_and_efficiency() -> None:
    graph = _convnext()
    reading = Waterline().measure(graph, A10, STEP)
    values, rows = reading.values, reading.rows
    assert sum(row["flop"] for row in rows) == pytest.approx(total(graph, STEP).flop)
    assert sum(row["seconds"] for row in rows) == pytest.approx(values["seconds"])
    assert values["seconds"] == pytest.approx(total(graph, STEP).flop / (A10.peak("fp16") * values["efficiency"]))
    for row in rows:
        assert row["seconds"] == pytest.approx(row["flop"] / (A10.peak("fp16") * row["efficiency"]))
        assert 0 < row["efficiency"] <= row["waterline"] * 1.0001 <= 1.0001
    assert values["efficiency"] <= values["waterline"] <= values["fused_waterline"] <= 1


def test_fusion_gains_most_where_the_waterline_is_low() -> None:
    rows = Waterline().measure(_convnext(), A10, STEP).rows
    gains = [(row["op"].split(".")[-1], row["fused_waterline"] / row["waterline"]) for row in rows]
    assert min(gain for layer, gain in gains if layer == "dwconv") > 3 * max(gain for layer, gain in gains if layer == "pwconv1")


def test_the_baseline_fuses_nothing_and_sees_arithmetic_alone() -> None:
    reading = Waterline().baseline().measure(_convnext(), A10, STEP)
    assert reading.values["fusion_traffic"] == reading.values["fusion_gain"] == 1.0
    assert {row["op"].split(".")[-1] for row in reading.rows}.isdisjoint({"act", "layernorm", "add"})


def test_it_reads_networks_written_from_tables() -> None:
    assert Waterline().measure(network("MobileNet"), A10, STEP).values["waterline"] < 1


def test_profile_gives_every_module_its_own_time() -> None:
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3), inner).eval()
    reading = Waterline().profile(model, {"input": torch.randn(4, 8, 64, 64)}, runs=5)
    assert [row["layer"] for row in reading.rows] == ["Sequential", "0", "1", "1.0", "1.1"]
    seconds = {row["layer"]: row["seconds"] for row in reading.rows}
    assert seconds["1.0"] > seconds["1.1"] and seconds["1.0"] > 3 * abs(seconds["1"])
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_profile_takes_its_timers_away_when_the_model_fails() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 64, 3))
    with pytest.raises(RuntimeError):
        Waterline().profile(model, {"input": torch.randn(1, 3, 8, 8)}, runs=1)
    assert not model[0]._forward_hooks


def test_refusal_and_round_trip() -> None:
    with pytest.raises(NarrowsError, match="no op multiplies"):
        Waterline().measure(Graph("empty", ()), A10, STEP)
    assert parse("convfirst-waterline-analysis:fuse=false") == Waterline(fuse=False)
    assert eval(repr(Waterline(fuse=False))) == Waterline(fuse=False)  # noqa: S307
