"""The format of every layer, so that a model keeps a budget: size, speed and perplexity in the user's own units.

What a layer costs in each format is measured on this machine: bytes, seconds with one row and with a prompt's, and what
its rounding does to the model's predictions. A knapsack with a proven bound chooses (`knapsack`); the chosen model is
then measured whole, and estimates that were off are corrected and the choice made again. Where rounding to nearest keeps
no budget, the same is done with roundings that are compensated on the calibration data, which takes longer.
"""

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from narrows.errors import NarrowsError, closest
from narrows.own import FORMATS, Int8, embeddings, linears, rules_text, tied_embedding
from narrows.plan import Plan
from narrows.progress import Tell, silent
from narrows.search.knapsack import solve
from narrows.units import parse_bytes
from narrows.verify import generation_steps, perplexity, resident_bytes, time_pair

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from narrows.verify import Batches

QUANTITIES = ("size", "decode", "prefill", "perplexity")
EXAMPLE = "Write it like 'size<=60%, decode>=1.3x, perplexity<=+3%'."
_BOUND = re.compile(r"(\w+)\s*(<=|>=)\s*(.+)")
PROMPT, CONTEXT = 128, 128  # of the steps that are timed, as `narrows verify` times them
SEEN = 256  # tokens that tell what rounding a layer does
COLD_BYTES, COPIES = 64_000_000, 48  # a kernel is timed over so many bytes of copies, so that no cache keeps its weights
ATTEMPTS = 3
AIM = 0.98  # of a speed limit: timings differ by a percent or two from one run to the next


@dataclass(frozen=True)
class Budget:
    """Limits by quantity, each of a ratio to the original: bytes, seconds of a step and perplexity, at most."""

    most: Mapping[str, float]

    @classmethod
    def parse(cls, text: str, original_bytes: float) -> "Budget":
        """From `size<=60%` (or `size<=120MB`), `decode>=1.3x`, `prefill>=2x` and `perplexity<=+3%`, joined by commas."""
        most: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            match = _BOUND.fullmatch(part)
            name = match[1] if match else ""
            if match is None or name not in QUANTITIES:
                remedy = closest(name, list(QUANTITIES)) if match else EXAMPLE
                raise NarrowsError(f"{part!r} is no limit.", where="budget", remedy=remedy)
            most[name] = _ratio(name, match[2], match[3].strip(), original_bytes, part)
        if not most:
            raise NarrowsError("it is empty.", where="budget", remedy=EXAMPLE)
        return cls(most)

    @property
    def minimised(self) -> str:
        """What is made as small as it goes within the limits: perplexity, or where that alone is limited, decode's time."""
        return "decode" if set(self.most) == {"perplexity"} else "perplexity"


def _ratio(name: str, sign: str, value: str, original_bytes: float, part: str) -> float:
    number = re.fullmatch(r"\+?(\d+(?:\.\d+)?)\s*([%x]?)", value)
    speed = name in ("decode", "prefill")
    if sign != (">=" if speed else "<=") or (number is None and name != "size") or (speed and number and number[2] == "%"):
        raise NarrowsError(f"{part!r} is no limit of {name}.", where="budget", remedy=EXAMPLE)
    if number is None or (name == "size" and not number[2]):
        try:
            return parse_bytes(value) / original_bytes
        except NarrowsError as error:
            raise error.inside("budget") from error
    given = float(number[1]) / (100 if number[2] == "%" else 1)
    ratio = 1 / given if speed and given else 1 + given if name == "perplexity" and number[2] == "%" else given
    if not 0 < ratio < math.inf:
        raise NarrowsError(f"{part!r} is no limit of {name}.", where="budget", remedy=EXAMPLE)
    return ratio


def said(name: str, ratio: float) -> str:
    """A ratio to the original in the words of a budget."""
    if name == "perplexity":
        return f"perplexity {100 * (ratio - 1):+.1f} %"
    return f"size {100 * ratio:.0f} %" if name == "size" else f"{name} {1 / ratio:.2f} x"


