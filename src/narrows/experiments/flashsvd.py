"""What FlashSVD claims, on two layers of BERT-Base's shapes: the same function, and the peak that the allocator saw."""

import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

from narrows.experiments.steady import one_thread
from narrows.techniques.low_rank_codebook_sharing.flashsvd import FlashSVD

SEQUENCES, TOKENS = 2, 256


@cache
def _model() -> Any:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(num_hidden_layers=2)).eval()


@cache
def _changed(technique: FlashSVD) -> Any:
    return technique.apply(deepcopy(_model()), [])


def _stream() -> Any:
    import torch

    return torch.randn(SEQUENCES, TOKENS, 768, generator=torch.Generator().manual_seed(1))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that a call had allocated at once, beyond those allocated before it, as torch's allocator tells."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            result = work()  # kept alive, as the caller of a layer keeps what it gives
    changes = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    held = most = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


def _saved(technique: FlashSVD, work: Callable[[Any, Any], object]) -> float:
    ours, unfused = (_changed(t) for t in (technique, technique.baseline()))
    x = _stream()
    return 1 - peak_bytes(lambda: work(ours, x)) / peak_bytes(lambda: work(unfused, x))


@one_thread()
def peak_activation_saved(technique: FlashSVD) -> float:
    """Share of the encoder's peak activation memory that goes, against the same factors run layer by layer."""
    return _saved(technique, lambda model, x: model.encoder(x))


@one_thread()
def transient_saved(technique: FlashSVD) -> float:
    """Share of what a feed-forward block allocates at its peak that goes, against the same factors run layer by layer."""

    def feed_forward(model: Any, x: Any) -> object:
        layer = model.encoder.layer[0]
        inside = layer.intermediate(x)
        return inside if inside.shape == x.shape else layer.output.dense(inside)  # a streamed one narrows again itself

    return _saved(technique, feed_forward)


@one_thread()
def same_as_unfused(technique: FlashSVD) -> float:
    """Largest change of an output of BERT with padding, relative to the largest; NaN where nothing is streamed."""
    import torch

    ours, unfused = (_changed(t) for t in (technique, technique.baseline()))
    ids = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, TOKENS // 2 :] = 0
    with torch.inference_mode():
        a, b = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (ours, unfused))
    same_modules = [type(m) for m in ours.modules()] == [type(m) for m in unfused.modules()]
    return math.nan if same_modules else float((a - b).abs().max() / b.abs().max())
