"""Run the training step that a layout means, on ranks of this machine, and hold it against one process and the graph.

Tensor parallelism is torch's DTensor, sharding its FSDP2, and a pipeline's order is handed to the schedule runtime of
`torch.distributed.pipelining`; ring, Ulysses, state passing, shared experts and optimizer states on disk are those of
`narrows.modules`.
"""

import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from narrows.modules import context, state_passing
from narrows.modules.decoder import Stage, again, causal, seeded
from narrows.modules.disk_adam import disk_adam
from narrows.modules.experts import Experts
from narrows.run.checkpoint import Saver, file_of, fragments, latest, load
from narrows.run.expected import order_of
from narrows.run.job import Ran, Run
from narrows.run.traffic import Traffic
from narrows.simulate.played import layers_of

AXES = ("pipeline", "data", "expert", "context", "tensor")  # replicas are `data` groups of `expert` that share their experts
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def tokens(run: Run, step: int) -> Tensor:
    """The batch of a step, with one token more to predict: [batch, sequence + 1]."""
    draw = torch.Generator().manual_seed(1000 + step)
    words = run.model["vocab_size"]
    start = torch.randint(words, (run.layout.batch, 1), generator=draw)
    return (start + torch.randint(1, 4, (run.layout.batch, run.sequence + 1), generator=draw).cumsum(1)) % words