@dataclass(frozen=True)
class Menu:
    """What each layer costs in each format, as shares of the original model's: `costs` [layers, formats] by quantity.

    rest  what the remainder of the model costs. Perplexity is the logarithm of its ratio, and layers add up.
    compensate  whether `costs` are those of 4-bit layers with compensated rounding
    """

    layers: tuple[str, ...]
    formats: tuple[str, ...]
    costs: Mapping[str, Any]
    rest: Mapping[str, float]
    compensate: bool = False

    def choose(self, most: Mapping[str, float], minimise: str) -> "tuple[Any, dict[str, float], float]":
        """(index of each layer's format or None, ratios by quantity, proven bound of the minimised ratio)."""
        limits = {n: (math.log(m) if n == "perplexity" else m) - self.rest[n] for n, m in most.items()}
        found = solve(self.costs, limits, minimise)
        bound = self._as_ratio(minimise, found.bound)
        return found.chosen, {} if found.chosen is None else self.ratios(found.chosen), bound

    def ratios(self, chosen: Any) -> dict[str, float]:
        """What a choice makes of each quantity, as a ratio to the original."""
        return {n: self._as_ratio(n, float(c[np.arange(len(c)), chosen].sum())) for n, c in self.costs.items()}

    def _as_ratio(self, name: str, total: float) -> float:
        value = total + self.rest[name]
        return math.exp(min(value, 700.0)) if name == "perplexity" else value

    def corrected(self, estimated: Mapping[str, float], measured: Mapping[str, float]) -> "Menu":
        """The menu with what a measurement of a whole choice says: perplexity in proportion, times and bytes by their rest."""
        costs, rest = dict(self.costs), dict(self.rest)
        for name in QUANTITIES:
            if name != "perplexity":
                rest[name] += measured[name] - estimated[name]
            elif estimated[name] > 1 and measured[name] > 1:
                costs[name] = costs[name] * (math.log(measured[name]) / math.log(estimated[name]))
        return replace(self, costs=costs, rest=rest)

    def technique(self, chosen: Any) -> Int8 | None:
        """The technique that gives each layer its chosen format; None where all stay plain."""
        formats = {layer: self.formats[i] for layer, i in zip(self.layers, chosen, strict=True)}
        return None if set(formats.values()) == {"plain"} else Int8(rules_text(formats), self.compensate)

    def pareto(self, most: Mapping[str, float], points: int = 7) -> list[dict[str, float]]:
        """Ratios of the choices of least perplexity at sizes from the least to the largest, speeds within their limits."""
        speeds = {n: m for n, m in most.items() if n in ("decode", "prefill")}
        sizes = self.costs["size"]
        low, high = (self.rest["size"] + end.sum() for end in (sizes.min(1), np.where(np.isfinite(sizes), sizes, 0).max(1)))
        tried = [self.choose({**speeds, "size": float(s)}, "perplexity")[1] for s in np.linspace(low, high, points)]
        rows = [row for row in tried if row]
        return [row for i, row in enumerate(rows) if row not in rows[:i]]

    def shortfalls(self, most: Mapping[str, float]) -> tuple[str, ...]:
        """Of limits that cannot be kept together, how far each can be kept while the others are."""
        found = []
        for name, limit in most.items():
            _, ratios, _ = self.choose({n: m for n, m in most.items() if n != name}, name)
            best, given = (ratios, "with the other limits kept") if ratios else (self.choose({}, name)[1], "alone")
            found.append(f"{said(name, best[name])} at best {given}, {said(name, limit)} asked")
        return tuple(found)


@dataclass(frozen=True)
class Found:
    """A plan within a budget with its model, what was estimated and measured of it, and the bound on what was minimised.

    plan and model are None where there is none; `shortfalls` then say which limits bind, and by how much.
    """

    plan: Plan | None
    model: "nn.Module | None"
    minimised: str
    estimated: Mapping[str, float]
    measured: Mapping[str, float]
    bound: float
    pareto: Sequence[Mapping[str, float]]
    shortfalls: tuple[str, ...]


