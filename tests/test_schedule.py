"""The schedule engine, pipeline orders and planners: laws, published figures, orders of another implementation, bad input."""

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.errors import NarrowsError
from narrows.experiments import vocabulary_parallelism as vocabulary
from narrows.simulate.orders import dualpipe_v, gpipe, interlaced, interleaved, one_f_one_b, together
from narrows.simulate.pipeline import Order, Pass, Work
from narrows.simulate.planned import SHAPES, split, v_shaped, zero_bubble
from narrows.simulate.schedule import Task, play
from narrows.simulate.timeline import Timeline

DATA = Path(__file__).parents[2] / "shared" / "data"
sizes = st.integers(1, 6)
seconds = st.floats(0.1, 5.0)


def sound(order: Order, work: Work) -> Timeline:
    """Plays an order and checks what holds of every timeline of a pipeline."""
    timeline = order.play(work)
    ends = {span.name: span.end for span in timeline.spans}
    for lane in timeline.lanes.values():
        spans = [timeline.spans[i] for i in lane]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(spans)), "a rank runs one pass at a time"
    for span in timeline.spans:
        kind, stage, m = span.name
        before = {"F": Pass("F", stage - 1, m), "W": Pass("I", stage, m)}.get(kind, Pass("F", stage, m))
        if before in ends:
            assert ends[before] <= span.start + 1e-9, f"{span.name} runs before {before}"
    for rank, causes in timeline.idle().items():
        assert sum(causes.values()) + timeline.busy_seconds[rank] == pytest.approx(timeline.seconds)
        assert min(causes.values()) >= -1e-9
    path = [timeline.spans[i] for i in timeline.critical_path()]
    assert path[0].start == 0 and path[-1].end == timeline.seconds
    return timeline


@given(sizes, st.integers(1, 8), seconds, seconds, seconds)
def test_gpipe_and_1f1b_have_the_bubble_of_the_closed_form(p: int, m: int, f: float, i: float, w: float) -> None:
    work = Work.of(p, m, f, i, w)
    for order in (gpipe(p, m), one_f_one_b(p, m)):
        assert sound(order, work).bubble == pytest.approx((p - 1) / (m + p - 1))


@given(sizes, st.integers(1, 4), st.integers(1, 4))
def test_chunks_divide_the_bubble(p: int, groups: int, v: int) -> None:
    m = p * groups
    work = Work.of(p * v, m, 1 / v, 1 / v, 1 / v)
    assert sound(interleaved(p, m, v), work).bubble == pytest.approx((p - 1) / (v * m + p - 1))


@given(sizes, st.integers(1, 9))
def test_1f1b_holds_as_many_activations_as_stages_and_gpipe_all(p: int, m: int) -> None:
    work = Work.of(p, m)
    assert one_f_one_b(p, m).play(work).peak_bytes == {rank: min(p - rank, m) for rank in range(p)}
    assert gpipe(p, m).play(work).peak_bytes == dict.fromkeys(range(p), m)


times = st.lists(st.tuples(seconds, seconds, seconds, st.floats(0.5, 2.0)), min_size=1, max_size=5)


@settings(deadline=None)
@given(times, st.integers(1, 10), st.floats(0, 1), st.floats(0, 1), st.floats(1, 3))
def test_zero_bubble_plans_unequal_stages_within_any_limit(
    rows: list[tuple[float, ...]], m: int, message: float, released: float, room: float
) -> None:
    f, i, w, held = zip(*rows, strict=True)
    work = Work.of(len(rows), m, f, i, w, message, held, tuple(h * released for h in held), tuple(h / 3 for h in held))
    limit = room * max(held) * 4 / 3
    timeline = sound(zero_bubble(work, limit), work)
    assert max(timeline.peak_bytes.values()) <= limit * (1 + 1e-6)
    assert timeline.seconds >= max(m * sum(times[:3]) for times in rows) * (1 - 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.integers(1, 12), st.sampled_from(list(SHAPES)), seconds, seconds, seconds)
