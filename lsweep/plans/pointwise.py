"""Pointwise metrics: what is computed at a point by streaming all the data with gradients.

They are asked for like any metric and are stored as one variable or more, each a number per point;
curvature is that of the mean loss over the weights that a random direction moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

LANCZOS_STEPS = 64
CONVERGED = 1e-2  # largest |Hv - λv| / max|λ| of an eigenvalue that counts as found
WORST_STEPS = 20
KESKAR_EPS = 1e-3


@dataclass(frozen=True)
class Variable:
    """One number per point: its name without the split, what it is, its units."""

    name: str
    long_name: str
    units: str = "1"


@dataclass(frozen=True)
class Pointwise:
    """A metric that is no mean over samples.

    Attributes:
        name: as ``evaluate.metrics`` has it.
        outputs: what it computes, in order.
        sampled: one value per sample; it has a standard error over samples.
        replicate: what another offset along a `replicate` axis draws anew; empty for nothing.
        radius: needs one, from a `radius` axis.
        scipy: needs ``lsweep[measure]``.
    """

    name: str
    outputs: tuple[Variable, ...]
    sampled: bool = False
    replicate: str = ""
    radius: bool = False
    scipy: bool = False

    @property
    def variables(self) -> tuple[str, ...]:
        """Names of what it computes, without the split."""
        return tuple(v.name for v in self.outputs)


def _extremes(prefix: str, what: str) -> tuple[Variable, ...]:
    return (
        Variable(f"{prefix}hessian_max", f"largest eigenvalue of {what}"),
        Variable(f"{prefix}hessian_min", f"smallest eigenvalue of {what}"),
        Variable(f"{prefix}hessian_ratio", f"|min(smallest, 0)| / max|eigenvalue| of {what}"),
        Variable(f"{prefix}hessian_max_residual", "|Hv - λv| / max|λ| of the largest eigenvalue"),
        Variable(f"{prefix}hessian_min_residual", "|Hv - λv| / max|λ| of the smallest eigenvalue"),
    )


def _spectrum(prefix: str, what: str) -> tuple[Variable, ...]:
    steps = range(LANCZOS_STEPS)
    return (
        *(Variable(f"{prefix}ritz_{i:02}", f"Ritz value {i} of {what}") for i in steps),
        *(Variable(f"{prefix}ritz_weight_{i:02}", f"weight of Ritz value {i}") for i in steps),
    )


_RAW = "the Hessian of the mean loss"
_FILTER = "the Hessian with every filter in units of its own weights"

_ALL = (
    Pointwise("hessian_extremes", _extremes("", _RAW), replicate="start vectors", scipy=True),
    Pointwise(
        "filter_hessian_extremes",
        _extremes("filter_", _FILTER),
        replicate="start vectors",
        scipy=True,
    ),
    Pointwise(
        "hessian_trace", (Variable("hessian_trace", f"trace of {_RAW}"),), replicate="probes"
    ),
    Pointwise(
        "filter_hessian_trace",
        (Variable("filter_hessian_trace", f"trace of {_FILTER}"),),
        replicate="probes",
    ),
    Pointwise(
        "relative_flatness",
        (Variable("relative_flatness", "relative flatness of the last layer"),),
        replicate="probes",
    ),
    Pointwise("spectrum", _spectrum("", _RAW), replicate="start vectors"),
    Pointwise("filter_spectrum", _spectrum("filter_", _FILTER), replicate="start vectors"),
    Pointwise(
        "worst_case",
        (
            Variable("worst_filter_1", "rise of the loss within r·|w| of each filter, 1 step"),
            Variable(
                f"worst_filter_{WORST_STEPS}",
                f"rise of the loss within r·|w| of each filter, {WORST_STEPS} steps",
            ),
            Variable("worst_adaptive_1", "rise of the loss within r·|w| of each weight, 1 step"),
            Variable(
                f"worst_adaptive_{WORST_STEPS}",
                f"rise of the loss within r·|w| of each weight, {WORST_STEPS} steps",
            ),
        ),
        replicate="start vectors",
        radius=True,
    ),
    Pointwise(
        "keskar",
        (Variable("keskar_sharpness", f"Keskar's sharpness, eps {KESKAR_EPS:g}", "percent"),),
        replicate="start vectors",
        scipy=True,
    ),
    Pointwise(
        "input_jacobian",
        (Variable("input_jacobian", "Frobenius norm of d output / d input"),),
        sampled=True,
    ),
)

POINTWISE: Mapping[str, Pointwise] = {p.name: p for p in _ALL}
"""Pointwise metrics by name.

>>> POINTWISE["hessian_extremes"].variables[:3]
('hessian_max', 'hessian_min', 'hessian_ratio')
>>> len(POINTWISE["spectrum"].variables)
128
"""


def expanded(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the variables of metrics: their own names, of pointwise ones what they compute.

    >>> expanded(("loss", "keskar"))
    ('loss', 'keskar_sharpness')
    """
    return tuple(v for m in metrics for v in (POINTWISE[m].variables if m in POINTWISE else (m,)))
