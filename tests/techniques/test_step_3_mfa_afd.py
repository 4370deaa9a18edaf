"""Step-3's analysis: the table of its paper from bundled configs, what pools must keep, and refusals."""

from dataclasses import replace

import pytest

from narrows.capture import capture
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.experiments.step_3_mfa_afd import eight_bits, step3
from narrows.graph import Graph
from narrows.machine import machine
from narrows.step import Step
from narrows.techniques.serving.step_3_mfa_afd import Step3, parts

H800 = machine("h800")


@pytest.mark.parametrize(
    ("graph", "cache_bytes", "attention", "linear", "ffn"),
    [
        (step3(), 2.56e8, 3.27e10, 2.07e10, 5.33e10),
        (eight_bits(capture("qwen3-235b-a22b")), 7.89e8, 2.52e10, 1.34e10, 2.84e10),
        (eight_bits(capture("deepseek-v3")), 2.88e8, 1.47e11, 2.28e10, 4.84e10),
    ],
)
def test_parts_are_those_of_the_paper_at_8k(
    graph: Graph, cache_bytes: float, attention: float, linear: float, ffn: float
) -> None:
    work = {name: total(part, Step.decode(1, 8191)) for name, part in parts(graph).items()}
    assert work["attention"].cache_bytes == pytest.approx(cache_bytes, rel=0.01)
    assert work["attention"].flop == pytest.approx(attention, rel=0.06)  # latent attention: one product 1088 wide for 1152
    assert work["linear"].flop == pytest.approx(linear, rel=0.12)  # the absorbed product counts with latent attention here
    assert work["ffn"].flop == pytest.approx(ffn, rel=0.02)


def test_pools_keep_the_limit_and_more_time_never_serves_less() -> None:
    rates = []
    for tpot in (0.03, 0.05, 0.1):
        found = Step3(tpot=tpot).pools(step3(), H800, 8192, instances=6)
        assert found.tpot <= tpot and found.attention + found.ffn == 6
        assert found.rate == pytest.approx(found.batch / found.tpot / 48)
        rates.append(found.rate)
    assert rates == sorted(rates)


def test_a_second_machine_never_costs_more() -> None:
    one, other = replace(H800, price_per_hour=2.0), replace(machine("h20"), price_per_hour=0.8)
    step = Step.decode(1, 32768)
    alone = min(Step3().price(step3(), [m], step)[0] for m in (one, other))
    usd, where = Step3().price(step3(), [one, other], step)
    assert usd < alone
    assert where == {"attention": "h20", "ffn": "h800"}


def test_reading_of_a_dense_model() -> None:
    found = Step3(other="h20").measure(capture("llama-3.1-70b"), H800, Step.decode(1, 4096)).values
    assert found["flop_per_cache_byte"] == pytest.approx(8.0)  # 64 heads over 8, a multiply-add, 16 bits
    assert found["tokens_per_device"] > 0
    assert Step3().measure(capture("bert-base"), H800, Step.forward(8, 128)).values["tokens_per_device"] == 0


def test_it_says_what_is_missing() -> None:
    with pytest.raises(NarrowsError, match="attention"):
        parts(Graph("none", tuple(op for op in step3() if op.kind != "attention")))
    with pytest.raises(NarrowsError, match="no price"):
        Step3().price(step3(), [replace(H800, price_per_hour=None)], Step.decode(1, 4096))
    with pytest.raises(NarrowsError, match="s a token"):
        Step3(tpot=1e-6).pools(step3(), H800, 4096)
    with pytest.raises(NarrowsError, match="tpot"):
        Step3(tpot=0)
