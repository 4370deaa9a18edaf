"""What narrows makes of a model beside what other libraries make of it: quality, speed, bytes, and the cost of applying.

    make peers                                                   # in an environment of its own, see bench/peers.txt
    python bench/bench_peers.py [--model NAME ...] [--method NAME ...] [--record]

Each method runs in a process of its own, on one thread, in turns with a process that keeps the plain model: a speed is the
median ratio of CPU seconds taken moments apart, `aa` that of the plain model to itself a round later. All read the same
text. `peak` is what applying held at most, over the plain model's bytes. What does not run keeps its error's first line.
`--record` puts the rows into results/peers.csv. It exits with 1 where a row of ours misses its target.
"""

import argparse
import csv
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from bench_apply import applied

RESULTS = Path(__file__).parents[1] / "results" / "peers.csv"
PROMPT = CONTEXT = 128  # tokens, as `narrows verify` times them
ROUNDS = 13
PLAIN, INT8, ROTATED = "fp32", "bf16 + int8", "smollm2-135m, rotated"
FOUR = "q_proj:int4g64;k_proj:int4g64;gate_proj:int4g64;up_proj:int4g64"  # the rest in 8 bits; down in 4 instead of up is worse
FOUR_BITS = f"bf16 + int8:but={FOUR},compensate=True"
FOUR_BITS_UNTIED = f"bf16 + int8:but=embed_tokens:int4g64;lm_head:int4g64;{FOUR},compensate=True"


@dataclass(frozen=True)
class Row:
    """One method on one model; speeds over the plain model, bytes, CPU seconds; empty where it does not run or apply."""

    model: str
    method: str
    library: str
    quality: str = ""  # perplexity (of residues that were hidden), or the cosine to the plain model's outputs
    value: float | None = None
    prefill: float | None = None
    decode: float | None = None
    forward: float | None = None
    aa: float | None = None  # of the step that was timed last
    file_bytes: int | None = None
    resident_bytes: int | None = None
    apply_seconds: float | None = None
    peak: float | None = None
    fails: str = ""


# ---- models


def _text(model: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    from narrows import samples

    batches = samples.token_batches(tokenizer, 48, 256)
    return model, batches[::2], batches[1::2]  # of one kind: the corpus goes from news to fiction


def _smollm2() -> tuple[Any, Any, Any]:
    from narrows import samples

    return _text(*samples.smollm2())


def _rotated() -> tuple[Any, Any, Any]:
    from narrows import samples

    model, *batches = _smollm2()
    return samples.rotated(model), *batches


def _minilm() -> tuple[Any, Any, Any]:
    from narrows import samples

    return _text(*samples.minilm())


def _antiberty() -> tuple[Any, Any, Any]:
    """Calibrated on a light chain, measured on a heavy one."""
    from narrows import samples

    model, tokenizer = samples.antiberty()
    heavy, light = samples.antibodies(tokenizer)
    return model, [light], [heavy]


def _efficientnet() -> tuple[Any, Any, Any]:
    """Enlarged digits, which it was not trained on."""
    import torch

    from narrows import samples

    images = torch.nn.functional.interpolate(samples.digits()[0][:8], size=224).repeat(1, 3, 1, 1) * 2 - 1
    batches = [{"inputs": image[None]} for image in images]
    return samples.efficientnet(), batches[::2], batches[1::2]


def _tiny_dit() -> tuple[Any, Any, Any]:
    """A diffusion transformer of random weights: its bytes and speeds are real, its outputs mean nothing."""
    import torch
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=6, sample_size=16, in_channels=4,
                                  out_channels=8, num_embeds_ada_norm=1000).eval()  # fmt: skip
    batches = [
        {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([t]), "class_labels": torch.tensor([t % 1000])}
        for t in (10, 200, 500, 900)
    ]
    return model, batches, batches


# ---- methods: what makes a model of the plain one, given batches to calibrate on


def _replaced(model: Any, make: Callable[[Any], Any]) -> Any:
    """A bf16 model with `make(linear)` for each linear layer but the output layer, as its library would have it."""
    from torch import nn

    model = model.bfloat16()
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
        model.set_submodule(name, make(layer))
    return model


def _dynamic(model: Any, seen: Any) -> Any:
    import torch

    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _torchao(model: Any, seen: Any, four: bool) -> Any:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)) if four else Int8WeightOnlyConfig()
    quantize_(model.bfloat16(), config)
    return model


def _quanto(model: Any, seen: Any) -> Any:
    from optimum.quanto import freeze, qint8, quantize

    quantize(model.bfloat16(), weights=qint8)
    freeze(model)
    return model


def _hqq(model: Any, seen: Any) -> Any:
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return _replaced(model, lambda layer: HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu"))


def _nf4(model: Any, seen: Any) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(layer: Any) -> Any:
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        new = Linear4bit(*sizes, compute_dtype=torch.bfloat16, quant_type="nf4")
        new.weight, new.bias = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4"), layer.bias
        return new.to("cpu")

    return _replaced(model, make)


def _torch_pruning(model: Any, seen: Any) -> Any:
    import torch
    import torch_pruning as tp

    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    importance = tp.importance.MagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, seen[0], importance, pruning_ratio=0.5, ignored_layers=heads).step()
    return model


