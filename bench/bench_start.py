"""How soon a first answer comes, in CPU seconds of whole processes, beside the limit each was given.

    python bench/bench_start.py

Peers: AIConfigurator answers a point in 0.6 s once it has loaded 72 MB; vidur needs minutes to an hour of training.
"""

import resource
import subprocess
import sys
import time

from narrows.capture import bundled
from narrows.capture.config import bundled_config, from_config

COMMANDS = {
    "--help": (["--help"], 0.15),
    "diagnose a bundled 70B": (["diagnose", "llama-3.1-70b", "--machine", "h100-sxm", "--decode", "--json"], 1.0),
    "prescribe for an 8B": (["prescribe", "llama-3.1-8b", "--machine", "a100-80gb", "--decode", "--json"], 1.0),
    "papers": (["papers", "--json"], 1.0),
}


def cpu_seconds(args: list[str]) -> float:
    """The least of five runs of a child process, user and system."""
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "narrows", *args], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> None:
    print(f"{'what':<34} {'CPU s':>8} {'limit':>8}")
    for what, (args, limit) in COMMANDS.items():
        print(f"{what:<34} {cpu_seconds(args):>8.3f} {limit:>8.3f}")
    slowest = 0.0
    for name in bundled():
        config = bundled_config(name)
        if config is not None:
            start = time.process_time()
            from_config(config, name)
            slowest = max(slowest, time.process_time() - start)
    print(f"{'slowest config.json, in a process':<34} {slowest:>8.3f} {0.05:>8.3f}")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.capture.torch import from_module
    from narrows.step import Step

    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
        )
        model = LlamaForCausalLM(config)
    start = time.process_time()
    graph = from_module(model, Step.prefill(1, 2048))
    print(f"{'trace a 70B module':<34} {time.process_time() - start:>8.3f} {5.0:>8.3f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"peak memory {peak:.2f} GB (limit 1 GB), {graph.parameters:,} parameters")


if __name__ == "__main__":
    main()
