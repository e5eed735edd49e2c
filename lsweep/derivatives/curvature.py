"""Curvature: eigenvalues and traces of the Hessian, raw and in the filter metric.

The filter metric measures each filter in units of its own weights: M = D H D with
D = diag(‖w_f‖/√n_f). Its trace is exactly E[dᵀHd] of a random filter-normalised direction d.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsweep.axes.noise import random_signs, random_tensor
from lsweep.derivatives import scientific
from lsweep.derivatives.lanczos import FloatArray, lanczos
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError
from lsweep.plans.pointwise import CONVERGED
from lsweep.problems.filters import filter_rows

Product = Callable[[Tensor], Tensor]

TOLERANCE = 1e-3  # at which ARPACK stops, relative to half the range of eigenvalues
RESTARTS = 20  # of ARPACK, about 19 products each
GLANCE = 6  # steps of Lanczos, to see where the spectrum lies
DENSE = 32  # parameters: the whole matrix is cheaper than a Krylov space


def keyed(purpose: str, replicate: int) -> str:
    """Return the key of a random vector: as the axes of a sweep have it, ``x``, ``x.1``, ….

    >>> keyed("probe", 0), keyed("probe", 2)
    ('probe', 'probe.2')
    """
    return f"{purpose}.{replicate}" if replicate else purpose


def random_vector(objective: Objective, seed: int, purpose: str, replicate: int) -> Tensor:
    """Return N(0,1) noise, [P], tensor by tensor from Philox."""
    return _drawn(objective, random_tensor, seed, keyed(purpose, replicate))


def random_probe(objective: Objective, seed: int, purpose: str, replicate: int) -> Tensor:
    """Return a Rademacher probe, ±1, [P], tensor by tensor from Philox."""
    return _drawn(objective, random_signs, seed, keyed(purpose, replicate))


def _drawn(
    objective: Objective, draw: Callable[[int, str, str, Tensor], Tensor], seed: int, key: str
) -> Tensor:
    return objective.flat(
        draw(seed, key, n, torch.empty(s, dtype=objective.precision))
        for n, s in zip(objective.names, objective.shapes, strict=True)
    )


def metric_product(objective: Objective, scales: Tensor | None = None) -> Product:
    """Return v -> H v, or v -> D H D v for the scales D, [P]."""
    if scales is None:
        return objective.hessian_product
    return lambda v: scales * objective.hessian_product(scales * v)


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue λ of H (or of D H D) with its vector.

    Attributes:
        value: λ = vᵀHv, in units of the loss.
        vector: v, [P], of norm 1; its largest component is positive.
        residual: ‖Hv - λv‖ divided by the largest |λ| that was found. There is an eigenvalue at
            least so near, relative to the largest.
    """

    value: float
    vector: Tensor
    residual: float

    @property
    def converged(self) -> bool:
        """True for a residual of at most `CONVERGED`."""
        return self.residual <= CONVERGED


def extremes(
    objective: Objective, scales: Tensor | None = None, *, seed: int = 0, replicate: int = 0
) -> tuple[Eigenpair, Eigenpair]:
    """Return the largest and the smallest eigenpair of H, or of D H D.

    By ARPACK's restarted Lanczos (scipy's ``eigsh``), both ends from one Krylov space ("BE").
    ARPACK stops at a tolerance relative to each eigenvalue, which for a smallest one near zero
    never ends ("SA" has the same trouble); so the spectrum is shifted first by its middle, as a few
    steps of Lanczos see it, and both ends are found to a tolerance relative to the range.

    Args:
        objective: the loss.
        scales: D, [P], for the filter metric.
        seed: of the start vector.
        replicate: which start vector.

    Returns:
        (largest, smallest). All NaN where a product is not finite.

    Raises:
        LsweepError: scipy is not installed.
    """
    product = metric_product(objective, scales)
    start = random_vector(objective, seed, "start", replicate)
    try:
        (_, low), (_, high) = _ends(objective, _finite(product), start)
    except _NotFinite:
        nothing = Eigenpair(math.nan, torch.full_like(start, math.nan), math.nan)
        return nothing, nothing
    first, last = _checked(product, [high, low])
    return first, last


