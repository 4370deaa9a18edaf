"""What BLOOM's carbon account claims: from the paper's hours, from hours predicted out of shapes, and a request measured here."""

from dataclasses import replace

from narrows.capture.config import bundled_config, from_config
from narrows.energy import carbon_grams
from narrows.experiments.ai_and_memory_wall import _smollm2_seconds, _this_core
from narrows.experiments.steady import one_thread
from narrows.layout import Layout
from narrows.machine import Link, cluster, machine
from narrows.measured.published import Shape, decoder
from narrows.simulate.training import step_seconds
from narrows.step import Step
from narrows.techniques.profiling_cost_models.bloom_carbon_footprint import LifeCycle, rated_joules

_GPU_HOURS = 1_082_990  # table 1
_GRID = 57.0  # g/kWh of France, section 4.2
_TOKENS = 366e9  # that BLOOM was trained on
_BATCH, _SEQUENCE = 2048, 2048
_PROMPT, _WRITTEN = 128, 32


def _tonnes(technique: LifeCycle, hours: float) -> dict[str, float]:
    return {k: g / 1e6 for k, g in technique.grams(hours, rated_joules(hours, machine("a100-80gb"))).items()}


def dynamic_tonnes(technique: LifeCycle) -> float:
    """Tonnes for the energy of the final training run."""
    return _tonnes(technique, _GPU_HOURS)["dynamic"]


def total_tonnes(technique: LifeCycle) -> float:
    """Tonnes with idling and embodied emissions."""
    return sum(_tonnes(technique, _GPU_HOURS).values())


def tonnes_from_shapes(technique: LifeCycle) -> float:
    """Dynamic tonnes with the hours that the training model predicts for BLOOM's layout."""
    layout = Layout(tensor=4, pipeline=12, data=8, microbatch=2, accumulate=_BATCH // (8 * 2), recompute="full", overlap=False)
    graph = decoder(Shape(14336, 70, 112, 250_880, fused=False), _SEQUENCE)
    selene = cluster("selene")
    jean_zay = replace(selene, scale_out=Link("omni-path", 50e9, 3 * selene.scale_up.latency_seconds))
    step = sum(step_seconds(graph, jean_zay, layout, _SEQUENCE).values())
    return _tonnes(technique, step * _TOKENS / (_BATCH * _SEQUENCE) * layout.devices / 3600)["dynamic"]


@one_thread()
def request_over_predicted(technique: LifeCycle) -> float:
    """Grams of a request from the seconds that it takes on this core, over the technique's prediction."""
    import torch

    with torch.inference_mode():
        here, (prefilled, decoded) = _this_core(), _smollm2_seconds()
    graph = from_config({**(bundled_config("smollm2-135m") or {}), "torch_dtype": "float32"}, "smollm2-135m")
    technique = replace(technique, scope="dynamic")  # what made a desktop's processor is not in the paper
    measured = predicted = 0.0
    for step, seconds, times in (
        (Step.prefill(1, _PROMPT), prefilled * _PROMPT, 1),
        (Step.decode(1, _PROMPT + _WRITTEN // 2), decoded, _WRITTEN),
    ):
        found = technique.measure(graph, here, step).values
        measured += times * carbon_grams(found["watts"] * seconds, _GRID)
        predicted += times * found["grams"]
    return measured / predicted
