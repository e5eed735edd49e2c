"""Differentiating: pointwise metrics, one spot after the other, as sums like those of any metric.

They need gradients and the network itself, so they are computed by plain eager whatever backend
serves the others, in float32 or float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from lsweep.axes.families import Curved, layer_of
from lsweep.backends.eager import Eager, Ground
from lsweep.backends.packed import Spot
from lsweep.backends.summing import Samples
from lsweep.derivatives.computing import compute
from lsweep.derivatives.jacobian import input_jacobian, require_inputs
from lsweep.derivatives.objective import Objective, filter_scales
from lsweep.derivatives.scientific import scipy
from lsweep.errors import LsweepError
from lsweep.plans.pointwise import POINTWISE
from lsweep.problems import weights
from lsweep.problems.data import Batch
from lsweep.problems.problem import Problem, Sampled
from lsweep.problems.takeover import generators_kept
from lsweep.storage.sums import SUMS, WV, WW, WWV, WWVV, W

FloatArray = npt.NDArray[np.float64]


class Differentiating:
    """Computes pointwise metrics of a problem that was taken over.

    Args:
        ground: the problem, and where it may go.
        eager: moves the network as it is.
        batches: yields a split's batches on the device.
    """

    def __init__(
        self, ground: Ground, eager: Eager, batches: Callable[[str], Iterator[Batch]]
    ) -> None:
        self._ground, self._eager, self._batches = ground, eager, batches

    def sums(self, metric: str, spot: Spot, split: str) -> FloatArray:
        """Return (variables, 8) float64 sums of `sums.SUMS` of one pointwise metric at a spot.

        A value that is no mean over samples is one of weight 1. Differences to the centre are not
        taken: those sums are 0.
        """
        directions, curved = self._ground.directions, self._curved
        at = dict(zip(directions.kinds, spot.offsets, strict=True)) if directions.kinds else {}
        names = curved.names
        if "layer" in at:
            here = directions.layers[round(at["layer"])]
            names = tuple(n for n in names if layer_of(n) == here)
        self._eager.move(spot)
        objective = self.objective(split, names)
        found = compute(
            metric,
            objective,
            self._scales(objective),
            seed=curved.recipe.seed,
            replicate=round(at.get("replicate", 0)),
            radius=at.get("radius"),
        )
        return np.stack([_sums(found[v]) for v in POINTWISE[metric].variables])

    def note(self, metrics: tuple[str, ...], split: str) -> str:
        """Return how derivatives are computed, where that is not plain autograd.

        Tried on the first batch at the present weights, so that what cannot be differentiated is
        refused before any point is.
        """
        first = list(itertools.islice(self._batches(split), 1)) if metrics else []
        found = []
        for sampled in {POINTWISE[m].sampled for m in metrics}:
            objective = self.objective(split, self._curved.names, lambda: iter(first))
            if sampled:
                input_jacobian(objective)
            else:
                objective.hessian_product(torch.ones(objective.size, device=objective.device))
            found.append(objective.note)
        return "; ".join(filter(None, sorted(found)))

    @property
    def _curved(self) -> Curved:
        curved = self._ground.directions.curved
        assert curved is not None
        return curved

    def objective(
        self,
        split: str,
        names: tuple[str, ...],
        batches: Callable[[], Iterator[Batch]] | None = None,
    ) -> Objective:
        """Return the loss as a function of the present weights; a new one, for it learns."""
        batches = batches or functools.partial(self._batches, split)
        return Objective(
            self._ground.problem, batches, names, lambda: self._ground.context(plain=True)
        )

    def _scales(self, objective: Objective) -> torch.Tensor:
        """Return the scale of each weight in the filter metric: that of the origin, everywhere."""
        owners = weights.owners_of(self._ground.problem.model)
        return objective.flat(
            filter_scales(self._ground.state[n], owners[n]) for n in objective.names
        )


def check_pointwise(metrics: tuple[str, ...], problem: Problem) -> None:
    """Check, before anything is planned, that pointwise metrics can be computed here.

    Raises:
        LsweepError: scipy is missing, the problem has a metric of its own of that name, or not
            what the metric needs.
    """
    for metric in metrics:
        if metric not in POINTWISE:
            continue
        if metric in problem.metrics:
            raise LsweepError(
                f"metric {metric!r} is one that lsweep itself computes: give yours another name"
            )
        if metric == "input_jacobian":
            require_inputs(problem, _any_batch(problem))
        if POINTWISE[metric].scipy:
            scipy("sparse.linalg", f"metric {metric!r}")


def refused(problem: Problem) -> dict[str, str]:
    """Return metrics that can never be computed of a network, each with the reason."""
    try:
        require_inputs(problem, _any_batch(problem))
    except LsweepError as e:
        return {"input_jacobian": str(e)}
    return {}


def _any_batch(problem: Problem) -> Batch:
    with generators_kept():
        return next(iter(next(iter(problem.splits.values())).batches(2)))


def _sums(found: float | Sampled) -> FloatArray:
    out = np.zeros(len(SUMS))
    if isinstance(found, Sampled):
        s = Samples.of(found)
        w, v = s.weights, s.values
        out[[W, WW, WV]] = float(w.sum()), float((w * w).sum()), float((w * v).sum())
        out[[WWV, WWVV]] = float((w * w * v).sum()), float((w * w * v * v).sum())
    else:
        out[[W, WW, WV, WWV, WWVV]] = 1.0, 1.0, found, found, found * found
    return out
