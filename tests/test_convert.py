"""convert, reference, vtk, npz, foreign, whole: what is written is read back by someone else."""

from __future__ import annotations

import csv
import itertools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import pyvista
import xarray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsweep.errors import DamagedFile, LsweepError
from lsweep.surfaces import npz
from lsweep.surfaces.convert import convert, read
from lsweep.surfaces.reference import (
    read_reference_directions,
    write_reference_directions,
    write_reference_surface,
)
from lsweep.surfaces.surface import Status, Surface, Trajectory

ORACLE = Path(__file__).parent / "oracle"
SURFACES = sorted(ORACLE.glob("*.surface.h5"))
DIRECTIONS = sorted(ORACLE.glob("*.directions.h5"))


def plane(nx: int = 7, ny: int = 5) -> Surface:
    """f(x, y) = x + 10 y², which no transposition and no reversal leaves as it is."""
    x, y = np.linspace(-1.0, 1.0, nx), np.linspace(-0.5, 0.5, ny)
    loss = x[None, :] + 10 * y[:, None] ** 2 + y[:, None]  # (ny, nx)
    status = np.ones((ny, nx), np.uint8)
    accuracy = 100 - np.abs(loss)
    for (j, i), value, word in [
        ((1, 2), np.nan, Status.NONFINITE),
        ((3, 6), np.inf, Status.NONFINITE),
        ((0, 5), np.nan, Status.PENDING),
    ]:
        loss[j, i], status[j, i] = value, word
    accuracy[0, 5] = np.nan
    return Surface(
        {"x": x, "y": y},
        {"train_loss": loss, "train_accuracy": accuracy},
        status,
        {
            "x": {"units": "1", "direction": "random"},
            "train_loss": {"metric": "loss", "split": "train", "units": "1"},
            "train_accuracy": {"metric": "accuracy", "split": "train", "units": "percent"},
        },
        Trajectory(
            np.ones((2, 2)), np.ones(2), np.zeros(2), {"train_loss": np.ones(2)}, ("a", "b")
        ),
        {"plan": {"seed": 3}, "machine": "here"},
        "a title",
        "a history",
    )


def line(n: int = 6) -> Surface:
    x = np.linspace(-1.0, 1.0, n)
    return Surface({"x": x}, {"train_loss": np.where(x == x[2], np.nan, x**2 + x)})


def block() -> Surface:
    axes = {"x": np.arange(4.0), "y": np.arange(3.0) / 10, "z": np.arange(2.0) / 100}
    z, y, x = np.meshgrid(axes["z"], axes["y"], axes["x"], indexing="ij")
    return Surface(axes, {"train_loss": x + y + z})


def same(a: Surface, b: Surface) -> None:
    for left, right in [(a.axes, b.axes), (a.values, b.values)]:
        assert list(left) == list(right)
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], strict=True)
    np.testing.assert_array_equal(a.status, b.status, strict=True)


# --- ParaView -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".vts", ".vtp"])
def test_a_plane_in_paraview_has_the_points_the_order_and_the_values(suffix: str, tmp_path: Path):
    s = plane()
    assert convert(s, tmp_path / f"s{suffix}").endswith("7 x 5 points, height train_loss")
    grid = pyvista.read(tmp_path / f"s{suffix}")

    assert grid.n_points == 35
    for k, (j, i) in enumerate(itertools.product(range(5), range(7))):
        loss = s["train_loss"][j, i]
        height = loss if np.isfinite(loss) else np.nan
        np.testing.assert_array_equal(grid.points[k], [s.x[i], s.y[j], height])
        np.testing.assert_array_equal(grid.point_data["train_loss"][k], loss)
        assert grid.point_data["status"][k] == s.status[j, i]
    np.testing.assert_array_equal(
        grid.point_data["train_accuracy"], s["train_accuracy"].ravel(), strict=True
    )
    assert grid.point_data["train_loss"].dtype == np.float64
    assert grid.active_scalars_name == "zvalue"


