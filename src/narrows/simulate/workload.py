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
from typing import Any

from narrows.errors import NarrowsError, closest
from narrows.simulate.requests import Request
from narrows.simulate.step_times import PS

LARGEST = 10**9  # tokens of a prompt or an answer
FORMATS = "Azure (TIMESTAMP,ContextTokens,GeneratedTokens), Mooncake (timestamp in ms, input_length, output_length, hash_ids) "\
          "and vLLM requests (arrival_time, input_toks, output_toks)"  # fmt: skip


def read(path: Path | str) -> Iterator[Request]:
    """The requests of a trace, in the order of the file, the first at 0: Azure CSV, Mooncake JSONL or vLLM JSONL.

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
        first = file.readline()
        file.seek(0)
        rows = _json_rows(file, path) if first.lstrip().startswith("{") else _csv_rows(file, path)
        start = last = None
        for line, seconds, prompt, output, hashes, name in rows:
            at = f"{path}, line {line}"
            sizes = [_whole(value, at, what) for value, what in ((prompt, "prompt tokens"), (output, "output tokens"))]
            if not 0 <= seconds < math.inf:
                raise NarrowsError(f"it arrives at {seconds:g}.", where=at, remedy="Give seconds from 0, or a date.")
            if start is None:
                start = seconds
            if last is not None and seconds < last:
                raise NarrowsError(f"it arrives {last - seconds:g} s before the line above.", where=at, remedy="Sort by arrival.")
            last = seconds
            yield Request(round((seconds - start) * PS), sizes[0], sizes[1], hashes, name)
        if start is None:
            raise NarrowsError("it has no requests.", where=str(path), remedy=f"Give a trace: {FORMATS}.")


_Row = tuple[int, float, Any, Any, tuple[int, ...], str]


def _csv_rows(file: Iterable[str], path: Path) -> Iterator[_Row]:
    rows = csv.DictReader(file)
    wanted = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"}
    missing = wanted - set(rows.fieldnames or ())
    if missing:
        raise NarrowsError(f"it lacks the columns {', '.join(sorted(missing))}.", where=str(path), remedy=f"Give {FORMATS}.")
    for line, row in enumerate(rows, 2):
        yield line, _moment(row["TIMESTAMP"], f"{path}, line {line}"), row["ContextTokens"], row["GeneratedTokens"], (), ""


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
        form = next((f for f in _FIELDS if isinstance(row, dict) and {f[0], f[2], f[3]} <= row.keys()), None)
        if form is None:
            raise NarrowsError("it has not the fields of a trace.", where=at, remedy=f"Give {FORMATS}.")
        moment, unit, prompt, output = form
        if isinstance(row[moment], bool) or not isinstance(row[moment], int | float) or not abs(row[moment]) < 1e18:
            raise NarrowsError(f"{moment} is {row[moment]!r}.", where=at, remedy="Give a number.")
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or not all(isinstance(name, int) for name in hashes):
            raise NarrowsError("its hash_ids are no list of whole numbers.", where=at, remedy="Leave them out, or mend them.")
        yield line, float(row[moment]) * unit, row[prompt], row[output], tuple(hashes), str(row.get("request_id", ""))


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


def generate(rate: float, count: int, lengths: Lengths, seed: int = 0, burst: float = 1.0) -> Iterator[Request]:
    """So many requests at `rate` per second, gaps gamma distributed with coefficient of variation `burst` (1: Poisson; 0: even).

    The same seed gives the same requests.
    """
    if not rate > 0:
        raise NarrowsError(f"{rate} is no rate.", where="--rate", remedy="Give requests per second, above 0.")
    draw, now = random.Random(seed), 0.0
    shape = 1 / burst**2 if burst else 0.0
    for _ in range(count):
        yield Request(round(now * PS), _length(draw, lengths.prompt, lengths.prompt_spread),
                      _length(draw, lengths.output, lengths.output_spread))  # fmt: skip
        now += draw.gammavariate(shape, 1 / (rate * shape)) if shape else 1 / rate


def _length(draw: random.Random, mean: float, spread: float) -> int:
    if not spread:
        return max(1, round(mean))
    variance = math.log(1 + spread**2)
    return max(1, round(draw.lognormvariate(math.log(mean) - variance / 2, variance**0.5)))


@cache
def _loads() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("narrows.data").joinpath("loads.toml").read_text("utf-8"))


def _bundled(name: str) -> dict[str, Any]:
    if name not in _loads():
        raise NarrowsError(f"no load is called {name!r}.", where="--load", remedy=closest(name, loads()))
    return _loads()[name]


def loads() -> list[str]:
    """The names of bundled loads that are like recorded ones."""
    return sorted(_loads())


def mean_rate(name: str) -> float:
    """Requests per second of a bundled load; raises NarrowsError for a name that is not bundled."""
    return float(_bundled(name)["rate"])


def like(name: str, count: int = 0, rate: float = 0.0, seed: int = 0) -> Iterator[Request]:
    """Requests as in a recorded trace by its mean rate, its burst and its lengths; 0: as many, and as often, as there.

    Raises NarrowsError for a name that is not bundled.
    """
    c = _bundled(name)
    lengths = Lengths(c["prompt"], c["output"], c["prompt_spread"], c["output_spread"])
    return generate(rate or c["rate"], count or c["requests"], lengths, seed, c["burst"])


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
