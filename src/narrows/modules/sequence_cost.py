"""A small network that reads a program as lines of words and numbers and gives what it costs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Line = Sequence[tuple[int, float]]  # (place of the word in the vocabulary, the number that goes with it)

_BATCH, _RATE = 32, 1e-2


class SequenceCost(nn.Module):  # type: ignore[misc]
    """Lines -> the logarithm of a cost.

    A line is the sum of its words' vectors, each moved along a second vector by the logarithm of the word's number; a
    convolution sees each line with its neighbours and gives the logarithm of what it costs. The whole is a power sum of
    the lines, whose exponent is learnt: one adds (time), a large one takes the maximum (memory).
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(2 * words, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.deep = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.power = nn.Parameter(torch.zeros(()))

    def forward(self, lines: Tensor) -> Tensor:
        """[B, L, 2 words], zero where a program has no more lines -> [B]."""
        there = (lines != 0).any(2, keepdim=True)
        read = torch.relu(self.read(lines)) * there  # or what is not there would reach its neighbours
        costs = self.deep(read + self.mix(read.mT).mT)
        power = 1 + nn.functional.softplus(self.power)
        return torch.logsumexp((costs * power).masked_fill(~there, -torch.inf), (1, 2)) / power


def tensor(programs: Sequence[Sequence[Line]], words: int) -> Tensor:
    """Programs as one tensor [B, L, 2 words]: which words a line has, and the logarithms of their numbers."""
    found = torch.zeros(len(programs), max(map(len, programs)), 2 * words)
    for i, program in enumerate(programs):
        for j, line in enumerate(program):
            for word, number in line:
                found[i, j, word] = 1
                found[i, j, words + word] = math.log2(1 + number) / 8
    return found


def fit(lines: Tensor, logs: Tensor, width: int, epochs: int, seed: int) -> SequenceCost:
    """A network trained on programs `lines` [B, L, 2 words] and the logarithms of their costs [B], by the absolute error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors so small are faster on one
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _trained(SequenceCost(lines.shape[2] // 2, width), lines, logs, epochs)
    finally:
        torch.set_num_threads(threads)


def _trained(model: SequenceCost, lines: Tensor, logs: Tensor, epochs: int) -> SequenceCost:
    batches = -(-len(lines) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(lines)).chunk(batches):
            optimizer.zero_grad()
            nn.functional.l1_loss(model(lines[chosen]), logs[chosen]).backward()
            optimizer.step()
            rate.step()
    model.eval()
    return model
