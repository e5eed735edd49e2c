"""Measures by command: exact on a quadratic, children like any run, nothing from what is not done.

The problem: f = u·a + v·b over two layers of one filter each, and the loss ½ s f², so that over
θ = (u, v) it is ½ θᵀHθ with H = mean of s (a,b)(a,b)ᵀ, of both signs, at every point.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from pathlib import Path

import cases
import numpy as np
import pytest
import tiny
import torch
from scipy import stats

import lsweep
from lsweep.axes.noise import random_tensor
from lsweep.measures import sheet
from lsweep.measures.from_children import Finished, rows_of, student_95
from lsweep.measures.from_surface import rows_of_plane
from lsweep.measures.measures import Report, compared, measure_run
from lsweep.outcomes.measured import Measured, mean_of
from lsweep.plans.children import CHILDREN, TRACES, settings_for
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.plans.settings import Settings
from lsweep.runs.verify import verify
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Status, Surface

PROBLEM = """\
import numpy as np
import torch
from torch import nn

import lsweep


class Pair(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.a = nn.Linear(2, 1, bias=False).double()
        self.b = nn.Linear(4, 1, bias=False).double()
        self.a.weight.data = numbers(1, 2)
        self.b.weight.data = numbers(1, 4)

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def half_square(output, target):
    return 0.5 * target * output.squeeze(1) ** 2


def make(scale=1.0):
    def numbers(*shape, seed=0):
        noise = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
        return torch.from_numpy(noise)

    x, s = numbers(9, 6, seed=3), scale * (numbers(9, seed=5) + 0.3)
    data = {"train": (x, s), "test": (x[:5], s[:5])}
    return lsweep.Problem(Pair(numbers), data, loss=half_square)
"""
SWEEP = """\
[problem]
factory = "problem.py:make"

[grid.x]
range = [-1.0, 1.0]
count = 5
[grid.y]
range = [-1.0, 1.0]
count = 5

[evaluate]
splits = ["train", "test"]
precision = "float64"
"""
RADII = np.arange(1, 11) / 10


def measured(run: Path) -> dict[str, Measured]:
    return {row.name: row for row in measure_run(RunFolder(run)).rows}


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    return tiny.write_sweep(tmp_path_factory.mktemp("quadratic"), SWEEP, PROBLEM)


@pytest.fixture(scope="module")
def run(toml: Path) -> Path:
    """A run with every child that needs no other network."""
    names = ",".join(c.name for c in CHILDREN.values() if not c.needs)
    done = cases.command("run", toml, "--on", "inline", "--measures", names, "--no-picture")
    assert done.code == 0, done.err
    return toml.with_name("sweep.run")


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[str, Measured]:
    return measured(run)


@pytest.fixture(scope="module")
def problem(toml: Path) -> lsweep.Problem:
    return lsweep.Problem.from_factory(f"{toml.parent / 'problem.py'}:make")


@pytest.fixture(scope="module")
def hessian(problem: lsweep.Problem) -> np.ndarray:
    x, s = (t.numpy() for t in problem.data["train"])
    return (x * s[:, None]).T @ x / len(x)


@pytest.fixture(scope="module")
def weights(problem: lsweep.Problem) -> dict[str, np.ndarray]:
    return {n: p.detach().numpy()[0] for n, p in problem.model.named_parameters()}


def direction(weights: dict[str, np.ndarray], replicate: int) -> np.ndarray:
    """The filter-normalised random direction of one replicate, each layer a filter."""
    key = f"x.{replicate}" if replicate else "x"
    noise = {n: random_tensor(0, key, n, torch.from_numpy(w)).numpy() for n, w in weights.items()}
    lengths = {n: np.linalg.norm(w) / np.linalg.norm(noise[n]) for n, w in weights.items()}
    return np.concatenate([noise[n] * lengths[n] for n in weights])


def scales(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.full(w.size, np.linalg.norm(w) / w.size**0.5)
                           for w in weights.values()])  # fmt: skip


# -- exact -----------------------------------------------------------------------------------------


def test_sharpness_is_half_r_squared_times_the_curvature_along_each_direction(
    rows, hessian, weights
):
    bent = np.array([d @ hessian @ d for d in (direction(weights, k) for k in range(10))])
    for radius in RADII:
        row = rows[f"sharpness@{radius:g}"]
        assert row.value == pytest.approx(radius**2 / 2 * bent.mean(), rel=1e-9)
        assert row.se == pytest.approx(radius**2 / 2 * bent.std(ddof=1) / 10**0.5, rel=1e-9)
        assert (row.replicate, row.context["replicates"]) == ("directions", 10)
        assert row.context["radius"] == pytest.approx(radius)
        assert 0 < row.context["samples_se"] < 10
    assert "direction_curvature@0.1" not in rows  # so far out it is no curvature as a rule
    found = rows["direction_curvature@0.005"]  # the same directions, and ten more
    bent = np.array([d @ hessian @ d for d in (direction(weights, k) for k in range(20))])
    assert found.value == pytest.approx(bent.mean(), rel=1e-6)
    d = scales(weights)
    trace, along = rows["filter_hessian_trace"], (d * np.diag(hessian) * d).sum()
    assert abs(trace.value - along) < 4 * trace.se  # E[dᵀHd] = Σ ‖w_f‖²/n_f tr H_ff
    assert abs(found.value - along) < 4 * found.se
    assert "cannot be told from filter_hessian_trace" in found.note  # by 20 directions


def test_one_layer_at_a_time_sees_its_own_block(rows, hessian, weights):
    for layer, block in (("a", slice(0, 2)), ("b", slice(2, 6))):
        parts = [direction(weights, k)[block] for k in range(5)]
        expected, se = mean_of([0.125 * p @ hessian[block, block] @ p for p in parts])
        row = rows[f"layer_sharpness@{layer}"]
        assert (row.value, row.se) == pytest.approx((expected, se), rel=1e-9)


def test_the_whole_hessian(rows, hessian, weights):
    d = scales(weights)
    for prefix, h in (("", hessian), ("filter_", d[:, None] * hessian * d)):
        low, *_, high = np.linalg.eigvalsh(h)
        assert low < 0 < high
        assert rows[f"{prefix}hessian_max"].value == pytest.approx(high, rel=1e-7)
        assert rows[f"{prefix}hessian_min"].value == pytest.approx(low, rel=1e-7)
        ratio = -low / max(high, -low)
        assert rows[f"{prefix}hessian_ratio"].value == pytest.approx(ratio, rel=1e-7)
        assert rows[f"{prefix}hessian_max"].note == ""
        assert rows[f"{prefix}hessian_max"].context["residual"] < 1e-6
        assert rows[f"{prefix}hessian_max"].context["replicates"] == 2
    assert rows["map_largest_ratio"].value == pytest.approx(rows["hessian_ratio"].value, rel=1e-6)
    assert rows["map_nonconvex_fraction"].value == 1.0  # it is the same at every point
    trace = rows["hessian_trace"]
    assert abs(trace.value - np.trace(hessian)) < 4 * trace.se
    low, high = trace.context["ci95"]
    assert high - trace.value == pytest.approx(2.045 * trace.se, rel=2e-3)  # Student's t, 29
    assert trace.value - low == pytest.approx(high - trace.value)
    spread = rows["spectral_trace"]  # 6 steps are all: each start vector gives 6·vᵀHv exactly
    assert abs(spread.value - np.trace(hessian)) < 4 * spread.se
    assert "cannot be told from hessian_trace" in spread.note
    assert 0 < rows["spectral_negative_mass"].value < 1


def test_what_else_is_known_of_a_quadratic(rows, hessian, weights):
    theta = np.concatenate(list(weights.values()))
    assert rows["train_loss"].value == pytest.approx(theta @ hessian @ theta / 2)
    assert rows["weight_norm"].value == pytest.approx(np.linalg.norm(theta))
    assert rows["input_jacobian"].value == pytest.approx(np.linalg.norm(theta))  # f is linear
    assert (rows["input_jacobian"].replicate, rows["input_jacobian"].context["samples"]) == (
        "samples", 5)  # of the test split  # fmt: skip
    for ball in ("filter", "adaptive"):
        for radius in (0.005, 0.01, 0.015, 0.02):
            one, twenty = (rows[f"worst_{ball}_{n}@{radius:g}"].value for n in (1, 20))
            assert 0 < one <= twenty * (1 + 1e-12)
    highest = max((r * direction(weights, k) @ hessian @ theta)
                  + r**2 / 2 * direction(weights, k) @ hessian @ direction(weights, k)
                  for r in (0.02, -0.02) for k in range(10))  # fmt: skip
    assert rows["worst_filter_20@0.02"].value > highest  # of ten directions on the same ball
    assert rows["keskar_sharpness"].value > 0


def test_every_number_says_what_it_was_taken_over(rows):
    for row in rows.values():
        assert row.context["train_loss"] == rows["train_loss"].value
        assert (row.se is None) or row.replicate
        if row.name != "weight_norm":
            there = {"train": 9, "test": 5}[row.context["split"]]
            assert row.context["samples"] == there
            assert (there == 5) is (row.name in ("input_jacobian", "test_loss"))
            assert (row.context["batch_norm"], row.context["precision"]) == ("eval", "float64")
            assert row.context["seed"] == 0


# -- one way for every child -----------------------------------------------------------------------


def test_a_child_is_a_run_like_any_other(run, capfd):
    child = run / "measures" / "hessian"
    assert tiny.lsweep("status", child) == 0 and "2/2 points done" in capfd.readouterr().out
    assert tiny.lsweep("verify", child) == 0 and "0 problems" in capfd.readouterr().out
    before = (child / "surface.h5").read_bytes()
    assert tiny.lsweep("merge", child) == 0 and (child / "surface.h5").read_bytes() == before
    assert tiny.lsweep("status", run) == 0
    assert "  measure hessian: complete\n" in capfd.readouterr().out
    of_the_run = verify(RunFolder(run)).checked
    assert tiny.lsweep("verify", run) == 0
    checked = int(capfd.readouterr().out.split()[0])
    each = [verify(RunFolder(run).child(n)).checked for n in RunFolder(run).all_children()]
    assert checked == of_the_run + sum(each) and len(each) == 10


def test_interrupted_children_go_on_where_they_were(tmp_path):
    toml = cases.sweep_file(tmp_path, x=3, low="-1", pause=0.5)
    arguments = (
        "run",
        toml,
        "--on",
        "inline",
        "--no-picture",
        "--measures",
        "sharpness",
        "--replicates",
        3,
    )
    first = cases.Command(*arguments)
    run = RunFolder(tmp_path / "sweep.run")
    child = run.child("sharpness")
    assert cases.wait_for(lambda: child.exists and child.all_parts())
    cases.wait_for(lambda: len(cases.evaluated(child)) >= 5)
    os.kill(first.pid, signal.SIGINT)
    done = first.wait()
    assert (done.code, "interrupted with" in done.err) == (130, True), done.err
    rows = len(cases.evaluated(child))
    assert 5 <= rows < 63
    (line,) = (m for m in measure_run(run).missing if m.startswith("sharpness:"))
    assert line == (f"sharpness: {63 - rows} of 63 points are missing: 'lsweep run {run.root} "
                    "--measures sharpness' computes them")  # fmt: skip
    assert not any(n.startswith("sharpness") for n in measured(run.root))  # none are used
    cases.hurry(run)
    second = cases.command(*arguments)
    assert second.code == 0, second.err
    assert f"sharpness: {63 - rows} of 63 points to evaluate" in second.out
    each = cases.evaluated(child)
    assert len(each) == len(set(each)) == 63
    undisturbed = cases.sweep_file(tmp_path / "again", x=3, low="-1", pause=0.0)
    whole = ("run", undisturbed, *arguments[2:])
    assert cases.command(*whole).code == 0
    other = RunFolder(tmp_path / "again" / "sweep.run").child("sharpness")
    assert cases.differences(cases.merged(child)[0], cases.merged(other)[0]) == []
    s, _ = cases.samples()  # x moves a weight of length 1 by ±r in every direction: L = s r² + t
    assert measured(run.root)["sharpness@0.5"].value == pytest.approx(s.mean() / 4, rel=1e-5)


def test_planning_that_stopped_before_the_first_round_goes_on(tmp_path):
    toml = cases.sweep_file(tmp_path, x=3, low="-1")
    names = ("--measures", "sharpness,curvature", "--replicates", "3")
    assert cases.command("plan", toml, *names).code == 0
    run = RunFolder(tmp_path / "sweep.run")
    asked = {n: run.child(n).round(0).read_bytes() for n in run.all_children()}
    for folder in (run, *map(run.child, asked)):
        for path in folder.root.iterdir():  # a plan alone is what an interruption leaves
            if path not in (folder.plan, folder.measures):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (
        f"'lsweep plan SWEEP.toml --run {run.root}' goes on" in cases.command("work", run.root).err
    )
    assert cases.command("plan", toml).code == 0
    for name in asked:
        goes_on = f"lsweep plan {run.root} --measures {name}"
        assert f"'{goes_on}' goes on" in cases.command("run", run.child(name).root).err
        assert any(
            f"'{goes_on}'" in line for line in cases.command("status", run.root).out.splitlines()
        )
    assert cases.command("plan", run.root, *names).code == 0
    assert asked == {n: run.child(n).round(0).read_bytes() for n in asked}


def test_more_replicates_are_one_more_round_and_stay(run, toml):
    plan = Plan.read(RunFolder(run).child("layers"))
    arguments = ("--on", "inline", "--no-picture", "--measures")
    assert cases.command("run", run, *arguments, "layers", "--replicates", "7").code == 0
    child = RunFolder(run).child("layers")
    assert Plan.read(child) == plan
    assert [r.points for r in Rounds.read(child, plan)] == [30, 12]
    assert measured(run)["layer_sharpness@a"].context["replicates"] == 7
    done = cases.command("run", toml, *arguments, "layers")  # as many as it has
    assert done.code == 0 and "of 42 points to evaluate" not in done.out
    assert len(Rounds.read(child, plan).all) == 2


def test_one_rank_alone_runs_children_too(tmp_path):
    toml = tiny.write_sweep(tmp_path, SWEEP, PROBLEM)
    done = cases.command("run", toml, "--on", "mpi", "--no-picture", "--measures", "jacobian")
    assert done.code == 0, done.err
    assert "input_jacobian" in measured(tmp_path / "sweep.run")


# -- the command -----------------------------------------------------------------------------------


def test_the_table_the_json_and_the_csv_hold_the_same(run, capfd):
    assert tiny.lsweep("measure", run, "--json") == 0
    (table,) = json.loads(capfd.readouterr().out)
    rows = [Measured.of(r) for r in table["measures"]]
    assert (table["metric"], table["points"]) == ("train_loss", 25)
    kept = read_json(run / "measures.json")
    assert kept["plan"] == Plan.read(RunFolder(run)).digest
    assert [Measured.of(r) for r in kept["measures"]] == rows
    assert tiny.lsweep("measure", run, "--csv") == 0
    lines = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert [line["name"] for line in lines] == [r.name for r in rows]
    assert [float(line["value"]) for line in lines] == [r.value for r in rows]
    assert lines[0]["batch_norm"] == "eval" and json.loads(lines[0]["context"])
    assert tiny.lsweep("measure", run) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"{run}: 9 train samples, batch norm eval, float64, seed 0, ")
    for row in rows:
        assert f"  {row.name} " in out and row.text in out


def test_a_number_of_fewer_samples_says_so_beside_it():
    rows = [Measured("a", 1.0, context={"split": "train", "samples": 9}),
            Measured("b", 1.0, context={"split": "train", "samples": 4, "of": 9})]  # fmt: skip
    head, first, second = sheet.text(Report("net.run", "", rows, [])).splitlines()
    assert head == "net.run: 9 train samples"
    assert first.split() == ["a", "1"] and second.split(maxsplit=2)[2] == "4 of 9 samples"


def test_only_some(run, capfd):
    assert tiny.lsweep("measure", run, "--only", "sharpness,hessian_max") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *(f"sharpness@{r:g}" for r in RADII), "hessian_max"]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "names"),
    [("layers", ["layer_sharpness"] * 2), ("trace,basins", ["basins", *TRACES]),
     ("basin", ["basin_share", "basin_area", "basin_width_least", "basin_width_median",
                "basin_depths"])],
)  # fmt: skip
def test_only_takes_what_measures_takes(run, capfd, asked, names):
    assert tiny.lsweep("measure", run, "--only", asked) == 0
    shown = [line.split()[0] for line in capfd.readouterr().out.splitlines()[1:]]
    assert [name.partition("@")[0] for name in shown] == names


@pytest.mark.parametrize("words, message", [
    (["measure", "RUN", "--only", "sharpnes"], "no measure 'sharpnes' here; did you mean 'sharpn"),
    (["measure", "RUN", "--only", ""], "no measure '' here"),
    (["measure", "RUN", "--json", "--csv"], "give one of them"),
    (["run", "RUN", "--measures", "hesian"], "no measure 'hesian'; did you mean 'hessian'?"),
    (["plan", "RUN", "--measures", ","], "--measures: name at least one, or all; one of: sharp"),
    (["run", "RUN", "--replicates", "4"], "--replicates goes with --measures"),
    (["run", "RUN", "--measures", "jacobian,convexity", "--replicates", "3"],
     "--replicates is not for jacobian, convexity: leave it out"),
    (["run", "RUN", "--measures", "trace", "--to", "b.pt"], "--to goes with --measures barrier"),
    (["plan", "RUN", "--measures", "trace", "--samples", "4"],
     "trace was made with other data or samples: remove that folder to measure anew"),
])  # fmt: skip
def test_what_is_wrong_is_one_line(run, words, message, capfd):
    assert tiny.lsweep(*(run if w == "RUN" else w for w in words)) == 1
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1


def test_too_few_replicates_are_usage(run, capfd):
    assert tiny.lsweep("run", run, "--measures", "trace", "--replicates", "1") == 2
    assert "1 is less than 2" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_still_measured(tmp_path, capfd):
    toml = cases.sweep_file(tmp_path, x=5)
    run = cases.finished(toml).root
    (run / "measures.json").mkdir()
    assert tiny.lsweep("measure", run) == 0
    said = capfd.readouterr()
    assert "measures.json: Is a directory; the numbers are not kept" in said.err
    assert "train_loss" in said.out


def test_a_child_that_is_damaged_is_told_and_the_rest_is_there(tmp_path):
    toml = tiny.write_sweep(tmp_path, SWEEP, PROBLEM)
    assert cases.command("run", toml, "--on", "inline", "--no-picture",
                         "--measures", "jacobian,layers").code == 0  # fmt: skip
    run = tmp_path / "sweep.run"
    plan = run / "measures" / "jacobian" / "plan.json"
    plan.write_text(plan.read_text().replace("9", "8", 1))
    report = measure_run(RunFolder(run))
    assert any(r.family == "layer_sharpness" for r in report.rows)
    assert [m for m in report.missing if m.startswith("jacobian: ") and "damaged" in m]
    out = cases.command("status", run).out
    assert f"  measure jacobian: {plan} is damaged" in out and "measure layers: complete" in out
    done = cases.command("verify", run)
    assert done.code == 1 and f"lsweep: measure jacobian: {plan} is damaged" in done.err


def test_a_child_of_other_weights_is_not_taken_for_this_run(tmp_path):
    toml = tiny.write_sweep(tmp_path, SWEEP, PROBLEM)
    assert cases.command("plan", toml, "--measures", "jacobian").code == 0
    run, other = tmp_path / "sweep.run", tmp_path / "other.run"
    (tmp_path / "problem.py").write_text(PROBLEM.replace("numbers(1, 2)", "2 * numbers(1, 2)"))
    assert cases.command("plan", toml, "--run", other).code == 0
    (run / "measures").rename(other / "measures")
    (line,) = (m for m in measure_run(RunFolder(other)).missing if m.startswith("jacobian: "))
    assert "is of other weights than this run: remove that folder" in line


def test_missing_children_name_the_command_that_computes_them(tmp_path):
    run = cases.finished(cases.sweep_file(tmp_path, x=5))
    missing = measure_run(run).missing
    (line,) = (m for m in missing if m.startswith("jacobian: "))
    assert line.startswith("jacobian: not of this network: input_jacobian needs the network's out")
    for child in (c for c in CHILDREN.values() if not c.beside and c.name != "jacobian"):
        words = f"'lsweep run {run.root} --measures {child.name} {child.needs}".rstrip() + "'"
        (line,) = (m for m in missing if words in m)
        assert line.startswith("on request") is not child.usual
    assert f"all of these: 'lsweep run {run.root} --measures all'" in missing


def test_a_live_model_has_no_children_and_that_is_one_line(tmp_path, capfd, problem):
    live = lsweep.Problem(problem.model, dict(problem.data), loss=problem.loss)
    run = tmp_path / "live.run"
    lsweep.sweep(live, x=(-1, 1, 3), run=run, precision="float64")
    (line,) = (m for m in measure_run(RunFolder(run)).missing if "measured at the centre" in m)
    assert "live model" in line and "Problem.from_factory" in line
    assert tiny.lsweep("run", run, "--measures", "trace") == 1
    error = capfd.readouterr().err
    assert "made from a live model" in error and error.count("\n") == 1


def test_the_edited_factory_is_not_what_a_child_measures(tmp_path):
    toml = tiny.write_sweep(tmp_path, SWEEP, PROBLEM)
    run = tmp_path / "sweep.run"
    assert cases.command("plan", toml).code == 0
    (tmp_path / "problem.py").write_text(PROBLEM.replace("scale=1.0", "scale=2.0"))
    arguments = ("--on", "inline", "--no-picture", "--measures", "jacobian")
    assert cases.command("run", run, *arguments).code == 0
    child = Plan.read(RunFolder(run).child("jacobian"))
    assert child.problem == Plan.read(RunFolder(run)).problem


def test_what_has_no_derivative_in_the_parent_has_one_in_the_child():
    text = SWEEP.replace('"float64"', '"bfloat16"\nslices = 2')
    parent = Settings.from_text(text)
    trace, sharpness = (settings_for(CHILDREN[n], parent).evaluate for n in ("trace", "sharpness"))
    assert (trace.precision, trace.slices, trace.splits) == ("float32", 1, ("train",))
    assert (sharpness.precision, sharpness.slices) == ("bfloat16", 2)
    parent = Settings.from_text(SWEEP + 'batch_norm = "recalibrate"\n')
    assert settings_for(CHILDREN["hessian"], parent).evaluate.batch_norm == "eval"
    assert settings_for(CHILDREN["layers"], parent).evaluate.batch_norm == "recalibrate"


def test_random_directions_of_a_child_are_those_of_its_parent():
    named = "\n[directions]\nseed = 7\nnormalize = 'layer'\nignore = 'none'\nparameters = ['a.*']\n"
    parent = Settings.from_text(SWEEP + named)
    child = settings_for(CHILDREN["layers"], parent, replicates=3)
    assert child.directions["x"] == parent.directions["x"]
    for name in ("y", "z"):
        r = child.directions[name]
        assert (r.seed, r.ignore, r.parameters) == (7, "none", ("a.*",))
    other = Settings.from_text(SWEEP + "[directions]\nkind = 'to'\ncheckpoint = 'b.pt'\n")
    recipe = settings_for(CHILDREN["sharpness"], other).directions["x"]
    assert (recipe.kind, recipe.normalize, recipe.ignore) == ("random", "filter", "bias+norm")


def test_all_is_all_that_this_network_has(tmp_path):
    toml = cases.sweep_file(tmp_path, x=5, low="-1")
    done = cases.command("plan", toml, "--measures", "all")
    assert done.code == 0, done.err
    assert "no layers: grid.z: the network has one layer" in done.out
    assert "no jacobian: input_jacobian needs the network's output" in done.out
    children = RunFolder(tmp_path / "sweep.run").all_children()
    assert set(children) == {"sharpness", "curvature", "trace", "hessian", "worst", "spectrum"}
    done = cases.command("plan", toml, "--measures", "jacobian,trace")
    assert done.code == 1 and "input_jacobian needs" in done.err  # asked for by name
    done = cases.command("plan", toml, "--measures", "trace, layers", "--replicates", "31")
    assert done.code == 1 and "lsweep: layers: grid.z: the network has one layer" in done.err
    done = cases.command("plan", toml, "--measures", "all", "--replicates", "32")
    assert done.code == 0 and "--replicates is not for jacobian\n" in done.out


def test_two_routes_that_agree_to_the_last_digits_need_no_error_to_agree():
    a = Measured("direction_curvature@0.1", 2.0, 0.0, "directions")
    b = Measured("filter_hessian_trace", 2.0001, 0.0, "probes")
    assert compared([a, b])[0].note == "agrees with filter_hessian_trace (to 5e-05)"
    c = Measured("direction_curvature@0.1", 2.1, 0.01, "directions", {"radius": 0.1})
    found = compared([c, b])[0].note
    assert found == ("differs from filter_hessian_trace by 10.0 standard errors: "
                     "at r = 0.1 it is another number")  # fmt: skip


def test_two_routes_are_compared_only_where_they_could_agree():
    where = {"split": "train", "samples": 64, "batch_norm": "eval", "precision": "float64"}
    a = Measured("spectral_trace", 2.0, 0.01, "start vectors", where)
    b = Measured("hessian_trace", 2.0, 0.01, "probes", where)
    assert compared([a, b])[0].note == "agrees with hessian_trace (0.0 standard errors apart)"
    other = Measured(b.name, b.value, b.se, b.replicate,
                     {**where, "samples": 9, "of": 64, "batch_norm": "recalibrate"})  # fmt: skip
    words = "not compared with hessian_trace: other samples, batch norm"
    assert compared([a, other])[0].note == words
    vague = Measured(b.name, 1.0, 1.0, b.replicate, where)
    words = "cannot be told from hessian_trace: the error of their difference is 50%"
    assert compared([a, vague])[0].note == words


def child_of(name: str, values: dict[str, list[float]], x: np.ndarray | None = None) -> Finished:
    """A finished child of one replicate axis, or of x and one."""
    columns = {f"train_{k}": np.asarray(v, float) for k, v in values.items()}
    n = len(next(iter(columns.values())))
    axes = {"x": np.arange(float(n))} if x is None else {"x": x, "y": np.arange(float(n))}
    surface = Surface(axes, columns, provenance={"plan": {"evaluate": {"splits": ["train"]}}})
    return Finished(name, surface, {})


def test_an_eigenvalue_within_its_own_error_says_how_well_it_is_known():
    """Of a residual r·max|λ| some eigenvalue lies within it: -0.3 ± 0.9 may be no -0.3."""
    values = {"max": [100.0, 99.9], "min": [-0.3, -0.3], "max_residual": [0.002, 0.009],
              "min_residual": [0.009, 0.001], "ratio": [0.003, 0.003]}  # fmt: skip
    both = {f"{p}hessian_{k}": v for p in ("", "filter_") for k, v in values.items()}
    rows = {r.name: r for r in rows_of(child_of("hessian", both))}
    assert (rows["hessian_max"].note, rows["hessian_max"].doubtful) == ("", False)
    assert rows["hessian_min"].note == "known to ± 0.9" and rows["hessian_min"].doubtful
    ratio = rows["hessian_ratio"]
    assert (ratio.value, ratio.note, ratio.doubtful) == (0.003, "known to ± 0.009", True)
    assert "best of" not in sheet.text(Report("", "", [ratio], []))  # it is no best of several
    assert "best of 2 start vectors" in sheet.text(Report("", "", [rows["hessian_max"]], []))
    both["hessian_max_residual"] = [0.02, 0.0]
    rows = {r.name: r for r in rows_of(child_of("hessian", both))}
    assert rows["hessian_max"].doubtful and not rows["filter_hessian_max"].doubtful
    assert rows["hessian_ratio"].note.startswith("λmax: did not converge: residual 2.0e-02")


def test_a_climb_is_a_lower_bound_and_one_step_is_one_from_the_weights():
    x = np.array([0.01])
    climbs = {f"worst_{b}_{n}": [[v], [w]] for b in ("filter", "adaptive")
              for n, v, w in ((1, 1.0, 7.0), (20, 8.0, 8.1))}  # fmt: skip
    rows = {r.name: r for r in rows_of(child_of("worst", climbs, x))}
    for ball in ("filter", "adaptive"):
        one, best = (rows[f"worst_{ball}_{n}@0.01"] for n in (1, 20))
        assert one.value == 1.0 and "replicates" not in one.context
        assert best.value == 8.1 and best.context["replicates"] == 2
        assert "a lower bound" in one.note and "a lower bound" in best.note
        assert not (one.doubtful or best.doubtful)
    climbs["worst_filter_20"] = [[8.0], [float("nan")]]
    rows = {r.name: r for r in rows_of(child_of("worst", climbs, x))}
    assert rows["worst_filter_20@0.01"].value == 8.0 and rows["worst_filter_20@0.01"].doubtful


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 29])
def test_a_quantile_of_students_t_is_scipys(degrees):
    assert student_95(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.01)


# -- from values alone -----------------------------------------------------------------------------


def test_of_a_path_the_python_function_returns_all(run):
    found = lsweep.measure(run)
    assert found["center"] == measured(run)["train_loss"].value
    assert [m.name for m in found["measures"]] == [r.name for r in measure_run(RunFolder(run)).rows]
    file = lsweep.measure(run / "surface.h5")
    assert file["minimum"] == found["minimum"]
    assert not any(m.family == "sharpness" for m in file["measures"])  # a file has no children


def test_numbers_of_a_refined_surface_say_what_they_rest_on():
    x = np.linspace(-1, 1, 9)
    values = {"train_loss": np.add.outer(x**2, x**2), "train_loss_error": np.full((9, 9), 0.004)}
    status = np.full((9, 9), Status.INTERPOLATED, np.uint8)
    status[::2, ::2] = Status.OK
    rows, _ = rows_of_plane(Surface({"x": x, "y": x}, values, status), "train_loss")
    words = (
        "from interpolated values: 25 of 81 points evaluated, stated error up to 0.4% of the log"
    )
    said = {r.context["values"] for r in rows}
    assert len(said) == 1 and words in str(said) and "no interpolation check" in str(said)
    assert sheet.text(Report("a.run", "", rows, [])).count(words) == 1  # once, above them all


def test_a_measured_number_survives_json_whatever_it_is():
    row = Measured("a@1", float("inf"), float("nan"), "probes", {"b": [float("nan"), 1]}, "note")
    again = Measured.of(json.loads(json.dumps(row.as_json(), allow_nan=False)))
    assert (again.value, again.replicate, again.note) == (float("inf"), "probes", "note")
    assert np.isnan(again.se)
    with pytest.raises(ValueError, match="names its replicate"):
        Measured("a", 1.0, 0.1)
    with pytest.raises(ValueError, match="replicate = 'runs'"):
        Measured("a", 1.0, 0.1, "runs")
