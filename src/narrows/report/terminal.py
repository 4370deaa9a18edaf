"""Draws the reports' tables and sentences in a terminal, from 60 columns up, with colour or without."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from narrows.ablation import Ablation
from narrows.claims import Evidence
from narrows.diagnose import Diagnosis
from narrows.explain import findings
from narrows.graph import Graph
from narrows.machine import Machine
from narrows.prescribe import Prescription
from narrows.report import ablation as ablations
from narrows.report import budget as budgets
from narrows.report import failures, listings, serving, tables, training
from narrows.report.tables import Cell, Column, Span, Table, clean
from narrows.search.budget import Found
from narrows.search.serve import ServePlan
from narrows.search.train import TrainPlan
from narrows.simulate.failures import Goodput
from narrows.simulate.outcome import Outcome
from narrows.technique import Reading
from narrows.verify import Verification

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STYLES = {
    "compute": "blue",
    "bandwidth": "yellow",
    "communication": "green",
    "launch": "magenta",
    "capacity": "cyan",
    "storage": "cyan",
    "good": "green",
    "bad": "bold red",
    "quiet": "dim",
}
_SLOWEST = 10
_WIDEST_BAR = 30


def show_diagnosis(d: Diagnosis, console: "Console") -> None:
    """The answer in a sentence, then memory, ledger, what-if and the slowest ops of a step."""
    _say(tables.headline(d), console, "bold")
    _say(tables.describe(d.step) + "; " + tables.work_sentence(d), console)
    if spent := listings.energy_sentence(d):
        _say(spent, console)
    shapes = listings.finding_table(findings(d))
    for table in (tables.memory_table(d), tables.ledger_table(d), shapes, tables.what_if_table(d), tables.op_table(d, _SLOWEST)):
        if table.rows:
            _draw(table, console)
    console.print()
    for note in (*d.notes, tables.provenance(d)):
        _say(note, console, "dim")


def show_prescription(p: Prescription, console: "Console") -> None:
    """The best plan in a sentence, what is free, the ranked plans, the next command, and why not the rest."""
    _say(tables.prescription_sentence(p), console, "bold")
    for title, options in (("Free", p.free), ("Techniques, best first", p.options)):
        if options:
            _draw(tables.option_table(title, options), console)
    if command := tables.next_command(p):
        _say("\nNext:", console)
        # a command to copy must not be broken by the width of the terminal
        console.print(_text("  " + command, "bold"), soft_wrap=True)
    refused = tables.why_not_table(p)
    if refused.rows or refused.note:
        _draw(refused, console)


def show_verification(v: Verification, console: "Console") -> None:
    """Whether a plan did what was predicted: the verdict, then speed, quality and bytes."""
    _say(tables.verdict(v), console, "bold green" if v.passed else "bold red")
    for table in (tables.speed_table(v), tables.kept_table(v)):
        if table.rows:
            _draw(table, console)


def show_ablation(found: Ablation, console: "Console") -> None:
    """What each step of a plan does alone and together, and whether the gains multiply."""
    _draw(ablations.ablation_table(found), console)


def show_budget(found: Found, console: "Console") -> None:
    """What a search within a budget found, or which limits bind; then the choices that nothing beats in size and perplexity."""
    kept = found.plan is not None
    _say(budgets.budget_sentence(found), console, "bold green" if kept else "bold red")
    _draw(budgets.budget_table(found), console)


def show_graph(g: Graph, console: "Console") -> None:
    """What a captured graph holds, by kind of op."""
    folded = g.fold()
    _say(listings.graph_sentence(folded), console, "bold")
    _draw(listings.graph_table(folded), console)
    for note in g.notes:
        _say(note, console, "dim")


def show_papers(rows: Sequence[Mapping[str, Any]], console: "Console") -> None:
    """The catalogue: mappings with slug, name, family, priority, status, claims and passing."""
    _draw(listings.paper_table(rows), console)


def show_evidence(rows: Sequence[Evidence], console: "Console") -> None:
    """What papers claim beside what was measured."""
    _draw(listings.evidence_table(rows), console)


def show_machines(found: Iterable[Machine], console: "Console") -> None:
    """Machines with their peaks, memory and links."""
    _draw(listings.machine_table(found), console)


def show_models(found: Iterable[Graph], console: "Console") -> None:
    """Models with their parameters and bytes."""
    _draw(listings.model_table(found), console)


def show_reading(title: str, found: Reading, console: "Console") -> None:
    """What an analysis found."""
    _say(title, console, "bold")
    for table in listings.reading_tables(found):
        if table.rows:
            _draw(table, console)


def show_outcome(o: Outcome, where: str, console: "Console", notes: Sequence[str] = ()) -> None:
    """A load served: what clients saw, and why; `notes` are further sentences."""
    _say(listings.outcome_sentence(o, where), console, "bold")
    if o.requests:
        _draw(listings.latency_table(o), console)
        _draw(listings.request_table(o), console)
    for note in (*o.notes(), *notes):
        _say(note, console, "dim")


def show_train_plan(p: TrainPlan, console: "Console") -> None:
    """The fastest layout in a sentence, its rivals, where its time and memory go, and why not others."""
    _say(training.plan_sentence(p), console, "bold")
    if p.best:
        _draw(training.choice_table("Fastest first", p.best), console)
        _draw(training.step_table(p.best[0]), console)
        _draw(training.rank_table(p.best[0]), console)
    if p.pareto:
        _draw(training.front_table(p), console)
    console.print()
    for line in (training.effort_sentence(p), *p.why_not):
        _say(line, console, "dim")


def show_train_run(g: Goodput, where: str, held: str, console: "Console") -> None:
    """A training run that fails and goes on: its goodput in a sentence, where the time goes, and its checkpoints."""
    _say(failures.run_sentence(g, where), console, "bold")
    _draw(failures.run_table(g), console)
    for note in failures.notes(g, held):
        _say(note, console, "dim")


def show_serve_plan(p: ServePlan, console: "Console") -> None:
    """The best deployment in a sentence, its rivals, and why not others."""
    _say(serving.plan_sentence(p), console, "bold")
    if p.best:
        _draw(serving.deployment_table(p), console)
    console.print()
    for line in (*p.notes, serving.effort_sentence(p), *p.why_not):
        _say(line, console, "dim")


def show_here(found: Mapping[str, Any], console: "Console") -> None:
    """Real models on this machine: measured beside predicted."""
    _draw(listings.here_table(found), console)


def _text(text: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(clean(text) if "\n" not in text else "\n".join(map(clean, text.split("\n"))), style)


def _say(text: str, console: "Console", style: str = "") -> None:
    console.print(_text(text, style))


def _draw(table: Table, console: "Console") -> None:
    from rich.table import Table as Grid

    every = [*table.rows, *([table.total] if table.total else [])]
    kept = [i for i, c in enumerate(table.columns) if console.width >= c.least]
    widths = _widths(table, every, kept, console.width)
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for i in kept:
        column = table.columns[i]
        right = column.kind == "number"
        grid.add_column(
            _text(column.title, "dim"),
            justify="right" if right else "left",
            width=widths[i],
            no_wrap=column.kind != "prose",
            overflow="fold",
        )
    for n, row in enumerate(every):
        style = "bold" if table.total and n == len(every) - 1 else ""
        grid.add_row(*(_cell(row[i], table.columns[i], widths[i], table.reach, console) for i in kept), style=style)
    if table.title:
        _say("\n" + table.title, console, "bold")
    console.print(grid)
    if table.note:
        _say(table.note, console, "dim")


def _widths(table: Table, every: Sequence[Sequence[Cell]], kept: Sequence[int], width: int) -> dict[int, int]:
    """Text and numbers get what they need; names, prose, bars and whiskers share what is left."""
    from rich.cells import cell_len

    def needed(i: int) -> int:
        kind = table.columns[i].kind
        if kind in ("bar", "span"):
            return _WIDEST_BAR
        texts = [table.columns[i].title, *(text for row in every for text in (row[i].text, row[i].under))]
        return max(cell_len(clean(text)) for text in texts)

    found = {i: needed(i) for i in kept}
    elastic = sorted((i for i in kept if table.columns[i].kind not in ("text", "number")), key=lambda i: found[i])
    left = width - 2 * (len(kept) - 1) - sum(n for i, n in found.items() if i not in elastic) - 1
    for n, i in enumerate(elastic):  # what the narrow ones do not use goes to the wide ones
        found[i] = min(found[i], max(8, left // (len(elastic) - n)))
        left -= found[i]
    return found


def _cell(cell: Cell, column: Column, width: int, scale: tuple[float, float], console: "Console") -> "Text":
    plain = console.options.ascii_only
    style = _STYLES.get(cell.tone, "")
    if column.kind == "bar":
        return _text(_bar(cell.share, width, plain), style)
    if column.kind == "span":
        return _text(_whisker(cell.span, width, scale, plain) if cell.span else "")
    text = _text(_elided(clean(cell.text), width, plain) if column.kind == "name" else cell.text, style)
    if cell.under:
        text.append("\n" + clean(cell.under), "dim not bold")
    return text


def _elided(text: str, width: int, plain: bool) -> str:
    """A module path says most at its end, so it is cut at its beginning."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    mark = ".." if plain else "…"
    while text and cell_len(text) + len(mark) > width:
        text = text[1:]
    return mark + text


def _bar(share: float | None, width: int, plain: bool) -> str:
    if share is None or share <= 0:
        return ""
    if share > 1:  # more than there is: the bar runs into the wall
        return ("#" if plain else "█") * (width - 1) + ">"
    if plain:
        return "#" * max(1, round(share * width))
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _whisker(span: Span, width: int, scale: tuple[float, float], plain: bool) -> str:
    low, high = scale
    cells = [" "] * width

    def at(value: float) -> int:
        return round((value - low) / ((high - low) or 1) * (width - 1))

    line, left, right, dot, one, seen = "-[]o|X" if plain else "─├┤●┊◆"
    cells[at(1.0)] = one
    cells[at(span.low) : at(span.high) + 1] = [line] * (at(span.high) - at(span.low) + 1)
    cells[at(span.low)], cells[at(span.high)], cells[at(span.mid)] = left, right, dot
    if span.measured is not None:
        cells[at(span.measured)] = seen
    return "".join(cells)
