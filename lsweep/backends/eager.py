"""Backends: ways to compute a problem's metrics at spots, all of which must agree with eager.

Here is what they are built on, and eager itself, which moves the network as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lsweep.axes.directions import Directions
from lsweep.backends.packed import Packed, Rows, Spot
from lsweep.problems import batchnorm, weights
from lsweep.problems.data import Batch
from lsweep.problems.problem import Problem, Sampled
from lsweep.problems.takeover import products

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Backend(Protocol):
    """Computes a problem's metrics at spots on one batch of data.

    Attributes:
        name: as ``evaluate.backend`` has it.
        together: many spots in one call are cheaper than one after the other.
    """

    name: str
    together: bool

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield each metric's values and weights on a batch, one mapping per spot, in order.

        Args:
            spots: where.
            batch: on the device, in the precision of the plan.
            stay: there is one spot, and the weights have not been moved since they came there.
        """
        ...


@dataclass(frozen=True)
class Ground:
    """What backends are built on: a problem whose network was taken over, and where it may go.

    Attributes:
        problem: its network is on the device, in eval mode, at the origin.
        settings: the plan's ``evaluate`` table.
        directions: what to move along.
        device: where to evaluate.
        dtype: of weights and data.
        state: name -> tensor at the origin, all that may move.
    """

    problem: Problem
    settings: Mapping[str, Any]
    directions: Directions
    device: torch.device
    dtype: torch.dtype
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the plan."""
        return tuple(self.settings["metrics"])

    @property
    def moves(self) -> list[Mapping[str, Tensor]]:
        """For each axis name -> tensor."""
        return [axis.tensors for axis in self.directions.axes.values()]

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the plan permits: the one it asks for, or more exact.

        Only beside autocast can float32 stand: tf32 is a setting of the whole process.
        """
        asked = str(self.settings["precision"])
        return (asked, "float32") if asked in AUTOCAST else (asked,)

    def at(self, precision: str) -> Ground:
        """Return the same in another precision that is permitted."""
        return dataclasses.replace(self, settings={**self.settings, "precision": precision})

    def step(self, number: int) -> weights.State:
        """Read a step of the trajectory: a whole checkpoint."""
        return weights.load_matching(self.directions.steps[number].path, self.state)

    @contextlib.contextmanager
    def context(self, plain: bool = False) -> Iterator[None]:
        """Set gradients, autocast, numerics and batch norm as the plan asks.

        Args:
            plain: float32 (or float64) whatever the precision asked for, as audits need.
        """
        precision = self.settings["precision"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.problem.grad))
            if precision in AUTOCAST and not plain:
                # No cast of a weight is kept: a graph would replay that of another point.
                low = AUTOCAST[precision]
                stack.enter_context(torch.autocast(self.device.type, low, cache_enabled=False))
            if precision == "tf32" and plain:
                stack.enter_context(products(tf32=False))
            if self.settings["batch_norm"] == "batch":
                stack.enter_context(batchnorm.batch_statistics(self.problem.model))
            yield


class Seat:
    """The network's own tensors: views into whichever packed rows are in use.

    Args:
        model: taken over, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        everything = {**weights.parameters_of(model), **weights.buffers_of(model)}
        self.tensors = {n: t for n, t in everything.items() if t.is_floating_point()}
        self._buffers: dict[str, list[tuple[nn.Module, str]]] = {}
        homes: dict[int, list[tuple[nn.Module, str]]] = {}  # by identity: it may have several
        for module in model.modules():
            for key, b in module._buffers.items():
                homes.setdefault(id(b), []).append((module, key))
        for name, t in self.tensors.items():
            if id(t) in homes:
                self._buffers[name] = homes[id(t)]
        self._taken: Rows | None = None

    def lost(self) -> str:
        """Return which tensor the network no longer computes with as it was given, or ""."""
        for name, view in self._taken.views.items() if self._taken is not None else ():
            homes = self._buffers.get(name)
            here = [m._buffers.get(k) for m, k in homes] if homes else [self.tensors[name]]
            if view.numel() and any(t is None or t.data_ptr() != view.data_ptr() for t in here):
                return name
        return ""

    def take(self, packed: Rows) -> None:
        """Let the network compute with the weights of ``packed``, as they are moved from now on."""
        if self._taken is packed:
            return
        for name, view in packed.views.items():
            if name in self._buffers:
                for module, key in self._buffers[name]:
                    module._buffers[key] = view
            else:
                self.tensors[name].data = view
        self._taken = packed


class Moving:
    """Packed rows that go to spots: along the axes, or to a step, which is a file.

    Args:
        ground: whose steps they are.
        packed: the rows.
    """

    def __init__(self, ground: Ground, packed: Rows) -> None:
        self._ground, self.packed = ground, packed
        self._read: tuple[int, Tensor] | None = None

    def move(self, spot: Spot) -> None:
        """Move to a spot; the file of a step is read once for as long as it is the last."""
        if spot.step < 0:
            directions = self._ground.directions
            offsets = directions.along(spot.offsets)
            if directions.family is not None and any(offsets):
                index = directions.family.index(spot.offsets)
                self.packed.turn(index, functools.partial(directions.family.at, index))
            self.packed.move(offsets)
        elif self._read is not None and self._read[0] == spot.step:
            self.packed.theta.copy_(self._read[1])
        else:
            self.packed.load(self._ground.step(spot.step))
            self._read = (spot.step, self.packed.theta.clone())


class Eager:
    """The network as it is, one spot after the other: the reference, which takes anything.

    Args:
        ground: what to evaluate.
        seat: the network's tensors.
        packed: the rows that it moves along.
        plain: without reduced precision, as audits need it.
    """

    name, together = "eager", False

    def __init__(self, ground: Ground, seat: Seat, packed: Packed, plain: bool = False) -> None:
        self._ground, self._seat, self._plain = ground, seat, plain
        self._moving = Moving(ground, packed)
        self._network: Callable[..., Any] = ground.problem.model

    def move(self, spot: Spot) -> None:
        """Set the network to a spot."""
        self._seat.take(self._moving.packed)
        self._moving.move(spot)

    def here(self, batch: Batch) -> Mapping[str, Sampled]:
        """Return the metrics on a batch at the present weights."""
        with self._ground.context(self._plain):
            return self._ground.problem.evaluate(batch, self._ground.metrics, self._network)

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield the metrics at each spot; see `Backend`."""
        for spot in spots:
            if not stay:
                self.move(spot)
            yield self.here(batch)
