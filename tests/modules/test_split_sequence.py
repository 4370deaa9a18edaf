"""What devices that share a sequence send, against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.capture import capture
from narrows.machine import machine
from narrows.modules.context import zigzag
from narrows.modules.split_sequence import exchanged, passed, share
from narrows.step import Step

LLAMA, LAYERS, WIDTH, HEADS = capture("llama-2-7b"), 32, 4096, 32
DEVICE = machine("a100-80gb")


@pytest.mark.parametrize("devices", [2, 8, 32])
def test_ring_and_ulysses_send_what_their_papers_count(devices: int) -> None:
    tokens = 4096
    own, two = tokens // devices * WIDTH * LAYERS, 2  # numbers of a device's keys; bytes each
    ring = exchanged(LLAMA, DEVICE, Step.train(1, tokens), devices, "ring")
    assert ring.sent_bytes == pytest.approx((devices - 1) * own * (2 + 4) * two)  # k and v; and their gradients on the way back
    ulysses = exchanged(LLAMA, DEVICE, Step.train(1, tokens), devices, "ulysses")
    assert ulysses.sent_bytes == pytest.approx((1 - 1 / devices) * own * (4 + 4) * two)  # q, k, v, o, and their gradients
    assert ring.seconds > 0


@pytest.mark.parametrize(("by", "states"), [("gather", 7), ("scan", 1), ("chain", 1), ("none", 0)])
def test_states_are_counted_whatever_the_length(by: str, states: int) -> None:
    for tokens in (1024, 65536):
        sent = passed(LLAMA, DEVICE, Step.train(1, tokens), 8, by)
        assert sent.sent_bytes == pytest.approx(states * 2 * LAYERS * HEADS * 128 * 128 * 2)


def test_a_machine_without_a_link_has_bytes_and_no_seconds() -> None:
    found = exchanged(LLAMA, replace(DEVICE, links=()), Step.train(1, 1024), 2, "ring")
    assert found.sent_bytes > 0
    assert math.isnan(found.seconds)


@settings(deadline=None, max_examples=50)
@given(tokens=st.integers(1, 10**6), devices=st.integers(1, 64))
def test_shares_hold_every_token(tokens: int, devices: int) -> None:
    own = float(share(Step.train(3, tokens), devices)["tokens"])
    assert tokens * 3 <= own * devices < (tokens + devices) * 3


@settings(deadline=None, max_examples=50)
@given(ranks=st.integers(1, 8), part=st.integers(1, 5))
def test_zigzag_parts_are_the_sequence_and_their_work_is_even(ranks: int, part: int) -> None:
    parts = zigzag(2 * ranks * part, ranks)
    assert torch.equal(parts.flatten().sort().values, torch.arange(2 * ranks * part))
    assert len({int(row.sum()) for row in parts}) == 1
