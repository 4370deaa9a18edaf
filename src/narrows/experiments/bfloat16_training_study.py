"""What the study of bfloat16 claims: casts that are the hardware's, small gradients kept, and losses like those in fp32."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrows import samples
from narrows.experiments.small_tasks import characters
from narrows.experiments.steady import one_thread
from narrows.modules.rounded_training import rounded
from narrows.techniques.quantization.bfloat16_training_study import BFloat16Training

CONTEXT, BATCH, GLOBAL_BATCH = 16, 128, 2**19


def casts_that_differ(technique: BFloat16Training) -> float:
    """Share of fp32 numbers of which rounding gives other bits than torch's cast to bfloat16; all NaN count as one."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).int()
    patterns[::8] = patterns[::8] >> 16 << 16 | 1 << 15  # ties
    x = patterns.view(torch.float32)
    ours, theirs = rounded(x, technique.form, technique.nearest), x.bfloat16().float()
    same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
    return float((~same).float().mean())


def bias(technique: BFloat16Training) -> float:
    """How far the mean of many numbers' sizes moves when each is rounded, as a share of it."""
    sizes = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).abs()
    return abs(float(rounded(sizes, technique.form, technique.nearest).double().sum() / sizes.double().sum()) - 1)


Task = tuple[nn.Module, Tensor, Tensor, Callable[[nn.Module, Tensor], Tensor]]


def _read() -> Task:
    """A convolutional network that reads digits; each row is an image and its label."""
    images, labels = samples.digits()
    rows = torch.cat([images.flatten(1), labels[:, None].float()], 1)
    network = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, padding=1),
                            nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))  # fmt: skip

    def loss(network: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(network(rows[:, :-1].view(-1, 1, 28, 28)), rows[:, -1].long())

    return network, rows[:8000], rows[8000:], loss


def _reconstruct() -> Task:
    """An autoencoder of digits with 32 numbers in its middle."""
    images = samples.digits()[0].flatten(1)
    widths = ((784, 128), (128, 32), (32, 128), (128, 784))
    layers = [part for pair in widths for part in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1]), images[:8000], images[8000:], lambda network, x: F.mse_loss(network(x), x)


def _predict() -> Task:
    """A network that predicts the next character from those before it."""
    rows, symbols = characters(CONTEXT)
    network = nn.Sequential(nn.Embedding(symbols, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 256), nn.GELU(),
                            nn.Linear(256, 256), nn.GELU(), nn.Linear(256, symbols))  # fmt: skip

    def loss(network: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(network(rows[:, :-1]), rows[:, -1])

    return network, rows[:-20_100], rows[-20_000::5], loss


@cache
@one_thread()
def _trained(task: Callable[[], Task], technique: BFloat16Training | None) -> float:
    """Held-out loss after 120 steps of Adam, in fp32 where there is no technique.

    The loss of a step is its share of a batch of GLOBAL_BATCH rows: Adam does not see the scale, but a format does.
    """
    torch.manual_seed(0)
    network, train, held_out, loss = task()
    options: dict[str, Any] = {"lr": 3e-3, "eps": 1e-15}
    optimizer = technique.attach(network, **options) if technique else torch.optim.Adam(network.parameters(), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        rows = train[torch.randint(len(train), (BATCH,), generator=generator)]
        optimizer.zero_grad()
        (loss(network, rows) * BATCH / GLOBAL_BATCH).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss(network, held_out))


def worst_loss_over_fp32(technique: BFloat16Training) -> float:
    """The largest of three tasks' held-out losses over that of the same run in fp32."""
    return max(_trained(task, technique) / _trained(task, None) for task in (_read, _reconstruct, _predict))