def test_a_structured_grid_has_the_dimensions_and_hides_what_has_no_height(tmp_path: Path):
    convert(plane(), tmp_path / "s.vts")
    grid = pyvista.read(tmp_path / "s.vts")
    assert isinstance(grid, pyvista.StructuredGrid)
    assert grid.dimensions == (7, 5, 1)
    hidden = np.flatnonzero(grid.point_data["vtkGhostType"])
    np.testing.assert_array_equal(hidden, [5, 1 * 7 + 2, 3 * 7 + 6])
    assert np.isfinite(grid.bounds).all()


def test_quadrilaterals_are_the_squares_of_the_lattice_without_the_holes(tmp_path: Path):
    convert(plane(), tmp_path / "s.vtp")
    sheet = pyvista.read(tmp_path / "s.vtp")
    quads = {tuple(q) for q in sheet.faces.reshape(-1, 5)[:, 1:].tolist()}
    holes = {5, 9, 27}
    everything = {(k, k + 1, k + 8, k + 7) for k in (j * 7 + i for j in range(4) for i in range(6))}
    assert quads == {q for q in everything if not holes & set(q)}
    assert np.isfinite(sheet.bounds).all()


def test_the_projected_area_of_a_full_plane_is_the_area_of_its_range(tmp_path: Path):
    s = Surface({"x": np.linspace(-1, 1, 4), "y": np.linspace(0, 3, 9)}, {"a": np.zeros((9, 4))})
    convert(s, tmp_path / "s.vtp")
    convert(s, tmp_path / "s.vts")
    assert pyvista.read(tmp_path / "s.vtp").area == pytest.approx(6.0)
    assert pyvista.read(tmp_path / "s.vts").area == pytest.approx(6.0)


def test_a_line_in_paraview_breaks_where_it_has_no_value(tmp_path: Path):
    s = line()
    convert(s, tmp_path / "s.vtp")
    got = pyvista.read(tmp_path / "s.vtp")
    np.testing.assert_array_equal(got.points, np.c_[s.x, np.zeros(6), s["train_loss"]])
    assert got.lines.reshape(-1, 3)[:, 1:].tolist() == [[0, 1], [3, 4], [4, 5]]
    convert(s, tmp_path / "s.vts")
    assert pyvista.read(tmp_path / "s.vts").dimensions == (6, 1, 1)


def test_three_axes_are_a_block(tmp_path: Path):
    s = block()
    convert(s, tmp_path / "s.vts")
    grid = pyvista.read(tmp_path / "s.vts")
    assert grid.dimensions == (4, 3, 2)
    # The coordinates were chosen so that their sum is the value.
    np.testing.assert_allclose(grid.points.sum(axis=1), grid.point_data["train_loss"])
    with pytest.raises(LsweepError, match=r"three axes: write \.vts"):
        convert(s, tmp_path / "s.vtp")


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ([1.0, np.e, np.nan], [0.0, 1.0, np.nan]),  # all positive: ln
        # L0 = -1 at the centre, s = median(1, 0, 3) = 1
        ([0.0, -1.0, 2.0], [np.arcsinh(1.0), 0.0, np.arcsinh(3.0)]),
        ([-2.0, -2.0, -2.0], [0.0, 0.0, 0.0]),  # flat: no scale to divide by
        ([1e308, -1e308, 1e308], [np.inf, 0.0, np.inf]),  # a difference beyond float64
    ],
)
def test_log_height(loss: list[float], expected: list[float], tmp_path: Path):
    s = Surface({"x": np.array([-1.0, 0.0, 1.0])}, {"train_loss": np.array(loss)})
    assert "(log scale)" in convert(s, tmp_path / "s.vts", log=True)
    grid = pyvista.read(tmp_path / "s.vts")
    if np.isfinite(expected).all() or np.isnan(expected).any():
        np.testing.assert_allclose(grid.points[:, 2], expected, rtol=1e-15)
    np.testing.assert_array_equal(grid.point_data["train_loss"], loss)


