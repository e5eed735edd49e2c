"""Refinement against dense truth: as few points as promised, and an error that is what it says.

Truth is the whole grid, of closed forms and of trained networks; the sweep loop is played here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import lsweep
from lsweep.digits import digits
from lsweep.plans.points import Lattice
from lsweep.refinement.refine import Decision, Evaluated, Filled, decide, fill, first_points
from lsweep.surfaces.scales import log_scale

TOLERANCE = 0.01


@dataclasses.dataclass
class Refined:
    """What a refinement of a known surface came to."""

    last: Decision
    filled: Filled
    evaluations: int
    rounds: int
    true: np.ndarray
    stated: np.ndarray

    @property
    def covered(self) -> float:
        return float(np.mean(self.true <= self.stated))

    @property
    def width(self) -> float:
        return float(np.median(self.stated / self.true))


def lattice_of(shape: tuple[int, ...]) -> Lattice:
    return Lattice({k: np.linspace(-1, 1, n) for k, n in zip("xyz", shape[::-1], strict=False)})


def refined(truth: np.ndarray, seed: str = "0") -> Refined:
    """Refine a surface whose every value is known; errors are those of points never evaluated."""
    lattice, values = lattice_of(truth.shape), truth.ravel()
    first = first_points(lattice, seed)
    index = np.concatenate([first.asked, first.held_out])
    held_out = np.isin(index, first.held_out)
    rounds = 0
    while True:
        rounds += 1
        known = Evaluated(index, values[index], held_out)
        last = decide(lattice, TOLERANCE, known)
        if last.state == "done":
            break
        assert not np.isin(last.ask, index).any() and len(np.unique(last.ask)) == len(last.ask)
        assert not np.isin(last.likely, np.concatenate([index, last.ask])).any()
        index = np.concatenate([index, last.ask])
        held_out = np.isin(index, first.held_out)
        if last.state == "dense":
            assert len(index) == len(lattice)
            break
    filled = fill(lattice, Evaluated(index, values[index], held_out))
    assert np.array_equal(filled.values[index], values[index], equal_nan=True)
    unseen = np.isfinite(values)
    unseen[index] = False
    scale = log_scale(values[np.isfinite(values)]).forward
    true = np.abs(scale(filled.values[unseen]) - scale(values[unseen])) / filled.spread
    evaluations = len(index) - len(first.held_out)
    return Refined(last, filled, evaluations, rounds, true, filled.error[unseen])


def plane(count: int = 51, rows: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return rotated coordinates of a plane, so that nothing is aligned with the grid."""
    x, y = np.meshgrid(np.linspace(-1, 1, count), np.linspace(-1, 1, rows or count))
    return 0.8 * x + 0.6 * y, 0.8 * y - 0.6 * x


