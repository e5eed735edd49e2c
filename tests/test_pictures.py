"""Pictures: what is read back from axes, pixels and files is what the surface holds."""

import errno
import itertools
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.image import imread
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from lsweep.commands.cli import main
from lsweep.errors import LsweepError
from lsweep.pictures.cells import Cells, as_plane, pooled_scale
from lsweep.pictures.drawing import KINDS, contour, draw, filled, heat, line, relief, render, save
from lsweep.pictures.maps import COLORS, FAILED, NONFINITE
from lsweep.surfaces.scales import LINEAR, Scale, log_scale, number, numbers, round_ticks
from lsweep.surfaces.surface import Status, Surface, Trajectory

MAPS = ("contour", "filled", "heat", "3d")
FLAT = ("contour", "filled", "heat")


def slope(nx=7, ny=5):
    """f(x, y) = x + 10 y + 20: not square, not symmetric, positive, minimum at (-1, -1)."""
    x, y = np.linspace(-1, 1, nx), np.linspace(-1, 1, ny)
    return Surface({"x": x, "y": y}, {"train_loss": x[None, :] + 10 * y[:, None] + 20})


def bowl(n=21, lift=0.1):
    x = np.linspace(-1, 1, n)
    return Surface({"x": x, "y": x}, {"train_loss": lift + x[None, :] ** 2 + 2 * x[:, None] ** 2})


def run(seed=0, n=11):
    x = np.linspace(-1, 1, n)
    loss = x**2 + 0.1 * (seed + 1)
    values = {
        "train_loss": loss,
        "test_loss": loss + 0.3,
        "train_accuracy": 100 * np.exp(-loss),
        "test_accuracy": 90 * np.exp(-loss),
    }
    return Surface({"x": x}, values, title=f"run {seed}")


def marred():
    """Row 0 pending, (row 2, column 2) NaN, (row 2, column 4) failed; status says so."""
    s = slope()
    value, status = s["train_loss"].copy(), np.full(s.shape, Status.OK, np.uint8)
    status[0], value[0] = Status.PENDING, np.nan
    status[2, 2], value[2, 2] = Status.NONFINITE, np.inf
    status[2, 4], value[2, 4] = Status.FAILED, np.nan
    return replace(s, values={"train_loss": value}, status=status)


def pixels(ax: Axes):
    """Render and return a function (x, y) -> the RGB of that place, each in 0..1."""
    figure = ax.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3] / 255.0

    def at(x, y):
        column, row = ax.transData.transform((x, y))
        return image[len(image) - 1 - int(row), int(column)]

    return at


def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def marker(ax, symbol):
    found = [t for t in ax.get_lines() if t.get_marker() == symbol]
    assert len(found) == 1
    return [float(np.squeeze(d)) for d in found[0].get_data(orig=True)]


def faces_of(net):
    """(n, 4, 3) corners; matplotlib has no public name for them, and changed the private one."""
    old = not hasattr(net, "_faces")
    return net._vec[:3].T.reshape(-1, 4, 3) if old else np.array(net._faces)


def color_bar(ax):
    (bar,) = ax.child_axes
    return bar


# Scales


def test_log_scale_is_ln_exactly_when_every_finite_value_is_positive():
    assert log_scale([1e-8, 1.0, np.inf, np.nan]).name == "ln"
    assert log_scale([0.0, 1.0]).name == "asinh"  # 0 has no logarithm
    assert log_scale([-1.0, 1.0]).name == "asinh"


def test_asinh_scale_has_its_zero_at_the_centre_and_its_width_at_the_median_distance():
    values = np.array([-2.0, 1.0, 4.0, 9.0, np.nan])  # distances to 1: 3, 0, 3, 8, median 3
    forward, inverse, _ = log_scale(values, center=1.0)
    assert forward(1.0) == 0
    assert forward(4.0) == pytest.approx(np.arcsinh(1.0))
    assert inverse(forward(values)) == pytest.approx(values, nan_ok=True)
    assert log_scale(values).forward(-2.0) == 0  # without a centre the minimum


def test_levels_are_log_spaced_from_the_minimum_to_the_98_percent_quantile():
    even = np.logspace(-2, 3, 495)
    assert Scale.of([even], log=True).high == even.max()  # nothing is cut off that takes no room
    values = np.append(even, np.full(5, 1e6))
    scale = Scale.of([values], log=True)
    level = scale.levels()
    assert level[0] == values.min()
    assert level[-1] == pytest.approx(np.quantile(values, 0.98))
    assert np.ptp(np.diff(np.log(level))) < 1e-12
    assert scale.extend == "max"


def test_bounds_replace_minimum_and_quantile():
    scale = Scale.of([np.arange(10.0)], vmin=2.0, vmax=5.0)
    assert scale.levels(4).tolist() == [2, 3, 4, 5]
    assert scale.extend == "both"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vmin": 5.0, "vmax": 2.0}, "vmin = 5 is not below vmax = 2"),
        ({"vmin": 0.0, "log": True}, "vmin = 0: needs to be above 0 on a log scale"),
        ({"vmax": float("nan")}, "vmax = nan: needs to be finite"),
    ],
)
def test_bounds_that_make_no_range_are_refused(options, message):
    with pytest.raises(LsweepError, match=message):
        draw(bowl(), **options)


