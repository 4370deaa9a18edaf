"""The `quantization_config` of a checkpoint: which layers are stored in which format, per dialect."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narrows.capture.fields import Fields
from narrows.capture.tape import Format, Formats
from narrows.errors import NarrowsError, closest
from narrows.graph import BF16, FP8, FP16, FP32, DType

_NAMES = {"float32": FP32, "float": FP32, "float16": FP16, "half": FP16, "bfloat16": BF16}
# escapes, plain characters, groups of alternatives that are not repeated, classes, and single repeats
_SAFE = re.compile(r"(?:\\[.\-_dw]|[\w.\-^$|]|\((?:\?:)?[\w.\-|\\]*\)(?![*+?{])|\[[\w\-^]*\]|[*+?](?![*+?{]))*")
_MOST_PATTERNS = 64
_MOST_MATCHES = 100_000  # of patterns with the names of single layers


def activations(f: Fields) -> DType:
    """The dtype that the config names for weights and activations (bf16 where it names none)."""
    name = f.word(
        "dtype", "torch_dtype", default=f.within("text_config", default={}).word("dtype", "torch_dtype", default="bfloat16")
    )
    plain = name.removeprefix("torch.")
    if plain not in _NAMES:
        raise f.wrong("torch_dtype", f"{name!r} is not a dtype of weights.", f"Use one of {', '.join(sorted(_NAMES))}.")
    return _NAMES[plain]


def quantization(f: Fields) -> tuple[Formats, DType | None]:
    """Weight formats by module and kind, and the dtype of the cache, from the `quantization_config` (or none)."""
    outer = f if f.has("quantization_config", "compression_config") else f.within("text_config", default={})
    found = next((n for n in ("quantization_config", "compression_config") if outer.has(n)), "")
    if not found:
        return (lambda name, kind, layers: {None: len(layers)}), None
    q = outer.within(found)
    method = q.word("quant_method", default="bitsandbytes" if q.has("load_in_4bit", "load_in_8bit") else "")
    if method not in DIALECTS:
        known = list(DIALECTS)
        raise q.wrong(
            "quant_method", f"{method!r} is not known here.", f"{closest(method, known)} All: {', '.join(sorted(known))}."
        )
    scheme = DIALECTS[method](q)
    return _Assignment(q, scheme), scheme.cache


@dataclass(frozen=True)
class _Scheme:
    """What a dialect says: formats in order, each for all modules or for those that `targets` name."""

    groups: tuple[tuple[tuple[str, ...] | None, Format], ...]
    skipped: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("linear", "expert", "latent_attention")
    cache: DType | None = None


def _one(dtype: DType, skipped: tuple[str, ...], compute: str = "") -> _Scheme:
    return _Scheme(((None, (dtype, compute)),), skipped)


class _Assignment:
    """Which module has which format; asks layer by layer only where the config names single layers."""

    def __init__(self, q: Fields, scheme: _Scheme) -> None:
        self._kinds, self._where = scheme.kinds, q.where
        self._skipped = _Names(q, scheme.skipped)
        self._groups = [(None if targets is None else _Names(q, targets), chosen) for targets, chosen in scheme.groups]
        self._names = [self._skipped, *(names for names, _ in self._groups if names)]
        self._left = _MOST_MATCHES

    def __call__(self, name: str, kind: str, layers: Sequence[int]) -> Mapping[Format | None, int]:
        if kind not in self._kinds:
            return {None: len(layers)}
        if "*" not in name or not any(names.numbered for names in self._names):
            return {self._one(name.replace("*", "0")): len(layers)}
        self._left -= len(layers) * sum(names.patterns + 3 for names in self._names)
        if self._left < 0:
            raise NarrowsError(
                "too many patterns for so many layers.", where=self._where, remedy="Name modules without their layer."
            )
        return Counter(self._one(name.replace("*", str(layer), 1)) for layer in layers)

    def _one(self, name: str) -> Format | None:
        if self._skipped.match(name):
            return None
        return next((chosen for names, chosen in self._groups if names is None or names.match(name)), None)


class _Names:
    """Module names that a list of names, path pieces and `re:` patterns covers; `numbered` if some name single layers."""

    def __init__(self, f: Fields, names: tuple[str, ...]) -> None:
        self._pieces = {n.strip(".") for n in names if not n.startswith("re:")}
        patterns = list(dict.fromkeys(n.removeprefix("re:") for n in names if n.startswith("re:")))
        if len(patterns) > _MOST_PATTERNS:
            raise NarrowsError(f"{len(patterns)} patterns.", where=f.where, remedy=f"Give at most {_MOST_PATTERNS}.")
        self._patterns = [_compiled(f, p) for p in patterns]
        self.patterns = len(patterns)
        self.numbered = any(_numbered(p) for p in patterns) or any(re.search(r"\b\d+\b", p) for p in self._pieces)

    def match(self, name: str) -> bool:
        return not self._pieces.isdisjoint(_spans(name)) or any(p.match(name) for p in self._patterns)


def _numbered(pattern: str) -> bool:
    """Whether a pattern holds a digit of its own, outside of classes such as [0-9]."""
    return re.search(r"\d", re.sub(r"\[[^]]*\]", "", pattern)) is not None


def _compiled(f: Fields, pattern: str) -> re.Pattern[str]:
    """A pattern of a kind that cannot take long on a module's name, whatever the file holds."""
    repeats = len(re.findall(r"[*+]|(?<!\()\?", pattern))
    try:
        if len(pattern) > 200 or repeats > (2 if _numbered(pattern) else 3) or not _SAFE.fullmatch(pattern):
            raise re.error("not a plain pattern")
        return re.compile(pattern)
    except re.error as error:
        problem = f"the pattern {pattern[:60]!r} is not read ({error.msg})."
        raise NarrowsError(problem, where=f.where, remedy="Use names, `.*`, classes and plain groups only.") from error


