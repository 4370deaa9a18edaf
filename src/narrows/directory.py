"""Model directories: checked before anything reads them, and written so that a half one never exists.

**Checked.** `load` reads every header itself (bounded by the file, never by what the header claims) and refuses code,
adapters and links that leave the directory, before transformers sees it. Weights in a pickle are read as data (see
`torch_archive`), never run. Nothing is fetched or asked.

**Written.** `save` fills a directory beside its place and renames it (see `staging`), with a manifest inside: the plan,
and the SHA-256 of every file.

**Models that transformers cannot build.** `narrows.json` carries the plan, `config.json` the original architecture. A
technique whose `apply` changes the module tree also defines

    def restructure(self, model: torch.nn.Module) -> torch.nn.Module

which does to a blank model (parameters on `meta`, no data) what `apply` does to a full one, in place: same module
names, same shapes and dtypes. Whatever it cannot derive from its own fields and the shapes (which sublayers calibration
chose, a rank per layer) `apply` leaves in `model.config` as plain JSON. `load` builds the architecture, lets each step of
the plan restructure it in order, and fills it from the files; a tensor too few or too many is an error. `save` tries
this on a blank model before it writes anything, so that nothing is written that cannot be read back.

**Packed weights.** Layers keep what this machine's kernels like; files hold what other programs read, too. For a model with
coded layers `narrows.formats` translates between the two, all tensors at a time.

**Other programs.** transformers loads a directory whose tensors are those of the architecture, plain or in such a layout.
Of any other it would fill what it misses with random numbers and go on, so config.json is written such that it refuses.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from narrows import formats, samples
from narrows.claims import versions
from narrows.errors import NarrowsError, closest
from narrows.headers import DAMAGED, TensorInfo, damaged, read_header, read_json
from narrows.plan import Plan
from narrows.staging import Explained, replacing
from narrows.technique import Stage
from narrows.weight_files import headers, inside, mapped

if TYPE_CHECKING:
    import torch

__all__ = ["Manifest", "TensorInfo", "headers", "load", "read_by_others", "read_header", "read_plan", "save", "verify_manifest"]

MANIFEST = "narrows.json"
FORMAT = "narrows-manifest-1"
ALONE = "narrows"  # in the `quantization_config` of a directory that transformers must not load: its plan
SAMPLES = {"smollm2-135m": samples.smollm2_file, "all-minilm-l6-v2": samples.minilm_folder}
DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")
_LAYER_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
)  # fmt: skip
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


class Stored(NamedTuple):
    """A file as it was written."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What `save` wrote: the plan as text, what it was made from, the versions at work, and every file by name."""

    plan: str
    source: str
    versions: str
    files: Mapping[str, Stored]

    def to_dict(self) -> dict[str, Any]:
        """As plain values: format, plan, source, versions, files {name: {sha256, bytes}}."""
        files = {name: self.files[name]._asdict() for name in sorted(self.files)}
        return {"format": FORMAT, "plan": self.plan, "source": self.source, "versions": self.versions, "files": files}

    def to_json(self) -> str:
        """As text, with a digest of itself."""
        body = self.to_dict()
        return json.dumps({**body, "sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1)

    @classmethod
    def read(cls, directory: str | Path) -> "Manifest | None":
        """Of a directory, None where it has none; raises NarrowsError for one that was changed since."""
        path = Path(directory) / MANIFEST
        if not path.exists():
            return None
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise NarrowsError(f"its format is {found.get('format')!r}.", where=str(path), remedy=f"This version reads {FORMAT}.")
        try:
            files = {name: Stored(**entry) for name, entry in found["files"].items()}
            manifest = cls(found["plan"], found["source"], found["versions"], files)
            texts = all(isinstance(t, str) for t in (manifest.plan, manifest.source, manifest.versions))
            intact = texts and manifest.to_json().encode() == path.read_bytes()
        except (KeyError, TypeError, AttributeError) as error:
            raise damaged(path, "", f"is not a manifest ({error!r})") from error
        if not intact:
            raise damaged(path, "", "does not have the digest that it states")
        return manifest


def verify_manifest(directory: str | Path) -> list[str]:
    """What is wrong with a directory that `save` wrote: files missing, of another size, or with other bytes. [] if nothing."""
    directory = Path(directory)
    try:
        manifest = Manifest.read(directory)
        if manifest is None:
            return [f"{MANIFEST} is missing"]
        paths = {name: inside(directory, name, directory / MANIFEST) for name in manifest.files}
    except NarrowsError as error:
        return [str(error)]
    problems = []
    for name, stored in manifest.files.items():
        if not paths[name].is_file():
            problems.append(f"{name} is missing")
        elif paths[name].stat().st_size != stored.bytes:
            problems.append(f"{name} has {paths[name].stat().st_size} bytes, not {stored.bytes}")
        elif _digest(paths[name]) != stored.sha256:
            problems.append(f"{name} does not have the SHA-256 that was written")
    return problems


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_plan(directory: str | Path) -> Plan | None:
    """The plan that made a directory, or None where narrows did not write it."""
    manifest = Manifest.read(directory)
    return None if manifest is None else Plan.parse(manifest.plan)


@contextmanager
def offline() -> Iterator[None]:
    """No request leaves this machine while transformers works; the caller's own setting is put back after."""
    from huggingface_hub import constants

    name = "HF_HUB_OFFLINE"
    before, constant = os.environ.get(name), constants.HF_HUB_OFFLINE
    os.environ[name], constants.HF_HUB_OFFLINE = "1", True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = constant
        os.environ.pop(name) if before is None else os.environ.update({name: before})


# ---- load


def load(source: str | Path, dtype: str = "auto") -> tuple["torch.nn.Module", Any]:
    """(model, tokenizer or None) of a model directory, a .gguf file (unpacked), or a sample's name; in eval mode.

    dtype: a torch dtype's name for the weights that are stored as plain floats, or "auto" to leave them as they are.
    Raises NarrowsError for anything that is damaged, needs foreign code, or does not fit its architecture.
    """
    if dtype not in DTYPES:
        raise NarrowsError(f"{dtype!r} is not a dtype.", where="dtype", remedy=closest(dtype, list(DTYPES)))
    path = SAMPLES[str(source)]() if str(source) in SAMPLES else Path(source)
    if not path.is_dir() and path.suffix != ".gguf":
        remedy = f"Give one, or a sample: {', '.join(SAMPLES)}."
        raise NarrowsError("is neither a model directory nor a .gguf file.", where=str(path), remedy=remedy)
    check_installed()
    with unreadable(path), offline():
        if path.is_dir():
            return _load_directory(path, dtype, *check_directory(path)), load_tokenizer(path, "")
        read_header(path)
        _refuse_foreign(path.parent)
        return _load_gguf(path, dtype), load_tokenizer(path.parent, path.name)


def unreadable(path: Path) -> Explained:
    """A context in which whatever transformers raises means that a directory cannot be read."""
    expected = (TypeError, KeyError, IndexError, AttributeError, RuntimeError, ImportError, ArithmeticError, MemoryError)
    return Explained(path, "Check that its config and its weights belong together.", *expected)


def check_installed() -> None:
    """Raise where a package that reads and writes directories is missing."""
    for package in ("torch", "transformers", "safetensors"):
        if find_spec(package) is None:
            raise NarrowsError(f"{package} is not installed.", where="model directories", remedy="pip install 'narrows[hf]'")


def _refuse_foreign(directory: Path) -> None:
    """Raise where a directory's JSON asks for code or files that come neither with it nor with transformers."""

    def refuse(found: Any, where: str) -> None:
        for key, value in found.items() if isinstance(found, dict) else ():
            if key in ("auto_map", "transformers_weights") or (key.endswith("attn_implementation") and "/" in str(value)):
                remedy = "Use a model whose architecture is part of transformers."
                raise NarrowsError("asks for code or files from elsewhere.", where=f"{where}: {key}", remedy=remedy)
            refuse(value, f"{where}: {key}")

    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / name).exists():
            refuse(read_json(inside(directory, name, directory)), str(directory / name))
    if (directory / "adapter_config.json").exists():
        raise NarrowsError("is an adapter.", where=str(directory), remedy="Merge it into its model first.")


def check_directory(directory: Path) -> tuple[dict[str, TensorInfo], Plan | None]:
    """Everything that can be said of a directory before any library reads it."""
    for path in directory.iterdir():
        inside(directory, path.name, directory)
    config = directory / "config.json"
    if not config.exists():
        raise NarrowsError("has no config.json.", where=str(directory), remedy="Give one that transformers wrote.")
    _refuse_foreign(directory)
    tensors = headers(directory)
    for key, value in read_json(config).items():
        if key in _LAYER_COUNTS and not (isinstance(value, int) and 0 <= value <= len(tensors)):
            problem = f"is {value!r}, with {len(tensors)} tensors in the weights."
            raise NarrowsError(problem, where=f"{config}: {key}", remedy="Correct it.")
    return tensors, read_plan(directory)


def _load_gguf(path: Path, dtype: str) -> "torch.nn.Module":
    import torch
    import transformers

    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype),
        local_files_only=True, trust_remote_code=False, **unpack)  # fmt: skip
    _forget_gguf(model)
    return model  # type: ignore[no-any-return]


