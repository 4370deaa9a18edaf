"""What the analysis of vision serving claims: JPEGs through a real pipeline on one core, and queues of what was measured."""

import io
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from time import thread_time
from typing import Any

import numpy as np

from narrows.capture import capture
from narrows.errors import require
from narrows.experiments.steady import one_thread
from narrows.machine import machine
from narrows.step import Step
from narrows.technique import Reading
from narrows.techniques.profiling_cost_models.vision_serving_overhead_analysis import NETWORK, Stage, VisionServing, serve

SIZES = ((60, 70), (500, 375), (3564, 2880))  # the paper's small, medium and large image, of ImageNet
_SIDE = 224
_COARSE = -0.2  # how noise grows with its scale: fine noise takes more bytes


@cache
def photo(width: int, height: int) -> bytes:
    """A JPEG of noise at several scales, of half a byte and more per pixel, as photographs have."""
    from PIL import Image

    random, image = np.random.default_rng(0), np.zeros((height, width, 3), np.float32)
    for scale in (1, 2, 4, 8, 16, 64):
        grid = random.standard_normal((max(height // scale, 2), max(width // scale, 2), 3)).astype(np.float32)
        for channel in range(3):
            image[..., channel] += scale**_COARSE * np.asarray(Image.fromarray(grid[..., channel]).resize((width, height)))
    low, high = image.min(), image.max()
    file = io.BytesIO()
    Image.fromarray(((image - low) / (high - low) * 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def _pipeline() -> dict[str, Callable[[Any], Any]]:
    """From a file's bytes to MobileNetV2's features (random weights: they change no time)."""
    require("decoding JPEG", "diffusers", "PIL")
    import torch
    from PIL import Image
    from transformers import MobileNetV2Config, MobileNetV2Model

    torch.manual_seed(0)
    model = MobileNetV2Model(MobileNetV2Config()).eval()

    def decode(file: bytes) -> Any:
        return Image.open(io.BytesIO(file)).convert("RGB")

    def resize(image: Any) -> Any:
        return image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)

    def normalise(image: Any) -> Any:
        return (np.asarray(image, np.float32) / 255 - np.float32(0.5)) / np.float32(0.25)

    def transfer(pixels: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]

    def inference(batch: Any) -> Any:
        with torch.inference_mode():
            return model(batch).pooler_output

    return {"decode": decode, "resize": resize, "normalise": normalise, "transfer": transfer, NETWORK: inference}


@cache
@one_thread()
def _profiled(technique: VisionServing) -> tuple[Reading, ...]:
    """A reading for each size, in processor time: what other processes take of the machine stays out."""
    return tuple(technique.profile(_pipeline(), photo(*size), clock=thread_time) for size in SIZES)


def rates() -> tuple[float, float]:
    """Pixels per second of decoding and resizing the large image on this core, and seconds for an image of hardly any."""
    small, _, large = ({row["stage"]: row["seconds"] for row in found.rows} for found in _profiled(VisionServing()))
    width, height = SIZES[-1]
    return width * height / (large["decode"] + large["resize"]), sum(small.values()) - small[NETWORK]


def attributed(technique: VisionServing) -> float:
    """The stages' sum over the latency, at the size where it is least."""
    return min(found.values["attributed"] for found in _profiled(technique))


def share_growth(technique: VisionServing) -> float:
    """How much the share outside of the network grows from one size to the next, at least."""
    shares = [found.values["share_outside"] for found in _profiled(technique)]
    return min(b - a for a, b in pairwise(shares))


def _served(technique: VisionServing, size: tuple[int, int], batch: int) -> Reading:
    """ViT-B/16 on a fast device, with the stages before it as this core was timed."""
    per_second, fixed = rates()
    mine = replace(technique, pixels=float(size[0] * size[1]), pixels_per_second=per_second, request_seconds=fixed)
    return mine.measure(capture("vit-b-16"), machine("rtx-4090"), Step.forward(batch))


def medium_share(technique: VisionServing) -> float:
    """The share of one medium request's latency that is not the network's."""
    return _served(technique, SIZES[1], 1).values["share_outside"]


def large_loss(technique: VisionServing) -> float:
    """The share of the network's throughput that large images cost."""
    return _served(technique, SIZES[2], 64).values["lost"]


def parallel_gain(technique: VisionServing) -> float:
    """Throughput with the host's stages on eight cores over that with one, the network on another."""
    found = {row["stage"]: float(row["seconds"]) for row in _profiled(technique)[-1].rows}
    network = found.pop(NETWORK)
    host = sum(found.values())

    def throughput(cores: int) -> float:
        return serve([Stage("host", lambda _: host, cores), Stage(NETWORK, lambda _: network)], clients=32).throughput

    return throughput(8) / throughput(1)