def eigenpair(
    objective: Objective, which: int = 1, scales: Tensor | None = None, *, seed: int = 0
) -> Eigenpair:
    """Return the eigenpair at place ``which``: 1 the largest, 2 the second, …, -1 the smallest.

    Args:
        objective: the loss.
        which: counted from the top, or from the bottom where negative.
        scales: D, [P], for the filter metric.
        seed: of the start vector.

    Raises:
        LsweepError: there are not so many, or the Hessian is not finite.
    """
    if not 1 <= abs(which) <= objective.size:
        raise LsweepError(f"eigenvector {which}: there are {objective.size}, 1 is the largest")
    pairs = extremes(objective, scales, seed=seed)
    if not math.isfinite(pairs[0].value):
        raise LsweepError("the Hessian is not finite here: it has no eigenvectors")
    if abs(which) == 1:
        return pairs[0] if which > 0 else pairs[1]
    # Seen from the other end of the spectrum, those at this end are of largest magnitude.
    product, end = metric_product(objective, scales), pairs[which > 0].value
    start = random_vector(objective, seed, "start", 0)
    found = _arpack(objective, lambda v: product(v) - end * v, start, abs(which), "LM")
    vector = min(found, key=lambda pair: abs(pair[0]))[1]
    return _checked(product, [vector], max(abs(p.value) for p in pairs))[0]


class _NotFinite(Exception):
    """A product with the Hessian is not finite."""


def _finite(product: Product) -> Product:
    def checked(v: Tensor) -> Tensor:
        out = product(v)
        if not bool(torch.isfinite(out).all()):
            raise _NotFinite
        return out

    return checked


Pairs = list[tuple[float, Tensor]]


def _ends(objective: Objective, product: Product, start: Tensor) -> Pairs:
    """Return the smallest and the largest eigenpair of a symmetric operator."""
    few = lanczos(product, start, GLANCE, objective.eps)
    if len(few.values) < min(GLANCE, objective.size):  # the space is at its end, and exact
        return [(float(few.values[i]), few.vector(i)) for i in (0, -1)]
    middle = float(few.values[0] + few.values[-1]) / 2
    return _arpack(objective, lambda v: product(v) - middle * v, start, 2, "BE")


def _arpack(objective: Objective, product: Product, start: Tensor, count: int, which: str) -> Pairs:
    """Return eigenpairs, ascending: "LM" those of largest magnitude, "BE" half from each end."""
    size = objective.size
    if size <= DENSE or count >= size - 1:
        matrix = torch.stack([product(e) for e in torch.eye(size).to(start)])
        values, vectors = (t.cpu() for t in torch.linalg.eigh((matrix + matrix.T) / 2))
        return _picked(values.numpy(), lambda i: vectors[:, i].to(start), count, which)
    linalg = scientific.scipy("sparse.linalg")
    operator = linalg.LinearOperator(
        (size, size),
        matvec=lambda v: product(torch.from_numpy(v.ravel().copy()).to(start)).cpu().numpy(),
        dtype=np.dtype(str(start.dtype).removeprefix("torch.")),
    )
    kept = min(size, max(20, 2 * count + 1))
    known = inspect.signature(linalg.eigsh).parameters
    # What ARPACK draws when a Krylov space ends early; before scipy 1.17 from a seed of its own.
    rng = {"rng": np.random.default_rng(0)} if "rng" in known else {}
    try:
        values, columns = linalg.eigsh(
            operator,
            k=count,
            which=which,
            v0=start.cpu().numpy(),
            ncv=kept,
            maxiter=RESTARTS,
            tol=TOLERANCE,
            **rng,
        )
        vectors = torch.from_numpy(columns)
        return _picked(values, lambda i: vectors[:, i].to(start), count, which)
    except linalg.ArpackNoConvergence:  # it keeps to itself what it has: the best of one space
        ritz = lanczos(product, start, 2 * kept, objective.eps)
        return _picked(ritz.values, ritz.vector, count, which)


