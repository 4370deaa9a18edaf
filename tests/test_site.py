"""Sites: what their files may say, equal groups as one, what ranges of devices see."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.machine import Cluster, Link, cluster, clusters
from narrows.site import Site, site, sites

A100, V100, H100 = cluster("dgx-a100"), cluster("dgx-v100"), cluster("dgx-h100")
SLOW = Link("ethernet", 1e9, 3e-5)

FILE = """
name = "pair"
title = "two halls"

[[groups]]
name = "a"
cluster = "dgx-a100"
nodes = { value = 2, source = "own" }

[[groups]]
name = "b"
cluster = "dgx-v100"
nodes = { value = 1, source = "own" }

[[joins]]
between = ["a", "b"]
name = "ethernet"
bandwidth_bytes_per_s = { value = 1e9, source = "own" }
latency_seconds = { value = 3e-5, source = "own" }

[sources]
own = "measured"
"""


def joined(*groups: Cluster, link: Link = SLOW) -> Site:
    """A site of these clusters, named a, b, c, each two joined by the same link."""
    named = [replace(group, name=name) for group, name in zip(groups, "abc", strict=False)]
    pairs = [frozenset((x.name, y.name)) for i, x in enumerate(named) for y in named[:i]]
    return Site("test", "a test", tuple(named), tuple((pair, link) for pair in pairs))


def written(path: Path, text: str) -> Path:
    file = path / "site.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", sites())
def test_bundled_sites_are_several_groups(name: str) -> None:
    found = site(name)
    assert found.name == name and len(found.groups) > 1
    assert found.devices == sum(group.devices for group in found.groups)


@pytest.mark.parametrize("name", clusters())
def test_a_cluster_is_a_site_by_itself(name: str) -> None:
    assert site(name).groups == (cluster(name),)


def test_a_file_of_your_own_is_read(tmp_path: Path) -> None:
    found = site(written(tmp_path, FILE))
    assert [(group.name, group.devices, group.machine) for group in found.groups] == [
        ("a", 16, A100.machine),
        ("b", 8, V100.machine),
    ]
    assert found.join("b", "a") == SLOW


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("[[joins]]", "[[links]]", 'no link joins a and b.*between = \\["a", "b"\\]'),
        ('between = ["a", "b"]', 'between = ["a", "c"]', "no link joins a and b"),
        ('between = ["a", "b"]', 'between = "a"', "joins.*not a list of names"),
        ('name = "b"\n', 'name = "a"\n', "a name of its own"),
        ('name = "b"\n', 'name = "b+c"\n', "without"),
        ('"dgx-v100"', '"dgx-v1000"', "there is no cluster 'dgx-v1000'"),
        ("value = 2", "value = 2.5", "groups.a.nodes.*whole number"),
        ("value = 1e9", "value = 0", "bandwidth"),
        ('nodes = { value = 1, source = "own" }', "nodes = 1", "not a value with its source"),
        ('title = "two halls"', 'title = "two halls"\nsize = 2', "unknown key"),
    ],
)
def test_a_wrong_file_is_refused_by_name(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in FILE
    file = written(tmp_path, FILE.replace(old, new))
    with pytest.raises(NarrowsError, match=f"(?s){says}") as caught:
        site(file)
    assert str(file) in caught.value.where


def test_a_site_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(NarrowsError, match=r"groups of devices.*plan train"):
        cluster(written(tmp_path, FILE))


def test_a_third_group_needs_a_link_to_each() -> None:
    with pytest.raises(NarrowsError, match="no link joins a and c"):
        Site("test", "a test", tuple(replace(one, name=name) for one, name in ((A100, "a"), (V100, "b"), (H100, "c"))),
             ((frozenset("ab"), SLOW),))  # fmt: skip


def test_groups_are_chosen_by_name() -> None:
    all_three = joined(A100, V100, H100)
    assert [group.name for group in all_three.only("c+a").groups] == ["c", "a"]
    assert all_three.only("") == all_three
    with pytest.raises(NarrowsError, match="Did you mean"):
        all_three.only("a+bb")
    with pytest.raises(NarrowsError, match="twice"):
        all_three.only("a+a")


@given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.sampled_from([A100, V100, H100]))
def test_equal_groups_on_their_own_network_are_one_group(nodes: list[int], box: Cluster) -> None:
    link = box.scale_out
    assert link is not None
    found = joined(*(replace(box, nodes=n) for n in nodes), link=link)
    assert found.groups == (replace(box, name="a", nodes=sum(nodes)),)
    assert found.joins == ()
    assert len(joined(*(replace(box, nodes=n) for n in nodes)).groups) == len(nodes)


def test_choices_leave_groups_out_and_count_equal_ones_once() -> None:
    assert list(joined(A100, V100).choices(16)) == ["a", "b", "a+b", "b+a"]
    assert list(joined(A100, V100).choices(15)) == ["a", "b"]
    assert list(joined(A100, A100).choices(16)) == ["a", "a+b"]
    assert len(list(joined(A100, V100, A100).choices(24))) == 1 + 1 + (1 + 2) + 3


@given(
    st.lists(st.tuples(st.sampled_from([A100, V100, H100]), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 24),
    st.integers(1, 2),
)
def test_runs_of_stages_see_what_each_stage_sees(parts: list[tuple[Cluster, int]], width: int, span: int) -> None:
    found = joined(*(replace(box, nodes=n) for box, n in parts))
    count = found.devices // width - span + 1
    if count < 1:
        return
    seen = {at: what for first, end, what in found.runs(count, width, span) for at in range(first, end)}
    assert sorted(seen) == list(range(count))
    for at, what in seen.items():
        assert what == found.seen(at * width, (at + span) * width)


def test_a_range_across_groups_sees_both_and_the_seam() -> None:
    found = joined(A100, V100)
    assert found.seen(0, 8) == ((found.groups[0], ()),)
    assert found.seen(8, 16) == ((found.groups[1], ()),)
    assert found.seen(4, 12) == tuple((group, ((4, SLOW),)) for group in found.groups)
