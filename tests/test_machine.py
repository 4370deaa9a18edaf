"""machine.py and figures.py: the bundled hardware, what may be asked of it, and every way a file of one's own can be wrong."""

import copy
import math
import os
import pickle
import re
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrows import machine as module
from narrows.errors import NarrowsError
from narrows.machine import DTYPES, FALLBACKS, Cluster, Link, Machine, Memory, cluster, clusters, machine, machines

DATA = Path(module.__file__).parent / "data"
WANTED = [
    "v100-sxm2-32gb",
    "t4",
    "a10",
    "a100-40gb",
    "a100-80gb",
    "a100-pcie-40gb",
    "a40",
    "rtx-3090",
    "rtx-4090",
    "rtx-pro-6000",
    "l4",
    "l40s",
    "h20",
    "h100-sxm",
    "h100-pcie",
    "h200",
    "h800",
    "b200",
    "gb200",
    "mi210",
    "mi250x",
    "mi250x-gcd",
    "mi300x",
    "tpu-v4",
    "tpu-v5e",
    "tpu-v5p",
    "xeon-amx",
    "xeon-haswell",
    "xeon-broadwell",
    "xeon-skylake",
    "desktop-avx2",
    "grace",
    "jetson-orin-agx",
    "cortex-m7",
]

GOOD = """
name = "mine"
title = "a machine of my own"
kind = "npu"
provenance = "datasheet"
units = { value = 4, source = "d" }
launch_seconds = { value = 1e-6, source = "d" }
kernel_seconds = { value = 1e-6, source = "d" }
tile = { value = [16, 16], source = "d" }
power_watts = { value = 5, source = "d" }
[peak_flop_per_s]
int8 = { value = 4e12, source = "d" }
[[memories]]
name = "dram"
capacity_bytes = { value = 8e9, source = "d" }
bandwidth_bytes_per_s = { value = 34e9, source = "d" }
[efficiency.matmul]
median = { value = 0.7, source = "d" }
low = { value = 0.5, source = "d" }
high = { value = 0.9, source = "d" }
[sources]
d = "its datasheet, 2024"
"""
CLUSTER = """
name = "two"
title = "two of mine"
machine = "mine.toml"
topology = "ring"
devices_per_node = { value = 1, source = "d" }
nodes = { value = 2, source = "d" }
[scale_up]
name = "ethernet"
bandwidth_bytes_per_s = { value = 1.25e9, source = "d" }
latency_seconds = { value = 3e-5, source = "d" }
[scale_out]
name = "ethernet"
bandwidth_bytes_per_s = { value = 1.25e9, source = "d" }
latency_seconds = { value = 3e-5, source = "d" }
[sources]
d = "my desk"
"""


