"""Lanczos: the Krylov space of a symmetric operator, kept orthogonal, and its Ritz pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lsweep.errors import LsweepError
from lsweep.hosts.device import room

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ritz:
    """What a Krylov space of m steps knows of a symmetric operator A.

    Attributes:
        values: (m,) Ritz values, ascending.
        weights: (m,) squared first components of the eigenvectors of the tridiagonal matrix; they
            add up to 1, and Σ weight·f(value) is the Gauss quadrature of vᵀf(A)v for the start v.
        vectors: (m, m) those eigenvectors, in columns.
        basis: [m, P] orthonormal basis of the space.
    """

    values: FloatArray
    weights: FloatArray
    vectors: FloatArray
    basis: Tensor

    def vector(self, i: int) -> Tensor:
        """Return the Ritz vector of value i, [P], of norm 1."""
        return torch.from_numpy(self.vectors[:, i].copy()).to(self.basis) @ self.basis


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int, eps: float = 1e-12
) -> Ritz:
    """Run Lanczos with full reorthogonalisation, done twice.

    G. H. Golub and C. F. Van Loan, *Matrix Computations*, 10.3. Without it, values that have
    converged come back as ghosts and carry weight away.

    Args:
        product: v -> A v, on vectors [P].
        start: v, [P]; its norm does not matter.
        steps: at most so many; fewer where the space ends before, so at most P.
        eps: precision of the product: a next vector shorter than that, relative to A, is noise.

    Returns:
        The Ritz values, their weights and vectors. NaN where the product is not finite.

    Raises:
        LsweepError: the basis, m·P numbers, is larger than the device's free memory.

    >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())
    >>> lanczos(lambda v: A @ v, torch.ones(3).double(), 9).values.round(9).tolist()
    [1.0, 2.0, 4.0]
    """
    steps = min(steps, start.numel())
    _require_room(steps, start)
    basis = start.new_empty(steps, start.numel())
    alphas: list[float] = []
    betas: list[float] = []
    q = start / start.norm()
    for j in range(steps):
        basis[j] = q
        w = product(q)
        alphas.append(float(w @ q))
        size = float(w.norm())
        done = basis[: j + 1]
        for _ in range(2):
            w = w - (done @ w) @ done
        beta = float(w.norm())
        if not beta > eps * max(size, *map(abs, alphas)) or j + 1 == steps:
            break
        betas.append(beta)
        q = w / beta
    m = len(alphas)
    if not np.isfinite(alphas).all():
        nothing = np.full(m, np.nan)
        return Ritz(nothing, nothing, np.full((m, m), np.nan), basis[:m])
    values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
    return Ritz(values, vectors[0] ** 2, vectors, basis[:m])


def _require_room(steps: int, start: Tensor) -> None:
    """Refuse what no smaller batch would make fit."""
    size, free = steps * start.numel() * start.element_size(), room(start.device)
    if size > free:
        raise LsweepError(
            f"{steps} steps of Lanczos over {start.numel()} weights need {size / 1e9:.3g} GB on "
            f"{start.device}, where {free / 1e9:.3g} are free: let fewer move, by parameters = "
            "[…] in [directions] (fewer samples do not help)"
        )