def test_v_shapes_hold_a_third_a_half_and_all_of_1f1b(p: int, m: int, shape: str, f: float, i: float, w: float) -> None:
    work = Work.of(2 * p, m, f, i, w, 0.0, 0.5)
    peak = max(sound(v_shaped(work, shape=shape), work).peak_bytes.values())
    assert peak <= {"min": (p + 4) // 3, "half": (p + 2) // 2, "zero": p}[shape]


def test_v_shapes_have_the_bubble_of_the_paper() -> None:
    """Qi et al., 2024, table 1, for F = I = W: V-ZB none, V-Half about p / 2m, V-Min about 2p / 3m (times of a step of m)."""
    p, m = 8, 64
    work = Work.of(2 * p, m, 0.5, 0.5, 0.5, held_bytes=0.5)
    extra = {shape: v_shaped(work, shape=shape).play(work).longest_seconds / (3 * m) - 1 for shape in SHAPES}
    assert extra["zero"] == pytest.approx(0, abs=1e-9)
    assert extra["half"] <= p / (2 * m)
    assert extra["min"] <= 2 * p / (3 * m)


def test_a_v_under_a_limit_is_the_fastest_shape_that_fits() -> None:
    work = Work.of(16, 24, 0.5, 0.5, 0.5, held_bytes=0.5)
    found = {limit: v_shaped(work, limit).play(work) for limit in (4, 5, 8)}
    assert all(max(one.peak_bytes.values()) <= limit for limit, one in found.items())
    assert found[4].seconds > found[5].seconds > found[8].seconds
    with pytest.raises(NarrowsError, match="more memory"):
        v_shaped(work, 2)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_the_published_bubble_rates_follow_from_the_published_pass_times() -> None:
    """Qi et al., 2023, tables 9 and 5: 1F1B, ZB-1p and ZB-2p of 12 cases, to the four digits printed.

    ZB-1p and ZB-2p have the memory of p and 2p activations, of which W needs what linear layers read (table 1).
    """
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    with (DATA / "training_measured.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["source"].startswith(("arXiv 2401.10241 Table 5", "arXiv 2401.10241 Table 9")):
                fields = dict(part.strip().replace("=", " ").split(" ", 1) for part in row["note"].split(";")[:2])
                name = fields.get("schedule", row["metric"])
                cases.setdefault((row["model"], row["pp"], fields["m"]), {})[name] = float(row["value"])
    assert len(cases) == 12
    shapes = {"GPT-1.5B": (2304, 24), "GPT-6.2B": (4096, 32), "GPT-14.6B": (5120, 40), "GPT-28.3B": (6144, 48)}
    for (model, stages, microbatches), case in cases.items():
        p, m, (hidden, heads) = int(stages), int(microbatches), shapes[model]
        whole = 34 * hidden + 5 * heads * 1024
        work = Work.of(p, m, case["T_F"], case["T_B"], case["T_W"], case["T_comm"], whole, whole - 32 * hidden)
        for name, order in {
            "1F1B": one_f_one_b(p, m),
            "ZB-1p": zero_bubble(work, p * whole),
            "ZB-2p": zero_bubble(work, 2 * p * whole),
        }.items():
            assert order.play(work).bubble_rate == pytest.approx(case[name], abs=6e-5), (model, m, name)


@pytest.mark.parametrize("p, m", [(2, 4), (4, 8), (4, 11), (5, 13)])
def test_orders_are_those_of_torch(p: int, m: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    other = object.__new__(schedules.ScheduleDualPipeV)
    other.pp_group_size, other._n_microbatches = p, m
    for rank, ours in enumerate(dualpipe_v(p, m).to_actions().values()):
        theirs = [str(part) for one in other._calculate_single_rank_operations(rank) for part in one.sub_actions or (one,)]
        assert ours == theirs
    for chunks in (2, 3):
        other = object.__new__(schedules.ScheduleInterleaved1F1B)
        other.pp_group_size, other.n_local_stages, other._n_microbatches = p, chunks, 2 * p
        other.number_of_rounds, other.microbatches_per_round = 2, p
        for rank, ours in interleaved(p, 2 * p, chunks).to_actions().items():
            assert ours == [str(one) for one in other._calculate_single_rank_operations(rank) if one is not None]


@given(st.integers(1, 5), st.integers(0, 6))
def test_dualpipe_v_runs_every_pass(p: int, more: int) -> None:
    m = 2 * p + more
    sound(dualpipe_v(p, m), Work.of(2 * p, m))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), seconds, seconds, seconds)
def test_a_backward_pass_in_two_parts_is_never_slower(p: int, m: int, f: float, i: float, w: float) -> None:
    work = Work.of(p, m, f, i, w)
    for order in (gpipe(p, m), one_f_one_b(p, m)):
        assert sound(split(order, work), work).longest_seconds <= order.play(work).longest_seconds * (1 + 1e-9)


def test_actions_round_trip() -> None:
    order = v_shaped(Work.of(6, 5), shape="half")
    assert Order.from_actions(order.to_actions()) == order
    assert Order.from_actions([["0F0", "", "0B0"]]).ranks == ((Pass("F", 0, 0), Pass("B", 0, 0)),)
    with pytest.raises(NarrowsError, match="rank 0: '0F' is no pass"):
        Order.from_actions([["0F"]])


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([["0F0", "0B0"], ["1F0"]], "rank 1: it lacks 1B0"),
        ([["0F0", "0I0"], ["1F0", "1B0"]], "rank 0: it lacks 0W0"),
        ([["0F0", "0B0", "0W0"], ["1F0", "1B0"]], "B beside I or W"),
        ([["0F0", "0B0"]], "stage 1: it lacks 1F0"),
        ([["0F0", "0F0", "0B0"], ["1F0", "1B0"]], "0F0 on rank 0: it is there twice"),
        ([["0F0", "0B0", "1F0"], ["1B0"]], "1F0 on rank 0: its stage is on rank 1 too"),
        ([["0F0", "0B0"], ["1F0", "1B0", "1F1"]], "1F1 is on no path"),
        ([["0B0", "0F0"], ["1F0", "1B0"]], "deadlock: 0B0 on rank 0, which waits for 0F0 on rank 0, which waits for 0B0"),
    ],
)
def test_an_order_that_cannot_run_is_refused(rows: list[list[str]], problem: str) -> None:
    with pytest.raises(NarrowsError, match=problem):
        Order.from_actions(rows).play(Work.of(2, 1))


