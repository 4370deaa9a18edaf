"""Small things to learn that the claims of training techniques share."""

from functools import cache

import torch
from torch import Tensor

from narrows import samples


@cache
def characters(context: int) -> tuple[Tensor, int]:
    """Rows of `context` characters of the sample text and the one after them, in order, and how many symbols there are."""
    prose = samples.text()[1][:400_000].lower()
    alphabet = {c: i for i, c in enumerate(sorted(set(prose)))}
    return torch.tensor([alphabet[c] for c in prose]).unfold(0, context + 1, 1), len(alphabet)
