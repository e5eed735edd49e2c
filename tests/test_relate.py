"""Relations: Kendall's τ against scipy and by hand, its null against exact ones and by coverage.

The granulated example is made so that overall τ is high while along one axis there is no relation.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lsweep.comparison.regularizer import respond, table
from lsweep.comparison.relate import (
    Permuted,
    axis_pairs,
    kendall,
    matched,
    partial,
    relate,
    relate_partially,
    strata_of,
)
from lsweep.errors import LsweepError


def numbers(seed: int, n: int, levels: int = 0) -> np.ndarray:
    """Return n numbers, with ties where they have so many levels."""
    random = np.random.default_rng(seed)
    return random.integers(levels, size=n).astype(float) if levels else random.normal(size=n)


@pytest.mark.parametrize("levels", [0, 3])
def test_tau_is_scipys(levels):
    for seed in range(20):
        a, b = numbers(seed, 12, levels), numbers(seed + 100, 12, levels)
        assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-14)
        relation = relate(a, Permuted.of(b, 100), {})
        assert relation.tau.value == pytest.approx(kendall(a, b), abs=1e-14)


def test_what_has_no_order_has_no_tau():
    same = np.ones(9)
    assert math.isnan(kendall(same, numbers(0, 9)))
    relation = relate(same, Permuted.of(numbers(0, 9), 100), {})
    assert relation.tau.text == "undefined" and math.isnan(relation.tau.p)


# -- granulated ------------------------------------------------------------------------------------

DEPTHS, DECAYS = (1, 2, 3, 4), (0.0, 0.1)
GRID = [{"depth": d, "wd": w} for d in DEPTHS for w in DECAYS]


def granulated_example() -> tuple[np.ndarray, np.ndarray]:
    """Depth orders both numbers; decay raises the gap always, the measure in half of the depths."""
    gap = np.array([10 * s["depth"] + 10 * s["wd"] for s in GRID])
    ups = {1: 1, 2: 1, 3: -1, 4: -1}
    measure = np.array([10 * s["depth"] + 10 * s["wd"] * ups[s["depth"]] for s in GRID])
    return measure, gap


def test_granulated_tau_by_hand():
    measure, gap = granulated_example()
    found = relate(measure, Permuted.of(gap, 500), axis_pairs(GRID, ["depth", "wd"]))
    # 28 pairs: 24 between depths agree, of 4 within a depth 2 agree and 2 do not.
    assert found.tau.value == pytest.approx((26 - 2) / 28)
    assert found.axes["depth"].value == pytest.approx(1.0)
    assert found.axes["wd"].value == pytest.approx(0.0)
    assert found.psi is not None and found.psi.value == pytest.approx(0.5)
    assert found.worst == "wd"
    assert (found.axes["depth"].pairs, found.axes["wd"].pairs) == (12, 4)
    assert found.tau.p < 0.01 and found.axes["wd"].p == 1.0
    # With half of the networks in reverse, the least agreement is with Ψ's own sign.
    opposite = relate(-measure, Permuted.of(gap, 500), axis_pairs(GRID, ["depth", "wd"]))
    assert opposite.psi is not None and opposite.psi.value == pytest.approx(-0.5)
    assert opposite.worst == "wd"


def by_loops(settings, axes, held, a, b) -> dict[str, float]:
    """Jiang's ψ as the definition says it: a mean over groups of a mean over pairs."""
    out = {}
    for axis in axes:
        others = [k for k in (*axes, *held) if k != axis]
        groups: dict[tuple, list[int]] = {}
        for i, s in enumerate(settings):
            groups.setdefault(tuple(s[k] for k in others), []).append(i)
        taus = []
        for group in groups.values():
            pairs = [(i, j) for i, j in itertools.combinations(group, 2)
                     if settings[i][axis] != settings[j][axis]]  # fmt: skip
            if pairs:
                signs = [np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs]
                taus.append(np.mean(signs))
        if taus:
            out[axis] = float(np.mean(taus))
    return out


