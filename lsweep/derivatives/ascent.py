"""Worst-case sharpness: how far the loss can rise within a ball around the weights.

The ball is measured in units of the weights, per filter or per weight; its maximum is not known in
general, so what an ascent reaches is a lower bound of it, and is called by its number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsweep.derivatives import scientific
from lsweep.derivatives.curvature import random_vector
from lsweep.derivatives.objective import Objective
from lsweep.plans.pointwise import KESKAR_EPS, WORST_STEPS
from lsweep.problems.filters import filter_rows, scale_rows

Support = Callable[[Tensor], Tensor]
"""Of a convex ball: g -> the point d of it that maximises g·d."""


@dataclass(frozen=True)
class Rise:
    """How far the loss rose: after one step, and the most on the way of all steps."""

    first: float
    best: float


def filter_ball(objective: Objective, radius: float) -> Support:
    """Return the support of {d: ‖d_f‖ ≤ r‖w_f‖ for every filter f}: d_f = r‖w_f‖ g_f/‖g_f‖.

    Args:
        objective: its present weights are w.
        radius: r.

    >>> from torch import nn
    >>> from lsweep.problems.problem import Problem
    >>> net = nn.Linear(2, 1, bias=False)
    >>> net.weight.data = torch.tensor([[3.0, 4.0]])
    >>> data = (torch.ones(1, 2), torch.ones(1, 1))
    >>> problem = Problem(net, {"train": data}, loss=nn.MSELoss())
    >>> ball = filter_ball(Objective(problem, lambda: iter([data]), ["weight"]), 0.1)
    >>> ball(torch.tensor([0.0, 2.0]).double()).tolist()
    [0.0, 0.5]
    """
    lengths = _spread_norms(objective, objective.here)

    def support(g: Tensor) -> Tensor:
        norms = _spread_norms(objective, g)
        return torch.where(norms > 0, radius * lengths * g / norms, 0.0)

    return support


def adaptive_ball(objective: Objective, radius: float) -> Support:
    """Return the support of {d: |d_i| ≤ r|w_i| for every weight}: d = r|w| sign(g)."""
    reach = radius * objective.here.abs()
    return lambda g: reach * g.sign()


def _spread_norms(objective: Objective, vector: Tensor) -> Tensor:
    """Return at each weight the norm of its filter in ``vector``, [P]."""
    out = []
    for name, t in objective.split(vector).items():
        module = objective.owners[name]
        norms = filter_rows(t, module).norm(dim=1)
        out.append(scale_rows(torch.ones_like(t), norms, module))
    return objective.flat(out)


def ascend(
    objective: Objective,
    support: Support,
    steps: int = WORST_STEPS,
    *,
    seed: int = 0,
    replicate: int = 0,
) -> Rise:
    """Climb the loss within a ball, from its centre or, for a replicate > 0, from its edge.

    Each step goes towards the point of the ball where the tangent of the loss is highest, all the
    way at first: then it is the step of P. Foret et al., *Sharpness-Aware Minimization*, ICLR 2021,
    and never falls where the loss is convex. After a step that fell the climb goes on from the best
    point half as far (M. Frank and P. Wolfe 1956; the way between two points of a ball stays in
    it, so nothing has to be projected).

    Args:
        objective: the loss L; its present weights θ are the centre.
        support: the ball.
        steps: at most so many gradients.
        seed: of the random start.
        replicate: which start; 0 is the centre, unless its gradient is zero.

    Returns:
        L(θ+d) - L(θ) after the first step, and the largest at any point on the way, the centre
        included: a lower bound of the maximum over the ball, never below 0. NaN where nothing rose
        and some point had no loss or no gradient: what is higher may lie there.
    """
    here = objective.here
    start, gradient = objective.with_gradient()
    best, best_d = 0.0, torch.zeros_like(here)
    blind = not _is_known(start, gradient)
    if replicate or not bool(gradient.any()):
        best_d = support(random_vector(objective, seed, "ascent", replicate))
        value, gradient = objective.with_gradient(here + best_d)
        blind |= not _is_known(value, gradient)
        best = -math.inf if math.isnan(value) else value - start
    first, length = math.nan, 1.0
    for step in range(steps):
        d = torch.lerp(best_d, support(gradient), length)
        if step + 1 < steps:
            value, g = objective.with_gradient(here + d)
        else:
            value, g = objective.value(here + d), gradient
        blind |= not _is_known(value, g)
        rise = value - start
        first = rise if step == 0 else first
        if rise > best:
            best, best_d, gradient = rise, d, g
        else:
            length /= 2
    hidden = not math.isfinite(start) or (blind and best <= 0)
    return Rise(first, math.nan if hidden else max(best, 0.0))


def _is_known(value: float, gradient: Tensor) -> bool:
    return math.isfinite(value) and bool(torch.isfinite(gradient).all())


def keskar(
    objective: Objective, eps: float = KESKAR_EPS, *, seed: int = 0, replicate: int = 0
) -> float:
    """Return Keskar's sharpness 100 · (max L(θ+d) - L(θ)) / (1 + L(θ)) over |d_i| ≤ ε(|θ_i| + 1).

    N. S. Keskar et al., *On Large-Batch Training for Deep Learning*, ICLR 2017, with A = I and 10
    iterations of L-BFGS-B, as there. The 1 in the box makes it depend on the scale of the weights.

    Args:
        objective: the loss; its present weights are θ.
        eps: ε.
        seed: of the random start.
        replicate: which start within the box; 0 is θ itself.

    Returns:
        The largest rise that was evaluated, in per cent of 1 + L; NaN where L is not finite, or
        where nothing rose and some point had no loss.
    """
    here = objective.here
    reach = eps * (here.abs() + 1)
    start = objective.value()
    if not math.isfinite(start):
        return math.nan
    best, blind = start, False

    def fall(d: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, blind
        value, g = objective.with_gradient(here + torch.from_numpy(d.copy()).to(here))
        if math.isfinite(value):
            best = max(best, value)
        if not _is_known(value, g):
            blind = True
            return math.inf, np.zeros_like(d)
        return -value, -g.double().cpu().numpy()

    optimize = scientific.scipy("optimize")
    limit = reach.double().cpu().numpy()
    begin = np.zeros(objective.size)
    if replicate:
        noise = random_vector(objective, seed, "keskar", replicate)
        begin = limit * noise.clamp(-1, 1).double().cpu().numpy()
    optimize.minimize(
        fall,
        begin,
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(-limit, limit),
        options={"maxiter": 10, "maxfun": 60},
    )
    return math.nan if blind and best == start else 100 * (best - start) / (1 + start)
