"""Numbers from a surface alone: closed forms, an independent library, and what noise may fake.

Promises: basins, widths, roughness and curvatures are those of closed forms; basins are the pairs
of gudhi; a noisy convex bowl is not convex without the guard and convex with it; points without a
value are left out and counted; what was interpolated is said.
"""

from __future__ import annotations

import math
from dataclasses import replace

import gudhi
import numpy as np
import pytest

from lsweep.errors import LsweepError
from lsweep.measures.basins import basin
from lsweep.measures.central import central
from lsweep.measures.convexity import nonconvex_fraction, nonconvexity
from lsweep.measures.from_surface import rows_of_plane
from lsweep.measures.persistence import persistence
from lsweep.measures.roughness import roughness
from lsweep.surfaces.surface import Status, Surface

NUMBERS = {
    "basin": basin,
    "central": central,
    "nonconvexity": nonconvexity,
    "persistence": persistence,
    "roughness": roughness,
}


def plane(f, nx=41, ny=41, span=1.0, **more):
    x, y = np.linspace(-span, span, nx), np.linspace(-span, span, ny)
    z = np.asarray(f(*np.meshgrid(x, y)), np.float64)
    return Surface(
        {"x": x, "y": y}, {"train_loss": z, **{f"train_loss_{k}": v for k, v in more.items()}}
    )


def line(f, n=41, span=1.0):
    x = np.linspace(-span, span, n)
    return Surface({"x": x}, {"train_loss": np.asarray(f(x), np.float64)})


def holed(surface, *where):
    """Return the surface with values that are missing, one of each kind in turn."""
    value, status = surface["train_loss"].copy(), surface.status.copy()
    kinds = [(np.inf, Status.NONFINITE), (np.nan, Status.FAILED), (np.nan, Status.PENDING)]
    for (j, i), (v, s) in zip(where, kinds * len(where), strict=False):
        value[j, i], status[j, i] = v, s
    return replace(surface, values={"train_loss": value}, status=status)


def noisy(sigma, seed=0, n=25, se=True):
    g = np.random.default_rng(seed)
    noise = sigma * g.normal(size=(n, n))
    more = {"se": np.full((n, n), sigma)} if se else {}
    return plane(lambda x, y: x**2 + 2 * y**2 + noise, n, n, **more)


# -- convexity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_noise_on_a_convex_bowl_is_not_convex_and_the_guard_knows(seed):
    found = nonconvexity(noisy(0.01, seed))
    assert found.plain == nonconvex_fraction(noisy(0.01, seed)) > 0.2
    assert found.guarded <= 1 / found.guarded_cells and found.unsure == 0
    assert (found.cells, found.guarded_cells, found.step) == (23**2, 21**2, pytest.approx(1 / 12))


def test_without_standard_errors_two_steps_must_do_and_that_is_said():
    found = nonconvexity(noisy(0.01, se=False))
    assert found.guarded == found.agreeing < found.plain / 5
    assert any("no standard error is known" in n for n in found.notes)


@pytest.mark.parametrize(
    ("f", "share"),
    [
        (lambda x, y: x**2 + y**2, 0.0),
        (lambda x, y: x**2 - y**2, 1.0),
        (lambda x, y: x * y, 1.0),  # its curvatures lie along the diagonals
        (lambda x, y: -(x**2) - y**2, 1.0),
    ],
)
def test_the_guard_takes_nothing_from_what_is_clear(f, share):
    found = nonconvexity(plane(f, 12, 9, se=np.full((9, 12), 1e-4)))
    assert (found.plain, found.agreeing, found.guarded) == (share, share, share)


def test_the_error_of_the_lowest_curvature_is_that_of_independent_values():
    """Against many draws: for independent noise the propagated error is exact, not a bound."""
    from lsweep.measures.convexity import _lowest

    g = np.random.default_rng(1)
    clean = plane(lambda x, y: 3 * x**2 + x * y - 2 * y**2, 7, 9)["train_loss"]
    sigma = 1e-5 * (1 + g.random(clean.shape))  # so small that the eigenvector stays
    for reach in (1, 2):
        draws = [
            _lowest(clean + sigma * g.normal(size=clean.shape), (0.25, 1 / 3), reach).value
            for _ in range(4000)
        ]
        told = _lowest(clean, (0.25, 1 / 3), reach).error(sigma)
        assert told == pytest.approx(np.std(draws, axis=0), rel=0.08)


