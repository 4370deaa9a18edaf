"""Say how a convolutional network's parameters, activations and time grow when it is scaled by depth, width or resolution.

Scaling depth, width or resolution for s times the FLOP changes activations by s, the root of s, or s: on hardware that waits
for memory, networks of equal FLOP then differ in time. Fast compound scaling gives width the share alpha of the growth and
depth and resolution half of the rest each: depth grows with s^((1 - alpha) / 2), channels with s^(alpha / 2), the side of the
image with s^((1 - alpha) / 4), and activations with s^(1 - alpha / 2). A share of 1/3 is uniform compound scaling.

## When it helps
Choosing how to enlarge a network for a machine bound by bandwidth: most of the accuracy at close to the least activations.

## When it does not
Where arithmetic is the bound, equal FLOP take equal time. Grouped convolutions of a fixed group width grow by less than s.
Parameters grow faster than under uniform scaling. What accuracy it gives is not predicted.

## Reference
Dollar, Singh and Girshick, Fast and Accurate Model Scaling, CVPR 2021, arXiv 2103.06877.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from narrows.cost import Limit, cost
from narrows.costmodel import op_time
from narrows.errors import NarrowsError
from narrows.graph import Dim, Graph, Op
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

Growth = tuple[float, float, float]  # of depth, of channels, of the image's side

_SPATIAL = {"conv": ("positions", "in_positions"), "norm": ("rows",), "elementwise": ("elements", "reads"), "linear": ()}
_NETS = "three families of residual networks (dense, grouped, depthwise) "
_RUN = _NETS + "scaled in five ways to 4 and 8 times the FLOP, eager, bf16, one core: "


def growth(strategy: str, s: float, alpha: float) -> Growth:
    """How depth, channels and the image's side grow for s times the FLOP: by depth, width, resolution, uniform or fast."""
    shares = {"depth": (1.0, 0.0, 0.0), "width": (0.0, 1.0, 0.0), "resolution": (0.0, 0.0, 1.0),
              "uniform": (1 / 3, 1 / 3, 1 / 3), "fast": ((1 - alpha) / 2, alpha, (1 - alpha) / 2)}  # fmt: skip
    depth, width, resolution = shares[strategy]
    return s**depth, s ** (width / 2), s ** (resolution / 2)


STRATEGIES = ("depth", "width", "resolution", "uniform", "fast")


def scaled(graph: Graph, by: Growth) -> list[tuple[Op, float]]:
    """The forward ops of a convolutional network with grown channels and maps, and how often each runs for one time before.

    Depth is a real number: half of a block more costs half of it. Channels of the image and classes stay, as does the
    number of first and last layers; a group keeps its width. Raises NarrowsError for ops of other networks.
    """
    depth, width, side = by
    ops: list[tuple[Op, float]] = []
    for op in graph.forward:
        if op.kind not in _SPATIAL:
            raise NarrowsError(f"{op.kind} does not scale as a convolution does.", where=op.name,
                               remedy="Give a convolutional network.")  # fmt: skip
        dims: dict[str, Dim] = dict(op.dims)
        dims.update({name: dims[name] * side**2 for name in _SPATIAL[op.kind]})
        image = op.kind == "conv" and _number(dims["in_channels"]) <= 4
        if op.kind == "conv":
            groups = _number(dims["groups"])
            grown = round(groups * width) if groups > 1 else 1
            for name in ("out_channels", *(() if image else ("in_channels",))):
                each = _number(dims[name]) / groups
                dims[name] = round(each * grown) if groups > 1 else round(each * width)
            dims["groups"] = grown
        elif op.kind == "linear":
            dims["inputs"] = round(_number(dims["inputs"]) * width)
        elif op.kind == "norm":
            dims["width"] = round(_number(dims["width"]) * width)
        else:
            dims.update({name: dims[name] * width for name in _SPATIAL[op.kind]})
        ops.append((op.but(**dims), 1.0 if image or op.kind == "linear" else depth))
    return ops


def _number(dim: Dim) -> float:
    if not isinstance(dim, int | float):
        raise NarrowsError(f"a number of channels is {dim}.", where="scaling", remedy="Give a convolutional network.")
    return float(dim)