def _forget_gguf(model: Any) -> None:
    """Take the gguf reader off a model that it has unpacked: it would refuse to save weights that are plain by now."""
    unpacked = all(p.is_floating_point() for p in model.parameters())
    if unpacked and type(getattr(model, "hf_quantizer", None)).__name__ == "GgufHfQuantizer":
        del model.hf_quantizer
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def load_tokenizer(directory: Path, gguf: str) -> Any:
    """The tokenizer of a directory, or of the gguf file of that name in it; None where a directory has none."""
    from transformers import AutoTokenizer

    if not gguf and not any((directory / name).exists() for name in _TOKENIZERS):
        return None
    options = {"gguf_file": gguf} if gguf else {}
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)


def architecture(directory: Path) -> Any:
    """The transformers class that config.json names."""
    import transformers

    file = directory / "config.json"
    config = read_json(file)
    names, family = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0].isidentifier():
        remedy = "Name the class of the model, like LlamaForCausalLM."
        raise NarrowsError(f"{names!r} does not name one class.", where=f"{file}: architectures", remedy=remedy)
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        problem = f"transformers {transformers.__version__} has no {names[0]}."
        raise NarrowsError(problem, where=f"{file}: architectures", remedy="Update transformers.")
    kind: Any = found
    expected = getattr(kind.config_class, "model_type", None)
    if family != expected:
        problem = f"is {family!r}, and a {names[0]} is a {expected!r}."
        raise NarrowsError(problem, where=f"{file}: model_type", remedy="Correct the one that is wrong.")
    return kind


