"""What 1-bit Adam claims, measured: a small language model trained by four processes, and a model of a slow cluster."""

import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from narrows.backward import gradient_exchange, training
from narrows.capture.config import bundled_config, from_config
from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.graph import Graph
from narrows.machine import cluster
from narrows.step import Step
from narrows.techniques.communication.one_bit_adam import OneBitAdam

RANKS, STEPS, WARMUP = 4, 280, 42
_CONTEXT, _BATCH, _SYMBOLS, _HELD_OUT = 8, 32, 128, 4096


def volume_at_equal_loss(technique: OneBitAdam) -> float:
    """Adam's bytes over ours for the whole run; 0 where our loss ends more than 3 % above Adam's."""
    ours, adam, _ = _runs(technique)
    return adam["sent_bytes"] / ours["sent_bytes"] if ours["loss"] <= 1.03 * adam["loss"] else 0.0


def volume_after_warmup(technique: OneBitAdam) -> float:
    """fp32 Adam's bytes over ours in the last step."""
    ours, adam, _ = _runs(technique)
    return adam["last_step_bytes"] / ours["last_step_bytes"]


def feedback_gain(technique: OneBitAdam) -> float:
    """Final loss without error feedback over the final loss with it."""
    ours, _, without = _runs(technique)
    return without["loss"] / ours["loss"]


def throughput_ethernet(technique: OneBitAdam) -> float:
    """Seconds of BERT-Large's training under Adam over ours, 15 % of the steps being warm-up under both.

    A ring crosses each node's network card once, whatever the devices in the node; in an all-to-all every device
    sends its own messages through the card.
    """
    there = replace(cluster("ethernet-10g-v100"), nodes=16)
    assert there.scale_out is not None
    card = there.scale_out.bandwidth_bytes_per_s * there.devices_per_node  # the figure is each device's share
    step = Step.train(batch=16, tokens=128)
    bert = from_config({**(bundled_config("bert-large") or {}), "torch_dtype": "float16"}, "bert-large")
    plain = gradient_exchange(training(bert), there.devices)

    def seconds(graph: Graph) -> float:
        spent = 0.0
        for op in graph:
            sent = float(cost(op, step).link_bytes)
            through = there.devices_per_node if op.kind == "all_to_all" else 1
            spent += sent * through / card if sent else float(op_time(op, step, there.machine).seconds)
        return spent

    warm, steady = seconds(plain), seconds(technique.rewrite(plain))
    return warm / (0.15 * warm + 0.85 * steady)


@cache
def _runs(technique: OneBitAdam) -> list[dict[str, float]]:
    """The run of the technique, of Adam, and of the technique without error feedback."""
    ours = replace(technique, warmup=WARMUP)
    return train([(ours, 0), (replace(ours, compress=False), 0), (replace(ours, feedback=False), 0)], RANKS, STEPS)


def train(runs: Sequence[tuple[OneBitAdam, int]], ranks: int, steps: int) -> list[dict[str, float]]:
    """Train the byte-level model in `ranks` processes, once for each (technique, step to stop at) of `runs`.

    A run is saved where it stops and goes on in a fresh model and optimizer (0: it does not stop). Gives, for each,
    loss (held-out, at the end), sent_bytes, last_step_bytes, parameters, their checksum and its spread over the ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = {"runs": [(asdict(technique), stop) for technique, stop in runs], "ranks": ranks, "steps": steps}
        job = json.dumps({**asked, "folder": folder})
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=_rank, args=(rank, job), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [rank for rank, process in enumerate(processes) if process.exitcode]
        if failed:
            raise RuntimeError(f"ranks {failed} of {ranks} failed; their errors are above")
        found: list[dict[str, float]] = json.loads((Path(folder) / "result.json").read_text())
        return found


def _rank(rank: int, job: str) -> None:
    """One of the processes of `train`."""
    import torch
    import torch.distributed as dist

    asked = json.loads(job)
    torch.set_num_threads(1)
    meeting = f"file://{asked['folder']}/meet"  # a file, so that no port is needed
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=asked["ranks"])
    found = [_train(OneBitAdam(**technique), rank, asked["steps"], stop) for technique, stop in asked["runs"]]
    if rank == 0:
        (Path(asked["folder"]) / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _train(technique: OneBitAdam, rank: int, steps: int, stop_at: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist
    from torch.nn.functional import cross_entropy

    model, optimizer = _start(technique)
    inputs, targets = _text()
    generator = torch.Generator().manual_seed(100 + rank)
    before = 0
    for step in range(steps):
        if step and step == stop_at:
            weights, states = model.module.state_dict(), optimizer.state_dict()
            model, optimizer = _start(technique)
            model.module.load_state_dict(weights)
            optimizer.load_state_dict(states)
        before = optimizer.sent_bytes
        rows = torch.randint(0, len(inputs) - _HELD_OUT, (_BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = cross_entropy(model.module(inputs[-_HELD_OUT:]), targets[-_HELD_OUT:])
        sums = [torch.zeros(1, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(sums, torch.stack([p.double().sum() for p in model.parameters()]).sum().view(1))
    return {"loss": loss.item(), "sent_bytes": optimizer.sent_bytes, "last_step_bytes": optimizer.sent_bytes - before,
            "parameters": sum(p.numel() for p in model.parameters()), "checksum": sums[0].item(),
            "spread": (max(sums) - min(sums)).item()}  # fmt: skip


def _start(technique: OneBitAdam) -> tuple[Any, Any]:
    """The model (the same on every rank), wrapped, and its optimizer."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Embedding(_SYMBOLS, 32), torch.nn.Flatten(), torch.nn.Linear(32 * _CONTEXT, 256),
                                 torch.nn.GELU(), torch.nn.Linear(256, _SYMBOLS))  # fmt: skip
    model = DistributedDataParallel(layers)
    return model, technique.attach(model, lr=2e-3)


@cache
def _text() -> Sequence[Any]:
    """Windows of eight bytes of the sample text and the byte that follows."""
    import torch

    from narrows.samples import text

    prose = text()[1][:200_000].encode("ascii", "replace")
    data = torch.tensor(list(prose), dtype=torch.long)
    return data.unfold(0, _CONTEXT, 1)[:-1], data[_CONTEXT:]
