"""What vocabulary parallelism claims: against measured iterations of eight A100, and on a real layer in shards."""

import csv
import math
from dataclasses import dataclass, replace
from functools import cache

from narrows.simulate.orders import one_f_one_b
from narrows.simulate.pipeline import Work
from narrows.techniques.training_parallelism.vocabulary_parallelism import VocabularyParallelism
from narrows.validate import beside

BARRIERS = {"vocab": 1, "synctwice": 2}


@dataclass(frozen=True)
class Run:
    """A measured run: its method, words in the vocabulary, tokens, the measured iteration, and the measured work."""

    method: str
    words: int
    tokens: int
    seconds: float
    work: Work


@cache
def runs() -> tuple[Run, ...]:
    """The runs of `pipeline_stage_times.csv`: 1F1B on 8 A100, 128 microbatches. Raises NarrowsError where it is not there."""
    found = []
    with (beside() / "pipeline_stage_times.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            forward, backward, share, embedding = (
                [float(us) * 1e-6 for us in row[kind].split()] for kind in ("F_us", "B_us", "S_us", "T_us")
            )
            half = [one / 2 for one in backward]
            work = Work.of(len(forward), int(row["microbatches"]), forward, half, half)
            if any(share):
                both = tuple(s + t for s, t in zip(share, embedding, strict=True))
                work = replace(work, seconds={**work.seconds, "S": both})
            found.append(Run(row["method"], int(row["vocab"]), int(row["seq"]), float(row["iteration_ms"]) / 1e3, work))
    return tuple(found)


def slower(work: Work, seconds: float) -> Work:
    """The work with every forward and backward pass longer by what its messages hold the device up."""
    longer = {kind: tuple(one + seconds for one in work.of_kind(kind)) for kind in ("F", "I")}
    return replace(work, seconds={**work.seconds, **longer})


@cache
def message_seconds() -> float:
    """What a message holds a device up: the median over the eight runs without the technique of what explains the iteration."""
    found = []
    for run in runs():
        if run.method == "base":
            order = one_f_one_b(run.work.stages, run.work.microbatches)
            plain, held_up = (order.play(slower(run.work, extra)).seconds for extra in (0.0, 1e-3))
            found.append((run.seconds - plain) / (held_up - plain) * 1e-3)
    return sorted(found)[len(found) // 2]


def iteration_error(technique: VocabularyParallelism) -> float:
    """Mean relative error of the simulated iteration over the runs with one and with two barriers."""
    errors = []
    for run in runs():
        if run.method in BARRIERS:
            ours = replace(technique, barriers=BARRIERS[run.method]) if technique.barriers else technique
            errors.append(abs(ours.play(slower(run.work, message_seconds())).seconds / run.seconds - 1))
    return sum(errors) / len(errors)


def _gain(technique: VocabularyParallelism, words: int) -> float:
    """Percent more iterations in the same time than with the whole layer on the last stage, at 2048 tokens."""
    work = {run.method: slower(run.work, message_seconds()) for run in runs() if (run.words, run.tokens) == (words, 2048)}
    plain = one_f_one_b(work["base"].stages, work["base"].microbatches).play(work["base"]).seconds
    return 100 * (plain / technique.play(work["vocab"]).seconds - 1)


def gain_32k(technique: VocabularyParallelism) -> float:
    """Percent gained with 32,000 words."""
    return _gain(technique, 32_000)


def gain_256k(technique: VocabularyParallelism) -> float:
    """Percent gained with 256,000 words."""
    return _gain(technique, 256_000)


def balance(technique: VocabularyParallelism) -> float:
    """The most logits on one of eight devices over an even share; infinite if loss or gradients differ from the dense layer's."""
    import torch

    from narrows.modules.vocabulary import sharded_loss

    draw = torch.Generator().manual_seed(0)
    words, width, rows, devices = 50_257, 32, 24, 8
    hidden = torch.randn(rows, width, generator=draw).requires_grad_()
    weight = torch.randn(words, width, generator=draw).requires_grad_()
    targets = torch.randint(words, (rows,), generator=draw)
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    dense.backward()
    shards = list(weight.detach().chunk(devices if technique.barriers else 1))
    with torch.no_grad():
        loss, grad_hidden, grads = sharded_loss(hidden, shards, targets)
    pairs = ((loss, dense), (grad_hidden, hidden.grad), (torch.cat(grads), weight.grad))
    wrong = max(float(((ours - theirs).abs().max() / theirs.abs().max()).detach()) for ours, theirs in pairs)
    return max(map(len, shards)) * devices / words if wrong < 1e-5 else math.inf


def in_flight(technique: VocabularyParallelism) -> float:
    """The most microbatches that one of eight ranks holds."""
    work = Work.of(8, 32)
    work = replace(work, seconds={**work.seconds, "S": (0.5,) * 8})
    return max(technique.play(work).peak_bytes.values())
