"""The plane invariance defect: how much a picture changes when an equivalent network takes it.

The network is rescaled by random elements of the group under which its function was certified to
stay the same; the directions are made anew by the same recipe and seed, and the losses compared
on a coarse grid. Signs and orders of units are left out: they give the same random directions to
other units, as another seed does.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lsweep.axes.directions import make_directions
from lsweep.axes.vectors import Origin
from lsweep.backends.packed import Spot
from lsweep.evaluating.evaluate import Evaluator
from lsweep.invariance.equivalences import BATCH, CARRIED
from lsweep.invariance.rescaling import Transform, acted, random_element
from lsweep.outcomes.certified import Defect, Trial
from lsweep.plans.recipes import CHECKPOINT_KINDS, Axis
from lsweep.plans.settings import Settings
from lsweep.problems.problem import Problem
from lsweep.storage.sums import means

ELEMENTS = 3
COUNTS = {1: 9, 2: 5, 3: 3}  # points along each axis of the coarse grid
COMPARED = ("random", *CHECKPOINT_KINDS)
FloatArray = npt.NDArray[np.float64]
Gauge = Callable[[Origin], Origin]


def certified_kinds(
    transforms: Sequence[Transform], rows: Sequence[Trial], batch_norm: str
) -> dict[str, list[Transform]]:
    """Return kind -> the rescalings of that kind that hold, under a run's batch-norm mode.

    Statistics are carried along under ``eval``; the others compute them anew.
    """
    left_out = BATCH if batch_norm == "eval" else CARRIED
    out: dict[str, list[Transform]] = {}
    for t, row in zip(transforms, rows, strict=True):
        if row.holds and t.rescales and t.kind != left_out:
            out.setdefault(t.kind, []).append(t)
    return out


def coarse(grid: Mapping[str, Axis]) -> list[Spot]:
    """Return the spots of a coarse grid over a sweep's own range."""
    count = COUNTS[len(grid)]
    lines = [np.linspace(float(a.range[0]), float(a.range[1]), count) for a in grid.values()]
    return [Spot(tuple(map(float, p))) for p in
            np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, len(lines))]  # fmt: skip


def not_compared(settings: Settings) -> str:
    """Return why pictures of equivalent networks are not compared; "" where they are."""
    kinds = [r.kind for r in settings.directions.values() if r.kind not in COMPARED]
    return (
        f"directions of kind {kinds[0]} are not made anew for equivalent networks" if kinds else ""
    )


class Picture:
    """A sweep's losses on a coarse grid, of its own network or of an equivalent one.

    Args:
        problem: with one split of a few samples.
        settings: the sweep, its ranges resolved.
        evaluate: the plan's ``evaluate`` table, with one metric.
        base: folder that relative paths refer to.
        device: where to evaluate.
        dtype: of weights and losses.
        gauge: what is done to an origin before directions are made.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        evaluate: Mapping[str, Any],
        base: Path,
        device: torch.device,
        dtype: torch.dtype,
        gauge: Gauge | None = None,
    ) -> None:
        self._problem, self._base = problem, base
        self._settings = dataclasses.replace(settings, trajectory=None)
        self._device, self._gauge = device, gauge
        (split,) = problem.splits
        precision = "float64" if dtype == torch.float64 else "float32"
        self._table = {
            **evaluate, "splits": [split], "slices": 1, "precision": precision, "backend": "eager",
        }  # fmt: skip
        own = Origin.of(problem.model)
        self.origin = dataclasses.replace(
            own,
            parameters={n: p.to(dtype) for n, p in own.parameters.items()},
            buffers={n: b.to(dtype) for n, b in own.buffers.items()},
        )

    def losses(self, origin: Origin | None = None) -> FloatArray:
        """Return the (points,) losses around an origin; by default the network's own."""
        there = origin or self.origin
        if self._gauge is not None:
            there = self._gauge(there)
        made = make_directions(self._settings, there, self._base)
        directions = dataclasses.replace(made, origin=there.everything)
        with Evaluator(self._problem, self._table, directions, self._device) as evaluator:
            sums = evaluator.evaluate(coarse(self._settings.grid))
        return np.asarray(means(sums)[:, 0])

    def moved(self, transforms: Sequence[Transform], seed: str) -> Origin:
        """Return the origin after a random element of several transforms, keyed by ``seed``."""
        key = hashlib.sha256(seed.encode()).digest()[:16]
        chance = np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8")))
        state = self.origin.everything
        for t in transforms:
            state |= acted(state, t, random_element(t, chance))
        return dataclasses.replace(
            self.origin,
            parameters={n: state[n] for n in self.origin.parameters},
            buffers={n: state[n] for n in self.origin.buffers},
        )


def defects(
    picture: Picture, kinds: Mapping[str, Sequence[Transform]], seed: int = 0
) -> tuple[Defect, ...]:
    """Return max|ΔL| / range for random elements of each kind of transform.

    Args:
        picture: of the sweep.
        kinds: what is certified, from `certified_kinds`.
        seed: of the elements.
    """
    if not kinds:
        return ()
    here = picture.losses()
    finite = here[np.isfinite(here)]
    size = float(np.ptp(finite)) if len(finite) else 0.0
    out = []
    for kind, transforms in kinds.items():
        values: list[float | None] = []
        for k in range(ELEMENTS):
            there = picture.losses(picture.moved(transforms, f"{seed}\0{kind}\0{k}"))
            same = np.isfinite(here) == np.isfinite(there)
            gap = np.abs(there - here)[np.isfinite(here) & np.isfinite(there)].max(initial=0.0)
            whole = bool(same.all()) and size > 0
            values.append(float(gap / size) if whole else None)
        out.append(Defect(kind, len(transforms), tuple(values)))
    return tuple(out)
