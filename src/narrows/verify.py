"""Whether a plan did what was predicted: quality, speed, bytes, before and after side by side, and a gate that refuses."""

import csv
import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.claims import versions
from narrows.diagnose import Diagnosis, diagnose, prepared
from narrows.figures import write
from narrows.gain import Gain, gain, parts
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.plan import Plan
from narrows.progress import Tell, silent
from narrows.step import Step

if TYPE_CHECKING:
    import torch

Batches = Sequence[Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Gate:
    """What a changed model must keep: quality within a ratio of the original's, and the gain that was asked for.

    perplexity  at most this times the original's;  cosine, agreement  at least this;  prediction  the measured
    speed is no farther than this ratio outside of the predicted interval, beyond the noise of the A/A pair.
    """

    perplexity: float = 1.10
    cosine: float = 0.95
    agreement: float = 0.90
    prediction: float = 1.35


@dataclass(frozen=True)
class Speed:
    """One kind of step timed before and after: seconds each, their ratio, and the ratio of the original to itself."""

    before_seconds: float
    after_seconds: float
    ratio: float
    aa_ratio: float
    predicted: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Verification:
    """A plan measured. `quality` names what was measured: perplexity, cosine, or the user's own."""

    model: str
    plan: str
    quality: str
    quality_before: float
    quality_after: float
    agreement: float
    speed: Mapping[str, Speed]
    bytes_before: int
    bytes_after: int
    predicted_bytes: int
    text: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def perplexity(model: "torch.nn.Module", batches: Batches) -> float:
    """exp of the mean negative log-likelihood of each next token over batches {input_ids: [B, T]}."""
    import torch

    loss, count = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            ids = batch["input_ids"]
            logits = model(**batch).logits[:, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    return math.exp(min(loss / count, 700.0))  # a broken model's loss must not overflow


def outputs(model: "torch.nn.Module", batch: Mapping[str, "torch.Tensor"]) -> "torch.Tensor":
    """The main output of a forward: logits, last hidden state, or the tensor itself, as fp32."""
    import torch

    with torch.inference_mode():
        found = model(**batch)
    for name in ("logits", "last_hidden_state"):
        found = getattr(found, name, found)
    if not isinstance(found, torch.Tensor):
        found = found[0]
    return found.float()


def compare(before: Sequence["torch.Tensor"], after: Sequence["torch.Tensor"]) -> tuple[float, float]:
    """(mean cosine of the outputs, share of positions where the largest output is the same one)."""
    import torch

    cosine = [float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in zip(before, after, strict=True)]
    same = [float((a.argmax(-1) == b.argmax(-1)).float().mean()) for a, b in zip(before, after, strict=True)]
    return statistics.fmean(cosine), statistics.fmean(same)


def resident_bytes(model: "torch.nn.Module") -> int:
    """Bytes of every parameter and buffer that the model keeps, shared storage counted once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr() or id(storage)] = storage.nbytes()
    return sum(seen.values())


def time_pair(
    before: Callable[[], object], after: Callable[[], object], rounds: int = 15, tell: Tell = silent, what: str = "timing"
) -> tuple[float, float, float, float]:
    """(before, after, ratio, A/A ratio): CPU seconds of two calls, interleaved as A B A in each round.

    The ratio is the median over rounds of A / B; the A/A ratio, of the first A to the second, shows the noise.
    Run with one torch thread, or CPU seconds count the waiting of the others.
    """

    def once(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    once(before), once(after)
    firsts, others, ratios, same = [], [], [], []
    for i in range(rounds):
        tell(what, i, rounds)
        a, b, again = once(before), once(after), once(before)
        firsts.append(min(a, again))
        others.append(b)
        ratios.append((a + again) / 2 / b)
        same.append(a / again)
    return statistics.median(firsts), statistics.median(others), statistics.median(ratios), statistics.median(same)


def generation_steps(model: "torch.nn.Module", prompt: int, context: int) -> dict[str, Callable[[], object]]:
    """What to time of a causal language model: reading a prompt, and one token after `context` tokens (B = 1)."""
    import torch

    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, max(prompt, context)), generator=generator)

    def prefill() -> object:
        with torch.inference_mode():
            return model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        cache = model(input_ids=ids[:, :context], use_cache=True, logits_to_keep=1).past_key_values
    lengths = [layer.keys.shape[-2] if getattr(layer, "keys", None) is not None else 0 for layer in cache.layers]

    def decode() -> object:
        with torch.inference_mode():
            out = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
            for layer, length in zip(cache.layers, lengths, strict=True):  # leave the cache as it was
                if length:
                    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
            return out

    return {"prefill": prefill, "decode": decode}


@dataclass(frozen=True)
class Quality:
    """What a change did to a model's answers: a measure before and after, the share that is the same, what a gate objects to."""

    measure: str
    before: float
    after: float
    agreement: float
    failure: str


class Judge:
    """A model's answers to held-out batches, by which changes of it are judged; the model itself is not kept.

    quality: a name and the user's own function of (model, batches), larger is better; by default perplexity of a causal
    language model (smaller is better), else the cosine of the outputs.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        batches: Batches,
        quality: tuple[str, Callable[["torch.nn.Module", Batches], float]] | None,
    ) -> None:
        self.batches, self.own = batches, quality
        self.causal = hasattr(model, "lm_head") and "input_ids" in batches[0]
        self.measure = quality[0] if quality else "perplexity" if self.causal else "cosine"
        self.answers = [outputs(model, batch) for batch in batches[:4]]
        self.before = self.own[1](model, batches) if self.own else perplexity(model, batches) if self.causal else 1.0

    def judge(self, changed: "torch.nn.Module", gate: Gate = Gate()) -> Quality:
        """The quality of a changed model, and whether a gate lets it pass (NaN never does)."""
        cosine, agreement = compare(self.answers, [outputs(changed, batch) for batch in self.batches[:4]])
        failure = ""
        if self.own:
            after = self.own[1](changed, self.batches)
            if not after >= self.before * gate.cosine:
                failure = f"{self.measure} fell from {self.before:.4g} to {after:.4g}, below {gate.cosine:g} of the original"
        elif self.causal:
            after = perplexity(changed, self.batches)
            if not after <= self.before * gate.perplexity:
                limit = f"above {gate.perplexity:g} times the original"
                failure = f"perplexity rose from {self.before:.4g} to {after:.4g}, {limit}"
        else:
            after = cosine
            if not cosine >= gate.cosine:
                failure = f"cosine of the outputs is {cosine:.4f}, below {gate.cosine:g}"
        return Quality(self.measure, self.before, after, agreement, failure)


def steps_of(
    model: "torch.nn.Module", prompt: int, context: int, batch: Mapping[str, "torch.Tensor"]
) -> tuple[dict[str, Step], dict[str, Callable[[], object]]]:
    """The steps that a model is timed in by kind: their sizes, and the calls (a model that does not generate runs `batch`)."""
    if hasattr(model, "lm_head"):
        sizes = {"prefill": Step.prefill(1, prompt), "decode": Step.decode(1, context)}
        return sizes, generation_steps(model, prompt, context)
    if any(value.is_floating_point() for value in batch.values()):  # images have no length to cut
        return {"forward": Step.forward(len(next(iter(batch.values()))))}, {"forward": lambda: outputs(model, batch)}
    short = {key: value[:, :prompt] for key, value in batch.items()}
    return {"forward": Step.forward(1, prompt)}, {"forward": lambda: outputs(model, short)}


def foreseen(graph: Graph, plan: Plan, machine: Machine, step: Step, name: str = "") -> tuple[Diagnosis, Diagnosis, Gain]:
    """The diagnoses of a graph and of what a plan makes of it (called `name`), and the speed-up they predict."""
    both = graph, replace(plan.rewrite(graph), name=name or graph.name)
    ours, theirs = (diagnose(one, machine, step) for one in both)
    return ours, theirs, gain(*(parts(prepared(one, step, machine), machine, step) for one in both))


def verify(
    before: "torch.nn.Module",
    after: "torch.nn.Module",
    batches: Batches,
    plan: Plan,
    predicted: Mapping[str, Gain],
    predicted_bytes: float,
    steps: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
    gate: Gate = Gate(),
    quality: tuple[str, Callable[["torch.nn.Module", Batches], float]] | None = None,
    model: str = "",
    text: str = "",
    rounds: int = 15,
    tell: Tell = silent,
) -> Verification:
    """Measure a changed model beside the original.

    batches     held-out inputs for quality (keyword arguments of forward)
    predicted   for each timed step, (speed-up, low, high);  predicted_bytes  of the weights after
    steps       for each timed step, the two calls to time
    quality     as `Judge` takes it
    """
    import torch

    torch.set_num_threads(1)
    tell("quality of the original")
    judge = Judge(before, batches, quality)
    tell("quality of the changed model")
    judged = judge.judge(after, gate)
    failures = [judged.failure] if judged.failure else []
    speed: dict[str, Speed] = {}
    for step, (old, new) in steps.items():
        a, b, ratio, same = time_pair(old, new, rounds, tell, f"timing {step}")
        expected, low, high = predicted[step]
        speed[step] = Speed(a, b, ratio, same, expected, (low, high))
        noise = max(same, 1 / same)
        if not low / gate.prediction / noise <= ratio <= high * gate.prediction * noise:
            failures.append(f"{step}: measured {ratio:.2f} x, predicted {expected:.2f} x ({low:.2f} to {high:.2f})")
    small, large = resident_bytes(after), resident_bytes(before)
    if abs(small - predicted_bytes) > 0.02 * predicted_bytes:
        failures.append(f"weights take {small:,} bytes, predicted {predicted_bytes:,.0f}")
    return Verification(
        model, str(plan), judged.measure, judged.before, judged.after, judged.agreement, speed, large, small,
        round(predicted_bytes), text, tuple(failures)
    )  # fmt: skip


def as_json(found: Verification) -> dict[str, Any]:
    """A verification as plain data: the stable contract of `narrows verify --json`."""
    return {
        **{f.name: getattr(found, f.name) for f in fields(found) if f.name not in ("speed", "failures")},
        "speed": {step: s.ratio for step, s in found.speed.items()},
        "aa_ratio": {step: s.aa_ratio for step, s in found.speed.items()},
        "predicted": {step: {"speed": s.predicted, "interval": list(s.interval)} for step, s in found.speed.items()},
        "measured": {step: asdict(s) for step, s in found.speed.items()},
        "passed": found.passed,
        "failures": list(found.failures),
    }


def results_file() -> Path:
    """`results/verified.csv` of a clone, or the copy that an installed package carries."""
    clone = Path(__file__).parents[2] / "results" / "verified.csv"
    return clone if clone.parent.is_dir() else Path(__file__).parent / "data" / "verified.csv"


@cache  # a prescription asks for every plan it tries
def _rows(path: Path) -> tuple[dict[str, str], ...]:
    if not path.is_file():
        return ()
    with path.open(newline="") as file:
        return tuple(csv.DictReader(file))


def known_quality(plan: Plan) -> tuple[str, float, str] | None:
    """(measure, ratio after to before, model) from the last kept verification of these techniques, a compiler aside."""
    wanted = {text for text in str(plan).split(" + ") if text != "compile"}
    found = [row for row in _rows(results_file()) if {t for t in row["plan"].split(" + ") if t != "compile"} == wanted]
    if not found:
        return None
    last = found[-1]
    return last["quality"], float(last["quality_after"]) / float(last["quality_before"]), last["model"]


def record(found: Verification, machine: str, command: str, path: Path) -> None:
    """Keep one row per timed step in a results file, atomically, with machine, versions and command; it replaces older ones."""
    rows = [r for r in _rows(path) if (r["model"], r["plan"], r["machine"]) != (found.model, found.plan, machine)]
    for step, s in found.speed.items():
        rows.append(
            {
                "model": found.model,
                "plan": found.plan,
                "step": step,
                "speed": f"{s.ratio:.3f}",
                "predicted": f"{s.predicted:.3f}",
                "aa_ratio": f"{s.aa_ratio:.3f}",
                "quality": found.quality,
                "quality_before": f"{found.quality_before:.4f}",
                "quality_after": f"{found.quality_after:.4f}",
                "bytes_before": str(found.bytes_before),
                "bytes_after": str(found.bytes_after),
                "text": found.text,
                "machine": machine,
                "versions": versions(),
                "command": command,
            }
        )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())
    _rows.cache_clear()
