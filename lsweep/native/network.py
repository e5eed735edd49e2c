"""A network compiled for this machine: for float32 on x86-64, where a compiler is at hand.

Where there is none, or an operator is not known, it says so and other backends serve.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsweep.backends.graph import Graph
from lsweep.backends.tracing import Unsupported
from lsweep.native.compiling import compiled
from lsweep.native.lowering import Lowering

LANES = 16  # at most


class NativeNetwork:
    """A network at the present weights, by native code.

    Winograd's algorithm makes NaN of what overflows. So where anything that comes out is not
    finite, the batch is done again without it.

    Args:
        graph: the network.
        views: packed name -> float32 tensor, read at each call.
        example_inputs: a batch's inputs.
        device: must be a CPU.
        dtype: must be float32.
        threads: how many to use.

    Raises:
        Unsupported: no compiler, another machine or precision, an operator that is not known.
    """

    def __init__(
        self, graph: Graph, views: Mapping[str, Tensor], example_inputs: Any,
        device: torch.device, dtype: torch.dtype, threads: int,
    ) -> None:  # fmt: skip
        if device.type != "cpu" or dtype != torch.float32:
            raise Unsupported(f"native code is for float32 on a CPU, not {dtype} on {device}")
        if any(t.is_inference() for t in views.values()):
            raise Unsupported("its weights are inference tensors, whose changes are not counted")
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise Unsupported(f"native code is not made for {platform.machine()}")
        self._graph, self._views, self._threads = graph, views, threads
        values = [n.meta.get("val") for n in graph.module.graph.nodes if n.op == "call_function"]
        flat = all(not isinstance(v, Tensor) or v.dim() <= 2 for v in values)
        self._groups = 4 if flat else 1  # of samples, so that a weight that is read is used 4 times
        self._fast = _Function(Lowering(graph, self._groups, True), threads)
        self._careful = None if self._fast.packed.numel() else self._fast

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output at the present weights for a batch of any length.

        Raises:
            Unsupported: the samples are not what it was made for.
        """
        leaves = [t.detach().contiguous() for t in self._graph.leaves(inputs)]
        if any(t.dtype != torch.float32 for t in leaves):
            raise Unsupported("the samples are not float32")
        weights = [self._views[n].detach().contiguous() for n in self._graph.names]
        version = sum(t._version for t in self._views.values())  # changes in place count up
        found, finite = self._fast(weights, leaves, version)
        if finite or self._careful is self._fast:
            return found
        if self._careful is None:
            self._careful = _Function(Lowering(self._graph, self._groups, False), self._threads)
        return self._careful(weights, leaves, version)[0]


class _Function:
    """Compiled source with the memory that it works in."""

    def __init__(self, lowering: Lowering, threads: int) -> None:
        self._threads, self._groups, self._shape = threads, lowering.groups, lowering.shape
        self.packed = torch.empty(lowering.packed)
        self._memory = torch.empty(lowering.memory * threads * LANES)
        self._constants = [t.contiguous() for t in lowering.constants]
        self._forward, self._version = compiled(lowering.text).forward, -1

    def __call__(
        self, weights: Sequence[Tensor], leaves: Sequence[Tensor], version: int
    ) -> tuple[Tensor, bool]:
        """Return the output at a version of the weights, and whether all of it is finite."""
        n, (groups, *rest) = len(leaves[0]), self._shape
        out = torch.empty(n * groups // self._groups, *rest)
        tensors = [*weights, *self._constants, *leaves]
        addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        places = [ctypes.c_void_p(t.data_ptr()) for t in (out, self.packed, self._memory)]
        how = (self._threads, int(version != self._version))
        finite = self._forward(addresses, places[0], ctypes.c_long(n), *places[1:], *how)
        self._version = version
        return out, bool(finite)
