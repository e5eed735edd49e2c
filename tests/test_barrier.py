"""The barrier between two networks: what the table says is what the line between them holds.

Against networks evaluated by hand, and one exact answer: towards the same network with its units
shuffled there is a barrier, and none at all once they are put back.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from problems import another, at
from torch import nn

import lsweep
from lsweep.invariance.symmetries import discover, permuted
from lsweep.measures.measures import measure_run
from lsweep.outcomes.measured import Measured
from lsweep.plans.children import CHILDREN, settings_for
from lsweep.plans.settings import Settings
from lsweep.problems.problem import Problem
from lsweep.storage.folder import RunFolder

pytest.importorskip("scipy")

# 700 samples: more than the pre-flight evaluates twice, in several batches.
PROBLEM = """\
import torch
from torch import nn

import lsweep


class Fork(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if float(x.detach().sum()) < 1e9 else x


def make(norm=False, fork=False, samples=40):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator).double()
    y = torch.arange(samples) % 3
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)]
    model = nn.Sequential(*(m for m in layers if norm or not isinstance(m, nn.BatchNorm1d)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    model = (Fork(model) if fork else model).double()
    data = {"train": (x, y), "test": (x[:20] + 0.5, y[:20])}
    metrics = {"accuracy": lsweep.accuracy}
    return lsweep.Problem(model, data, loss=nn.CrossEntropyLoss(), metrics=metrics)
"""
SWEEP = tiny.SWEEP.replace("options = { width = 3 }", "OPTIONS").replace("float32", "float64")


def sweep(folder: Path, options: str = "") -> tuple[Path, Problem]:
    """Write a sweep of the problem; return it and the problem."""
    toml = tiny.write_sweep(folder, SWEEP.replace("OPTIONS", f"options = {{ {options} }}"), PROBLEM)
    return toml, Problem.from_factory(f"{folder / 'problem.py'}:make", **Settings.from_file(
        toml).problem.options)  # fmt: skip


def saved(folder: Path, state: dict[str, torch.Tensor], name: str = "other.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def measured(toml: Path) -> dict[str, Measured]:
    return {r.name: r for r in measure_run(RunFolder(toml.with_suffix(".run"))).rows}


def run(toml: Path, *words: object) -> int:
    return tiny.lsweep("run", toml, "--on", "inline", "--no-picture", *words)


def test_shuffled_units_make_a_barrier_and_put_back_none(tmp_path, capfd):
    toml, problem = sweep(tmp_path)
    (group,) = discover(problem.model, problem.data["train"][0]).units
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    same = saved(tmp_path, permuted(problem.model.state_dict(), group, order))
    assert run(toml, "--measures", "barrier-aligned", "--to", same) == 1
    assert "this very network, bit for bit" in capfd.readouterr().err
    # In the biases of the logits cross-entropy is convex: between networks that differ in these
    # alone, no value is above the straight line.
    near = {n: t.clone() for n, t in problem.model.state_dict().items()}
    near["2.bias"] += torch.tensor([0.3, -0.2, 0.5]).double()
    there = permuted(near, group, order)
    assert run(toml, "--measures", "barrier", "--to", saved(tmp_path, there)) == 0
    assert "6 of 6 hidden units in 1 groups moved" in capfd.readouterr().out
    rows = measured(toml)
    children = toml.with_suffix(".run") / "measures"
    for kind in ("train_loss", "test_loss"):
        assert 0 <= rows[f"barrier_aligned_over_line@{kind}"].value < 1e-15
    (file,) = children.glob("other-aligned-*")
    assert all(torch.equal(t, near[n]) for n, t in lsweep.load_state(file).items())
    back = lsweep.open(children / "barrier-aligned")
    assert back.x[0] == 0 and back.x[-1] == 1 and len(back.x) == 25

    x, y = problem.data["train"]
    offsets = [k / 24 for k in range(25)]
    nets = [at(problem.model, (a, there)) for a in offsets]
    with torch.no_grad():
        losses = torch.stack([nn.functional.cross_entropy(n(x), y, reduction="none") for n in nets])
    means = losses.mean(1).numpy()
    line = means[0] + np.array(offsets) * (means[-1] - means[0])
    top = int(means.argmax())
    row = rows["barrier@train_loss"]
    assert row.value == pytest.approx(means.max() - (means[0] + means[-1]) / 2, rel=1e-10)
    assert row.value > 0.05
    assert rows["barrier_over_line@train_loss"].value == pytest.approx((means - line).max())
    # The standard error is bounded by those of the two paired differences.
    paired = [float((losses[k] - losses[0]).std() / len(x) ** 0.5) for k in (top, -1)]
    exact = losses[top] - (losses[0] + losses[-1]) / 2
    assert row.se == pytest.approx(paired[0] + paired[1] / 2, rel=1e-6)
    assert row.se >= float(exact.std()) / len(x) ** 0.5 and row.replicate == "samples"
    assert row.context["batch_norm"] == "eval" and row.context["samples"] == 40
    assert rows["barrier@test_loss"].context["samples"] == 20
    assert "over the mean of the ends" in row.note
    assert "over the line" in rows["barrier_over_line@train_loss"].note


def test_asked_again_it_is_the_same_run_and_another_network_is_another(tmp_path, capfd):
    toml, problem = sweep(tmp_path)
    other = saved(tmp_path, another(problem.model))
    command = ("--measures", "barrier")
    assert run(toml, *command) == 1
    assert "--measures barrier needs --to CHECKPOINT" in capfd.readouterr().err
    assert run(toml, "--to", other) == 1
    assert "--to goes with --measures" in capfd.readouterr().err
    assert run(toml, "--measures", "sharpness", "--to", other) == 1
    assert "--to goes with --measures barrier" in capfd.readouterr().err
    assert run(toml, *command, "--to", tmp_path / "no.pt") == 1
    assert "no checkpoint at" in capfd.readouterr().err
    assert run(toml, *command, "--to", other) == 0
    before = tiny.contents(toml.with_suffix(".run") / "measures" / "barrier-aligned" / "parts")
    assert run(toml, *command) == run(toml, *command, "--to", other) == 0  # nothing left to do
    after = tiny.contents(toml.with_suffix(".run") / "measures" / "barrier-aligned" / "parts")
    assert after == before != {}
    capfd.readouterr()
    third = saved(tmp_path, another(problem.model, seed=8), "third.pt")
    assert run(toml, *command, "--to", third) == 1
    assert "remove that folder to measure anew" in capfd.readouterr().err
    assert tiny.lsweep("verify", toml.with_suffix(".run") / "measures" / "barrier-aligned") == 0
    capfd.readouterr()
    assert tiny.lsweep("measure", toml.with_suffix(".run"), "--json") == 0
    (report,) = json.loads(capfd.readouterr().out)
    found = {row["name"] for row in report["measures"]}
    assert {"barrier@train_loss", "barrier_aligned@test_error"} <= found


def test_a_network_that_cannot_be_followed_has_a_barrier_but_no_alignment(tmp_path, capfd):
    toml, problem = sweep(tmp_path, "fork = true")
    assert run(toml, "--measures", "barrier", "--to", saved(tmp_path, another(problem.model))) == 0
    assert "no barrier-aligned: no hidden units that could trade places" in capfd.readouterr().out
    rows = measured(toml)
    assert "barrier@train_loss" in rows and "barrier_aligned@train_loss" not in rows


def test_batch_norm_statistics_are_of_each_point(tmp_path):
    toml, problem = sweep(tmp_path, "norm = true, samples = 700")
    other = another(problem.model)
    assert run(toml, "--measures", "barrier", "--to", saved(tmp_path, other)) == 0
    row = measured(toml)["barrier@train_loss"]
    assert row.context["batch_norm"] == "recalibrate"
    child = lsweep.open(toml.with_suffix(".run") / "measures" / "barrier")
    net, (x, y) = at(problem.model, (0.5, other)), problem.data["train"]
    parts = [net[0](part) for part in x.split(128)]  # as a plan with batch norm takes them
    net[1].running_mean = torch.stack([p.mean(0) for p in parts]).mean(0)
    net[1].running_var = torch.stack([p.var(0) for p in parts]).mean(0)
    with torch.no_grad():
        want = float(nn.functional.cross_entropy(net(x), y))
    assert child["train_loss"][12] == pytest.approx(want, rel=1e-9)


def test_a_childs_line_takes_what_its_parent_averages():
    text = tiny.SWEEP.replace('"accuracy"', '"hessian_trace"').replace("slices = 1", "slices = 2")
    parent = Settings.from_text(text.replace('"hessian_trace"', '"accuracy"'))
    child = settings_for(CHILDREN["barrier"], parent, checkpoint="b.pt", normalized=True)
    assert child.directions["x"].kind == "to" and child.grid["x"].count == 25
    assert child.evaluate.metrics == ("loss", "accuracy")
    assert child.evaluate.splits == ("train", "test")
    assert (child.evaluate.batch_norm, child.evaluate.slices) == ("recalibrate", 1)
    plain = settings_for(CHILDREN["barrier"], parent, checkpoint="b.pt")
    assert (plain.evaluate.batch_norm, plain.evaluate.slices) == ("eval", 2)
