"""From child runs: what each finished child tells of the trained weights, as measured numbers.

Every child is a surface with an axis that counts replicates, so each number here is a mean over
them with its standard error s/√K, or, where each replicate is a bound of the same number (an
eigenvalue, a maximum), the best bound with how far the others are from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.derivatives.spectrum import moment, negative_mass, threshold
from lsweep.measures.barrier import barriers
from lsweep.measures.convexity import THRESHOLD
from lsweep.measures.from_surface import context_of
from lsweep.outcomes.measured import Measured, mean_of
from lsweep.plans.pointwise import CONVERGED
from lsweep.surfaces.surface import Surface

FloatArray = npt.NDArray[np.float64]
AGREED = 1e-2  # largest relative difference between start vectors of one eigenvalue
CLIMBED = 0.1  # the same of climbs, which end on different hills
PRECISIONS = {"float64": 2.2e-16, "float32": 1.2e-7}  # unit roundoff; others are coarser
ROUNDED = 10.0  # times the rounding of a loss below which a rise may be nothing else
VAGUE = 0.1  # of an eigenvalue: an error beyond which it is said
STUDENT = (12.7062, 4.3027, 3.1824)  # 97.5 % quantiles of Student's t for 1, 2, 3 degrees


@dataclass(frozen=True)
class Finished:
    """A child run that has all its points.

    Attributes:
        name: of the child.
        surface: its values.
        context: what is the same for all its numbers.
    """

    name: str
    surface: Surface
    context: Mapping[str, Any]

    @property
    def split(self) -> str:
        """The data split that it was computed on."""
        return str(self.surface.provenance["plan"]["evaluate"]["splits"][0])

    def values(self, variable: str) -> FloatArray:
        """Return a variable as (…, y, x)."""
        return self.surface[f"{self.split}_{variable}"]

    def about(self, variable: str) -> str:
        """Return what a variable is, in the surface's own words."""
        attributes = self.surface.attributes.get(f"{self.split}_{variable}", {})
        return str(attributes.get("long_name", "")).strip().removeprefix(f"{self.split} ")

    def row(
        self,
        name: str,
        value: float,
        se: float | None = None,
        replicate: str = "",
        note: str = "",
        **context: Any,
    ) -> Measured:
        """Return a number with what is the same for all numbers of this child."""
        how = [d.get("derivatives") for d in self.surface.provenance.get("devices", {}).values()]
        said = "; ".join(dict.fromkeys(filter(None, [note, *how])))
        whole = {**self.context, "measure": self.name, **context}
        return Measured(name, value, se, replicate, whole, said)

    def mean(
        self, name: str, values: FloatArray, replicate: str, note: str = "", **context: Any
    ) -> Measured:
        """Return the mean over replicates with its standard error.

        Args:
            name: of the number.
            values: (K,), one of each replicate.
            replicate: what they are.
            note: about it.
            context: more of it.
        """
        mean, se = mean_of(values.tolist())
        bad = int(np.count_nonzero(~np.isfinite(values)))
        words = [f"{bad} of {len(values)} {replicate} are not finite"] if bad else []
        more = {**context, "replicates": len(values)}
        return self.row(name, mean, se, replicate, "; ".join(filter(None, [*words, note])), **more)


def rows_of(child: Finished) -> list[Measured]:
    """Return the numbers of a finished child; none where this lsweep does not know it."""
    reader = _READERS.get(child.name)
    return reader(child) if reader else []


# -- the rise of the loss along random directions --------------------------------------------------


