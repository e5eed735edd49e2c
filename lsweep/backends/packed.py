"""Packed rows: origin, directions and weights as flat vectors; a point costs one axpy per axis.

Another memory order commutes with origin + Σ offset·direction, so it is applied to the rows once
and never to a point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: where every tensor begins, as vector loads like it
KEPT = 2  # sets of directions that are kept packed
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Spot:
    """Where to evaluate: offsets along the axes, or a whole checkpoint (``step`` >= 0)."""

    offsets: tuple[float, ...]
    step: int = -1


class Rows(ABC):
    """Tensors by name as views into one vector.

    A tensor keeps its memory order: one in channels-last order lies so, and its view has the same
    strides.

    Args:
        like: name -> floating-point tensor of the shape and order to lay out.
        device: where rows are kept.
        dtype: of all rows.

    Attributes:
        size: numbers in a row.
        theta: the weights at the present point.
        views: name -> view into ``theta``; move and load change it in place.
    """

    theta: Tensor
    views: dict[str, Tensor]

    def __init__(self, like: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        self._layout: dict[str, tuple[int, torch.Size, tuple[int, ...]]] = {}
        step, self.size = ALIGNMENT // dtype.itemsize, 0
        for name, t in like.items():
            # A tensor that is expanded, or has gaps, has no memory order worth keeping.
            plain = torch.empty_like(t, device="meta", memory_format=torch.preserve_format)
            self._layout[name] = (self.size, t.shape, plain.stride())
            self.size += -(-t.numel() // step) * step
        self._device, self._dtype = device, dtype

    def views_of(self, row: Tensor) -> dict[str, Tensor]:
        """Return a row as tensors by name, which share its memory."""
        return {
            name: row.as_strided(shape, stride, start)
            for name, (start, shape, stride) in self._layout.items()
        }

    def row(self, tensors: Tensors) -> Tensor:
        """Return tensors as one vector; 0 where a name is missing."""
        flat = torch.zeros(self.size, dtype=self._dtype, device=self._device)
        for name, view in self.views_of(flat).items():
            if name in tensors:
                view.copy_(tensors[name].detach())
        return flat

    @abstractmethod
    def turn(self, key: Hashable, directions: Callable[[], Sequence[Tensors]]) -> None:
        """Let the axes be other directions from now on; the last few are remembered by ``key``."""

    @abstractmethod
    def move(self, offsets: Sequence[float]) -> None:
        """Set the weights to those at origin + Σ offset·direction."""

    @abstractmethod
    def load(self, tensors: Tensors) -> None:
        """Set the weights to a whole checkpoint; names that are not packed are left out."""


class Packed(Rows):
    """The network's own tensors, or these in another order, moved as one vector.

    Args:
        origin: name -> floating-point tensor at offset 0.
        directions: for each axis name -> tensor of the shape in ``origin``; a name that is missing
            does not move, one that ``origin`` lacks is left out.
        device: where the rows are kept.
        dtype: of all rows.
        scratch: of other rows the weights at their present point, whose memory these share: who
            moves the one has moved the other away.

    Attributes:
        origin, axes: rows; that of an axis which does not move is empty.

    >>> packed = Packed({"w": torch.ones(2)}, [{"w": torch.tensor([1.0, 2.0])}],
    ...                 torch.device("cpu"), torch.float32)
    >>> packed.move([0.5])
    >>> packed.views["w"]
    tensor([1.5000, 2.0000])
    """

    def __init__(
        self,
        origin: Tensors,
        directions: Sequence[Tensors],
        device: torch.device,
        dtype: torch.dtype,
        scratch: Tensor | None = None,
    ) -> None:
        super().__init__(origin, device, dtype)
        self.origin = self.row(origin)
        self.axes = self._packed(directions)
        self._turned: dict[Hashable, list[Tensor]] = {}
        fits = scratch is not None and scratch.dtype == dtype and len(scratch) >= self.size
        self.theta = (
            torch.empty_like(self.origin) if scratch is None or not fits else scratch[: self.size]
        )
        self.theta.copy_(self.origin)
        self.views = self.views_of(self.theta)

    def _packed(self, directions: Sequence[Tensors]) -> list[Tensor]:
        nothing = torch.empty(0, dtype=self._dtype, device=self._device)
        return [self.row(d) if d else nothing for d in directions]

    def turn(self, key: Hashable, directions: Callable[[], Sequence[Tensors]]) -> None:
        """Let the axes be other directions from now on; the last few are remembered by ``key``.

        >>> packed = Packed({"w": torch.ones(1)}, [{"w": torch.ones(1)}], torch.device("cpu"),
        ...                 torch.float32)
        >>> packed.turn("another", lambda: [{"w": torch.tensor([3.0])}])
        >>> packed.move([1.0])
        >>> packed.views["w"]
        tensor([4.])
        """
        rows = self._turned.pop(key, None)
        while rows is None and len(self._turned) >= KEPT:
            del self._turned[next(iter(self._turned))]  # before another is made: it is large
        self.axes = self._turned[key] = rows or self._packed(directions())

    def move(self, offsets: Sequence[float]) -> None:
        """Set the weights to origin + Σ offset·direction: from the origin, so nothing drifts."""
        start = self.origin  # the first axis that moves needs no copy of the origin before it
        for offset, direction in zip(offsets, self.axes, strict=True):
            if offset:
                start = torch.add(start, direction, alpha=offset, out=self.theta)
        if start is self.origin:
            self.theta.copy_(start)

    def load(self, tensors: Tensors) -> None:
        """Set the weights to a whole checkpoint; names that are not packed are left out."""
        self.theta.copy_(self.row(tensors))

    def stack(self, offsets: Sequence[Sequence[float]]) -> dict[str, Tensor]:
        """Return tensors [K, …] of the weights at K spots at once, without moving to any."""
        at = torch.tensor(offsets, dtype=self._dtype, device=self._device)
        rows = self.origin.repeat(len(offsets), 1)
        for k, direction in enumerate(self.axes):
            rows += at[:, k, None] * direction
        return {
            name: rows.as_strided((len(rows), *shape), (self.size, *stride), start)
            for name, (start, shape, stride) in self._layout.items()
        }
