"""Pictures of measures, from a small run and its children: what is drawn is what they hold."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from tiny import SWEEP, write_sweep
from tiny import lsweep as command

import lsweep
from lsweep.derivatives.spectrum import width
from lsweep.errors import LsweepError
from lsweep.measures.convexity import convexity_ratio
from lsweep.measures.from_children import Finished, spectrum
from lsweep.measures.measures import measure_run
from lsweep.measures.persistence import persistence
from lsweep.merging.opening import open_surface
from lsweep.pictures.bending import BANDS
from lsweep.pictures.diagrams import diagram, pairs_on
from lsweep.pictures.figures import FIGURES, Missing, draw_measures, figure_of
from lsweep.pictures.marks import VERMILLION
from lsweep.pictures.profiles import height, profile
from lsweep.pictures.spectra import spectra
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Status, Surface

PLANE = SWEEP.replace("count = 3\n", "count = 9\n\n[grid.y]\nrange = [-1.0, 1.0]\ncount = 9\n")
CHILDREN = "sharpness,layers,worst,spectrum"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A plane of 9 x 9 points of a tiny network, and five of its children."""
    toml = write_sweep(tmp_path_factory.mktemp("figures"), PLANE)
    words = ("run", toml, "--on", "inline", "--device", "cpu", "--no-picture")
    assert command(*words, "--measures", CHILDREN) == 0
    folder = RunFolder(toml.with_suffix(".run"))
    problem = lsweep.Problem.from_factory(f"{toml.with_name('problem.py')}:make")
    lsweep.sweep(problem, (-1, 1, 5), (-1, 1, 5), metrics=["hessian_extremes"], splits=["train"],
                 run=folder.child("convexity").root, device="cpu")  # fmt: skip
    return folder.root


@pytest.fixture(scope="module")
def rows(run):
    """What the table says: name -> number."""
    return {r.name: r for r in measure_run(RunFolder(run)).rows}


def child(run, name):
    return Finished(name, open_surface(RunFolder(run).child(name).root), {})


def lines(ax, text=""):
    return [t for t in ax.get_lines() if str(t.get_label()).startswith(text)]


def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def caption(figure):
    return figure.get_supxlabel().replace("\n", " ")


# -- curves ----------------------------------------------------------------------------------------


def test_the_average_curve_is_the_table_with_its_band(run, rows):
    figure = figure_of([run], "sharpness")
    ax, beside = figure.axes
    (mean,) = lines(ax, "loss ")
    radii, values = mean.get_data()
    wanted = [rows[f"sharpness@{r:g}"] for r in radii]
    assert len(radii) == 10 and values == pytest.approx([w.value for w in wanted])
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    for r, w in zip(radii, wanted, strict=True):
        y = corners[corners[:, 0] == r][:, 1]
        ends = (w.value - 1.96 * w.se, w.value + 1.96 * w.se)
        assert (y.min(), y.max()) == pytest.approx(ends)
    assert len([t for t in ax.get_lines() if t.get_alpha() == 0.35]) == 10  # each direction
    assert "10 directions" in legend(ax)[0]
    assert ax.get_xscale() == ("log" if values.min() > 0 else "linear")
    assert beside.get_title().startswith("worst case within")
    assert "seed 0" in caption(figure)


def test_worst_curves_are_the_table_and_show_each_start(run, rows):
    axes = figure_of([run], "worst").axes
    for ax, unit in zip(axes, ("filter", "adaptive"), strict=True):
        for steps in ("1", "20"):
            (curve,) = [t for t in ax.get_lines() if t.get_label().endswith(f" {steps}")]
            radii, values = curve.get_data()
            wanted = [rows[f"worst_{unit}_{steps}@{r:g}"].value for r in radii]
            assert values == pytest.approx(wanted) and len(values) == 4
        assert (
            len([t for t in ax.get_lines() if t.get_marker() == "_"]) == 3
        )  # 1 step has one start


def test_runs_share_axes_and_unmatched_losses_are_said(run, tmp_path):
    other = tmp_path / "other.run"
    shutil.copytree(run, other)
    figure = figure_of([run, other], "sharpness")
    ax = figure.axes[0]
    first, second = lines(ax, "sweep, loss"), lines(ax, "other, loss")
    assert len(first) == len(second) == 1 and first[0].get_color() != second[0].get_color()
    assert "NOT matched" not in caption(figure)
    surface = child(run, "sharpness").surface
    surface = replace(surface, values={**surface.values, "train_loss": surface["train_loss"] + 3.0})
    shutil.rmtree(other)
    surface.save(tmp_path / "other.h5")
    assert "NOT matched" in caption(figure_of([run, tmp_path / "other.h5"], "sharpness"))