@dataclass(frozen=True)
class Method:
    """What a library does to a model and batches to calibrate on; `plan` where the library is narrows."""

    library: str
    make: Callable[[Any, Any], Any]
    plan: str = ""


def _ours(plan: str) -> Method:
    def make(model: Any, seen: Any) -> Any:
        from narrows.plan import Plan

        return Plan.parse(plan).apply(model, seen)

    return Method("narrows", make, plan)


_PLAIN = {PLAIN: Method("torch", lambda model, seen: model), "bf16": Method("torch", lambda model, seen: model.bfloat16())}
_PEERS: dict[str, Method] = {
    "dynamic int8": Method("torch", _dynamic),
    "int8 weight-only": Method("torchao", partial(_torchao, four=False)),
    "int4 weight-only g32": Method("torchao", partial(_torchao, four=True)),
    "qint8": Method("optimum-quanto", _quanto),
    "4 bits g64": Method("hqq", _hqq),
    "nf4": Method("bitsandbytes", _nf4),
}
_PRUNERS: dict[str, Method] = {"half of the channels": Method("torch-pruning", _torch_pruning)}


def _methods(peers: Mapping[str, Method], *plans: str) -> dict[str, Method]:
    return {**_PLAIN, **peers, **{plan: _ours(plan) for plan in plans}}


# by name, how it is loaded, (model, batches to calibrate on, batches held out), and the methods that suit it
MODELS: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], dict[str, Method]]] = {
    "smollm2-135m": (_smollm2, _methods(_PEERS, INT8, FOUR_BITS)),
    ROTATED: (_rotated, _methods(_PEERS, INT8, FOUR_BITS_UNTIED)),
    "all-minilm-l6-v2": (_minilm, _methods(_PEERS, INT8)),
    "dit, 6 x 384, random weights": (_tiny_dit, _methods(_PEERS, INT8)),
    "antiberty": (_antiberty, _methods(_PEERS, INT8)),
    "efficientnet-lite0": (_efficientnet, _methods(_PRUNERS, "otov3")),
}
# (model, plan, column, sign, bound or the method whose figure it is): `--record` or not, a figure beyond it fails the run
TARGETS: tuple[tuple[str, str, str, str, float | str], ...] = (
    ("smollm2-135m", INT8, "harm", "<=", 0.01),
    ("smollm2-135m", INT8, "prefill", ">=", 1.8),
    ("smollm2-135m", INT8, "decode", ">=", 1.5),
    ("smollm2-135m", INT8, "file_bytes", "<=", 183e6),
    ("smollm2-135m", INT8, "apply_seconds", "<=", 5.0),
    ("smollm2-135m", INT8, "peak", "<=", 1.5),
    (ROTATED, FOUR_BITS_UNTIED, "harm", "<=", 0.08),
    (ROTATED, FOUR_BITS_UNTIED, "decode", ">=", "bf16"),
    (ROTATED, FOUR_BITS_UNTIED, "file_bytes", "<=", 110e6),
    (ROTATED, FOUR_BITS_UNTIED, "apply_seconds", "<=", 60.0),
    (ROTATED, FOUR_BITS_UNTIED, "peak", "<=", 1.5),
)

# ---- a process per method


def work(model_name: str, method_name: str) -> None:
    """Say on stdout first the row's figures, then for each step that a line of stdin names its CPU seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import torch

    from narrows.verify import compare, generation_steps, outputs, perplexity, resident_bytes

    torch.set_num_threads(1)
    load, methods = MODELS[model_name]
    method = methods[method_name]
    model, seen, held_out = load()
    reference = [outputs(model, batch) for batch in held_out[:4]]
    model, seconds, peak = applied(lambda: method.make(model, seen), resident_bytes(model))
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    held_out = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in held_out]
    if hasattr(model, "lm_head"):
        quality, value = "perplexity", perplexity(model, held_out)
        steps = generation_steps(model, PROMPT, CONTEXT)
    elif "labels" in held_out[0]:
        quality, value = "perplexity of what is hidden", _hidden_perplexity(model, held_out)
        steps = {"forward": lambda: outputs(model, held_out[0])}
    else:
        quality, value = "cosine", compare(reference, [outputs(model, batch) for batch in held_out[:4]])[0]
        steps = {"forward": lambda: outputs(model, held_out[0])}
    figures = {"quality": quality, "value": value, "apply_seconds": seconds, "peak": peak,
               "resident_bytes": _tensor_bytes(model), "file_bytes": _file_bytes(model, method.plan)}  # fmt: skip
    print(json.dumps({"steps": list(steps), "figures": figures}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        steps[line.strip()]()
        print(time.process_time() - start, file=answers, flush=True)


def _hidden_perplexity(model: Any, batches: Sequence[Mapping[str, Any]]) -> float:
    """exp of the mean loss of a masked language model over batches of as many labels each."""
    import torch

    with torch.inference_mode():
        return math.exp(statistics.fmean(float(model(**batch).loss) for batch in batches))


def _tensor_bytes(model: Any) -> int:
    """Bytes of all tensors that a model keeps, those inside libraries' own kinds of tensor too; shared ones once."""
    import torch

    found: dict[int, int] = {}
    left: list[Any] = [model.state_dict()]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, tuple | list):
            left += one
        elif hasattr(one, "__tensor_flatten__"):
            left += [getattr(one, name) for name in one.__tensor_flatten__()[0]]
        elif isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _file_bytes(model: Any, plan: str) -> int:
    """Bytes of the weights as a file: as narrows saves a transformers model, else as torch saves the state_dict."""
    import torch
    from transformers import PreTrainedModel

    from narrows import directory
    from narrows.plan import Plan

    if plan and isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as folder:
            manifest = directory.save(model, None, Path(folder) / "model", Plan.parse(plan))
            return sum(file.bytes for name, file in manifest.files.items() if name.endswith(".safetensors"))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