def test_what_spans_over_two_decades_is_logarithmic_unless_its_reader_says_otherwise():
    x = np.linspace(-1, 1, 21)
    cliff = 0.8 + 0.2 * x[None, :] ** 2 + 1500.0 ** (-(x[:, None] + 1) * 4 + 1)
    cliff[0, 0] = np.inf
    s = Surface({"x": x, "y": x}, {"train_loss": cliff, "test_accuracy": cliff})
    ax = draw(s)
    assert color_bar(ax).get_ylabel() == "train loss, log scale, uneven levels"
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadContourSet) and not any(c.hatches)]
    share = np.histogram(s["train_loss"][np.isfinite(cliff)], np.exp(mesh.levels))[0] / cliff.size
    assert share.max() < 0.3  # of even levels of ln the first band would hold most points
    assert color_bar(draw(s, log=False)).get_ylabel() == "train loss"
    assert color_bar(draw(s, "test_accuracy")).get_ylabel() == "test accuracy"
    assert color_bar(draw(bowl())).get_ylabel() == "train loss"
    lines = [Surface({"x": x}, {"train_loss": 10.0 ** (k * x)}) for k in (0.5, 1.5)]
    lines.append(Surface({"x": x}, {"test_accuracy": np.where(x < 0, 76.0, 0.1)}))
    drawn = [draw(lines[0]), draw(lines[1]), draw(lines[2], "test_accuracy")]
    assert [ax.get_yscale() for ax in drawn] == ["linear", "log", "linear"]
    assert draw(lines[1], vmin=0.0).get_yscale() == "linear"  # which has no logarithm


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(5),  # all equal, zero
        np.full(5, -3.0),  # all equal, negative
        np.full(5, 1e-300),
        np.array([1.0, 1.0 + 1e-16, 1.0 + 3e-16]),  # equal but for rounding
        np.array([np.nan, np.inf]),  # nothing finite
        np.array([7.0]),
        np.array([1e-8, 1e30]),
        np.array([-1.7e308, 1.7e308]),  # the range itself overflows
        np.array([0.0] * 99 + [1.0]),  # the quantile is the minimum
        np.empty(0),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_every_scale_has_levels_that_rise_and_ticks_among_them(values, log):
    scale = Scale.of([values], log=log)
    assert (np.diff(scale.levels()) > 0).all()
    tick, text = scale.ticks()
    assert len(set(text)) == len(tick) <= 8
    slack = 1e-8 * (abs(scale.low) + abs(scale.high))
    assert ((tick >= scale.low - slack) & (tick <= scale.high + slack)).all()


def test_ticks_are_round_and_told_apart():
    assert round_ticks(0.0, 10.0, LINEAR)[1] == ["0", "2", "4", "6", "8", "10"]
    assert round_ticks(1e-8, 1e30, log_scale([1.0]))[1][0] == "10⁻⁷"
    assert numbers([1000.0, 1000.5]) == ["1000", "1000.5"]
    assert number(50000.0) == "50000"
    assert len(set(round_ticks(1e6, 1e6 + 1e-3, LINEAR)[1])) > 2


# Maps


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("log", [False, True])
def test_minimum_and_centre_stand_where_the_values_say(kind, log):
    ax = draw(slope(), kind=kind, log=log)
    assert marker(ax, "*") == [-1, -1]
    assert marker(ax, "+") == [0, 0]
    assert legend(ax)[:2] == ["centre 20", "minimum 9 at (−1, −1)"]


@pytest.mark.parametrize("kind", MAPS)
def test_of_an_accuracy_the_maximum_is_marked_and_nothing_near_it_cut_off(kind):
    x = np.linspace(-1, 1, 21)
    peak = 90.0 * np.exp(-400 * ((x[None, :] - 0.5) ** 2 + (x[:, None] + 0.5) ** 2))
    s = Surface({"x": x, "y": x}, {"train_accuracy": peak})
    ax = draw(s, kind=kind)
    assert legend(ax)[1] == "maximum 90 at (0.5, −0.5)"
    assert not any("above" in text for text in legend(ax))
    assert repr(s).endswith("maximum 90 at x = 0.5, y = -0.5>")


def test_of_a_line_of_accuracy_the_maximum_is_marked():
    values = {"train_accuracy": np.array([5.0, 80.0, 90.0])}
    ax = draw(Surface({"x": np.array([-1.0, 0.0, 1.0])}, values), name="train_accuracy")
    assert "maximum 90 at 1" in legend(ax) and marker(ax, "*") == [1, 90]


def test_minimum_and_centre_of_a_relief_lie_on_it():
    ax = relief(slope(), None, Figure().add_subplot(projection="3d"))
    star, cross = (
        next(t for t in ax.get_lines() if t.get_marker() == m).get_data_3d() for m in "*+"
    )
    assert np.ravel(star).tolist() == [-1, -1, 9]
    assert np.ravel(cross).tolist() == [0, 0, 20]


def test_heat_cells_are_values_in_place_with_unequal_axes():
    s = slope(7, 5)
    ax = heat(s, "train_loss", Figure().add_subplot())
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    assert mesh.get_array().reshape(5, 7).tolist() == s["train_loss"].tolist()
    assert list(mesh.get_coordinates()[0, :, 0]) == pytest.approx(list(np.arange(8) / 3 - 7 / 6))
    assert (mesh.norm.vmin, mesh.norm.vmax) == (9, s["train_loss"].max())


