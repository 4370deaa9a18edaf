"""Bytes that each rank of a training layout holds: at its peak by what they are, and over the step as a timeline."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from narrows.costmodel import medians
from narrows.layout import SCHEDULES, Layout
from narrows.simulate.network import FULL, NONE, Axes, Network, Part

BUCKET = 5e8  # parameters that ZeRO exchanges at once: DeepSpeed's default for reduce_bucket_size and allgather_bucket_size


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank at the peak of a step: numbers, or arrays over the `Axes` they were asked for.

    activations   kept for the backward passes of the microbatches in flight
    working       what one layer, or the output layer with its loss, needs while it is worked on
    buffers       of exchanges: weights gathered for a layer (ZeRO-3), and buckets of gradients
    margin        lost to fragmentation
    runtime       of the device's runtime and communication libraries, which a profiler of tensors does not see
    cached        freed tensors' that the allocator keeps as long as nothing else needs them: in no sum, but nvidia-smi shows it
    """

    weights: Any
    gradients: Any
    optimizer: Any
    activations: Any
    working: Any
    buffers: Any
    margin: Any
    runtime: Any
    cached: Any = 0.0

    @property
    def allocated(self) -> Any:
        """What a framework's allocator holds."""
        return self.total - self.runtime

    @property
    def total(self) -> Any:
        """All that must fit the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, Any]:
        """The bytes that must be there, by what they are."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "cached"}


def constants(framework: str = "") -> dict[str, float]:
    """What a framework keeps (see `data/efficiency.toml`).

    gradient, states   bytes of a parameter's gradient, and of what the optimizer keeps of it
    margin, cached     shares of all tensors: lost to fragmentation, and kept free by the allocator (0 where not said)
    runtime            bytes of the device that no tensor takes
    """
    return medians("training-memory", framework)


def stages(layout: Layout, net: Network | None = None) -> list[int]:
    """The stages of which one holds the most: those with an end of the network, the second, and the first of every place."""
    firsts = {place.stages[0] for place in net.places} if net else set()
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1} | firsts)


def layers_of(net: Network, layout: Layout, stage: int, axes: Axes | None = None) -> Any:
    """Layers of a stage; where the ends count as a layer each, theirs have one less."""
    if layout.balance != "layers" or layout.pipeline == 1:
        deep = axes.deep(net) if axes else [place.layers for place in net.places]
        return next(layers for place, layers in zip(net.places, deep, strict=True) if stage in place.stages)
    ends = (stage == 0) + (stage == layout.pipeline - 1)
    return float(max(np.ceil((net.layers + 2) / layout.pipeline) - ends, 1))


def memory(net: Network, layout: Layout, axes: Axes, stage: int, framework: str = "") -> Memory:
    """The peak of one pipeline stage's devices."""
    c, p, width = constants(framework), layout.pipeline, net.dtype.bits / 8
    deep, last, many = layers_of(net, layout, stage, axes), stage == p - 1, axes.accumulate
    ends, spread = (net.first.owned * (stage == 0) + (net.last.owned + net.last.tied * (p > 1)) * last), 1
    if layout.balance == "vocabulary":
        ends, spread = net.first.owned + net.last.owned + net.last.tied, p
    dense, experts = deep * net.layer.owned + ends / spread, deep * net.layer.experts
    replicas = layout.data * layout.context
    split = dense / replicas + experts * layout.expert / replicas

    def held(bytes_each: float, from_stage: int) -> Any:
        return bytes_each * np.where(np.asarray(axes.shard) >= from_stage, split, dense + experts)

    def kept(part: Part, redo: Any) -> Any:
        return part.saved[redo, axes.size]

    redone = np.minimum(1.0, layout.recompute_layers / deep) if layout.recompute_layers else 1.0
    layer = redone * kept(net.layer, axes.redo) + (1 - redone) * kept(net.layer, NONE)
    flight = np.minimum(SCHEDULES[layout.schedule].held(p, axes.chunks, many, stage), many) if p > 1 else 1.0
    outer = kept(net.last, NONE) / spread * (flight if spread > 1 or layout.schedule == "gpipe" else 1.0) * (last or spread > 1)
    busy = np.where(axes.redo == FULL, kept(net.layer, NONE), 0.0) + net.layer.largest[axes.size]
    if last or spread > 1:
        busy = np.maximum(busy, net.last.largest[axes.size] / spread)
    activations = flight * (deep * layer + kept(net.first, NONE) * (stage == 0)) + outer
    if layout.offload in ("activations", "both"):
        activations = 2 * layer + outer  # the layer that is worked on, and the one on its way
    gathered = 2 * (net.layer.owned + net.layer.experts) * width * (np.asarray(axes.shard) == 3)
    tensors = {
        "weights": held(width, 3),
        "gradients": held(c["gradient"], 2),
        "optimizer": 0.0 * many if layout.offload in ("optimizer", "both") else held(c["states"] - 4 * (width >= 4), 1),
        "activations": activations,
        "working": busy,
        "buffers": gathered + 2 * width * np.minimum(BUCKET, dense) * ((np.asarray(axes.shard) % 3 > 0) & (replicas > 1)),
    }
    whole = sum(tensors.values())
    runtime, cached = c["runtime"] + 0.0 * many, c.get("cached", 0.0) * whole
    return Memory(**tensors, margin=c["margin"] * whole, runtime=runtime, cached=cached)


def peak_bytes(net: Network, layout: Layout, axes: Axes, framework: str = "") -> Any:
    """Bytes of the rank that holds most."""
    most: Any = 0.0
    for stage in stages(layout, net):
        most = np.maximum(most, memory(net, layout, axes, stage, framework).total)
    return most
