"""What a search within a budget found, as a sentence and a table."""

from narrows.report.tables import Cell, Table, columns
from narrows.search.budget import QUANTITIES, Found, said


def budget_sentence(found: Found) -> str:
    """The plan with what was measured of it, or the limits that bind."""
    if found.plan is None:
        return "No choice of formats keeps the budget: " + "; ".join(found.shortfalls)
    measured = ", ".join(said(name, found.measured[name]) for name in QUANTITIES)
    bound = f"no choice is estimated below {said(found.minimised, found.bound)}"
    return f"{found.plan}: measured {measured}; estimated {said(found.minimised, found.estimated[found.minimised])}, {bound}"


def budget_table(found: Found) -> Table:
    """The estimated choices that nothing beats in size and perplexity at once, within the limits of speed."""
    rows = tuple(
        tuple(Cell(said(name, row[name]).removeprefix(f"{name} "), row[name]) for name in QUANTITIES) for row in found.pareto
    )
    return Table("Best at each size, estimated", columns(*(f"{name}:number" for name in QUANTITIES)), rows)
