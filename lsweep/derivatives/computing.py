"""Computing pointwise metrics: by name, at the present weights of an objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lsweep.derivatives import curvature
from lsweep.derivatives.ascent import adaptive_ball, ascend, filter_ball, keskar
from lsweep.derivatives.jacobian import input_jacobian
from lsweep.derivatives.lanczos import lanczos
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError
from lsweep.plans.pointwise import LANCZOS_STEPS, POINTWISE, WORST_STEPS
from lsweep.problems.problem import Sampled

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


def _extremes(prefix: str, objective: Objective, r: Request) -> Numbers:
    scales = r.scales if prefix else None
    high, low = curvature.extremes(objective, scales, seed=r.seed, replicate=r.replicate)
    size = max(abs(high.value), abs(low.value))
    ratio = max(-low.value, 0.0) / size if size else size
    return {
        f"{prefix}hessian_max": high.value,
        f"{prefix}hessian_min": low.value,
        f"{prefix}hessian_ratio": ratio if math.isfinite(size) else math.nan,
        f"{prefix}hessian_max_residual": high.residual,
        f"{prefix}hessian_min_residual": low.residual,
    }


def _spectrum(prefix: str, objective: Objective, r: Request) -> Numbers:
    product = curvature.metric_product(objective, r.scales if prefix else None)
    start = curvature.random_probe(objective, r.seed, "start", r.replicate)
    ritz = lanczos(product, start, LANCZOS_STEPS, objective.eps)
    rest = [0.0] * (LANCZOS_STEPS - len(ritz.values))
    names = POINTWISE[f"{prefix}spectrum"].variables
    return dict(zip(names, [*ritz.values, *rest, *ritz.weights, *rest], strict=True))


def _worst_case(objective: Objective, r: Request) -> Numbers:
    assert r.radius is not None
    balls = {"filter": filter_ball, "adaptive": adaptive_ball}
    out: dict[str, float] = {}
    for name, ball in balls.items():
        rise = ascend(objective, ball(objective, r.radius), seed=r.seed, replicate=r.replicate)
        out |= {f"worst_{name}_1": rise.first, f"worst_{name}_{WORST_STEPS}": rise.best}
    return out


def _keskar(objective: Objective, r: Request) -> Numbers:
    return {"keskar_sharpness": keskar(objective, seed=r.seed, replicate=r.replicate)}


def _input_jacobian(objective: Objective, r: Request) -> Numbers:
    return {"input_jacobian": input_jacobian(objective, seed=r.seed, replicate=r.replicate)}


_COMPUTED: dict[str, Callable[[Objective, Request], Numbers]] = {
    "hessian_extremes": partial(_extremes, ""),
    "filter_hessian_extremes": partial(_extremes, "filter_"),
    "hessian_trace": _trace,
    "filter_hessian_trace": _filter_trace,
    "relative_flatness": _relative_flatness,
    "spectrum": partial(_spectrum, ""),
    "filter_spectrum": partial(_spectrum, "filter_"),
    "worst_case": _worst_case,
    "keskar": _keskar,
    "input_jacobian": _input_jacobian,
}