class Trainer:
    """The stages, optimizer and groups of one rank, once `torch.distributed` has joined it to the others."""

    def __init__(self, run: Run) -> None:
        self.run, layout = run, run.layout
        sizes = (layout.pipeline, layout.data // layout.expert, layout.expert, layout.context, layout.tensor)
        self.mesh: DeviceMesh = init_device_mesh("cpu", sizes, mesh_dim_names=AXES)
        self.place = dict(zip(AXES, self.mesh.get_coordinate() or (0,) * len(AXES), strict=True))
        self.alike = {  # ranks whose gradients are of the same weights: of all that every replica has, and of experts
            False: self.mesh["data", "expert", "context"]._flatten("replicas").get_group(),
            True: self.mesh["data", "context"]._flatten("sharers").get_group(),
        }
        self.buckets = {experts: torch.empty(0, dtype=_DTYPES[run.dtype]) for experts in self.alike}
        parts = torch.arange(run.sequence).view(layout.context, -1)
        self.positions = parts if run.linear or layout.context == 1 else context.zigzag(run.sequence, layout.context)
        self.order = order_of(layout)
        self.row = self.order.ranks[self.place["pipeline"]]
        numbers = sorted({one.stage for one in self.row})
        deep = [int(layers) for layers in layers_of(layout, run.model["num_hidden_layers"])]
        self.count, self.ends = len(deep), list(accumulate(deep, initial=0))
        self.stages = {number: self._stage(number) for number in numbers}
        named = [(name, p) for stage in self.stages.values() for name, p in stage.named_parameters()]
        self.parameters = dict(named)
        self.disk = TemporaryDirectory(prefix="narrows-") if layout.offload == "optimizer" else None
        self.optimizer = self._optimizer()
        self.executed: list[str] = []
        self.saver = Saver(Path(run.folder), run.lazy)
        self.runtime = self._runtime() if layout.pipeline > 1 else None

    def _stage(self, number: int) -> Stage:
        run, layout = self.run, self.run.layout
        layers = range(self.ends[number], self.ends[number + 1])
        stage: Stage = Stage(run.model, layers, number == 0, number == self.count - 1, self._mixer(), run.ladder)
        seeded(stage.to(_DTYPES[run.dtype]))
        stage.positions = self.positions[self.place["context"]]
        stage.recompute = (layout.recompute_layers or len(layers)) if layout.recompute == "full" else 0
        if layout.expert > 1:
            for part in stage.modules():
                if isinstance(part, Experts):
                    part.share(self.mesh["expert"])
        if layout.tensor > 1:
            _cut(stage, self.mesh["tensor"], layout.sequence, run.exchange == "alone")
        if layout.shard:
            reshard = layout.shard == 3 and layout.pipeline == 1  # a pipeline's runtime gathers a stage once a step
            for whole in (*stage.blocks, stage):
                sharded = fully_shard(whole, mesh=self.mesh["data"], reshard_after_forward=reshard)
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
        return stage

    def _optimizer(self) -> Any:
        if self.disk is None:
            groups = [[p for p in self.parameters.values() if isinstance(p, DTensor) == spread] for spread in (False, True)]
            return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-2, fused=True)
        whole = torch.nn.ModuleList(self.stages.values())
        return disk_adam(whole, Path(self.disk.name), early=False, lr=1e-2, weight_decay=1e-2, decoupled_weight_decay=True)

    def _mixer(self) -> Any:
        run, group = self.run, self.mesh["context"].get_group()
        exchange = run.exchange or run.layout.context_by
        if run.linear:
            return state_passing.mixer(exchange, run.linear == "gated", group)
        if run.layout.context == 1:
            return again(causal) if run.layout.recompute == "selective" else causal
        return {"ring": context.ring, "ulysses": context.ulysses, "alone": context.alone}[exchange](self.positions, group)

    def _runtime(self) -> _PipelineScheduleRuntime:
        layout, group = self.run.layout, self.mesh["pipeline"].get_group()
        parts = [PipelineStage(stage, number, self.count, torch.device("cpu"), group=group)  # type: ignore[no-untyped-call]
                 for number, stage in self.stages.items()]  # fmt: skip
        for part in parts:
            self._record(part)
        runtime = _PipelineScheduleRuntime(parts, layout.accumulate, loss_fn=self._loss, scale_grads=False)  # type: ignore[arg-type]
        with TemporaryDirectory() as folder:
            file = Path(folder) / "order.csv"
            file.write_text("\n".join(",".join(row) for row in self.order.to_actions().values()))
            runtime._load_csv(str(file))
        return runtime

    def _record(self, part: Any) -> None:
        """Note each pass that the runtime runs of a stage."""
        forward, backward, weights, number = (
            part.forward_one_chunk, part.backward_one_chunk, part.backward_weight_one_chunk, part.stage_index,
        )  # fmt: skip

        def run_forward(chunk: int, *args: Any, **more: Any) -> Any:
            self.executed.append(f"{number}F{chunk}")
            return forward(chunk, *args, **more)

        def run_backward(chunk: int, *args: Any, full_backward: bool = True, **more: Any) -> Any:
            self.executed.append(f"{number}{'B' if full_backward else 'I'}{chunk}")
            return backward(chunk, *args, full_backward=full_backward, **more)

        def run_weights(chunk: int, *args: Any, **more: Any) -> Any:
            self.executed.append(f"{number}W{chunk}")
            return weights(chunk, *args, **more)

        part.forward_one_chunk, part.backward_one_chunk, part.backward_weight_one_chunk = run_forward, run_backward, run_weights

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """This rank's share of the mean loss of all tokens of the step."""
        whole = self.run.layout.batch * self.run.sequence
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / whole

    def train(self) -> Ran:
        """Every step, from the latest checkpoint on."""
        run = self.run
        start = self._resume()
        losses, seconds, busy, queues, stalls, gradients = [], [], [], [], [], dict[str, Any]()
        traffic = Traffic()
        for step in range(start, run.steps):
            self.executed.clear()
            self.optimizer.zero_grad()
            counted = traffic if step == run.steps - 1 else nullcontext()  # counting takes time
            begin, worked, queued = time.perf_counter(), time.thread_time(), _queued_seconds()
            with counted, loss_parallel():
                losses.append(self._step(tokens(run, step)))
            if step == start:
                gradients = self._whole({name: p.grad for name, p in self.parameters.items()})
            stall = self.saver.guard()
            self.optimizer.step()
            seconds.append(time.perf_counter() - begin)
            busy.append(time.thread_time() - worked)
            queues.append(_queued_seconds() - queued)
            if run.every and (step + 1) % run.every == 0:
                stalls.append(stall + self.saver.save(step + 1, fragments(self.parameters, self.optimizer, self._first())))
            if run.dies == (dist.get_rank(), step):
                os.kill(os.getpid(), signal.SIGKILL)
        self.saver.close()
        state: dict[str, Any] = dict(self.parameters)
        for index, (name, parameter) in enumerate(self.parameters.items()):
            if self.disk is not None:
                self.optimizer.recall(index, parameter)
            moments = self.optimizer.state[parameter]
            state |= {f"{name}/{moment}": value for moment, value in moments.items() if moment != "step"}
        if self.disk is not None:
            self.disk.cleanup()
        planned = tuple(map(str, self.row)) if self.runtime else ()
        return Ran(self.place, tuple(losses), gradients, self._whole(state), tuple(self.executed), planned,
                   dict(traffic.calls), dict(traffic.sent_bytes), traffic.overlapped, tuple(seconds), tuple(busy),
                   tuple(queues), tuple(stalls))  # fmt: skip

    def _first(self) -> dict[str, int]:
        """Where it stands among the ranks of which one writes what they hold alike; nowhere, if each writes all it has."""
        return {} if self.run.own else self.place

    def _resume(self) -> int:
        step = latest(Path(self.run.folder)) if self.run.folder else 0
        if step:
            only = file_of(dist.get_rank()) if self.run.own else ""
            load(Path(self.run.folder), step, self.parameters, self.optimizer, only)
        return step

    def _step(self, batch: Tensor) -> float:
        """Forward and backward of every microbatch, and the exchange of gradients; this rank's part of the loss."""
        layout, own = self.run.layout, self.positions[self.place["context"]]
        batch = batch.chunk(layout.data)[self.place["data"] * layout.expert + self.place["expert"]]
        inputs, targets = batch[:, own], batch[:, own + 1]
        losses: list[Tensor] = []
        if self.runtime is not None:
            given = (inputs,) if 0 in self.stages else ()
            self.runtime.step(*given, target=targets if self.count - 1 in self.stages else None, losses=losses)
        else:
            for x, y in zip(inputs.split(layout.microbatch), targets.split(layout.microbatch), strict=True):
                losses.append(self._loss(self.stages[0](x), y))
                losses[-1].backward()  # type: ignore[no-untyped-call]
        for p in self.parameters.values():  # DTensor leaves some whole or as summands: each rank is to have its weights' share
            if isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(p.device_mesh, p.placements)
        if not layout.shard and layout.data * layout.context > 1:
            for experts, group in self.alike.items():
                local = [_local(p.grad) for p in self.parameters.values() if _is_of_experts(p) == experts]
                if local and group.size() > 1:
                    bucket = torch.cat([grad.flatten() for grad in local], out=self.buckets[experts])
                    dist.all_reduce(bucket, group=group)
                    for grad, part in zip(local, bucket.split([grad.numel() for grad in local]), strict=True):
                        grad.copy_(part.view_as(grad))
        return float(sum(float((loss.full_tensor() if isinstance(loss, DTensor) else loss).detach()) for loss in losses))

    def _whole(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Tensors put together from the ranks that share them; on the first rank of those."""
        full = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
        mine = not any(self.place[axis] for axis in AXES if axis != "pipeline")
        return {name: t.detach().numpy().copy() for name, t in full.items()} if mine else {}


def _queued_seconds() -> float:
    """What this thread has waited for a core while it could have run, by Linux's own count; zero where it does not count."""
    counts = Path("/proc/thread-self/schedstat")
    return int(counts.read_text().split()[1]) * 1e-9 if counts.exists() else 0.0


def _is_of_experts(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names == ("expert",)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut(stage: Stage, mesh: DeviceMesh, sequence: bool, alone: bool) -> None:
    """Tensor parallelism as `narrows.parallel.tensor_parallel` cuts the graph; `alone`, summands are never brought together."""
    between = Shard(1) if sequence else Replicate()
    summed = Partial() if alone else between
    gather = PrepareModuleInput(input_layouts=(between, None), desired_input_layouts=(Replicate(), None))
    fed = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
    plan: dict[str, Any] = {}
    for i in stage.model.layers:  # type: ignore[union-attr]
        name = f"model.layers.{i}"
        plan |= {f"{name}.self_attn": gather, f"{name}.mlp": fed}
        plan |= {f"{name}.self_attn.{part}_proj": ColwiseParallel() for part in "qkv"}
        plan |= {f"{name}.mlp.{part}_proj": ColwiseParallel() for part in ("gate", "up")}
        plan |= {f"{name}.{part}": RowwiseParallel(output_layouts=summed) for part in ("self_attn.o_proj", "mlp.down_proj")}
        if sequence:
            plan |= {f"{name}.{norm}": SequenceParallel() for norm in ("input_layernorm", "post_attention_layernorm")}
    if stage.model.embed_tokens is not None:
        plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    if stage.lm_head is not None:
        plan["lm_head"] = ColwiseParallel(input_layouts=between, use_local_output=False)
        if sequence:
            plan["model.norm"] = SequenceParallel(use_local_output=True)
    parallelize_module(stage, mesh, plan)
