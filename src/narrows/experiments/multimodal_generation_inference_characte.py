"""What the levers of generation claim: predicted for Chameleon's sizes on an A100, and pulled on a small decoder on this CPU."""

import math
from collections.abc import Callable, Mapping
from functools import cache
from statistics import median
from time import perf_counter, sleep, thread_time
from typing import TYPE_CHECKING, Any

from narrows.capture import capture
from narrows.capture.config import from_config
from narrows.experiments.steady import one_thread
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.profiling_cost_models.multimodal_generation_inference_characte import GenerationLevers

if TYPE_CHECKING:
    import torch

# The decoders of Chameleon-7B and -34B (arXiv 2405.09818): Llama's form, a shared vocabulary of text and image tokens.
_CHAMELEON: tuple[Mapping[str, int], ...] = (
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
     "num_key_value_heads": 32},
    {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
     "num_key_value_heads": 8},
)  # fmt: skip
_CONTEXT, _TOKENS, _LONGEST, _WORDS = 256, 12, 512, 4096
_ROUNDS, _PRODUCTS, _SLEEP_SECONDS = 5, 8, 0.003
_SETTLED = 4  # tokens until compiled code and caches are warm


def cumulative_gain(technique: GenerationLevers) -> float:
    """Predicted seconds of a decoded token before all levers over those after, geometric mean of both sizes."""
    common = {"model_type": "llama", "vocab_size": 65536, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    graphs = [from_config({**common, **size}, "chameleon") for size in _CHAMELEON]
    there, step = machine("a100-80gb"), Step.decode(1, 1024)
    return math.prod(technique.measure(graph, there, step).values["gain"] for graph in graphs) ** (1 / len(graphs))


def idle_share(technique: GenerationLevers) -> float:
    """The predicted share of a decoded token's time in which a small model leaves the GPU idle."""
    return technique.measure(capture("smollm2-135m"), machine("a100-80gb"), Step.decode(1, 1024)).values["idle_share"]


def measured_gain(technique: GenerationLevers) -> float:
    """Processor seconds a token before the levers over those after as many of the first three as the technique pulls."""
    levers = min(technique.levers, 3)
    (before, said), (after, same) = _decoded(0), _decoded(levers)
    return before / after if said[0] == same[0] else math.nan  # a token later, int8 may have led it elsewhere


def idle_error(technique: GenerationLevers) -> float:
    """How far the idle share that it profiles is from the one slept between products, as a clock around each sleep tells."""
    import torch

    matrix, shares = torch.ones(384, 384), list[float]()

    def run() -> None:
        slept, start = 0.0, perf_counter()
        for _ in range(_PRODUCTS):
            matrix @ matrix
            before = perf_counter()
            sleep(_SLEEP_SECONDS)
            slept += perf_counter() - before
        matrix @ matrix
        shares.append(slept / (perf_counter() - start))

    with one_thread():
        found = technique.profile(run, _ROUNDS).values["idle_share"]
    return abs(found - median(shares))


def _model(attention: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=_WORDS, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=_LONGEST,
                         attn_implementation=attention)  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _prompt() -> "torch.Tensor":
    import torch

    return torch.randint(_WORDS, (1, _CONTEXT), generator=torch.Generator().manual_seed(1))


@cache
def _decoded(levers: int) -> tuple[float, tuple[int, ...]]:
    """Least processor seconds a decoded token, and the tokens, with so many levers pulled."""
    import torch
    from transformers import DynamicCache, StaticCache

    with one_thread(), torch.inference_mode():
        model = _model("sdpa" if levers else "eager")
        if levers > 2:
            _pack(model)
        cache = StaticCache(model.config, max_cache_len=_LONGEST) if levers > 1 else DynamicCache(config=model.config)
        word = model(_prompt(), past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        step: Callable[..., Any] = torch.compile(model.forward, dynamic=False) if levers > 1 else model
        seconds, said = [], []
        for place in range(_CONTEXT, _CONTEXT + _TOKENS):
            at = torch.tensor([[place]])
            start = thread_time()
            word = step(word, past_key_values=cache, position_ids=at, use_cache=True).logits[:, -1:].argmax(-1)
            seconds.append(thread_time() - start)
            said.append(int(word))
    return min(seconds[_SETTLED:]), tuple(said)


def _pack(model: Any) -> None:
    """Put int8 layers in place of all linear ones."""
    import torch

    from narrows.modules.packed_linear import PackedLinear, int8, quantized

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                packed = PackedLinear.of(quantized(child.weight.detach().float(), int8()))
                setattr(parent, name, packed.to(torch.bfloat16))