@pytest.mark.parametrize("kind", ["contour", "filled"])
def test_contours_of_a_slope_lie_where_the_formula_puts_them(kind):
    ax = draw(slope(), kind=kind)
    drawn = next(c for c in ax.collections if isinstance(c, QuadContourSet))
    if kind == "filled":
        assert drawn.levels == pytest.approx(pooled_scale([slope()], "train_loss").levels())
        return
    for level, path in zip(drawn.levels, drawn.get_paths(), strict=True):
        x, y = path.vertices.T
        assert x + 10 * y + 20 == pytest.approx(np.full(len(x), level))


def test_log_contours_are_levels_of_ln():
    ax = draw(bowl(), kind="filled", log=True)
    drawn = next(c for c in ax.collections if isinstance(c, QuadContourSet))
    level = np.exp(drawn.levels)
    assert level[0] == pytest.approx(0.1)
    assert level[-1] == pytest.approx(bowl()["train_loss"].max())
    assert level[1:] / level[:-1] == pytest.approx(np.full(len(level) - 1, level[1] / level[0]))


def test_what_was_interpolated_is_not_called_failed():
    x = np.linspace(-1, 1, 5)
    status = np.array([1, 4, 1, 4, 1], np.uint8)
    error = np.where(status == Status.OK, [0.4, 9, 0.2, 9, 0.6], np.nan)
    one = Surface({"x": x}, {"train_loss": x**2, "train_loss_se": error}, status)
    assert not any("failed" in t for t in legend(draw(one, "train_loss_se")))
    ax = draw(one, "train_loss")
    assert "±1.96 s.e., interpolated too" in legend(ax)
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    corners = band.get_paths()[0].vertices
    assert np.ptp(corners[np.isclose(corners[:, 0], -0.5), 1]) == pytest.approx(2 * 1.96 * 0.3)
    values = {n: np.tile(v, (5, 1)) for n, v in one.values.items()}
    plane = Surface({"x": x, "y": x}, values, np.tile(status, (5, 1)))
    said = legend(draw(plane, "train_loss_se"))
    assert "not evaluated (10 of 25)" in said and not any("finite" in t for t in said)


def test_labels_of_contours_lie_apart_and_within_the_frame():
    x = np.linspace(-1, 1, 25)
    far = np.hypot(x[None, :], 1.1 * x[:, None])
    dense = Surface({"x": x, "y": x}, {"train_loss": far**6 + 0.3 * far})  # four corners, full
    for s in (slope(), bowl(), dense):
        ax = draw(s, kind="contour", log=False)
        ax.figure.draw_without_rendering()
        box = [t.get_window_extent() for t in ax.texts]
        assert len(box) >= 2
        assert not any(a.overlaps(b) for a, b in itertools.combinations(box, 2))
        frame = ax.get_window_extent()
        assert all(frame.contains(*b.min) and frame.contains(*b.max) for b in box)


