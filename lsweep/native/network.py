"""A network compiled for this machine: for float32 on x86-64, where a compiler is at hand.

Where there is none, or an operator is not known, it says so and other backends serve.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lsweep.backends.graph import Graph
from lsweep.backends.packed import Packed
from lsweep.backends.tracing import Unsupported
from lsweep.native.compiling import compiled
from lsweep.native.lowering import Lowering

LANES = 16  # at most
TOGETHER = 2**17  # numbers that the weights of points which are evaluated at once may be
CALL = (
    "inputs", "constants", "weights", "packed", "first", "offsets", "labels", "out", "finite",
    "memory", "samples", "points", "stride", "rows", "moved", "threads",
)  # fmt: skip
KEPT = 2**24  # numbers that are kept of what first layers make of batches


class NativeNetwork:
    """A network at packed weights.

    What is fast makes NaN of what overflows: so where anything that comes out is not finite, it is
    done again with care.

    Args:
        graph: the network.
        packed: the rows that its weights are views of.
        threads: how many to use.
        fixed: the rows never change, so that a first layer may be mixed of what it makes of each.

    Attributes:
        points: how many may be evaluated at once.
        classes: the length of an output that is a vector; otherwise 0.

    Raises:
        Unsupported: no compiler, another machine, an operator that is not known.
    """

    def __init__(self, graph: Graph, packed: Packed, threads: int, fixed: bool = True) -> None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise Unsupported(f"native code is not made for {platform.machine()}")
        views = {n: packed.views[n] for n in graph.names}
        if any(t.is_inference() or not t.is_contiguous() for t in views.values()):
            raise Unsupported("its weights are not in order, or their changes are not counted")
        self._graph, self._packed, self._threads = graph, packed, threads
        self._places = {n: int(t.storage_offset()) for n, t in views.items()}
        fast = Lowering(graph, self._places, True)
        self._mixes = fixed and fast.mixed > 0
        if fast.mixed and not fixed:
            fast = Lowering(graph, self._places, False)
        self._fast = _Program(fast, threads)
        self.points = max(1, TOGETHER // (packed.theta.numel() + fast.packed))
        self.classes = fast.shape[0] if len(fast.shape) == 1 else 0
        self._first: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()

    @functools.cached_property
    def _careful(self) -> _Program:
        if not self._fast.lowering.packed and not self._fast.lowering.mixed:
            return self._fast
        return _Program(Lowering(self._graph, self._places, False), self._threads)

    def _leaves(self, inputs: Any) -> list[Tensor]:
        leaves = [t.detach().contiguous() for t in self._graph.leaves(inputs)]
        if any(t.dtype != torch.float32 for t in leaves):
            raise Unsupported("the samples are not float32")
        return leaves

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output at the present weights for a batch of any length.

        Raises:
            Unsupported: the samples are not what it was made for.
        """
        leaves, rows = self._leaves(inputs), self._packed.theta[None]
        if not self._mixes:
            found, finite = self._fast.forward(rows, leaves)
            if finite[0]:
                return found[0]
        return self._careful.forward(rows, leaves)[0][0]

    def losses(
        self, rows: Tensor, offsets: Sequence[Sequence[float]], inputs: Any, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and accuracy of classes at some points.

        Args:
            rows: [points, …], float32: the weights at each, laid out as the packed rows.
            offsets: of each, along the packed axes.
            inputs: of a batch.
            labels: [samples], int64; the values of those that are no class are 0.

        Returns:
            [2, points, samples], in nats and per cent, and [points]: whether all was finite;
            else nothing is known.
        """
        leaves = self._leaves(inputs)
        if not self._mixes:
            return self._fast.forward(rows, leaves, labels)
        moving = [k for k, axis in enumerate(self._packed.axes) if len(axis)]
        key = self._graph.leaves(inputs)[0]
        first = self._first.get(key)
        if first is None:
            corners = [self._packed.origin, *(self._packed.axes[k] for k in moving)]
            first = self._fast.first(corners, leaves)
            if sum(len(t) for t in self._first.values()) + len(first) > KEPT:
                self._first.clear()
            self._first[key] = first
        parts = [[1.0, *(at[k] for k in moving)] for at in offsets]
        mixed = torch.tensor(parts, dtype=torch.float32)
        return self._fast.forward(rows, leaves, labels, first, mixed)


class _Program:
    """Compiled source with the memory that it works in."""

    def __init__(self, lowering: Lowering, threads: int) -> None:
        self.lowering, self._threads, self._version = lowering, threads, -1
        self._library = compiled(lowering.text)
        self._memory = torch.empty(lowering.memory * threads * LANES)
        self._packed = torch.empty(0)

    def first(self, rows: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """Return what the first layer makes of a batch at each row of weights."""
        samples = -(-len(leaves[0]) // LANES) * LANES
        found = torch.empty(len(rows) * samples * self.lowering.mixed)
        for k, row in enumerate(rows):
            self._call(self._library.first_layer, row, leaves, first=found, points=k)
        return found

    def forward(
        self, rows: Tensor, leaves: Sequence[Tensor], labels: Tensor | None = None,
        first: Tensor | None = None, offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the outputs or losses at each row of weights, and where all of it is finite."""
        points, shape = len(rows), self.lowering.shape
        length = points * self.lowering.packed
        if len(self._packed) < length:
            self._packed = torch.empty(length)
        moved = points > 1 or rows._version != self._version  # changes in place count up
        self._version = rows._version if points == 1 else -1
        kinds = (points, len(leaves[0]), *shape) if labels is None else (2, points, len(leaves[0]))
        out, finite = torch.empty(kinds), torch.ones(points, dtype=torch.bool)
        more: dict[str, Any] = {"labels": labels, "first": first, "offsets": offsets, "out": out}
        more |= {"finite": finite, "points": points, "moved": moved}
        self._call(self._library.forward, rows, leaves, **more)
        return out, finite

    def _call(self, function: Any, rows: Tensor, leaves: Sequence[Tensor], **given: Any) -> None:
        """Call a function with ``Call`` of ``native.h``; what is not given is 0 or null."""
        offsets = given.get("offsets")
        tables = [_addresses(leaves), _addresses(self.lowering.constants)]
        given |= {"inputs": tables[0], "constants": tables[1], "weights": rows,
                  "packed": self._packed, "memory": self._memory, "samples": len(leaves[0]),
                  "stride": rows.stride(0), "threads": self._threads,
                  "rows": 0 if offsets is None else offsets.shape[1]}  # fmt: skip
        numbers = [_number(given.get(name)) for name in CALL]
        function(ctypes.byref((ctypes.c_int64 * len(CALL))(*numbers)))


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _number(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.addressof(value) if isinstance(value, ctypes.Array) else int(value or 0)
