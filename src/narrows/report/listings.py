"""Tables of what there is: the ops of a graph, the catalogue, the evidence, machines and models."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from narrows.claims import Evidence
from narrows.diagnose import Diagnosis
from narrows.explain import Finding
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.report.tables import Cell, Table, columns, commas, percent, share_of, times
from narrows.simulate.outcome import Outcome
from narrows.technique import Reading
from narrows.units import format_bytes, format_joules, format_rate, format_seconds


def graph_sentence(g: Graph) -> str:
    runs = sum(op.repeat for op in g)
    how = "every operator its own kernel" if g.eager else "fused as an engine runs it"
    owns = f"{commas(g.parameters)} parameters, {format_bytes(g.weight_bytes)} of weights"
    return f"{g.name}: {owns}, {commas(runs)} ops folded into {len(g.ops)}, {how}"


def energy_sentence(d: Diagnosis) -> str:
    """Joules of a step over all devices and of each thing that comes out, and one device's watts; '' where unknown."""
    if d.energy is None:
        return ""
    what, n = "sequence" if d.step.phase == "forward" else "token", d.devices
    low, high = (format_joules(joules * n) for joules in d.energy.joules_interval)
    each = format_joules(share_of(d.energy.joules * n, float(d.step[f"{what}s"])))
    return f"{format_joules(d.energy.joules * n)} a step ({low} to {high}), {each} a {what}, {d.energy.watts:.0f} W a device"


def graph_table(g: Graph) -> Table:
    """The kinds of op in a graph: how many, and what they own."""
    kinds = {op.kind: [o for o in g if o.kind == op.kind] for op in g}
    rows = tuple(
        (
            Cell(kind),
            Cell(commas(len(ops)), len(ops)),
            Cell(commas(sum(o.repeat for o in ops))),
            Cell(commas(sum(o.parameters for o in ops))),
            Cell(format_bytes(sum(o.weight_bytes for o in ops))),
            Cell(", ".join(dict.fromkeys((o.weight or o.act).name for o in ops))),
            Cell(share=share_of(sum(o.weight_bytes for o in ops), g.weight_bytes), tone="bandwidth"),
        )
        for kind, ops in sorted(kinds.items(), key=lambda item: -sum(o.weight_bytes for o in item[1]))
    )
    heads = columns("kind", "ops:number", "runs:number", "parameters:number", "weights:number", "stored as", ":bar")
    return Table("Kinds of op", heads, rows)


def paper_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The catalogue with the derived status of each row: keys slug, name, family, priority, status, claims, passing."""
    tones = {"works": "good", "described": "quiet"}
    heads = columns("slug", "name:prose:120", "family:prose", "priority::90", "status", "claims:number")
    cells = tuple(
        (
            Cell(r["slug"]),
            Cell(r["name"]),
            Cell(r["family"]),
            Cell(r["priority"]),
            Cell(r["status"], tone=tones.get(r["status"], "")),
            Cell(f"{r['passing']} of {r['claims']}" if r["claims"] else ""),
        )
        for r in rows
    )
    counts = {s: sum(r["status"] == s for r in rows) for s in ("works", "built", "described")}
    return Table("", heads, cells, note=f"{len(rows)} techniques: " + ", ".join(f"{n} {s}" for s, n in counts.items()))


def evidence_table(rows: Sequence[Evidence]) -> Table:
    """Each claim: the paper's figure, ours, the tolerance, and whether it holds."""
    cells = tuple(
        (
            Cell(e.slug),
            Cell(e.claim),
            Cell("" if e.paper is None else f"{e.paper:.4g}"),
            Cell(f"{e.ours:.4g}"),
            Cell("" if e.baseline is None else f"{e.baseline:.4g}"),
            Cell(e.unit),
            Cell(e.tolerance),
            Cell(e.how),
            Cell("pass" if e.passed else "FAIL", tone="good" if e.passed else "bad"),
            Cell(format_seconds(e.seconds)),
        )
        for e in rows
    )
    heads = columns(
        "technique:name",
        "claim:name",
        "paper:number",
        "ours:number",
        "baseline:number:100",
        "unit",
        "tolerance::100",
        "how::120",
        "check",
        "took:number:120",
    )
    return Table("", heads, cells, note=f"{sum(e.passed for e in rows)} of {len(rows)} claims pass")


def machine_table(found: Iterable[Machine]) -> Table:
    """Machines with their main figures; the peak is the dense rate of bf16, or of the type named below it."""
    cells = tuple(
        (
            Cell(m.name),
            Cell(m.kind),
            Cell(
                format_rate(m.peak("bf16"), "FLOP"),
                m.peak("bf16"),
                under="" if m.computes_in("bf16") == "bf16" else m.computes_in("bf16"),
            ),
            Cell(format_bytes(m.memory.capacity_bytes)),
            Cell(format_rate(m.memory.bandwidth_bytes_per_s, "B")),
            Cell(format_rate(m.link.bandwidth_bytes_per_s, "B") if m.link else ""),
            Cell(f"{m.power_watts:g} W" if m.power_watts else ""),
            Cell(m.title),
        )
        for m in found
    )
    heads = columns(
        "machine",
        "kind",
        "bf16 peak:number",
        "memory:number",
        "bandwidth:number",
        "link:number:70",
        "power:number:75",
        "title:prose:110",
    )
    return Table("", heads, cells)


