"""What would silently give another number is refused, or shown; each row once went unnoticed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
import xarray
from problems import labels, numbers
from tiny import PROBLEM, contents, write_sweep
from tiny import lsweep as run_command
from torch import nn

import lsweep
from lsweep.errors import LsweepError, PlanChanged, SickDevice
from lsweep.evaluating.evaluate import Evaluator
from lsweep.measures.convexity import nonconvex_fraction
from lsweep.merging.merge import merge
from lsweep.outcomes import frozen
from lsweep.plans.plan import Plan
from lsweep.runs.status import lines, status
from lsweep.storage.files import read_json, replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface
from lsweep.working.role import Role
from lsweep.working.worker import work

LINE = (-1, 1, 5)


def regression(loss, **options):
    x, y = numbers(10, 3, seed=1), numbers(10, 2, seed=2)
    model = problems.fixed(nn.Linear(3, 2).double())
    return lsweep.Problem(model, {"train": (x, y)}, loss=loss, **options)


# -- the values themselves ---------------------------------------------------------------------


def test_a_scalar_with_a_weight_keeps_it():
    """Token means of unequal batches: Σ tokens · mean / Σ tokens, not a mean by batch size."""
    batches = [(numbers(4, seed=1), torch.tensor(7.0)), (numbers(4, seed=2), torch.tensor(1.0))]

    def forward(model, batch):
        value, tokens = batch
        return {"loss": ((model(value[None])).square().mean(), tokens)}

    model = problems.fixed(nn.Linear(4, 1).double())
    problem = lsweep.Problem(model, {"train": batches}, forward=forward)
    surface = lsweep.sweep(problem, x=LINE, precision="float64")
    with torch.no_grad():
        values = [float(model(v[None]).square().mean()) for v, _ in batches]
    assert surface.center("train_loss") == pytest.approx((7 * values[0] + values[1]) / 8, rel=1e-12)
    assert "train_loss_se" not in surface  # a mean of batches has no standard error


def test_values_that_are_not_one_per_sample_are_refused():
    problem = regression(lambda out, y: (out - y).square().mean(0))  # one per column
    with pytest.raises(LsweepError, match="returned 2 values for a batch of 10 samples"):
        lsweep.sweep(problem, x=LINE)


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_weight_that_is_no_weight_is_refused(bad):
    def forward(model, batch):
        values = (model(batch[0]) - batch[1]).square().mean(1)
        return {"loss": (values, torch.full_like(values, bad))}

    problem = dataclasses.replace(regression(nn.MSELoss()), loss=None, forward=forward)
    with pytest.raises(LsweepError, match="a weight is negative or not finite"):
        lsweep.sweep(problem, x=LINE)


def test_a_network_that_changes_its_input_is_refused_and_the_data_left_alone():
    class InPlace(nn.Linear):
        def forward(self, x):
            x -= 0.5
            return super().forward(x)

    x, y = numbers(6, 3), labels(6, 2)
    before = x.clone()
    problem = lsweep.Problem(InPlace(3, 2).double(), {"train": (x, y)}, loss=nn.CrossEntropyLoss())
    with pytest.raises(LsweepError, match="changes its train input in place"):
        lsweep.sweep(problem, x=LINE, precision="float64")
    assert torch.equal(x, before)


def test_a_network_that_swaps_a_weight_for_another_tensor_is_refused():
    """Its surface would be flat: what it computes with is no longer what a point moves."""

    class Renormed(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
            return super().forward(x)

    data = {"train": (numbers(6, 3), labels(6, 2))}
    problem = lsweep.Problem(Renormed(3, 2).double(), data, loss=nn.CrossEntropyLoss())
    with pytest.raises(LsweepError, match=r"another tensor in the place of weight .*copy_"):
        lsweep.sweep(problem, x=LINE, precision="float64")


def test_the_loss_is_computed_outside_autocast():
    seen = []

    def loss(output, target):
        seen.append((output @ output.T).dtype)  # autocast would make this bfloat16
        return (output - target).square().mean(1)

    problem = regression(loss)
    lsweep.sweep(problem, x=LINE, precision="bfloat16")
    assert set(seen) == {torch.float32}


def test_a_buffer_that_two_modules_share_moves_as_one(tmp_path):
    class Shift(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.register_buffer("shift", shift)

        def forward(self, x):
            return x + self.shift

    def net(value):
        shift = torch.full((1,), value, dtype=torch.float64)
        return nn.Sequential(nn.Linear(1, 1, bias=False).double(), Shift(shift), Shift(shift))

    model, other = problems.fixed(net(0.0)), problems.fixed(net(1.0))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    data = {"train": (torch.ones(3, 1).double(), torch.zeros(3, 1).double())}
    problem = lsweep.Problem(model, data, loss=nn.MSELoss())
    recipe = {"kind": "to", "checkpoint": str(tmp_path / "other.pt")}
    # The weights are equal, so only the buffers move: a direction of norm zero is refused.
    with pytest.raises(LsweepError, match="the direction x is zero"):
        lsweep.sweep(problem, x=(0, 1, 2), directions=recipe, precision="float64")
    with torch.no_grad():
        other[0].weight += 0.25
    torch.save(other.state_dict(), tmp_path / "other.pt")
    surface = lsweep.sweep(problem, x=(0, 1, 2), directions=recipe, precision="float64")
    with torch.no_grad():
        assert surface["train_loss"][1] == pytest.approx(
            float(other(data["train"][0]).square().mean())
        )


def test_slices_whose_labels_are_all_ignored_do_not_make_a_value_nonfinite():
    x, y = numbers(9, 4), labels(9, 3)
    y[:3] = -100  # the first of three slices
    model = problems.fixed(nn.Linear(4, 3).double())
    problem = lsweep.Problem(model, {"train": (x, y)}, loss=nn.CrossEntropyLoss())
    cut = lsweep.sweep(problem, x=LINE, precision="float64", slices=3)
    whole = lsweep.sweep(problem, x=LINE, precision="float64")
    assert (cut.status == whole.status).all()
    assert np.allclose(cut["train_loss"], whole["train_loss"], rtol=1e-13)


def test_labels_that_are_no_class_have_no_weight_in_the_accuracy():
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    values, weights = lsweep.accuracy(scores, torch.tensor([0, 255, -100]))
    assert weights.tolist() == [1, 0, 0]
    assert values[0] == 100


# -- resuming ----------------------------------------------------------------------------------


def test_another_loss_on_a_complete_run_is_refused(tmp_path):
    problem = problems.classifier()
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r")
    other = dataclasses.replace(problem, loss=nn.CrossEntropyLoss(label_smoothing=0.3))
    with pytest.raises(PlanChanged, match="the loss or the metric changed"):
        lsweep.sweep(other, x=LINE, run=tmp_path / "r")


def test_another_activation_in_a_module_beside_the_factory_is_refused(tmp_path):
    (tmp_path / "nets.py").write_text("from torch.nn import Tanh as Activation\n")
    toml = write_sweep(tmp_path)
    code = (tmp_path / "problem.py").read_text()
    code = code.replace("nn.Tanh()", "nets.Activation()").replace(
        "import torch\n", "import torch\nimport nets\n", 1
    )
    (tmp_path / "problem.py").write_text(code)
    assert run_command("run", toml, "--workers", 1, "--no-picture") == 0
    import sys

    sys.modules.pop("nets")
    (tmp_path / "nets.py").write_text("from torch.nn import ReLU as Activation\n")
    # As long, and of the same second: Python would take what it compiled before.
    os.utime(tmp_path / "nets.py", (1, 1))
    before = (tmp_path / "sweep.run" / "surface.h5").read_bytes()
    assert run_command("run", toml, "--workers", 1) == 1
    assert (tmp_path / "sweep.run" / "surface.h5").read_bytes() == before
    sys.modules.pop("nets")


def test_a_checkpoint_that_appears_or_changes_after_planning_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problem = problems.classifier()
    for n in (1, 2):
        torch.save(problems.another(problem.model, 50 + n), tmp_path / f"ep{n}.pt")
    options = {"x": LINE, "run": "r", "trajectory": ["ep*.pt"]}
    surface = lsweep.sweep(problem, **options)
    assert surface.trajectory.labels == ("ep1", "ep2")
    torch.save(problems.another(problem.model, 99), tmp_path / "ep0.pt")
    folder = RunFolder(Path("r"))
    for part in folder.all_parts():
        part.unlink()  # everything is to be computed again
    with pytest.raises(PlanChanged, match="steps"):
        work(folder, Role(), problem)
    (tmp_path / "ep0.pt").unlink()
    torch.save(problems.another(problem.model, 77), tmp_path / "ep2.pt")
    with pytest.raises(PlanChanged, match="ep2"):
        work(folder, Role(), problem)


def test_a_sliced_run_goes_on_only_with_the_same_centre(tmp_path):
    problem = problems.classifier()
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r", slices=2)
    folder = RunFolder(tmp_path / "r")
    for part in folder.all_parts():
        part.unlink()
    (path,) = folder.all_devices()
    value = read_json(path)
    value["centre"]["train_loss"] *= 1 + 1e-4
    replace(path, sealed(value))
    with pytest.raises(SickDevice, match="train_loss at the centre"):
        work(folder, Role(threads=0), problem)
    assert not folder.all_parts()


def test_expected_is_checked_on_a_run_that_exists(tmp_path):
    problem = problems.classifier()
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r")
    before = sorted(os.listdir(tmp_path / "r" / "rounds"))  # noqa: PTH208
    with pytest.raises(LsweepError, match="expected 99"):
        lsweep.sweep(problem, x=LINE, run=tmp_path / "r", expected={"train_loss": 99})
    assert sorted(os.listdir(tmp_path / "r" / "rounds")) == before  # noqa: PTH208


def test_a_run_is_worked_on_from_any_folder(tmp_path, monkeypatch):
    """README's own lines: 'lsweep init mine', 'lsweep run mine/sweep.toml', with real workers."""
    monkeypatch.chdir(tmp_path)
    write_sweep(Path("mine"))
    assert run_command("run", "mine/sweep.toml", "--workers", 2, "--no-picture") == 0
    assert Surface.load("mine/sweep.run/surface.h5").complete
    monkeypatch.chdir(tmp_path / "mine")
    assert run_command("run", "sweep.toml", "--set", "grid.x.count=5", "--workers", 1) == 0


