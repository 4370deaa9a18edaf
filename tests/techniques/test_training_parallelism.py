"""Pipeline techniques beyond their claims: cutting a network, running orders on modules, refusals and bad options."""

from dataclasses import replace

import pytest

from narrows.capture import capture
from narrows.errors import NarrowsError
from narrows.machine import machine
from narrows.simulate.orders import dualpipe_v, interleaved
from narrows.simulate.pipeline import Order, Work
from narrows.simulate.planned import v_shaped, zero_bubble
from narrows.simulate.stages import cut
from narrows.step import Step
from narrows.technique import Schedules
from narrows.techniques.training_parallelism.gpipe import GPipe
from narrows.techniques.training_parallelism.skippipe import SkipPipe
from narrows.techniques.training_parallelism.two_bp import TwoBP
from narrows.techniques.training_parallelism.vocabulary_parallelism import VocabularyParallelism


def test_a_cut_keeps_all_work_and_balances_it() -> None:
    graph, step = capture("llama-2-7b"), Step.train(1, 512)
    whole = cut(graph, machine("a100-80gb"), step, 1, 4)
    parts = cut(graph, machine("a100-80gb"), step, 4, 4)
    for kind in "FIWB":
        assert sum(parts.of_kind(kind)) == pytest.approx(sum(whole.of_kind(kind)))
    assert sum(parts.held_bytes) == pytest.approx(sum(whole.held_bytes))
    assert whole.message_seconds == 0 < parts.message_seconds
    longest = max(map(sum, zip(parts.of_kind("F"), parts.of_kind("B"), strict=True)))
    layer = (sum(whole.of_kind("F")) + sum(whole.of_kind("B"))) / 32
    assert longest < 8.6 * layer  # 32 layers and the ends over 4 stages
    assert parts.input_bytes == (0, *(512 * 4096 * 2,) * 3)


def test_a_cut_into_more_stages_than_layers_is_refused() -> None:
    with pytest.raises(NarrowsError, match="more stages than layers"):
        cut(capture("llama-2-7b"), machine("a100-80gb"), Step.train(1, 128), 64, 1)


@pytest.mark.parametrize(
    "order, stages, microbatches",
    [
        (zero_bubble(Work.of(4, 4), 4), 4, 4),
        (v_shaped(Work.of(4, 4), shape="min"), 4, 4),
        (dualpipe_v(2, 4), 4, 4),
        (interleaved(2, 4, 2), 4, 4),
    ],
    ids=["zero bubble", "v", "dualpipe-v", "interleaved"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_every_order_leaves_the_gradients_of_the_whole_batch(
    order: Order, stages: int, microbatches: int, recompute: bool
) -> None:
    pytest.importorskip("torch")
    from narrows.experiments.pipelines import in_turn, largest_difference, whole

    assert largest_difference(whole(stages), in_turn(order, stages, microbatches, recompute)) < 1e-12


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    pytest.importorskip("torch")
    from narrows.experiments.pipelines import in_turn

    with pytest.raises(NarrowsError, match="every rank waits"):
        in_turn(Order.from_actions([["0B0", "0F0"], ["1F0", "1B0"]]), 2, 1)


def test_a_vocabulary_in_one_shard_is_the_dense_layer_also_with_large_logits() -> None:
    torch = pytest.importorskip("torch")
    from narrows.modules.vocabulary import sharded_loss

    hidden, weight = 1e4 * torch.randn(5, 8), torch.randn(33, 8)
    targets = torch.randint(33, (5,))
    dense = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    for shards in ([weight], list(weight.split([1, 30, 2]))):
        assert float(sharded_loss(hidden, shards, targets)[0]) == pytest.approx(float(dense), rel=1e-5)


@pytest.mark.parametrize(
    "technique, work, reason",
    [
        (GPipe(), Work.of(1, 4), "one stage is no pipeline"),
        (TwoBP(), Work.of(1, 4), "no other that waits"),
        (TwoBP(), Work.of(4, 4, weights=0.0), "take no time"),
        (VocabularyParallelism(), Work.of(4, 4), "does not say what a share"),
        (SkipPipe(skip=0.0), Work.of(4, 4), "no stage would be left out"),
        (SkipPipe(), Work.of(2, 4), "no stage would be left out"),
    ],
)
def test_what_does_not_apply_is_refused_with_a_reason(technique: Schedules, work: Work, reason: str) -> None:
    verdict = technique.check(work)
    assert not verdict and reason in getattr(verdict, "reason", "")


def test_what_applies_is_accepted() -> None:
    shared = replace(Work.of(4, 4), seconds={**Work.of(4, 4).seconds, "S": (0.5,) * 4})
    assert all(one.check(shared) is True for one in (GPipe(), TwoBP(), VocabularyParallelism(), SkipPipe()))


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: TwoBP("naive"), "'naive' is no schedule"),
        (lambda: VocabularyParallelism(3), "3 barriers"),
        (lambda: SkipPipe(skip=1.0), "a share of 1"),
        (lambda: SkipPipe(nodes=((0,), (1, 1))).order(Work.of(3, 2)), "Place ranks 0 to 2"),
    ],
)
def test_bad_options_are_refused(make: object, problem: str) -> None:
    with pytest.raises(NarrowsError, match=problem):
        make()  # type: ignore[operator]


def test_skipped_paths_start_at_the_first_stage_and_visit_the_others_equally_often() -> None:
    paths = SkipPipe(skip=0.5).order(Work.of(5, 8)).paths
    assert len(paths) == 8 and all(path[0] == 0 and len(set(path)) == 3 for path in paths.values())
    visits = [sum(stage in path for path in paths.values()) for stage in range(1, 5)]
    assert set(visits) == {4}