class Worker:
    """A process that keeps one model; `row` is what it found of it, or `fails` the first line of its error."""

    def __init__(self, model: str, method: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open for as long as the process
        command = [sys.executable, __file__, "--work", model, method]
        self._process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=self._errors, text=True)
        first = self._answer()
        self.found: dict[str, Any] = json.loads(first) if first else {"steps": [], "figures": {"fails": self._error()}}

    def seconds(self, step: str) -> float:
        """CPU seconds of one more run of a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{step}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _error(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt): .*", self._errors.read(), re.MULTILINE)
        return lines[-1] if lines else f"exit {self._process.returncode}"


# ---- the table


def measured(model: str, method: str, plain: Worker) -> Row:
    """One row: the method's own figures, and its steps in turns with the plain model's."""
    library = MODELS[model][1][method].library
    worker = Worker(model, method)
    speeds: dict[str, Any] = {}
    for step in worker.found["steps"]:
        for one in (plain, worker):
            one.seconds(step)
        turns = [(plain.seconds(step), worker.seconds(step)) for _ in range(ROUNDS)]  # each finds the other's data in the caches
        speeds[step] = statistics.median(a / b for a, b in turns)
        speeds["aa"] = statistics.median(a / again for (a, _), (again, _) in pairwise(turns))
    worker.close()
    return Row(model, method, f"{library} {version(library)}", **speeds, **worker.found["figures"])


def rows(models: Sequence[str], chosen: Sequence[str]) -> Iterator[Row]:
    """Each method that suits a model, or those chosen of them, in turns with the plain model."""
    for model in models:
        plain = Worker(model, PLAIN)
        for method in [name for name in MODELS[model][1] if name in chosen or not chosen]:
            yield measured(model, method, plain)
        plain.close()


def missed(found: Sequence[Row]) -> Iterator[str]:
    """What of ours falls short of its target; nothing is said of rows that were not measured."""
    known = {(row.model, row.method): row for row in found}

    def figure(model: str, method: str, column: str) -> float | None:
        if column != "harm":
            return getattr(known.get((model, method)), column, None)
        before, after = (figure(model, name, "value") for name in (PLAIN, method))
        return after / before - 1 if before and after else None

    for model, plan, column, sign, bound in TARGETS:
        limit = figure(model, bound, column) if isinstance(bound, str) else bound
        ours = figure(model, plan, column)
        kept = ours is not None and limit is not None and (ours <= limit if sign == "<=" else ours >= limit)
        if {(model, plan), (model, PLAIN)} <= known.keys() and limit is not None and not kept:
            yield f"{model}: {plan}: {column} is {ours}, not {sign} {limit:.4g}"


def recorded(row: Any, command: str, results: Path = RESULTS, key: tuple[str, str] = ("model", "method")) -> None:
    """Put a row into a results file, in the place of an older one of the same key."""
    from narrows.calibrate import bench_of
    from narrows.claims import versions
    from narrows.figures import write

    known: dict[tuple[str, ...], dict[str, Any]] = {}
    if results.is_file():
        with results.open(newline="") as file:
            known = {tuple(old[name] for name in key): old for old in csv.DictReader(file)}
    about = {"machine": bench_of("cpu").title, "versions": versions(), "command": command}
    new = {**asdict(row), **about}
    known[tuple(new[name] for name in key)] = new
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(new), lineterminator="\n")
    writer.writeheader()
    writer.writerows(known.values())
    write(results, text.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="these models only")
    parser.add_argument("--method", action="append", default=[], help="these methods only")
    parser.add_argument("--record", action="store_true", help=f"keep the rows in {RESULTS.name}")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(*asked.work)
        return 0
    found = []
    for row in rows(asked.model or list(MODELS), asked.method):
        found.append(row)
        print(*(f"{value:.4g}" if isinstance(value, float) else value for value in asdict(row).values() if value), sep="  ")
        if asked.record:
            recorded(row, f"python {shlex.join(sys.argv)}")
    short = list(missed(found))
    print(*short, sep="\n")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
