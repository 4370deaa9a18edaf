"""Machines and clusters: what hardware can do, read from TOML in which every figure names its source.

Figures are SI: bytes, bytes/s, FLOP/s (a multiply-add is 2 FLOP), seconds, watts; a price is in US dollars per hour. The files in
`data/machines` and `data/clusters` are the examples to copy for a machine of your own; figures.py reads the form.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, TypeVar

from narrows.errors import NarrowsError
from narrows.figures import Frozen, Table, find, load, names, number, one_of, quoted, shown, text, whole, write

KINDS = ("gpu", "cpu", "tpu", "npu", "mcu", "pim", "fpga")
DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")
TOPOLOGIES = ("fully-connected", "switch", "ring", "hybrid-cube-mesh", "pcie-tree", "torus-2d", "torus-3d", "fat-tree",
              "rail-optimized", "dragonfly")  # fmt: skip
HOST_LINKS = ("pcie", "nvlink-c2c", "xgmi-host", "cxl")  # lead to the host; every other link joins devices to each other

# In which type a matmul runs where the hardware lacks the one asked for: the nearest wider type, first match. 8-bit floats embed
# in both 16-bit ones; int4 is a storage format on most machines, unpacked to 16-bit floats, and to int8 where there are none.
# fp32 never becomes tf32 or bf16 (narrower), and bf16 never becomes fp16 (less range): on a V100 bf16 runs at the fp32 rate.
FALLBACKS: Mapping[str, tuple[str, ...]] = {
    "int4": ("bf16", "fp16", "int8", "fp32", "fp64"),
    "fp4": ("fp8", "bf16", "fp16", "fp32", "fp64"),
    "fp8": ("bf16", "fp16", "fp32", "fp64"),
    "int8": ("bf16", "fp16", "fp32", "fp64"),
    "bf16": ("tf32", "fp32", "fp64"),
    "fp16": ("tf32", "fp32", "fp64"),
    "tf32": ("fp32", "fp64"),
    "fp32": ("fp64",),
    "fp64": (),
}
_SCALARS = ("units", "launch_seconds", "kernel_seconds", "power_watts", "idle_watts", "price_per_hour")
_OPTIONAL = ("power_watts", "idle_watts", "price_per_hour")
_QUANTILES = ("median", "low", "high")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_T = TypeVar("_T")


def _figures_of(part: Any) -> list[str]:
    return [field.name for field in fields(part)[1:]]  # all but the name


def _check_part(part: Any) -> None:
    if not isinstance(part.name, str) or not _NAME.fullmatch(part.name):
        raise NarrowsError(f"{shown(part.name)} is not a short name.", where="name", remedy="Use a-z, 0-9, - and _.")
    for key in _figures_of(part):
        object.__setattr__(part, key, number(getattr(part, key), key))


@dataclass(frozen=True, slots=True)
class Memory:
    """One tier of memory (hbm, dram, l2, l1, sram, flash): bytes it holds, bytes per second it delivers; bad figures raise."""

    name: str
    capacity_bytes: float
    bandwidth_bytes_per_s: float

    def __post_init__(self) -> None:
        _check_part(self)


@dataclass(frozen=True, slots=True)
class Link:
    """One way out of a device (nvlink, ici, pcie, ethernet, ...): bytes per second per device and direction, seconds per message.

    Where devices share a network card, the figure is each one's share when all of them send. Bad figures raise.
    """

    name: str
    bandwidth_bytes_per_s: float
    latency_seconds: float

    def __post_init__(self) -> None:
        _check_part(self)


@dataclass(frozen=True)
class Machine:
    """One device (a GPU, a CPU socket, a TPU chip, a microcontroller) as a cost model sees it.

    Peaks are dense FLOP/s per compute type. `memories` lists main memory first, then caches from the outside in, summed over the
    device; `links` the scale-up link first, then the host link. `tile` is rows x columns of one matmul output tile.
    `launch_seconds` is the host's cost of one kernel in eager mode, `kernel_seconds` the device's fixed cost of one.
    `efficiency` holds, for "matmul" or "memory", the fraction of peak achieved: median, low (10 %) and high (90 %);
    "matmul-at32" at 32 rows, between which it is interpolated; "dispatch-matmul" is the share of its fixed time that the
    smallest kernel needs; "step" is measured / predicted of whole steps instead, "gain" that of ratios of steps (see `gain`).
    `sources` names the origin of each of `figures()`. Figures that are not positive and finite raise NarrowsError.
    """

    name: str
    title: str
    kind: str
    peak_flop_per_s: Mapping[str, float]
    memories: tuple[Memory, ...]
    links: tuple[Link, ...]
    units: int
    launch_seconds: float
    kernel_seconds: float
    tile: tuple[int, int]
    power_watts: float | None
    idle_watts: float | None
    price_per_hour: float | None
    storage: Memory | None
    efficiency: Mapping[str, Mapping[str, float]]
    provenance: str
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        tile = self.tile if isinstance(self.tile, (tuple, list)) else ()
        if len(tile) != 2:
            raise NarrowsError(f"{shown(self.tile)} is not a pair.", where="tile", remedy="Write [rows, columns].")
        peaks = {one_of(d, DTYPES, "peak_flop_per_s"): number(v, f"peak_flop_per_s.{d}") for d, v in self.peak_flop_per_s.items()}
        if not peaks or not self.memories:
            where = "memories" if peaks else "peak_flop_per_s"
            raise NarrowsError("it is empty.", where=where, remedy="Give at least one.")
        checked: dict[str, object] = {
            "name": text(self.name, "name"),
            "title": text(self.title, "title"),
            "kind": one_of(self.kind, KINDS, "kind"),
            "provenance": one_of(self.provenance, ("datasheet", "calibrated"), "provenance"),
            "peak_flop_per_s": Frozen(peaks),
            "memories": _parts(self.memories, Memory, "memories"),
            "links": _parts(self.links, Link, "links"),
            "units": whole(self.units, "units"),
            "tile": (whole(tile[0], "tile"), whole(tile[1], "tile")),
            "efficiency": Frozen((name, _quantiles(name, entry)) for name, entry in self.efficiency.items()),
        }
        for key in _SCALARS[1:]:
            if key not in _OPTIONAL or getattr(self, key) is not None:
                checked[key] = number(getattr(self, key), key)
        if self.storage is not None:
            _parts((self.storage,), Memory, "storage")
        for key, value in checked.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "sources", _sources_of(self))

    @property
    def memory(self) -> Memory:
        """Main memory: where weights and activations live."""
        return self.memories[0]

    @property
    def link(self) -> Link | None:
        """The link that joins devices of one node (NVLink, xGMI, ICI); None where they meet over the host link only."""
        return next((link for link in self.links if link.name not in HOST_LINKS), None)

    @property
    def host_link(self) -> Link | None:
        """The link to the host's memory (PCIe, NVLink-C2C); None where none is known."""
        return next((link for link in self.links if link.name in HOST_LINKS), None)

    def computes_in(self, dtype: str) -> str:
        """The type a matmul of `dtype` runs in: itself, or the first of its FALLBACKS the hardware has; else NarrowsError."""
        if dtype not in FALLBACKS:
            raise NarrowsError(f"{shown(dtype)} is not a compute type.", where=self.name, remedy=f"Use {', '.join(DTYPES)}.")
        found = next((d for d in (dtype, *FALLBACKS[dtype]) if d in self.peak_flop_per_s), None)
        if found is None:
            remedy = f"It computes in {', '.join(self.peak_flop_per_s)}."
            raise NarrowsError(f"the machine has neither {dtype} nor a wider type.", where=self.name, remedy=remedy)
        return found

    def peak(self, dtype: str) -> float:
        """Dense peak in FLOP/s for a matmul of `dtype`, at the rate of the type it really runs in (see `computes_in`)."""
        return self.peak_flop_per_s[self.computes_in(dtype)]

    def figures(self) -> dict[str, float | int | tuple[int, int]]:
        """Every figure there is, by dotted name ("memories.hbm.capacity_bytes"), in the order of the file."""
        found: dict[str, Any] = {key: getattr(self, key) for key in _SCALARS if getattr(self, key) is not None}
        found["tile"] = self.tile
        found |= {f"peak_flop_per_s.{dtype}": value for dtype, value in self.peak_flop_per_s.items()}
        places = [(f"memories.{tier.name}", tier) for tier in self.memories] + [(f"links.{way.name}", way) for way in self.links]
        for place, part in [*places, *([("storage", self.storage)] if self.storage else [])]:
            found |= {f"{place}.{key}": getattr(part, key) for key in _figures_of(part)}
        for name, entry in self.efficiency.items():
            found |= {f"efficiency.{name}.{key}": entry[key] for key in _QUANTILES}
        return found

    def scaled(self, *, compute: float = 1.0, bandwidth: float = 1.0, launch: float = 1.0, link: float = 1.0,
               capacity: float = 1.0, storage: float = 1.0) -> "Machine":  # fmt: skip
        """What if: the machine with factors on all peaks, on every memory tier's bandwidth, on launch and kernel seconds
        (launch=0.5 is faster), on all links' bandwidth, on main memory's capacity, on storage bandwidth.

        Factors must be positive and finite, else NarrowsError. The name stays; title and sources say what was scaled.
        """
        by = {
            "compute": compute,
            "bandwidth": bandwidth,
            "launch": launch,
            "link": link,
            "capacity": capacity,
            "storage": storage,
        }
        by = {key: number(value, f"scaled({key})") for key, value in by.items()}
        what_if = "what if: " + ", ".join(f"{key} x{value:g}" for key, value in by.items() if value != 1.0)
        if all(value == 1.0 for value in by.values()):
            return self
        tiers = [replace(tier, bandwidth_bytes_per_s=tier.bandwidth_bytes_per_s * by["bandwidth"]) for tier in self.memories]
        tiers[0] = replace(tiers[0], capacity_bytes=tiers[0].capacity_bytes * by["capacity"])
        disk = self.storage
        other = replace(
            self,
            title=f"{self.title}, {what_if}",
            peak_flop_per_s={dtype: value * by["compute"] for dtype, value in self.peak_flop_per_s.items()},
            memories=tuple(tiers),
            links=tuple(replace(way, bandwidth_bytes_per_s=way.bandwidth_bytes_per_s * by["link"]) for way in self.links),
            launch_seconds=self.launch_seconds * by["launch"],
            kernel_seconds=self.kernel_seconds * by["launch"],
            storage=disk and replace(disk, bandwidth_bytes_per_s=disk.bandwidth_bytes_per_s * by["storage"]),
        )
        old, new = self.figures(), other.figures()
        return replace(other, sources={k: v if new[k] == old[k] else f"{v} ({what_if})" for k, v in self.sources.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the machine as TOML, whole or not at all; `machine(path)` gives an equal one back.

        A figure without a source, or a place that cannot be written, raises NarrowsError.
        """
        missing = [key for key in self.figures() if key not in self.sources]
        if missing:
            problem = f"no source is given for {', '.join(missing[:5])}."
            raise NarrowsError(problem, where=self.name, remedy="Add it to `sources` before saving.")
        write(path, "\n".join(_lines(self)) + "\n")


@dataclass(frozen=True)
class Cluster:
    """Equal machines joined by links: `nodes` nodes of `devices_per_node` devices; a node is what `scale_up` joins.

    `scale_out` joins nodes (None where there is nothing beyond one node). `topology` is the wiring between nodes, or inside the
    node when there is only one. Another size is `dataclasses.replace(cluster, nodes=4)`. Bad figures raise NarrowsError.
    """

    name: str
    title: str
    machine: Machine
    devices_per_node: int
    nodes: int
    scale_up: Link
    scale_out: Link | None
    topology: str
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        text(self.name, "name")
        text(self.title, "title")
        one_of(self.topology, TOPOLOGIES, "topology")
        _parts((self.machine,), Machine, "machine")
        _parts((self.scale_up,), Link, "scale_up")
        _parts((self.scale_out,) if self.scale_out else (), Link, "scale_out")
        for key in ("devices_per_node", "nodes"):
            object.__setattr__(self, key, whole(getattr(self, key), key))
        if self.nodes > 1 and self.scale_out is None:
            raise NarrowsError("missing between several nodes.", where="scale_out", remedy="Give it, or nodes = 1.")
        object.__setattr__(self, "sources", _sources_of(self))

    @property
    def devices(self) -> int:
        """How many machines there are in all."""
        return self.devices_per_node * self.nodes

    def figures(self) -> dict[str, float | int]:
        """Every figure of the cluster itself (its machine has its own), by dotted name."""
        found: dict[str, float | int] = {"devices_per_node": self.devices_per_node, "nodes": self.nodes}
        for place, way in (("scale_up", self.scale_up), ("scale_out", self.scale_out)):
            found |= {f"{place}.{key}": getattr(way, key) for key in _figures_of(way)} if way else {}
        return found


def machine(name_or_path: str | os.PathLike[str]) -> Machine:
    """A bundled machine by name or alias, in any case ("h100-sxm", "H100"), or one read from your own TOML file's path.

    An unknown name, and a file that is unreadable, incomplete or wrong, raise NarrowsError with file, field and remedy.
    """
    path, bundled = find("machines", name_or_path)
    return _bundled_machine(path) if bundled else load(path, _machine_of)


def machines() -> list[str]:
    """The names of all bundled machines, sorted."""
    return names("machines")


def cluster(name_or_path: str | os.PathLike[str]) -> Cluster:
    """A bundled cluster by name or alias, or one read from your own TOML file; errors as for `machine`.

    Its `machine` is a bundled name, or the path of a TOML file as seen from the cluster's own file.
    """
    path, bundled = find("clusters", name_or_path)
    return _bundled_cluster(path) if bundled else load(path, lambda top: cluster_of(top, path))


def clusters() -> list[str]:
    """The names of all bundled clusters, sorted."""
    return names("clusters")


def of_cluster(name_or_path: str | os.PathLike[str]) -> Machine:
    """The machine of a cluster as one that meets its peers over the link between nodes (of one node: inside it)."""
    group = cluster(name_or_path)
    wire = group.scale_out or group.scale_up
    found = replace(
        group.machine, links=(wire, *(way for way in group.machine.links if way.name in HOST_LINKS and way.name != wire.name))
    )
    place = "scale_out" if group.scale_out else "scale_up"
    cited = {f"links.{wire.name}.{key}": group.sources[f"{place}.{key}"] for key in _figures_of(Link)}
    return replace(found, title=f"{found.title}, in {group.title}", sources={**group.machine.sources, **found.sources, **cited})


@cache
def _bundled_machine(path: str) -> Machine:
    return load(path, _machine_of)


@cache
def _bundled_cluster(path: str) -> Cluster:
    return load(path, lambda top: cluster_of(top, path))


def _machine_of(top: Table) -> Machine:
    disk, curves = top.table("storage", optional=True), top.table("efficiency", optional=True)
    peaks = top.table("peak_flop_per_s")
    named = [(name, curves.table(name)) for name in list(curves.values)] if curves else []
    return Machine(
        **{key: top.take(key) for key in ("name", "title", "kind", "provenance")},
        **{key: top.figure(key, optional=key in _OPTIONAL) for key in (*_SCALARS, "tile")},
        peak_flop_per_s=peaks.figures() if peaks else {},
        memories=tuple(_part_of(table, Memory) for table in top.tables("memories")),
        links=tuple(_part_of(table, Link) for table in top.tables("links")),
        storage=_part_of(disk, Memory) if disk else None,
        efficiency={name: curve.figures() if curve else {} for name, curve in named},
        sources=top.cited,
    )


def link_of(table: Table) -> Link:
    """A link as a table of a file says it."""
    return _part_of(table, Link)


def cluster_of(top: Table, path: str) -> Cluster:
    """A cluster as the top table of a file at `path` says it; one of groups raises NarrowsError."""
    if "groups" in top.values:
        remedy = "Only `narrows plan train` lays out over several groups: give the cluster of one of them."
        raise NarrowsError("it has groups of devices.", where="groups", remedy=remedy)
    named = text(top.take("machine"), "machine")
    if named.endswith(".toml"):
        named = os.path.join(os.path.dirname(os.path.abspath(path)), named)
    up, out = top.table("scale_up"), top.table("scale_out", optional=True)
    return Cluster(
        **{key: top.take(key) for key in ("name", "title", "topology")},
        **{key: top.figure(key) for key in ("devices_per_node", "nodes")},
        machine=machine(named),
        scale_up=link_of(up) if up else None,  # type: ignore[arg-type]  # take() has refused a missing one
        scale_out=link_of(out) if out else None,
        sources=top.cited,
    )


def _part_of(table: Table, kind: type[_T]) -> _T:
    figures = {"name": table.take("name"), **{key: table.figure(key) for key in _figures_of(kind)}}
    table.finish()
    try:
        return kind(**figures)
    except NarrowsError as error:
        raise NarrowsError(error.problem, where=table.at(error.where), remedy=error.remedy) from None


def _parts(parts: Any, kind: type[_T], field: str) -> tuple[_T, ...]:
    found = tuple(parts)
    wrong = [part for part in found if not isinstance(part, kind)]
    if wrong or len({part.name for part in found}) < len(found):
        problem = f"{shown(wrong[0])} is not a {kind.__name__}." if wrong else "two entries have the same name."
        raise NarrowsError(problem, where=field, remedy=f"Give each {kind.__name__} a name of its own.")
    return found


def _quantiles(name: object, entry: Mapping[str, float]) -> Frozen:
    field = f"efficiency.{name}"
    if not isinstance(name, str) or not _NAME.fullmatch(name) or set(entry) != set(_QUANTILES):
        raise NarrowsError("not a median with its low and high.", where=field, remedy="Give exactly median, low and high.")
    found = Frozen((key, number(entry[key], f"{field}.{key}")) for key in _QUANTILES)
    if not found["low"] <= found["median"] <= found["high"]:
        raise NarrowsError("the order is not low <= median <= high.", where=field, remedy="Check the three figures.")
    return found


def _sources_of(owner: Machine | Cluster) -> Frozen:
    """The sources of the figures there are; those of a figure since removed (storage=None) go with it."""
    return Frozen((key, text(owner.sources[key], f"sources.{key}")) for key in owner.figures() if key in owner.sources)


def _lines(machine: Machine) -> Iterator[str]:
    keys = {line: f"source-{count}" for count, line in enumerate(dict.fromkeys(machine.sources.values()), 1)}
    yield from (f"{key} = {quoted(getattr(machine, key))}" for key in ("name", "title", "kind", "provenance"))
    header = ""
    for dotted, value in machine.figures().items():
        table, _, key = dotted.rpartition(".")
        if table != header:
            header, (group, _, name) = table, table.partition(".")
            yield f"\n[[{group}]]\nname = {quoted(name)}" if group in ("memories", "links") else f"\n[{table}]"
            if machine.storage and table == "storage":
                yield f"name = {quoted(machine.storage.name)}"
        figure = list(value) if isinstance(value, tuple) else value
        yield f"{key} = {{ value = {figure!r}, source = {quoted(keys[machine.sources[dotted]])} }}"
    yield "\n[sources]"
    yield from (f"{key} = {quoted(line)}" for line, key in keys.items())
