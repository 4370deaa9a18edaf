"""One step of training on many devices, in closed form: tensor, pipeline and data parallelism, sharding, recomputation.

    step = microbatches x slowest stage + bubble + pipeline messages + gradients + optimizer + host

A stage takes what its layers take forward, backward and, where activations are recomputed, forward again; the device
waits where the host launches more slowly than it computes. The schedule is 1F1B, interleaved over `chunks` parts of a
stage, of which the bubble is (stages - 1) / chunks microbatches (Narayanan et al., SC 2021, section 2.2).
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from narrows.capture.config import from_config
from narrows.costmodel import achieved, fitted, op_time
from narrows.errors import NarrowsError
from narrows.graph import FP16, Dim, Graph, Op, Size
from narrows.machine import Link, Machine
from narrows.parallel import tensor_parallel
from narrows.step import Step


@dataclass(frozen=True, slots=True)
class Shape:
    """A GPT-like decoder: widths, and whether its attention keeps the score matrix out of memory (`fused`)."""

    hidden: int
    layers: int
    heads: int
    vocabulary: int = 51200
    fused: bool = True


@dataclass(frozen=True, slots=True)
class Split:
    """How a step is spread: devices per tensor, stages, replicas; sequences per microbatch; microbatches per replica.

    chunks       parts of a stage that are interleaved
    recompute    none, selective (attention alone) or full
    sharded      weights are gathered for every use and gradients scattered (ZeRO-3, FSDP), beside the computation
    bubble       share of the 1F1B bubble that the schedule leaves (0 for a zero-bubble schedule)
    even         what makes up for the output layer on the last stage: nothing, layers moved away from it, or its own work
                 spread over all stages ('', 'layers', 'output')
    sequence_parallel   norms and residuals are split over the tensor-parallel devices too
    framework    whose constants count: '' (Megatron-LM), deepspeed or fsdp
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    microbatch: int = 1
    microbatches: int = 1
    chunks: int = 1
    recompute: str = "none"
    sharded: bool = False
    bubble: float = 1.0
    even: str = ""
    sequence_parallel: bool = False
    framework: str = ""

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True, slots=True)
class Fabric:
    """What joins devices: how many share a node, and bytes per second and device between nodes."""

    per_node: int
    between_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a layer, or of the output layer, per microbatch: forward, backward, redone forward, and launches of each."""

    forward: float
    backward: float
    again: float
    launches: int

    def seconds(self, factor: float, launch: float, norm: float) -> float:
        """As long as the device or the host needs, whichever is slower; rounded where they are close."""
        device, host = (self.forward + self.backward + self.again) * factor, self.launches * launch
        return float((device**norm + host**norm) ** (1 / norm))


def constants(framework: str = "") -> dict[str, float]:
    """The fitted constants of training, with those of a framework (`deepspeed`, `fsdp`) in their place where it has its own.

    sustained   factor on a device's time over a step, against kernels timed alone
    launch      host time of an operator, in launches of the machine;  norm  how sharply the slower of host and device wins
    network     share of the bandwidth between nodes;  pipeline  share of a stage's messages that is not hidden
    message_us  host time of a message;  exposed  share of gathering and scattering that is not hidden;  step_ms  of a step
    """
    tables = (fitted()["training"], fitted().get(f"training-{framework}", {}))
    return {name: entry["median"] for table in tables for name, entry in table.items()}


@lru_cache(maxsize=512)
def decoder(shape: Shape) -> Graph:
    """The graph of a GPT-like decoder of a shape, in fp16."""
    if shape.hidden % shape.heads:
        raise NarrowsError(
            f"{shape.heads} heads do not divide {shape.hidden}.", where="heads", remedy="Give a divisor of the width."
        )
    config = {
        "model_type": "gpt2",
        "n_embd": shape.hidden,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "vocab_size": shape.vocabulary,
        "n_positions": 2048,
        "torch_dtype": "float16",
        "tie_word_embeddings": True,
    }
    return from_config(config, f"gpt {shape.hidden} x {shape.layers}")


def unfused(graph: Graph, sequence: int) -> Graph:
    """The same graph with attention over `sequence` tokens in kernels that pass the whole score matrix through memory."""

    def change(op: Op) -> list[Op] | Op:
        if op.kind != "attention":
            return op
        heads, head = float(op["heads"]), float(op["head_dim"])  # type: ignore[arg-type]
        rows, scores, matrices = Size.of(tokens=heads), Size.of(tokens=heads * sequence), Size.of(sequences=heads)

        def make(part: str, kind: str, **dims: Dim) -> Op:
            return Op(f"{op.name}.{part}", kind, dims, act=op.act, repeat=op.repeat)

        return [
            make("scores", "matmul", rows=rows, inputs=head, outputs=sequence, matrices=matrices),
            make("softmax", "elementwise", elements=scores, reads=scores, flop_per_element=5),
            make("dropout", "elementwise", elements=scores, reads=scores, flop_per_element=2),
            make("context", "matmul", rows=rows, inputs=sequence, outputs=head, matrices=matrices),
        ]

    return graph.map(change)


@lru_cache(maxsize=20_000)
def _parts(
    shape: Shape, machine: Machine, tensor: int, microbatch: int, sequence: int, recompute: str, sequence_parallel: bool
) -> tuple[Parts, Parts]:
    """One layer, and embedding with output layer, of one of `tensor` devices for one microbatch."""
    one = decoder(replace(shape, layers=2))
    step = Step.train(microbatch, sequence)
    found = []
    graph = tensor_parallel(one, tensor)
    if not shape.fused:
        graph = unfused(graph, sequence)
    for inside in (True, False):
        ops = [replace(op, repeat=1) for op in graph if (op.repeat > 1) == inside and op.kind != "checkpoint"]
        forward = backward = again = 0.0
        launches = 0
        for op in ops:
            share = (
                tensor
                if sequence_parallel and not op.spec.matmul and op.split == "" and op.kind in ("norm", "elementwise")
                else 1
            )
            ahead, back = (float(op_time(o, step, machine).seconds) / share for o in (op, replace(op, phase="backward")))
            redo = inside and (
                recompute == "full" or (recompute == "selective" and (".attention" in op.name or op.kind == "attention"))
            )
            forward, backward, again = forward + ahead, backward + back, again + ahead * redo
            launches += 3 + redo
        found.append(Parts(forward, backward, again, launches))
    return found[0], found[1]


def _over(machine: Machine, fabric: Fabric, members_per_node: int, crosses: bool) -> Machine:
    """The machine as a collective sees it: between nodes, each member of its group in a node brings one network card."""
    if not crosses or machine.link is None:
        return machine
    inside = machine.link.bandwidth_bytes_per_s
    speed = min(inside, fabric.between_bytes_per_s * members_per_node)
    return replace(machine, links=(Link("network", speed, 3 * machine.link.latency_seconds),), sources={})


def step_seconds(shape: Shape, machine: Machine, fabric: Fabric, split: Split, sequence: int) -> dict[str, float]:
    """Seconds of one training step by cause; their sum is the step.

    compute, bubble, pipeline (messages between stages), gradients (their exchange, as far as it is not hidden),
    optimizer, host (fixed time of a step). Raises NarrowsError for layers or heads that a split does not divide.
    """
    c, launch = constants(split.framework), machine.launch_seconds * achieved(machine, "launch").median
    fabric = replace(fabric, between_bytes_per_s=fabric.between_bytes_per_s * c["network"])
    across = split.tensor > fabric.per_node
    inner = _over(machine, fabric, fabric.per_node, across)
    layer, ends = _parts(shape, inner, split.tensor, split.microbatch, sequence, split.recompute, split.sequence_parallel)
    each = layer.seconds(c["sustained"], launch * c["launch"], c["norm"])
    outer = ends.seconds(c["sustained"], launch * c["launch"], c["norm"])
    stage = shape.layers / split.pipeline * each
    average = stage + outer / split.pipeline
    slowest = {"": stage + outer, "layers": max(average, outer), "output": average}[split.even]
    bubble = split.bubble * (split.pipeline - 1) / split.chunks * stage

    message = 0.0
    if split.pipeline > 1:
        far = split.tensor * split.pipeline * split.data > fabric.per_node
        size = split.microbatch * sequence * shape.hidden / split.tensor
        send = Op("send", "send", {"elements": size, "ranks": 2}, act=FP16)
        once = float(op_time(send, Step.train(1, 1), _over(machine, fabric, 1, far)).seconds)
        message = 2 * split.chunks * (split.microbatches + split.pipeline - 1) * (once * c["pipeline"] + c["message_us"] * 1e-6)

    owned = (12 * shape.layers * shape.hidden**2 / split.pipeline + shape.vocabulary * shape.hidden) / split.tensor
    exchange = 0.0
    if split.data > 1:
        crosses = split.tensor * split.data > fabric.per_node
        wire = _over(machine, fabric, max(1, fabric.per_node // split.tensor), crosses)
        kinds = ("all_gather", "all_gather", "reduce_scatter") if split.sharded else ("all_reduce",)
        once = sum(
            float(op_time(Op(k, k, {"elements": owned, "ranks": split.data}, act=FP16), Step.train(1, 1), wire).seconds)
            for k in kinds
        )
        times = split.microbatches if split.sharded else 1
        exchange = once * times
        if split.sharded:  # gathered and scattered beside the computation: what is longer shows, and a share of the other
            busy = split.microbatches * slowest
            exchange = max(0.0, exchange - busy) + c["exposed"] * min(exchange, busy)
    update = Op("optimizer", "optimizer", {"elements": owned / (split.data if split.sharded else 1), "states": 3}, act=FP16)
    return {
        "compute": split.microbatches * slowest,
        "bubble": bubble,
        "pipeline": message,
        "gradients": exchange,
        "optimizer": float(op_time(update, Step.train(1, 1), machine).seconds),
        "host": c["step_ms"] * 1e-3,
    }