def test_paths_may_skip_and_swap_stages() -> None:
    paths = {0: (0, 2), 1: (1, 0, 2)}
    rows = [["0F0", "0F1", "0B0", "0B1"], ["1F1", "1B1"], ["2F0", "2B0", "2F1", "2B1"]]
    order = Order(Order.from_actions(rows).ranks, paths)
    spans = {str(span.name): span for span in order.play(Work.of(3, 2)).spans}
    assert spans["0F1"].start >= spans["1F1"].end and spans["1B1"].start >= spans["0B1"].end
    with pytest.raises(NarrowsError, match="paths of their own"):
        split(order, Work.of(3, 2))


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: Work.of(0, 1), "0 stages"),
        (lambda: Work.of(2, 1, [1.0]), "1 values for 2 stages"),
        (lambda: interleaved(4, 6, 2), "4 ranks do not divide 6"),
        (lambda: dualpipe_v(4, 7), "7 microbatches for 8 stages"),
        (lambda: v_shaped(Work.of(3, 2)), "3 stages do not lie on a V"),
        (lambda: v_shaped(Work.of(4, 2), shape="w"), "'w' is no shape"),
        (lambda: zero_bubble(Work.of(2, 2, held_bytes=3.0), 2), "one microbatch holds 3 bytes of 2"),
        (lambda: split(Order.from_actions([["0B0", "0F0"]]), Work.of(1, 1)), "0I0 never has what it needs"),
        (lambda: split(Order.from_actions([["0F0", "0B0"]]), Work.of(1, 1), 0.5), "0.5 bytes do not hold 0F0"),
        (lambda: zero_bubble(Work.of(2, 2, working_bytes=1.0), 1.5), "one microbatch holds 2 bytes of 1.5"),
        (lambda: Order.from_actions([["0F0", "0X0", "0B0"]]).play(Work.of(1, 1)), "no seconds for passes of kind 'X'"),
    ],
)
def test_bad_work_is_refused(make: object, problem: str) -> None:
    with pytest.raises(NarrowsError, match=problem):
        make()  # type: ignore[operator]


def test_tasks_of_one_time_go_by_priority_then_place() -> None:
    tasks = [Task(name, "", "link", 1.0, priority=order) for name, order in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("d", 3.0))]
    tasks.append(Task("late", "", "link", 1.0, priority=0.0, needs=((0, 0.0),)))
    started = sorted(play(tasks).spans, key=lambda span: span.start)
    assert [span.name for span in started] == ["a", "b", "c", "late", "d"]


