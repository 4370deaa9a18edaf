"""Model directories: what is refused, what a killed or failing writer leaves, and that what was saved comes back."""

import errno
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from narrows.capture import capture
from narrows.directory import Manifest, headers, load, read_by_others, read_header, read_plan, save, verify_manifest
from narrows.errors import NarrowsError
from narrows.free import FREE
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.plan import Plan
from narrows.step import Step
from narrows.streaming import stream
from narrows.technique import Card, Example, Rewrites, Stage, Verdict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
IDS = torch.arange(1, 9)[None]


def tiny(vocabulary: int = 128) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False)  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def digest(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- save and load


def test_what_was_saved_comes_back_and_the_original_is_as_it_was(original: Path, tmp_path: Path) -> None:
    before = digest(original)
    model, tokenizer = load(original)
    assert tokenizer is None
    out = tmp_path / "deep" / "out"
    manifest = save(model, tokenizer, out, Plan(), "tiny")
    again, _ = load(out)
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert type(again) is type(model) is transformers.LlamaForCausalLM
    assert verify_manifest(out) == [] and Manifest.read(out) == manifest and manifest.source == "tiny"
    assert read_plan(out) == Plan() and read_plan(original) is None
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert digest(original) == before


def test_the_dtype_asked_for_is_the_dtype_given(original: Path, tmp_path: Path) -> None:
    model, _ = load(original, "bfloat16")
    save(model, None, tmp_path / "out", Plan.parse("bf16"))
    assert {p.dtype for p in load(tmp_path / "out", "auto")[0].parameters()} == {torch.bfloat16}
    assert read_plan(tmp_path / "out") == Plan.parse("bf16")
    with pytest.raises(NarrowsError, match="bfloat16"):
        load(original, "bfloat")


@pytest.mark.parametrize("plan", ["bf16", "bf16 + int8"])
def test_a_cast_model_answers_after_loading_as_it_did_before(plan: str, tmp_path: Path) -> None:
    """Rotary frequencies are in no file: whoever casts them changes the answers of the model that was measured."""
    changed = Plan.parse(plan).apply(tiny(), [])
    save(changed, None, tmp_path / "out", Plan.parse(plan))
    assert torch.equal(changed(IDS).logits, load(tmp_path / "out")[0](IDS).logits)


def test_shards_and_their_index_are_read(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    found = headers(tmp_path / "shards")
    assert {n: t.shape for n, t in found.items()} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert len({t.file for t in found.values()}) > 2
    again, _ = load(tmp_path / "shards")
    assert torch.equal(model(IDS).logits, again(IDS).logits)


@dataclass(frozen=True)
class Halved(Rewrites):
    """Each q_proj as a product of two matrices, with ranks that "calibration" chose."""

    card: ClassVar[Card] = Card("toy-halved", (), (), exact=False, claims=(), stage=Stage.FACTOR)

    def baseline(self) -> "Halved":
        return self

    def check(self, graph: Graph, machine: Machine | None, step: Step) -> Verdict:
        return True

    def rewrite(self, graph: Graph) -> Graph:
        return graph

    def apply(self, model: Any, data: Sequence[Mapping[str, Any]] = ()) -> Any:
        model.config.toy_ranks = [5 + i for i in range(len(model.model.layers))]
        return self.restructure(model)

    def restructure(self, model: Any) -> Any:
        for layer, rank in zip(model.model.layers, model.config.toy_ranks, strict=True):
            linear = layer.self_attn.q_proj
            parts = torch.nn.Linear(linear.in_features, rank), torch.nn.Linear(rank, linear.out_features, bias=False)
            layer.self_attn.q_proj = torch.nn.Sequential(*parts)
        return model

    @classmethod
    def example(cls) -> Example:
        raise NotImplementedError


def test_a_changed_structure_is_built_again_from_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FREE, "toy-halved", Halved)
    plan = Plan((Halved(),))
    model = plan.apply(tiny())
    save(model, None, tmp_path / "out", plan)
    again, _ = load(tmp_path / "out")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert again.model.layers[1].self_attn.q_proj[0].out_features == 6
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    save(again, None, tmp_path / "once more", plan)
    assert digest(tmp_path / "out")["model.safetensors"] == digest(tmp_path / "once more")["model.safetensors"]


@dataclass(frozen=True)
class Packed(Halved):
    """All linear layers of the MLPs in 4 bits."""

    card: ClassVar[Card] = Card("toy-packed", (), (), exact=False, claims=(), stage=Stage.QUANTIZE)

    def _each(self, model: Any, make: Any) -> Any:
        from narrows.modules.packed_linear import int4

        for name, linear in list(model.named_modules()):
            if ".mlp." in name and isinstance(linear, torch.nn.Linear):
                model.set_submodule(name, make(linear, int4(32)))
        return model

    def apply(self, model: Any, data: Sequence[Mapping[str, Any]] = ()) -> Any:
        from narrows.modules.packed_linear import PackedLinear, quantized

        return self._each(model, lambda linear, form: PackedLinear.of(quantized(linear.weight, form)))

    def restructure(self, model: Any) -> Any:
        from narrows.modules.packed_linear import PackedLinear

        return self._each(model, lambda linear, form: PackedLinear(linear.in_features, linear.out_features, form))


def test_packed_layers_are_stored_in_a_layout_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FREE, "toy-halved", Halved)
    monkeypatch.setitem(FREE, "toy-packed", Packed)
    plan = Plan((Packed(), Halved()))
    model = plan.apply(tiny())
    model.generation_config.max_new_tokens = 7
    save(model, None, tmp_path / "out", plan)
    stored = {n: t.dtype for n, t in headers(tmp_path / "out").items() if "layers.0.mlp.down_proj" in n}
    assert {n.rpartition(".")[2]: t for n, t in stored.items()} == {
        "weight_packed": "I32", "weight_scale": "F32", "weight_zero_point": "I32", "weight_shape": "I64",
    }  # fmt: skip
    assert not read_by_others(tmp_path / "out")  # q_proj is halved
    again, _ = load(tmp_path / "out")
    assert torch.equal(model(IDS).logits, again(IDS).logits)
    assert again.generation_config.max_new_tokens == 7 and not hasattr(again.config, "quantization_config")
    save(again, None, tmp_path / "once more", plan)
    assert digest(tmp_path / "out")["model.safetensors"] == digest(tmp_path / "once more")["model.safetensors"]


