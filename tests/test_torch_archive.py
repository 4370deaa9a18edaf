"""PyTorch's files are read as data: the numbers torch saved, or one error; no instruction of their pickle is ever run."""

import collections
import pickle
import pickletools
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows import samples
from narrows.errors import NarrowsError
from narrows.torch_archive import read_archive
from narrows.weight_files import mapped

torch = pytest.importorskip("torch")
LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])


def state() -> dict[str, Any]:
    """Tensors of several dtypes, turned, cut out of another, empty, scalar, shared, with the versions that modules note."""
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    found = collections.OrderedDict(
        whole=whole, turned=whole.T, cut=whole[1:, 1:3], empty=torch.empty(0, 3), scalar=torch.tensor(3),
        half=whole.bfloat16(), flags=whole > 0, layer=torch.nn.Parameter(torch.randn(3)),
    )  # fmt: skip
    found._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return found


def saved(found: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(found, path, _use_new_zipfile_serialization=zipped)
    return path


@LAYOUTS
def test_every_tensor_is_the_one_that_torch_saved(zipped: bool, tmp_path: Path) -> None:
    wanted = state()
    path = saved(wanted, tmp_path / "x.bin", zipped)
    found = read_archive(path)
    assert list(found) == list(wanted)
    before = path.read_bytes()
    for name, tensor in found.items():
        numbers = mapped(tensor)
        assert numbers.dtype == wanted[name].dtype and torch.equal(numbers, wanted[name])
        numbers.zero_()
    assert path.read_bytes() == before


class Runs:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


@LAYOUTS
def test_what_is_no_state_dict_is_named_and_not_run(zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.randn(4, 4)
    cases = {
        r"names '(__builtin__|builtins) print'": {"a": weight, "b": Runs()},
        "Linear': it|names 'torch.nn.modules.linear Linear'": {"a": torch.nn.Linear(2, 2)},
        "names 'torch.serialization|names 'torch._utils _rebuild_sparse": {"a": weight.to_sparse()},
        "'a' is no tensor": {"a": 3},
        "'b' is no tensor": {"a": weight, "b": {"c": weight}},
        "not a table of tensors": [weight],
        "do not lie within": {"a": weight[:1].expand(10**6, 4)},
    }
    for reason, content in cases.items():
        with pytest.raises(NarrowsError, match=reason) as raised:
            read_archive(saved(content, tmp_path / "x.bin", zipped))
        assert "safetensors" in raised.value.remedy
    assert capsys.readouterr().out == ""


def test_other_protocols_kinds_and_compressed_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(state(), path, pickle_protocol=4)
    with pytest.raises(NarrowsError, match="instruction FRAME"):
        read_archive(path)
    for content in (b"", b"PK", b"\x80\x04.", pickle.dumps(1), bytes(100)):
        path.write_bytes(content)
        with pytest.raises(NarrowsError, match=r"x\.bin: is not a state dict"):
            read_archive(path)
    with zipfile.ZipFile(saved(state(), path)) as good, zipfile.ZipFile(tmp_path / "y.bin", "w", zipfile.ZIP_DEFLATED) as other:
        for name in good.namelist():
            other.writestr(name, good.read(name))
    with pytest.raises(NarrowsError, match="compressed"):
        read_archive(tmp_path / "y.bin")


@LAYOUTS
def test_claims_of_size_get_no_memory(zipped: bool, tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(40_000)}, tmp_path / "x.bin", zipped)
    content = path.read_bytes()
    claimed = content.replace((40_000).to_bytes(2, "little"), (65_535).to_bytes(2, "little"))
    assert claimed != content
    path.write_bytes(claimed)
    tracemalloc.start()
    with pytest.raises(NarrowsError, match="storage"):
        read_archive(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@LAYOUTS
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_gives_tensors_or_one_error(zipped: bool, tmp_path: Path, data: st.DataObject) -> None:
    path = saved(state(), tmp_path / "x.bin", zipped)
    content = bytearray(path.read_bytes())
    codes = st.sampled_from([ord(instruction.code) for instruction in pickletools.opcodes])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "add", "end"]))
        if how == "set":
            content[place] = data.draw(codes | st.integers(0, 255))
        elif how == "add":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[place : place + data.draw(st.integers(1, 9)) if how == "cut" else len(content)]
        if not content:
            break
    path.write_bytes(content)
    try:
        found = read_archive(path)
    except NarrowsError:
        return
    assert all(mapped(tensor).shape == tensor.shape for tensor in found.values())


def test_published_files_hold_what_their_models_need() -> None:
    model, tokenizer = samples.antiberty()
    heavy, light = samples.antibodies(tokenizer)
    with torch.no_grad():
        right = [(model(**batch).logits.argmax(-1) == batch["labels"]).sum().item() for batch in (heavy, light)]
    assert [int((batch["labels"] != -100).sum()) for batch in (heavy, light)] == [122, 112]
    assert right[0] > 100 and right[1] > 100  # of residues that were hidden: an untrained model guesses one in twenty
    images = torch.nn.functional.interpolate(samples.digits()[0][:8], size=224, mode="bilinear").repeat(1, 3, 1, 1) * 2 - 1
    with torch.no_grad():
        assert samples.efficientnet()(images).softmax(-1).max() > 0.1  # 1000 classes; random weights leave 0.001