def test_a_task_that_is_ready_when_its_resource_is_freed_does_not_overtake_a_better_one() -> None:
    tasks = [
        Task("first", "", 0, 2.0, priority=0),
        Task("waits", "", 0, 1.0, needs=((3, 0.0),), priority=1),
        Task("comes", "", 0, 1.0, needs=((4, 0.0),), priority=2),
        Task("one", "", None, 1.0),
        Task("two", "", None, 2.0),
    ]
    assert [play(tasks).spans[i].start for i in (0, 1, 2)] == [0, 2, 3]


def test_two_directions_of_a_ring_take_half_the_time() -> None:
    """All-gather of one block from each of n ranks: n - 1 steps one way round; half both ways, each link its own."""

    def ring(n: int, ways: tuple[int, ...]) -> float:
        tasks: list[Task] = []
        at: dict[tuple[int, int, int], int] = {}
        for way in ways:
            for step in range((n - 1) // len(ways)):
                for rank in range(n):
                    needs = ((at[way, step - 1, (rank - way) % n], 0.0),) if step else ()
                    at[way, step, rank] = len(tasks)
                    tasks.append(Task(f"{rank} step {step}", "send", f"{rank}>{(rank + way) % n}", 1.0, needs))
        return play(tasks).seconds

    assert ring(9, (1,)) == 8 and ring(9, (1, -1)) == 4


@pytest.mark.parametrize(
    "task, problem",
    [
        (Task("t", "", 0, -1.0), "t on rank 0: it takes -1.0 s"),
        (Task("t", "", "link", float("nan")), "t on link: it takes nan s"),
        (Task("t", "", None, 1.0, ((3, 0.0),)), "t: it needs task 3 of 1"),
        (Task("t", "", None, 1.0, ((0, -1.0),)), "a need takes -1.0 s"),
        (Task("t", "", None, 1.0, ((0, 0.0),)), "deadlock: t, which waits for t"),
    ],
)
def test_tasks_that_cannot_run_are_refused(task: Task, problem: str) -> None:
    with pytest.raises(NarrowsError, match=problem):
        play([task])


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_measured_stage_times_give_the_measured_iteration() -> None:
    """Eight A100, 1F1B, 128 microbatches: the measured iteration within 1 % on average."""
    errors = []
    with (DATA / "pipeline_stage_times.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["method"] in ("base", "redis"):
                forward, backward = ([float(us) for us in row[kind].split()] for kind in ("F_us", "B_us"))
                work = Work.of(len(forward), int(row["microbatches"]), forward, backward, 0.0)
                ours = one_f_one_b(work.stages, work.microbatches).play(work).seconds
                errors.append(abs(ours / 1e3 / float(row["iteration_ms"]) - 1))
    assert len(errors) == 16 and sum(errors) / len(errors) <= 0.01


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_measured_shares_of_the_vocabulary_give_the_measured_iteration() -> None:
    """The same with a pass S for which all stages stop; messages take what explains the runs without it."""
    errors = []
    for run in (run for run in vocabulary.runs() if run.method == "interlaced"):
        order = interlaced(run.work.stages, run.work.microbatches)
        work = vocabulary.slower(run.work, vocabulary.message_seconds())
        errors.append(abs(order.play(work, together(order)).seconds / run.seconds - 1))
    assert len(errors) == 8 and sum(errors) / len(errors) <= 0.01


@pytest.mark.parametrize("stages, microbatches", [(2, 3), (4, 16), (8, 32)])
def test_interlaced_passes_hold_half_as_many_microbatches_more(stages: int, microbatches: int) -> None:
    """Lin et al.: up to 1.5 times the activations of 1F1B; S runs on all ranks at once."""
    order = interlaced(stages, microbatches)
    work = replace(Work.of(stages, microbatches), seconds={**Work.of(stages, 1).seconds, "S": (0.5,) * stages})
    timeline = order.play(work, together(order))
    assert max(timeline.peak_bytes.values()) <= 1.5 * stages + 1
    for m in range(microbatches):
        assert len({span.start for span in timeline.spans if span.name[0] == "S" and span.name[2] == m}) == 1
