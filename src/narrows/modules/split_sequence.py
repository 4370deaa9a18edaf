"""What devices that share each sequence send each other in a step, and how long it takes, by the way they share it."""

import math
from dataclasses import dataclass, replace

from narrows.backward import training
from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.graph import Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.parallel import context_parallel, tensor_parallel
from narrows.step import Step

_MIXERS = ("attention", "latent_attention", "scan")


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bytes that one device sends in a step; seconds that they take on the machine's link, NaN where it has none."""

    sent_bytes: float
    seconds: float

    def __add__(self, other: "Exchange") -> "Exchange":
        return Exchange(self.sent_bytes + other.sent_bytes, self.seconds + other.seconds)


def share(step: Step, devices: int) -> Step:
    """The step of one of `devices` that share each sequence: its tokens, one at least."""
    return Step(step.batch, [max(1, -(-n // devices)) for n in step.new.ravel()], step.past, step.source, step.phase)


def exchanged(graph: Graph, machine: Machine, step: Step, devices: int, by: str) -> Exchange:
    """For one device: `ring` or `ulysses` (attention's tokens), `megatron` (tensor parallelism, norms by tokens), `none`.

    `graph` is the forward graph of the whole network, `step` the whole step.
    """
    if by == "none":
        return Exchange(0.0, 0.0)
    if by == "megatron":
        cut, own = tensor_parallel(graph, devices, sequence=True), step
        cut = training(cut) if step.phase == "train" else cut
    else:
        cut = context_parallel(training(graph) if step.phase == "train" else graph, devices, by)
        own = share(step, devices)
    ops = [op for op in cut if op.kind in COLLECTIVES]
    sent = sum(float(cost(op, own).link_bytes) for op in ops)
    return Exchange(sent, sum((float(op_time(op, own, machine).seconds) for op in ops), 0.0) if machine.link else math.nan)


def states(graph: Graph, step: Step) -> list[tuple[Op, float]]:
    """Ops that mix tokens, with the numbers of the state that stands for all tokens so far, were they linear attention.

    Attention: a matrix of key by value size for each head; a scan: its own state.
    """
    found = []
    for op in graph.find(*_MIXERS):
        dims = op.sized(step)
        if op.kind == "attention":
            found.append((op, dims["heads"] * dims["head_dim"] * dims["value_dim"]))
        elif op.kind == "latent_attention":
            found.append((op, dims["heads"] * (dims["nope_dim"] + dims["rope_dim"]) * dims["value_dim"]))
        else:
            found.append((op, dims["channels"] * dims["state"]))
    return [(op, float(step["sequences"]) * size) for op, size in found]


def passed(graph: Graph, machine: Machine, step: Step, devices: int, by: str, blocks: int = 4) -> Exchange:
    """States of linear attention between devices: `gather` (LASP-2), `scan` in blocks (ZeCO), `chain` whole (LASP), or `none`.

    A device sends a state once a layer and pass, except that a gather sends every device's to all.
    """
    total = Exchange(0.0, 0.0)
    if by == "none" or devices == 1:
        return total
    many = 2 if step.phase == "train" else 1
    for op, size in states(graph, step):
        single = Op("state", "send", {"elements": size, "ranks": 2}, act=op.act)
        if by == "gather":
            whole = Op("states", "all_gather", {"elements": size * devices, "ranks": devices}, act=op.act)
            one = Exchange(float(cost(whole, step).link_bytes), _seconds(whole, step, machine))
        else:
            parts = blocks if by == "scan" else 1
            block = replace(single, dims={"elements": size / parts, "ranks": 2})
            one = Exchange(float(cost(single, step).link_bytes), (parts + devices - 2) * _seconds(block, step, machine))
        total += Exchange(one.sent_bytes * op.repeat * many, one.seconds * op.repeat * many)
    return total


def _seconds(op: Op, step: Step, machine: Machine) -> float:
    return float(op_time(op, step, machine).seconds) if machine.link else math.nan
