"""What a template of a serving engine is given: a deployment, and the model that it serves."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.search.deployments import OWN, Config

CHECKPOINTS = {"int8": "W8A16", "int4": "W4A16"}  # formats of weights that an engine reads from a checkpoint's config


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

    def refuse(self, lacks: bool, field: str, value: object, remedy: str) -> None:
        """Raises NarrowsError where the engine lacks what a part of the deployment asks for."""
        if lacks:
            raise NarrowsError(f"{self.name} has no {field}={value}.", where=f"emit: {field}", remedy=remedy)

    def notes(self, engine: str) -> list[str]:
        """What a script begins with; raises NarrowsError for rules or formats that the engine has not."""
        config = self.config
        self.refuse(config.engine != engine, "engine", config.engine, f"Plan with --engine {engine}.")
        known = (OWN, "fp8", *CHECKPOINTS)
        self.refuse(config.precision not in known, "weights", config.precision, f"Use {', '.join(known)}.")
        self.refuse(config.cache not in (OWN, "fp8"), "cache", config.cache, "Use own or fp8.")
        if config.precision not in CHECKPOINTS:
            return []
        form = f"{config.precision} weights ({CHECKPOINTS[config.precision]}: compressed-tensors, AWQ or GPTQ)"
        return [f"# MODEL is a checkpoint with {form}, which the engine knows by its config"]


def command(head: str, flags: Mapping[str, object], tail: Sequence[str] = ()) -> str:
    """A shell command, a flag a line; those that are None are left to the engine, those that are True stand alone."""
    lines = [f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items() if value is not None]
    return " \\\n".join([head, *(f"  {line}" for line in (*lines, *tail))]) + "\n"
