"""What a template of a serving engine is given: a deployment, and the model that it serves."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.search.screen import Config


@dataclass(frozen=True, slots=True)
class Deployment:
    """A deployment to launch with one version of an engine (`name`); `context` tokens a request may have (0: the model's own)."""

    name: str
    config: Config
    served: str
    context: int = 0

    @property
    def model(self) -> str:
        """Name or directory of the model, safe in a shell."""
        return shlex.quote(self.served)

    def refuse(self, lacks: bool, field: str, value: str, remedy: str) -> None:
        """Raises NarrowsError where the engine lacks what a part of the deployment asks for."""
        if lacks:
            raise NarrowsError(f"{self.name} has no {field}={value}.", where=f"emit: {field}", remedy=remedy)


def command(head: str, flags: Mapping[str, object], tail: Sequence[str] = ()) -> str:
    """A shell command, a flag a line; those that are None are left to the engine."""
    lines = [head, *(f"  --{name} {value}" for name, value in flags.items() if value is not None), *(f"  {t}" for t in tail)]
    return " \\\n".join(lines) + "\n"