def test_granulated_tau_is_jiangs_definition_also_with_gaps_in_the_design():
    full = [{"depth": d, "width": w, "skip": s, "seed": k}
            for d in (1, 2, 3) for w in (8, 16) for s in (True, False) for k in (0, 1)]  # fmt: skip
    for seed in range(10):
        random = np.random.default_rng(seed)
        kept = [full[i] for i in sorted(random.choice(len(full), 17, replace=False))]
        a, b = numbers(seed, 17, 5), numbers(seed + 50, 17)
        axes, held = ["depth", "width", "skip"], ["seed"]
        found = relate(a, Permuted.of(b, 100), axis_pairs(kept, axes, held))
        wanted = by_loops(kept, axes, held, a, b)
        assert found.axes.keys() == wanted.keys()
        for axis, value in wanted.items():
            assert found.axes[axis].value == pytest.approx(value, abs=1e-12)
        assert found.psi is not None
        assert found.psi.value == pytest.approx(np.mean(list(wanted.values())), abs=1e-12)


# -- chance ----------------------------------------------------------------------------------------


def test_p_is_that_of_the_exact_distribution():
    many = 4000
    for seed in range(6):
        a, b = numbers(seed, 8), numbers(seed + 30, 8)
        p = relate(a, Permuted.of(b, many), {}).tau.p
        exact = stats.kendalltau(a, b, method="exact").pvalue
        assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / many) + 1 / many)


def test_the_null_interval_covers_independent_numbers():
    axes = axis_pairs(GRID, ["depth", "wd"])
    inside = {"tau": 0, "psi": 0}
    trials = 200
    for seed in range(trials):
        a, b = numbers(2 * seed, 8), numbers(2 * seed + 1, 8)
        found = relate(a, Permuted.of(b, 150, seed), axes)
        for name, tau in (("tau", found.tau), ("psi", found.psi)):
            assert tau is not None
            inside[name] += tau.low <= tau.value <= tau.high
    # 95 % and, for the statistic is discrete, what lies on the ends: some of the ends.
    assert 0.92 <= inside["tau"] / trials <= 0.99
    assert 0.92 <= inside["psi"] / trials <= 0.99


