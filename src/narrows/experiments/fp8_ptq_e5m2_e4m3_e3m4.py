"""What the study of FP8 formats claims: the formats' grids, and less loss than int8 where activations have outliers."""

from narrows.experiments.perplexity import nats_of
from narrows.modules.number_formats import NumberFormat
from narrows.techniques.quantization.fp8_ptq_e5m2_e4m3_e3m4 import FP8PTQ

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