def find(model: "nn.Module", free: Plan, budget: Budget, seen: "Batches", held_out: "Batches", tell: Tell = silent) -> Found:
    """The best formats within a budget for a causal language model, which is left as it is.

    free: what is done to it anyway (a cast). seen: batches that tell what rounding does; held_out: for the perplexity that
    counts. Everything is measured on this machine with one thread. Raises NarrowsError for a model that does not decode.
    """
    import torch

    torch.set_num_threads(1)
    if not hasattr(model, "lm_head"):
        remedy = "Name a plan, like bf16 + int8."
        raise NarrowsError("a budget needs a causal language model.", where=type(model).__name__, remedy=remedy)
    whole = _Whole(model, held_out)
    menu = survey(model, free, seen, whole, tell)
    found = _tried(menu, model, free, budget, seen, whole, tell)
    others = {n: m for n, m in budget.most.items() if n != "perplexity"}
    if found.plan or "perplexity" not in budget.most or menu.choose(others, "perplexity")[0] is None:
        return found
    harms = _harms(model, menu.formats, seen, tell, compensate=True)
    compensated = replace(menu, costs={**menu.costs, "perplexity": harms}, compensate=True)
    return _tried(compensated, model, free, budget, seen, whole, tell)


def _tried(menu: Menu, model: "nn.Module", free: Plan, budget: Budget, seen: "Batches", whole: "_Whole", tell: Tell) -> Found:
    """The best choice of a menu that keeps the budget when it is measured, or what the last one lacked."""
    aims = {n: m * AIM if n in ("decode", "prefill") else m for n, m in budget.most.items()}
    pareto = menu.pareto(budget.most)
    estimated: dict[str, float] = {}
    measured: dict[str, float] = {}
    bound, shortfalls = math.inf, tuple[str, ...]()
    for attempt in range(ATTEMPTS):
        chosen, estimated, bound = menu.choose(aims, budget.minimised)
        if chosen is None:
            shortfalls = menu.shortfalls(aims)
            break
        technique = menu.technique(chosen)
        plan = Plan((*free.steps, *((technique,) if technique else ())))
        tell(f"measuring choice {attempt + 1}")
        changed = plan.apply(deepcopy(model), seen)
        measured = whole.measure(changed)
        if all(measured[name] <= limit for name, limit in budget.most.items()):
            return Found(plan, changed, budget.minimised, estimated, measured, bound, pareto, ())
        missed = {n: m for n, m in budget.most.items() if measured[n] > m}
        shortfalls = tuple(f"{said(n, measured[n])} measured, {said(n, m)} asked" for n, m in missed.items())
        menu = menu.corrected(estimated, measured)
    return Found(None, None, budget.minimised, estimated, measured, bound, pareto, shortfalls)


class _Whole:
    """A model to which others are compared as wholes."""

    def __init__(self, model: "nn.Module", held_out: "Batches") -> None:
        self.model, self.held_out = model, held_out
        self.bytes, self.perplexity = resident_bytes(model), perplexity(model, held_out)
        self.steps = generation_steps(model, PROMPT, CONTEXT)
        self.seconds: dict[str, float] = {}

    def measure(self, changed: "nn.Module", rounds: int = 9) -> dict[str, float]:
        """Its bytes and perplexity, and seconds of a step timed in turns, as ratios to those of the original."""
        return {**self.costs(changed, rounds), "perplexity": perplexity(changed, self.held_out) / self.perplexity}

    def costs(self, changed: "nn.Module", rounds: int = 9) -> dict[str, float]:
        """`measure` without the perplexity."""
        found = {"size": resident_bytes(changed) / self.bytes}
        for name, step in generation_steps(changed, PROMPT, CONTEXT).items():
            self.seconds[name], _, faster, _ = time_pair(self.steps[name], step, rounds)
            found[name] = 1 / faster
        return found