def test_a_child_that_is_not_done_shows_what_it_has(run, tmp_path):
    surface = child(run, "sharpness").surface
    status, loss = surface.status.copy(), surface["train_loss"].copy()
    status[7, 3], loss[7, 3] = Status.PENDING, np.nan
    loss[2, -1], status[2, -1] = np.inf, Status.NONFINITE
    partial = replace(surface, values={**surface.values, "train_loss": loss}, status=status)
    partial.save(tmp_path / "half.h5")
    figure = figure_of([tmp_path / "half.h5"], "sharpness")
    _, values = lines(figure.axes[0], "loss ")[0].get_data()
    assert np.isnan(values[-1]) and np.isfinite(values[:-1]).all()
    told = "9 of 10 directions are there; from r = 1 on some directions are not finite"
    assert told in caption(figure)


# -- the spectrum ----------------------------------------------------------------------------------


def test_the_density_is_normalised_and_its_negative_part_has_the_mass_of_the_table(run, rows):
    figure = figure_of([run], "spectrum")
    (ax,) = figure.axes
    (curve,) = lines(ax, "sweep")
    at, phi = curve.get_data()
    assert np.trapezoid(phi, at) == pytest.approx(1, abs=1e-3)
    places, weights = spectrum(child(run, "spectrum"))
    assert np.trapezoid(phi * at, at) == pytest.approx((places * weights).sum(1).mean(), rel=1e-2)
    (below,) = [c for c in ax.collections if to_hex(c.get_facecolor()[0]) == VERMILLION.lower()]
    x, y = below.get_paths()[0].vertices.T
    mass = abs(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2  # the area that is coloured
    assert mass == pytest.approx(rows["spectral_negative_mass"].value, abs=1e-3)
    assert mass > 0.01  # or the network does not test it
    single = 1 / (12 * width(places, weights) * np.sqrt(2 * np.pi))  # of its 12 eigenvalues
    assert ax.get_yscale() == "log" and ax.get_ylim()[0] == pytest.approx(0.3 * single)
    (ritz,) = lines(ax, "Ritz")
    assert sorted(ritz.get_xdata()) == pytest.approx(sorted(places[weights > 0]))
    assert "10 of 10 start vectors" in caption(figure)
    assert "±1.96 s.e. over start vectors" in legend(ax)
    assert any(t.startswith("negative: ") for t in legend(ax))


def test_a_start_vector_that_is_pending_is_left_out(run):
    done = child(run, "spectrum")
    values = {n: np.array(v) for n, v in done.surface.values.items()}
    for value in values.values():
        value[1] = np.nan
    half = Finished("spectrum", replace(done.surface, values=values), {})
    least = float(np.nanmin([v for n, v in values.items() if "ritz_" in n]))
    up = {n: v - 2 * least * ("ritz" in n and "weight" not in n) for n, v in values.items()}
    above = Finished("spectrum", replace(done.surface, values=up), {})
    ax = Figure().add_subplot()
    assert spectra([above], ["a"], ["#000000"], ax)[0].endswith("none is.")
    assert not any("negative" in t for t in legend(ax))  # a colour that occurs nowhere
    ax = Figure().add_subplot()
    assert spectra([half], ["a"], ["#000000"], ax)[0].startswith("9 of 10 start vectors")
    for value in values.values():
        value[:] = np.nan
    assert spectra([half], ["a"], ["#000000"], ax) == ["no start vector is there yet"]


# -- layers ----------------------------------------------------------------------------------------


def bars(ax):
    (found,) = [c for c in ax.containers if isinstance(c, BarContainer)]
    return {t.get_text(): b.get_width() for t, b in zip(ax.get_yticklabels(), found, strict=True)}


def test_bars_are_the_table_from_the_first_layer_down(run, rows):
    figure = figure_of([run], "layers")
    (ax,) = figure.axes
    wanted = {n: rows[f"layer_sharpness@{n}"].value for n in ("0", "2")}
    assert bars(ax) == pytest.approx(wanted) and list(bars(ax)) == ["0", "2"]
    assert ax.yaxis_inverted() and "at r = 0.5" in ax.get_xlabel()
    (whiskers,) = [c for c in ax.collections if len(c.get_segments()) == 2]
    for (start, end), name in zip(whiskers.get_segments(), ("0", "2"), strict=True):
        assert end[0] - start[0] == pytest.approx(2 * 1.96 * rows[f"layer_sharpness@{name}"].se)


@pytest.mark.parametrize("count", [3, 100])
def test_every_name_has_room_of_its_own(count):
    x, layer = np.array([-0.5, 0.0, 0.5]), np.arange(float(count))
    loss = np.einsum("z,y,x->zyx", 1 + layer, np.array([1.0, 2.0]), x**2)
    name = "encoder.layers.encoder_layer_{}.self_attention.out_proj"
    plan = {
        "evaluate": {"splits": ["train"]},
        "facts": {"layers": [name.format(i) for i in range(count)]},
    }
    axes = {"x": x, "y": np.arange(2.0), "z": layer}
    deep = Finished("layers", Surface(axes, {"train_loss": loss}, provenance={"plan": plan}), {})
    figure = Figure(figsize=(5, height([deep]) + 1), layout="constrained")
    ax = figure.add_subplot()
    profile(deep, "deep", "#000000", ax)
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.get_yticklabels()]
    assert len(boxes) == count
    assert all(a.y0 >= b.y1 - 1 for a, b in itertools.pairwise(boxes))
    assert boxes[0].x0 >= 0
    written = [ax.get_ylabel().removesuffix("…") + t.get_text() for t in ax.get_yticklabels()]
    assert written == plan["facts"]["layers"]  # none looks like another