def test_the_height_is_the_named_metric_or_the_first(tmp_path: Path):
    assert "height train_accuracy" in convert(plane(), tmp_path / "s.vts", name="train_accuracy")
    other = Surface({"x": np.arange(2.0)}, {"test_loss": np.arange(2.0)})
    assert "height test_loss" in convert(other, tmp_path / "s.vts")
    with pytest.raises(LsweepError, match=r"no variable 'trian_loss'.*did you mean 'train_loss'"):
        convert(plane(), tmp_path / "t.vts", name="trian_loss")
    with pytest.raises(LsweepError, match="no variable to draw"):
        convert(Surface({"x": np.arange(2.0)}, {}), tmp_path / "t.vts")
    with pytest.raises(LsweepError, match="log scale are for"):
        convert(plane(), tmp_path / "t.csv", log=True)
    assert not list(tmp_path.glob("t.*"))


# --- the reference implementation's files -------------------------------------------------------


@pytest.mark.parametrize("path", SURFACES, ids=lambda p: p.name)
def test_reference_surfaces_come_and_go_unchanged(path: Path, tmp_path: Path):
    convert(path, tmp_path / "ours.h5")
    convert(tmp_path / "ours.h5", tmp_path / "theirs.h5")
    ours = Surface.load(tmp_path / "ours.h5")
    with h5py.File(path) as before, h5py.File(tmp_path / "theirs.h5") as after:
        assert set(before) == set(after)
        for name in before:
            if name == "dir_file":
                assert before[name][()] == after[name][()]
            else:
                np.testing.assert_array_equal(before[name][()], after[name][()], strict=True)
        # row = y, column = x, by the oracle's README
        np.testing.assert_array_equal(ours["train_loss"], before["train_loss"][()])
        np.testing.assert_array_equal(ours.x, before["xcoordinates"][()])
    finite = np.isfinite(ours["train_loss"])
    np.testing.assert_array_equal(ours.status == Status.OK, finite)
    np.testing.assert_array_equal(ours.status == Status.NONFINITE, ~finite)
    assert ours.provenance["reference"]["file"] == path.name


def test_the_oracle_is_complete():
    assert len(SURFACES) == len(DIRECTIONS) == 6


