"""How long one step of a serving engine takes, in whole picoseconds: tables out of the cost model, read in constant time.

A step of an engine holds sequences that decode and pieces of prompts. Its time is a sum of what depends on the rows
(products, norms, collectives), on the outputs, on the keys that decoding reads and on those that prompts meet:

    step = rows(r) + outputs(o) + decoding(B, C) + sum over prompts of prompt(n, p) + host(B)

Whole numbers make sums exact, so that many steps can be taken at once and give the same bits as one after another.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narrows.cost import cost
from narrows.costmodel import op_time
from narrows.diagnose import prepared
from narrows.errors import NarrowsError
from narrows.graph import Graph, Op
from narrows.kinds import COLLECTIVES
from narrows.machine import Machine
from narrows.simulate.capping import slower
from narrows.step import Step

PS = 10**12  # picoseconds a second
_MIXERS = ("attention", "latent_attention", "scan")  # whose time depends on the context of each sequence
_DENSE = 512  # rows up to which all are tabled
_Table = list[list[float]]
_Numbers = NDArray[np.float64]
_Whole = NDArray[np.int64]
_PAST = (0, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)


@dataclass(frozen=True, slots=True)
class Segment:
    """Picoseconds to decode with C tokens in the caches, from `start` up to `end` (0: no end): base + slope x (C - start)."""

    start: int
    end: int
    base: int
    slope: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """Products, reading of caches and collectives of one step side by side on a device, each in its share of the units.

    parts   batches into which a step is cut, so that one computes while another waits for memory or for others
    memory, network   seconds that products take longer for every second of attention of decoding, and of collectives,
                      that passes meanwhile: the share of the units it takes over the share of its speed it then has
    """

    parts: int = 2
    memory: float = 0.5
    network: float = 0.4

    def __post_init__(self) -> None:
        if not (self.parts >= 1 and 0 <= self.memory < 1 and 0 <= self.network <= 1):
            raise NarrowsError(f"{self} hides nothing.", where="overlap", remedy="Give 1 part or more, and shares below 1.")


@dataclass(frozen=True, slots=True)
class Shelf:
    """Drives beside the device that hold the keys and values of all sequences.

    room_bytes    of what they hold;  bytes_per_s   at which decoding reads them
    read    share of a sequence's that one token reads
    wire_bytes_per_s    over which queries go to attention inside the drives and what it says comes back (0: the device attends)
    """

    room_bytes: float
    bytes_per_s: float
    read: float = 1.0
    wire_bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.room_bytes > 0 and self.bytes_per_s > 0 and 0 < self.read <= 1 and self.wire_bytes_per_s >= 0):
            raise NarrowsError(f"{self} cannot be.", where="shelf", remedy="Give room, a rate, and a share from above 0 to 1.")

    def seconds(self, mixers: list[Op], step: Step) -> Any:
        """What attention of a step that decodes takes; the device's own part hides behind the reading."""
        found: Any = 0.0
        for op in mixers:
            work = cost(op, step)
            found = found + work.cache_bytes * self.read / self.bytes_per_s
            if self.wire_bytes_per_s:
                found = found + (work.input_bytes + work.write_bytes) / self.wire_bytes_per_s
        return found


