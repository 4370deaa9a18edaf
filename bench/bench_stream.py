"""Peak memory of applying a plan to directories larger than the memory it may use: python bench/bench_stream.py [PLAN] [GB ...]

Each size is a Llama of blocks as large as those of an 8B model in bf16 (436 MB each) with random weights, in shards of two
blocks, written to the disk and removed again. A plan runs in a process of its own; the peak is of what the process holds
beyond what it held with torch and transformers loaded (from 2 GB on, a whole file of results is in it). Exit 1 where the
largest directory needs a tenth more than the smallest.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
MORE = 1.1


def write(folder: Path, blocks: int) -> int:
    """A directory of so many blocks, block by block; gives the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    config = LlamaConfig(**BLOCK, num_hidden_layers=blocks, vocab_size=1024, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    places, total, generator = {}, 0, torch.Generator().manual_seed(0)
    for first in range(-1, blocks, 2):
        inside = {n: s for n, s in shapes.items() if first <= (int(n.split(".")[2]) if ".layers." in n else -1) < first + 2}
        held = {n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for n, s in inside.items()}
        save_file(held, folder / f"model-{first + 1}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(held, f"model-{first + 1}.safetensors"))
        total += sum(t.nbytes for t in held.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return total


def measure(source: str, out: str, plan: str) -> None:
    """Print CPU seconds, peak bytes and bytes written."""
    import torch
    import transformers  # noqa: F401

    from narrows.plan import Plan
    from narrows.streaming import stream

    torch.set_num_threads(1)
    data = [{"input_ids": torch.randint(1024, (1, 256), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    start = time.process_time()
    manifest = stream(source, out, Plan.parse(plan), data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    print(json.dumps([time.process_time() - start, peak, sum(f.bytes for f in manifest.files.values())]))


def main(plan: str, sizes: list[float]) -> int:
    print(f"{plan}\n{'source GB':>10}{'written GB':>12}{'peak GB':>9}{'CPU seconds':>13}")
    peaks = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / "source", Path(folder) / "out"
            total = write(source, max(1, round(size / 0.436)))
            command = [sys.executable, __file__, "--one", str(source), str(out), plan]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak, written = json.loads(done.stdout.splitlines()[-1])
        peaks.append(peak)
        print(f"{total / 1e9:10.2f}{written / 1e9:12.2f}{peak / 1e9:9.2f}{seconds:13.1f}", flush=True)
    return int(peaks[-1] > MORE * peaks[0])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(*sys.argv[2:5])
    else:
        given = sys.argv[1:]
        sys.exit(main(given[0] if given else "int8", [float(size) for size in given[1:]] or [2, 4, 6]))
