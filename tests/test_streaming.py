"""Plans applied block by block: the bits of applying them whole, in memory that does not grow with the model."""

import ctypes
import hashlib
import json
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from narrows.directory import headers, load, read_plan, save, verify_manifest
from narrows.errors import NarrowsError
from narrows.free import FREE
from narrows.own import OWN
from narrows.plan import Plan
from narrows.streaming import stream
from narrows.technique import Rewrites, techniques

torch.set_num_threads(1)
REWRITES = {slug: t for slug, t in {**techniques(), **FREE, **OWN}.items() if issubclass(t, Rewrites)}
BLOCKWISE = {slug: t for slug, t in REWRITES.items() if t.card.blockwise}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96, "num_attention_heads": 4}
DATA = [{"input_ids": torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(i))} for i in range(2)]
# Of several steps; and options that fit the small model where the defaults do not.
PLANS = {
    "awq": "awq:group=64", "ptqtp": "ptqtp:group=32", "shiftaddllm": "shiftaddllm:group=16",
    "svdquant-nunchaku": "svdquant-nunchaku:rank=4,group=32", "bf16": "bf16 + awq:group=32", "greenformer": "greenformer + int8",
}  # fmt: skip


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})).eval()


def tensors(folder: Path) -> dict[str, Any]:
    files = {t.file for t in headers(folder).values()}
    return {name: t.view(torch.uint8) for file in files for name, t in load_file(file).items()}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("slug", BLOCKWISE)
def test_the_result_is_that_of_the_whole_model_bit_for_bit(slug: str, tied: bool, tmp_path: Path) -> None:
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path / "source", max_shard_size="60KB")
    before, plan = digest(tmp_path / "source"), Plan.parse(PLANS.get(slug, slug))
    stream(tmp_path / "source", tmp_path / "streamed", plan, DATA, shard_bytes=30_000)
    save(plan.apply(load(tmp_path / "source")[0], DATA), None, tmp_path / "whole", plan)
    ours, wanted = tensors(tmp_path / "streamed"), tensors(tmp_path / "whole")
    assert ours.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in ours.items())
    assert json.loads((tmp_path / "streamed/config.json").read_text()) == json.loads((tmp_path / "whole/config.json").read_text())
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) > 1
    assert verify_manifest(tmp_path / "streamed") == [] and read_plan(tmp_path / "streamed") == plan
    assert digest(tmp_path / "source") == before
    with torch.no_grad():
        again, whole = (load(tmp_path / name)[0](**DATA[0]).logits for name in ("streamed", "whole"))
    assert torch.equal(again, whole)


def test_other_families_are_streamed_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
    model = hf.BertForMaskedLM(hf.BertConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "source")
    plan = Plan.parse("int8")
    stream(tmp_path / "source", tmp_path / "streamed", plan)
    save(plan.apply(load(tmp_path / "source")[0]), None, tmp_path / "whole", plan)
    ours, wanted = tensors(tmp_path / "streamed"), tensors(tmp_path / "whole")
    assert ours.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in ours.items())


def peak_bytes(work: Any) -> int:
    """How far the process's memory rises above where it starts."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    work()
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 - held


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("text", ["int8", "awq:group=128"])
def test_memory_does_not_grow_with_the_model(text: str, tmp_path: Path) -> None:
    ctypes.CDLL(None).mallopt(-3, 65536)  # what is freed goes back at once: a heap in pieces is not counted
    peaks = {}
    for layers in (2, 4, 16):  # the first also pays for what is imported
        source = tmp_path / str(layers)
        model = tiny(hidden_size=256, intermediate_size=1024, num_hidden_layers=layers)
        size = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(source, max_shard_size="10MB")
        del model
        work = partial(stream, source, tmp_path / f"{layers}-out", Plan.parse(text), DATA, shard_bytes=2**22)
        peaks[layers] = peak_bytes(work)
    assert peaks[16] < size / 3 and peaks[16] - peaks[4] < size / 8


@pytest.mark.parametrize(
    "text, where",
    [("llm-drop:attention=1", "llm-drop must see the whole model"), ("int8 + awq:group=64", "both change linear weights"),
     ("awq:group=128", "no multiple of group=128"), ("awq:group=64", "needs calibration data")],
)  # fmt: skip
def test_plans_that_do_not_stream_are_refused_and_leave_nothing(text: str, where: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "source")
    with pytest.raises(NarrowsError, match=where):
        stream(tmp_path / "source", tmp_path / "out", Plan.parse(text))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "source")
    before, calls = digest(tmp_path / "source"), iter((None, None, KeyboardInterrupt))

    def tell(what: str, done: int = 0, of: int = 0) -> None:
        if stop := next(calls):
            raise stop

    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "source", tmp_path / "out", Plan.parse("int8"), shard_bytes=1, tell=tell)
    assert digest(tmp_path / "source") == before and [p.name for p in tmp_path.iterdir()] == ["source"]


def test_models_that_do_not_stream_are_refused(tmp_path: Path) -> None:
    hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)).save_pretrained(tmp_path / "moe")
    with pytest.raises(NarrowsError, match="transformers makes some tensors"):
        stream(tmp_path / "moe", tmp_path / "out", Plan.parse("int8"))
    tiny().save_pretrained(tmp_path / "plain")
    stream(tmp_path / "plain", tmp_path / "packed", Plan.parse("int8"))
    with pytest.raises(NarrowsError, match=r"the plan int8 has changed it already.*'int8 \+ bf16'"):
        stream(tmp_path / "packed", tmp_path / "out", Plan.parse("bf16"))
    model = tiny()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(NarrowsError, match=r"layers\.2\.mlp\.up_proj.*NaN or infinite"):
        stream(tmp_path / "broken", tmp_path / "out", Plan.parse("int8"))
    tiny().save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 65}))
    with pytest.raises(NarrowsError, match=r"size mismatch|belong together"):
        stream(tmp_path / "other", tmp_path / "out", Plan.parse("int8"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