def test_a_cell_is_compared_with_itself_at_twice_the_step():
    """Waves of four points are not convex at step h and cancel at step 2h, on every lattice."""
    for nx, ny in ((13, 13), (14, 11)):
        i, j = np.arange(nx), np.arange(ny)
        z = np.cos(np.pi * i)[None, :] + np.cos(np.pi * j)[:, None]
        s = Surface({"x": i / 8, "y": j / 8}, {"train_loss": z})
        found = nonconvexity(s)
        assert found.plain > 0.7 and found.agreeing == found.guarded == 0.0


def test_interpolated_cells_have_no_error_and_count_as_noise():
    s = plane(lambda x, y: x * y, 9, 9, se=np.full((9, 9), 1e-6))
    s["train_loss_se"][:, :4] = np.nan
    status = np.where(np.isnan(s["train_loss_se"]), Status.INTERPOLATED, Status.OK)
    found = nonconvexity(replace(s, status=status.astype(np.uint8)))
    assert (found.plain, found.agreeing) == (1.0, 1.0)
    assert found.unsure == 15 and found.guarded == pytest.approx(10 / 25)


# -- basins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(8.0, 2.0), (4.0, 4.0), (3.0, 20.0)])
def test_the_basin_of_a_bowl_is_an_ellipse(a, b):
    found = basin(plane(lambda x, y: 1 + a * x**2 + b * y**2, 201, 161), rise=0.5)
    assert found.area == pytest.approx(np.pi * 0.5 / math.sqrt(a * b), rel=0.01)
    assert found.share == pytest.approx(found.area / 4)
    assert found.least == pytest.approx(math.sqrt(0.5 / max(a, b)), rel=1e-3)
    angle = 2 * np.pi * np.arange(72) / 72
    widths = np.sqrt(0.5 / (a * np.cos(angle) ** 2 + b * np.sin(angle) ** 2))
    assert found.median == pytest.approx(np.median(widths), rel=1e-3)
    assert (found.border, found.open_rays, found.bounded, found.notes) == (False, 0, True, ())


def test_only_the_component_of_the_centre_is_its_basin():
    """Two wells at x = 0 and x = 1, equally deep, with a wall of 1 between them."""
    wells = plane(lambda x, y: 16 * (x * (1 - x)) ** 2 + 4 * y**2, 121, 61, span=1.5)
    lone = plane(
        lambda x, y: np.where(x < 0.5, 16 * (x * (1 - x)) ** 2 + 4 * y**2, 9), 121, 61, span=1.5
    )
    assert basin(wells, rise=0.5).area == basin(lone, rise=0.5).area
    both = int((wells["train_loss"] <= 0.5).sum())
    assert both == pytest.approx(2 * basin(wells, rise=0.5).cells, abs=2)
    assert basin(wells, rise=1.5).cells > 2 * basin(wells, rise=0.5).cells  # over the wall


def test_what_the_swept_range_cuts_off_is_a_lower_bound():
    found = basin(plane(lambda x, y: x**2 / 4 + 4 * y**2), rise=0.5)
    assert found.border and found.open_rays > 0 and found.bounded  # along x it goes on, see median
    assert found.least == pytest.approx(math.sqrt(0.5 / 4), rel=1e-2)
    assert found.notes == (
        "the basin reaches the border: its area is a lower bound; widen the range",
    )
    whole = basin(plane(lambda x, y: 0 * x), rise=0.5)
    assert (whole.share, whole.open_rays, whole.bounded, whole.least) == (1.0, 72, False, 1.0)
    assert "72 of 72 rays end before the loss has risen" in whole.notes[-1]


def test_a_basin_of_few_cells_says_so():
    found = basin(plane(lambda x, y: 50 * (x**2 + y**2), 21, 21), rise=0.6)
    assert found.cells < 30 and found.notes == (
        "the basin has 5 points, too coarse below 30: refine the grid",
    )


def test_the_error_of_an_area_moves_all_values_together():
    s = plane(lambda x, y: x**2 + y**2, 101, 101, diff_se=np.full((101, 101), 0.02))
    expected = (0.27 - 0.23) * np.pi / 4 / 2
    assert basin(s, rise=0.25).share_se == pytest.approx(expected, rel=0.1)
    assert basin(plane(lambda x, y: x**2 + y**2), rise=0.25).share_se is None
    flat = plane(lambda x, y: 0.01 * x**2, diff_se=np.full((41, 41), 0.02))
    found = basin(flat, rise=0.5)  # all of it is basin, and how much lies beyond is not known
    assert (found.share, found.share_se) == (1.0, None)


