"""Computing pointwise metrics: by name, at the present weights of an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lsweep import curvature
from lsweep.errors import LsweepError
from lsweep.objective import Objective
from lsweep.pointwise import POINTWISE
from lsweep.problem import Sampled

Numbers = Mapping[str, float | Sampled]


@dataclass(frozen=True)
class Request:
    """What a pointwise metric is computed from besides the loss.

    Attributes:
        scales: D of the filter metric, [P]; that of the origin, see `Objective.filter_scales`.
        seed: of start vectors and probes.
        replicate: which of them.
        radius: of the ball, in units of the weights; None where there is no such axis.
    """

    scales: Tensor
    seed: int = 0
    replicate: int = 0
    radius: float | None = None


def compute(
    name: str,
    objective: Objective,
    scales: Tensor,
    *,
    seed: int = 0,
    replicate: int = 0,
    radius: float | None = None,
) -> Numbers:
    """Return the variables of one pointwise metric at the present weights.

    Args:
        name: of `pointwise.POINTWISE`.
        objective: the mean loss of one split; its ``note`` afterwards says what was not plain.
        scales: D of the filter metric, [P]; that of the origin, see `Objective.filter_scales`.
        seed: of start vectors and probes.
        replicate: which of them.
        radius: of the ball of `worst_case`, in units of the weights.

    Returns:
        Variable (without its split) -> number, or values per sample where the metric is sampled.
        Where the loss is not finite, NaN.

    Raises:
        LsweepError: the metric is not for this network or data, scipy or the radius is missing.
    """
    if POINTWISE[name].radius and radius is None:
        raise LsweepError(
            f'metric {name!r} needs a radius: add an axis with a direction of kind = "radius"'
        )
    numbers = _COMPUTED[name](objective, Request(scales, seed, replicate, radius))
    assert tuple(numbers) == POINTWISE[name].variables
    return numbers


def _trace(objective: Objective, r: Request) -> Numbers:
    probe = curvature.trace_probe(objective, seed=r.seed, replicate=r.replicate)
    return {"hessian_trace": probe}


def _filter_trace(objective: Objective, r: Request) -> Numbers:
    probe = curvature.trace_probe(objective, r.scales, seed=r.seed, replicate=r.replicate)
    return {"filter_hessian_trace": probe}


def _relative_flatness(objective: Objective, r: Request) -> Numbers:
    probe = curvature.relative_flatness(objective, seed=r.seed, replicate=r.replicate)
    return {"relative_flatness": probe}


_COMPUTED: dict[str, Callable[[Objective, Request], Numbers]] = {
    "hessian_trace": _trace,
    "filter_hessian_trace": _filter_trace,
    "relative_flatness": _relative_flatness,
}