def test_a_structure_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    model = Halved().apply(tiny())
    with pytest.raises(NarrowsError, match=r"q_proj.*restructure"):
        save(model, None, tmp_path / "out", Plan())
    assert list(tmp_path.iterdir()) == []


def test_only_a_loaded_transformers_model_is_saved(tmp_path: Path) -> None:
    for model in (torch.nn.Linear(2, 2), tiny().to("meta")):
        with pytest.raises(NarrowsError, match="not a transformers model"):
            save(model, None, tmp_path / "out", Plan())


# ---- what is there already


def test_what_is_there_stays_unless_it_is_to_be_overwritten(copy: Path, tmp_path: Path) -> None:
    before = digest(copy)
    with pytest.raises(NarrowsError, match="there already"):
        save(tiny(), None, copy, Plan())
    assert digest(copy) == before
    save(tiny(), None, copy, Plan(), overwrite=True)
    assert verify_manifest(copy) == [] and [p.name for p in tmp_path.iterdir()] == ["copy"]
    (tmp_path / "empty").mkdir()
    save(tiny(), None, tmp_path / "empty", Plan())
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    for taken in (tmp_path / "papers", tmp_path / "papers" / "thesis.tex"):
        with pytest.raises(NarrowsError, match="not overwritten"):
            save(tiny(), None, taken, Plan(), overwrite=True)
    assert (tmp_path / "papers" / "thesis.tex").exists()


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """The call number `at` of a function of `os` finds the disk full."""
    real, calls = getattr(os, name), iter(range(10**6))

    def call(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name, at", [("fsync", 0), ("fsync", 3), ("rename", 0), ("rename", 1)])
def test_a_failure_leaves_everything_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    before = digest(copy.parent)
    model = tiny()
    with monkeypatch.context() as patch:
        failing(patch, name, at)
        with pytest.raises(NarrowsError, match="No space left"):
            save(model, None, copy, Plan(), overwrite=True)
    assert digest(copy.parent) == before and os.listdir(copy.parent) == [copy.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_and_a_read_only_disk(small_disk: Path) -> None:
    model = tiny(8192)
    with pytest.raises(NarrowsError, match="No space left"):
        save(model, None, small_disk / "out", Plan())
    assert list(small_disk.iterdir()) == []
    save(tiny(), None, small_disk / "out", Plan())
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(NarrowsError, match="Read-only"):
        save(tiny(), None, small_disk / "other", Plan())
    assert load(small_disk / "out")[0] is not None


# ---- killed and competing writers: one process with everything imported forks the writers

WRITERS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch, transformers
from narrows.directory import save, verify_manifest
from narrows.errors import NarrowsError
from narrows.plan import Plan

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
folder = Path(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], local_files_only=True)

def writer(out, before=lambda: None, **options):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        before()
        save(model, None, out, Plan(), **options)
        code = 0
    except NarrowsError as error:
        code = 3
    finally:
        os._exit(code)

def code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def whole(out):
    assert not out.exists() or verify_manifest(out) == [], (os.listdir(out), verify_manifest(out))
    return out.exists()

start = time.perf_counter()
assert code(writer(folder / "first")) == 0
took = time.perf_counter() - start

# at random times
seen = 0
for _ in range(20):
    pid = writer(folder / "random")
    time.sleep(random.uniform(0, took))
    os.kill(pid, signal.SIGKILL)
    code(pid)
    if whole(folder / "random"):
        seen += 1
        assert code(writer(folder / "random")) == 3
        shutil.rmtree(folder / "random")
print("random", seen)

# before the n-th of the calls that change the disk's state, with a model in place
def dies(n):
    def patch():
        left = [n]
        def dying(real):
            def call(*args, **options):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **options)
            return call
        for name in ("rename", "fsync", "unlink", "mkdir", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
    return patch

points = 0
while (ended := code(writer(folder / "points", dies(points), overwrite=True))) == -signal.SIGKILL:
    whole(folder / "points")
    points += 1
assert ended == 0 and whole(folder / "points")
print("points", points)

# two at once
for turn in range(8):
    read, write = os.pipe()
    pids = [writer(folder / f"race{turn}", lambda: os.read(read, 1)) for _ in range(2)]
    os.write(write, b"go")
    assert sorted(map(code, pids)) == [0, 3] and whole(folder / f"race{turn}")
print("left", json.dumps([name for name in os.listdir(folder) if name.startswith(".")]))
"""


def test_killed_at_any_moment_and_two_at_once(original: Path, tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(
        [sys.executable, "-c", WRITERS, tmp_path, original], env=env, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    assert int(said["points"]) >= 10
    assert all(name.startswith(".random.") for name in json.loads(said["left"])), said  # the last one killed had no successor


# ---- the manifest


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    save(tiny(), None, tmp_path / "out", Plan.parse("bf16"), "tiny")
    chance = random.Random(0)
    files = sorted((tmp_path / "out").iterdir())
    for turn in range(50):
        file = files[turn % len(files)]
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        assert len(verify_manifest(tmp_path / "out")) == 1, (file, turn)
        file.write_bytes(whole)
    assert verify_manifest(tmp_path / "out") == []


def test_missing_and_cut_files_are_named(tmp_path: Path, original: Path) -> None:
    save(tiny(), None, tmp_path / "out", Plan())
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "out" / "generation_config.json").unlink()
    assert [p.split()[0] for p in verify_manifest(tmp_path / "out")] == ["generation_config.json", "model.safetensors"]
    assert verify_manifest(original) == ["narrows.json is missing"]


def test_a_hostile_manifest_reads_nothing_outside(tmp_path: Path) -> None:
    save(tiny(), None, tmp_path / "out", Plan())
    good = Manifest.read(tmp_path / "out")
    assert good is not None
    for name in ("../secret", "/etc/passwd", "\ud800"):
        files = {name: next(iter(good.files.values()))}
        (tmp_path / "out" / "narrows.json").write_text(Manifest("", "", "", files).to_json())
        assert "leaves the directory" in verify_manifest(tmp_path / "out")[0]
    for text in ("[]", "{", '{"format": "other"}', '{"format": "narrows-manifest-1", "files": 3}', "[" * 10**5):
        (tmp_path / "out" / "narrows.json").write_text(text)
        assert len(verify_manifest(tmp_path / "out")) == 1
        with pytest.raises(NarrowsError, match=r"narrows\.json"):
            load(tmp_path / "out")


# ---- headers


def packed(header: Any, data: int = 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


GOOD = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
REST = {"dtype": "F16", "shape": [16], "data_offsets": [32, 64]}
BAD = {
    "duplicate": b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}',
    "overlap": {"a": GOOD, "b": REST | {"data_offsets": [31, 63]}},
    "hole": {"a": GOOD, "b": REST | {"shape": [15], "data_offsets": [34, 64]}},
    "left over": {"a": GOOD},
    "past the end": {"a": GOOD, "b": REST | {"shape": [32], "data_offsets": [32, 96]}},
    "wrong bytes": {"a": GOOD | {"shape": [2, 5]}, "b": REST},
    "huge": {"a": {"dtype": "F64", "shape": [2**62, 2**62], "data_offsets": [0, 64]}},
    "negative": {"a": GOOD | {"shape": [-2, -4]}, "b": REST},
    "backwards": {"a": {"dtype": "U8", "shape": [0], "data_offsets": [64, 0]}},
    "bool": {"a": {"dtype": "U8", "shape": [True, 64], "data_offsets": [0, 64]}},
    "float": {"a": {"dtype": "U8", "shape": [64.0], "data_offsets": [0, 64]}},
    "no dtype": {"a": {"shape": [64], "data_offsets": [0, 64]}},
    "odd dtype": {"a": {"dtype": ["U8"], "shape": [64], "data_offsets": [0, 64]}},
    "more": {"a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64], "code": "x"}},
    "list": [1],
    "deep": b"[" * 100_000,
    "nan": b'{"a":NaN}',
    "digits": b'{"a":' + b"9" * 5000 + b"}",
    "notes": {"__metadata__": {"a": 1}, "a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]}},
    "not utf-8": b'{"\xff":1}',
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(packed(BAD[case]))
    with pytest.raises(NarrowsError, match=r"model\.safetensors"):
        read_header(path)


def test_a_header_is_not_believed_before_it_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for claimed in (2**63, 2**64 - 1, 99_999_999, 100_000_001):
        path.write_bytes(struct.pack("<Q", claimed) + b"{}" * 100)
        tracemalloc.start()
        with pytest.raises(NarrowsError, match="does not fit"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", tmp_path, tmp_path / "absent", Path("/dev/zero")):
        with pytest.raises(NarrowsError, match=odd.name):
            read_header(odd)


def mutants(good: bytes, header: int, count: int, chance: random.Random) -> Iterator[bytes]:
    for _ in range(count):
        bad = bytearray(good)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(min(header, len(bad)))
            how = chance.randrange(5)
            if how == 0:
                bad[place] ^= 1 << chance.randrange(8)
            elif how == 1:
                bad[place] = chance.choice(b'0129-{}[]",:\x00\xff')
            elif how == 2:
                del bad[place : place + chance.randrange(1, 9)]
            elif how == 3:
                bad[place:place] = chance.randbytes(chance.randrange(1, 9))
            else:
                del bad[chance.randrange(len(bad)) :]
            if len(bad) < 2:
                break
        yield bytes(bad)


def test_any_header_gives_tensors_or_one_error(original: Path, tmp_path: Path) -> None:
    good = (original / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    assert {n: t.dtype for n, t in read_header(original / "model.safetensors").items()}["lm_head.weight"] == "F32"
    refused = 0
    for bad in mutants(good, 8 + length, 500, random.Random(1)):
        (tmp_path / "x.safetensors").write_bytes(bad)
        start = time.perf_counter()
        try:
            assert isinstance(read_header(tmp_path / "x.safetensors"), dict)
        except NarrowsError:
            refused += 1
        assert time.perf_counter() - start < 2
    assert refused > 400


def test_gguf_headers(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "longer"])
    writer.add_tensor("first.weight", numpy.zeros((3, 5), numpy.float32))
    writer.add_tensor("second.weight", numpy.zeros((4, 34), numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(path)
    assert {n: (t.dtype, t.shape, t.end - t.begin) for n, t in found.items()} == {
        "first.weight": ("F32", (3, 5), 60),
        "second.weight": ("Q8_0", (4, 32), 136),
    }
    good, refused = path.read_bytes(), 0
    for bad in mutants(good, found["first.weight"].begin, 300, random.Random(2)):
        path.write_bytes(bad)
        try:
            read_header(path)
        except NarrowsError:
            refused += 1
    assert refused > 200
    path.write_bytes(good[:-40])
    with pytest.raises(NarrowsError, match=r"x\.gguf"):
        load(path)


# ---- what is refused before transformers is called


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/../../x.safetensors", "link.safetensors", "", "a\0b", "\ud800"]
)
def test_an_index_stays_in_its_directory(name: str, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy.parent / "x.safetensors")
    (copy / "link.safetensors").symlink_to(copy.parent / "x.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(NarrowsError, match="leaves the directory"):
        headers(copy)
    with pytest.raises(NarrowsError, match="leaves the directory"):
        load(copy)


def test_links_of_the_download_cache_are_followed(original: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(original, tmp_path / "blobs")
    for file in original.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load(snapshot)[0] is not None


def archived(folder: Path, parts: int) -> None:
    """Keep a directory's weights as torch saves them instead: in one file, or in shards with an index."""
    state = load(folder)[0].state_dict()
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1:05}-of-{parts:05}.bin" for i in range(parts)] if parts > 1 else ["pytorch_model.bin"]
    held = [dict(list(state.items())[i::parts]) for i in range(parts)]
    for name, tensors in zip(names, held, strict=True):
        torch.save(tensors, folder / name)
    if parts > 1:
        places = {tensor: name for name, tensors in zip(names, held, strict=True) for tensor in tensors}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("parts", [1, 2])
