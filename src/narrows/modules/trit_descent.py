"""One plane of trits for a weight such that the outputs change least, for inputs like those of calibration data."""

import torch
from torch import Tensor

from narrows.modules.linears import Planes
from narrows.modules.planes import Fit, fit

DAMPING = 0.01  # of the mean square of an input, added to every input's: rare inputs must not take all of the error


def descended(weight: Tensor, gram: Tensor, form: Planes, rounds: int) -> Fit:
    """Trits [1, N, K] and scales [1, N, G] of a weight [N, K], given the sum over tokens of x^T x [K, K] of its inputs.

    It starts from the trits nearest to the weights. In a round each input's trits, and then each group's scales, go to where
    the squared error of the outputs is least while all others stay: it never rises. `errors` has it at the start and after
    each round; the last round is the first that takes less than a thousandth of it.
    """
    weight, group = weight.detach().float(), form.group
    outputs, inputs = weight.shape
    start = fit(weight.reshape(-1, group), form)
    trits, scale = start.planes[0].view(outputs, inputs).float(), start.scale[0].view(outputs, -1)
    gram = gram.float() + DAMPING * gram.diagonal().mean().clamp(min=1e-12) * torch.eye(inputs)
    change = trits * scale.repeat_interleave(group, 1) - weight
    pull = change @ gram  # half of the error's gradient
    errors = [float((change * pull).sum())]
    for _ in range(rounds):
        for k in range(inputs):
            size, old = scale[:, k // group], trits[:, k].clone()
            trits[:, k] = (old - pull[:, k] / gram[k, k] / size).round_().clamp_(-1, 1)
            pull.addr_((trits[:, k] - old) * size, gram[k])
        for g in range(inputs // group):
            here = slice(g * group, (g + 1) * group)
            along = trits[:, here]
            bend = ((along @ gram[here, here]) * along).sum(1)
            best = (scale[:, g] - (pull[:, here] * along).sum(1) / bend.clamp(min=1e-30)).bfloat16().float()
            better = torch.where((best > 0) & (bend > 0), best, scale[:, g])
            pull += (better - scale[:, g])[:, None] * along @ gram[here]
            scale[:, g] = better
        change = trits * scale.repeat_interleave(group, 1) - weight
        pull = change @ gram  # anew: sums of many updates drift
        errors.append(float((change * pull).sum()))
        if errors[-1] > (1 - 1e-3) * errors[-2]:
            break
    return Fit(trits.to(torch.int8)[None], scale[None], tuple(errors))