def _changed(kind: Any, plan: Plan | None, where: Path | str, stored_bytes: int = 2**62) -> Any:
    """The class whose instances are born with the structure that the plan gives them."""

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, config, *args, **options)
        for step in plan or ():
            if hasattr(step, "restructure") and step.restructure(self) is not self:
                problem, remedy = "restructure gave another model.", "It must change the one it is given."
                raise NarrowsError(problem, where=step.card.slug, remedy=remedy)
        # still on meta: a config that claims more than the files hold must not get memory for it
        count = sum(p.numel() for p in self.parameters())
        if count > stored_bytes * 8:
            problem = f"{count} parameters in {stored_bytes} bytes would be less than a bit each."
            raise NarrowsError(problem, where=str(where), remedy="Correct the sizes in config.json.")

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def blank(kind: Any, config: Any) -> "torch.nn.Module":
    """A model without memory, to look at."""
    import torch

    with torch.device("meta"):
        return kind(deepcopy(config))  # type: ignore[no-any-return]


def _is_coded(model: "torch.nn.Module") -> bool:
    """Whether layers of a model have a layout of other programs, which `narrows.formats` writes and reads."""
    return any(formats.layout_of(module) for module in model.modules())


def is_standard(model: Any) -> bool:
    """Whether transformers finds every tensor of the model's architecture in its files, plain or in a layout it reads."""
    coded = {name for name, module in model.named_modules() if formats.layout_of(module)}
    plain: Any = blank(type(model), model.config)
    tied = {name for pair in getattr(plain, "all_tied_weights_keys", {}).items() for name in pair}  # one of them suffices
    theirs = {name: t.shape for name, t in plain.state_dict().items()}
    ours = {name: t.shape for name, t in model.state_dict().items() if name.rpartition(".")[0] not in coded}
    lacking = theirs.keys() - ours.keys() - tied - {f"{name}.{leaf}" for name in coded for leaf in ("weight", "bias")}
    return not lacking and all(theirs.get(name) == shape for name, shape in ours.items())


def _load_directory(directory: Path, dtype: str, tensors: Mapping[str, TensorInfo], plan: Plan | None) -> "torch.nn.Module":
    import torch

    kind = architecture(directory)
    config = kind.config_class.from_pretrained(directory, local_files_only=True)
    changed = _changed(kind, plan, directory, sum(t.end - t.begin for t in tensors.values()))
    options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "local_files_only": True, "trust_remote_code": False}
    coded = plan is not None and _is_coded(blank(changed, config))
    pickled = any(t.file.suffix == ".bin" for t in tensors.values())
    if coded or pickled or not read_by_others(directory):
        state = {name: mapped(tensor) for name, tensor in tensors.items()}
        if plan is not None and hasattr(config, "quantization_config"):
            del config.quantization_config  # for other programs; here the plan has made the layers already
        state = formats.from_state(state, read_json(directory / "config.json")) if coded else state
        model, found = changed.from_pretrained(None, config=config, state_dict=state, output_loading_info=True, **options)
        if model.can_generate() and (directory / "generation_config.json").exists():
            model.generation_config = type(model.generation_config).from_pretrained(directory, local_files_only=True)
    else:
        model, found = changed.from_pretrained(
            directory, config=config, use_safetensors=True, output_loading_info=True, **options
        )
    model.__class__ = kind
    # transformers drops what older files hold beyond the architecture; of a directory of our own nothing may be left over
    extra = found["unexpected_keys"] if plan is not None else ()
    for problem, names in (("missing", found["missing_keys"]), ("left over", extra)):
        if names:
            raise NarrowsError(f"{len(names)} tensors are {problem}, such as {min(names)}.", where=str(directory), remedy=DAMAGED)
    return model  # type: ignore[no-any-return]


