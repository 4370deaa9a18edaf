"""Serving at a fixed concurrency, in closed form: time to first token and time per output token.

Each of C clients sends its next request as soon as its last one is answered, so that C requests are always in the
engine. In every `output` steps each sequence ends once and its successor's prompt is read in between: that is the
interference. What does not fit the memory for keys and values waits, and Little's law says for how long.
"""

from dataclasses import dataclass
from functools import lru_cache

from narrows.cost import cost
from narrows.costmodel import achieved, fitted
from narrows.diagnose import seconds
from narrows.errors import NarrowsError, closest
from narrows.footprint import footprint
from narrows.graph import Graph, Op, Size
from narrows.machine import Machine
from narrows.parallel import tensor_parallel
from narrows.step import Step

TOKENS_AT_ONCE = 8192  # of prompts in one step: the default of the engines


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model lies on devices: `tensor` cuts it all; `data` copies its attention and spreads its experts alone."""

    tensor: int = 1
    data: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.data


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds to the first token, seconds per output token after it, and the sequences that run at a time."""

    first: float
    each: float
    running: float


def engines() -> list[str]:
    """The engines whose constants are fitted."""
    return sorted(name.removeprefix("engine-") for name in fitted() if name.startswith("engine-"))


def constants(engine: str) -> dict[str, float]:
    """The fitted constants of an engine; raises NarrowsError for one that is not known.

    decode          factor on the time of a step;  step_ms, sequence_us   host time of a step and for each sequence
    first, burst    prompts that a request waits for, alone and per rival (to the power `crowding`)
    share           of prompt reading that holds up decoding
    memory          share of the device's memory for weights, keys and values
    intake_ms       before a prompt is read, and from those that read to those that decode where they are apart
    """
    known = preset(engine)
    return {name: entry["median"] for name, entry in fitted()[f"engine-{known}"].items()}


def preset(engine: str) -> str:
    """The engine whose constants stand for one: that version of it (`sglang-0.5.1.post1` is `sglang-0.5.1`), or any."""
    found = [e for e in engines() if engine == e or engine.startswith((f"{e}-", f"{e}."))]
    if not found:
        raise NarrowsError(f"there is no engine {engine!r}.", where="engine", remedy=closest(engine, engines()))
    return max(found, key=len)


@lru_cache(maxsize=100_000)
def _step_seconds(graph: Graph, machine: Machine, layout: Layout, batch: int, new: int, past: int) -> float:
    """One step of `batch` sequences on a layout, before what an engine adds."""
    phase = "prefill" if new > 1 else "decode"
    if layout.data == 1:
        return float(seconds(graph, machine, Step(batch, new, past, phase=phase), layout.tensor)[0])
    own = Step(max(1, -(-batch // layout.data)), new, past, phase=phase)
    whole = Step(max(batch, layout.data) if new > 1 else batch, new, past, phase=phase)
    experts = {op.name for op in graph if op.split == "experts"}
    spread = tensor_parallel(graph, layout.data)
    kept = Graph(graph.name, tuple(op for op in graph if op.name not in experts))
    moved = [op for op in spread if op.name in experts]
    exchange = [_exchange(op, layout.data) for op in moved if op.kind == "expert"]
    return (
        float(seconds(kept, machine, own)[0])
        + float(seconds(Graph(graph.name, tuple(moved)), machine, whole)[0])
        + float(seconds(Graph(graph.name, tuple(exchange)), machine, own)[0])
    )


def _exchange(op: Op, devices: int) -> Op:
    """Tokens on their way to the devices of the experts that they chose, or back."""
    elements = Size.of(tokens=float(op["inputs"]) * min(float(op["top_k"]) * devices, devices))  # type: ignore[arg-type]
    return Op(f"{op.name} all_to_all", "all_to_all", {"elements": elements, "ranks": devices}, act=op.act, repeat=op.repeat)


@lru_cache(maxsize=10_000)
def held(graph: Graph, machine: Machine, layout: Layout, length: int) -> tuple[float, float]:
    """Bytes of weights, and of one sequence's keys and values, per device."""
    whole = tensor_parallel(graph, layout.devices)
    weights = whole.weight_bytes if layout.data == 1 else graph.weight_bytes / layout.devices
    held = float(footprint(tensor_parallel(graph, layout.tensor), Step.decode(1, max(length - 1, 1))).kv_bytes)
    return float(weights), held / layout.data


def closed_loop(
    graph: Graph,
    machine: Machine,
    layout: Layout,
    concurrency: int,
    prompt: int,
    output: int,
    engine: str,
    prefill: Layout | None = None,
    prefill_workers: int = 1,
) -> Served:
    """What `concurrency` clients of an engine see: prompts of `prompt` tokens, answers of `output`.

    `prefill` names a layout of `prefill_workers` that read prompts apart from those that decode: then decoding is not
    held up. Raises NarrowsError for an unknown engine and for a model that does not fit.
    """
    c = constants(engine)
    if "first" not in c:
        raise NarrowsError(f"{engine} runs one batch at a time.", where="engine", remedy="Give an engine with a queue.")
    weights, each = held(graph, machine, layout, prompt + output)
    free = machine.memory.capacity_bytes * min(c.get("memory", 0.9), 1.0) - weights
    room = max(1, int(free / each)) if each and not prefill else concurrency  # of workers apart, only some are counted
    running = float(min(concurrency, room))
    read = _step_seconds(graph, machine, prefill or layout, 1, prompt, 0) + c["step_ms"] * 1e-3
    step = _step_seconds(graph, machine, layout, round(running), 1, prompt + output // 2) * c["decode"]
    step += c["step_ms"] * 1e-3 + c["sequence_us"] * 1e-6 * running
    rivals = (running - 1) / (layout.data * prefill_workers)
    together = max(1, TOKENS_AT_ONCE // prompt)  # short prompts of rivals are read in one step
    other = _step_seconds(graph, machine, prefill or layout, together, prompt, 0) / together
    held_up = 0.0 if prefill else c["share"] * rivals * other / output
    token = step + held_up
    first = read * c["first"] + other * c["burst"] * rivals ** c["crowding"] + token + c["intake_ms"] * 1e-3
    if concurrency > running:  # Little's law: the rest stands in line
        first = max(first, concurrency / running * (first + output * token) - output * token)
    return Served(first, token, running)


def one_batch(graph: Graph, machine: Machine, layout: Layout, batch: int, prompt: int, output: int, engine: str) -> Served:
    """What one batch sees that is sent at once to an engine which launches every kernel from the host.

    A step lasts as long as the device or the host needs, whichever is slower.
    """
    c = constants(engine)
    host = _launches(graph, layout.tensor) * machine.launch_seconds * achieved(machine, "launch").median * c["launch"]
    tokens = batch * prompt
    read = (
        _step_seconds(graph, machine, layout, batch, prompt, 0)
        * c["prefill"]
        * (1 + c["crowd"] * tokens / (tokens + c["crowd_at"]))
    )
    step = _step_seconds(graph, machine, layout, batch, 1, prompt + output // 2) * c["decode"] + c["sequence_us"] * 1e-6 * batch
    norm = c["norm"]
    return Served((host**norm + read**norm) ** (1 / norm) + c["step_ms"] * 1e-3, (host**norm + step**norm) ** (1 / norm), batch)


@lru_cache(maxsize=1000)
def _launches(graph: Graph, devices: int) -> float:
    return sum(float(cost(op, Step.decode(1, 128), True).launches) for op in tensor_parallel(graph, devices))
