"""What TPI-LLM claims: Llama-2-70B in fp32 on desktops over a slow network, beside one that reads every layer."""

from dataclasses import replace

from narrows.capture import capture
from narrows.free import cast
from narrows.graph import FP32, Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.serving.tpi_llm import SUMS, TPILLM

_TOKEN = Step.decode(1, 1024)


def _graph() -> Graph:
    return cast(capture("llama-2-70b"), FP32)


def peak(technique: TPILLM) -> float:
    """GB on the device that holds most."""
    return technique.peak_bytes(_graph(), machine("desktop-avx2"), _TOKEN) / 1e9


def token_saved(technique: TPILLM) -> float:
    """How much less a token takes than on one device that reads each block before it computes it."""
    ours, one = (way.play(_graph(), machine("desktop-avx2"), _TOKEN).seconds for way in (technique, technique.baseline()))
    return 1 - ours / one


def star_gain(technique: TPILLM) -> float:
    """Seconds of a sum of 8192 numbers by the better of ring and tree over ours; 0 where nothing is summed."""
    ours, *others = (replace(technique, sums=way).sum_seconds(4 * 8192) for way in SUMS)
    return min(others) / ours if ours else 0.0