class StepTimes:
    """The times of an engine's steps for a model on a machine, cut over `devices` by tensor parallelism.

    `factor` scales what the device does, `step_seconds` and `sequence_seconds` are the host's time of a step and for
    each sequence in it. `most_rows` and `most_sequences` bound the tables. What changes a step does so in this order: under
    `cap_watts` a device's clock falls for products and prompts (decoding's attention waits for memory); with a `shelf`,
    decoding reads keys and values there; with `overlap`, what can run side by side does, in steps that it makes shorter.
    Raises NarrowsError for a model that keeps no cache.
    """

    taken = 1.0  # tokens that a step gives in the mean: all times are of one
    _brings = 1  # rows of a sequence that decodes

    def __init__(self, graph: Graph, machine: Machine, devices: int = 1, most_rows: int = 8192, most_sequences: int = 256,
                 factor: float = 1.0, step_seconds: float = 0.0, sequence_seconds: float = 0.0,
                 overlap: Overlap | None = None, shelf: Shelf | None = None, cap_watts: float = 0.0) -> None:  # fmt: skip
        ready = prepared(graph, Step.decode(1, 1), machine, devices)
        mixers = [op for op in ready if op.kind in _MIXERS]
        if not any(op["held"] for op in mixers):
            raise NarrowsError(f"{graph.name} keeps no cache.", where="serving", remedy="Give a model that decodes.")
        outputs = [op for op in ready if op.kind not in _MIXERS and _reads(op, "outputs")]
        rows = [op for op in ready if op.kind not in _MIXERS and not _reads(op, "outputs")]
        self._machine, self._mixers, self._factor, self._overlap = machine, mixers, factor, overlap
        self._shelf, self._cap, self.capped = shelf, cap_watts, cap_watts > 0
        self.layers = sum(op.repeat for op in mixers)
        self._step = round(step_seconds * PS)
        self._each = round(sequence_seconds * PS)
        self._points = _grid(max(most_rows + most_sequences, 2))
        points = np.array(self._points, float)[:, None]
        started = float(_spent(mixers, Step.decode(1, 1), machine)[1])
        tables = self._row_tables(rows, points, started, cap_watts)
        self._rows, self._more, self._sent = (table.tolist() for table in tables)
        self._held = (tables[0] - self._row_tables(rows, points, started, 0.0)[0]).tolist() if cap_watts else []
        self._beside: dict[tuple[int, int], tuple[list[int], list[Segment]]] = {}
        self._outputs = self._whole(self._parts(outputs, Step.decode(points, 1), 0.0)[0]).tolist()
        self._decoding: dict[int, tuple[list[int], list[Segment]]] = {}
        self._fixed: dict[int, int] = {}  # of a step of so many that decode: all but attention
        self._prompt_rows = [p for p in _grid(max(most_rows, 2), 64) if p <= max(most_rows, 2)]
        self._prompts, self._prompts_held = self._prompt_tables()

    def _row_tables(self, ops: list[Op], points: _Numbers, started: float, cap_watts: float) -> tuple[_Whole, _Whole, _Whole]:
        """(rows, what cutting such a step in parts adds to them, the collectives in rows) in picoseconds, at points."""
        step, overlap = Step.decode(points, 1), self._overlap
        seconds, sent = self._parts(ops, step, started)
        if cap_watts:
            seconds = seconds * slower(ops, step, self._machine, cap_watts)
        whole, wire = self._whole(seconds), self._whole(sent)
        if not overlap:
            return whole, 0 * whole, wire
        step = Step.decode(np.ceil(points / overlap.parts), 1)
        seconds, sent = self._parts(ops, step, started)
        if cap_watts:  # reading caches beside products may take all the bandwidth, and draws for it
            seconds = seconds * slower(ops, step, self._machine, cap_watts, beside=1.0)
        seen = sent * overlap.parts * overlap.network
        cut = self._whole((seconds - sent) * overlap.parts + seen)
        return np.minimum(whole, cut), np.maximum(cut - whole, 0), np.where(cut < whole, self._whole(seen), wire)

    def _parts(self, ops: list[Op], step: Step, more: float) -> tuple[Any, Any]:
        """(all seconds, those of collectives) of ops over the points of a step."""
        sent = [op for op in ops if op.kind in COLLECTIVES]
        whole = sum((op_time(op, step, self._machine).seconds for op in ops), np.zeros(step["tokens"].shape) + more)  # type: ignore[union-attr]
        return whole, sum((op_time(op, step, self._machine).seconds for op in sent), np.zeros(step["tokens"].shape))  # type: ignore[union-attr]

    def _whole(self, seconds: _Numbers) -> _Whole:
        return np.rint(seconds * self._factor * PS).astype(np.int64)

    def _prompt_tables(self) -> tuple[_Table, _Table]:
        """Picoseconds per token of attention for pieces of n tokens after p: rows p, columns n. Nearly linear in both.

        In all, and what a cap adds.
        """
        new, past = np.meshgrid(np.array(self._prompt_rows, float), np.array(_PAST, float))
        step = Step(1, new[..., None], past[..., None], phase="prefill")
        body, _ = _spent(self._mixers, step, self._machine)
        each = np.asarray(body) * self._factor * PS / new
        more = each * (slower(self._mixers, step, self._machine, self._cap) - 1) if self.capped else 0 * each
        return (each + more).tolist(), more.tolist()

    def rows(self, rows: int) -> int:
        """What depends on the rows of a step alone, and the start of its attention kernels."""
        return self._at(self._rows, rows)

    def outputs(self, outputs: int) -> int:
        """The output layer for so many sequences."""
        return self._at(self._outputs, outputs) if outputs else 0

    def reading(self, tokens: int, decoding: int) -> int:
        """What so many tokens of prompts add to the rows of a step in which so many sequences decode."""
        return self.rows(tokens + decoding) - (self.rows(decoding) if decoding else 0)

    def ending(self, done: int, decoding: int) -> int:
        """What the first tokens after so many prompts add to the output layer beside so many that decode."""
        return self.outputs(decoding + done) - self.outputs(decoding)

    def communication(self, rows: int) -> int:
        """The collectives within `rows`."""
        return self._at(self._sent, rows)

    def host(self, decoding: int, pieces: int = 0) -> int:
        """The engine's own time of a step in which so many sequences decode, beside pieces of prompts."""
        return self._step + self._each * (decoding + pieces)

    def _at(self, table: list[int], rows: int) -> int:
        if 0 < rows <= _DENSE:
            return table[rows - 1]
        points = self._points
        i = bisect_right(points, rows) - 1
        low = points[i]
        if low == rows:
            return table[i]
        if i + 1 == len(points):
            raise NarrowsError(f"{rows} rows.", where="serving step", remedy=f"At most {points[-1]} are tabled: raise most_rows.")
        return table[i] + (table[i + 1] - table[i]) * (rows - low) // (points[i + 1] - low)

    def prompt(self, new: int, past: int) -> int:
        """Attention of a piece of `new` tokens of a prompt that follow `past` cached ones."""
        return self._between(self._prompts, new, past)

    def held(self, rows: int) -> int:
        """What a power cap adds to `rows`."""
        return self._at(self._held, rows) if self.capped and rows else 0

    def held_reading(self, tokens: int, decoding: int) -> int:
        """What a power cap adds to `reading`."""
        return max(self.held(tokens + decoding) - self.held(decoding), 0)

    def held_prompt(self, new: int, past: int) -> int:
        """What a power cap adds to `prompt`."""
        return self._between(self._prompts_held, new, past) if self.capped else 0

    def _between(self, table: _Table, new: int, past: int) -> int:
        columns = self._prompt_rows
        i = min(bisect_right(columns, new) - 1, len(columns) - 2)
        j = min(bisect_right(_PAST, past) - 1, len(_PAST) - 2)
        x = (new - columns[i]) / (columns[i + 1] - columns[i])
        y = (past - _PAST[j]) / (_PAST[j + 1] - _PAST[j])
        low = table[j][i] + (table[j][i + 1] - table[j][i]) * x
        high = table[j + 1][i] + (table[j + 1][i + 1] - table[j + 1][i]) * x
        return round((low + (high - low) * y) * new)

    def decoding(self, sequences: int, context: int, rows: int) -> Segment:
        """The linear piece on which attention of `sequences` decoding ones lies whose caches hold `context` tokens.

        What it adds to a step of so many rows: with overlap less than it takes.
        """
        if sequences not in self._decoding:
            self._table_decoding(sequences)
        starts, segments = self._decoding[sequences]
        if self._overlap:
            if (sequences, rows) not in self._beside:
                share = 0.0 if self._shelf else self._overlap.memory  # drives take no units of the device
                self._beside[sequences, rows] = self._hidden(segments, rows, share)
            starts, segments = self._beside[sequences, rows]
        return segments[bisect_right(starts, context) - 1]

    def decode(self, sequences: int, context: int) -> tuple[Segment, int]:
        """Picoseconds of a step in which so many sequences give a token each, and the piece on which its attention lies."""
        if sequences not in self._fixed:
            self._fixed[sequences] = self.rows(sequences) + self.outputs(sequences) + self.host(sequences)
        piece = self.decoding(sequences, context, sequences)
        return piece, self._fixed[sequences] + piece.base + piece.slope * (context - piece.start)

    def _hidden(self, segments: list[Segment], rows: int, share: float) -> tuple[list[int], list[Segment]]:
        """What is left to see of attention: all where cutting the step gains nothing, then `share`, then what outlasts the rest.

        The time of a step in picoseconds is rows + min(attention, max(more + share x attention, attention - rows)).
        """
        beside, more = self._at(self._rows, rows), self._at(self._more, rows)
        pieces: list[Segment] = []
        for segment in segments:
            at = [segment.start]
            for attention in (more / (1 - share), (more + beside) / (1 - share)):
                if segment.slope and attention > segment.base:
                    at.append(segment.start + ceil((attention - segment.base) / segment.slope))
            kept = sorted({start for start in at if not segment.end or start < segment.end})
            for start, end in zip(kept, [*kept[1:], segment.end], strict=True):
                whole = segment.base + segment.slope * (start - segment.start)
                seen = min(whole, max(more + round(share * whole), whole - beside))
                cut = seen == more + round(share * whole) and seen < whole
                pieces.append(Segment(start, end, seen, round(share * segment.slope) if cut else segment.slope))
        return [piece.start for piece in pieces], pieces

    def _table_decoding(self, sequences: int) -> None:
        """Fill in a stretch of batch sizes at once: the cost model takes arrays."""
        first = sequences - (sequences - 1) % 64
        batch, past = np.meshgrid(np.arange(first, first + 64, dtype=float), np.array(_PAST, float), indexing="ij")
        step = Step(batch[..., None], self._brings, past[..., None], phase="decode")
        body = _spent(self._mixers, step, self._machine)[0] * self._factor
        if self._shelf:
            body = self._shelf.seconds(self._mixers, step)
        for i, line in enumerate(np.rint(np.asarray(body) * PS)):
            count, values = first + i, [int(v) for v in line]
            starts = [p * count for p in _PAST]
            slopes = [round((b - a) / (y - x)) for a, b, x, y in zip(values, values[1:], starts, starts[1:], strict=False)]
            ends = [*starts[1:-1], 0]  # the last goes on for ever
            pieces = [Segment(*piece) for piece in zip(starts, ends, values, slopes, strict=False)]
            self._decoding[count] = (starts[: len(pieces)], pieces)