# -- batch norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "recalibrate"])
def test_the_batch_size_that_batch_statistics_depend_on_is_planned(tmp_path, mode):
    problem = problems.normalized(200)
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r", batch_norm=mode)
    assert read_json(RunFolder(tmp_path / "r").plan)["evaluate"]["batch_size"] == 128
    with pytest.raises(PlanChanged, match="batch_size"):
        lsweep.sweep(problem, x=LINE, run=tmp_path / "r", batch_norm=mode, batch_size=64)


def test_a_lone_last_sample_does_not_stop_an_eval_sweep():
    problem = problems.normalized(33)
    surface = lsweep.sweep(problem, x=LINE, splits=["train"], batch_size=32)
    assert surface.complete
    assert "recalibrated" not in surface.provenance["caption"]


def test_distances_in_weight_space_run_over_no_statistics(tmp_path):
    problem = problems.normalized()
    other = problems.another(problem.model)
    half = {
        n: (t + other[n]) / 2 if t.is_floating_point() else t
        for n, t in problem.model.state_dict().items()
    }
    for state in (other, half):
        state["1.running_var"] = torch.full_like(other["1.running_var"], 500.0)
    half["1.running_var"] = problem.model.state_dict()["1.running_var"].clone()
    torch.save(other, tmp_path / "other.pt")
    torch.save(half, tmp_path / "half.pt")
    surface = lsweep.sweep(
        problem,
        x=(0, 1, 3),
        directions={"kind": "to", "checkpoint": str(tmp_path / "other.pt")},
        trajectory=[str(tmp_path / "half.pt")],
        splits=["train"],
        precision="float64",
    )
    assert surface.trajectory.offsets[0, 0] == pytest.approx(0.5, abs=1e-12)
    assert surface.trajectory.residual[0] == pytest.approx(0, abs=1e-9)
    moved = [p - other[n] for n, p in problem.model.named_parameters()]
    norm = float(torch.cat([m.detach().flatten() for m in moved]).norm())
    assert float(surface.attributes["x"]["norm"]) == pytest.approx(norm, rel=1e-12)


