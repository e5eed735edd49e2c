"""The evaluator: the network at origin + Σ offset·direction, as mergeable sums over the data.

Σwv/Σw over samples is the value; sums of w², w²v, w²v² give its standard error, and the same with
d = v - v(centre), sample by sample, that of the difference to the centre. All sums are float64.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lsweep import batchnorm, weights
from lsweep.data import Batch, Split, map_tensors, moved, tensors_of
from lsweep.device import free_memory, synchronize
from lsweep.directions import Directions
from lsweep.errors import LsweepError, nearest
from lsweep.problem import Problem
from lsweep.takeover import generators_kept, model_kept, numerics

FloatArray = npt.NDArray[np.float64]
ALIGNMENT = 16  # numbers: every packed tensor starts on 64 bytes, as vector loads like it
RESIDENT_SHARE = 0.25  # of the free memory may hold the data
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Spot:
    """Where to evaluate: offsets along the axes, or a whole checkpoint (``step`` >= 0)."""

    offsets: tuple[float, ...]
    step: int = -1


@dataclass(frozen=True)
class Samples:
    """One variable at one spot: float64 values (n,) and weights (n,)."""

    values: Tensor
    weights: Tensor
    opaque: bool


def default_batch_size(split: Split, device: torch.device) -> int:
    """Return a batch size that follows from the data alone: about 0.5 MiB of inputs on a CPU.

    Deterministic on purpose: values are bit for bit functions of the batch shape.
    """
    numbers = max(1, split.sample_numbers())
    budget, low, high = (2**17, 32, 2048) if device.type == "cpu" else (2**26, 256, 8192)
    size = 2 ** round(math.log2(max(1.0, budget / numbers)))
    return int(min(high, max(low, size)))


class Evaluator:
    """Takes over a problem's network on one device, and gives it back exactly as it was.

    Use it as a context manager. It is the only object with a life of its own in the engine.

    Args:
        problem: network, data, metrics.
        settings: the plan's ``evaluate`` table.
        directions: what to move along.
        device: where to evaluate.
        batch_sizes: split name -> batch size, where it is free.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Mapping[str, Any],
        directions: Directions,
        device: torch.device,
        batch_sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.problem, self.settings, self.device = problem, settings, device
        self.directions = directions
        self.splits: tuple[str, ...] = tuple(settings["splits"])
        self.metrics: tuple[str, ...] = tuple(settings["metrics"])
        self.slices = int(settings["slices"])
        for name in (*self.splits, *self._calibration_splits()):
            if name not in problem.splits:
                raise LsweepError(f"no data split {name!r}{nearest(name, problem.splits)}")
        self.batch_sizes = dict(batch_sizes or {})
        for name in {*self.splits, *self._calibration_splits()}:
            if name not in self.batch_sizes:
                asked = settings["batch_size"]
                split = problem.splits[name]
                self.batch_sizes[name] = (
                    asked if isinstance(asked, int) else default_batch_size(split, device)
                )
        self.dtype = torch.float64 if settings["precision"] == "float64" else torch.float32
        self._resident: dict[tuple[str, int], list[Batch] | None] = {}
        self._centre: dict[int, list[Samples]] = {}
        self._stack = contextlib.ExitStack()
        self._step_loaded: tuple[int, Tensor] | None = None

    def _calibration_splits(self) -> tuple[str, ...]:
        if self.settings["batch_norm"] != "recalibrate":
            return ()
        return ("train" if "train" in self.problem.splits else self.splits[0],)

    # -- taking over and giving back ----------------------------------------------------------

    def __enter__(self) -> Evaluator:
        try:
            self._stack.enter_context(generators_kept())
            self._stack.enter_context(numerics(self.device, self.settings["precision"] == "tf32"))
            self._stack.enter_context(model_kept(self.problem.model))
            self.problem.model.eval()
            self._pack()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._resident.clear()
        self._centre.clear()
        self._stack.close()

    def _pack(self) -> None:
        """Lay all that may move in one flat vector, so that a point costs one axpy per axis."""
        model = self.problem.model
        for p in model.parameters():
            p.data = moved(p.data, self.device, self.dtype)
            p.requires_grad_(p.requires_grad and self.problem.grad)
        clones: dict[int, Tensor] = {}  # by identity: a shared buffer stays shared
        for module in model.modules():
            for name, b in module._buffers.items():
                if b is not None:
                    if id(b) not in clones:
                        clones[id(b)] = moved(b.clone(), self.device, self.dtype)
                    module._buffers[name] = clones[id(b)]
        slots, size = {}, 0
        everything = {**weights.parameters_of(model), **weights.buffers_of(model)}
        for name, t in everything.items():
            if t.is_floating_point():
                slots[name] = slice(size, size + t.numel())
                size += -(-t.numel() // ALIGNMENT) * ALIGNMENT
        self._slots = slots
        self._origin = self._flat({n: everything[n] for n in slots}, size)
        self._axes = [self._flat(d.tensors, size) for d in self.directions.axes.values()]
        self._theta = self._origin.clone()
        homes = _buffer_homes(model)
        for name, at in slots.items():
            t = everything[name]
            view = self._theta[at].view(t.shape)
            if id(t) in homes:
                for module, key in homes[id(t)]:
                    module._buffers[key] = view
            else:
                t.data = view

    def _flat(self, tensors: Mapping[str, Tensor], size: int) -> Tensor:
        flat = torch.zeros(size, dtype=self.dtype, device=self.device)
        for name, t in tensors.items():
            if name in self._slots:
                flat[self._slots[name]] = t.detach().to(self.device, self.dtype).flatten()
        return flat

    def _move(self, spot: Spot) -> None:
        """Set the network to a spot, always from the origin, so that nothing drifts."""
        if spot.step >= 0:
            self._theta.copy_(self._step(spot.step))
            return
        self._theta.copy_(self._origin)
        for offset, direction in zip(spot.offsets, self._axes, strict=True):
            if offset:
                self._theta.add_(direction, alpha=offset)

    def _step(self, number: int) -> Tensor:
        if self._step_loaded is None or self._step_loaded[0] != number:
            wanted = {**weights.parameters_of(self.problem.model)}
            wanted |= weights.buffers_of(self.problem.model)
            state = weights.load_matching(self.directions.steps[number].path, wanted)
            self._step_loaded = (number, self._flat(state, len(self._origin)))
        return self._step_loaded[1]

    # -- data -----------------------------------------------------------------------------------

    def batches(self, split: str, slice_: int = 0) -> Iterator[Batch]:
        """Yield the batches of a split on the device; kept there when they fit."""
        key = (split, slice_)
        kept = self._resident.get(key)
        if kept:
            yield from kept
            return
        keeping: list[Batch] | None = None if key in self._resident else []
        free = free_memory(self.device) * RESIDENT_SHARE
        used = sum(
            t.numel() * t.element_size()
            for batches in self._resident.values()
            for b in batches or ()
            for t in tensors_of(b)
        )
        source = self.problem.splits[split].batches(self.batch_sizes[split], slice_, self.slices)
        for batch in source:
            there = map_tensors(batch, lambda t: moved(t, self.device, self.dtype))
            if keeping is not None:
                used += sum(t.numel() * t.element_size() for t in tensors_of(there))
                if used <= free:
                    keeping.append(there)
                else:
                    keeping = None
            yield there
        self._resident[key] = keeping

    def _is_resident(self, slice_: int) -> bool:
        return all(self._resident.get((s, slice_)) for s in self.splits)

    # -- evaluation -----------------------------------------------------------------------------

    def samples(
        self,
        spots: Sequence[Spot],
        slice_: int = 0,
        audit: bool = False,
        recalibrate: str | None = None,
    ) -> list[list[Samples]]:
        """Return for each spot the samples of each variable, in the order of the plan.

        Data that stays on the device is passed once per spot; data that is streamed is read once
        for all spots. Both ways give the same bits.

        Args:
            spots: where.
            slice_: which fixed part of the data.
            audit: evaluate in plain float32 (or float64) whatever the precision asked for.
            recalibrate: average batch-norm statistics anew over this split at each spot.
        """
        recalibrate = recalibrate or next(iter(self._calibration_splits()), None)
        collected: list[list[list[tuple[Tensor, Tensor, bool]]]] = [
            [[] for _ in self.splits for _ in self.metrics] for _ in spots
        ]

        def collect(k: int, split: int, batch: Batch) -> None:
            with self.context(audit):
                found = self.problem.evaluate(batch, self.metrics)
            for m, metric in enumerate(self.metrics):
                s = found[metric]
                v, w = s.values.to(self._sum_dtype()), s.weights.to(self._sum_dtype())
                collected[k][split * len(self.metrics) + m].append(
                    (torch.where(w == 0, 0.0, v), w, s.opaque)
                )

        steps = any(spot.step >= 0 for spot in spots)  # each is a file: read once, not per batch
        if self._is_resident(slice_) or recalibrate or steps:
            for k, spot in enumerate(spots):
                self._move(spot)
                if recalibrate:
                    self._recalibrate(recalibrate, audit)
                for i, split in enumerate(self.splits):
                    for batch in self.batches(split, slice_):
                        collect(k, i, batch)
        else:
            for i, split in enumerate(self.splits):
                for batch in self.batches(split, slice_):
                    for k, spot in enumerate(spots):
                        self._move(spot)
                        collect(k, i, batch)
        return [
            [
                Samples(
                    torch.cat([v for v, _, _ in parts]),
                    torch.cat([w for _, w, _ in parts]),
                    any(o for _, _, o in parts),
                )
                for parts in variables
            ]
            for variables in collected
        ]

    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    @contextlib.contextmanager
    def context(self, audit: bool) -> Iterator[None]:
        """Set gradients, autocast, numerics and batch norm as the plan asks, or as audits need."""
        precision = self.settings["precision"]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.problem.grad))
            if precision in AUTOCAST and not audit:
                stack.enter_context(torch.autocast(self.device.type, AUTOCAST[precision]))
            if precision == "tf32" and audit:
                stack.enter_context(numerics(self.device, False))
            if self.settings["batch_norm"] == "batch":
                stack.enter_context(batchnorm.batch_statistics(self.problem.model))
            yield

    def _recalibrate(self, split: str, audit: bool) -> None:
        self.batch_sizes.setdefault(
            split, default_batch_size(self.problem.splits[split], self.device)
        )

        def run_batches() -> None:
            for slice_ in range(self.slices):
                for batch in self.batches(split, slice_):
                    with self.context(audit):
                        self.problem.evaluate(batch, self.metrics)

        batchnorm.recalibrate(self.problem.model, run_batches)

    def first_batch(self) -> dict[str, float | None]:
        """Return each variable's mean over the first batch of its split at the present weights."""
        out: dict[str, float | None] = {}
        for split in self.splits:
            batch = map_tensors(next(iter(self.batches(split))), torch.clone)
            with self.context(audit=True):
                found = self.problem.evaluate(batch, self.metrics)
            for metric, s in found.items():
                mean = float((s.weights.double() * s.values.double()).sum() / s.weights.sum())
                out[f"{split}_{metric}"] = mean if math.isfinite(mean) else None
        return out

    def whole(self, spot: Spot, recalibrate: str | None = None) -> list[Samples]:
        """Return the samples of each variable at one spot over all slices."""
        slices = [self.samples([spot], s, recalibrate=recalibrate)[0] for s in range(self.slices)]
        return [
            Samples(
                torch.cat([s.values for s in parts]),
                torch.cat([s.weights for s in parts]),
                any(s.opaque for s in parts),
            )
            for parts in zip(*slices, strict=True)
        ]

    def centre(self, slice_: int = 0) -> list[Samples]:
        """Return the samples at offset 0, evaluated once: what differences refer to."""
        if slice_ not in self._centre:
            spot = Spot((0.0,) * len(self._axes))
            self._centre[slice_] = self.samples([spot], slice_)[0]
        return self._centre[slice_]

    def evaluate(self, spots: Sequence[Spot], slice_: int = 0, audit: bool = False) -> FloatArray:
        """Return the (K, V, 8) float64 sums of `sums.SUMS` at each spot.

        Raises:
            LsweepError: the data gave another number of samples than at the centre.
        """
        centre = self.centre(slice_)
        rows = []
        for variables in self.samples(spots, slice_, audit):
            for there, here in zip(variables, centre, strict=True):
                if there.values.shape != here.values.shape:
                    raise LsweepError(
                        f"the data gave {len(there.values)} samples here and {len(here.values)} at "
                        "the centre: it must be the same at every point"
                    )
            rows.append(torch.stack([_sums(t, h) for t, h in zip(variables, centre, strict=True)]))
        return torch.stack(rows).cpu().numpy().astype(np.float64)

    def halve_batch(self) -> bool:
        """Halve every free batch size after running out of memory; False when all are 1."""
        if self.settings["batch_norm"] != "eval":
            return False  # batch statistics, and so the values, depend on it
        free = [s for s in self.batch_sizes if self.problem.splits[s].sizable]
        if not free or all(self.batch_sizes[s] == 1 for s in free):
            return False
        for s in free:
            self.batch_sizes[s] = max(1, self.batch_sizes[s] // 2)
        self._resident.clear()
        self._centre.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def timed(self, work: Callable[[], Any]) -> float:
        """Return the seconds that ``work`` takes, the device synchronised on both sides."""
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start


def _sums(there: Samples, centre: Samples) -> Tensor:
    v, w = there.values, there.weights
    d = v - centre.values
    ww = w * w
    return torch.stack(
        [t.sum() for t in (w, ww, w * v, ww * v, ww * v * v, w * d, ww * d, ww * d * d)]
    )


def _buffer_homes(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return by identity of a buffer all modules that hold it."""
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, b in module._buffers.items():
            homes.setdefault(id(b), []).append((module, key))
    return homes