# -- convexity -------------------------------------------------------------------------------------


def test_both_maps_hold_their_ratios_on_one_scale(run):
    figure = figure_of([run], "convexity")
    plane, whole = figure.axes
    (bar,) = whole.child_axes
    free = np.clip(convexity_ratio(open_surface(run)), 0, 1)
    full = child(run, "convexity").values("hessian_ratio")
    assert full.shape == (5, 5) and 0 < (full > 0.1).mean() < 1
    for ax, ratio in ((plane, free), (whole, full)):
        mesh = ax.collections[0]
        assert np.asarray(mesh.get_array()) == pytest.approx(ratio)
        assert list(mesh.norm.boundaries) == list(BANDS)
        assert f"{(ratio > 0.1).mean():.1%} above 0.1" in ax.get_title()
    assert plane.get_xlim() == whole.get_xlim() == pytest.approx((-1.25, 1.25))
    figure.draw_without_rendering()
    assert bar.get_window_extent().height == pytest.approx(whole.get_window_extent().height)
    assert legend(plane) == ["centre", "border: no second difference"]
    assert [t.get_text() for t in bar.get_yticklabels()] == [f"{b:g}" for b in BANDS]


def test_a_map_marks_what_did_not_converge_and_what_is_missing(run, tmp_path):
    surface = child(run, "convexity").surface
    values = {n: np.array(v) for n, v in surface.values.items()}
    status = surface.status.copy()
    values["train_hessian_max_residual"][2, 3] = 0.5
    values["train_hessian_ratio"][0, 0], status[0, 0] = np.nan, Status.PENDING
    values["train_hessian_ratio"][0, 1], status[0, 1] = np.nan, Status.FAILED
    replace(surface, values=values, status=status).save(tmp_path / "map.h5")
    figure = figure_of([tmp_path / "map.h5"], "convexity")
    ax = figure.axes[0]
    (cross,) = lines(ax, "_child")[:1]
    assert cross.get_data() == (pytest.approx([surface.x[3]]), pytest.approx([surface.y[2]]))
    assert legend(ax) == [
        "centre", "not converged (1 of 25)", "no value (1 of 25)", "pending (1 of 25)"
    ]  # fmt: skip
    assert "1 of 25 eigenvalue pairs did not converge" in caption(figure)


# -- persistence -----------------------------------------------------------------------------------


def wells():
    x = np.linspace(-1.5, 1.5, 61)
    z = (x**2 - 1) ** 2 + 0.2 * x + x[:, None] ** 2 * 3
    z[30, 40] -= 0.1  # a pit of one point, within noise
    return Surface({"x": x, "y": x}, {"train_loss": z + 0.3, "train_loss_se": 0.05 + 0 * z})


def test_the_diagram_and_the_map_show_the_pairs(tmp_path):
    s = wells()
    found = persistence(s)
    assert (found.deep, found.shallow) == (1, 1)
    s.save(tmp_path / "wells.h5")
    figure = figure_of([tmp_path / "wells.h5"], "persistence")
    plane, ax = figure.axes[:2]
    for text, pair in zip(("deep (1)", "within noise (1)"), found.pairs, strict=True):
        (dot,) = lines(ax, text)
        assert [float(v[0]) for v in dot.get_data()] == [pair.birth, pair.death]
    (band, _) = lines(ax, "noise")
    deep = found.pairs[0]
    assert band.get_data()[1] == pytest.approx([deep.birth, deep.birth + deep.noise])
    joins = [t for t in plane.get_lines() if len(t.get_xdata()) == 2]
    drawn = {tuple(map(tuple, np.transpose(t.get_data()))) for t in joins}
    assert drawn == {(p.minimum, p.saddle) for p in found.pairs}
    assert "8 neighbours to a point" in caption(figure)
    assert ax.get_xlim() == ax.get_ylim()


