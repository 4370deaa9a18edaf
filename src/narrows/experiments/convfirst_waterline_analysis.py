"""What the waterline analysis claims: layer times that add up on this CPU, and what fusing ConvNeXt's blocks would save."""

from functools import cache
from time import thread_time

from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import Reading
from narrows.techniques.profiling_cost_models.convfirst_waterline_analysis import Waterline

_STEP = Step.forward(batch=128)


def latency_error(technique: Waterline) -> float:
    """How far the layers' times are from the latency without timers: the worse of a dense and a depthwise network."""
    import torch
    from transformers import MobileNetV2Config, MobileNetV2Model, ResNetConfig, ResNetModel

    torch.manual_seed(0)
    resnet18 = ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    models = (ResNetModel(resnet18), MobileNetV2Model(MobileNetV2Config()))
    images = {"pixel_values": torch.randn(4, 3, 224, 224)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # and processor time: what other processes take of the machine stays out
    try:
        return max(technique.profile(model.eval(), images, runs=7, clock=thread_time).values["error"] for model in models)
    finally:
        torch.set_num_threads(threads)


def fusion_traffic(technique: Waterline) -> float:
    """ConvNeXt-T's bytes layer by layer over its bytes with every block fused."""
    return _convnext_read(technique).values["fusion_traffic"]


def fusion_gain(technique: Waterline) -> float:
    """ConvNeXt-T's seconds at the roofline layer by layer over those with every block fused."""
    return _convnext_read(technique).values["fusion_gain"]


def _convnext_read(technique: Waterline) -> Reading:
    return technique.measure(_convnext(), machine("a10"), _STEP)


@cache
def _convnext() -> Graph:
    import torch
    from transformers import ConvNextConfig, ConvNextModel

    from narrows.capture.torch import from_module

    with torch.device("meta"):
        model = ConvNextModel(ConvNextConfig()).half().eval()
    return from_module(model, _STEP)
