"""What clients ask of a serving engine: recorded traces, read as they come, and generators of arrivals and lengths."""

import csv
import json
import math
import random
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from narrows.errors import NarrowsError, closest
from narrows.simulate.requests import Request, chained
from narrows.simulate.step_times import PS

LARGEST = 10**9  # tokens of a prompt or an answer
FORMATS = (
    "Azure (TIMESTAMP,ContextTokens,GeneratedTokens), Mooncake (timestamp in ms, input_length, output_length, hash_ids) "
    "and vLLM requests (arrival_time, input_toks, output_toks); JSONL may also have n (answers), and session, turn, think"
)


def read(path: Path | str) -> Iterator[Request]:
    """The requests of a trace, in the order of the file, the first at 0: Azure CSV, Mooncake JSONL or vLLM JSONL.

    In JSONL `n` is how many answers of that length a prompt gets. Rows with a `session` are its turns, one under the
    other; `turn` counts from 1. The first has an arrival, each other one its `think` seconds after the answer before, and
    the length of the whole talk so far with its new words.
    Raises NarrowsError, naming the line, for a file of another form, for a length that is no whole number above 0 and for
    an arrival that is negative, no number, or before the one above it.
    """
    path = Path(path)
    if not path.is_file():
        raise NarrowsError("there is no such file.", where=str(path), remedy=f"Give a trace: {FORMATS}.")
    try:
        yield from _requests(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise NarrowsError(f"it is not text ({error}).", where=str(path), remedy=f"Give a trace: {FORMATS}.") from error


def _requests(path: Path) -> Iterator[Request]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        file.seek(0)
        rows = _json_rows(file, path) if head.lstrip().startswith("{") else _csv_rows(file, path)
        start = last = opened = None
        turns: list[Request] = []  # of the session that is being read
        sessions = 0
        for row in rows:
            at = f"{path}, line {row.line}"
            if not 0 <= row.seconds < math.inf:
                raise NarrowsError(f"it arrives at {row.seconds:g}.", where=at, remedy="Give seconds from 0, or a date.")
            prompt, output = (_whole(v, at, what) for v, what in ((row.prompt, "prompt tokens"), (row.output, "output tokens")))
            also = (output,) * (_whole(row.answers, at, "answers") - 1)
            if row.turn != 1:
                if not turns or row.session != opened or row.turn != len(turns) + 1:
                    raise NarrowsError(f"turn {row.turn!r} of session {row.session!r} does not follow the one before.", where=at,
                                       remedy="Write the turns of a session one under the other, from 1.")  # fmt: skip
                if prompt <= turns[-1].prompt + turns[-1].output:
                    raise NarrowsError(f"its prompt of {prompt} tokens has no new words after the talk so far.", where=at,
                                       remedy="Count the prompts and answers before it, too.")  # fmt: skip
                turns.append(Request(round(row.seconds * PS), prompt, output, row.hashes, row.name, also=also))
                continue
            if turns:
                yield chained(sessions, turns)
            if last is not None and row.seconds < last:
                raise NarrowsError(f"it arrives {last - row.seconds:g} s before the line above.", where=at,
                                   remedy="Sort by arrival.")  # fmt: skip
            last, start = row.seconds, row.seconds if start is None else start
            first = Request(round((last - start) * PS), prompt, output, row.hashes, row.name, also=also)
            if row.session is None:
                turns = []
                yield first
            else:
                sessions, opened, turns = sessions + 1, row.session, [first]
        if turns:
            yield chained(sessions, turns)
        if start is None:
            raise NarrowsError("it has no requests.", where=str(path), remedy=f"Give a trace: {FORMATS}.")


class _Row(NamedTuple):
    line: int
    seconds: float  # of its arrival, or for a later turn after the answer before
    prompt: Any
    output: Any
    hashes: tuple[int, ...] = ()
    name: str = ""
    answers: Any = 1
    session: Any = None
    turn: Any = 1


def _csv_rows(file: Iterable[str], path: Path) -> Iterator[_Row]:
    rows = csv.DictReader(file)
    wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
    missing = wanted - set(rows.fieldnames or ())
    if missing:
        raise NarrowsError(f"it lacks the columns {', '.join(sorted(missing))}.", where=str(path), remedy=f"Give {FORMATS}.")
    for line, row in enumerate(rows, 2):
        yield _Row(line, _moment(row["TIMESTAMP"], f"{path}, line {line}"), row["ContextTokens"], row["GeneratedTokens"])


def _moment(text: str | None, at: str) -> float:
    """Seconds of a date (Azure writes seven digits of a second) or of a plain number."""
    if text is None:
        raise NarrowsError("it has fewer cells than the header.", where=at, remedy="Check its commas.")
    try:
        return float(text)
    except ValueError:
        pass
    try:
        head, _, fraction = text.partition(".")
        return datetime.fromisoformat(f"{head}+00:00").timestamp() + float(f"0.{fraction or 0}")
    except ValueError as error:
        raise NarrowsError(f"{text!r} is no time.", where=at, remedy="Write 2023-11-16 18:17:03.97, or seconds.") from error


_FIELDS = (("timestamp", 1e-3, "input_length", "output_length"), ("arrival_time", 1.0, "input_toks", "output_toks"),
           ("arrival", 1.0, "prompt", "output"))  # fmt: skip


def _json_rows(file: Iterable[str], path: Path) -> Iterator[_Row]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        at = f"{path}, line {line}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise NarrowsError(f"it is not JSON ({error.msg}).", where=at, remedy="Give one object a line.") from error
        form = next((f for f in _FIELDS if isinstance(row, dict) and {f[2], f[3]} <= row.keys()), None)
        later = form is not None and row.get("session") is not None and row.get("turn", 1) != 1
        if form is None or (form[0] not in row and not later):
            raise NarrowsError("it has not the fields of a trace.", where=at, remedy=f"Give {FORMATS}.")
        moment, unit, prompt, output = form
        seconds = _number(row, "think", at) if later else _number(row, moment, at) * unit
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(isinstance(name, int) for name in hashes):
            raise NarrowsError("its hash_ids are no list of whole numbers.", where=at, remedy="Leave them out, or mend them.")
        yield _Row(line, seconds, row[prompt], row[output], tuple(hashes), str(row.get("request_id", "")), row.get("n", 1),
                   row.get("session"), row["turn"] if later else 1)  # fmt: skip


def _number(row: dict[str, Any], name: str, at: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise NarrowsError(f"{name} is {value!r}.", where=at, remedy="Give a number.")
    return float(value)


def _whole(value: Any, at: str, what: str) -> int:
    number = value if isinstance(value, int | float) else int(value) if re.fullmatch(r"\s*\d{1,12}\s*", str(value)) else 0
    if not 1 <= number <= LARGEST or number != int(number):
        raise NarrowsError(f"{what} are {str(value)[:40]!r}.", where=at, remedy="Give a whole number from 1.")
    return int(number)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long prompts and answers are: log-normal with a mean and a coefficient of variation; 0 is always the mean."""

    prompt: float
    output: float
    prompt_spread: float = 0.0
    output_spread: float = 0.0

    @classmethod
    def like(cls, requests: Iterable[Request]) -> "Lengths":
        """Fitted to requests by their first two moments."""
        both = [(r.prompt, r.output) for r in requests]
        means = [sum(v) / len(both) for v in zip(*both, strict=True)]
        spreads = [
            (sum((v - mean) ** 2 for v in values) / len(both)) ** 0.5 / mean
            for values, mean in zip(zip(*both, strict=True), means, strict=True)
        ]
        return cls(means[0], means[1], spreads[0], spreads[1])


def generate(rate: float, count: int, lengths: Lengths, seed: int = 0, burst: float = 1.0, answers: int = 1) -> Iterator[Request]:
    """So many requests at `rate` per second, gaps gamma distributed with coefficient of variation `burst` (1: Poisson; 0: even).

    Each has so many answers. The same seed gives the same requests.
    """
    if answers < 1:
        raise NarrowsError(f"{answers} answers.", where="--answers", remedy="Give 1 or more.")
    if not rate > 0:
        raise NarrowsError(f"{rate} is no rate.", where="--rate", remedy="Give requests per second, above 0.")
    draw, now = random.Random(seed), 0.0
    shape = 1 / burst**2 if burst else 0.0
    for _ in range(count):
        prompt = draw_length(draw, lengths.prompt, lengths.prompt_spread)
        first, *also = (draw_length(draw, lengths.output, lengths.output_spread) for _ in range(answers))
        yield Request(round(now * PS), prompt, first, also=tuple(also))
        now += draw.gammavariate(shape, 1 / (rate * shape)) if shape else 1 / rate


def draw_length(draw: random.Random, mean: float, spread: float) -> int:
    """A whole number from 1, log-normal with a mean and a coefficient of variation."""
    if not spread:
        return max(1, round(mean))
    variance = math.log(1 + spread**2)
    return max(1, round(draw.lognormvariate(math.log(mean) - variance / 2, variance**0.5)))


@cache
def _loads() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("narrows.data").joinpath("loads.toml").read_text("utf-8"))


def bundled(name: str) -> dict[str, Any]:
    """The figures of a load of data/loads.toml; raises NarrowsError for a name that is not there."""
    if name not in _loads():
        raise NarrowsError(f"no load is called {name!r}.", where="--load", remedy=closest(name, loads()))
    return _loads()[name]


def loads() -> list[str]:
    """The names of bundled loads that are like recorded ones."""
    return sorted(_loads())


def mean_rate(name: str) -> float:
    """Requests per second of a bundled load; raises NarrowsError for a name that is not bundled."""
    return float(bundled(name)["rate"])


def like(name: str, count: int = 0, rate: float = 0.0, seed: int = 0, answers: int = 1) -> Iterator[Request]:
    """Requests as in a recorded trace by its mean rate, its burst and its lengths; 0: as many, and as often, as there.

    Raises NarrowsError for a name that is not bundled.
    """
    c = bundled(name)
    lengths = Lengths(c["prompt"], c["output"], c["prompt_spread"], c["output_spread"])
    return generate(rate or c["rate"], count or c["requests"], lengths, seed, c["burst"], answers)


DAY = 86400.0  # seconds


def swung(requests: Iterable[Request], swing: float, period: float = DAY) -> Iterator[Request]:
    """The same requests at a rate that swings: times 1 + swing x sin(2 pi t / period), so that it is met in the mean.

    Raises NarrowsError for a swing that is not below 1.
    """
    if not 0 <= swing < 1:
        raise NarrowsError(f"{swing} is no swing.", where="--swing", remedy="Give a share from 0 and below 1.")
    turn, now = 2 * math.pi / period, 0.0
    for r in requests:
        even = r.arrival / PS  # when it came at an even rate: now + swing / turn x (1 - cos(turn x now)), solved by Newton
        while abs(off := now + swing / turn * (1 - math.cos(turn * now)) - even) > 1e-12 * max(period, even):
            now -= off / (1 + swing * math.sin(turn * now))
        yield replace(r, arrival=round(now * PS))


def ramped(requests: Iterable[Request], factor: float) -> Iterator[Request]:
    """The same requests in the same time, at a rate that grows evenly to `factor` times what it begins with.

    All are held in memory. Raises NarrowsError for a factor that is not above 0.
    """
    if not 0 < factor < math.inf:
        raise NarrowsError(f"{factor} is no factor.", where="--ramp", remedy="Give a number above 0: 3 ends three times as fast.")
    every = list(requests)
    span, begins = max(every[-1].arrival, 1) if every else 1, 2 / (1 + factor)
    grows = begins * (factor - 1)
    for r in every:  # a share x of the time has passed when begins x + grows x^2 / 2 of the requests are there
        share = r.arrival / span
        x = 2 * share / (begins + math.sqrt(begins**2 + 2 * grows * share))
        yield replace(r, arrival=round(x * span))


def scaled(requests: Iterable[Request], factor: float) -> Iterator[Request]:
    """The same requests at `factor` times the rate."""
    return (replace(r, arrival=round(r.arrival / factor)) for r in requests)


def first(requests: Iterable[Request], count: int) -> Iterator[Request]:
    """At most so many of them."""
    return islice(requests, count)