@dataclass(frozen=True)
class FastCompoundScaling(Measures):
    """What a network becomes under five ways to scale it, with a share of the growth given to width."""

    card: ClassVar[Card] = Card(
        "fast-compound-scaling",
        relieves=(Limit.BANDWIDTH,),
        phases=("forward", "train"),
        exact=False,
        claims=(
            Claim("activation_exponent", "power of FLOP", 0.5, _NETS + "as built, up to 8 times the FLOP, activations counted",
                  "abstract", "run", "close to the square root; 0.6 by the closed form, 0.83 under uniform scaling",
                  at_least=0.4, at_most=0.65),
            Claim("runtime_correlation", "Pearson", None, _RUN + "logarithm of seconds against the proxy's", "abstract", "run",
                  "a perfect proxy is 1; FLOP stay below 0.85", at_least=0.9),
            Claim("quicker", "x", None, _RUN + "seconds a FLOP under uniform scaling over those under fast scaling, mean of the "
                  "families and sizes", "abstract", "run", "quicker, beyond the noise of the least of six runs", at_least=1.03),
        ),
        price="accuracy of the scaled network is not predicted: it must be trained",
    )  # fmt: skip
    alpha: float = choice(0.8, 1 / 3, 0.5, 1.0, help="share of the FLOP's growth that width gets; 1/3 is uniform, 1 width alone")
    proxy: str = choice("activations", "flop", help="what seconds are taken to grow with")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise NarrowsError(f"the share is {self.alpha}.", where=f"{self.card.slug}: alpha", remedy="Give 0 to 1.")
        if self.proxy not in ("activations", "flop"):
            raise NarrowsError(f"{self.proxy!r} is not one.", where=f"{self.card.slug}: proxy", remedy="Use activations or flop.")

    def baseline(self) -> "FastCompoundScaling":
        return FastCompoundScaling(1 / 3, "flop")

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Growth of FLOP, parameters, activations and seconds at 2, 4 and 8 times the FLOP; a row a strategy and factor.

        Activations are the numbers that convolutions and linear layers write; seconds are the cost model's. Values: of fast
        scaling the powers of FLOP that each grows with, `proxy_seconds` at 8 times, and seconds of uniform over fast a FLOP.
        """
        before = _totals([(op, 1.0) for op in graph.forward], machine, step, graph.eager)
        rows: list[Mapping[str, Any]] = []
        for strategy in STRATEGIES:
            for s in (2.0, 4.0, 8.0):
                by = growth(strategy, s, self.alpha)
                after = _totals(scaled(graph, by), machine, step, graph.eager)
                rows.append({"strategy": strategy, "s": s, "depth": by[0], "width": by[1], "resolution": by[2],
                             **{name: after[name] / before[name] for name in before}})  # fmt: skip
        fast, uniform = ({row["s"]: row for row in rows if row["strategy"] == name}[8.0] for name in ("fast", "uniform"))
        values = {f"{name}_exponent": math.log(fast[name]) / math.log(fast["flop"])
                  for name in ("parameters", "activations", "seconds")}  # fmt: skip
        values["proxy_seconds"] = before["seconds"] * fast[self.proxy]
        values["gain_over_uniform"] = uniform["seconds"] / uniform["flop"] / (fast["seconds"] / fast["flop"])
        return Reading(values, {"proxy_seconds": "s", "gain_over_uniform": "x"}, tuple(rows))


def _totals(ops: list[tuple[Op, float]], machine: Machine, step: Step, eager: bool) -> dict[str, float]:
    """FLOP, parameters, activations and seconds of ops that run so many times each."""
    found = dict.fromkeys(("flop", "parameters", "activations", "seconds"), 0.0)
    for op, times in ops:
        found["flop"] += float(cost(op, step).flop) * times * op.spec.matmul
        found["parameters"] += op.parameters * times
        found["activations"] += float(op.spec.writes(op.sized(step))) * op.repeat * times * op.spec.matmul
        found["seconds"] += float(op_time(op, step, machine, eager).seconds) * times
    if not all(found.values()):
        raise NarrowsError("nothing in it multiplies weights.", where="scaling", remedy="Give a convolutional network.")
    return found
