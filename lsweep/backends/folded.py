"""Folded weights: batch norm becomes part of the weights at each point, once they have moved.

Where its scale and statistics stay, the fold is linear and could be applied to origin and
directions once; but then each of these rows is there twice, which is most of a large network's
memory, and a pass over the weights takes no time beside one over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from lsweep.backends.graph import Graph
from lsweep.backends.packed import Packed, Rows, Tensors


class Folded(Rows):
    """The packed tensors of a graph, made from the network's own wherever these are.

    Args:
        graph: whose folds they are.
        own: the network's tensors, which this moves.
    """

    def __init__(self, graph: Graph, own: Packed) -> None:
        super().__init__(graph.like(own.views), own.origin.device, own.origin.dtype)
        self._graph, self._own = graph, own
        self.theta = self.row({})
        self.views = self.views_of(self.theta)
        graph.pack(own.views, self.views)

    def turn(self, key: Hashable, directions: Callable[[], Sequence[Tensors]]) -> None:
        """Let the axes be other directions from now on; see `Packed.turn`."""
        self._own.turn(key, directions)

    def move(self, offsets: Sequence[float]) -> None:
        """Set the weights to those folded at origin + Σ offset·direction."""
        self._own.move(offsets)
        self._graph.pack(self._own.views, self.views)

    def load(self, tensors: Tensors) -> None:
        """Set the weights to a whole checkpoint, folded with its own statistics."""
        self._own.load(tensors)
        self._graph.pack(self._own.views, self.views)
