"""What other programs make of the files that narrows writes: the numbers it computes itself, or an error.

    pip install llama-cpp-python==0.3.36 compressed-tensors   # or vllm, in an environment of its own
    python bench/bench_readers.py [--reader NAME ...] [--record]

SmolLM2-135M is written under each plan; llama.cpp and transformers read it and foresee held-out text. llama.cpp rounds the
inputs of packed layers to 8 bits and keeps keys and values in fp16, so that its numbers are not ours to the last digit. vLLM
has no kernels on a machine without a GPU: there its own linear layers, fused as it fuses them, choose their schemes from our
config.json and load our tensors, and what they hold is compared. Readers that are not installed are passed over. It exits with
1 where a program disagrees. `--record` puts the rows into results/readers.csv.
"""

import argparse
import math
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

from bench_peers import recorded
from narrows import samples

RESULTS = Path(__file__).parents[1] / "results" / "readers.csv"
INT8, FOUR_BITS = "bf16 + int8", "bf16 + int8:but=q_proj:int4g64;k_proj:int4g64;v_proj:int4g64;gate_proj:int4g64;up_proj:int4g64"
FP8 = "bf16 + fp8-ptq-e5m2-e4m3-e3m4"
NEAR, ALIKE = 1.02, 0.999  # times our perplexity at most, or less by as much; and the logits' cosine at least


@dataclass(frozen=True)
class Row:
    """What a program makes of one file: its perplexity of held-out text beside ours, or how many layers hold our numbers."""

    plan: str
    reader: str = ""
    ours: float | None = None
    theirs: float | None = None
    cosine: float | None = None  # of its logits to ours
    layers: int | None = None
    fails: str = ""


class Written(NamedTuple):
    """A changed model, its tokenizer, held-out token ids [T], and the file or directory that it was written to."""

    model: Any
    tokenizer: Any
    ids: Any
    place: Path


@contextmanager
def written(plan_text: str, name: str) -> Iterator[Written]:
    from narrows.directory import load, save
    from narrows.gguf_file import save_gguf
    from narrows.plan import Plan

    plan = Plan.parse(plan_text)
    model, tokenizer = load("smollm2-135m", "float32")
    batches = samples.token_batches(tokenizer, 8, 256)
    model = plan.apply(model, batches[::2])
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / name
        if place.suffix:
            save_gguf(model, tokenizer, place, plan)
        else:
            save(model, tokenizer, place, plan)
        yield Written(model.float(), tokenizer, batches[1]["input_ids"][0], place)


def compared(plan: str, of: Written, theirs: Any) -> Row:
    """A row of logits [T, V] beside ours."""
    import torch

    def perplexity(logits: Any) -> float:
        return math.exp(torch.nn.functional.cross_entropy(logits[:-1], of.ids[1:]))

    with torch.no_grad():
        ours = of.model(of.ids[None]).logits[0]
    cosine = float(torch.cosine_similarity(ours, theirs, dim=-1).mean())
    values = perplexity(ours), perplexity(theirs)
    agree = 1 / NEAR < values[1] / values[0] < NEAR and cosine > ALIKE
    return Row(plan, "", *values, cosine, fails="" if agree else "other numbers")


