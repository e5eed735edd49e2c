"""An audit of interpolated points by a few samples: unbiased, with the error that it states."""

from __future__ import annotations

import numpy as np
import pytest

from lsweep.problems.subsets import draw
from lsweep.refinement.residuals import residuals

SAMPLES = 2000


@pytest.fixture(scope="module")
def line():
    """Per-sample losses a·(x - b)² on 9 nodes and, between them, at 6 points; and the c_k."""
    rng = np.random.default_rng(4)
    a, b = rng.exponential(1.0, SAMPLES), rng.normal(0, 0.3, SAMPLES)
    x = np.linspace(-1, 1, 9)
    at = np.array([-0.9, -0.6, -0.1, 0.2, 0.55, 0.875])
    c = np.array([np.interp(at, x, row) for row in np.eye(9)]).T
    return a * (at[:, None] - b) ** 2, a * (x[:, None] - b) ** 2, c, a


def test_over_all_samples_it_is_the_interpolation_error(line):
    points, nodes, c, a = line
    at, gap = np.array([-0.9, -0.6, -0.1, 0.2, 0.55, 0.875]), 0.25
    low = np.floor((at + 1) / gap) * gap - 1
    closed = -a.mean() * (at - low) * (low + gap - at)  # of a parabola between its neighbours
    found = residuals(points, nodes, c, of=SAMPLES)
    np.testing.assert_allclose(found.mean, closed, rtol=1e-10)
    np.testing.assert_allclose(found.mean, points.mean(1) - c @ nodes.mean(1), rtol=1e-9)
    assert (found.se == 0).all() and found.typical == pytest.approx(np.sqrt(np.mean(closed**2)))


@pytest.mark.parametrize("m", [64, 128, 1000])
def test_on_a_few_samples_it_is_unbiased_and_its_error_is_true(line, m):
    points, nodes, c, _ = line
    truth = points.mean(1) - c @ nodes.mean(1)
    plain = points.std(1) / np.sqrt(m)
    means, ses, squares, hits = [], [], [], []
    for seed in range(400):
        i = draw(np.zeros(SAMPLES, dtype=int), m, f"audit {seed}")
        r = residuals(points[:, i], nodes[:, i], c, of=SAMPLES)
        means.append(r.mean), ses.append(r.se), squares.append(r.square)
        hits.append(r.within(np.abs(truth)))
    spread = np.std(means, axis=0)
    assert (np.abs(np.mean(means, axis=0) - truth) < 4.5 * spread / 20).all()
    np.testing.assert_allclose(np.mean(ses, axis=0), spread, rtol=0.15)
    error = np.std(squares) / 20
    assert abs(np.mean(squares) - np.mean(truth**2)) < 4.5 * error
    assert np.mean(hits) > 0.95  # what states the true error is borne out
    assert (spread < plain / 3).all()  # and that by far fewer samples than the loss itself needs


def test_an_interpolant_of_the_logarithm_is_audited_by_the_linear_one(line):
    points, nodes, c, _ = line
    linear, other = c @ nodes.mean(1), np.exp(c @ np.log(nodes.mean(1)))
    truth, found = points.mean(1) - other, []
    for seed in range(200):
        i = draw(np.zeros(SAMPLES, dtype=int), 100, f"audit {seed}")
        r = residuals(points[:, i], nodes[:, i], c, of=SAMPLES).of_another(other, linear)
        found.append((r.mean - truth, r.se))
        same = r.of_another(linear, other)  # and back again
        plain = residuals(points[:, i], nodes[:, i], c, of=SAMPLES)
        assert same.square == pytest.approx(plain.square, rel=1e-6)
    off, se = np.array(found).transpose(1, 2, 0)
    assert (np.abs(off.mean(1)) < 4.5 * off.std(1) / np.sqrt(200)).all()
    np.testing.assert_allclose(off.std(1), se.mean(1), rtol=0.2)
    assert np.abs(truth - (points.mean(1) - linear)).max() > 10 * se.mean()  # another, indeed


def test_an_error_that_is_stated_too_small_is_found_out(line):
    points, nodes, c, _ = line
    truth = points.mean(1) - c @ nodes.mean(1)
    i = draw(np.zeros(SAMPLES, dtype=int), 128, "one audit")
    r = residuals(points[:, i], nodes[:, i], c, of=SAMPLES)
    assert not r.within(np.abs(truth) / 5).any() and r.within(np.abs(truth) * 1.2).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="1 samples have no standard error"):
        residuals(np.zeros((1, 1)), np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"points \(1, 3\), nodes \(2, 4\)"):
        residuals(np.zeros((1, 3)), np.zeros((2, 4)), np.zeros((1, 2)))