def smooth(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.asarray(0.05 + u**2 + 3 * v**2 + u * v**2 + 0.3 * np.sin(3 * u + v) ** 2)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Layers of 64 are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(sizes: list[int], epochs: int) -> np.ndarray:
    """Return the dense 51 x 51 surface of a network trained on 300 digits."""
    images, labels = (t[:300] for t in digits()["train"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        net = nn.Sequential(*layers[:-1])
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(epochs):
            for batch in torch.arange(300).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
                optimizer.step()
    net.eval()
    problem = lsweep.Problem(net, {"train": (images, labels)}, loss=nn.CrossEntropyLoss())
    surface = lsweep.sweep(problem, x=(-1, 1, 51), y=(-1, 1, 51), progress=False)
    return np.asarray(surface["train_loss"])


def test_trained_networks_cost_few_evaluations_and_the_error_is_honest(one_thread: None) -> None:
    """The digits MLP, which is smooth, and one of twelve layers, which is not."""
    runs = []
    for sizes, epochs, most in (([64, 64, 64, 10], 30, 120), ([64] * 12 + [10], 60, 250)):
        truth = network(sizes, epochs)
        found = [refined(truth, seed) for seed in "012"]
        for r in found:
            assert r.last.state == "done"
            assert r.evaluations <= most
            assert r.true.max() <= 1.1 * TOLERANCE  # one refinement in twenty misses by a little
            assert r.stated.max() <= TOLERANCE
        assert np.median([r.true.max() for r in found]) <= TOLERANCE
        assert np.mean([r.covered for r in found]) >= 0.95
        runs += found
    assert np.median([r.width for r in runs]) <= 5


def test_a_picture_a_thousand_wide_costs_what_a_coarse_one_costs() -> None:
    small, large = (refined(smooth(*plane(n))) for n in (51, 401))
    for r in (small, large):
        assert r.last.state == "done" and r.true.max() <= TOLERANCE and r.covered >= 0.94
    assert large.evaluations <= 1.2 * small.evaluations <= 144


U, V = plane()
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "truth",
    [np.exp(RANDOM.standard_normal((51, 51))), 2 + np.sin(40 * U) * np.cos(37 * V),
     np.exp(RANDOM.standard_normal(301))],
    ids=["noise", "waves of four steps", "noise on a line"],
)  # fmt: skip
def test_chaotic_surfaces_go_to_the_dense_grid_before_a_tenth_is_evaluated(
    truth: np.ndarray,
) -> None:
    r = refined(truth)
    assert r.last.state == "dense" and len(r.last.ask) > 0.8 * truth.size
    assert np.array_equal(r.filled.values, truth.ravel()) and not r.filled.error.any()


@pytest.mark.parametrize(
    ("truth", "most"),
    [
        (1e-9 + U**2 + 2 * V**2, 260),
        (0.01 + U**2 + 100 * V**2, 600),
        (U**2 - V**2, 200),
        (smooth(*plane(38, 24)), 120),
        (smooth(*plane(51, 3)), 60),
        (1e-3 + np.linspace(-1, 1, 1001) ** 2, 60),
        (np.add.outer(np.linspace(-1, 1, 15) ** 2, smooth(*plane(15))), 600),
    ],
    ids=["near zero", "ravine", "saddle", "even counts", "three rows", "line", "volume"],
)  # fmt: skip
def test_any_shape_is_met_within_the_tolerance(truth: np.ndarray, most: int) -> None:
    r = refined(truth)
    assert r.last.state == "done" and r.evaluations <= most
    assert r.true.max() <= TOLERANCE and r.stated.max() <= TOLERANCE and r.covered >= 0.93


def test_what_has_no_relief_is_done_at_once() -> None:
    for truth in (np.full((51, 51), 3.0), np.exp(U - V)):
        r = refined(truth)
        assert r.rounds == 1 and r.evaluations == 25
        np.testing.assert_allclose(r.filled.values, truth.ravel(), rtol=1e-9)


def test_grids_too_small_to_refine_are_asked_whole() -> None:
    for shape in ((7, 7), (4,), (5, 5, 5)):
        first = first_points(lattice_of(shape), "0")
        assert np.array_equal(first.asked, np.arange(np.prod(shape))) and not len(first.held_out)


def test_the_border_of_a_diverging_region_is_evaluated_exactly() -> None:
    truth = np.where(U > 0.3, np.nan, 1 + U**2 + V**2)
    r = refined(truth)
    assert r.last.state == "done" and r.evaluations < 0.2 * truth.size
    assert np.array_equal(np.isnan(r.filled.values), np.isnan(truth.ravel()))
    assert np.array_equal(np.isnan(r.filled.error), np.isnan(truth.ravel()))
    assert r.true.max() <= TOLERANCE
    whole = refined(np.full((51, 51), np.inf))
    assert whole.last.state == "done" and np.isnan(whole.filled.error).all()


def test_the_order_in_which_points_come_in_changes_nothing() -> None:
    truth, lattice = smooth(U, V).ravel(), lattice_of((51, 51))
    first = first_points(lattice, "plan")
    index = np.concatenate([first.asked, first.held_out])
    assert np.array_equal(first.held_out, first_points(lattice, "plan").held_out)
    assert not np.array_equal(first.held_out, first_points(lattice, "another").held_out)
    assert not np.isin(first.held_out, first.asked).any()
    decisions, fills = [], []
    for order in (np.arange(len(index)), RANDOM.permutation(len(index))):
        i = index[order]
        known = Evaluated(i, truth[i], np.isin(i, first.held_out))
        decisions.append(decide(lattice, TOLERANCE, known))
        fills.append(fill(lattice, known))
    assert decisions[0].state == "open"
    assert np.array_equal(decisions[0].ask, decisions[1].ask)
    assert np.array_equal(decisions[0].likely, decisions[1].likely)
    assert np.array_equal(fills[0].values, fills[1].values)
    assert np.array_equal(fills[0].error, fills[1].error)


def test_what_another_grid_left_neither_counts_nor_makes_the_rest_dense() -> None:
    """The middle was evaluated whole, more points than one system holds."""
    u, v = plane(129)
    truth, lattice = smooth(2 * u, 2 * v).ravel(), lattice_of((129, 129))
    first = first_points(lattice, "0")
    middle = np.abs(lattice.offsets(np.arange(len(lattice)))).max(axis=1) <= 0.5
    there = np.flatnonzero(middle)
    assert len(there) > 4000
    index = np.union1d(there, np.concatenate([first.asked, first.held_out]))
    asked = 0
    while True:
        held_out = np.isin(index, np.setdiff1d(first.held_out, there))
        known = Evaluated(index, truth[index], held_out, middle[index])
        last = decide(lattice, TOLERANCE, known)
        if last.state != "open":
            break
        asked += len(last.ask)
        index = np.union1d(index, last.ask)
    assert last.state == "done" and asked < 500
    filled = fill(lattice, known)
    true = np.abs(np.log(filled.values) - np.log(truth)) / filled.spread
    assert true.max() <= TOLERANCE and np.array_equal(filled.values[there], truth[there])


def test_the_margin_is_the_error_in_the_units_of_the_loss() -> None:
    lattice, truth = lattice_of((51, 51)), smooth(U, V).ravel()
    first = first_points(lattice, "0")
    index = np.concatenate([first.asked, first.held_out])
    known = Evaluated(index, truth[index], np.isin(index, first.held_out))
    on_log, linear = fill(lattice, known), fill(lattice, known, log=False)
    expected = on_log.values * np.expm1(on_log.error * on_log.spread)
    np.testing.assert_allclose(on_log.margin, expected, rtol=1e-9)
    np.testing.assert_allclose(linear.margin, linear.error * linear.spread, atol=1e-12)
    assert np.mean(np.abs(linear.values - truth) <= linear.margin) >= 0.9
