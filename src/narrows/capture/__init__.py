"""From a model, in whatever form it comes, to a Graph.

A name (`llama-3.1-8b`), a `config.json` or its directory, a graph file, an ONNX file, `package.module:factory`,
or a live `nn.Module`: `capture` tells them apart. Only the last two need torch.
"""

from typing import Any

from narrows.graph import Graph
from narrows.step import Step

__all__ = ["capture"]


def capture(model: Any, step: Step | None = None) -> Graph:
    """The Graph of a model given by name, path, `package.module:factory` or as an `nn.Module`.

    Graphs read from files are symbolic: one serves every step. A module is traced at `step` (by default one
    sequence of 128 tokens, or one image of the size its first layer suggests). Raises NarrowsError that names the
    field or op at fault and what to do.
    """
    raise NotImplementedError