def survey(model: "nn.Module", free: Plan, seen: "Batches", whole: _Whole, tell: Tell = silent) -> Menu:
    """What each layer costs in each format, with the rest of the model from a measurement of it all in int8."""
    layers, rows = _layers(model), embeddings(model)
    formats = tuple(FORMATS)
    tell("measuring the model in int8")
    changed = Plan((*free.steps, Int8())).apply(deepcopy(model))
    measured = whole.costs(changed)
    dtype = next(p.dtype for p in changed.parameters() if p.is_floating_point())
    del changed
    harm = _harms(model, formats, seen, tell)
    costs = {name: np.full(harm.shape, np.inf) for name in QUANTITIES}
    costs["perplexity"] = harm
    timed: dict[tuple[tuple[int, ...], bool, str], tuple[float, float]] = {}
    for i, (name, layer) in enumerate(layers.items()):
        tell("timing layers", i, len(layers))
        for j, form in enumerate(formats):
            if not np.isfinite(harm[i, j]):
                continue
            packed, bytes_ = _in_format(layer, form, dtype)
            key = (tuple(layer.weight.shape), getattr(layer, "bias", None) is not None, form)
            if name not in rows and key not in timed:
                timed[key] = _seconds(packed, layer.weight.shape[1], dtype, bytes_)
            seconds = (0.0, 0.0) if name in rows else timed[key]  # a step looks up a few rows of an embedding
            costs["size"][i, j] = bytes_ / whole.bytes
            costs["decode"][i, j], costs["prefill"][i, j] = (
                s / whole.seconds[n] for s, n in zip(seconds, ("decode", "prefill"), strict=True)
            )
    there = [formats.index("plain" if name in rows else "int8") for name in layers]  # in what was measured
    rest = {n: measured[n] - float(c[np.arange(len(there)), there].sum()) for n, c in costs.items() if n != "perplexity"}
    return Menu(tuple(layers), formats, costs, {**rest, "perplexity": 0.0})


def _layers(model: "nn.Module") -> "dict[str, nn.Linear | nn.Embedding]":
    """The layers that get a format each: linear ones, and embeddings that share their weights with none."""
    return {**linears(model), **embeddings(model)}


def _fits(model: "nn.Module", name: str, layer: "nn.Linear | nn.Embedding", form: str) -> bool:
    dtype = FORMATS[form]
    if dtype is None or not dtype.group:
        return True
    outputs, inputs = layer.weight.shape
    shared = name in linears(model) and tied_embedding(model, name, layer)
    return not (inputs % dtype.group or outputs % 2 or shared)


def _in_format(layer: "nn.Linear | nn.Embedding", form: str, dtype: "torch.dtype") -> "tuple[Callable[[], nn.Module], int]":
    """What makes a linear layer in a format, and the bytes that a layer's weights then are."""
    from narrows.modules.packed_linear import PackedLinear, quantized

    chosen, bias = FORMATS[form], getattr(layer, "bias", None)
    outputs, inputs = layer.weight.shape
    beside = outputs * dtype.itemsize if bias is not None else 0
    if chosen is None:
        return lambda: deepcopy(layer).to(dtype), outputs * inputs * dtype.itemsize + beside

    def pack() -> "nn.Module":
        return PackedLinear.of(quantized(layer.weight, chosen), bias).to(dtype)

    return pack, round(chosen.bytes(outputs * inputs, inputs)) + beside


