"""What 1.58-bit FLUX claims: trits found on the model's own sampling come near it, in less than a seventh of the bytes."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.capture import capture
from narrows.experiments.steady import one_thread
from narrows.modules.flow_sampling import sampled
from narrows.techniques.quantization.one_58_bit_flux import TernaryFlux

GRID, PATCH, STEPS, SAMPLING = 4, 4, 200, 8


def _conditions(labels: Tensor) -> dict[str, Tensor]:
    """What FLUX is given beside the image: the digit to draw in place of a text, and where each patch is."""
    digit, place = F.one_hot(labels, 16).float(), torch.arange(GRID**2)
    places = torch.stack([torch.zeros_like(place), place // GRID, place % GRID], 1)
    return {"encoder_hidden_states": digit[:, None], "pooled_projections": digit, "img_ids": places, "txt_ids": torch.zeros(1, 3)}


def _start(count: int, seed: int) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Noise for images [B, T, C], in how many steps to draw them, and the digits to draw."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, GRID**2, PATCH**2, generator=generator), SAMPLING, _conditions(torch.arange(count) % 10)


@cache
@one_thread()
def _model() -> Any:
    """A FLUX transformer that draws digits of 16 x 16: trained to tell the way from noise to an image at any time between."""
    from diffusers import FluxTransformer2DModel

    images, labels = samples.digits()
    patches = F.unfold(F.interpolate(images, size=GRID * PATCH, mode="area"), PATCH, stride=PATCH).mT * 2 - 1
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=PATCH**2, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen, time = torch.randint(len(patches), (64,)), torch.rand(64)
        clean, noise = patches[chosen], torch.randn(64, GRID**2, PATCH**2)
        mixed = clean.lerp(noise, time[:, None, None])
        told = model(hidden_states=mixed, timestep=time, **_conditions(labels[chosen])).sample
        optimizer.zero_grad()
        F.mse_loss(told, noise - clean).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@cache
@one_thread()
def _changed(technique: TernaryFlux) -> nn.Module:
    """The model with the technique, which sees what the model was called with when it drew 32 digits."""
    return replace(technique, group=64).apply(deepcopy(_model()), sampled(_model(), *_start(32, seed=1))[1])


def _over_rounding(technique: TernaryFlux, distance: Callable[[Any], float]) -> float:
    """A distance of the changed model from its own over that with nearest trits."""
    with one_thread():
        return distance(_changed(technique)) / distance(_changed(technique.baseline()))


def error_over_rounding(technique: TernaryFlux) -> float:
    """Squared error of the velocities on the way from unseen noise, over that with nearest trits."""
    _, calls = sampled(_model(), *_start(32, seed=2))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def error(model: Any) -> float:
        return sum(float(F.mse_loss(model(**call).sample, _model()(**call).sample)) for call in calls)

    return _over_rounding(technique, error)


def samples_over_rounding(technique: TernaryFlux) -> float:
    """Squared distance of images from those of the unquantized model from the same noise, over that with nearest trits."""
    start = _start(64, seed=3)
    wanted = sampled(_model(), *start)[0]
    return _over_rounding(technique, lambda model: float(F.mse_loss(sampled(model, *start)[0], wanted)))


def storage(technique: TernaryFlux) -> float:
    """Weight bytes of FLUX.1-dev in bf16 over those with trits; 0 where trits are no better than nearest ones."""
    plain = capture("flux.1-dev")
    worth = error_over_rounding(technique) <= 0.2
    return plain.weight_bytes / technique.rewrite(plain).weight_bytes if worth else 0.0
