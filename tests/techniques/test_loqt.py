"""LoQT: exact gradients, merges that keep the function, runs that resume, replicas that agree, graphs and refusals."""

import multiprocessing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from narrows.backward import gradient_exchange, training
from narrows.capture import capture
from narrows.cost import total
from narrows.errors import NarrowsError
from narrows.modules.merged_linear import MergedLinear, MergingAdam
from narrows.modules.packed_linear import PackedLinear
from narrows.step import Step
from narrows.technique import No
from narrows.techniques.training_memory_offload.loqt import LoQT

OURS = LoQT(rank=16, gap=2, group=16)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32, bias=False), nn.Tanh(), nn.Linear(32, 10))


def _steps(network: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, rank: int = 0) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 * rank + seed)
        x, labels = torch.randn(8, 32, generator=generator), torch.randint(10, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()


def test_layers_that_are_large_enough_are_changed_and_compute_what_they_say() -> None:
    network = _network()
    optimizer = OURS.attach(network, lr=1e-2)
    assert [isinstance(layer, MergedLinear) for layer in network] == [True, False, True, False, False]
    _steps(network, optimizer, range(4))
    layer = network[0]
    x = torch.randn(2, 3, 32, requires_grad=True)
    y = layer(x)
    weight = layer.weight.requires_grad_()
    reference = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(y, reference)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, layer.factor), dy)
    theirs = torch.autograd.grad(reference, (x, weight), dy)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], layer.projector.codes.weight().T @ theirs[1])


def test_only_the_factor_is_trained_and_matrices_are_packed_after_the_first_step() -> None:
    network = _network()
    optimizer = OURS.attach(network, lr=1e-2)
    before = network[0].weight
    _steps(network, optimizer, range(1))
    assert network[0].base.packed.nbytes == 64 * 32 / 2
    assert not any(p.requires_grad for part in (network[0].base, network[0].projector) for p in part.parameters())
    close = (network[0].weight - before).norm() / before.norm()
    assert 0 < close < 0.1
    assert (network[0].weight - before).norm() < (network[0].base.codes.weight() - before).norm()


def test_a_step_takes_a_closure() -> None:
    network = _network()
    optimizer = OURS.attach(network, lr=1e-2)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = network(torch.ones(4, 32)).square().sum()
        value.backward()
        return value

    first = optimizer.step(loss)
    assert isinstance(network[0].base, PackedLinear)
    assert [optimizer.step(loss) for _ in range(5)][-1] < first


def test_plain_merges_keep_the_function() -> None:
    network = _network()
    optimizer = replace(OURS, group=0, gap=2).attach(network, lr=1e-2)
    _steps(network, optimizer, range(3))
    layer = network[0]
    before, layer.due = layer.weight, True
    layer(torch.randn(8, 32)).square().sum().backward()
    layer.merge()
    torch.testing.assert_close(layer.weight, before)
    assert torch.linalg.matrix_rank(layer.projector.weight) == 16


def test_intervals_grow_and_a_run_resumes_where_it_stopped() -> None:
    network = _network()
    optimizer = replace(OURS, growth=2.0).attach(network, lr=1e-2)
    merged: list[int] = []
    for step in range(20):
        _steps(network, optimizer, range(step, step + 1))
        if optimizer.param_groups[0]["merges"] > len(merged):
            merged.append(step + 1)
        if step == 9:
            weights, states = deepcopy((network.state_dict(), optimizer.state_dict()))
            other = _network()
            resumed = replace(OURS, growth=2.0).attach(other, lr=1e-2)
            other.load_state_dict(weights)
            resumed.load_state_dict(states)
    assert merged == [1, 5, 11]
    _steps(other, resumed, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True))


def _replica(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    network = _network()
    optimizer = OURS.attach(network, lr=1e-2)
    replica = nn.parallel.DistributedDataParallel(network, init_sync=False, broadcast_buffers=False)
    _steps(replica, optimizer, range(6), rank)
    save_file(network.state_dict(), Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_replicas_find_the_same_directions(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_replica, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    one, other = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_graph_trains_and_exchanges_the_factors_alone() -> None:
    step, before = Step.train(1, 128), gradient_exchange(training(capture("bert-base")), 4)
    ours = LoQT(rank=64)
    after = ours.rewrite(before)
    per_layer = 64 * (4 * 768 + 768 + 3072) - (4 * 768 * 768 + 2 * 768 * 3072)
    pooler = 64 * 768 - 768 * 768
    for kind in ("optimizer", "all_reduce"):
        elements = [sum(op["elements"] for op in g if op.kind == kind) for g in (before, after)]  # type: ignore[misc]
        assert elements[1] - elements[0] == 12 * per_layer + pooler
    assert total(after, step).weight_bytes < total(before, step).weight_bytes
    assert ours.rewrite(after).weight_bytes == after.weight_bytes


def test_what_cannot_be_trained_so_is_refused() -> None:
    graph = capture("llama-3.2-1b")
    for ours, step, reason in (
        (LoQT(), Step.decode(1, 128), "decode step"),
        (LoQT(rank=8192), Step.train(1, 128), "8192 inputs and outputs"),
    ):
        verdict = ours.check(graph, None, step)
        assert isinstance(verdict, No)
        assert reason in verdict.reason
    with pytest.raises(NarrowsError, match="no linear layer fits"):
        LoQT().attach(_network())
    with pytest.raises(NarrowsError, match="multiple of group"):
        LoQT(rank=40, group=16)
    broken = _network()
    broken[2].weight.data[3, 5] = torch.nan
    with pytest.raises(NarrowsError, match="loqt: 2"):
        OURS.attach(broken)
    assert isinstance(OURS.attach(_network()), MergingAdam)