def _picked(values: FloatArray, vector: Callable[[int], Tensor], count: int, which: str) -> Pairs:
    order = np.argsort(values).tolist()
    if which == "BE":
        order = order[: count // 2] + order[count // 2 - count :]
    else:
        largest = sorted(order, key=lambda i: -abs(values[i]))[:count]
        order = [i for i in order if i in largest]
    return [(float(values[i]), vector(i)) for i in order]


def _checked(product: Product, vectors: list[Tensor], size: float = 0.0) -> list[Eigenpair]:
    """Return Rayleigh quotients with their residuals, one more product for each.

    Residuals are relative to ``size``, or to the largest of the quotients where that is larger.
    """
    units = [v / v.norm() for v in vectors]
    units = [v if v[v.abs().argmax()] > 0 else -v for v in units]
    images = [product(v) for v in units]
    values = [float(v @ w) for v, w in zip(units, images, strict=True)]
    size = max(size, *map(abs, values)) or 1.0
    return [
        Eigenpair(a, v, float((w - a * v).norm()) / size)
        for a, v, w in zip(values, units, images, strict=True)
    ]


def trace_probe(
    objective: Objective, scales: Tensor | None = None, *, seed: int = 0, replicate: int = 0
) -> float:
    """Return one Rademacher probe vᵀ H v of the trace, of H or of D H D.

    M. F. Hutchinson 1990: its mean over probes is the trace; a probe's variance is
    2(‖H‖_F² - Σ H_ii²).

    Args:
        objective: the loss.
        scales: D, [P], for the filter metric.
        seed: of the probe.
        replicate: which probe.

    Returns:
        An unbiased estimate of tr H, in units of the loss.
    """
    v = random_probe(objective, seed, "probe", replicate)
    return float(v @ metric_product(objective, scales)(v))


def last_layer(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return the last tensor of two or more dimensions: the head, unless its weights are tied.

    >>> last_layer({"0.weight": (3, 4), "2.weight": (2, 3), "2.bias": (2,)})
    '2.weight'
    """
    return next((n for n in reversed(list(shapes)) if len(shapes[n]) > 1), None)


def relative_flatness(objective: Objective, *, seed: int = 0, replicate: int = 0) -> float:
    """Return one probe of the relative flatness Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'} of the last layer.

    H. Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021; w_s are the rows of the
    layer's weights W and H_{s,s'} the block of the Hessian between two rows. With vectors u and z
    of random signs and v = vec(W u zᵀ), E[vᵀHv] is that sum, as E[u_i u_i'] = δ_ii', and so of z.

    Args:
        objective: the loss; the layer is its `last_layer`.
        seed: of the probe.
        replicate: which probe.

    Returns:
        An unbiased estimate, in units of the loss; NaN where no tensor has two dimensions.
    """
    layer = last_layer(dict(zip(objective.names, objective.shapes, strict=True)))
    if layer is None:
        return math.nan
    probe = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    module = objective.owners[layer]
    rows = filter_rows(objective.split(objective.here)[layer], module)
    key, like = keyed("probe", replicate), torch.empty(2, rows.shape[1])
    u, z = random_signs(seed, key, layer, like).to(rows)
    part = objective.split(probe)[layer]
    # Where each number of a filter lies in the tensor: not all tensors have their filters in rows.
    places = filter_rows(torch.arange(part.numel()).view(part.shape), module)
    part.view(-1)[places.to(part.device)] = torch.outer(rows @ u, z)
    return float(probe @ objective.hessian_product(probe))
