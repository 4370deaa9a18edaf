"""A convolutional network for digits, and its training: what the claims of pruning and of recovery start from."""

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from narrows import samples

TRAINED_ON, BATCH, EPOCHS = 8000, 100, 3
STEPS = EPOCHS * TRAINED_ON // BATCH


def fresh() -> nn.Sequential:
    """A network for digits; always the same one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, after: Callable[[], None] = lambda: None, optimizer: torch.optim.Optimizer | None = None,
          count: int = TRAINED_ON) -> None:  # fmt: skip
    """Adam, or another optimizer, with a falling rate over so many training digits; `after` is called after each step."""
    images, labels = samples.digits()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * count // BATCH)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(count, generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            after()
            schedule.step()
    model.eval()


def correct(model: nn.Module) -> float:
    """Percent of the digits right that it was not trained on."""
    images, labels = samples.digits()
    with torch.no_grad():
        right = model(images[TRAINED_ON:]).argmax(1) == labels[TRAINED_ON:]
    return 100 * float(right.float().mean())


@cache
def dense() -> nn.Sequential:
    """The network after its training; change only copies of it."""
    model = fresh()
    train(model)
    return model
