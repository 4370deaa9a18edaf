"""What the study of FP8 formats claims: the formats' grids, less loss than int8 where activations have outliers, coverage."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from narrows import samples
from narrows.experiments.perplexity import language_model
from narrows.experiments.steady import one_thread
from narrows.modules.number_formats import NumberFormat
from narrows.techniques.quantization.fp8_ptq_e5m2_e4m3_e3m4 import FP8PTQ

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = Mapping[str, Tensor]

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
    return _language(technique)[0] / _language(technique.baseline())[0]


@one_thread()
def coverage(technique: FP8PTQ) -> float:
    """Share of six models, of language, sentences, antibodies and images, that keep their measure."""
    measures = (_next_tokens, _sentences, _residues, _photographs, _digits, _digits_by_attention)
    kept = [measure(technique) for measure in measures]
    return sum(share >= KEPT for share in kept) / len(kept)


def _next_tokens(technique: FP8PTQ) -> float:
    """Held-out tokens that SmolLM2-135M foresees, over those it foresees in fp32."""
    return _language(technique)[1]


@cache
@one_thread()
def _language(technique: FP8PTQ | None) -> tuple[float, float]:
    """(nats per held-out token that it adds to SmolLM2-135M, tokens foreseen over those in fp32); of None the plain figures."""
    import torch

    model, seen, held_out = language_model()
    network = technique.apply(deepcopy(model), seen) if technique else model
    nats, right = 0.0, 0
    for batch in held_out:
        with torch.no_grad():
            found = network(**batch, labels=batch["input_ids"])
        nats += float(found.loss) / len(held_out)
        right += int((found.logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]).sum())
    if technique is None:
        return nats, right
    plain_nats, plain_right = _language(None)
    return nats - plain_nats, right / plain_right


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


def _residues(technique: FP8PTQ) -> float:
    """Hidden residues of a heavy chain that AntiBERTy tells right after calibration on a light one, over those in fp32."""
    model, tokenizer = samples.antiberty()
    heavy, light = samples.antibodies(tokenizer)
    inputs, labels = {"input_ids": heavy["input_ids"]}, heavy["labels"]
    return _right(model, inputs, labels, technique, [{"input_ids": light["input_ids"]}])


def _photographs(technique: FP8PTQ) -> float:
    """Enlarged digits that EfficientNet-Lite0 names as in fp32; its last layer alone is linear, its convolutions stay."""
    import torch

    images = torch.nn.functional.interpolate(samples.digits()[0][:24], size=224).repeat(1, 3, 1, 1) * 2 - 1
    model = samples.efficientnet()
    with torch.no_grad():
        named = model(images).argmax(-1)
    return _right(model, {"inputs": images}, named, technique, [{"inputs": images[:8]}])


def _digits(technique: FP8PTQ) -> float:
    """Held-out digits that a classifier of linear layers tells right, over those it does in fp32."""
    images, labels = samples.digits()
    flat = images.flatten(1)
    return _right(_classifier(), {"input": flat[TRAINED:]}, labels[TRAINED:], technique, [{"input": flat[:512]}])


def _digits_by_attention(technique: FP8PTQ) -> float:
    """The same of a vision transformer."""
    images, labels = samples.digits()
    seen = [{"pixel_values": images[:512]}]
    return _right(_vision_transformer(), {"pixel_values": images[TRAINED:]}, labels[TRAINED:], technique, seen)


def _right(model: "nn.Module", inputs: "Batch", labels: "Tensor", technique: FP8PTQ, seen: "Sequence[Batch]") -> float:
    """Right answers after a technique, over those before it; the model stays as it is."""
    import torch

    def count(network: "nn.Module") -> int:
        with torch.no_grad():
            found = network(**inputs)
        return int((getattr(found, "logits", found).argmax(-1) == labels).sum())

    return count(technique.apply(deepcopy(model), seen)) / count(model)


@cache
def _classifier() -> "nn.Module":
    """Four linear layers that have seen most of the digits three times; change only copies of it."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    widths = (784, 256, 256, 256, 10)
    linears = [nn.Linear(k, n) for k, n in pairwise(widths)]
    for linear in linears:
        nn.init.kaiming_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
    model = nn.Sequential(*(layer for linear in linears for layer in (linear, nn.ReLU())))[:-1]
    return _trained(model, lambda images: model(images.flatten(1)))


@cache
def _vision_transformer() -> "nn.Module":
    """Three blocks 64 wide over four patches and a class token, trained alike; change only copies of it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28, patch_size=14, num_channels=1, num_labels=10, hidden_size=64, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
    return _trained(model, lambda images: model(pixel_values=images).logits)


def _trained(model: "nn.Module", logits: "Callable[[Tensor], Tensor]") -> "nn.Module":
    """A model of digits after three rounds of those to train on."""
    import torch

    images, labels = samples.digits()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for first in (*range(0, TRAINED, 64),) * 3:
        loss = torch.nn.functional.cross_entropy(logits(images[first : first + 64]), labels[first : first + 64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
