"""One slow device or link: the closed form agrees with the step as it is played, and all others wait for it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.layout import Layout
from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.simulate.straggler import Slow, played, straggled
from narrows.simulate.training import step_seconds

SELENE = cluster("selene")
GPT = decoder(Shape(4096, 32, 32), 2048)
LAYOUTS = tuple(
    map(
        Layout.parse,
        (
            "data=16,accumulate=4",
            "tensor=8,sequence=true,data=8",
            "pipeline=4,accumulate=16,data=4",
            "pipeline=8,accumulate=8,data=4",
            "pipeline=4,accumulate=16,chunks=2,data=4,shard=1",
            "tensor=8,pipeline=4,accumulate=16",
            "pipeline=8,accumulate=32,schedule=gpipe",
            "pipeline=8,accumulate=32,schedule=zb-v",
        ),
    )
)


@settings(max_examples=30, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), kind=st.sampled_from(["device", "link"]), speed=st.floats(0.1, 1))
def test_the_closed_form_is_near_what_is_played(layout: Layout, kind: str, speed: float) -> None:
    slow = Slow(kind, speed)
    closed = sum(straggled(GPT, SELENE, layout, 2048, slow).values())
    whole = played(GPT, SELENE, layout, 2048, slow).seconds
    assert whole == pytest.approx(closed, rel=0.035)
    usual = sum(step_seconds(GPT, SELENE, layout, 2048).values())
    assert usual * 0.9999 <= closed <= usual / speed * 1.0001


@settings(max_examples=20, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), speed=st.floats(0.5, 1))
def test_a_slow_device_takes_what_it_takes_longer_for_its_own_work(layout: Layout, speed: float) -> None:
    """A synchronous step grows by the slow stage's own compute and no other's."""
    usual, late = step_seconds(GPT, SELENE, layout, 2048), straggled(GPT, SELENE, layout, 2048, Slow("device", speed))
    for cause in ("forward", "backward"):
        assert late[cause] == pytest.approx(usual[cause] / speed, rel=0.02)
    for cause in ("bubble", "host"):
        assert late[cause] == usual[cause], cause
    for cause in ("pipeline", "tensor"):  # what a collective and a message do on the device is a little slower too
        assert late[cause] == pytest.approx(usual[cause], rel=0.05), cause


def test_nothing_is_slow_at_full_speed_and_slower_is_never_faster() -> None:
    for layout in LAYOUTS:
        assert straggled(GPT, SELENE, layout, 2048, Slow("device", 1.0)) == step_seconds(GPT, SELENE, layout, 2048)
        for kind in ("device", "link"):
            steps = [sum(straggled(GPT, SELENE, layout, 2048, Slow(kind, s)).values()) for s in (0.2, 0.4, 0.8, 1.0)]
            assert steps == sorted(steps, reverse=True)


def test_the_other_replica_waits_for_the_exchange() -> None:
    layout = Layout.parse("pipeline=4,accumulate=16,data=4")
    found = played(GPT, SELENE, layout, 2048, Slow("device", 0.5))
    last = {rank: [found.spans[i] for i in found.lanes[rank]] for rank in found.ranks}
    for rank in range(4):
        mine, others = last[rank], last[rank + 4]
        assert mine[-1].kind == others[-1].kind == "update"
        assert mine[-1].start == others[-1].start
    assert last[3][-2].end > last[7][-2].end * 1.5


@pytest.mark.parametrize("text", ["device", "device=0", "device=1.5", "disk=0.5", "link=fast"])
def test_what_is_no_straggler_is_refused(text: str) -> None:
    with pytest.raises(NarrowsError, match="slow"):
        Slow.parse(text)