def test_a_line_has_two_rays():
    found = basin(line(lambda x: np.where(x > 0, 8, 2) * x**2, n=81), rise=0.5)
    assert (found.rays, found.least) == (2, pytest.approx(0.25, rel=1e-2))
    assert found.median == pytest.approx((0.25 + 0.5) / 2, rel=1e-2)
    assert found.area == pytest.approx(0.75, abs=0.026) and found.share == found.area / 2


def test_a_ray_ends_at_a_gap():
    found = basin(holed(plane(lambda x, y: 2 * (x**2 + y**2)), (20, 25)), rise=0.5)
    assert 0 < found.open_rays < 20
    assert found.least < 0.25 and not found.bounded
    assert found.notes[0] == "1 of 1681 points left out: 1 not finite"


# -- roughness -------------------------------------------------------------------------------------


def test_roughness_of_closed_forms():
    def to_loss(t):
        return lambda *xy: np.expm1(t(*xy))

    bowl = roughness(plane(to_loss(lambda x, y: x**2 + 3 * y**2)))
    assert bowl.scale == "log1p" and bowl.step == pytest.approx(0.05)
    assert bowl.curvature == pytest.approx(6, rel=1e-9)  # exact on quadratics
    assert bowl.gradient == pytest.approx(math.hypot(2 * 0.95, 6 * 0.95), rel=1e-9)
    assert bowl.variation == pytest.approx(1) and bowl.largest_variation == pytest.approx(1)
    assert bowl.gradient_95 < bowl.gradient
    wave = roughness(line(to_loss(lambda x: 1 - np.cos(4 * np.pi * x)), n=401))
    assert wave.variation == pytest.approx(4, rel=1e-3)  # up, down, up, down
    assert wave.gradient == pytest.approx(4 * np.pi, rel=1e-3)
    assert wave.curvature == pytest.approx((4 * np.pi) ** 2, rel=1e-3)


def test_a_constant_plane_has_no_roughness_and_its_minimum_is_its_centre():
    x = np.linspace(-1, 1, 9)
    last_bit = 1 + np.finfo(float).eps * np.add.outer(np.arange(9) % 2, np.arange(9) % 3 == 0)
    for value in (np.ones((9, 9)), last_bit):
        flat = Surface({"x": x, "y": x}, {"train_loss": np.log(2.0) * value})
        assert flat.constant("train_loss")
        assert np.isnan(roughness(flat).variation)
        assert flat.minimum("train_loss")[0] == {"x": 0.0, "y": 0.0}
        assert "constant" in rows_of_plane(flat, "train_loss")[0][0].note
        assert "constant, 0.693147 at the centre, minimum 0.693147 at x = 0, y = 0" in repr(flat)
    low = Surface({"x": x}, {"a": np.round(np.abs(np.abs(x) - 0.6) * 4)})  # four points are 0
    assert low.minimum("a") == ({"x": -0.5}, 0.0)
    assert not low.constant("a")


def test_roughness_below_zero_is_on_the_asinh_scale():
    assert roughness(line(lambda x: x - 0.5)).scale == "asinh"


def test_noise_raises_the_variation_and_the_step_is_told():
    smooth, rough = (roughness(noisy(s)) for s in (1e-6, 0.05))
    assert smooth.variation == pytest.approx(1, abs=1e-3)
    assert rough.variation > 1.05 and rough.largest_variation > 1.2
    assert rough.curvature > 10 * smooth.curvature


# -- persistence -----------------------------------------------------------------------------------


def by_gudhi(z):
    """Return (birth, death) of all H0 pairs; cells that touch in a corner are neighbours."""
    cubes = gudhi.CubicalComplex(top_dimensional_cells=np.where(np.isfinite(z), z, np.inf))
    found = cubes.persistence(homology_coeff_field=2, min_persistence=0)
    pairs = [p for dimension, p in found if dimension == 0 and np.isfinite(p[0])]
    return sorted(p for p in pairs if p[1] > p[0])