def _seconds(make: "Callable[[], nn.Module]", inputs: int, dtype: "torch.dtype", bytes_: int) -> tuple[float, float]:
    """CPU seconds of a layer with one row and with a prompt's, its weights not in a cache: the least of several runs."""
    import torch

    first = make()
    copies = [first, *(deepcopy(first) for _ in range(min(COPIES, -(-COLD_BYTES // bytes_)) - 1))]
    found = []
    with torch.inference_mode():
        for rows in (1, PROMPT):
            x = torch.randn(rows, inputs, dtype=dtype)
            runs = []
            for _ in range(4):
                start = time.thread_time()
                for copy in copies:
                    copy(x)
                runs.append((time.thread_time() - start) / len(copies))
            found.append(statistics.median(runs[1:]))
    return found[0], found[1]


def _harms(model: "nn.Module", formats: Sequence[str], seen: "Batches", tell: Tell, compensate: bool = False) -> Any:
    """Nats that each layer's rounding alone adds to a token's loss [layers, formats], to second order; inf where none fits.

    The loss rises by half the mean square of (gradient . change of the outputs), with gradients of labels that are drawn
    from the model's own predictions: the Fisher information, measured in the directions that rounding takes.
    """
    import torch

    from narrows.modules.compensated import compensated, moments
    from narrows.modules.packed_linear import requantized

    layers = _layers(model)
    inputs, gradients = _gradients(model, layers, seen)
    found = np.full((len(layers), len(formats)), np.inf)
    reached = moments(model, linears(model), seen) if compensate else ()
    others = embeddings(model) if compensate else layers
    with torch.no_grad():
        for count, (name, gram) in enumerate(chain(reached, ((other, None) for other in others))):
            tell("rounding layers one by one", count, len(layers))
            layer, i = layers[name], list(layers).index(name)
            weight, g = layer.weight.float(), gradients[name].float()
            for j, form in enumerate(formats):
                chosen = FORMATS[form]
                if chosen is None:
                    found[i, j] = 0.0
                elif _fits(model, name, layer, form):
                    four = gram is not None and chosen.bits == 4
                    rounded = compensated(weight, chosen, gram).weight() if four else requantized(weight, chosen)
                    change, x = rounded.sub_(weight), inputs[name]
                    moved = x.float() @ change.T if x.is_floating_point() else change[x]
                    found[i, j] = 0.5 * float((moved * g).sum(-1).square().mean())
    return found


def _gradients(
    model: "nn.Module", layers: "Mapping[str, nn.Module]", seen: "Batches"
) -> "tuple[dict[str, Tensor], dict[str, Tensor]]":
    """Inputs [T, K] and gradients of the loss to the outputs [T, N] of each layer as bf16, over SEEN tokens of the batches.

    The inputs of an embedding are its token ids [T].
    """
    import torch

    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    gradients: dict[str, list[Tensor]] = {name: [] for name in layers}

    def after(name: str) -> Any:
        def keep(layer: Any, args: Any, out: Any) -> None:
            x = args[0].detach()
            inputs[name].append(x.flatten(0, -2).bfloat16() if x.is_floating_point() else x.flatten())
            if not out.requires_grad:  # an embedding of something else than tokens
                out.requires_grad_(True)
            out.register_hook(lambda g: gradients[name].append(g.flatten(0, -2).bfloat16()))

        return keep

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [embedding.register_forward_hook(lambda layer, args, out: out.requires_grad_(True))]
    hooks += [layer.register_forward_hook(after(name)) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(0)
    try:
        for p, _ in wanted:
            p.requires_grad_(False)
        for batch in _cut(seen):
            with torch.enable_grad():
                logits = model(**batch).logits.flatten(0, -2).float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    finally:
        for p, was in wanted:
            p.requires_grad_(was)
        for hook in hooks:
            hook.remove()
    return {n: torch.cat(t) for n, t in inputs.items()}, {n: torch.cat(t) for n, t in gradients.items()}


def _cut(batches: "Batches") -> "Batches":
    """The beginnings of up to four batches, SEEN tokens together."""
    few = batches[:4]
    return [{key: value[:1, : SEEN // len(few)] for key, value in batch.items()} for batch in few]


def as_json(found: Found) -> dict[str, Any]:
    """What was found as plain data: ratios to the original, the plan as text."""
    return {
        "plan": None if found.plan is None else str(found.plan),
        "minimised": found.minimised,
        "estimated": dict(found.estimated),
        "measured": dict(found.measured),
        "bound": found.bound if math.isfinite(found.bound) else None,
        "pareto": [dict(row) for row in found.pareto],
        "shortfalls": list(found.shortfalls),
    }
