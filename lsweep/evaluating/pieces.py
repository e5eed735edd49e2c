"""Pieces: a batch that is evaluated a few samples at a time, where all at once take much memory.

The audit is eager's, at a batch size that was chosen for another backend, which needs far less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsweep.backends.eager import Backend
from lsweep.backends.packed import Spot
from lsweep.problems import batchnorm
from lsweep.problems.data import Batch, map_tensors, samples_in
from lsweep.problems.problem import Problem, Sampled

SHARE = 4  # of the default batch size: eager is hardly slower, and takes a quarter of the memory


def piece_of(settings: Mapping[str, Any], problem: Problem, split: str, size: int) -> int | None:
    """Return how many samples the audit takes at once; None where samples may see each other.

    Args:
        settings: the plan's ``evaluate`` table.
        problem: whose batch norm may keep no statistics, and take those of a batch.
        split: of the data.
        size: its default batch size.
    """
    free = settings["batch_size"] == "auto" and problem.splits[split].sizable
    alone = settings["batch_norm"] == "eval" and not batchnorm.takes_batches(problem.model)
    return max(1, size // SHARE) if free and alone else None


def values_in_pieces(
    backend: Backend, spots: Sequence[Spot], batch: Batch, stay: bool, most: int | None
) -> list[Mapping[str, Sampled]]:
    """Return the metrics on a batch at each spot, from pieces of at most so many samples.

    Args:
        backend: whose ``values`` they are.
        spots: where.
        batch: on the device.
        stay: as in `Backend.values`.
        most: how many samples at once; None takes all, and so does a metric that is opaque.
    """
    count = samples_in(batch)
    if most is None or count <= most:
        return list(backend.values(spots, batch, stay))
    found = []
    for start in range(0, count, most):
        found.append(list(backend.values(spots, _rows(batch, start, start + most), stay)))
        stay = len(spots) == 1
        if any(s.opaque for s in found[0][0].values()):
            return list(backend.values(spots, batch, stay))
    return [_joined(parts) for parts in zip(*found, strict=True)]


def _rows(batch: Batch, start: int, end: int) -> Batch:
    def rows(t: Tensor) -> Tensor:
        return t[start:end]

    return map_tensors(batch, rows)


def _joined(parts: Sequence[Mapping[str, Sampled]]) -> Mapping[str, Sampled]:
    return {
        name: Sampled(
            torch.cat([p[name].values for p in parts]),
            torch.cat([p[name].weights for p in parts]),
        )
        for name in parts[0]
    }
