"""Sites: clusters of unlike devices, or far from each other, that work on one job over the links between them.

A file in `data/sites` is the example to copy: `[[groups]]`, each a cluster (a bundled name, or a file) of so many nodes, and
`[[joins]]`, a link for every two groups.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, permutations
from typing import Any

from narrows.errors import NarrowsError, closest
from narrows.figures import Table, find, load, names, text, whole
from narrows.machine import Cluster, Link, cluster, cluster_of, link_of

Seam = tuple[int, Link]  # after so many devices of a range the next group begins, which is reached over this link
Seen = tuple[Cluster, tuple[Seam, ...]]


@dataclass(frozen=True)
class Site:
    """Clusters (`groups`, each with a name of its own) with the link that joins every two of them; one alone is a site too.

    A join's figures are those of a `Link`: each device's share when all of its group send. Equal groups that are joined by
    what joins their nodes are one group, and become one here. Missing joins and equal names raise NarrowsError.
    """

    name: str
    title: str
    groups: tuple[Cluster, ...]
    joins: tuple[tuple[frozenset[str], Link], ...] = ()

    def __post_init__(self) -> None:
        known, named = dict(self.joins), [group.name for group in self.groups]
        if not named or len(set(named)) < len(named) or (len(named) > 1 and set("".join(named)) & set("+,=")):
            raise NarrowsError(f"they are named {', '.join(named) or 'nothing'}.", where=f"{self.name}: groups",
                               remedy="Give at least one, each with a name of its own, without + , or =.")  # fmt: skip
        for one, other in combinations(named, 2):
            if frozenset((one, other)) not in known:
                remedy = f'Add [[joins]] with between = ["{one}", "{other}"] and the figures of a link.'
                raise NarrowsError(f"no link joins {one} and {other}.", where=f"{self.name}: joins", remedy=remedy)
        for pair in known:
            if len(pair) != 2 or not pair <= set(named):
                raise NarrowsError(f"{' and '.join(sorted(pair))} are no two groups.", where=f"{self.name}: joins",
                                   remedy=f"The groups are {', '.join(named)}.")  # fmt: skip
        kept = self._merged()
        left = {group.name for group in kept}
        object.__setattr__(self, "groups", kept)
        object.__setattr__(self, "joins", tuple((pair, link) for pair, link in self.joins if pair <= left))

    @classmethod
    def of(cls, one: "Cluster | Site") -> "Site":
        """A cluster as the site that it is alone; a site as it is."""
        return one if isinstance(one, Site) else cls(one.name, one.title, (one,))

    @property
    def devices(self) -> int:
        """How many machines there are in all."""
        return sum(group.devices for group in self.groups)

    def join(self, one: str, other: str) -> Link:
        """The link between two groups."""
        return dict(self.joins)[frozenset((one, other))]

    def only(self, chosen: str) -> "Site":
        """These groups alone, in this order, like 'a100+v100' ('' for all, as they are); an unknown name raises NarrowsError."""
        if not chosen:
            return self
        known, wanted = {group.name: group for group in self.groups}, chosen.split("+")
        for name in wanted:
            if name not in known:
                problem = f"{name!r} is no group of {self.name}."
                raise NarrowsError(problem, where="layout: groups", remedy=closest(name, list(known)))
            if wanted.count(name) > 1:
                raise NarrowsError(f"{name!r} is there twice.", where="layout: groups", remedy="Name each group once.")
        joins = tuple((pair, link) for pair, link in self.joins if pair <= set(wanted))
        return replace(self, groups=tuple(known[name] for name in wanted), joins=joins)

    def choices(self, devices: int) -> Iterator[str]:
        """Every choice and order of groups with no more than so many devices, for `only`; of equal ones the first come first."""
        alike = {
            one.name: [other for other in self.groups[:at] if self._alike(one, other) and one.nodes == other.nodes]
            for at, one in enumerate(self.groups)
        }
        for count in range(1, len(self.groups) + 1):
            for some in permutations(self.groups, count):
                first = all(other in some[:at] for at, group in enumerate(some) for other in alike[group.name])
                if first and sum(group.devices for group in some) <= devices:
                    yield "+".join(group.name for group in some)

    def seen(self, start: int, stop: int) -> tuple[Seen, ...]:
        """The groups that the devices from `start` to `stop` lie in, with the seams between these; one group has no end.

        Of more than two groups, every seam has the slowest link that joins any of them.
        """
        if len(self.groups) == 1:
            return ((self.groups[0], ()),)
        inside, ends, end = list[Cluster](), list[int](), 0
        for group in self.groups:
            if start < end + group.devices and stop > end:
                inside.append(group)
                ends.append(end - start)
            end += group.devices
        links = [self.join(one.name, other.name) for one, other in combinations(inside, 2)]
        slowest = min(links, key=lambda link: link.bandwidth_bytes_per_s, default=None)
        return tuple((group, tuple((at, slowest) for at in ends[1:] if slowest)) for group in inside)

    def runs(self, count: int, width: int, span: int = 1) -> Iterator[tuple[int, int, tuple[Seen, ...]]]:
        """What `span` x `width` devices see from each of `count` multiples of `width` on: (first, end, seen) of equal ones."""
        marks, end = {0, count}, 0
        for group in self.groups[:-1]:
            end += group.devices
            marks |= {at for at in range(end // width - 1, end // width + 2) if 0 < at < count}
        for first, stop in pairwise(sorted(marks)):
            yield first, stop, self.seen(first * width, (first + span) * width)

    def _merged(self) -> tuple[Cluster, ...]:
        kept: list[Cluster] = []
        for group in self.groups:
            like = next(
                (one for one in kept if self._alike(one, group) and self.join(one.name, group.name) == one.scale_out), None
            )
            if like:
                kept[kept.index(like)] = replace(like, nodes=like.nodes + group.nodes)
            else:
                kept.append(group)
        return tuple(kept)

    def _alike(self, one: Cluster, other: Cluster) -> bool:
        """Whether two groups differ in name and size alone."""

        def seen(group: Cluster) -> tuple[Any, ...]:
            others = [(pair - {group.name}, link) for pair, link in self.joins if group.name in pair]
            rest = {pair: link for pair, link in others if not pair <= {one.name, other.name}}
            return group.machine, group.devices_per_node, group.scale_up, group.scale_out, rest

        return seen(one) == seen(other)


def site(name_or_path: str | os.PathLike[str]) -> Site:
    """A bundled site or cluster by its name, or one read from your own TOML file; errors as for `cluster`."""
    word = str(name_or_path).strip().lower()
    path, _ = find("sites" if word in names("sites") else "clusters", name_or_path)
    return load(path, lambda top: _site_of(top, path) if "groups" in top.values else Site.of(cluster_of(top, path)))


def sites() -> list[str]:
    """The names of all bundled sites, sorted."""
    return names("sites")


def _site_of(top: Table, path: str) -> Site:
    groups = [_group_of(table, path) for table in top.tables("groups")]
    joins = []
    for table in top.tables("joins"):
        pair: Any = table.take("between")
        if not isinstance(pair, list) or not all(isinstance(name, str) for name in pair):
            raise NarrowsError("it is not a list of names.", where=table.at("between"), remedy='Write ["one", "other"].')
        joins.append((frozenset(pair), link_of(table)))
    return Site(text(top.take("name"), "name"), text(top.take("title"), "title"), tuple(groups), tuple(joins))


def _group_of(table: Table, path: str) -> Cluster:
    name, like, nodes = text(table.take("name"), table.at("name")), table.take("cluster"), table.figure("nodes")
    if isinstance(like, str) and like.endswith(".toml"):
        like = os.path.join(os.path.dirname(os.path.abspath(path)), like)
    table.finish()
    return replace(cluster(like), name=name, nodes=whole(nodes, table.at("nodes")))
