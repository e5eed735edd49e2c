"""The catalogue of backends: how each is built, and why one is not for a problem."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lsweep.backends.eager import Backend, Eager, Ground, Seat
from lsweep.backends.networks import Networked, NetworkOfClasses, inputs_of, why_no_stand_in
from lsweep.backends.packed import Packed, Rows, Spot
from lsweep.backends.variants import ChannelsLast, Compiled, Replayed, Vmapped, image_weights
from lsweep.errors import LsweepError, nearest
from lsweep.hosts.machine import trim_memory
from lsweep.problems.data import Batch
from lsweep.problems.factory import describe

if TYPE_CHECKING:
    from lsweep.backends.graph import Graph

SMALL = 2**20  # parameters: so many points of a smaller network are stacked


class Builder:
    """Builds backends on one ground; what several need is made once.

    Args:
        ground: what to evaluate.
        seat: the network's tensors.
        eager: the reference.
        packed: its rows.
        batch: an example, on the device.
    """

    def __init__(
        self, ground: Ground, seat: Seat, eager: Eager, packed: Packed, batch: Batch
    ) -> None:
        self.ground, self.seat, self.eager, self.packed = ground, seat, eager, packed
        self.batch = batch
        self.built: dict[tuple[str, str], Backend] = {}

    @property
    def origin(self) -> Spot:
        """Where all offsets are 0."""
        return Spot((0.0,) * len(self.packed.axes))

    @functools.cached_property
    def inputs(self) -> object:
        """What the network is given for the example batch."""
        self.eager.move(self.origin)
        return inputs_of(self.ground, self.batch)

    # What traces and compiles is imported by who needs it: that takes seconds.

    @functools.cached_property
    def graph(self) -> Graph:
        """The network as a graph, at the origin."""
        from lsweep.backends.graph import traced

        self.eager.move(self.origin)
        return traced(self.ground.problem.model, self.inputs)

    @functools.cached_property
    def rows(self) -> Rows:
        """The packed tensors of the graph: the network's own rows where nothing is folded."""
        if not self.graph.folds:
            return self.packed
        from lsweep.backends.folded import Folded

        trim_memory()  # of what was traced
        return Folded(self.graph, self.packed)

    def network(self, ground: Ground, name: str, module: str, kind: str) -> Backend:
        """Return a backend whose network, ``module.kind``, is made from the graph."""
        reduced = ground.settings["precision"] == "bfloat16"
        dtype = torch.bfloat16 if reduced else ground.dtype
        threads = torch.get_num_threads()
        made = getattr(importlib.import_module(f"lsweep.{module}"), kind)
        rows = self.rows
        network = made(self.graph, rows.views, self.inputs, ground.device, dtype, threads)
        return Networked(name, ground, rows, network)

    def native(self, ground: Ground) -> Backend:
        """Return the backend of native code."""
        made = importlib.import_module("lsweep.native.network").NativeNetwork
        rows = self.rows
        network = made(self.graph, rows, torch.get_num_threads())
        return NetworkOfClasses("native", ground, rows, network)


@dataclass(frozen=True)
class Kind:
    """A kind of backend.

    Attributes:
        build: makes it in the ground's precision; what goes wrong is raised.
        why_not: why it is not for a problem, as far as that is known before it is built.
        set_up: seconds that building takes at most, about.
        worth: whether ``auto`` tries it on a device.
    """

    build: Callable[[Builder, Ground], Backend]
    why_not: Callable[[Ground], str | None]
    set_up: float = 0.1
    worth: Callable[[Ground], bool] = lambda ground: True


def _why_no_channels_last(ground: Ground) -> str | None:
    return None if image_weights(ground.problem.model) else "no two-dimensional convolution"


def _why_not_compiled(ground: Ground) -> str | None:
    if sys.version_info >= (3, 15) or sys.platform == "win32":
        return "torch.compile is not there on this platform"
    return _why_not_rerun(ground)


def _why_not_rerun(ground: Ground) -> str | None:
    if ground.settings["batch_norm"] != "eval":
        return f'batch_norm = "{ground.settings["batch_norm"]}" changes the network as it runs'
    return "the loss needs gradients of the network" if ground.problem.grad else None


def _why_not_stacked(ground: Ground) -> str | None:
    if ground.directions.family is not None:
        return "directions change along an axis of kind replicate or layer"
    return _why_not_rerun(ground)


def _why_not_replayed(ground: Ground) -> str | None:
    if ground.device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {ground.device}"
    return _why_not_rerun(ground)


def _why_not_fused(ground: Ground) -> str | None:
    if ground.settings["precision"] == "float16":
        return "float16 is not among its precisions: use float32 or bfloat16"
    return why_no_stand_in(ground)


def _why_not_native(ground: Ground) -> str | None:
    precision = ground.settings["precision"]
    if ground.device.type != "cpu" or precision != "float32":
        return f"native code is for float32 on a CPU, not {precision} on {ground.device}"
    return why_no_stand_in(ground)


def _is_small_on_gpu(ground: Ground) -> bool:
    # On a CPU, stacked points were never faster than one after the other.
    return ground.device.type != "cpu" and sum(t.numel() for t in ground.state.values()) <= SMALL


KINDS = {
    "eager": Kind(lambda b, at: Eager(at, b.seat, b.packed), lambda ground: None),
    "native": Kind(lambda b, at: b.native(at), _why_not_native, 3.0),
    "fused": Kind(
        lambda b, at: b.network(at, "fused", "backends.fused", "FusedNetwork"), _why_not_fused, 1.0
    ),
    "channels_last": Kind(
        lambda b, at: ChannelsLast(at, b.seat, b.packed.theta), _why_no_channels_last
    ),
    "vmap": Kind(lambda b, at: Vmapped(at, b.packed), _why_not_stacked, 0.5, _is_small_on_gpu),
    "cudagraph": Kind(lambda b, at: Replayed(at, b.seat, b.packed), _why_not_replayed, 1.0),
    "compiled": Kind(lambda b, at: Compiled(at, b.seat, b.packed), _why_not_compiled, 60.0),
}  # those that promise most first, but for what takes long to build


def build(name: str, builder: Builder, precision: str) -> Backend:
    """Build a backend in a precision that the plan permits.

    Raises:
        LsweepError: it is not for this problem, or does not build here; the message is a clause.
    """
    if (name, precision) in builder.built:
        return builder.built[name, precision]
    if name not in KINDS:
        raise LsweepError(f"no backend {name!r}{nearest(name, KINDS)}")
    ground = builder.ground
    if precision not in ground.precisions:
        raise LsweepError(f"{precision} is not what the plan permits: {ground.precisions}")
    if precision == ground.precisions[0]:
        if name == "eager":
            return builder.eager
    else:
        ground = ground.at(precision)
    reason = KINDS[name].why_not(ground)
    if reason is not None:
        raise LsweepError(reason)
    try:
        return builder.built.setdefault((name, precision), KINDS[name].build(builder, ground))
    except LsweepError:
        raise
    except Exception as e:
        raise LsweepError(f"it does not build: {describe(e)}") from e