def steps_to(gap: int, each: int, slope: int, most: int) -> int:
    """The fewest steps, of `each` picoseconds and `slope` more every time, that take at least `gap`; at most `most`."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if middle * each + slope * (middle * (middle - 1) // 2) >= gap:
            high = middle
        else:
            low = middle + 1
    return low


def _reads(op: Op, field: str) -> bool:
    return any(field == name for dim in dict(op.dims).values() for name, _ in getattr(dim, "terms", ()))


def _spent(ops: list[Op], step: Step, machine: Machine) -> tuple[Any, Any]:
    """Seconds of ops without and of the start of their kernels."""
    body: Any = 0.0
    start: Any = 0.0
    for op in ops:
        causes = op_time(op, step, machine).causes
        start = start + causes.get("launch", 0.0)
        body = body + sum((s for cause, s in causes.items() if cause != "launch"), 0.0)
    return body, start


@lru_cache
def _grid(most: int, dense: int = _DENSE) -> list[int]:
    """Sizes from 1 to at least `most`: every one up to `dense`, where tiles and waves show, then ever wider steps."""
    points, width = list(range(1, dense + 1)), max(dense // 32, 1)
    while points[-1] < most:
        if points[-1] >= 64 * width:
            width *= 2
        points.append(points[-1] + width)
    return points