def by_lsweep(surface):
    found = persistence(surface)
    return sorted((p.birth, p.death) for p in (*found.pairs, *found.essential))


@pytest.mark.parametrize("shape", [(1, 40), (9, 9), (12, 17), (2, 30)])
@pytest.mark.parametrize("seed", range(3))
def test_basins_are_those_of_an_independent_library(shape, seed):
    g = np.random.default_rng(seed)
    z = g.normal(size=shape)
    axes = {"x": np.arange(float(shape[1]))}
    if shape[0] > 1:
        axes["y"] = np.arange(float(shape[0]))
    s = Surface(axes, {"train_loss": z if shape[0] > 1 else z[0]})
    assert len(persistence(s).pairs) > 2
    assert by_lsweep(s) == by_gudhi(s["train_loss"])


def test_ties_and_gaps_are_treated_as_by_the_library():
    g = np.random.default_rng(0)
    for _ in range(20):
        z = g.integers(0, 6, size=(8, 9)).astype(float)
        z[g.random(z.shape) < 0.25] = np.nan
        s = Surface({"x": np.arange(9.0), "y": np.arange(8.0)}, {"train_loss": z})
        assert by_lsweep(s) == by_gudhi(z)


def test_two_basins_of_a_closed_form():
    """(x² - 1)² + y² + x/5: minima near ±1, a saddle near 0, whose places are roots of a cubic."""
    left, saddle, right = np.sort(np.roots([4, 0, -4, 0.2]).real)
    value = lambda x: (x**2 - 1) ** 2 + 0.2 * x  # noqa: E731
    found = persistence(plane(lambda x, y: value(x) + y**2, 301, 101, span=1.5))
    (pair,) = found.pairs
    (oldest,) = found.essential
    assert pair.birth == pytest.approx(value(right), abs=1e-3)
    assert pair.death == pytest.approx(value(saddle), abs=1e-3)
    assert pair.minimum == pytest.approx((right, 0), abs=0.01)
    assert pair.saddle == pytest.approx((saddle, 0), abs=0.01)
    assert oldest.minimum == pytest.approx((left, 0), abs=0.01) and oldest.death == math.inf
    assert (found.deep, found.shallow, found.largest) == (1, 0, pair.depth)
    assert persistence(plane(lambda x, y: value(x) + y**2), threshold=2.0).deep == 0


def test_basins_of_noise_are_shallow():
    g = np.random.default_rng(0)
    flat = plane(lambda x, y: g.normal(size=x.shape), 21, 21)
    bare = persistence(flat)
    assert bare.deep + bare.deep_border == len(bare.pairs) > 40
    assert any("no basin was tested against noise" in n for n in bare.notes)
    told = replace(flat, values={**flat.values, "train_loss_se": np.ones((21, 21))})
    assert persistence(told).deep + persistence(told).deep_border == 0


def test_the_smaller_of_two_bounds_of_the_noise_is_used():
    f = lambda x: (x**2 - 1) ** 2 + 0.1 * x  # noqa: E731
    s = line(f, 31, span=1.5)
    both = replace(
        s,
        values={
            **s.values,
            "train_loss_se": np.full(31, 3.0),
            "train_loss_diff_se": np.full(31, 0.1),
        },
    )
    assert persistence(both).pairs[0].noise == pytest.approx(3 * 0.2)
    only = replace(s, values={**s.values, "train_loss_se": np.full(31, 0.03)})
    assert persistence(only).pairs[0].noise == pytest.approx(3 * 0.03 * math.sqrt(2))


def test_a_minimum_on_the_border_or_beside_a_gap_is_flagged():
    """Rising from the left edge, a well at x = 0: the edge is the lower."""
    f = lambda x, y: x + 0.6 * np.cos(2 * np.pi * x) + 0 * y  # noqa: E731
    found = persistence(plane(f, 81, 9))
    assert all(p.border == (abs(p.minimum[0]) == 1 or abs(p.minimum[1]) == 1) for p in found.pairs)
    s = plane(lambda x, y: (x**2 - 0.5) ** 2 + 0.1 * x + y**2)
    (pair,) = persistence(s).pairs
    assert (pair.border, persistence(s).deep) == (False, 1)
    i = int(np.argmin(np.abs(s.x - pair.minimum[0])))
    beside = persistence(holed(s, (20, i + 1)))
    assert (beside.deep, beside.deep_border) == (0, 1)