# -- what is shown -----------------------------------------------------------------------------


def test_an_audit_that_disagrees_is_told(tmp_path, monkeypatch):
    lsweep.sweep(problems.classifier(), x=LINE, run=tmp_path / "r", precision="float64")
    _, report = merge(RunFolder(tmp_path / "r"))
    assert report.audit["points"] >= 3
    assert report.audit["largest_absolute"] == 0.0
    assert not report.lines()
    monkeypatch.setitem(frozen.AUDIT_TOLERANCE, "float64", -1.0)
    _, report = merge(RunFolder(tmp_path / "r"))
    assert any("do not trust these values" in line for line in report.lines())
    shown = lines(status(RunFolder(tmp_path / "r")))
    assert any("do not trust these values" in line for line in shown)


def test_an_audit_that_fails_or_is_not_finite_is_told_and_the_values_stand(tmp_path, monkeypatch):
    problem = problems.classifier()
    plain = lsweep.sweep(problem, x=LINE, run=tmp_path / "plain", precision="float64")
    evaluate = Evaluator.evaluate
    calls = []

    def disturbed(self, spots, slice_=0, audit=False):
        sums = evaluate(self, spots, slice_, audit)
        if audit:
            calls.append(spots)
            if len(calls) == 1:
                raise RuntimeError("the audit's own kernel is missing")
            sums[:] = np.nan
        return sums

    monkeypatch.setattr(Evaluator, "evaluate", disturbed)
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r", precision="float64")
    surface, report = merge(RunFolder(tmp_path / "r"))
    assert len(calls) > 1
    assert np.array_equal(surface["train_loss"], plain["train_loss"])
    told = "\n".join(report.lines())
    assert "1 points could not be evaluated again" in told
    assert "finite in one evaluation and not in the other" in told
    assert set(report.lines()) <= {s.strip() for s in lines(status(RunFolder(tmp_path / "r")))}