def test_permutations_are_those_of_their_seed():
    b = numbers(0, 9)
    first, again, other = (Permuted.of(b, 50, s).shuffled for s in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_more_signs_than_memory_is_one_line():
    with pytest.raises(LsweepError, match=r"^1000000 permutations of 99 .*permutations 442688$"):
        Permuted.of(numbers(0, 99), 10**6)


# -- partial ---------------------------------------------------------------------------------------


def test_partial_tau_is_the_correlation_of_agreements_with_what_is_held():
    # Kendall (1942): of all pairs, whether x and whether y agree with z, as a 2 x 2 table.
    for seed in range(10):
        x, y, z = (numbers(seed + k, 9) for k in (0, 20, 40))
        i, j = np.triu_indices(9, 1)
        with_z = [(np.sign(v[i] - v[j]) == np.sign(z[i] - z[j])).astype(float) for v in (x, y)]
        wanted = np.corrcoef(with_z)[0, 1]
        xy, xz, yz = (stats.kendalltau(p, q).statistic for p, q in ((x, y), (x, z), (y, z)))
        assert partial(xy, xz, yz) == pytest.approx(wanted, abs=1e-12)
        found = relate_partially(x, z, Permuted.of(y, 100, strata=strata_of(z)))
        assert found.value == pytest.approx(wanted, abs=1e-12)


def test_a_partial_tau_of_numbers_that_follow_the_held_one_alone_lies_in_its_null():
    # It is not 0 there: with τ_xz = τ_yz = .7 it is about .2. The null knows, and p is uniform.
    trials, inside, values = 60, {"repeated": 0, "all different": 0}, []
    random = np.random.default_rng(0)
    for seed in range(trials):
        for kind in inside:
            z = np.repeat(np.arange(4.0), 6) if kind == "repeated" else 1.1 * random.normal(size=24)
            x, y = (z + 0.5 * random.normal(size=24) for _ in range(2))
            found = relate_partially(x, z, Permuted.of(y, 100, seed, strata_of(z)))
            inside[kind] += found.low <= found.value <= found.high
            values.append(found.value)
    assert np.mean(values) > 0.1
    assert 0.85 <= inside["repeated"] / trials < 1
    assert 0.80 <= inside["all different"] / trials < 1  # neighbours are not quite equal


def test_what_orders_the_networks_as_the_held_number_does_keeps_nothing():
    z = np.arange(12.0)
    assert math.isnan(relate_partially(z**3, z, Permuted.of(numbers(0, 12), 100)).value)


# -- matched losses --------------------------------------------------------------------------------


def test_the_largest_subset_of_about_equal_loss():
    losses = np.array([0.50, 0.10, 0.105, 0.109, 0.52, 0.54, 0.545, np.nan, 0.0])
    assert matched(losses, 0.1).tolist() == [0, 4, 5, 6]
    assert matched(losses, 0.0).size == 1
    assert matched(np.array([np.nan]), 0.1).size == 0
    assert matched(np.array([0.0, 0.0, 1.0]), 0.5).tolist() == [0, 1]


# -- the regulariser -------------------------------------------------------------------------------


def decayed() -> tuple[list[dict], dict[str, np.ndarray]]:
    """Weights shrink with decay; raw curvature is shape / ‖w‖², as in a network that is invariant.

    Between none and the strongest decay the raw number grows 81-fold, the shape 1.5-fold.
    """
    settings = [{"wd": w, "batch": b} for b in (32, 1024) for w in (0.0, 1e-4, 1e-3, 1e-2)]
    strength = {0.0: 0.0, 1e-4: 1.0, 1e-3: 2.0, 1e-2: 3.0}
    step = np.array([strength[s["wd"]] / 3 for s in settings])
    size = np.array([1.0 if s["batch"] == 32 else 40.0 for s in settings])
    norm = 40.0 * 54.0 ** (-step / 2)
    shape = 0.04 * size * 1.5**step
    return settings, {"weight_norm": norm, "hessian_max": shape / norm**2,
                      "filter_hessian_max": shape}  # fmt: skip


def test_a_raw_curvature_splits_in_scale_and_shape():
    settings, measures = decayed()
    rows = {r.name: r for r in table(measures, settings, "wd", ["batch"])}
    raw, scale = rows["hessian_max"], rows["hessian_max / filter_hessian_max"]
    shape, norm = rows["filter_hessian_max"], rows["weight_norm"]
    assert raw.ratio == pytest.approx(81.0) and shape.ratio == pytest.approx(1.5)
    assert raw.slope == pytest.approx(scale.slope + shape.slope, abs=1e-12)
    assert scale.slope == pytest.approx(-2 * norm.slope, abs=1e-12)
    assert (scale.channel, shape.channel, norm.channel) == ("scale", "shape", "scale")
    assert raw.networks == 6 and raw.groups == 2 and raw.left_out == 0  # 0 has no logarithm
    # Both batch sizes differ 40-fold, which the groups take out.
    assert raw.low == pytest.approx(raw.high)


def test_the_slope_is_least_squares_with_an_intercept_a_group():
    settings, measures = decayed()
    noisy = measures["hessian_max"] * np.exp(0.1 * numbers(0, 8))
    noisy[3] = -1.0  # has no logarithm
    found = respond("m", "", noisy, settings, "wd", ["batch"])
    rows = [i for i, s in enumerate(settings) if s["wd"] > 0 and noisy[i] > 0]
    design = np.array([[np.log(settings[i]["wd"]), settings[i]["batch"] == 32,
                        settings[i]["batch"] == 1024] for i in rows], dtype=float)  # fmt: skip
    y = np.log(noisy[rows])
    beta, rss, *_ = np.linalg.lstsq(design, y, rcond=None)
    se = math.sqrt(rss[0] / (len(rows) - 3) * np.linalg.inv(design.T @ design)[0, 0])
    assert found.slope == pytest.approx(beta[0]) and found.slope_se == pytest.approx(se)
    assert (found.networks, found.left_out, found.groups) == (5, 1, 1)


def test_one_value_of_the_regulariser_gives_no_slope():
    settings = [{"wd": w} for w in (0.0, 0.1)]
    found = respond("m", "", np.array([2.0, 6.0]), settings, "wd", [])
    assert math.isnan(found.slope) and found.slope_se is None
    assert found.ratio == pytest.approx(3.0)