def test_what_gaps_divide_has_a_basin_on_each_side():
    s = plane(lambda x, y: x**2 + y**2, 9, 5)
    found = persistence(holed(s, *((j, 4) for j in range(5))))
    assert [p.saddle for p in found.essential] == [None, None] and found.pairs == ()
    assert any("into 2 pieces" in n for n in found.notes)
    assert found.notes[0] == "5 of 45 points left out: 1 pending, 2 failed, 2 not finite"


def test_basins_between_interpolated_points_do_not_count():
    s = line(lambda x: (x**2 - 1) ** 2 + 0.1 * x, 31, span=1.5)
    status = np.full(31, Status.OK, np.uint8)
    status[14:18] = Status.INTERPOLATED  # the saddle
    found = persistence(replace(s, status=status))
    assert (len(found.pairs), found.deep, found.shallow) == (1, 0, 1)
    assert found.notes[-1] == "1 basins rest on interpolated points and do not count"


# -- the quadratic at the centre -------------------------------------------------------------------


@pytest.mark.parametrize("radius", [None, 0.3, 1.0])
def test_a_quadratic_is_fitted_exactly(radius):
    """Turned by 30 degrees: λ = 5 and -2, gradient (0.3, -0.4)."""
    turn = np.array(
        [[math.cos(np.pi / 6), -math.sin(np.pi / 6)], [math.sin(np.pi / 6), math.cos(np.pi / 6)]]
    )
    h = turn @ np.diag([5.0, -2.0]) @ turn.T

    def f(x, y):
        return 1 + 0.3 * x - 0.4 * y + 0.5 * (h[0, 0] * x**2 + 2 * h[0, 1] * x * y + h[1, 1] * y**2)

    found = central(plane(f, 21, 31), radius=radius)
    assert (found.largest, found.smallest) == (pytest.approx(5), pytest.approx(-2))
    assert (found.anisotropy, found.gradient) == (pytest.approx(2.5), pytest.approx(0.5))
    assert found.minimum is None and found.residual < 1e-12 and found.se < 1e-11
    assert found.points == {None: 5 * 7, 0.3: 7 * 9, 1.0: 21 * 31}[radius]


def test_the_minimum_of_the_fit_and_a_line():
    found = central(plane(lambda x, y: 4 * (x - 0.05) ** 2 + (y + 0.02) ** 2))
    assert found.minimum == pytest.approx((0.05, -0.02))
    one = central(line(lambda x: 1 + 3 * x**2 + x))
    assert (one.largest, one.smallest, one.gradient) == pytest.approx((6, 6, 1))


def test_the_residual_tells_what_is_no_quadratic_and_the_error_covers_noise():
    assert central(line(np.abs), radius=1.0).residual > 0.15
    off = [
        (found.largest - 4) / found.se
        for found in (central(noisy(0.01, seed), radius=0.4) for seed in range(40))
    ]
    assert 0.6 < np.std(off) < 1.8 and abs(np.mean(off)) < 1


# -- what is said of all of them -------------------------------------------------------------------


@pytest.mark.parametrize("what", NUMBERS)
def test_points_without_a_value_are_left_out_and_counted(what):
    s = plane(lambda x, y: x**2 + y**2)
    found = NUMBERS[what](holed(s, (3, 3), (30, 5), (8, 35)))
    assert found.notes[0] == "3 of 1681 points left out: 1 pending, 1 failed, 1 not finite"
    numbers = {k: v for k, v in vars(found).items() if isinstance(v, float)}
    assert all(np.isfinite(v) for v in numbers.values()), numbers


@pytest.mark.parametrize("what", NUMBERS)
def test_a_volume_is_refused_in_one_line(what):
    box = Surface({a: np.arange(5.0) for a in "xyz"}, {"train_loss": np.ones((5, 5, 5))})
    with pytest.raises(LsweepError, match="plane"):
        NUMBERS[what](box)


@pytest.mark.parametrize("what", ["basin", "central"])
def test_what_needs_the_centre_says_that_it_is_missing(what):
    x = np.linspace(0.1, 1, 9)
    with pytest.raises(LsweepError, match=r"no value at the centre \(offset 0\)"):
        NUMBERS[what](Surface({"x": x, "y": x}, {"train_loss": np.ones((9, 9))}))
