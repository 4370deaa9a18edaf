"""Think along several paths side by side, each of which sees the prompt and itself, then answer from all of them.

A decoding step of few sequences reads the weights whatever their number: eight paths take little longer than one. The answer
attends to the keys and values that the paths have left in the cache; nothing is read a second time.

`think` runs it on a model; `measure` predicts what the paths cost beside one of the same length.

## When it helps
Reasoning of one or few users on a device with compute to spare: eight times the thought in nearly the time of one. On small
models with grouped keys, or short thoughts, the weights are most of what a step reads.

## When it does not
Many users: a full batch has no room for width, each path is a sequence more. Long thoughts of models with many KV heads: the
paths' caches outgrow the weights, and the overhead is that of their reads. What the paths gain in accuracy comes from the
training (start tokens, an embedding for each path added to its keys and values), which is not done here: without it a model
answers from paths that it cannot tell apart.

## Reference
Wen et al.: ParaThinker, arXiv 2509.04475 (2025); sixteen paths below twice the time of one: the authors' repository. Paths of
one length here; the authors end all with the first that ends.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from narrows.cost import Limit
from narrows.diagnose import seconds
from narrows.errors import NarrowsError
from narrows.footprint import footprint
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.step import Step
from narrows.technique import Card, Claim, Measures, Reading, choice

if TYPE_CHECKING:
    import torch

    from narrows.modules.paths import Thought

_POINTS = 33  # steps at which a run of steps is priced: between them the time is a straight line but for kinks


@dataclass(frozen=True)
class ParaThinker(Measures):
    """Decode `paths` thoughts of a prompt as one batch, and answer from the caches of all."""

    paths: int = choice(8, 2, 4, 16, help="lines of thought")
    thought: int = choice(8192, 4096, 16384, 32768, help="tokens of each")
    answer: int = choice(1024, 256, help="tokens of the answer")
    temperature: float = choice(0.6, 0.0, 1.0, help="with which paths are sampled; 0: greedily")
    width: bool = choice(True, False, help="paths side by side, kept; or, to compare with, one after another and then read again")

    card: ClassVar[Card] = Card(
        "parathinker",
        relieves=(Limit.BANDWIDTH, Limit.LAUNCH),
        phases=("decode",),
        exact=False,
        price="a model trained for it; room for the caches of all paths",
        claims=(
            Claim("overhead", "of the time", 0.071, "Qwen2.5-7B, A100, 8 paths of 8,192 tokens, 1,024 of answer, over one path; "
                  "paper: the mean, lengths not given", "abstract", "simulated",
                  "twice the paper's mean, which has shorter runs in it; one after another adds 6.3", at_most=0.142),
            Claim("sixteen", "x", 2.0, "the same with 16 paths of 16,384 tokens; paper: less than", "the repository",
                  "simulated", "the paper's bound", at_most=2.0),
            Claim("read_again", "of the tokens", None, "SmolLM2-135M, 4 paths of 16 tokens: tokens read twice before the answer",
                  "abstract", "run", "none; NaN where an answer's logits differ by 0.001 from reading all again", at_most=0.0),
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if min(self.paths, self.thought, self.answer) < 1 or self.temperature < 0:
            remedy = "Give counts from 1 on, and a temperature from 0 on."
            raise NarrowsError(f"{self} is not possible.", where="parathinker", remedy=remedy)

    def baseline(self) -> "ParaThinker":
        return replace(self, width=False)

    def think(
        self, model: "torch.nn.Module", ids: "torch.Tensor", starts: "torch.Tensor", close: "torch.Tensor", seed: int = 0
    ) -> "Thought":
        """Think and answer on a prompt ids [1, T]: `starts` [paths] opens the paths, `close` [1, c] the answer."""
        from narrows.modules.paths import think

        if len(starts) != self.paths:
            problem = f"{len(starts)} tokens to start {self.paths} paths."
            raise NarrowsError(problem, where="parathinker", remedy="Give one for each path.")
        found: Thought = think(model, ids, starts, self.thought, close, self.answer, self.temperature, self.width, seed)
        return found

    def measure(self, graph: Graph, machine: Machine, step: Step) -> Reading:
        """Seconds and memory of the paths and their answer behind the prompt of the step, over one path and its answer."""
        prompt = int((step.past + (0 if step.phase == "decode" else step.new)).max())

        def decoding(batch: int, context: int, tokens: int) -> float:
            places = np.linspace(context, context + tokens - 1, min(_POINTS, tokens)).round()
            each = np.broadcast_to(seconds(graph, machine, Step.decode(batch, places[:, None]))[0], places.shape)
            return float(np.interp(np.arange(context, context + tokens), places, each).sum())

        def run(paths: int, width: bool) -> tuple[float, float]:
            """(seconds, bytes of the caches at the end) of thinking and answering."""
            context = prompt + paths * self.thought
            end = footprint(graph, Step.decode(1, context + self.answer - 1)).kv_bytes
            last = decoding(1, context, self.answer)
            if width:
                return decoding(paths, prompt, self.thought) + last, float(end)
            again = float(seconds(graph, machine, Step.prefill(1, context))[0])
            return paths * decoding(1, prompt, self.thought) + again + last, float(end)

        alone, (took, kept) = run(1, True)[0], run(self.paths, self.width)
        values = {"overhead": took / alone - 1, "seconds": took, "one_path_seconds": alone, "cache_bytes": kept,
                  "fits": float(graph.weight_bytes + kept <= machine.memory.capacity_bytes)}  # fmt: skip
        units = {"overhead": "of the time", "seconds": "s", "one_path_seconds": "s", "cache_bytes": "B", "fits": "1: yes"}
        rows = tuple({"paths": n, "overhead": run(n, self.width)[0] / alone - 1} for n in (1, 2, 4, 8, 16, 32))
        return Reading(values, units, rows)