def test_weights_that_torch_saved_are_read_as_data(parts: int, original: Path, copy: Path, tmp_path: Path) -> None:
    archived(copy, parts)
    wanted, found = load(original)[0].state_dict(), load(copy)[0].state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())
    assert capture(copy).ops == capture(original).ops
    stream(copy, tmp_path / "streamed", Plan.parse("int8"))
    model = load(tmp_path / "streamed")[0]
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, Plan.parse("int8").apply(load(original)[0])(IDS).logits)


def test_other_pickles_and_damaged_files_have_one_clear_error(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    archived(copy, 1)
    archive = copy / "pytorch_model.bin"
    good = archive.read_bytes()
    cases = [("pytorch_model.bin", good[:-1000], r"pytorch_model\.bin: is not a state dict .*Get the file again"),
             ("model.pt", good, "has no model.safetensors, and model.pt is not read"),
             ("model.safetensors", whole[:-1000], r"model\.safetensors.*ends at byte .*damaged or was not written"),
             ("model.safetensors", whole[:100], r"model\.safetensors: a header of .* does not fit a file of 100"),
             ("model.gguf", b"GGUG" + bytes(100), r"model\.gguf: its gguf header is not valid .it begins with b'GGUG'"),
    ]  # fmt: skip
    archive.unlink()
    for name, content, reason in cases:
        (copy / name).write_bytes(content)
        with pytest.raises(NarrowsError, match=reason):
            load(copy / name if name.endswith("gguf") else copy)
        (copy / name).unlink()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_is_refused_and_not_run(file: str, copy: Path) -> None:
    canary = copy / "ran"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    found = json.loads((copy / file).read_text()) if (copy / file).exists() else {}
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    (copy / file).write_text(json.dumps({**found, "auto_map": classes}))
    with pytest.raises(NarrowsError, match="auto_map"):
        load(copy)
    assert not canary.exists()


HOSTILE: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10**9},
    "minus": {"num_hidden_layers": -1},
    "width": {"hidden_size": 10**9},
    "vocabulary": {"vocab_size": 10**12},
    "words": {"hidden_size": "wide"},
    "no head divides": {"num_attention_heads": 5},
    "heads": {"num_key_value_heads": 0},
    "family": {"model_type": "bert"},
    "no class": {"architectures": None},
    "odd class": {"architectures": ["os.system"]},
    "function": {"architectures": ["pipeline"]},
    "kernel": {"attn_implementation": "someone/kernel"},
    "file": {"transformers_weights": "../x.safetensors"},
    "other sizes": {"intermediate_size": 65},
    "more layers": {"num_hidden_layers": 3},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_that_does_not_fit_is_refused(case: str, copy: Path) -> None:
    edit(copy / "config.json", **HOSTILE[case])
    start = time.perf_counter()
    with pytest.raises(NarrowsError, match=str(copy)):
        load(copy)
    assert time.perf_counter() - start < 2


def test_other_things_that_are_no_model(copy: Path, tmp_path: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(NarrowsError, match="adapter"):
        load(copy)
    (copy / "adapter_config.json").unlink()
    (copy / "config.json").write_text('{"model_type": "llama", "model_type": "bert"}')
    with pytest.raises(NarrowsError, match="twice"):
        load(copy)
    (copy / "config.json").unlink()
    for source in (copy, tmp_path / "absent", copy / "model.safetensors"):
        with pytest.raises(NarrowsError, match=source.name):
            load(source)


def test_headers_are_read_without_torch(original: Path) -> None:
    code = "import sys; from narrows.directory import headers; print(len(headers(sys.argv[1])), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, original], capture_output=True, text=True, check=True)
    assert run.stdout == "21 False\n"