def as_the_reference_writes(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """Declared (nx, ny), filled at the flat indices of ``np.meshgrid(x, y)``, one never filled."""
    xs, ys = np.meshgrid(x, y)
    losses, accuracies = -np.ones((len(x), len(y))), -np.ones((len(x), len(y)))
    for k, (a, b) in enumerate(zip(xs.ravel(), ys.ravel(), strict=True)):
        if k != 4:
            losses.ravel()[k] = np.nan if k == 1 else a + 10 * b
            accuracies.ravel()[k] = 50 + a
    with h5py.File(path, "w") as f:
        f["dir_file"] = "[d].h5"
        f["xcoordinates"], f["ycoordinates"] = x, y
        f["train_loss"], f["train_acc"] = losses, accuracies
        f["test_loss"] = 2 * losses.reshape(len(y), len(x))  # as a mended writer would


def test_a_non_square_reference_file_is_unscrambled(tmp_path: Path):
    x, y = np.array([0.0, 1.0, 2.0]), np.array([0.0, 0.1])
    as_the_reference_writes(tmp_path / "r.h5", x, y)
    s = read(tmp_path / "r.h5")
    np.testing.assert_array_equal(s["train_loss"], [[0, np.nan, 2], [1, np.nan, 3]])
    np.testing.assert_array_equal(s["train_accuracy"], [[50, 51, 52], [50, np.nan, 52]])
    np.testing.assert_array_equal(s.status, [[1, 2, 1], [1, 0, 1]])
    np.testing.assert_array_equal(s["test_loss"], [[0, np.nan, 4], [2, -2, 6]])
    # Through every other format, pending and NaN stay what they are.
    convert(tmp_path / "r.h5", tmp_path / "r.npz")
    convert(tmp_path / "r.npz", tmp_path / "ours.h5")
    convert(tmp_path / "ours.h5", tmp_path / "theirs.h5")
    same(s, read(tmp_path / "theirs.h5"))
    with h5py.File(tmp_path / "theirs.h5") as f:
        assert f["train_loss"].shape == (2, 3)
        assert f["train_loss"][1, 1] == -1
        assert f["train_acc"][1, 1] == -1
        assert f["dir_file"][()] == b"[d].h5"


def test_hessian_files_have_their_own_sign_of_pending(tmp_path: Path):
    with h5py.File(tmp_path / "r.h5", "w") as f:
        f["xcoordinates"] = np.arange(3.0)
        f["min_eig"], f["max_eig"] = [-1.0, -0.5, 1.0], [4.0, 5.0, -1.0]
    s = read(tmp_path / "r.h5")
    np.testing.assert_array_equal(s["min_eig"], [-1.0, -0.5, np.nan])
    np.testing.assert_array_equal(s["max_eig"], [4.0, 5.0, np.nan])
    assert s.status.tolist() == [1, 1, 0]
    write_reference_surface(s, tmp_path / "again.h5")
    with h5py.File(tmp_path / "again.h5") as f:
        assert f["min_eig"][()].tolist() == [-1.0, -0.5, 1.0]
        assert f["max_eig"][()].tolist() == [4.0, 5.0, -1.0]


def test_what_the_reference_format_cannot_hold_is_said(tmp_path: Path):
    s = Surface(
        {"x": np.arange(3.0)},
        {"train_loss": np.array([1.0, np.nan, 2.0]), "train_loss_se": np.ones(3)},
        np.array([1, 3, 1], np.uint8),
    )
    said = convert(s, tmp_path / "r.h5")
    assert "no place in it for train_loss_se; failed, so NaN in it: 1" in said
    with pytest.raises(LsweepError, match="no third axis"):
        convert(block(), tmp_path / "b.h5")
    with pytest.raises(LsweepError, match="this surface only weight_sq"):
        convert(Surface({"x": np.arange(2.0)}, {"weight_sq": np.ones(2)}), tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_a_value_beside_a_pending_metric_is_kept(tmp_path: Path):
    s = Surface(
        {"x": np.arange(2.0)},
        {"train_loss": np.array([1.0, 2.0]), "train_accuracy": np.array([90.0, np.nan])},
        np.array([1, 0], np.uint8),
    )
    convert(s, tmp_path / "r.h5")
    same(s, read(tmp_path / "r.h5"))


@pytest.mark.parametrize("path", DIRECTIONS, ids=lambda p: p.name)
def test_directions_come_and_go_unchanged_in_numeric_order(path: Path, tmp_path: Path):
    directions = read_reference_directions(path)
    with h5py.File(path) as f:
        assert [f"{a}direction" for a in directions] == sorted(f)
        for axis, tensors in directions.items():
            assert len(tensors) == len(f[f"{axis}direction"])
            for i, tensor in enumerate(tensors):
                stored = np.asarray(f[f"{axis}direction/{i}"][()])
                np.testing.assert_array_equal(tensor, stored, strict=True)
    assert "tensors each" in convert(path, tmp_path / "d.npz")
    convert(tmp_path / "d.npz", tmp_path / "d.h5")
    again = read_reference_directions(tmp_path / "d.h5")
    assert list(again) == list(directions)
    for tensor, other in zip(
        itertools.chain(*directions.values()), itertools.chain(*again.values()), strict=True
    ):
        np.testing.assert_array_equal(tensor, other, strict=True)


def test_large_and_empty_arrays_come_back_too(tmp_path: Path):
    x, y = np.linspace(-1, 1, 150), np.linspace(-1, 1, 100)
    s = Surface({"x": x, "y": y}, {"train_loss": np.random.default_rng(0).random((100, 150))})
    convert(s, tmp_path / "r.h5")
    same(s, read(tmp_path / "r.h5"))
    tensors = [np.ones((0, 3)), np.random.default_rng(1).random((300, 100)), np.arange(9000)]
    write_reference_directions(tmp_path / "d.h5", {"x": tensors})
    for before, after in zip(
        tensors, read_reference_directions(tmp_path / "d.h5")["x"], strict=True
    ):
        np.testing.assert_array_equal(before, after, strict=True)


def test_odd_names_do_not_hurt(tmp_path: Path):
    source = tmp_path / os.fsdecode(b"d\xff\n.h5")
    with h5py.File(tmp_path / "r.h5", "w") as f:
        f["xcoordinates"] = f["train_loss"] = np.arange(3.0)
        f["dir_file"] = np.bytes_(b"a\0b\xff")
    (tmp_path / "r.h5").rename(source)
    convert(source, tmp_path / "ours.h5")
    convert(tmp_path / "ours.h5", tmp_path / os.fsdecode(b"theirs\xff.h5"))
    assert read(tmp_path / os.fsdecode(b"theirs\xff.h5"))["train_loss"].tolist() == [0, 1, 2]
    assert r"d\udcff\n.h5" in Surface.load(tmp_path / "ours.h5").title
    with h5py.File(tmp_path / "odd.h5", "w") as f:
        f[b"x\xff\nx"] = 1.0
    with pytest.raises(DamagedFile, match=r"it holds x\\xff\\nx$"):
        read(tmp_path / "odd.h5")


def test_twelve_tensors_are_not_read_as_0_1_10_11_2(tmp_path: Path):
    write_reference_directions(tmp_path / "d.h5", {"x": [np.full(2, i) for i in range(12)]})
    got = read_reference_directions(tmp_path / "d.h5")["x"]
    assert [int(t[0]) for t in got] == list(range(12))


def test_the_extra_arrays_of_a_pca_file_are_no_tensors(tmp_path: Path):
    with h5py.File(tmp_path / "directions.h5", "w") as f:
        f["xdirection/0"] = f["ydirection/0"] = np.ones(3)
        f["explained_variance_ratio_"] = np.array([0.9, 0.1])
    assert {
        a: len(t) for a, t in read_reference_directions(tmp_path / "directions.h5").items()
    } == {
        "x": 1,
        "y": 1,
    }


# --- bad input ----------------------------------------------------------------------------------


def damaged(path: Path, what: str) -> None:
    """Write one of the ways in which a file is not what it seems."""
    with h5py.File(path, "w") as f:
        f["xcoordinates"] = np.arange(3.0)
        match what:
            case "values missing":
                pass
            case "shape":
                f["train_loss"] = np.ones(4)
            case "text":
                f["train_loss"] = "three"
            case "group":
                f.create_group("train_loss")
            case "coordinates":
                del f["xcoordinates"]
                f["xcoordinates"] = np.array([0.0, np.nan, 1.0])
                f["train_loss"] = np.ones(3)
            case "link":
                with h5py.File(path.with_name("secret.h5"), "w") as g:
                    g["train_loss"] = np.ones(3)
                f["train_loss"] = h5py.ExternalLink("secret.h5", "train_loss")
            case "raw":
                path.with_name("secret").write_bytes(bytes(24))
                f.create_dataset("train_loss", (3,), "f8", external=str(path.with_name("secret")))
            case "name":
                f["train_loss"] = np.ones(3)
                f["dir_file"] = np.ones((2, 2))
            case "dangling":
                f["train_loss"] = h5py.SoftLink("/nowhere")
            case "huge":
                f.create_dataset("train_loss", (1 << 40,), "f8", chunks=(1 << 20,))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("values missing", "has coordinates but no values"),
        ("shape", r"train_loss has shape \(4,\), the coordinates say \(3,\)"),
        ("text", "train_loss is not an array of numbers"),
        ("group", "train_loss is not an array of numbers"),
        ("coordinates", "xcoordinates is not a row of finite numbers"),
        ("link", "points to another file"),
        ("raw", "points to another file"),
        ("name", "dir_file is not a text"),
        ("dangling", "is damaged or not HDF5"),
        ("huge", "train_loss claims 8796093022208 bytes"),
    ],
)
def test_a_wrong_reference_surface_is_one_line(what: str, message: str, tmp_path: Path):
    damaged(tmp_path / "r.h5", what)
    with pytest.raises(DamagedFile, match=message) as e:
        convert(tmp_path / "r.h5", tmp_path / "s.h5")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "s.h5").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"xdirection/0": [1.0], "xdirection/2": [1.0]}, "should hold 0 to 1, gap or extra at 1"),
        ({"xdirection/0": [1.0], "xdirection/weight": [1.0]}, "gap or extra at 1"),
        ({"xdirection/00": [1.0]}, "gap or extra at 0"),
        ({"xdirection": None}, "xdirection is empty"),
        ({"xdirection": [1.0]}, "not a group"),
        ({"ydirection/0": [1.0]}, "no group xdirection"),
        ({"xdirection/0": [1.0], "ydirection/0": [1.0, 2.0]}, "differ in number or shape"),
        ({"xdirection/0": [np.nan]}, "holds NaN"),
        ({"xdirection/0": "weights"}, "not an array of numbers"),
        ({"proj_xcoord": [1.0]}, "it holds proj_xcoord"),
        ({}, "it holds nothing"),
    ],
)
def test_a_wrong_direction_file_is_one_line(content: dict, message: str, tmp_path: Path):
    with h5py.File(tmp_path / "d.h5", "w") as f:
        for name, value in content.items():
            if value is None:
                f.create_group(name)
            else:
                f[name] = value
    with pytest.raises(DamagedFile, match=message):
        convert(tmp_path / "d.h5", tmp_path / "d.npz")


