"""A small language model cut into stages, and its gradients when a pipeline order runs it: in one process, or in several."""

import multiprocessing
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from narrows.experiments.steady import one_thread
from narrows.modules.pipeline_run import Rank, run_in_turn
from narrows.simulate.pipeline import Order

if TYPE_CHECKING:
    import torch

Gradients = dict[str, "torch.Tensor"]
WIDTH, SYMBOLS, CONTEXT, BATCH = 32, 64, 12, 16


def model(stages: int, blocks: int = 2, symbols: int = SYMBOLS) -> "list[torch.nn.Module]":
    """Stages of embedding, attention and feed-forward blocks, and output layer; always the same ones, in float64."""
    import torch
    from torch import nn

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.before(x)).chunk(3, -1)
            x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            return x + self.down(nn.functional.gelu(self.up(self.after(x))))

    torch.manual_seed(0)
    parts: list[torch.nn.Module] = []
    for stage in range(stages):
        first: list[nn.Module] = [nn.Embedding(symbols, WIDTH)] if stage == 0 else []
        last: list[nn.Module] = [nn.Linear(WIDTH, symbols)] if stage == stages - 1 else []
        parts.append(nn.Sequential(*first, *(Block() for _ in range(blocks)), *last).double())
    return parts


def tokens() -> "torch.Tensor":
    """Sequences of symbols that follow a rule with noise, so that gradients are not those of chance."""
    import torch

    draw = torch.Generator().manual_seed(1)
    start = torch.randint(SYMBOLS, (BATCH, 1), generator=draw)
    return (start + torch.randint(1, 4, (BATCH, CONTEXT + 1), generator=draw).cumsum(1)) % SYMBOLS


def _loss(microbatches: int, m: int, logits: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), tokens().chunk(microbatches)[m][:, 1:].flatten()) / microbatches


def _batch(microbatches: int, m: int) -> "torch.Tensor":
    return tokens().chunk(microbatches)[m][:, :-1]


def _rank(parts: "Sequence[torch.nn.Module]", mine: set[int], microbatches: int, recompute: bool) -> Rank:
    own = {stage: part for stage, part in enumerate(parts) if stage in mine}
    return Rank(own, len(parts) - 1, partial(_batch, microbatches), partial(_loss, microbatches), recompute)


def _gradients(parts: "Sequence[torch.nn.Module]", mine: set[int]) -> Gradients:
    found: Gradients = {}
    for stage in sorted(mine):
        for name, parameter in parts[stage].named_parameters():
            assert parameter.grad is not None
            found[f"{stage}.{name}"] = parameter.grad
    return found


@one_thread()
def whole(stages: int) -> Gradients:
    """The gradients of the whole batch at once, by autograd alone."""
    parts = model(stages)
    x = _batch(1, 0)
    for part in parts:
        x = part(x)
    _loss(1, 0, x).backward()
    return _gradients(parts, set(range(stages)))


@one_thread()
def in_turn(order: Order, stages: int, microbatches: int, recompute: bool = False) -> Gradients:
    """The gradients that an order leaves, its ranks taking turns in this process."""
    parts = model(stages)
    ranks = [_rank(parts, {one.stage for one in row}, microbatches, recompute) for row in order.ranks]
    run_in_turn(order.ranks, ranks)
    return _gradients(parts, set(range(stages)))


def in_processes(order: Order, stages: int, microbatches: int, recompute: bool = False) -> Gradients:
    """The gradients that an order leaves, each rank a process of its own that sends and receives arrays."""
    context = multiprocessing.get_context("spawn")
    inbox = [context.Queue() for _ in order.ranks]
    result = context.Queue()
    where = order.placement
    workers = [
        context.Process(target=_worker, args=(row, rank, where, inbox, result, stages, microbatches, recompute), daemon=True)
        for rank, row in enumerate(order.ranks)
    ]
    for worker in workers:
        worker.start()
    import torch

    found: Gradients = {}
    for _ in workers:
        found.update({name: torch.from_numpy(value) for name, value in result.get(timeout=60).items()})
    for worker in workers:
        worker.join()
    return found


def _worker(row: Any, rank: int, where: dict[int, int], inbox: Any, result: Any, stages: int, microbatches: int,
            recompute: bool) -> None:  # fmt: skip
    import torch

    torch.set_num_threads(1)
    parts, mine = model(stages), {one.stage for one in row}
    runner = _rank(parts, mine, microbatches, recompute)
    waiting: dict[Any, Any] = {}

    def send(name: Any, tensor: torch.Tensor) -> None:
        inbox[where[name[1]]].put((name, tensor.numpy()))

    def receive(name: Any) -> torch.Tensor:
        while name not in waiting:
            got, array = inbox[rank].get(timeout=60)
            waiting[got] = torch.from_numpy(array)
        found: torch.Tensor = waiting.pop(name)
        return found

    for one in row:
        runner.run(one, send, receive)
    result.put({name: value.numpy() for name, value in _gradients(parts, mine).items()})


def largest_difference(a: Gradients, b: Gradients) -> float:
    """The largest difference of two sets of gradients, over the largest gradient; NaN where their names differ."""
    if a.keys() != b.keys():
        return float("nan")
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(value.abs().max()) for value in a.values())
