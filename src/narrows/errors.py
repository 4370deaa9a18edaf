"""The one error that narrows raises for bad input, and nothing else."""


class NarrowsError(ValueError):
    """A request that cannot be served: what was asked, what was found, and what to do about it.

    `where` names the place (a file and field, an op, a module path); `remedy` is one sentence in the imperative.
    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        self.problem, self.where, self.remedy = problem, where, remedy
        place = f"{where}: " if where else ""
        advice = f" {remedy}" if remedy else ""
        super().__init__(f"{place}{problem}{advice}")

    def inside(self, place: str) -> "NarrowsError":
        """The same error seen from one level further out: `place` is put before `where`."""
        where = f"{place}: {self.where}" if self.where else place
        return NarrowsError(self.problem, where=where, remedy=self.remedy)


def closest(word: str, known: list[str]) -> str:
    """'Did you mean ...?' for a misspelt name, or the first few names there are."""
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(sorted(known)[:12])}{', ...' if len(known) > 12 else ''}."


def require(what: str, extra: str, *packages: str) -> None:
    """Raises NarrowsError with the extra to install where one of the packages that `what` needs is missing."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise NarrowsError(f"it needs {' and '.join(missing)}.", where=what, remedy=f"pip install 'narrows[{extra}]'.")