@pytest.mark.parametrize(
    "directions",
    [{}, {"y": [np.ones(2)]}, {"x": []}, {"x": [np.array(["a"])]}, {"x": [1.0], "z": [1.0]}],
)
def test_directions_that_the_format_cannot_hold(directions: dict, tmp_path: Path):
    with pytest.raises(LsweepError):
        write_reference_directions(tmp_path / "d.h5", directions)
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_there_or_not_data(tmp_path: Path):
    good = ORACLE / "filter_1d.surface.h5"
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "empty.h5").touch()
    (tmp_path / "zip.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    np.savez(tmp_path / "plain.npz", a=np.ones(3))
    os.mkfifo(tmp_path / "pipe.h5")
    for source, message in [
        (tmp_path / "none.h5", "no file"),
        (tmp_path / "nul\0.h5", "no file"),
        (tmp_path / ("n" * 300), "name too long"),
        (tmp_path / "pipe.h5", "no file"),
        (tmp_path, "is a folder"),
        (tmp_path / "text.h5", "damaged or not HDF5"),
        (tmp_path / "empty.h5", "damaged or not HDF5"),
        (tmp_path / "zip.npz", "not an .npz of lsweep"),
        (tmp_path / "plain.npz", "no 'lsweep' in it"),
    ]:
        with pytest.raises(LsweepError, match=message):
            convert(source, tmp_path / "out.csv")
    for target, message in [
        ("out.png", r"suffix must be one of \.h5"),
        ("out", "suffix must be"),
        ("nowhere/out.csv", "No such file"),
        ("nul\0.csv", "null"),
    ]:
        with pytest.raises(LsweepError, match=message):
            convert(good, tmp_path / target)
    with pytest.raises(LsweepError, match="directions go to"):
        convert(DIRECTIONS[0], tmp_path / "out.vts")
    with pytest.raises(LsweepError, match="holds directions, not a surface"):
        read(DIRECTIONS[0])
    (tmp_path / "copy.h5").write_bytes(good.read_bytes())
    with pytest.raises(LsweepError, match="is the source"):
        convert(tmp_path / "copy.h5", tmp_path / "copy.h5")
    assert (tmp_path / "copy.h5").read_bytes() == good.read_bytes()


# --- csv, npz, netCDF ---------------------------------------------------------------------------


@pytest.mark.parametrize("surface", [plane(), line(), block()], ids=["plane", "line", "block"])
def test_csv_holds_every_bit(surface: Surface, tmp_path: Path):
    convert(surface, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == [*surface.axes, *surface, "status"]
    for k, index in enumerate(np.ndindex(surface.shape)):
        for axis, i in zip(surface.dimensions, index, strict=True):
            assert float(rows[k][axis]) == surface.axes[axis][i]
        for name in surface:
            np.testing.assert_array_equal(float(rows[k][name]), surface[name][index])
        assert rows[k]["status"] == Status(surface.status[index]).name.lower()


@pytest.mark.parametrize("surface", [plane(), line(), block()], ids=["plane", "line", "block"])
def test_npz_holds_everything(surface: Surface, tmp_path: Path):
    convert(surface, tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as z:
        np.testing.assert_array_equal(z["x"], surface.x)
        np.testing.assert_array_equal(z["train_loss"], surface["train_loss"])
        np.testing.assert_array_equal(z["status"], surface.status)
    surface.save(tmp_path / "direct.h5")
    convert(tmp_path / "s.npz", tmp_path / "through.h5")
    assert (tmp_path / "through.h5").read_bytes() == (tmp_path / "direct.h5").read_bytes()


def test_equal_surfaces_make_equal_files(tmp_path: Path):
    for suffix in (".npz", ".vts", ".vtp", ".csv", ".h5"):
        for stem in ("a", "b"):
            convert(plane(), tmp_path / f"{stem}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_xarray_opens_a_surface_with_coordinates_and_units(tmp_path: Path):
    s = plane()
    s.save(tmp_path / "surface.h5")
    with xarray.open_dataset(tmp_path / "surface.h5", engine="h5netcdf") as d:
        assert d["train_loss"].dims == ("y", "x")
        np.testing.assert_array_equal(d["x"], s.x)
        np.testing.assert_array_equal(d["y"], s.y)
        np.testing.assert_array_equal(d["train_loss"], s["train_loss"])
        assert d["x"].attrs["units"] == d["y"].attrs["units"] == "1"
        assert d["train_accuracy"].attrs["units"] == "percent"
        assert float(d["train_loss"].sel(x=s.x[3], y=s.y[4])) == s["train_loss"][4, 3]


# --- whole or absent ----------------------------------------------------------------------------


def test_files_get_the_permissions_of_the_umask(tmp_path: Path):
    convert(line(), tmp_path / "s.csv")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "s.csv").stat().st_mode) == 0o666 & ~mask


FULL_DISK = """
import resource, sys
from lsweep.surfaces.convert import convert
from lsweep.errors import LsweepError
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
for target in sys.argv[2:]:
    try:
        print("wrote", convert(sys.argv[1], target))
    except LsweepError as e:
        print(e)
"""


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path):
    surface, directions, out = tmp_path / "s.npz", tmp_path / "d.npz", tmp_path / "out"
    convert(plane(20, 10), surface)
    convert(DIRECTIONS[0], directions)
    out.mkdir()
    (out / "old.vtp").write_text("old")
    targets = [str(out / n) for n in ("s.vts", "old.vtp", "s.csv", "s.npz")]
    done = run(FULL_DISK, str(surface), *targets)
    assert done.stdout.splitlines() == [f"cannot write {t}: File too large" for t in targets]
    done = run(FULL_DISK, str(directions), str(out / "d.h5"))
    assert done.stdout == f"cannot write {out / 'd.h5'}: File too large\n", done.stderr
    surface = tmp_path / "ours.h5"
    plane(20, 10).save(surface)
    done = run(FULL_DISK, str(surface), str(out / "r.h5"))
    assert done.stdout == f"cannot write {out / 'r.h5'}: File too large\n", done.stderr
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("old.vtp", "old")]


