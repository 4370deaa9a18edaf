"""MoE-Lens: its table of caches, its prediction against requests played page by page, and its schedule against prompts first."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from narrows.capture import capture
from narrows.machine import Link, Machine, machine
from narrows.simulate.workload import Lengths, generate
from narrows.techniques.serving.moe_lens import Host, MoELens

PAGE = 16  # tokens of a page of the cache
REQUESTS = 10_000
LOADS = tuple((prompt, answer, room) for prompt in (98, 926) for answer in (32, 64, 128, 256) for room in (70.0, 210.0)
              if (prompt, answer) not in ((926, 32), (926, 64)))  # fmt: skip
PLANNED = {98: (0.52 + 0.562) / 2, 926: 0.35}  # of the room, by MoE-Lightning's plans for these prompts: the paper's table 1


def _device(name: str, flop_per_s: float, link_bytes_per_s: float) -> Machine:
    return replace(machine(name), peak_flop_per_s={"bf16": flop_per_s}, links=(Link("pcie", link_bytes_per_s, 5e-6),))


def cache_to_saturate(technique: MoELens) -> float:
    """GB of caches at 512 tokens a sequence on an A40."""
    return technique.to_saturate(capture("mixtral-8x7b"), _device("a40", 150e12, 32e9), 512) / 1e9


def cache_to_saturate_a100(technique: MoELens) -> float:
    """GB of caches at 256 tokens a sequence on an A100."""
    return technique.to_saturate(capture("mixtral-8x7b"), _device("a100-80gb", 312e12, 32e9), 256) / 1e9


def _prompts(mean: int) -> Iterator[int]:
    return (r.prompt for r in generate(1.0, REQUESTS, Lengths(mean, 1, 0.5), seed=1))


def _took(host: Host, tokens: int, attended: int) -> float:
    """Seconds of a step: the weights come while the device computes and the processor attends."""
    return max(host.load, tokens / host.compute, attended / host.attended)


def play_beside(host: Host, prompt: int, answer: int) -> float:
    """Seconds of all requests if every step decodes what runs and fills up with prompts, as far as there are pages.

    Who came last loses its room where pages run out, and is read again.
    """
    queue = deque((tokens, answer) for tokens in _prompts(prompt))
    held, left = np.empty(0, int), np.empty(0, int)  # of those that run, in the order in which they were let in
    pages, now = int(host.room / PAGE), 0.0
    while queue or len(held):
        while (-(-(held + 1) // PAGE)).sum() > pages:
            queue.appendleft((int(held[-1]), int(left[-1])))
            held, left = held[:-1], left[:-1]
        free, tokens = pages - int((-(-(held + 1) // PAGE)).sum()), len(held)
        attended = int(held.sum())
        new: list[tuple[int, int]] = []
        while queue and tokens + queue[0][0] <= host.most and -(-(queue[0][0] + 1) // PAGE) <= free:
            free -= -(-(queue[0][0] + 1) // PAGE)
            tokens += queue[0][0]
            new.append(queue.popleft())
        now += _took(host, tokens, attended)
        held, left = np.append(held + 1, [n for n, _ in new]).astype(int), np.append(left - 1, [g for _, g in new]).astype(int)
        held, left = held[left > 0], left[left > 0]
    return now


def play_first(host: Host, prompt: int, answer: int, share: float) -> float:
    """Seconds of all requests in batches that fit into a share of the room: all prompts of one, then all its answers."""
    queue, now = deque(_prompts(prompt)), 0.0
    while queue:
        batch: list[int] = []
        while queue and sum(batch) + queue[0] + (len(batch) + 1) * answer <= host.room * share:
            batch.append(queue.popleft())
        now += max(host.load, sum(batch) / host.compute)
        now += sum(_took(host, len(batch), sum(batch) + i * len(batch)) for i in range(answer))
    return now


def _hosts(technique: MoELens) -> Iterator[tuple[MoELens, Host, int, int]]:
    """Mixtral-8x7B on an A40 over a link that reaches 19.5 GB/s, as the paper measures."""
    graph, on = capture("mixtral-8x7b"), _device("a40", 150e12, 19.5e9)
    for prompt, answer, room in LOADS:
        one = replace(technique, cache_gb=room, answer=answer, host_gb_per_s=150.0)
        yield one, one.host(graph, on), prompt, answer


def accuracy(technique: MoELens) -> float:
    """One less the mean relative error of the predicted time."""
    errors = [abs(one.seconds(host, p, REQUESTS) / play_beside(host, p, g) - 1) for one, host, p, g in _hosts(technique)]
    return 1 - sum(errors) / len(errors)


def gain(technique: MoELens) -> float:
    """Mean speed over prompts first in the share of the room that is planned for them."""

    def first(host: Host, p: int, g: int) -> float:
        return play_first(host, p, g, PLANNED[p])

    gains = [first(h, p, g) / (play_beside(h, p, g) if one.beside else first(h, p, g)) for one, h, p, g in _hosts(technique)]
    return sum(gains) / len(gains)