def test_what_is_above_the_scale_is_hatched_and_explained():
    s = bowl()
    for kind in ("contour", "filled"):
        ax = draw(s, kind=kind, vmax=2.0)
        (area,) = [c for c in ax.collections if getattr(c, "hatches", [None])[0] == "////"]
        corners = np.concatenate([p.vertices for p in area.get_paths()])
        edge = 0.1 + corners[:, 0] ** 2 + 2 * corners[:, 1] ** 2
        assert edge.min() > 1.95  # up to the linear interpolation along an edge of the lattice
        assert "above 2, up to 3.1" in legend(ax)
    ax = draw(s, kind="heat", vmax=2.0)
    (hatched,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert hatched.get_hatch() == "////"
    area = sum(float(np.prod(np.ptp(p.vertices, axis=0))) for p in hatched.get_paths())
    assert area == pytest.approx(0.1**2 * (s["train_loss"] > 2.0).sum())
    assert not any("above" in t for t in legend(draw(s, vmax=3.2)))


def test_what_is_below_the_scale_is_hatched_the_other_way():
    ax = draw(bowl(), kind="heat", vmin=0.5)
    assert "\\\\\\\\" in [c.get_hatch() for c in ax.collections]
    assert "below 0.5" in legend(ax)


def test_the_plateau_of_a_relief_is_a_dark_net_at_the_top():
    ax = draw(bowl(), kind="3d", vmax=1.0)
    (net,) = [c for c in ax.collections if isinstance(c, Poly3DCollection)]
    height = faces_of(net)[..., 2]
    assert height.max() == 1.0
    top = (height == 1.0).any(1)
    dark = np.asarray(net.get_edgecolor())[:, :3].max(1) < 0.2
    assert dark.sum() == top.sum() > 100
    assert ax.get_zlim() == pytest.approx((0.1, 1.0))


def test_every_complete_square_is_a_face_of_the_relief_at_its_values():
    s = slope(4, 3)
    ax = draw(s, kind="3d", vmax=100.0)
    (net,) = [c for c in ax.collections if isinstance(c, Poly3DCollection)]
    faces = faces_of(net)
    assert faces.shape[0] == 3 * 2
    assert faces[..., 2] == pytest.approx(faces[..., 0] + 10 * faces[..., 1] + 20)


@pytest.mark.parametrize("kind", FLAT)
def test_pending_is_white_and_not_finite_is_grey_and_failed_is_darker(kind):
    ax = draw(marred(), kind=kind)
    at = pixels(ax)
    x, y = marred().x, marred().y
    inside = 0.02  # the outermost cells are cut by the frame
    for i in range(7):
        assert at(np.clip(x[i], -1 + inside, 1 - inside), y[0] + 0.1) == pytest.approx((1, 1, 1))
    assert at(x[2] + 0.05, y[2] + 0.05) == pytest.approx(to_rgb(NONFINITE), abs=0.01)
    assert at(x[4] + 0.05, y[2] + 0.05) == pytest.approx(to_rgb(FAILED), abs=0.01)
    assert legend(ax)[-3:] == ["not finite (1 of 35)", "failed (1 of 35)", "pending (7 of 35)"]


def test_what_has_no_value_is_grey_and_joins_the_relief_and_infinity_is_at_its_top():
    s = marred()
    ax = draw(s, kind="3d")
    (net,) = [c for c in ax.collections if isinstance(c, Poly3DCollection)]
    corners, color = faces_of(net), np.asarray(net.get_facecolor())[:, :3]
    assert len(corners) == 3 * 6  # all squares but those of the pending row
    for at, grey, height in ((2, NONFINITE, ax.get_zlim()[1]), (4, FAILED, ax.get_zlim()[0])):
        assert np.isclose(color, to_rgb(grey)).all(1).sum() == 4  # the squares around the point
        mine = np.isclose(corners[..., :2], (s.x[at], s.y[2])).all(-1)
        assert corners[mine][:, 2] == pytest.approx(np.full(4, height))
    x, y, z = corners[corners[..., 1] != 0].T
    assert z == pytest.approx(np.clip(x + 10 * y + 20, *ax.get_zlim()))


def test_the_highest_value_of_a_relief_has_the_last_colour():
    x = np.linspace(-1, 1, 3)
    peak = np.ones((3, 3))
    peak[2, 2] = 4000.0  # one corner of one square of four, and over two decades
    ax = draw(Surface({"x": x, "y": x}, {"train_loss": peak}), kind="3d")
    (net,) = [c for c in ax.collections if isinstance(c, Poly3DCollection)]
    assert np.exp(ax.get_zlim()[1]) == pytest.approx(4000.0)
    last = np.isclose(net.get_facecolor(), colormaps[COLORS](1.0)).all(1)
    assert last.sum() == 1


@pytest.mark.parametrize("kind", FLAT)
def test_a_coarse_early_picture_shows_its_lone_points(kind):
    s = slope(9, 9)
    status = np.zeros(s.shape, np.uint8)
    status[::4, ::4] = Status.OK
    s = replace(s, status=status, values={"train_loss": np.where(status, s["train_loss"], np.nan)})
    ax = draw(s, kind=kind, vmin=9.0, vmax=31.0)
    at = pixels(ax)
    shade = [at(0.04, y).tolist() for y in (-0.94, 0.08, 0.94)]
    assert len({tuple(c) for c in shade}) == 3 and [1, 1, 1] not in shade
    assert at(0.3, 0.3) == pytest.approx((1, 1, 1))


def test_a_value_stored_at_a_pending_point_is_not_shown():
    s = slope()
    status = np.full(s.shape, Status.OK, np.uint8)
    status[0] = Status.PENDING
    ax = draw(replace(s, status=status), kind="heat")
    assert legend(ax)[1] == "minimum 14 at (−1, −0.5)"


def test_a_constant_plane_is_one_colour_and_says_so():
    flat = np.log(2.0) * (1 + np.finfo(float).eps * (np.indices((7, 7)).sum(0) % 2))
    ax = draw(Surface({"x": np.linspace(-1, 1, 7), "y": np.linspace(-1, 1, 7)}, {"a": flat}))
    assert legend(ax) == ["centre 0.693, constant"]
    at = pixels(ax)
    assert len({tuple(at(x, 0.7)) for x in np.linspace(-0.9, 0.9, 50)}) == 1


def test_nothing_covers_a_picture_that_has_no_value():
    s = replace(
        slope(), values={"train_loss": np.full((5, 7), np.nan)}, status=np.zeros((5, 7), "u1")
    )
    ax = draw(s)
    assert legend(ax) == ["centre", "pending (35 of 35)"]
    assert pixels(ax)(0.5, 0.5) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
    ("norms", "ranges", "aspect"),
    [
        (("2", "3"), ((-1, 1), (-1, 1)), 1.5),  # one unit of y is 1.5 times as long
        (("2", "2"), ((-1, 1), (0, 1)), 1.0),
        ((None, None), ((-1, 1), (-1, 1)), 1.0),  # the same range: one unit
        ((None, None), ((-1, 1), (0, 5)), "auto"),
        (("2", None), ((-1, 1), (0, 5)), "auto"),
        (("1", "1000"), ((-1, 1), (-1, 1)), "auto"),  # a sliver in which nothing can be read
        (("?", "1"), ((-1, 1), (0, 5)), "auto"),
    ],
)
def test_equal_distance_in_weight_space_is_equal_length_on_the_page(norms, ranges, aspect):
    x, y = (np.linspace(*r, 4) for r in ranges)
    at = {a: {"norm": n} for a, n in zip("xy", norms, strict=True) if n is not None}
    s = Surface({"x": x, "y": y}, {"train_loss": np.ones((4, 4))}, attributes=at)
    ax = draw(s)
    assert ax.get_aspect() == aspect
    if aspect != "auto" and None not in norms:
        ax.figure.draw_without_rendering()
        (x0, y0), (x1, y1) = ax.transData.transform([(0, 0), (1, 1)])
        assert (y1 - y0) / (x1 - x0) == pytest.approx(float(norms[1]) / float(norms[0]), rel=1e-3)


def test_axes_name_their_directions_and_text_is_not_mathematics():
    at = {
        "x": {"direction": "random, filter"},
        "train_loss": {"long_name": "a_b $", "units": "nat"},
    }
    ax = draw(replace(slope(), attributes=at, title="50 $ and $\\frac"))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x (random, filter)", "y")
    assert color_bar(ax).get_ylabel() == "a_b $ (nat)"
    pixels(ax)  # as mathematics the title would raise


