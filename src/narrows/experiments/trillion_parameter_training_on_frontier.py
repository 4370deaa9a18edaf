"""What the paper reached on Frontier, predicted from kernels of other machines: fractions of peak, and the recipe itself."""

from functools import cache
from math import log2

from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.search.priced import Job
from narrows.techniques.training_parallelism.trillion_parameter_training_on_frontier import TrillionOnFrontier

_SEQUENCE = 2048
_FRONTIER = cluster("frontier-gcd")
_22B, _175B, _1T = Shape(6144, 48, 48), Shape(12288, 96, 96), Shape(25600, 128, 128)
# tensor, pipeline, devices, sequences of a step (section V: 640 and 1,600 a replica)
_RECIPES = {_175B: (4, 16, 1024, 640 * 16), _1T: (8, 64, 3072, 1600 * 6)}


@cache
def _job(shape: Shape, devices: int, batch: int) -> Job:
    return Job(decoder(shape, _SEQUENCE), _FRONTIER, devices, batch, _SEQUENCE, framework="deepspeed")


def _published(technique: TrillionOnFrontier, shape: Shape) -> float:
    tensor, pipeline, devices, batch = _RECIPES[shape]
    return 100 * technique.laid_out(_job(shape, devices, batch), tensor, pipeline).mfu


def peak_22b(technique: TrillionOnFrontier) -> float:
    """Percent of peak; the abstract does not say on what layout."""
    return 100 * technique.recipe(_job(_22B, 64, 512)).mfu


def peak_175b(technique: TrillionOnFrontier) -> float:
    """Percent of peak with the published recipe."""
    return _published(technique, _175B)


def peak_1t(technique: TrillionOnFrontier) -> float:
    """Percent of peak with the published recipe."""
    return _published(technique, _1T)


def distance_of_recipe(technique: TrillionOnFrontier) -> float:
    """Most doublings between what is found and what was published, over tensor and pipeline sizes of both models."""
    found = []
    for shape, (tensor, pipeline, devices, batch) in _RECIPES.items():
        layout = technique.recipe(_job(shape, devices, batch)).layout
        found += [abs(log2(layout.tensor / tensor)), abs(log2(layout.pipeline / pipeline))]
    return max(found)
