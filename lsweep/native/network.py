"""A network compiled for this machine: for float32 on x86-64, where a compiler is at hand.

Where there is none, or an operator is not known, it says so and other backends serve.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lsweep.backends.graph import Graph
from lsweep.backends.packed import Rows
from lsweep.backends.tracing import Unsupported
from lsweep.native.compiling import compiled
from lsweep.native.lowering import Lowering

TOGETHER = 2**17  # numbers that the weights of points which are evaluated at once may be


class NativeNetwork:
    """A network at packed weights.

    Winograd's algorithm makes NaN of what overflows: so where anything that comes out is not
    finite, the graph is run as it is.

    Args:
        graph: the network.
        packed: the rows that its weights are views of.
        threads: how many to use.

    Attributes:
        points: how many may be evaluated at once.
        classes: the length of an output that is a vector; otherwise 0.

    Raises:
        Unsupported: no compiler, another machine, an operator that is not known.
    """

    def __init__(self, graph: Graph, packed: Rows, threads: int) -> None:
        self._graph, self._theta, self._threads = graph, packed.theta[None], threads
        self._weights = [packed.views[n] for n in graph.names]
        if not all(t.is_contiguous() for t in self._weights):
            raise Unsupported("its weights are not in order")
        places = {n: int(packed.views[n].storage_offset()) for n in graph.names}
        lowering = Lowering(graph, places)
        library = compiled(lowering.text)
        self._forward, self._lanes = library.forward, ctypes.c_int.in_dll(library, "lanes").value
        self._forward.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_long] * 4
        self.points = max(1, TOGETHER // (packed.theta.numel() + lowering.prepared))
        self._prepared = torch.empty(self.points * lowering.prepared)
        self._memory = torch.empty(threads * lowering.memory * self._lanes)
        self._shape = lowering.shape
        self.classes = self._shape[0] if len(self._shape) == 1 else 0

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output at the present weights for a batch of any length.

        Raises:
            Unsupported: the samples are not what it was made for.
        """
        leaves = self._graph.leaves(inputs)
        out = torch.empty(len(leaves[0]), *self._shape)
        self._run(self._theta, leaves, None, out)
        if math.isfinite(out.sum().item()):
            return out
        return cast(Tensor, self._graph.module(*self._weights, *leaves))

    def losses(self, rows: Tensor, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and accuracy of classes at some points.

        Args:
            rows: [points, …], float32: the weights at each, laid out as the packed rows.
            inputs: of a batch.
            labels: [samples], int64; the values of those that are no class are 0.

        Returns:
            [2, points, samples], in nats and per cent, and [points]: whether all was finite;
            else nothing is known.
        """
        out = torch.empty(2, len(rows), len(labels))
        self._run(rows, self._graph.leaves(inputs), labels, out)
        return out, out[0].isfinite().all(1)

    def _run(self, rows: Tensor, leaves: Sequence[Tensor], labels: Tensor | None,
             out: Tensor) -> None:  # fmt: skip
        if any(t.dtype != torch.float32 for t in leaves):
            raise Unsupported("the samples are not float32")
        held = [_tiles(t, self._lanes) for t in leaves]
        inputs = (ctypes.c_void_p * len(held))(*(t.data_ptr() for t in held))
        memory = [t.data_ptr() for t in (out, self._prepared, self._memory)]
        known = labels.data_ptr() if labels is not None else None
        numbers = len(leaves[0]), len(rows), rows.stride(0), self._threads
        self._forward(ctypes.addressof(inputs), rows.data_ptr(), known, *memory, *numbers)


def _tiles(t: Tensor, lanes: int) -> Tensor:
    """Return samples as [tiles, numbers, lanes]; lanes that are too many repeat the last one."""
    # Copied even where nothing is added: a slice is not aligned.
    whole = torch.cat([t, t[-1:].expand(-len(t) % lanes, *t.shape[1:])]) if len(t) % lanes else t
    return whole.reshape(-1, lanes, t[0].numel()).mT.clone(memory_format=torch.contiguous_format)
