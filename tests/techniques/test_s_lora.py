"""S-LoRA: against merged copies beside each other, what an adapter adds, and refusals."""

from dataclasses import replace

import pytest

from narrows.capture import capture
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.experiments.s_lora import demand, throughput
from narrows.simulate.demand import Deployment
from narrows.step import Step
from narrows.techniques.serving.s_lora import SLoRA


def test_it_is_faster_than_five_copies_that_share_a_device() -> None:
    """The paper's second comparison: up to 4x; 30 % below it at the least."""
    wanted = demand()
    group, copies = wanted.group, 5
    left = group.room() - (copies - 1) * group.graph.weight_bytes / (group.token_bytes() * group.rules.block)
    part = group.machine.scaled(compute=1 / copies, bandwidth=1 / copies)
    packed = wanted.play(Deployment(replace(group, machine=part, replicas=copies, blocks=int(left / copies))))
    assert left < group.room() / 5  # a sixth copy would leave nothing
    assert throughput(SLoRA(), 5) > 2.8 * packed.requests / packed.seconds


def test_an_adapter_adds_its_weights_and_products() -> None:
    graph, step = capture("llama-2-7b"), Step.decode(1, 100)
    found = SLoRA(adapters=3, rank=16).graph(graph, 2)
    each = 32 * 4 * 16 * (4096 + 4096)  # layers, adapted products, rank, inputs and outputs
    assert found.parameters - graph.parameters == 2 * each
    assert total(found, step).flop - total(graph, step).flop == pytest.approx(2 * each)


def test_it_says_what_it_cannot_adapt() -> None:
    wanted = demand()
    assert SLoRA().check(wanted) is True
    refused = SLoRA().check(replace(wanted, group=replace(wanted.group, graph=capture("falcon-7b"))))
    assert not refused and "no products named" in refused.reason  # type: ignore[union-attr]
    with pytest.raises(NarrowsError, match="rank"):
        SLoRA(rank=0)