def written(folder: Path, text: str | bytes, name: str = "mine.toml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# ---- the bundled files


def test_the_wanted_machines_are_there() -> None:
    assert machines() == sorted(WANTED)
    assert len(clusters()) >= 14


@pytest.mark.parametrize("name", WANTED)
def test_bundled_machine(name: str) -> None:
    found = machine(name)
    assert found.name == name
    assert set(found.sources) == set(found.figures()), "every figure has a source"
    assert found.provenance == "datasheet"
    assert found.memory.name in ("hbm", "dram", "sram")
    capacities = [tier.capacity_bytes for tier in found.memories]
    assert capacities[0] == max(capacities)
    speeds = [tier.bandwidth_bytes_per_s for tier in found.memories]
    assert speeds == sorted(speeds), "caches are faster from the outside in"
    assert (found.link is None) or found.link is found.links[0], "the scale-up link comes first"


@pytest.mark.parametrize("name", clusters())
def test_bundled_cluster(name: str) -> None:
    found = cluster(name)
    assert found.name == name
    assert set(found.sources) == set(found.figures())
    assert found.devices == found.nodes * found.devices_per_node >= 2
    if found.scale_out and found.devices_per_node > 1:
        assert found.scale_out.bandwidth_bytes_per_s <= found.scale_up.bandwidth_bytes_per_s


@pytest.mark.parametrize("folder", ["machines", "clusters"])
def test_names_and_aliases_are_unique_and_resolve(folder: str) -> None:
    find = machine if folder == "machines" else cluster
    seen: dict[str, str] = {}
    for path in sorted((DATA / folder).glob("*.toml")):
        for word in [path.stem, *tomllib.loads(path.read_text()).get("aliases", [])]:
            assert word == word.lower() and not re.search(r"[\s_/]", word)
            assert word not in seen, f"{word} is in {path.name} and in {seen.get(word)}"
            seen[word] = path.name
            assert find(word.upper()).name == path.stem


def test_assumptions_say_so() -> None:
    for name in machines():
        for key in ("launch_seconds", "kernel_seconds"):
            assert machine(name).sources[key].startswith("assumption: "), (name, key)


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*.toml")), ids=lambda path: path.stem)
def test_no_source_is_left_uncited(path: Path) -> None:
    text = path.read_text()
    for key in tomllib.loads(text)["sources"]:
        assert f'source = "{key}"' in text, key


@pytest.mark.parametrize(
    ("name", "dtype", "low", "high"),
    [
        ("v100-sxm2-32gb", "fp16", 130, 145),  # 125 TFLOP/s / 0.9 TB/s
        ("a100-80gb", "bf16", 150, 156),  # 312 / 2.039
        ("h100-sxm", "bf16", 290, 300),  # 989.4 / 3.35
        ("h20", "bf16", 35, 40),  # 148 / 4: the card made for decoding
        ("tpu-v5e", "bf16", 235, 245),  # 240 in Austin et al., How to Scale Your Model
        ("mi300x", "bf16", 240, 250),
        ("desktop-avx2", "fp32", 15, 25),
        ("cortex-m7", "int8", 0.5, 2),
    ],
)
def test_ridge_points(name: str, dtype: str, low: float, high: float) -> None:
    found = machine(name)
    assert low < found.peak(dtype) / found.memory.bandwidth_bytes_per_s < high


@pytest.mark.parametrize("name", WANTED)
def test_peaks_are_ordered(name: str) -> None:
    found = machine(name)
    peaks = found.peak_flop_per_s
    for wide, narrow in (("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp8"), ("bf16", "int8"), ("fp8", "fp4"), ("int8", "int4")):
        if wide in peaks and narrow in peaks:
            assert peaks[wide] <= peaks[narrow], (wide, narrow)
    assert 0.4 < found.peak("bf16") / found.memory.bandwidth_bytes_per_s < 500


# ---- what may be asked


@pytest.mark.parametrize(
    ("name", "dtype", "runs_in"),
    [
        ("a100-80gb", "fp8", "bf16"),
        ("a100-80gb", "int4", "int4"),
        ("h100-sxm", "int4", "bf16"),
        ("h100-sxm", "fp4", "fp8"),
        ("a100-80gb", "fp4", "bf16"),
        ("v100-sxm2-32gb", "bf16", "fp32"),
        ("v100-sxm2-32gb", "int8", "fp16"),
        ("v100-sxm2-32gb", "tf32", "fp32"),
        ("desktop-avx2", "fp16", "fp32"),
        ("desktop-avx2", "int4", "int8"),
        ("tpu-v4", "fp16", "fp32"),
        ("b200", "fp4", "fp4"),
    ],
)
def test_peak_falls_back_to_the_next_wider_type(name: str, dtype: str, runs_in: str) -> None:
    found = machine(name)
    assert found.computes_in(dtype) == runs_in
    assert found.peak(dtype) == found.peak_flop_per_s[runs_in]


def test_fallbacks_cover_all_types_and_end() -> None:
    assert set(FALLBACKS) == set(DTYPES)
    assert not FALLBACKS["fp64"]
    for dtype, others in FALLBACKS.items():
        assert dtype not in others and set(others) <= set(DTYPES)


@pytest.mark.parametrize(("name", "dtype"), [("cortex-m7", "fp64"), ("tpu-v4", "fp64"), ("a100", "float16"), ("a100", "")])
def test_peak_refuses(name: str, dtype: str) -> None:
    with pytest.raises(NarrowsError, match=machine(name).name):
        machine(name).peak(dtype)


def test_links() -> None:
    assert machine("l40s").link is None and machine("l40s").host_link.name == "pcie"  # type: ignore[union-attr]
    assert machine("gb200").host_link.name == "nvlink-c2c"  # type: ignore[union-attr]
    assert machine("cortex-m7").host_link is None
    assert machine("h800").link.bandwidth_bytes_per_s == 200e9  # type: ignore[union-attr]


def test_scaled() -> None:
    base = machine("cortex-m7")
    other = base.scaled(compute=2, bandwidth=4, launch=0.5, capacity=3, storage=5)
    assert other.peak("int8") == 2 * base.peak("int8")
    assert [t.bandwidth_bytes_per_s for t in other.memories] == [4 * t.bandwidth_bytes_per_s for t in base.memories]
    assert [t.capacity_bytes for t in other.memories] == [3 * base.memory.capacity_bytes, base.memories[1].capacity_bytes]
    assert (other.launch_seconds, other.kernel_seconds) == (base.launch_seconds / 2, base.kernel_seconds / 2)
    assert base.storage and other.storage and other.storage.bandwidth_bytes_per_s == 5 * base.storage.bandwidth_bytes_per_s
    assert other.name == base.name and "compute x2" in other.title and "compute x2" in other.sources["peak_flop_per_s.int8"]
    assert other.sources["units"] == base.sources["units"]
    assert base.scaled() is base
    nvlink, pcie = machine("h100-sxm").scaled(link=0.5).links
    assert (nvlink.bandwidth_bytes_per_s, nvlink.latency_seconds, pcie.bandwidth_bytes_per_s) == (225e9, 2e-6, 31.5e9)


@pytest.mark.parametrize("factor", [0, -1, math.nan, math.inf, True, "2", None])
def test_scaled_refuses(factor: object) -> None:
    with pytest.raises(NarrowsError, match="scaled"):
        machine("a100").scaled(compute=factor)  # type: ignore[arg-type]
    with pytest.raises(NarrowsError):
        machine("a100").scaled(bandwidth=1e300).scaled(bandwidth=1e300)


def test_a_machine_does_not_change_and_travels() -> None:
    found = machine("a100")
    assert {found: 1}[pickle.loads(pickle.dumps(found))] == 1  # noqa: S301  our own bytes
    assert copy.deepcopy(found) == found and hash(copy.deepcopy(found)) == hash(found)
    with pytest.raises(FrozenInstanceError):
        found.units = 1  # type: ignore[misc]
    for change in (lambda p: p.update(bf16=1), lambda p: p.pop("bf16"), lambda p: p.clear(), lambda p: p.__setitem__("bf16", 1)):
        with pytest.raises(TypeError):
            change(found.peak_flop_per_s)


def test_cluster_of_another_size() -> None:
    box = cluster("dgx-a100")
    assert replace(box, nodes=4).devices == 32
    with pytest.raises(NarrowsError, match="scale_out"):
        replace(cluster("tpu-v4-pod"), nodes=2)
    with pytest.raises(NarrowsError, match="nodes"):
        replace(box, nodes=0)
    assert hash(box) == hash(pickle.loads(pickle.dumps(box)))  # noqa: S301  our own bytes


def test_fast_and_light() -> None:
    code = "import sys, narrows.machine as m; m.machine('a100-80gb'); sys.exit(any(x in sys.modules for x in ('numpy', 'torch')))"
    environment = {**os.environ, "PYTHONPATH": str(DATA.parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    times = []
    for name in machines()[:12]:
        module._bundled_machine.cache_clear()
        start = perf_counter()
        machine(name)
        times.append(perf_counter() - start)
    assert min(times) < 3e-3  # about 0.8 ms; the least of twelve, for a busy computer


# ---- files of one's own


def test_own_file(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    for form in (str(path), path):
        found = machine(form)
        assert (found.name, found.units, found.tile, found.links, found.peak("int4")) == ("mine", 4, (16, 16), (), 4e12)
        assert found.efficiency == {"matmul": {"median": 0.7, "low": 0.5, "high": 0.9}}
        assert found.sources["efficiency.matmul.low"] == "its datasheet, 2024"
    pair = cluster(written(tmp_path, CLUSTER, "two.toml"))
    assert pair.machine == machine(path) and pair.devices == 2


@pytest.mark.parametrize("name", WANTED)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    found = machine(name)
    found.save(tmp_path / "saved.toml")
    assert machine(tmp_path / "saved.toml") == found
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.toml"]


def test_save_everything(tmp_path: Path) -> None:
    awkward = 'a "quoted" back\\slash, µs and 東京'
    found = replace(
        machine(written(tmp_path, GOOD)).scaled(compute=1 / 3, bandwidth=1e-9), title=awkward, provenance="calibrated"
    )
    found = replace(found, links=(Link("pcie", 1e9, 1e-6),), storage=Memory("ssd", 1e12, 7e9), idle_watts=0.1, price_per_hour=2)
    found = replace(found, sources={key: found.sources.get(key, awkward) for key in found.figures()})
    found.save(tmp_path / "all.toml")
    assert machine(tmp_path / "all.toml") == found
    kept = (tmp_path / "all.toml").read_bytes()
    with pytest.raises(NarrowsError, match=r"no source is given for storage\.capacity_bytes"):
        replace(found, sources={k: v for k, v in found.sources.items() if "storage" not in k}).save(tmp_path / "all.toml")
    assert (tmp_path / "all.toml").read_bytes() == kept
    assert "storage.capacity_bytes" not in replace(found, storage=None).sources


def test_save_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine("a100")
    for target in (tmp_path / "no" / "such.toml", tmp_path, "nul\0.toml"):
        with pytest.raises((NarrowsError, ValueError)):
            found.save(target)
    old = written(tmp_path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NarrowsError, match="No space left"):
        found.save(old)
    assert old.read_text() == "old" and os.listdir(tmp_path) == ["mine.toml"]


BAD = {  # what is put in place of what, and what the error must name
    "missing figure": ('units = { value = 4, source = "d" }\n', "", "units: missing"),
    "missing name": ('name = "mine"\n', "", "name: missing"),
    "missing peaks": ('[peak_flop_per_s]\nint8 = { value = 4e12, source = "d" }', "", "peak_flop_per_s: missing"),
    "no peak": ('int8 = { value = 4e12, source = "d" }', "", "peak_flop_per_s: it is empty"),
    "missing memory": ("[[memories]]", "[[other]]", "memories: it is empty"),
    "missing tier figure": ('capacity_bytes = { value = 8e9, source = "d" }', "", "memories.dram.capacity_bytes: missing"),
    "missing tier name": ('name = "dram"', "", "memories.name: missing"),
    "tier name": ('name = "dram"', 'name = "D RAM"', "memories.D RAM.name: 'D RAM'"),
    "tier name type": ('name = "dram"', "name = 7", "memories.name: 7"),
    "negative": ("value = 4e12", "value = -4e12", "peak_flop_per_s.int8"),
    "zero": ("value = 34e9", "value = 0", "memories.dram.bandwidth_bytes_per_s"),
    "nan": ("value = 34e9", "value = nan", "memories.dram.bandwidth_bytes_per_s"),
    "infinite": ("value = 8e9", "value = inf", "memories.dram.capacity_bytes"),
    "beyond float": ("value = 8e9", "value = 0x" + "f" * 5000, "memories.dram.capacity_bytes"),
    "beyond int": ("value = 8e9", "value = " + "9" * 5000, "not valid TOML"),
    "bool": ("value = 4e12", "value = true", "peak_flop_per_s.int8: True is not a number"),
    "text": ("value = 4e12", 'value = "4 TOPS"', "peak_flop_per_s.int8"),
    "date": ("value = 4e12", "value = 2024-01-01", "peak_flop_per_s.int8"),
    "bare number": ('{ value = 5, source = "d" }', "5", "power_watts: 5 is not a value with its source"),
    "no source": ('{ value = 5, source = "d" }', "{ value = 5 }", "power_watts"),
    "unknown source": ('{ value = 5, source = "d" }', '{ value = 5, source = "e" }', "power_watts: the source 'e' is unknown"),
    "source type": ('{ value = 5, source = "d" }', '{ value = 5, source = ["d"] }', "power_watts"),
    "no sources": ('[sources]\nd = "its datasheet, 2024"', "", "sources"),
    "empty source": ('d = "its datasheet, 2024"', 'd = " "', "sources.d"),
    "source of two lines": ('d = "its datasheet, 2024"', 'd = "a\\nb"', "sources.d"),
    "fraction of units": ("value = 4, ", "value = 4.5, ", "units: 4.5 is not a whole number"),
    "tile": ("[16, 16]", "[16]", "tile"),
    "tile of zero": ("[16, 16]", "[16, 0]", "tile"),
    "unknown dtype": ("int8 =", "int7 =", "peak_flop_per_s: 'int7'"),
    "kind": ('"npu"', '"toaster"', "kind: 'toaster'"),
    "kind type": ('"npu"', "[[1]]", "kind"),
    "provenance": ('"datasheet"', '"hearsay"', "provenance"),
    "unknown key": ('kind = "npu"', 'kind = "npu"\nflops = 3', "flops: unknown key"),
    "unknown tier key": ('name = "dram"', 'name = "dram"\nspeed = 3', "memories.dram.speed: unknown key"),
    "tier not a table": ('kind = "npu"', 'kind = "npu"\nlinks = [3]', "links: 3 is not a table"),
    "tier name length": ('name = "dram"', f'name = "{"d" * 9000} "', "memories.name"),
    "tiers not a list": ("[[memories]]", "[memories]", "memories"),
    "peaks not a table": ("[peak_flop_per_s]", "peak_flop_per_s = 3\n[other]", "peak_flop_per_s"),
    "quantiles missing": ('low = { value = 0.5, source = "d" }', "", "efficiency.matmul"),
    "quantiles not ordered": ("value = 0.5", "value = 0.8", "efficiency.matmul"),
    "aliases": ('kind = "npu"', 'kind = "npu"\naliases = "m"', "aliases"),
    "broken": ("[sources]", "[sources", "not valid TOML"),
    "twice": ('kind = "npu"', 'kind = "npu"\nkind = "npu"', "not valid TOML"),
    "deep": ('kind = "npu"', "kind = " + "[" * 20_000, "not valid TOML"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(case: str, tmp_path: Path) -> None:
    old, new, named = BAD[case]
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(NarrowsError) as caught:
        machine(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: {named}"), text
    assert caught.value.remedy and len(text) < 500


def test_two_tiers_of_one_name(tmp_path: Path) -> None:
    start, end = GOOD.index("[[memories]]"), GOOD.index("[efficiency")
    with pytest.raises(NarrowsError, match="memories: two entries have the same name"):
        machine(written(tmp_path, GOOD[:end] + GOOD[start:end] + GOOD[end:]))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('machine = "mine.toml"', 'machine = "nothing"', "there is no machine 'nothing'"),
        ('machine = "mine.toml"', 'machine = "gone.toml"', "gone.toml: cannot be read"),
        ('machine = "mine.toml"', "machine = 3", "machine: 3"),
        ('"ring"', '"knot"', "topology: 'knot'"),
        ("value = 2,", "value = 2.5,", "nodes: 2.5"),
        ("value = 2,", "value = false,", "nodes: False"),
        ("[scale_up]", "[scale_sideways]", "scale_up: missing"),
        ("[scale_out]", "[scale_outside]", "scale_out: missing between several nodes"),
        ("value = 3e-5", "value = -1", "scale_up.latency_seconds"),
    ],
)
def test_bad_cluster(old: str, new: str, named: str, tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    path = written(tmp_path, CLUSTER.replace(old, new, 1), "two.toml")
    with pytest.raises(NarrowsError, match=re.escape(named)) as caught:
        cluster(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    written(tmp_path, b"\x00\xff\xfe" * 99, "binary.toml")
    written(tmp_path, b"#" * 1_000_001, "huge.toml")
    for name in ("pipe.toml", "binary.toml", "huge.toml", "missing.toml", "nul\0.toml", "x" * 5000 + ".toml", "."):
        with pytest.raises(NarrowsError):
            machine(str(tmp_path) + "/" + name)
    with pytest.raises(NarrowsError):
        machine(tmp_path)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("a100-80g", "a100-80gb"),
        ("rtx", "rtx-3090 or rtx-4090 or rtx-pro-6000"),
        ("mi250", "mi250x"),
        ("a" * 100_000, "Known"),
        ("", "Known"),
        ("a\0b", "toml"),
        (7, "machines"),
        (None, "machines"),
    ],
)
def test_unknown_name(word: object, remedy: str) -> None:
    with pytest.raises(NarrowsError, match=remedy):
        machine(word)  # type: ignore[arg-type]


def test_an_alias_in_two_files_is_an_error_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "machines").mkdir()
    for name in ("one", "other"):
        written(tmp_path / "machines", GOOD.replace('kind = "npu"', 'kind = "npu"\naliases = ["both"]'), f"{name}.toml")
    monkeypatch.setattr("narrows.figures._DATA", str(tmp_path))
    with pytest.raises(NarrowsError, match="one or other"):
        machine("both")


def test_names_are_forgiving() -> None:
    assert machine("A100 80GB") is machine("a100_80gb") is machine("a100-80gb")
    assert machine("h100").name == "h100-sxm" and machine("a100").name == "a100-80gb"


# ---- anything at all in place of a value

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6
)
FIGURE = ANYTHING | st.fixed_dictionaries({"value": ANYTHING, "source": st.sampled_from(["d", "e", "", 3])})


def tables(values: dict[str, object], place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        found.append((*place, key))
        found += tables(inner, (*place, key)) if isinstance(inner, dict) else []
    return found


@given(st.sampled_from(tables(tomllib.loads(GOOD))), FIGURE)
def test_any_value_gives_a_machine_or_a_narrows_error(place: tuple[str, ...], value: object) -> None:
    whole = tomllib.loads(GOOD)
    inner = whole
    for key in place[:-1]:
        inner = inner[key][0] if isinstance(inner[key], list) else inner[key]
    inner[place[-1]] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("narrows.figures._parse", lambda path: whole)
        try:
            found = machine("any.toml")
        except NarrowsError as error:
            found, refusal = None, str(error)
    assert set(found.figures()) == set(found.sources) if found else refusal.startswith("any.toml: ")


@given(st.text() | st.text(alphabet='abc=[]{}".\n#10e-', max_size=60))
def test_any_text_gives_a_narrows_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(NarrowsError):
        machine(path)


@given(st.text())
def test_any_name_gives_a_narrows_error_or_a_machine(name: str) -> None:
    for find, kind in ((machine, Machine), (cluster, Cluster)):
        try:
            found = find(name)
        except NarrowsError as error:
            found, remedy = None, error.remedy
        assert isinstance(found, kind) or (found is None and remedy)
