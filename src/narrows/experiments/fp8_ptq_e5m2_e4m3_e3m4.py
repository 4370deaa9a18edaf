"""What the study of FP8 formats claims: the formats' grids, less loss than int8 where activations have outliers, coverage."""

from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.experiments.perplexity import language_model, nats_of
from narrows.experiments.steady import one_thread
from narrows.modules.number_formats import NumberFormat
from narrows.techniques.quantization.fp8_ptq_e5m2_e4m3_e3m4 import FP8PTQ

if TYPE_CHECKING:
    from torch import Tensor, nn

KEPT = 0.99  # of the measure of the plain model
TRAINED = 8000  # digits; the others are held out
ENDS = (30.0, 2.0**-6)  # of e3m4: the largest number and the smallest above 0, with a bias of 3 and one NaN


def same_bits(technique: FP8PTQ) -> float:
    """Share of codes and of rounded numbers that are those of torch's fp8 types; 0 where the format is none of the three."""
    import torch

    from narrows.modules.coded_linear import encoded, rounded, table

    theirs = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    e3m4 = table(NumberFormat.parse("e3m4"))
    if technique.format not in (*theirs, "e3m4") or (float(e3m4.nan_to_num(0).max()), float(e3m4[e3m4 > 0].min())) != ENDS:
        return 0.0
    numbers = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    numbers *= torch.logspace(-6, 5, 50_000)
    shares = []
    for name, kind in theirs.items():
        form = NumberFormat.parse(name)
        reference = torch.arange(256, dtype=torch.uint8).view(kind).float()
        shares.append(((table(form) == reference) | (table(form).isnan() & reference.isnan())).float().mean())
        inside = numbers.clamp(-form.largest, form.largest)
        shares.append((encoded(rounded(inside, form), form) == inside.to(kind).view(torch.uint8)).float().mean())
    return float(min(shares))


def loss_over_int8(technique: FP8PTQ) -> float:
    """Nats added, over those added by 8-bit integers at a scale and a zero for all inputs."""
    return nats_of(technique) / nats_of(technique.baseline())


@one_thread()
def coverage(technique: FP8PTQ) -> float:
    """Share of three models, of language, sentences and images, that keep their measure."""
    kept = [_next_tokens(technique), _sentences(technique), _digits(technique)]
    return sum(share >= KEPT for share in kept) / len(kept)


def _next_tokens(technique: FP8PTQ) -> float:
    """Held-out tokens that SmolLM2-135M foresees, over those it foresees in fp32."""
    import torch

    model, seen, held_out = language_model()

    def right(network: Any) -> int:
        with torch.no_grad():
            guesses = [(network(**batch).logits[:, :-1].argmax(-1), batch["input_ids"][:, 1:]) for batch in held_out]
        return sum(int((guess == truth).sum()) for guess, truth in guesses)

    return right(technique.apply(deepcopy(model), seen)) / right(model)


def _sentences(technique: FP8PTQ) -> float:
    """Mean cosine of MiniLM's embeddings of held-out sentences to those in fp32."""
    import torch

    model, tokenizer = samples.minilm()
    texts = samples.token_batches(tokenizer, 24, 64)
    held_out = {"input_ids": torch.cat([batch["input_ids"] for batch in texts[16:]])}

    def embedded(network: Any) -> "Tensor":
        with torch.no_grad():
            mean: Tensor = network(**held_out).last_hidden_state.mean(1)
        return mean

    before = embedded(model)
    return float(torch.cosine_similarity(before, embedded(technique.apply(model, texts[:16]))).mean())


def _digits(technique: FP8PTQ) -> float:
    """Held-out digits that a classifier tells right, over those it does in fp32."""
    import torch

    images, labels = samples.digits()

    def right(network: "nn.Module") -> int:
        with torch.no_grad():
            return int((network(images[TRAINED:].flatten(1)).argmax(-1) == labels[TRAINED:]).sum())

    model = _classifier()
    return right(technique.apply(deepcopy(model), [{"input": images[:512].flatten(1)}])) / right(model)


@cache
def _classifier() -> "nn.Module":
    """Four linear layers that have seen most of the digits three times; change only copies of it."""
    import torch
    from torch import nn

    images, labels = samples.digits()
    generator = torch.Generator().manual_seed(0)
    widths = (784, 256, 256, 256, 10)
    linears = [nn.Linear(k, n) for k, n in pairwise(widths)]
    for linear in linears:
        nn.init.kaiming_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
    model = nn.Sequential(*(layer for linear in linears for layer in (linear, nn.ReLU())))[:-1]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for first in (*range(0, TRAINED, 64),) * 3:
        loss = nn.functional.cross_entropy(model(images[first : first + 64].flatten(1)), labels[first : first + 64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
