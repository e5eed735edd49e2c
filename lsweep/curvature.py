"""Curvature: eigenvalues and traces of the Hessian, raw and in the filter metric.

The filter metric measures each filter in units of its own weights: M = D H D with
D = diag(‖w_f‖/√n_f). Its trace is exactly E[dᵀHd] of a random filter-normalised direction d.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsweep.filters import filter_rows
from lsweep.noise import random_signs, random_tensor
from lsweep.objective import Objective

Product = Callable[[Tensor], Tensor]


def keyed(purpose: str, replicate: int) -> str:
    """Return the key of a random vector: as the axes of a sweep have it, ``x``, ``x.1``, ….

    >>> keyed("probe", 0), keyed("probe", 2)
    ('probe', 'probe.2')
    """
    return f"{purpose}.{replicate}" if replicate else purpose


def random_vector(objective: Objective, seed: int, purpose: str, replicate: int) -> Tensor:
    """Return N(0,1) noise, [P], tensor by tensor from Philox."""
    return _drawn(objective, random_tensor, seed, keyed(purpose, replicate))


def random_probe(objective: Objective, seed: int, replicate: int) -> Tensor:
    """Return a Rademacher probe, ±1, [P], tensor by tensor from Philox."""
    return _drawn(objective, random_signs, seed, keyed("probe", replicate))


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
    v = random_probe(objective, seed, replicate)
    return float(v @ metric_product(objective, scales)(v))


def relative_flatness(objective: Objective, *, seed: int = 0, replicate: int = 0) -> float:
    """Return one probe of the relative flatness Σ_{s,s'} ⟨w_s, w_s'⟩ tr H_{s,s'} of the last layer.

    H. Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021; w_s are the rows of the
    layer's weights W and H_{s,s'} the block of the Hessian between two rows. With G of random signs
    and v = vec(W G), E[vᵀHv] is that sum, as E[G_ij G_i'j'] = δ_ii' δ_jj'.

    Args:
        objective: the loss; its last tensor of two or more dimensions is the layer.
        seed: of the probe.
        replicate: which probe.

    Returns:
        An unbiased estimate, in units of the loss; NaN where no tensor has two dimensions.
    """
    layers = [n for n, s in zip(objective.names, objective.shapes, strict=True) if len(s) > 1]
    if not layers:
        return math.nan
    probe = torch.zeros(objective.size, dtype=objective.dtype, device=objective.device)
    layer, module = layers[-1], objective.owners[layers[-1]]
    rows = filter_rows(objective.split(objective.here)[layer], module)
    n = rows.shape[1]
    signs = random_signs(seed, keyed("probe", replicate), layer, torch.empty(n, n)).to(rows)
    part = objective.split(probe)[layer]
    # Where each number of a filter lies in the tensor: not all tensors have their filters in rows.
    places = filter_rows(torch.arange(part.numel()).view(part.shape), module)
    part.view(-1)[places.to(part.device)] = rows @ signs
    return float(probe @ objective.hessian_product(probe))
