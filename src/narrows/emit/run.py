"""What a template is given: a layout, and the numbers of the job around it."""

from dataclasses import dataclass

from narrows.errors import NarrowsError
from narrows.graph import Graph
from narrows.layout import Layout
from narrows.parallel import layer_count


@dataclass(frozen=True, slots=True)
class Run:
    """A layout to launch with one version of a framework (`name`); `sequence` is in tokens."""

    name: str
    layout: Layout
    graph: Graph
    sequence: int
    devices_per_node: int

    @property
    def per_node(self) -> int:
        """Processes of a node."""
        return min(self.devices_per_node, self.layout.devices)

    @property
    def nodes(self) -> int:
        """Nodes that it takes."""
        return -(-self.layout.devices // self.devices_per_node)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return layer_count(self.graph)

    @property
    def dtype(self) -> str:
        """bf16, fp16 or fp32: what activations are in."""
        return self.graph.ops[0].act.name

    def refuse(self, lacks: bool, field: str, remedy: str) -> None:
        """Raises NarrowsError where the framework lacks what a field of the layout asks for."""
        if lacks:
            value = str(getattr(self.layout, field)).lower()
            raise NarrowsError(f"{self.name} has no {field}={value} here.", where=f"emit: {field}", remedy=remedy)
