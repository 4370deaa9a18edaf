"""Averaging a vector over ranks in one bit per number: signs and scales, with the rounding error carried to the next call.

Every rank serves one piece of the vector: an all-to-all brings it everybody's version of that piece, and an
all-gather gives its average back. Both ways carry signs, eight to a byte, and one fp32 scale a chunk.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from narrows.modules.sign_layout import Layout


def compress(values: Tensor, real: Tensor, chunks: int) -> Tensor:
    """[n, piece] fp32 as [n, message_bytes] uint8: signs, and the mean magnitude of each chunk's `real` numbers.

    The mean magnitude is the scale with the least squared error.
    """
    n = values.shape[0]
    counted = real.view(n, chunks, -1).sum(-1).clamp_(min=1)
    scales = (values.abs() * real).view(n, chunks, -1).sum(-1) / counted
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=values.device)
    signs = ((values >= 0).view(n, -1, 8) * weights).sum(-1, dtype=torch.uint8)
    return torch.cat([signs, scales.contiguous().view(torch.uint8).view(n, -1)], dim=1)


def decompress(message: Tensor, real: Tensor, chunks: int) -> Tensor:
    """What `compress` made, as [n, piece] fp32 again; padding is zero."""
    n, signs = message.shape[0], message[:, : message.shape[1] - 4 * chunks]
    scales = message[:, signs.shape[1] :].reshape(-1).clone().view(torch.float32).view(n, chunks, 1)
    places = torch.arange(8, dtype=torch.uint8, device=message.device)
    bits = (signs.unsqueeze(-1) >> places) & 1
    return ((bits.view(n, chunks, -1).float() * 2 - 1) * scales).view(n, -1) * real


class SignMean:
    """The average of a vector over a process group in one bit per number, with error feedback at worker and server.

    `worker_error` [ranks, piece] is what this rank's signs left out, `server_error` [1, piece] what the signs of the
    piece that it serves left out; with `feedback=False` both are forgotten (naive sign compression).
    """

    def __init__(self, elements: int, chunk: int, feedback: bool, group: dist.ProcessGroup, like: Tensor) -> None:
        self.layout = Layout(elements, dist.get_world_size(group), chunk)
        self.feedback, self.group = feedback, group
        rank = dist.get_rank(group)
        ranks, piece = self.layout.ranks, self.layout.piece  # 1.0 for a number that is real, 0.0 for padding
        self._real = (torch.arange(ranks * piece, device=like.device) < elements).float().view(ranks, piece)
        self._mine = self._real[rank : rank + 1]
        self.worker_error = torch.zeros_like(self._real)
        self.server_error = torch.zeros_like(self._mine)

    def __call__(self, vector: Tensor) -> Tensor:
        """[elements] fp32 of this rank as the compressed average over all; the same bits on every rank."""
        cut, ranks = self.layout, self.layout.ranks
        values = torch.zeros_like(self._real)
        values.view(-1)[: cut.elements] = vector
        values += self.worker_error
        sent = compress(values, self._real, cut.chunks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        mine = self._mine.expand(ranks, -1)
        served = decompress(received, mine, cut.chunks).mean(0, keepdim=True) + self.server_error
        answer = compress(served, self._mine, cut.chunks)
        if self.feedback:
            self.worker_error = values - decompress(sent, self._real, cut.chunks)
            self.server_error = served - decompress(answer, self._mine, cut.chunks)
        answers = torch.empty_like(sent)
        dist.all_gather(list(answers), answer[0], group=self.group)
        return decompress(answers, self._real, cut.chunks).view(-1)[: cut.elements]

    @property
    def sent_bytes(self) -> int:
        """What one rank sends in one call: its versions of the others' pieces, then its own average to each of them."""
        return 2 * (self.layout.ranks - 1) * self.layout.message_bytes

    def errors(self) -> Iterator[tuple[str, Tensor]]:
        yield "worker_error", self.worker_error
        yield "server_error", self.server_error


def sign_mean(vectors: Tensor, errors: Tensor, server_error: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Plain reference of SignMean on one device: [ranks, elements] and the errors before, as the average and the errors after.

    errors [ranks, elements] at the workers, server_error [elements]; elements divide by 8 * ranks and by whole chunks.
    """

    def rounded(values: Tensor) -> Tensor:
        cut = values.reshape(*values.shape[:-1], -1, chunk)
        scale = cut.abs().mean(-1, keepdim=True)
        return torch.where(cut >= 0, scale, -scale).reshape(values.shape)

    values = vectors + errors
    sent = rounded(values)
    served = sent.mean(0) + server_error
    answer = rounded(served)
    return answer, values - sent, served - answer
