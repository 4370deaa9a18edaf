"""What Sarathi-Serve claims, in the serving simulator; and that a prompt read in pieces is the same prompt, on a real model."""

import math
from dataclasses import replace

from narrows.capture import capture
from narrows.experiments.serving import capacity_gain, load, through
from narrows.machine import machine
from narrows.simulate.demand import Demand, Objective
from narrows.simulate.fleet import Group, rules
from narrows.simulate.requests import Request
from narrows.techniques.serving.sarathi_serve import SarathiServe

# The paper's table 2: median and 90th percentile of prompts and of answers, and the longest request.
CHATS = load(through(1730, 5696), through(415, 834), 8192)
PAPERS = load(through(7059, 12985), through(208, 371), 16384)


def demand(requests: tuple[Request, ...], between: float) -> Demand:
    """Mistral-7B on an A100 for at most 128 requests at a time, as in the paper's artifact."""
    engine = replace(rules("vllm-v1", max_sequences=128), prefix_cache=False, max_tokens=2048)
    group = Group(capture("mistral-7b"), machine("a100-80gb"), engine)
    return Demand(group, requests, (Objective("tbt", 0.99, between), Objective("queue", 0.5, 2.0)))


def strict_capacity(technique: SarathiServe) -> float:
    """Requests per second over those of whole prompts first, chats, 0.1 s between tokens."""
    return capacity_gain(technique, demand(CHATS, 0.1))


def strict_capacity_of_papers(technique: SarathiServe) -> float:
    """Requests per second over those of whole prompts first, long papers, 0.1 s between tokens."""
    return capacity_gain(technique, demand(PAPERS, 0.1))


def relaxed_capacity_of_papers(technique: SarathiServe) -> float:
    """Requests per second over those of whole prompts first, long papers, 0.5 s between tokens."""
    return capacity_gain(technique, demand(PAPERS, 0.5))


def logits(technique: SarathiServe) -> float:
    """The largest difference of a real model's logits after a prompt in pieces and whole, over the largest logit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not technique.pieces:
        return math.inf
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 256, (1, 72))
    with torch.no_grad():
        whole = model(prompt, use_cache=False).logits
        cache, found = None, []
        for piece in prompt.split(16, dim=1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return float((torch.cat(found, 1) - whole).abs().max() / whole.abs().max())