def test_a_planner_that_is_refused_touches_nothing(tmp_path, monkeypatch):
    """Two planners race: the second began before there was a plan, and finds another one."""
    toml = write_sweep(tmp_path)
    assert run_command("plan", toml) == 0
    folder = RunFolder(tmp_path / "sweep.run")
    before = contents(folder.root)
    other = write_sweep(tmp_path / "elsewhere", problem=PROBLEM.replace("Tanh", "ReLU"))
    exists, freeze, late = RunFolder.exists.fget, Plan.freeze, []

    def freezing(plan, where):
        late.append(plan)
        return freeze(plan, where)

    monkeypatch.setattr(Plan, "freeze", freezing)
    monkeypatch.setattr(RunFolder, "exists", property(lambda self: bool(late) and exists(self)))
    assert run_command("plan", other, "--run", folder.root) == 1
    assert len(late) == 1 and contents(folder.root) == before


def test_to_xarray_is_what_the_file_opens_as(tmp_path):
    surface = lsweep.sweep(problems.classifier(), x=LINE, y=(0, 1, 2))
    surface.save(tmp_path / "s.h5")
    here = surface.to_xarray()
    with xarray.open_dataset(tmp_path / "s.h5", engine="h5netcdf") as there:
        for name in here.data_vars:
            assert np.array_equal(here[name], there[name], equal_nan=True), name
            assert here[name].dims == there[name].dims == ("y", "x")
        assert here["x"].attrs["units"] == there["x"].attrs["units"] == "1"


def test_an_opaque_loss_stays_opaque_when_its_part_must_be_salvaged(tmp_path):
    problem = regression(lambda out, y: (out - y).square().mean())
    lsweep.sweep(problem, x=LINE, run=tmp_path / "r")
    folder = RunFolder(tmp_path / "r")
    (part,) = folder.all_parts()
    data = bytearray(part.read_bytes())
    data[:8] = b"\0" * 8
    part.write_bytes(data)
    surface, report = merge(folder)
    assert "salvaged" in report.damaged[part.name]
    assert surface.complete
    assert "train_loss_se" not in surface
    assert "no standard error" in surface.attributes["train_loss"]["long_name"]


def test_flat_cells_are_convex_and_rounding_is_no_curvature():
    x = np.linspace(-1, 1, 41)
    linear = 0.1 + np.add.outer(0.3 * x, 0.7 * x)
    assert nonconvex_fraction(Surface({"x": x, "y": x}, {"train_loss": linear})) == 0.0
    flat = np.ones((41, 41))
    flat[20, 20] = 2.0  # one bump: at most the 3 x 3 points around it curve
    share = nonconvex_fraction(Surface({"x": x, "y": x}, {"train_loss": flat}))
    assert 0 < share <= 9 / 39**2


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        # forgotten kind: the checkpoint would be ignored and random directions swept
        ({"checkpoint": "b.pt"}, 'checkpoint goes with kind = to, not "random"'),
        # x = 1 would not be the other checkpoint
        ({"kind": "to", "checkpoint": "b.pt", "normalize": "filter"}, "x = 1 would not be"),
    ],
)
def test_keys_that_would_be_ignored_or_mislead_are_refused(recipe, message):
    with pytest.raises(LsweepError, match=message):
        lsweep.sweep(problems.classifier(), x=LINE, directions=recipe)
