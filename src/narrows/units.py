"""Reading and printing quantities; everything between is plain seconds, bytes, FLOP and ratios of these.

GB is 1e9 bytes and GiB is 2**30. A multiply-add is 2 FLOP.
"""

import math
import re

from narrows.errors import NarrowsError

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "days": 86400.0, "y": 365 * 86400.0}
_LONG = ((3 * 86400.0, 86400.0, "days"), (3 * 3600.0, 3600.0, "h"), (600.0, 60.0, "min"))  # from so many seconds on
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def parse_bytes(text: str) -> int:
    """'40 GiB' or '512MB' or '1e9' as a whole number of bytes."""
    match = _QUANTITY.fullmatch(text)
    if not match or match[2].lower() not in _BYTES:
        raise NarrowsError(f"{text!r} is not a size in bytes.", remedy="Write it like 24GB or 16GiB.")
    return round(float(match[1]) * _BYTES[match[2].lower()])


def parse_seconds(text: str, where: str = "") -> float:
    """'90', '10min', '6h' or '30d' in seconds; `where` an error says it was given."""
    match = _QUANTITY.fullmatch(text)
    if not match or match[2].lower() not in _SECONDS:
        raise NarrowsError(f"{text!r} is no time.", where=where, remedy="Write it like 90s, 10min, 6h, 30d or 5y.")
    return float(match[1]) * _SECONDS[match[2].lower()]


def _scaled(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return f"{value} {unit}"
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return (
                f"{value / factor:.3g} {prefix}{unit}" if abs(value / factor) < 999.5 else f"{value / factor:.0f} {prefix}{unit}"
            )
    return f"{value:.3g} {unit}"


def format_bytes(count: float) -> str:
    """1.34e9 as '1.34 GB' (decimal, as disks and datasheets count)."""
    return _scaled(count, "B")


def format_flop(count: float) -> str:
    """2e12 as '2 TFLOP': an amount of work, never a rate."""
    return _scaled(count, "FLOP")


def format_joules(energy: float) -> str:
    """4.2e4 as '42 kJ'."""
    return _scaled(energy, "J")


def format_rate(per_second: float, unit: str) -> str:
    """3.35e12, 'B' as '3.35 TB/s'."""
    return _scaled(per_second, f"{unit}/s")


def format_seconds(seconds: float) -> str:
    """0.0042 as '4.2 ms', 86400 as '24 h'."""
    if seconds == 0:
        return "0 s"
    if not math.isfinite(seconds):
        return f"{seconds} s"
    for least, factor, unit in _LONG:
        if abs(seconds) >= least:
            return f"{seconds / factor:,.3g} {unit}" if abs(seconds / factor) < 999.5 else f"{seconds / factor:,.0f} {unit}"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")):
        if abs(seconds) >= factor:
            return f"{seconds / factor:.3g} {unit}" if abs(seconds / factor) < 999.5 else f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.3g} s"
