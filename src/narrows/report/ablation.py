"""What each step of a plan does alone and together, as a table."""

from narrows.ablation import Ablation, Variant
from narrows.report.tables import Cell, Table, columns, times


def ablation_table(found: Ablation) -> Table:
    """A row for each step alone, for the plan up to each, and for the product of the single gains and what is left of it."""
    kinds = list(found.alone[0].speed)

    def row(says: str, one: Variant) -> tuple[Cell, ...]:
        timed = (Cell(times(value)) for kind in kinds for value in (one.speed[kind], one.predicted[kind][0]))
        return Cell(says), Cell(f"{one.quality:.3f}"), Cell(f"{one.bytes:.3f}"), *timed

    alone = [row(f"{one.plan} {'added' if one.added else 'alone'}", one) for one in found.alone]
    joined = [row(f"up to {one.plan.rpartition(' + ')[2]}", one) for one in found.up_to[1:]]
    products = found.products
    said = [f"{products[of].of_steps:.3f}" for of in ("quality", "bytes")]
    left = [f"{products[of].interaction:.3f}" for of in ("quality", "bytes")]
    for kind in kinds:
        of, foreseen = products[kind], products[kind].predicted_of_steps or 0.0
        said += [times(of.of_steps), times(foreseen)]
        left += [f"{of.interaction:.3f}", f"{(of.predicted_whole or 0.0) / foreseen:.3f}"]
    rows = [*alone, *joined, (Cell("product of the steps"), *map(Cell, said)), (Cell("all of them over it"), *map(Cell, left))]
    heads = columns("plan", *(f"{h}:number" for h in (found.measure, "bytes", *(h for k in kinds for h in (k, "predicted")))))
    noise = max(value for one in (*found.alone, *found.up_to) for value in one.noise.values())
    note = f"timings of the original differ by up to {noise:.2f} times; 1 in the last row: the gains multiply"
    return Table("What each step does", heads, tuple(rows), note=note)
