"""What FunMatch claims, on a network for digits that loses three quarters of its channels and a hundred unlabelled images."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from narrows import samples
from narrows.experiments.digit_network import correct, dense
from narrows.experiments.steady import one_thread, time_ratio
from narrows.plan import Plan
from narrows.techniques.distillation.patient_consistent_kd_funmatch import FunMatch
from narrows.techniques.sparsity_pruning.otov3 import OTOv3

SETS, BATCH = (0, 1000, 2000), 50  # where each set of images begins


def _images(start: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of digits, without what they are."""
    return [{"input": batch} for batch in samples.digits()[0][start : start + count].split(BATCH)]


@cache
def _recovered(technique: FunMatch, start: int, count: int) -> nn.Module:
    """The trained network with a quarter of its channels left, recovered on so many images."""
    plan = Plan((OTOv3(share=0.75), technique))
    return plan.apply(deepcopy(dense()), _images(start, count))


def _mean(technique: FunMatch, count: int) -> float:
    """Percent of the digits right after recovery, the mean of the sets."""
    return sum(correct(_recovered(technique, start, count)) for start in SETS) / len(SETS)


@one_thread()
def points_over_other_views(technique: FunMatch) -> float:
    """Percentage points more digits right than with views that are fixed, and than with independent ones: the lesser."""
    short = replace(technique, steps=100)
    return min(_mean(short, 100) - _mean(replace(short, views=views), 100) for views in ("fixed", "independent"))


@one_thread()
@torch.no_grad()  # type: ignore[untyped-decorator]
def speed_when_recovered(technique: FunMatch) -> float:
    """Time of the whole network's forward pass over that of the recovered one; 1 where that loses 2.25 points."""
    patient = replace(technique, steps=400)
    if correct(dense()) - _mean(patient, 200) >= 2.25:
        return 1.0
    images, whole, narrow = samples.digits()[0][:256], dense(), _recovered(patient, SETS[0], 200)
    return time_ratio(lambda: whole(images), lambda: narrow(images))
