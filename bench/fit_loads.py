"""Fit the bundled loads to recorded traces by their first two moments, and write data/loads.toml.

python bench/fit_loads.py [DIR_OF_TRACES]
"""

import itertools
import sys
from pathlib import Path

from narrows.figures import write
from narrows.simulate.requests import Request
from narrows.simulate.step_times import PS
from narrows.simulate.workload import Lengths, read

ROOT = Path(__file__).parents[1]
TRACES = {
    "azure-2023-conv": (
        "azure2023_conv.csv",
        "Azure LLM inference trace 2023, conversations (Patel et al., Splitwise, ISCA 2024)",
    ),
    "azure-2023-code": (
        "azure2023_code.csv",
        "Azure LLM inference trace 2023, code completion (Patel et al., Splitwise, ISCA 2024)",
    ),
    "mooncake-conversation": ("mooncake_conversation_trace.jsonl", "Mooncake conversation trace (Qin et al., FAST 2025)"),
}


HEAD = (
    "# Loads like recorded ones: requests per second, coefficients of variation of gaps and lengths, mean tokens.",
    "# Written by bench/fit_loads.py; what a mean and a spread do not tell (tails, bursts that last) is not in them.",
    "# Of a trace with hashes also how talks go on: mean turns, seconds from one to the next (`think` has the time of the",
    "# answer in it, which such traces do not tell) and new words.",
)


def moments(values: list[float]) -> tuple[float, float]:
    """Mean and coefficient of variation."""
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 / mean


def talks(requests: list[Request]) -> dict[str, float]:
    """How sessions go on, told from hashes alone: a turn has all whole pieces of the prompt before, and more words."""
    last: dict[int, Request] = {}  # the prompt that ends with a whole piece, which has no next turn yet
    gaps, words = list[float](), list[float]()
    for one in requests:
        for name in reversed(one.hashes[1:-1]):
            before = last.get(name)
            if before and one.prompt > before.prompt + before.output:
                gaps.append((one.arrival - before.arrival) / PS)
                words.append(one.prompt - before.prompt - before.output)
                del last[name]
                break
        if len(one.hashes) > 2:
            last[one.hashes[-2]] = one
    (think, think_spread), (new, new_spread) = moments(gaps), moments(words)
    turns = len(requests) / (len(requests) - len(gaps))
    return {"turns": turns, "think": think, "think_spread": think_spread, "words": new, "words_spread": new_spread}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data" / "traces"
    lines = [*HEAD, ""]
    for name, (file, source) in TRACES.items():
        requests = list(read(folder / file))
        gaps = [(b.arrival - a.arrival) / PS for a, b in itertools.pairwise(requests)]
        mean, burst = moments(gaps)
        like = Lengths.like(requests)
        figures = {"rate": 1 / mean, "burst": burst, "prompt": like.prompt, "prompt_spread": like.prompt_spread,
                   "output": like.output, "output_spread": like.output_spread}  # fmt: skip
        if requests[0].hashes:
            figures |= talks(requests)
        lines += [f"[{name}]", *(f"{key} = {value:.4g}" for key, value in figures.items()), f"requests = {len(requests)}",
                  f'source = "{source}"', ""]  # fmt: skip
    write(ROOT / "src" / "narrows" / "data" / "loads.toml", "\n".join(lines))


if __name__ == "__main__":
    main()