def load_config(directory: str | Path) -> tuple[Any, Any]:
    """(config, tokenizer or None) of a model directory, checked as `load` does, without its weights."""
    path = Path(directory)
    check_installed()
    with unreadable(path), offline():
        check_directory(path)
        return architecture(path).config_class.from_pretrained(path, local_files_only=True), load_tokenizer(path, "")


def require_original(directory: str | Path, plan: Plan) -> None:
    """Raise where the weights of a directory are not those that a plan starts from: changed by another plan, or quantized."""
    made_by = read_plan(directory)
    if made_by is not None and made_by.steps:
        remedy = f"Apply '{made_by} + {plan}' to its original."
        raise NarrowsError(f"the plan {made_by} has changed it already.", where=str(directory), remedy=remedy)
    quantized = read_json(Path(directory) / "config.json").get("quantization_config")
    if quantized and any(step.card.stage in (Stage.FACTOR, Stage.CAST, Stage.QUANTIZE) for step in plan):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise NarrowsError(f"it is quantized already ({method}).", where=str(directory), remedy="Start from its plain weights.")


def read_by_others(directory: str | Path) -> bool:
    """Whether transformers loads a directory; otherwise it refuses to, and `load` alone knows the structure."""
    return ALONE not in (read_json(Path(directory) / "config.json").get("quantization_config") or {})


# ---- save


def save(
    model: "torch.nn.Module", tokenizer: Any, out: str | Path, plan: Plan, source: str = "", *, overwrite: bool = False
) -> Manifest:
    """Write a directory that `load` and transformers read again: all of it, or nothing.

    out: absent or empty, unless `overwrite` (then the model that was there goes when the new one is in place). source:
    what the model was made from, for the record. Raises NarrowsError where out is taken or being written, the disk is full
    or read-only, or the model could not be read back.
    """
    check_installed()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or any(p.is_meta for p in model.parameters()):
        problem = f"{type(model).__name__} is not a transformers model with its weights loaded."
        raise NarrowsError(problem, where=str(out), remedy="Save its state_dict yourself.")
    _forget_gguf(model)
    if not hasattr(model, "hf_quantizer"):  # the layers of a format that transformers itself reads are its own to restore
        _check_returns(model, plan)
    with replacing(out, overwrite, "config.json") as staging, offline():
        model.save_pretrained(staging, state_dict=formats.to_state(model) if _is_coded(model) else None)
        edit_config(staging, described(model, plan))
        return sealed(staging, tokenizer, plan, source)


def described(model: "torch.nn.Module", plan: Plan) -> dict[str, Any]:
    """What config.json must say of a model beyond its architecture: how layers are coded, or that narrows alone reads them."""
    if hasattr(model, "hf_quantizer"):
        return {}
    changes = formats.config_of(model)
    if is_standard(model):
        return changes
    # without a `quant_method` transformers raises; what it misses it would fill with random numbers
    note = {k: v for k, v in changes.get("quantization_config", {}).items() if k != "quant_method"}
    return {"quantization_config": {**note, ALONE: str(plan)}}


def edit_config(directory: Path, changes: Mapping[str, Any]) -> None:
    """Set fields of a directory's config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**read_json(path), **changes}, indent=2) + "\n")


def sealed(staging: Path, tokenizer: Any, plan: Plan, source: str) -> Manifest:
    """Complete a directory that holds weights and config: with the tokenizer, and the manifest of all files."""
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    files = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    stored = {name: Stored(_digest(path), path.stat().st_size) for name, path in files.items()}
    manifest = Manifest(str(plan), source, versions(), stored)
    (staging / MANIFEST).write_text(manifest.to_json())
    return manifest


def _check_returns(model: Any, plan: Plan) -> None:
    """Raise where `load` could not build this model again from its config and the plan."""
    again = blank(_changed(type(model), plan, type(model).__name__), model.config)
    ours, theirs = ({n: tuple(t.shape) for n, t in m.state_dict().items()} for m in (model, again))
    odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if odd:
        problem = f"{odd[0]} is {ours.get(odd[0])}, and would be {theirs.get(odd[0])} in the model that is read back"
        also = f" ({len(odd)} tensors differ)." if len(odd) > 1 else "."
        remedy = "The technique that changed it needs `restructure`."
        raise NarrowsError(problem + also, where=str(plan) or type(model).__name__, remedy=remedy)
