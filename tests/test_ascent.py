"""Worst-case sharpness is a lower bound of a maximum, and reaches it where the maximum is known.

Linear losses: one step is exact. Convex quadratics in a box: the maximum lies at a corner, and all
corners can be tried. Balls of filters: a bound from the largest eigenvalue, and a closed form.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from exact import squared_error
from problems import numbers
from torch import Tensor, nn

import lsweep
from lsweep.derivatives.ascent import adaptive_ball, ascend, filter_ball, keskar
from lsweep.derivatives.computing import compute
from lsweep.derivatives.objective import Objective


def of_weights(weight: Tensor, loss: object) -> Objective:
    """A loss that is a function of one matrix, each row of which is a filter."""
    model = nn.Linear(weight.shape[1], len(weight), bias=False).double()
    model.weight.data = weight.clone()

    def forward(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": loss(net.weight)}

    data = torch.zeros(1, 1)
    problem = lsweep.Problem(model, {"train": data}, forward=forward)
    return Objective(problem, lambda: iter([data]), ["weight"])


W = torch.tensor([[3.0, 4.0], [0.0, -1.0], [0.5, 0.0]]).double()


def test_a_linear_loss_is_at_its_maximum_after_one_step():
    slope = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]).double()
    objective, r = of_weights(W, lambda w: (slope * w).sum() + 7), 0.3
    per_filter = r * (5 * math.sqrt(5) + 1 * 3)  # a filter without slope stays where it is
    found = compute("worst_case", objective, torch.ones(6).double(), radius=r)
    assert found["worst_filter_1"] == pytest.approx(per_filter)
    assert found["worst_filter_20"] == pytest.approx(per_filter)
    per_weight = r * (3 * 1 + 4 * 2 + 0 * 3)
    assert found["worst_adaptive_1"] == pytest.approx(per_weight)
    assert found["worst_adaptive_20"] == pytest.approx(per_weight)
    start = float((slope * W).sum()) + 7
    box = 1e-3 * float((slope.abs() * (W.abs() + 1)).sum())
    assert keskar(objective) == pytest.approx(100 * box / (1 + start))


@pytest.mark.parametrize("seed", range(4))
def test_a_convex_quadratic_in_a_box_is_largest_at_a_corner(seed):
    root = numbers(6, 6, seed=seed)
    matrix = root @ root.T
    weight = numbers(3, 2, seed=seed + 10)
    objective = of_weights(weight, lambda w: 0.5 * w.flatten() @ matrix @ w.flatten())
    r, flat = 0.5, weight.flatten()
    reach = r * flat.abs()

    def loss(w: Tensor) -> float:
        return float(0.5 * w @ matrix @ w)

    corners = (torch.tensor(c).double() for c in itertools.product((-1, 1), repeat=6))
    exact = max(loss(flat + c * reach) for c in corners) - loss(flat)
    rise = ascend(objective, adaptive_ball(objective, r))
    assert 0 < rise.first <= rise.best <= exact + 1e-12
    tried = [ascend(objective, adaptive_ball(objective, r), replicate=k).best for k in range(6)]
    assert max(tried) == pytest.approx(exact)  # some start of a few finds it
    box = 1e-3 * (flat.abs() + 1)
    corners = (torch.tensor(c).double() for c in itertools.product((-1, 1), repeat=6))
    largest = max(loss(flat + c * box) for c in corners)
    most = 100 * (largest - loss(flat)) / (1 + loss(flat))
    assert 0.9 * most < keskar(objective) <= most * (1 + 1e-12)


def test_each_filter_goes_to_the_edge_of_its_own_ball():
    """½ Σ_f c_f ‖w_f‖² is largest at (1 + r) w, where it is (1 + r)² as large."""
    c = torch.tensor([[1.0], [2.0], [5.0]]).double()
    objective, r = of_weights(W, lambda w: 0.5 * (c * w**2).sum()), 0.25
    start = float(0.5 * (c * W**2).sum())
    rise = ascend(objective, filter_ball(objective, r))
    assert rise.first == rise.best == pytest.approx(((1 + r) ** 2 - 1) * start)


def test_more_steps_find_more_where_the_gradient_turns():
    matrix = torch.diag(torch.tensor([1.0, 10.0]).double())
    weight = torch.tensor([[1.0, 0.05]]).double()
    objective = of_weights(weight, lambda w: 0.5 * w[0] @ matrix @ w[0])
    r = 1.0
    angles = torch.linspace(0, 2 * math.pi, 100001).double()
    points = weight[0] + r * weight.norm() * torch.stack([angles.cos(), angles.sin()], dim=1)
    exact = float((0.5 * (points**2) @ matrix.diag()).max()) - objective.value()
    rise = ascend(objective, filter_ball(objective, r))
    assert rise.first < 0.6 * exact
    assert rise.best == pytest.approx(exact, rel=1e-4) and rise.best <= exact * (1 + 1e-8)


def test_where_the_loss_only_falls_the_worst_case_is_to_stay():
    objective = of_weights(W, lambda w: -((w - W) ** 2).sum())
    rise = ascend(objective, filter_ball(objective, 0.1))
    assert rise.first < 0 and rise.best == 0
    assert keskar(objective) == 0


def test_where_no_loss_on_the_way_is_a_number_there_is_no_worst_case():
    """Not 0, which would say that the loss cannot rise."""
    objective = of_weights(W, lambda w: w.sum() + (1e-30 - ((w - W) ** 2).sum()).log())
    assert math.isfinite(objective.value())
    rise = ascend(objective, filter_ball(objective, 0.1))
    assert math.isnan(rise.first) and math.isnan(rise.best)
    assert math.isnan(keskar(objective))


def test_at_a_minimum_the_climb_begins_at_the_edge():
    objective = of_weights(W, lambda w: ((w - W) ** 2).sum())
    rise = ascend(objective, filter_ball(objective, 0.1))
    assert rise.best == pytest.approx(float(0.01 * (W**2).sum()))


def test_replicates_are_starts_and_the_network_stays():
    case = squared_error()
    objective, here = case.objective(), case.here
    found = [
        compute("worst_case", objective, case.scales(), radius=0.3, replicate=k) for k in (0, 1, 1)
    ]
    assert found[0] != found[1] == found[2]
    for numbers_ in found:
        for ball in ("filter", "adaptive"):
            assert numbers_[f"worst_{ball}_1"] <= numbers_[f"worst_{ball}_20"]
    # Nowhere in the ball is it higher; random points of its edge are far lower.
    assert torch.equal(objective.here, here)
    support = filter_ball(objective, 0.3)
    random = [
        objective.value(here + support(numbers(len(here), seed=s))) - objective.value()
        for s in range(20)
    ]
    assert max(random) < found[0]["worst_filter_20"]


def test_where_no_step_has_a_loss_the_worst_case_is_not_known():
    slope = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]).double()

    def fenced(width: float) -> Objective:
        """Linear up to so far from the weights, and without a value beyond."""
        return of_weights(
            W, lambda w: (slope * w).sum() + 0 * (width**2 - ((w - W) ** 2).sum()).sqrt()
        )

    objective = fenced(1e-9)
    rise = ascend(objective, filter_ball(objective, 0.1))
    assert math.isnan(rise.first) and math.isnan(rise.best) and math.isnan(keskar(objective))
    objective = fenced(0.3)
    rise = ascend(objective, filter_ball(objective, 0.1))  # towards a point √0.26 away
    assert math.isnan(rise.first)
    assert rise.best == pytest.approx(0.1 * (5 * 5**0.5 + 3) * 0.3 / 0.26**0.5, rel=1e-3)
    blunt = of_weights(W, lambda w: (w - W).abs().sum().sqrt())  # of no slope at the centre
    assert math.isnan(ascend(blunt, filter_ball(blunt, 0.1)).best)
    assert ascend(blunt, filter_ball(blunt, 0.1), replicate=1).best > 0


def test_a_loss_that_overflows_is_not_hidden():
    objective = of_weights(W, lambda w: torch.exp(200 * ((w * W).sum() - 26.25)))
    rise = ascend(objective, filter_ball(objective, 1.0))
    assert rise.best == math.inf