def test_the_bar_says_which_scale_it_is():
    assert color_bar(draw(bowl(), log=True)).get_ylabel() == "train loss, log scale"
    assert color_bar(draw(bowl(lift=-1.0), log=True)).get_ylabel() == "train loss, asinh scale"
    tick = [t.get_text() for t in color_bar(draw(bowl(), kind="heat", log=True)).get_yticklabels()]
    assert tick == ["0.1", "0.2", "0.5", "1", "2"]


def test_of_three_axes_the_middle_of_z_is_drawn_and_named():
    box = Surface(
        {a: np.array([-1.0, 0.0, 1.0]) for a in "xyz"}, {"a": np.arange(27.0).reshape(3, 3, 3)}
    )
    ax = draw(box, kind="heat")
    assert ax.get_title() == "loss landscape, z = 0"
    assert legend(ax)[1] == "minimum 9 at (−1, −1)"
    assert as_plane(box).shape == (3, 3)


def test_of_three_axes_any_plane_is_drawn_by_the_nearest_z_that_was_evaluated(tmp_path, capsys):
    z = np.array([-1.0, 0.0, 0.25, 1.0])
    status = np.ones((4, 3, 3), np.uint8)
    status[2] = Status.PENDING
    axes = {"x": z[[0, 1, 3]], "y": z[[0, 1, 3]], "z": z}
    box = Surface(axes, {"train_loss": np.arange(36.0).reshape(4, 3, 3)}, status)
    ax = draw(box, kind="heat", z=0.3)
    assert (ax.get_title(), legend(ax)[0]) == ("loss landscape, z = 0", "centre 13")
    titles = [a.get_title() for a in render(box, z=[-1.0, 0.7]).axes]
    assert titles == ["loss landscape, z = −1", "loss landscape, z = 1"]
    assert legend(draw(box, z=1.0))[0] == "x = y = 0: 31"  # no centre: that is at z = 0
    with pytest.raises(LsweepError, match="z = 2: z goes from -1 to 1: give one within"):
        draw(box, z=2.0)
    box.save(tmp_path / "box.h5")
    assert Surface.load(tmp_path / "box.h5").metrics == ("train_loss",)  # without attributes
    picture = str(tmp_path / "a.png")
    arguments = ["render", str(tmp_path / "box.h5"), "-o", picture]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"wrote {picture}: the plane z = 0.25 of 4; ")
    assert main([*arguments, "--at", "z=all"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--at", "y=1"])
    assert "'y=1' is not z=NUMBER or z=all" in capsys.readouterr().err


def test_quarters_tile_the_lattice_and_leave_complete_squares_out():
    s = marred()
    cells = Cells.of(s, "train_loss", pooled_scale([s], "train_loss"))
    quarters = cells.quarters(s)
    assert quarters.t.shape == (8, 12)
    covered = np.isfinite(quarters.t) | quarters.bad | quarters.pending
    assert covered.sum() == 4 * (~cells.squares()).sum()
    assert quarters.pending.sum() == 12  # the lower half of the lowest row of squares


# Trajectories


def path_of(*residual):
    n = len(residual)
    offsets = np.stack([np.linspace(-0.8, 0.0, n), np.linspace(0.6, 0.0, n)], 1)
    labels = tuple(f"epoch{i}" for i in range(n))
    norm = np.linalg.norm(offsets, axis=1)
    return Trajectory(offsets, np.array(residual) * norm, norm, {"train_loss": norm}, labels)


@pytest.mark.parametrize("kind", FLAT)
def test_a_trajectory_joins_its_steps_and_is_hollow_where_it_leaves_the_plane(kind):
    t = path_of(2.0, 1.01, 0.5, 0.0)
    ax = draw(replace(bowl(), trajectory=t), kind=kind)
    joined = [p for p in ax.get_lines() if p.get_color() == "#D55E00" and len(p.get_xdata()) == 4]
    assert np.stack(joined[0].get_data(), 1).tolist() == t.offsets.tolist()
    solid, hollow = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert hollow.get_offsets().tolist() == t.offsets[:2].tolist()
    assert hollow.get_facecolor()[0, :3].tolist() == [1, 1, 1]
    assert solid.get_sizes()[0] > solid.get_sizes()[1]  # area grows with residual / in-plane
    assert "hollow: farther from the plane than along it" in legend(ax)
    assert [a.get_text() for a in ax.texts if a.get_text().startswith("epoch")] == [
        "epoch0",
        "epoch3",
    ]


def test_a_trajectory_in_the_plane_needs_no_warning_and_steps_outside_are_counted():
    t = path_of(0.0, 0.0, 0.0)
    ax = draw(replace(bowl(), trajectory=t))
    assert not any("hollow" in text for text in legend(ax))
    far = replace(t, offsets=t.offsets * 2)
    assert "1 step outside the picture" in legend(draw(replace(bowl(), trajectory=far)))


@pytest.mark.parametrize("kind", FLAT)
def test_the_ends_of_axes_are_no_path_and_their_names_keep_off_the_title(kind):
    ends = Trajectory(np.array([[1 + 1e-15, 0.0], [0.0, 1.0]]), np.zeros(2), np.ones(2),
                      {"train_loss": np.ones(2)}, ("b.pt", "c.pt"))  # fmt: skip
    plan = {"directions": {a: {"kind": "plane"} for a in "xy"}, "facts": {"track": []}}
    surface = replace(bowl(), trajectory=ends, provenance={"plan": plan})
    ax = draw(surface, kind=kind)
    assert not any(p.get_color() == "#D55E00" and len(p.get_xdata()) > 1 for p in ax.get_lines())
    assert "checkpoints (marker area: residual / in-plane)" in legend(ax)
    assert not any("outside" in text for text in legend(ax))
    (upper,) = [a for a in ax.texts if a.get_text() == "c.pt"]
    box = upper.get_window_extent(FigureCanvasAgg(ax.figure).get_renderer())
    assert box.y1 <= ax.get_window_extent().y1


def test_a_trajectory_lies_on_the_relief():
    t = path_of(0.1, 0.1, 0.1)
    ax = draw(replace(slope(), trajectory=t), kind="3d")
    joined = next(p for p in ax.get_lines() if len(p.get_data_3d()[0]) == 3)
    x, y, z = (np.asarray(d) for d in joined.get_data_3d())
    assert z == pytest.approx(x + 10 * y + 20)


def test_the_end_of_a_line_is_no_trajectory_and_its_band_is_not_cut_off():
    x = np.linspace(0.0, 1.0, 5)
    values = {"train_loss": 1 - (2 * x - 1) ** 2, "train_loss_diff_se": 0.2 * np.sin(np.pi * x)}
    ends = np.zeros(1)
    t = Trajectory(np.ones((1, 1)), ends, np.ones(1), {"train_loss": ends}, ("other.pt",))
    ax = draw(Surface({"x": x}, values, trajectory=t))
    assert "other.pt" in legend(ax) and not any("trajectory" in e for e in legend(ax))
    assert not [a for a in ax.texts if a.get_text() == "other.pt"]  # it would lie on the curve
    assert ax.get_ylim()[1] > 1 + 1.96 * 0.2
    many = [Surface({"x": x}, {"train_loss": x + k}) for k in range(9)]
    figure = render(many, labels=[f"run {k}" for k in range(9)])
    shown = [line for line in figure.axes[0].get_lines() if str(line.get_label())[:3] == "run"]
    assert len({line.get_color() for line in shown}) == 9


def test_on_a_line_the_trajectory_shows_the_values_of_the_checkpoints_themselves():
    t = path_of(0.1, 0.1)
    ax = draw(replace(run(), trajectory=replace(t, offsets=t.offsets[:, :1])))
    assert any(np.array_equal(p.get_ydata(), t.values["train_loss"]) for p in ax.get_lines())


# Lines


def twin_of(ax):
    (twin,) = [a for a in ax.figure.axes if a is not ax]
    return twin


def test_loss_is_left_accuracy_right_train_solid_test_dashed():
    s = run()
    ax = draw(s)
    drawn = {
        t.get_label(): (t.get_ydata(), t.is_dashed(), a)
        for a in (ax, twin_of(ax))
        for t in a.get_lines()
        if len(t.get_xdata()) == 11
    }
    for name, values in s.values.items():
        value, dashed, axes = drawn[name.replace("_", " ")]
        assert value.tolist() == values.tolist()
        assert dashed == name.startswith("test")
        assert axes is (ax if name.endswith("loss") else twin_of(ax))
    assert (ax.get_ylabel(), twin_of(ax).get_ylabel()) == ("loss", "accuracy")
    assert twin_of(ax).get_ylim() == (-3, 103)  # percent
    assert marker(ax, "*") == pytest.approx([0, 0.1])


def test_a_named_loss_is_drawn_with_its_accuracy_and_another_variable_alone():
    ax = draw(run(), "test_loss")
    assert (ax.get_ylabel(), twin_of(ax).get_ylabel()) == ("test loss", "test accuracy")
    ax = draw(run(), "test_accuracy")
    assert ax.get_ylabel() == "test accuracy" and ax.figure.axes == [ax]


@pytest.mark.parametrize("extra", [{}, {"train_loss_diff_se": 0.5}])
def test_bands_are_1_96_errors_of_the_difference_if_it_is_known(extra):
    se = {"train_loss_se": np.full(11, 0.1), **{n: np.full(11, v) for n, v in extra.items()}}
    width = 1.96 * (0.5 if extra else 0.1)
    s = Surface({"x": run().x}, {"train_loss": run()["train_loss"], **se})
    ax = draw(s, "train_loss")
    (band,) = ax.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert y.max() == pytest.approx(1.1 + width)
    assert y.min() == pytest.approx(0.1 - width)
    assert ("±1.96 s.e. vs centre" if extra else "±1.96 s.e.") in legend(ax)


def test_bands_of_two_splits_have_the_colours_of_their_lines():
    extra = {f"{split}_loss_se": np.full(11, 0.1) for split in ("train", "test")}
    ax = draw(replace(run(), values={**run().values, **extra}))
    bands = [to_rgb(c.get_facecolor()[0][:3]) for c in ax.collections]
    curves = {t.get_label(): to_rgb(t.get_color()) for t in ax.get_lines()}
    assert bands == [curves["train loss"], curves["test loss"]]
    assert len(set(bands)) == 2


def test_no_error_no_band():
    s = run()
    half = np.where(s.x < 0, np.nan, 0.1)
    ax = draw(replace(s, values={**s.values, "train_loss_se": half}), "train_loss")
    (band,) = ax.collections
    assert band.get_paths()[0].vertices[:, 0].min() == 0.0
    none = np.full(11, np.nan)
    ax = draw(replace(s, values={**s.values, "train_loss_se": none}), "train_loss")
    assert not ax.collections


def test_several_runs_share_axes_colours_tell_them_apart():
    figure = render([run(0), run(1), run(2)], labels=["A", "B", "C"], name="train_loss")
    ax, twin = figure.axes
    shown = {
        t.get_label(): t for t in ax.get_lines() if t.get_label() in "ABC" and len(t.get_label())
    }
    assert [shown[n].get_ydata().min() for n in "ABC"] == pytest.approx([0.1, 0.2, 0.3])
    assert len({t.get_color() for t in shown.values()}) == 3
    assert legend(ax)[:3] == ["A", "B", "C"]
    assert sum(len(t.get_xdata()) == 11 for t in twin.get_lines()) == 3
    assert ax.get_ylim()[0] < 0.1 and ax.get_ylim()[1] > 1.3  # one scale for all


def test_a_line_has_blanks_where_it_is_pending_and_grey_where_it_is_not_finite():
    s = run(n=21)
    value, status = s["train_loss"].copy(), np.full(21, Status.OK, np.uint8)
    status[12:], status[16] = Status.PENDING, Status.OK
    value[status == 0] = np.nan
    value[3], status[3] = np.inf, Status.NONFINITE
    ax = draw(replace(s, values={"train_loss": value}, status=status))
    (dots,) = [t for t in ax.get_lines() if t.get_marker() == "o"]
    assert dots.get_xdata().tolist() == [s.x[16]]  # a lone point is a dot, not nothing
    (span,) = ax.patches
    assert span.get_extents().transformed(ax.transData.inverted()).x0 == pytest.approx(-0.75)
    assert "8 of 21 points pending" in legend(ax)
    assert "not finite or failed" in legend(ax)


@pytest.mark.parametrize(("lift", "scale"), [(0.1, "log"), (-0.5, "function")])
def test_a_log_line_takes_all_values_into_its_axis(lift, scale):
    s = Surface({"x": run().x}, {"train_loss": run().x ** 2 + lift})
    ax = draw(s, log=True)
    assert ax.get_yscale() == scale
    assert ax.get_ylim()[0] < lift and ax.get_ylim()[1] > 1 + lift
    assert draw(s, vmax=0.4, vmin=0.2).get_ylim() == (0.2, 0.4)


# Pages


@pytest.mark.parametrize("kind", MAPS)
def test_side_by_side_is_one_scale_and_one_bar(kind):
    low, high = bowl(lift=0.1), bowl(lift=5.0)
    figure = render([low, high], kind=kind, labels=["low", "high"])
    first, second = figure.axes
    assert [first.get_title(), second.get_title()] == ["low", "high"]
    assert not first.child_axes and len(second.child_axes) == 1
    pooled = max(low["train_loss"].max(), high["train_loss"].max())
    fine = bowl(99)  # however many points another has, no map is cut off for it
    fine["train_loss"][:] /= 100
    assert pooled_scale([low, fine], "train_loss").high == low["train_loss"].max()
    if kind == "3d":
        assert first.get_zlim() == second.get_zlim() == pytest.approx((0.1, pooled))
    if kind == "heat":
        norms = [
            next(c.norm for c in a.collections if isinstance(c, QuadMesh)) for a in figure.axes
        ]
        assert {(n.vmin, n.vmax) for n in norms} == {(0.1, pooled)}
    if kind == "filled":
        sets = [
            next(c for c in a.collections if isinstance(c, QuadContourSet)) for a in figure.axes
        ]
        assert sets[0].levels.tolist() == sets[1].levels.tolist()


def test_four_maps_stand_two_by_two():
    figure = render([bowl()] * 4, labels=list("ABCD"))
    assert [a.get_title() for a in figure.axes[:4]] == list("ABCD")
    assert {a.get_subplotspec().get_gridspec().get_geometry() for a in figure.axes[:4]} == {(2, 2)}
    assert len(figure.axes) == 5  # and one bar


def test_captions_stand_once_and_say_whose_they_are():
    one = replace(bowl(), provenance={"caption": "ResNet, filter, seed 0 " + "word " * 60})
    other = replace(bowl(), provenance={"caption": "VGG"})
    text = render([one, one]).get_supxlabel()
    assert text.count("seed 0") == 1 and text.count("\n") > 1
    assert render([one, other], labels=["A", "B"]).get_supxlabel().endswith("B: VGG")
    assert draw(other).figure.get_supxlabel() == "VGG"
    assert render(bowl()).get_supxlabel() == ""


def test_no_text_is_cut_and_no_two_blocks_overlap():
    s = replace(bowl(), provenance={"caption": "word " * 80}, trajectory=path_of(2.0, 0.5, 0.1))
    for kind in FLAT:
        figure = render([s, s], kind=kind)
        figure.draw_without_rendering()
        page = figure.bbox
        caption = figure._supxlabel.get_window_extent()
        assert caption.x0 >= page.x0 and caption.x1 <= page.x1 and caption.y0 >= page.y0
        for ax in figure.axes:
            box, label = ax.get_legend().get_window_extent(), ax.xaxis.label.get_window_extent()
            assert not box.overlaps(caption) and not box.overlaps(label)
            assert box.y1 < ax.get_window_extent().y0  # covers no data


def test_files_are_what_their_suffix_says(tmp_path):
    bowl().save(tmp_path / "a.h5")
    for suffix in ("png", "pdf", "svg", "PNG"):
        render(str(tmp_path / "a.h5"), tmp_path / f"a.{suffix}", kind="heat")
    image = imread(tmp_path / "a.png")
    assert image.shape[0] > 300 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 100
    pdf = (tmp_path / "a.pdf").read_bytes()
    assert (
        pdf.startswith(b"%PDF-") and pdf.rstrip().endswith(b"%%EOF") and b"CreationDate" not in pdf
    )
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.PNG").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_equal_surfaces_give_equal_bytes(tmp_path, suffix):
    for name in "ab":
        render(bowl(), tmp_path / f"{name}.{suffix}", kind="filled", log=True)
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    target.write_bytes(b"before")

    def full(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lsweep.storage.files.os.write", full)
    with pytest.raises(LsweepError, match=r"cannot write .*a.png: No space left on device"):
        save(Figure(), target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert target.read_bytes() == b"before"
    with pytest.raises(LsweepError, match="cannot write"):
        save(Figure(), tmp_path / "nowhere" / "a.png")


def test_mistakes_are_named_before_anything_is_drawn(tmp_path):
    for attempt, message in [
        (
            lambda: render(bowl(), tmp_path / "a.jpg"),
            r"a.jpg: the suffix is one of .png, .pdf, .svg",
        ),
        (lambda: render(bowl(), tmp_path / "a"), "the suffix is one of"),
        (lambda: render([]), "no surface to render"),
        (lambda: render([bowl(), run()]), "lines and planes"),
        (lambda: render([bowl()], labels=["a", "b"]), "2 labels for 1 surfaces"),
        (lambda: render(tmp_path / "none.h5"), "no surface at"),
        (lambda: draw(bowl(), kind="fill"), "did you mean 'filled'"),
        (lambda: draw(bowl(), kind="line"), "needs a surface with one axis"),
        (lambda: draw(run(), kind="heat"), "needs a surface with two axes"),
        (lambda: draw(bowl(), "train_los"), "did you mean 'train_loss'"),
        (lambda: draw(run(), "nope"), "no variable 'nope'"),
        (lambda: draw(Surface({"x": np.zeros(1)}, {})), "holds no metric"),
        (lambda: relief(bowl(), None, Figure().add_subplot()), "projection='3d'"),
        (lambda: heat(run(), None, Figure().add_subplot()), "kind = 'line'"),
        (lambda: line(bowl(), None, Figure().add_subplot()), "one axis"),
    ]:
        with pytest.raises(LsweepError, match=message):
            attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "function"), list(KINDS.items()))
def test_each_function_takes_and_returns_its_axes(kind, function):
    s = run() if kind == "line" else bowl()
    ax = Figure().add_subplot(projection="3d" if kind == "3d" else None)
    assert function(s, None, ax) is ax
    assert draw(s, kind=kind, ax=ax) is ax
    assert {contour, filled, heat, line, relief} == set(KINDS.values())


def test_surface_plot_draws():
    assert bowl().plot(kind="heat", log=True).get_title() == "loss landscape"


def test_pictures_need_neither_torch_nor_pyplot():
    code = "import sys, lsweep.pictures.drawing\n"
    code += "print({'torch', 'matplotlib.pyplot'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# Whatever a surface holds, it is drawn, without a warning (the suite makes warnings errors)

SPIKES = np.ones((4, 5))
SPIKES[1, 2], SPIKES[3, 4] = 1e-8, 1e30
HOLES = np.full((4, 5), np.nan)
HOLES[1, 3] = 2.0
DEGENERATE = {
    "equal": np.full((4, 5), 3.0),
    "zero": np.zeros((4, 5)),
    "nan": np.full((4, 5), np.nan),
    "one finite": HOLES,
    "row": np.arange(5.0)[None, :] + 1,
    "column": np.arange(4.0)[:, None] + 1,
    "point": np.ones((1, 1)),
    "negative": -np.arange(20.0).reshape(4, 5),
    "inf": np.where(np.eye(4, 5) > 0, np.inf, 1.0 + np.arange(5.0)),
    "-inf": np.where(np.eye(4, 5) > 0, -np.inf, 1.0),
    "huge range": SPIKES,
    "overflow": np.where(np.eye(4, 5) > 0, 1.7e308, -1.7e308),
    "rounding": 1.0 + 1e-16 * np.arange(20.0).reshape(4, 5),
    "tiny": 1e-300 * (1 + np.arange(20.0).reshape(4, 5)),
    "two by two": np.array([[1.0, 2.0], [3.0, 5.0]]),
}


def small_axes(kind):
    return Figure((2, 2), dpi=40).add_subplot(projection="3d" if kind == "3d" else None)


@pytest.mark.parametrize("values", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("kind", MAPS)
def test_degenerate_planes_are_drawn(kind, values):
    ny, nx = values.shape
    axes = {"x": np.linspace(-1, 1, nx), "y": np.linspace(-1, 1, ny)}
    for log in (False, True):
        s = Surface(axes, {"train_loss": values})
        FigureCanvasAgg(draw(s, kind=kind, log=log, ax=small_axes(kind)).figure).draw()


@pytest.mark.parametrize("values", DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_lines_are_drawn(values):
    for row, log in itertools.product(values[:2], (False, True)):
        with np.errstate(over="ignore"):
            data = {"train_loss": row, "train_accuracy": row, "train_loss_se": np.abs(row) * 10}
        s = Surface({"x": np.linspace(-1, 1, len(row))}, data)
        FigureCanvasAgg(draw(s, log=log, ax=small_axes("line")).figure).draw()