# --- no torch, no surprise ----------------------------------------------------------------------


def run(code: str, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_converting_imports_neither_torch_nor_matplotlib():
    done = run(
        "import sys, lsweep.surfaces.convert\n"
        "print({'torch', 'matplotlib', 'xarray'} & {*sys.modules})"
    )
    assert done.stdout.strip() == "set()", done.stderr


# HDF5 is C that reads untrusted bytes: a crash or a hang must fail the test, not end it.
FUZZ = """
import json, sys
from pathlib import Path
import numpy as np
from lsweep.surfaces.convert import convert, read
from lsweep.errors import LsweepError
from lsweep.surfaces.reference import read_reference_directions
kind, source, folder, cases = json.load(sys.stdin)
original = Path(source).read_bytes()
truth = read_reference_directions(source)["x"] if kind == "directions" else read(source)
damaged, target = Path(folder, "damaged"), Path(folder, "out.npz")
for number, case in enumerate(cases):
    print(number, end=" ", flush=True)
    if "bytes" in case:
        raw = bytes.fromhex(case["bytes"])
    else:
        raw = bytearray(original[: int(case["keep"] * len(original))])
        for where, bit in case["flips"]:
            if raw:
                raw[int(where * len(raw))] ^= 1 << bit
    damaged.write_bytes(raw)
    try:
        if kind == "directions":
            got = read_reference_directions(damaged)["x"]
            assert all(np.isfinite(t).all() for t in got)
            continue
        convert(damaged, target)
        s = read(damaged)
    except LsweepError as e:
        assert str(e) and "\\n" not in str(e), repr(e)
        continue
    if kind == "foreign":  # no checksums: altered numbers pass, but only as a proper surface
        assert all(np.isfinite(c).all() for c in s.axes.values())
        assert all(v.shape == s.shape for v in s.values.values())
        continue
    # Checksummed: what can be read is the truth.
    assert list(s.axes) == list(truth.axes) and list(s) == list(truth)
    for a, b in [(s.axes, truth.axes), (s.values, truth.values)]:
        assert all(np.array_equal(a[n], b[n], equal_nan=True) for n in a)
    assert (s.status == truth.status).all()
print("done")
"""

fraction = st.floats(0, 1, exclude_max=True)
flips = st.lists(st.tuples(fraction, st.integers(0, 7)), min_size=1, max_size=4)
damages = st.one_of(
    st.builds(lambda f: {"keep": 1.0, "flips": f}, flips),
    st.builds(lambda k: {"keep": k, "flips": []}, fraction),
    st.builds(lambda b: {"bytes": b.hex()}, st.binary(max_size=200)),
    st.builds(lambda b: {"bytes": (b"\x89HDF\r\n\x1a\n" + b).hex()}, st.binary(max_size=200)),
)


@pytest.mark.parametrize("kind", ["foreign", "written", "surface", "npz", "directions"])
@settings(
    max_examples=3,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
@given(cases=st.lists(damages, min_size=60, max_size=120))
def test_damage_gives_an_error_or_the_truth(kind: str, cases: list, tmp_path: Path):
    source = tmp_path / f"{kind}.file"
    match kind:
        case "foreign":
            as_the_reference_writes(source, np.arange(3.0), np.arange(2.0))
        case "written":
            write_reference_surface(plane(), source)
        case "surface":
            plane().save(source)
        case "npz":
            source.write_bytes(npz.pack(plane()))
        case "directions":
            source.write_bytes((ORACLE / "filter_1d.directions.h5").read_bytes())
    done = run(FUZZ, text=json.dumps([kind, str(source), str(tmp_path), cases]))
    *numbers, last = done.stdout.split() or [""]
    assert (done.returncode, last) == (0, "done"), (done.stderr, numbers and cases[int(last)])
