"""Links that a user gives Pipette: read, refused where they are wrong, and followed."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from narrows.errors import NarrowsError
from narrows.machine import cluster
from narrows.measured.published import Shape, decoder
from narrows.techniques.training_parallelism.pipette import Pipette

GROUP = cluster("aws-p4d")


@pytest.mark.parametrize("text", ["1,2\n3,4\n5,6", "0,nan\n1e9,0", "0,-1\n1,0", "words"])
def test_a_wrong_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "links.csv"
    path.write_text(text)
    with pytest.raises(NarrowsError, match="links"):
        Pipette(nodes=2, links=str(path)).bandwidths(GROUP)
    with pytest.raises(NarrowsError, match="table of links"):
        Pipette(nodes=2, links=str(tmp_path / "none.csv")).bandwidths(GROUP)


def test_the_slow_link_carries_nothing_between_stages(tmp_path: Path) -> None:
    """Four nodes in a pipeline, of which 0 and 1 are joined badly: they are not neighbours."""
    links = np.full((4, 4), 5e10)
    links[0, 1] = links[1, 0] = 1e8
    path = tmp_path / "links.csv"
    np.savetxt(path, links, delimiter=",")
    tuner = Pipette(nodes=4, links=str(path))
    graph = decoder(Shape(2048, 8, 16), 1024)
    pipelined = [s for s in tuner.stages(graph, replace(GROUP, nodes=4), 64, 1024) if s.layout.pipeline == 4]
    (order,) = tuner.anneal(pipelined[0], tuner.bandwidths(GROUP)).order
    assert sorted(order) == [0, 1, 2, 3]
    assert all({a, b} != {0, 1} for a, b in pairwise(order))