def by_llama(plan: str) -> Row:
    """llama.cpp's logits of a gguf file, if it cuts text into the same tokens."""
    import torch
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False  # its AMX buffers end the process on some virtual machines, for published files too
        return params

    llama_cpp.llama_model_default_params = plain
    with written(plan, "model.gguf") as of:
        reader = Llama(str(of.place), n_ctx=512, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
        prose = of.tokenizer.decode(of.ids) + " It's 12345 naïve  cafés\n\n\t‘quotes’ 日本語 🤖 x=3.14;"
        if reader.tokenize(prose.encode(), add_bos=False) != of.tokenizer(prose)["input_ids"]:
            return Row(plan, fails="other tokens")
        reader.eval(of.ids.tolist())
        return compared(plan, of, torch.tensor(reader.scores[: len(of.ids)]))


def by_transformers(plan: str, name: str) -> Row:
    """transformers' logits of a gguf file or a directory of compressed-tensors."""
    import torch
    from transformers import AutoModelForCausalLM

    with written(plan, name) as of, torch.no_grad():
        options = {"gguf_file": name} if of.place.suffix else {}
        place = of.place.parent if options else of.place
        reader = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        return compared(f"{plan} ({'gguf' if options else 'directory'})", of, reader(of.ids[None]).logits[0])


def by_vllm(plan: str) -> Row:
    """How many of vLLM's own linear layers choose a scheme for our layers and then hold our numbers, its kernels left out."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    import torch
    from safetensors.torch import load_file
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_w8a8_fp8 as float8
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as packed

    from narrows.headers import read_json

    packed.choose_mp_linear_kernel = lambda config: type("Kernel", (), {"__init__": lambda *a, **k: None})
    float8.init_fp8_linear_kernel = MagicMock()
    torch.set_default_dtype(torch.float32)
    with written(plan, "model") as of, set_current_vllm_config(settings := VllmConfig()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        settings.model_config = SimpleNamespace(dtype=torch.bfloat16, quantization=None, is_moe=False)
        torch.set_default_dtype(torch.bfloat16)
        config, tensors = read_json(of.place / "config.json"), load_file(of.place / "model.safetensors")
        schemes = CompressedTensorsConfig.from_config(dict(config["quantization_config"]))
        schemes.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        width, inner, heads, groups = (config[name] for name in names)
        parts = {  # by what vLLM fuses: ours and what it calls them, its layer and that one's sizes
            "self_attn.qkv_proj": ({"q_proj": "q", "k_proj": "k", "v_proj": "v"}, "QKVParallelLinear",
                                   (width, width // heads, heads, groups)),
            "self_attn.o_proj": ({"o_proj": None}, "RowParallelLinear", (width, width)),
            "mlp.gate_up_proj": ({"gate_proj": 0, "up_proj": 1}, "MergedColumnParallelLinear", (width, [inner, inner])),
            "mlp.down_proj": ({"down_proj": None}, "RowParallelLinear", (inner, width)),
        }  # fmt: skip
        count = 0
        for i in range(config["num_hidden_layers"]):
            for part, (shards, kind, sizes) in parts.items():
                path = f"model.layers.{i}.{part}"
                layer = getattr(linear, kind)(*sizes, bias=False, quant_config=schemes, prefix=path)
                for leaf, held in layer.named_parameters():
                    ours = [tensors[f"{path.rpartition('.')[0]}.{name}.{leaf}"] for name in shards]
                    for shard, tensor in zip(shards.values(), ours, strict=True):
                        held.weight_loader(held, tensor, *([] if shard is None else [shard]))
                    if leaf == "weight_shape":
                        continue  # of the last one alone
                    if not torch.equal(held.float().flatten(), torch.cat([t.float().flatten() for t in ours])):
                        return Row(plan, layers=count, fails=f"{path}.{leaf} holds other numbers")
                count += 1
    return Row(plan, layers=count)


# by package, its distribution and the cases
READERS: dict[str, tuple[str, list[tuple[Callable[..., Row], tuple[str, ...]]]]] = {
    "llama_cpp": ("llama-cpp-python", [(by_llama, (plan,)) for plan in ("bf16", INT8, FOUR_BITS)]),
    "transformers": ("transformers", [
        *((by_transformers, (plan, "model.gguf")) for plan in (INT8, FOUR_BITS)),
        *((by_transformers, (plan, "model")) for plan in (INT8, FP8)),
    ]),
    "vllm": ("vllm", [(by_vllm, (plan,)) for plan in (INT8, FOUR_BITS, FP8)]),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reader", action="append", choices=READERS, help="these programs only")
    parser.add_argument("--record", action="store_true", help=f"keep the rows in {RESULTS.name}")
    asked = parser.parse_args()
    failed = False
    for package in asked.reader or READERS:
        distribution, cases = READERS[package]
        if find_spec(package) is None:
            print(f"{distribution} is not installed")
            continue
        for read, arguments in cases:
            row = replace(read(*arguments), reader=f"{distribution} {version(distribution)}")
            failed |= bool(row.fails)
            print(*(f"{value:.5g}" if isinstance(value, float) else value for value in asdict(row).values() if value), sep="  ")
            if asked.record:
                recorded(row, f"python {shlex.join(sys.argv)}", RESULTS, ("reader", "plan"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
