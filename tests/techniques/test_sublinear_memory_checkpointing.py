"""Checkpointing: where segments end, graphs before and after, equal gradients, names in the state dict, refusals."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from narrows.backward import training
from narrows.capture import capture
from narrows.capture.torch import from_module
from narrows.cost import cost, total
from narrows.errors import NarrowsError
from narrows.experiments.sublinear_memory_checkpointing import _net
from narrows.footprint import footprint
from narrows.plan import Plan
from narrows.step import Step
from narrows.techniques.training_memory_offload.sublinear_memory_checkpointing import SublinearMemoryCheckpointing, peak

STEP = Step.train(2, 16)


@pytest.mark.parametrize("blocks", [4, 5, 9, 16, 17, 30, 100])
@pytest.mark.parametrize("segments", [0, 2, 3])
def test_segments_are_as_even_as_can_be(blocks: int, segments: int) -> None:
    ends = SublinearMemoryCheckpointing(segments).ends(blocks)
    sizes = [b - a for a, b in zip((0, *ends), ends)]
    assert len(ends) == (segments or round(blocks**0.5))
    assert sum(sizes) == blocks and max(sizes) - min(sizes) <= 1


def test_peak_of_a_plan() -> None:
    assert peak([10.0] * 9, [1.0] * 9, (9,)) == 90
    assert peak([10.0] * 9, [1.0] * 9, (3, 6, 9)) == 33
    assert peak([10.0] * 9, [1.0] * 9, tuple(range(1, 10))) == 19


def test_a_config_graph_before_and_after() -> None:
    graph, step, technique = capture("llama-3.1-8b"), Step.train(1, 2048), SublinearMemoryCheckpointing(8)
    assert technique.check(graph, None, step) is True
    after = technique.rewrite(graph)
    cut = [op for op in after if op.segments]
    assert cut and all(op.name.startswith("model.layers.*") and op.segments == 8 for op in cut)
    border = next(op for op in after if op.kind == "checkpoint")
    assert border.repeat == 8 and border.saved.at(step) == 2048 * 4096
    plain, less = footprint(graph, step), footprint(after, step)
    assert less.activation_bytes < plain.activation_bytes / 4
    assert less.weights_bytes == plain.weights_bytes
    work, more = total(training(graph), step), total(training(after), step)
    again = sum(cost(op, step).flop for op in graph if op.name.startswith("model.layers"))
    assert more.flop - work.flop == pytest.approx(again)


@pytest.mark.parametrize("segments", [0, 2, 4])
def test_the_square_commutes_for_a_training_step(segments: int) -> None:
    technique, example = SublinearMemoryCheckpointing(segments), SublinearMemoryCheckpointing.example()
    graph = from_module(example.model, STEP)
    predicted, found = technique.rewrite(graph), from_module(technique.apply(example.model), STEP)
    for exact in ("flop", "weight_bytes", "cache_bytes", "state_bytes", "launches"):
        assert getattr(total(found, STEP), exact) == pytest.approx(getattr(total(predicted, STEP), exact), rel=1e-9), exact
    for phase in ("forward", "recompute", "backward"):
        linear = [[op for op in g if op.kind == "linear" and op.phase == phase] for g in (predicted, found)]
        ours, theirs = (sum(cost(op, STEP).flop for op in ops) for ops in linear)
        assert ours == theirs > 0, phase


def test_gradients_are_equal_to_the_bit_and_nothing_is_renamed() -> None:
    example = SublinearMemoryCheckpointing.example()
    plain, cut = example.model, SublinearMemoryCheckpointing().apply(copy.deepcopy(example.model))
    assert list(plain.state_dict()) == list(cut.state_dict())
    ids = example.data[0]["input_ids"]
    for model in (plain, cut):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()  # use_cache is on by default: segments leave the cache out
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), cut.parameters()))


def test_dropout_draws_the_same_numbers_twice() -> None:
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48)
    plain = BertModel(config).train()
    cut, ids, grads = SublinearMemoryCheckpointing().apply(copy.deepcopy(plain)), torch.randint(64, (2, 12)), []
    for model in (plain, cut):
        torch.manual_seed(1)
        model(input_ids=ids).last_hidden_state.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_blocks_run_again_in_the_backward_pass_only() -> None:
    net, runs = SublinearMemoryCheckpointing(2).apply(_net(6)), []
    for block in list(net._modules.values()):
        block.register_forward_hook(lambda *_: runs.append(1))
    out = net(torch.randn(3, 16))
    assert len(runs) == 6
    out.sum().backward()
    assert len(runs) == 12
    net.eval()(torch.randn(3, 16))
    with torch.no_grad():
        net.train()(torch.randn(3, 16))
    assert len(runs) == 24


def test_a_cut_list_is_still_a_list() -> None:
    net = SublinearMemoryCheckpointing(2).apply(_net(6))
    assert isinstance(net, nn.Sequential) and len(net) == 6
    assert net[2] is net._modules["2"] and net[:] is net
    assert [*net[1:3]] == [net[1], net[2]]
    assert [name for name, _ in net.named_children()] == list("012345")
    copied = copy.deepcopy(net)
    copied.load_state_dict(net.state_dict())


def test_positional_caches_are_left_out() -> None:
    model = SublinearMemoryCheckpointing().apply(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4)))
    ids = torch.randint(64, (1, 6))
    model.train()(input_ids=ids, labels=ids).loss.backward()


def test_refusals() -> None:
    graph = capture("llama-3.1-8b")
    cut = SublinearMemoryCheckpointing().rewrite(graph)
    assert "keeps nothing" in str(SublinearMemoryCheckpointing().check(graph, None, Step.decode()))
    assert "recomputes already" in str(SublinearMemoryCheckpointing().check(cut, None, STEP))
    assert "no cut" in str(SublinearMemoryCheckpointing(1).check(graph, None, STEP))
    assert "32 blocks" in str(SublinearMemoryCheckpointing(32).check(graph, None, STEP))
    with pytest.raises(NarrowsError, match="-1 segments"):
        SublinearMemoryCheckpointing(-1)


def test_models_that_cannot_be_cut_are_left_alone() -> None:
    once = SublinearMemoryCheckpointing().apply(_net(6))
    for model in (nn.Linear(2, 2), _net(3), once):
        kind = type(model)
        with pytest.raises(NarrowsError, match="longest list"):
            SublinearMemoryCheckpointing().apply(model)
        assert type(model) is kind
    assert type(SublinearMemoryCheckpointing(1).apply(_net(6))) is nn.Sequential


def test_a_plan_round_trip() -> None:
    plan = Plan((SublinearMemoryCheckpointing(segments=4),))
    assert str(plan) == "sublinear-memory-checkpointing:segments=4"
    assert Plan.parse(str(plan)) == plan
    assert SublinearMemoryCheckpointing().baseline() == SublinearMemoryCheckpointing(1)
