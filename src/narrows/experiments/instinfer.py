"""What InstInfer claims, in the serving simulator: OPT-13B on an A6000, prompts and answers of 1,024 tokens in one batch."""

import math
from dataclasses import replace
from functools import cache

from narrows import samples
from narrows.capture import capture
from narrows.machine import machine
from narrows.simulate.demand import Demand
from narrows.simulate.fleet import Group, rules
from narrows.simulate.requests import Request
from narrows.techniques.kv_cache.instinfer import LINK_BYTES_PER_S, PAGE, InstInfer

LENGTH = 1024


@cache
def demand(batch: int) -> Demand:
    """One batch; the A6000 is an A40 with memory of 768 GB/s."""
    on = machine("a40").scaled(bandwidth=768 / 696)
    group = Group(capture("opt-13b"), on, rules("static", max_sequences=batch))
    return Demand(group, (Request(0, LENGTH, LENGTH),) * batch)


def throughput(technique: InstInfer, batch: int) -> float:
    """Tokens of answers per second."""
    seen = demand(batch).play(technique.deploy(demand(batch)))
    return seen.tokens / seen.seconds


def dense(technique: InstInfer) -> float:
    """Throughput over that of the path through files, 64 sequences."""
    return throughput(technique, 64) / throughput(technique.baseline(), 64)


def sparse(technique: InstInfer) -> float:
    """Throughput with part of the cache read, 256 sequences, over that of the path through files, 64 sequences."""
    ours = replace(technique, sparse=True) if technique.inside else technique
    return throughput(ours, 256) / throughput(technique.baseline(), 64)


def over_the_link(technique: InstInfer) -> float:
    """Throughput over that of a drive whose keys and values cross its link, 64 sequences."""
    return throughput(technique, 64) / throughput(replace(technique.baseline(), file_gb_per_s=LINK_BYTES_PER_S / 1e9), 64)


def pages(technique: InstInfer) -> float:
    """Keys and values over the share of them that the pages which count hold, in a real model's attention."""
    import torch

    if not technique.inside:
        return math.nan
    model, tokenizer = samples.smollm2()
    model.set_attn_implementation("eager")
    ids = samples.token_batches(tokenizer, 2, LENGTH)[1]["input_ids"][:1]
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    found = []
    for weights in attentions:  # [1, heads, LENGTH, LENGTH]: of the last tokens, that see nearly all
        counting = weights[:, :, -8:].topk(LENGTH // 8, -1).indices // PAGE
        hit = torch.zeros(*counting.shape[:-1], LENGTH // PAGE).scatter_(-1, counting, 1.0)
        found.append(float(hit.mean()))
    return 1 / replace(technique, sparse=True, pages=sum(found) / len(found)).read