def model_table(found: Iterable[Graph]) -> Table:
    """Models that can be named without a file."""
    cells = tuple(
        (
            Cell(g.name),
            Cell(commas(g.parameters)),
            Cell(format_bytes(g.weight_bytes)),
            Cell(commas(sum(o.repeat for o in g))),
            Cell(g.source),
        )
        for g in found
    )
    return Table("", columns("model", "parameters:number", "weights:number", "ops:number", "from:prose"), cells)


def finding_table(found: Sequence[Finding]) -> Table:
    """What the shapes of a network cost, and what another shape would give."""
    rows = tuple(
        (Cell(f.problem, under=f.remedy), Cell(format_seconds(f.loss_seconds), f.loss_seconds), Cell(times(f.gain), f.gain))
        for f in found
    )
    return Table("What the shapes cost", columns("finding and remedy:prose", "loss:number", "gain:number"), rows)


def here_table(found: Mapping[str, Any]) -> Table:
    """Real models measured on this machine beside what was predicted: the rows of `narrows.here.summary`."""
    heads = columns("model", "plan", "step", "measured:number", "predicted:number", "error:number")
    cells = tuple(
        (
            Cell(m["model"]),
            Cell(m["plan"] or "as it is"),
            Cell(m["step"]),
            Cell(format_seconds(m["measured"])),
            Cell(format_seconds(m["predicted"]), under=f"{format_seconds(m['low'])} to {format_seconds(m['high'])}"),
            Cell(f"{m['error']:.0%}"),
        )
        for m in found["measurements"]
    )
    calls = found["faster_or_slower"]
    note = (
        f"median error {found['median']:.1%}, mean {found['mape']:.1%}; {found['coverage80']:.0%} inside their 80 % interval; "
        f"the faster of two forms named in {calls['right']} of {calls['cases']} cases"
        + (f"; {found['gains_coverage80']:.0%} of {len(found['gains'])} gains inside theirs" if found["gains"] else "")
        + "".join(f"; {m['model']} was not measured: {m['reason']}" for m in found["absent"])
    )
    return Table("Predicted and measured here", heads, cells, note=note)


def reading_tables(found: Reading) -> tuple[Table, Table]:
    """What an analysis found: its headline values, and its rows, of which the first says which columns there are."""
    values = tuple((Cell(_words(name)), _cell(v), Cell(found.units.get(name, ""))) for name, v in found.values.items())
    first = found.rows[0] if found.rows else {}
    kinds = [f"{_words(name)}:{_kind(value)}" for name, value in first.items()]
    rows = tuple(tuple(_cell(row.get(name, "")) for name in first) for row in found.rows)
    return Table("", columns("value", "figure:number", "unit"), values), Table("", columns(*kinds), rows)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "name" if "." in value else "text"
    return "prose" if isinstance(value, tuple | list) else "number"


def _cell(value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:.3g}", float(value))
    return Cell(", ".join(_words(str(part)) for part in value) if isinstance(value, tuple | list) else str(value))


WHERE = {
    "queue": ("waiting to be let in", "scheduling"),
    "cold_start": ("waiting for a replica to start", "storage"),
    "prompt": ("reading the prompt", "compute"),
    "interference": ("steps that read others' prompts", "scheduling"),
    "decode": ("giving tokens", "bandwidth"),
    "communication": ("collectives", "communication"),
    "host": ("the engine's own work", "launch"),
    "power_cap": ("a lower clock under the power cap", "energy"),
    "preemption": ("evicted, and reading again", "capacity"),
    "transfer": ("keys and values on their way", "communication"),
}


def outcome_sentence(o: Outcome, where: str) -> str:
    """A load served, in a sentence: what clients got, and what held the slow ones up."""
    if not o.requests:
        return f"{where}: nothing was served, {commas(o.rejected)} rejected."
    slow, seconds = next(iter(o.ledger(0.01).items()))
    rate = f"{o.requests / max(o.seconds, 1e-12):.3g} requests and {commas(o.tokens / max(o.seconds, 1e-12))} tokens a second"
    limited = min(o.ttft_limit, o.tpot_limit) < math.inf
    good = f", {percent(o.good / o.requests)} of them within the limits" if limited else ""
    share = percent(seconds / max(sum(o.ledger(0.01).values()), 1e-12))
    return f"{where}: {rate}{good}; the slowest 1 % spend {share} of their time on {WHERE[slow][0]}."


def latency_table(o: Outcome) -> Table:
    """What clients saw: mean and percentiles."""
    named = (("to the first token", o.ttft), ("per further token", o.tpot), ("between two tokens", o.tbt), ("in all", o.e2e))
    rows = tuple(
        (Cell(name), *(Cell(format_seconds(v), v) for v in spread.as_json().values())) for name, spread in named if spread.count
    )
    return Table("What clients saw", columns("seconds", "mean:number", "p50:number", "p90:number", "p99:number"), rows)


def request_table(o: Outcome) -> Table:
    """Where the time of a request goes, of all and of the slowest 1 %; the rows add up to the latency."""
    every, slow = o.ledger(), o.ledger(0.01)
    whole = max(sum(every.values()), 1e-12)
    rows = tuple(
        (Cell(WHERE[part][0], tone=WHERE[part][1]), Cell(format_seconds(s), s), Cell(percent(s / whole), s),
         Cell(share=s / whole, tone=WHERE[part][1]), Cell(format_seconds(slow[part]), slow[part]))
        for part, s in every.items() if s or slow[part]
    )  # fmt: skip
    total = (Cell("a request"), Cell(format_seconds(whole)), Cell("100 %"), Cell(), Cell(format_seconds(sum(slow.values()))))
    heads = columns("where the time goes", "mean:number", "share:number", "of it:bar", "slowest 1 %:number")
    return Table("Why", heads, rows, total=total)