def rises(values: FloatArray, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return radii and the rise at each: (L(r) + L(-r))/2 - L(0), antithetic, so odd terms cancel.

    Args:
        values: (..., nx) losses along lines through the centre.
        x: (nx,) offsets, symmetric about 0.

    Returns:
        (R,) radii, and (..., R) rises.

    >>> x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    >>> rises(3 * x**2 + 5 * x + 1, x)
    (array([1., 2.]), array([ 3., 12.]))
    """
    centre = len(x) // 2
    both = (values[..., centre + 1 :] + values[..., :centre][..., ::-1]) / 2
    return x[centre + 1 :], both - values[..., centre : centre + 1]


def _sharpness(child: Finished) -> list[Measured]:
    radii, rise = rises(child.values("loss"), child.surface.x)
    errors = child.surface.values.get(f"{child.split}_loss_diff_se")
    out = []
    for i, radius in enumerate(radii):
        more: dict[str, Any] = {"radius": float(radius)}
        if errors is not None:  # of one direction: the same samples serve all of them
            pairs = errors[:, np.isclose(np.abs(child.surface.x), radius)]
            more["samples_se"] = float(np.median(pairs))
        out.append(child.mean(f"sharpness@{radius:g}", rise[:, i], "directions", **more))
    return out


def _curvature(child: Finished) -> list[Measured]:
    """E[dᵀHd] as 2·S/r² at the smallest radius, where a ReLU's kinks still count within r."""
    values = child.values("loss")
    radii, rise = rises(values, child.surface.x)
    radius, nearest = float(radii[0]), rise[:, 0]
    note = "2·rise/r²"
    more: dict[str, Any] = {"radius": radius}
    precision = child.context.get("precision", "float64")
    rounding = PRECISIONS.get(str(precision), 1e-3) * float(np.abs(values).max())
    if np.abs(nearest).mean() < ROUNDED * rounding:
        note += f"; near the rounding of {precision}: sweep in float64"
        more["doubtful"] = True
    found = 2 * nearest / radius**2
    name = f"direction_curvature@{radius:g}"
    return [child.mean(name, found, "directions", note, **more)]


def _layers(child: Finished) -> list[Measured]:
    names: Sequence[str] = child.surface.provenance["plan"]["facts"]["layers"]
    radii, rise = rises(child.values("loss"), child.surface.x)
    radius = float(radii[-1])
    return [
        child.mean(
            f"layer_sharpness@{name}",
            rise[i, :, -1],
            "directions",
            f"at r = {radius:g}",
            radius=radius,
        )
        for i, name in enumerate(names)
    ]


# -- the worst case --------------------------------------------------------------------------------

LOWER = "a lower bound of the highest"
WORST = ("worst_filter_1", "worst_filter_20", "worst_adaptive_1", "worst_adaptive_20")


def _worst(child: Finished) -> list[Measured]:
    out = []
    for name in WORST:
        values = child.values(name)
        if name.endswith("_1"):  # one step from the weights; others begin at the ball's edge
            values = values[:1]
        for i, radius in enumerate(child.surface.x):
            place = f"{name}@{radius:g}"
            out.append(_highest(child, name, place, values[:, i], radius=float(radius)))
    return out


def _highest(
    child: Finished, variable: str, name: str, values: FloatArray, **context: Any
) -> Measured:
    """The highest of several climbs: each is a lower bound of the maximum."""
    known = values[np.isfinite(values)]
    value = float(known.max()) if len(known) else math.nan
    trouble = _disagreement(values, CLIMBED)
    note = [child.about(variable), LOWER, *trouble]
    more = context | ({"replicates": len(values)} if len(values) > 1 else {}) | doubts(trouble)
    return child.row(name, value, note="; ".join(note), **more)


def doubts(trouble: Sequence[str]) -> dict[str, Any]:
    """Return the context of a number that is not to be relied upon; its note says why."""
    return {"doubtful": True} if trouble else {}


def _disagreement(values: FloatArray, most: float = AGREED) -> list[str]:
    """Say so when replicates of one number do not agree."""
    if not np.isfinite(values).all():
        bad = int(np.count_nonzero(~np.isfinite(values)))
        of = f"{bad} of {len(values)} start vectors" if len(values) > 1 else "it"
        return [f"did not converge: {of} gave no number"]
    size = float(np.abs(values).max())
    gap = float(np.ptp(values)) / size if size else 0.0
    return [f"start vectors differ by {gap:.1%}"] if gap > most else []


def _keskar(child: Finished) -> list[Measured]:
    name = "keskar_sharpness"
    return [_highest(child, name, name, child.values(name), units="percent")]


# -- the Hessian -----------------------------------------------------------------------------------


def _hessian(child: Finished) -> list[Measured]:
    out = []
    for prefix in ("", "filter_"):
        high, low = (child.values(f"{prefix}hessian_{end}") for end in ("max", "min"))
        # A Ritz value lies inside the spectrum: the outermost of several is the closest.
        top, bottom = _outermost(high, max), _outermost(low, min)
        largest = max(abs(top), abs(bottom))
        said: list[str] = []
        for end, values, value in (("max", high, top), ("min", low, bottom)):
            residual = float(child.values(f"{prefix}hessian_{end}_residual").max())
            trouble = _disagreement(values) + _unconverged(residual)
            said += [f"λ{end}: {t}" for t in trouble]
            if unsure := residual * largest > VAGUE * abs(value):
                trouble.append(f"known to ± {residual * largest:.2g}")
            out.append(
                child.row(f"{prefix}hessian_{end}", value, note="; ".join(trouble),
                          residual=residual, replicates=len(values), **doubts(trouble))
            )  # fmt: skip
        # Of a residual |Hv - λv| some eigenvalue lies no farther from λ; here in units of max|λ|.
        said += [f"known to ± {residual:.2g}"] * unsure
        ratio = abs(min(bottom, 0.0)) / largest if largest else 0.0
        out.append(child.row(f"{prefix}hessian_ratio", ratio, note="; ".join(said), **doubts(said)))
    return out


def _outermost(values: FloatArray, of: Callable[[FloatArray], float]) -> float:
    known = values[np.isfinite(values)]
    return float(of(known)) if len(known) else math.nan


def _unconverged(residual: float) -> list[str]:
    if residual <= CONVERGED:
        return []
    return [f"did not converge: residual {residual:.1e} of max|λ|, above {CONVERGED:g}"]


def student_95(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t; from 4 on by Cornish and Fisher (to 1 %).

    >>> [round(student_95(n), 2) for n in (1, 2, 3, 4, 9, 29)]
    [12.71, 4.3, 3.18, 2.77, 2.26, 2.05]
    """
    if degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    z, n = 1.959963984540054, float(degrees)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _trace(child: Finished) -> list[Measured]:
    out = []
    layer = child.surface.provenance["plan"]["facts"].get("last_layer")
    for name in ("hessian_trace", "filter_hessian_trace", "relative_flatness"):
        note = f"of {layer}" if layer and name == "relative_flatness" else ""
        found = child.mean(name, child.values(name), "probes", note)
        if found.se is not None and math.isfinite(found.se):
            half = student_95(len(child.surface.x) - 1) * found.se
            interval = [found.value - half, found.value + half]
            found = child.mean(name, child.values(name), "probes", note, ci95=interval)
        out.append(found)
    return out


def spectrum(child: Finished) -> tuple[FloatArray, FloatArray]:
    """Return Ritz values and weights, each (K, m); a weight is 0 where there is no Ritz value."""
    count = sum(n.startswith(f"{child.split}_ritz_weight_") for n in child.surface.values)
    places, weights = (
        np.stack([child.values(f"{kind}_{i:02}") for i in range(count)], axis=-1)
        for kind in ("ritz", "ritz_weight")
    )
    gone = ~np.isfinite(places) | ~np.isfinite(weights)
    return np.where(gone, 0.0, places), np.where(gone, 0.0, weights)


def _spectrum(child: Finished) -> list[Measured]:
    places, weights = spectrum(child)
    edge = threshold(places, weights)
    mass, mean = negative_mass(places, weights), moment(places, weights)
    count = {"replicates": len(places)}
    size = int(child.surface.provenance["plan"]["facts"]["curved"])
    return [
        child.row("spectral_negative_mass", float(mass.value), float(mass.se), "start vectors",
                  f"share of the eigenvalues below {-edge:.3g}, 1 % of the largest", **count),
        child.row("spectral_trace", size * float(mean.value), size * float(mean.se),
                  "start vectors", f"{size} times the mean eigenvalue", **count),
    ]  # fmt: skip


# -- the rest --------------------------------------------------------------------------------------


def _jacobian(child: Finished) -> list[Measured]:
    value = float(child.values("input_jacobian").mean())
    errors = child.surface.values.get(f"{child.split}_input_jacobian_se")
    # Where there are probes their noise is part of each error; the samples are the same.
    se = None if errors is None else float(errors.mean())
    note = "Frobenius norm of d output / d input, mean over samples"
    replicate = "" if se is None else "samples"
    return [child.row("input_jacobian", value, se, replicate, note)]


def _convexity(child: Finished) -> list[Measured]:
    ratio = child.values("hessian_ratio")
    known = np.isfinite(ratio)
    lost = [f"{np.count_nonzero(~known)} of {ratio.size} points have no value"]
    residuals = np.maximum(*(child.values(f"hessian_{e}_residual") for e in ("max", "min")))
    loose = int(np.count_nonzero(residuals > CONVERGED))
    note = lost if not known.all() else []
    note += [f"{loose} of {ratio.size} points did not converge"] if loose else []
    grid = " x ".join(str(n) for n in reversed(ratio.shape))
    more: dict[str, Any] = {"grid": grid, "threshold": THRESHOLD} | doubts(note)
    share = float((ratio[known] > THRESHOLD).mean()) if known.any() else math.nan
    most = float(ratio[known].max()) if known.any() else math.nan
    text = f"share of {grid} points where the whole Hessian has |λmin/λmax| > {THRESHOLD:g}"
    return [
        child.row("map_nonconvex_fraction", share, note="; ".join([text, *note]), **more),
        child.row("map_largest_ratio", most, note="; ".join(note), **more),
    ]


def _barrier(child: Finished) -> list[Measured]:
    splits = child.surface.provenance["plan"]["evaluate"]["splits"]
    contexts = {s: context_of(child.surface, s) for s in splits}
    found = barriers(child.surface, child.name.replace("-", "_"), contexts)
    return [replace(r, context={**r.context, "measure": child.name}) for r in found]


_READERS: dict[str, Callable[[Finished], list[Measured]]] = {
    "sharpness": _sharpness,
    "curvature": _curvature,
    "layers": _layers,
    "worst": _worst,
    "keskar": _keskar,
    "hessian": _hessian,
    "trace": _trace,
    "spectrum": _spectrum,
    "jacobian": _jacobian,
    "convexity": _convexity,
    "barrier": _barrier,
    "barrier-aligned": _barrier,
}