def test_a_line_and_a_surface_of_one_basin_are_drawn_too():
    x = np.linspace(-1, 1, 21)
    bowl = Surface({"x": x}, {"train_loss": x**2})
    ax = Figure().add_subplot()
    diagram(persistence(bowl), bowl, "train_loss", ax)
    assert ax.get_title().startswith("no basins deeper") and len(lines(ax, "never dies")) == 1
    assert pairs_on(persistence(bowl), bowl, Figure().add_subplot()) == ""
    wave = Surface({"x": x}, {"train_loss": np.cos(8 * x) + x})
    ax = Figure().add_subplot()
    found = persistence(wave)
    pairs_on(found, wave, ax)
    crosses = [t for t in ax.get_lines() if t.get_marker() == "x"]
    assert {(float(t.get_xdata()[0]), float(t.get_ydata()[0])) for t in crosses} == {
        (p.saddle[0], p.death) for p in found.pairs
    }


# -- how they are reached --------------------------------------------------------------------------


def test_all_that_is_there_is_drawn_and_what_is_not_is_left_out(run, tmp_path, capsys):
    assert command("measure", run, "--figures", "--json") == 0
    pictures = [RunFolder(run).figures / f"{kind}.png" for kind in FIGURES]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert [f"wrote {p}" for p in pictures] == capsys.readouterr().err.splitlines()
    bare = tmp_path / "bare.run"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("measures", "figures"))
    assert [p.stem for p in draw_measures(RunFolder(bare))] == ["convexity", "persistence"]
    assert "--measures convexity' computes it" in caption(figure_of([bare], "convexity"))


@pytest.mark.parametrize("kind", [k for k in FIGURES if k != "persistence"])
def test_a_child_is_drawn_from_its_own_folder_or_file(run, kind):
    folder = RunFolder(run).child(kind)
    a, b = (figure_of([source], kind) for source in (folder.root, folder.surface))
    assert [len(ax.get_children()) for ax in a.axes] == [len(ax.get_children()) for ax in b.axes]
    assert "has no" not in caption(a)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kind", "spectrum"], "has no spectrum yet: 'lsweep run {run} --measures spectrum'"),
        (["--kind", "sharpnes"], "kind = 'sharpnes'; did you mean 'sharpness'?"),
        (["--kind", "worst", "--vmin", "1"], "--kind worst takes no --vmin: leave it out"),
        (["--kind", "layers", "--points"], "takes no --points"),
        (["--kind", "persistence", "--metric", "train_los"], "did you mean 'train_loss'?"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line(run, tmp_path, capsys, arguments, told):
    bare = tmp_path / "bare.run"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("measures", "figures"))
    capsys.readouterr()
    assert command("render", bare, "-o", tmp_path / "a.png", *arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert told.format(run=bare) in line
    assert not (tmp_path / "a.png").exists()


def test_one_run_at_a_time_where_two_cannot_be_compared(run):
    with pytest.raises(LsweepError, match="--kind persistence draws one run, not 2"):
        figure_of([run, run], "persistence")
    with pytest.raises(Missing, match="holds no worst: give the run that it belongs to"):
        figure_of([RunFolder(run).surface], "worst")


def odd(value):
    x = np.linspace(-1, 1, 9)
    return Surface({"x": x, "y": x}, {"train_loss": value(*np.meshgrid(x, x))})


ODD = {
    "equal": odd(lambda x, y: 0 * x),
    "nearly too large": odd(lambda x, y: 0.9e308 * (x**2 - 0.9 * y)),
    "one value": odd(lambda x, y: np.where((x == 0) & (y == 0), 1.0, np.nan)),
    "a chessboard of gaps": odd(lambda x, y: np.where(np.rint(4 * (x + y)) % 2, np.nan, -x)),
    "of unknown error": replace(
        odd(lambda x, y: np.sin(9 * x) + y), values={
            **odd(lambda x, y: np.sin(9 * x) + y).values, "train_loss_se": np.full((9, 9), np.inf)
        }
    ),
}  # fmt: skip


@pytest.mark.parametrize("surface", ODD.values(), ids=list(ODD))
def test_odd_surfaces_are_drawn(surface, tmp_path):
    surface.save(tmp_path / "odd.h5")
    for kind in ("convexity", "persistence"):
        figure = figure_of([tmp_path / "odd.h5"], kind)
        figure.draw_without_rendering()
        assert all(np.isfinite([*ax.get_xlim(), *ax.get_ylim()]).all() for ax in figure.axes)


def test_a_surface_without_a_value_has_no_basins(tmp_path):
    odd(lambda x, y: x * np.nan).save(tmp_path / "none.h5")
    with pytest.raises(Missing, match=r"no value of train_loss in .* is finite"):
        figure_of([tmp_path / "none.h5"], "persistence")
