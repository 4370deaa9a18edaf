"""Hosts: the memory, disks and processor behind devices, read from TOML in which every figure names its source.

The files in `data/hosts` are the examples to copy for a host of your own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache

from narrows.figures import Frozen, Table, find, load, names, number, text


@dataclass(frozen=True)
class Host:
    """What lies behind devices: capacities of the whole host, and rates that each device gets when all work at once.

    memory_bytes, disk_bytes              of the host;  link_bytes_per_s   between it and a device, each way
    read_bytes_per_s, write_bytes_per_s   of its disks; adam_per_s         parameters a second that the processor updates
    """

    name: str
    title: str
    memory_bytes: float
    disk_bytes: float
    link_bytes_per_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    adam_per_s: float
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        text(self.name, "name")
        text(self.title, "title")
        for key in FIGURES:
            object.__setattr__(self, key, number(getattr(self, key), key))
        object.__setattr__(self, "sources", Frozen(self.sources))


FIGURES = tuple(field.name for field in fields(Host) if field.type is float)


def host(name_or_path: str | os.PathLike[str]) -> Host:
    """A bundled host by name, or one read from your own TOML file; NarrowsError with file, field and remedy for what is wrong."""
    path, bundled = find("hosts", name_or_path)
    return _bundled(path) if bundled else load(path, _host_of)


def hosts() -> list[str]:
    """The names of all bundled hosts, sorted."""
    return names("hosts")


@cache
def _bundled(path: str) -> Host:
    return load(path, _host_of)


def _host_of(top: Table) -> Host:
    named = {key: top.take(key) for key in ("name", "title")}
    return Host(**named, **{key: top.figure(key) for key in FIGURES}, sources=top.cited)