def _spans(name: str) -> Iterator[str]:
    """All runs of a dotted path's parts, also with its numbers starred."""
    for path in (name, re.sub(r"\b\d+\b", "*", name)):
        parts = path.split(".")
        yield from (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))


def _group(f: Fields, default: Any = 128) -> int:
    """Inputs that share a scale; -1 means the whole row, which a DType writes as 0."""
    value = f.size("group_size", "q_group_size", default=default, least=-1)
    return max(value, 0)


def _bits(f: Fields, *names: str, default: int | None = None) -> int:
    bits = f.size(*names, default=default) if default else f.size(*names)
    if bits not in (1, 2, 3, 4, 5, 6, 8):
        raise f.wrong(names[0], f"{bits} bits per weight.", "Formats of 1 to 6 and 8 bits are known.")
    return bits


def _skips(f: Fields) -> tuple[str, ...]:
    return f.words("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "ignore")


def _awq(f: Fields) -> _Scheme:
    """Packed int4 with an fp16 scale and a packed zero per group (Lin et al. 2023)."""
    bits = _bits(f, "bits", "w_bit", default=4)
    zero = bits if f.flag("zero_point", default=True) else 0
    return _one(DType(f"int{bits}", bits, _group(f), 16, zero), _skips(f))


def _gptq(f: Fields) -> _Scheme:
    """Packed integers with an fp16 scale and a packed zero per group (Frantar et al. 2022)."""
    bits = _bits(f, "bits")
    return _one(DType(f"int{bits}", bits, _group(f), 16, bits), _skips(f))


def _bitsandbytes(f: Fields) -> _Scheme:
    """Blocks of 64 with an fp32 maximum each (QLoRA), or int8 rows with an fp32 scale (LLM.int8())."""
    skipped = f.words("llm_int8_skip_modules")
    if not f.flag("load_in_4bit", "_load_in_4bit", default=False):
        if not f.flag("load_in_8bit", "_load_in_8bit", default=False):
            raise f.wrong("load_in_4bit", "neither 4 nor 8 bits are asked for.", "Set load_in_4bit or load_in_8bit.")
        return _one(DType("int8", 8, 0, 32), skipped, "int8")
    name = f.word("bnb_4bit_quant_type", default="fp4")
    if f.flag("bnb_4bit_use_double_quant", default=False):  # maxima in 8 bits, with an fp32 one for every 256 of them
        return _one(DType(name, 4 + 32 / (64 * 256), 64, 8), skipped)
    return _one(DType(name, 4, 64, 32), skipped)


def _fp8(f: Fields) -> _Scheme:
    """8-bit floats with an fp32 scale per block of rows x inputs, or per tensor (whose one scale is nothing)."""
    block = f.sizes("weight_block_size", least=1)
    if block and len(block) != 2:
        raise f.wrong("weight_block_size", f"{len(block)} sides.", "Give two, like [128, 128].")
    dtype = DType("fp8", 8 + 32 / (block[0] * block[1])) if block else FP8
    return _one(dtype, _skips(f), "fp8")


def _compressed_tensors(f: Fields) -> _Scheme:
    """Groups of layers, each with its format of weights and, where they are quantized too, of activations."""
    groups = f.within("config_groups")
    found = tuple(_compressed_group(groups.within(name)) for name in groups.values)
    cached = f.within("kv_cache_scheme", default={})
    held = None
    if cached.values:
        held = (
            FP8
            if cached.word("type", default="float") == "float"
            else DType(f"int{_bits(cached, 'num_bits')}", _bits(cached, "num_bits"))
        )
    return _Scheme(found, f.words("ignore"), cache=held)


def _compressed_group(f: Fields) -> tuple[tuple[str, ...] | None, Format]:
    targets = tuple(t for t in f.words("targets") if t != "Linear")
    w = f.within("weights")
    bits, kind = _bits(w, "num_bits"), w.word("type", default="int")
    strategy = w.word("strategy", default="group" if w.has("group_size") else "tensor")
    zero = 0 if w.flag("symmetric", default=True) else bits
    name = f"fp{bits}" if kind == "float" else f"int{bits}"
    dtypes: dict[str, Callable[[], DType]] = {
        "tensor": lambda: DType(name, bits),
        "channel": lambda: DType(name, bits, 0, 16, zero),
        "group": lambda: DType(name, bits, _group(w), 16, zero),
        "tensor_group": lambda: DType(name, bits, _group(w, 16), 8),  # nvfp4: fp8 scales per 16
        "block": lambda: DType(name, bits + 32 / _block(w)),
    }
    if strategy not in dtypes:
        raise w.wrong("strategy", f"{strategy!r} is not known here.", closest(strategy, list(dtypes)))
    inputs = f.within("input_activations", default={})
    compute = ""
    if inputs.values:
        acts = _bits(inputs, "num_bits")
        compute = f"fp{acts}" if inputs.word("type", default="int") == "float" else f"int{acts}"
    return targets or None, (dtypes[strategy](), compute)


def _block(f: Fields) -> int:
    sides = f.sizes("block_structure", least=1)
    if len(sides) != 2:
        raise f.wrong("block_structure", f"{len(sides)} sides.", "Give two, like [128, 128].")
    return sides[0] * sides[1]


def _torchao(f: Fields) -> _Scheme:
    """By the name of the config class, old (`int4_weight_only`) or new (`Int4WeightOnlyConfig`)."""
    kind: Any = f.get("quant_type")
    options = f.within("quant_type_kwargs", default={})
    if isinstance(kind, Mapping):
        inner = f.within("quant_type").within("default")
        kind, options = inner.word("_type"), inner.within("_data", default={})
    if not isinstance(kind, str):
        raise f.wrong("quant_type", f"a {type(kind).__name__} is not a type.", "Give a name such as int4_weight_only.")
    plain = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Config")).lower().replace("__", "_")
    group = _group(options)
    known: dict[str, Format] = {
        "int4_weight_only": (DType("int4", 4, group, 16, 16), ""),
        "int8_weight_only": (DType("int8", 8, 0, 16), ""),
        "int8_dynamic_activation_int8_weight": (DType("int8", 8, 0, 16), "int8"),
        "int8_dynamic_activation_int4_weight": (DType("int4", 4, group, 16), "int8"),
        "float8_weight_only": (DType("fp8", 8, 0, 32), ""),
        "float8_dynamic_activation_float8_weight": (DType("fp8", 8), "fp8"),
        "float8_static_activation_float8_weight": (DType("fp8", 8), "fp8"),
    }
    if plain not in known:
        raise f.wrong("quant_type", f"{kind[:60]!r} is not known here.", closest(plain, list(known)))
    return _one(known[plain][0], _skips(f), known[plain][1])


def _mxfp4(f: Fields) -> _Scheme:
    """4-bit floats with an 8-bit exponent per 32, for the experts alone (OCP microscaling formats)."""
    return _Scheme(((None, (DType("fp4", 4, 32, 8), "")),), _skips(f), ("expert",))


DIALECTS: dict[str, Callable[[Fields], _Scheme]] = {
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "compressed_tensors": _compressed_tensors,
    "torchao": _torchao,
    "mxfp4": _mxfp4,
}
