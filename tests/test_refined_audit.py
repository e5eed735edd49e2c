"""The audit of a refinement: interpolated points are as far off as a few samples say they are.

The problem is logistic regression with two weights, of which every sample's loss is known
everywhere, so that the audit's estimates are compared with true errors. One of its two splits has
weighted samples.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Died, command, differences, evaluated, in_child, merged, start, worked

import lsweep
from lsweep.evaluating.picking import Picker
from lsweep.plans.plan import Plan
from lsweep.plans.points import Lattice
from lsweep.plans.rounds import Rounds
from lsweep.refinement import audit, refining
from lsweep.refinement.audit import (
    BORNE_OUT,
    FEWEST,
    POINTS,
    SAMPLES,
    SHARE,
    audited,
    contradictions,
    phrase,
)
from lsweep.refinement.interpolate import Interpolant
from lsweep.refinement.refine import Evaluated, Filled, fill
from lsweep.runs.status import is_complete, lines, status
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Status, Surface
from lsweep.working import worker
from lsweep.working.role import Role

FACTORY = """\
import torch
from torch import nn
import lsweep

TRAIN, TEST = 2000, 1500


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight), nn.init.ones_(self.b.weight)


def forward(model, batch):
    u, v, w = batch
    a, b = model.a.weight.flatten(), model.b.weight.flatten()
    return {"loss": (nn.functional.softplus(-1.5 * (a * u + b * v)), w)}


def opaque(model, batch):
    loss, _ = forward(model, batch)["loss"]
    return {"loss": loss.mean()}


def samples(count, seed):
    g = torch.Generator().manual_seed(seed)
    u, v = torch.randn(count, generator=g) + 0.5, torch.randn(count, generator=g) + 0.3
    return u, v, torch.rand(count, generator=g) + 0.2


def two(kind="", train=TRAIN):
    (u, v, w), test = samples(train, 1), samples(TEST, 2)
    data = {"train": (u, v, torch.ones(train)), "test": test}
    if kind == "batches":
        data["train"] = [tuple(t[k : k + 500] for t in data["train"]) for k in range(0, train, 500)]
    f = opaque if kind == "opaque" else forward
    f.metrics = ("loss",)
    return lsweep.Problem(Two(), data, forward=f)
"""
COUNT = 31
HERE: dict[str, Any] = {}
exec(FACTORY, HERE)


def asked_in(base: Path, name: str = "sweep", splits: tuple[str, ...] = ("train",), count: int = 15,
             evaluate: str = "", **options: Any) -> RunFolder:  # fmt: skip
    """Plan a refined run over offsets of ±1 of both weights."""
    base.mkdir(exist_ok=True)
    (base / "problem.py").write_text(FACTORY)
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in options.items())
    text = ['[problem]\nfactory = "problem.py:two"', f"options = {{ {table} }}"]
    for axis, weight in (("x", "a"), ("y", "b")):
        text += [f"[grid.{axis}]\nrange = [-1, 1]\ncount = {count}"]
        text += [f'[directions.{axis}]\nparameters = ["{weight}.*"]']
    text += [f"[evaluate]\nsplits = {json.dumps(splits)}", evaluate, "[refine]\ntolerance = 0.01"]
    toml = base / f"{name}.toml"
    toml.write_text("\n".join(text) + "\n")
    done = command("plan", toml, "--run", base / f"{name}.run")
    assert done.code == 0, done.err
    return RunFolder(base / f"{name}.run")


def truth(surface: Surface, split: str) -> np.ndarray:
    """The loss at every point, from its formula, and in float64."""
    u, v, w = (t.double().numpy() for t in HERE["samples"](*SPLITS[split]))
    w = np.ones_like(w) if split == "train" else w
    x, y = np.meshgrid(surface.x, surface.y)
    signs = np.sign(surface.provenance["plan"]["facts"]["weight_sq"]["linear"])  # <θ, d> of θ = 1
    a, b = 1 + signs[0] * x[..., None], 1 + signs[1] * y[..., None]
    return np.asarray((np.logaddexp(0, -1.5 * (a * u + b * v)) * w).sum(-1) / w.sum())


SPLITS = {"train": (HERE["TRAIN"], 1), "test": (HERE["TEST"], 2)}


def audit_of(folder: RunFolder) -> dict[str, Any]:
    refine = Rounds.read(folder, Plan.read(folder)).last.refine
    assert refine is not None and refine.state == "done"
    return refine.audit


@pytest.fixture(autouse=True)
def whatever_a_point_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """These points take microseconds; where that is so all are evaluated otherwise."""
    monkeypatch.setattr(refining, "CHEAP", 0.0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A refined run that one worker made."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(refining, "CHEAP", 0.0)
        folder = asked_in(tmp_path_factory.mktemp("audit"), splits=("train", "test"), count=COUNT)
        assert isinstance(worked(folder), int)
    return folder


def test_it_finds_the_true_error_without_bias_and_confirms_what_is_stated(calm: RunFolder) -> None:
    surface, report = merged(calm)
    found = audit_of(calm)
    points = np.array(found["points"])
    assert len(points) == POINTS == len(set(points)) and (np.diff(points) > 0).all()
    assert (surface.status.ravel()[points] == Status.INTERPOLATED).all()
    for split in ("train", "test"):  # the samples of the latter are weighted
        name = f"{split}_loss"
        facts = found["variables"][name]
        true = (truth(surface, split) - surface[name]).ravel()[points]
        mean, se = np.array(facts["mean"]), np.array(facts["se"])
        off = np.abs(mean - true) / se
        assert (off < 4).sum() >= 12  # all points share their samples
        assert np.median(se) < np.nanmedian(surface[f"{name}_se"]) / 20  # of all the samples
        assert np.allclose(facts["stated"], surface[f"{name}_abs_error"].ravel()[points])
        assert FEWEST <= facts["samples"] <= SAMPLES and facts["within"] >= BORNE_OUT
        rms = np.sqrt(np.mean(true**2))
        noise = np.sqrt(np.mean(se**2))  # which all points share, so it does not average out
        assert abs(facts["typical"] - rms) < 2 * noise and noise < 3 * rms
        spent = facts["samples"] * (facts["nodes"] + POINTS) / facts["of"]
        assert spent <= SHARE * surface.evaluated.sum()
    assert report.clean and report.lines()[1].startswith("interpolation check: 16 of 16")
    surface.save(calm.surface)
    kept = Surface.load(calm.surface)
    assert kept.provenance["refinement"]["audit"] == found
    words = "interpolation check: 16 of 16 interpolated points within their stated error (typ"
    assert words in surface.provenance["caption"] and words in "\n".join(lines(status(calm)))


def test_what_is_interpolated_worse_than_is_stated_is_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*args: Any, **options: Any) -> Filled:
        filled = fill(*args, **options)
        return replace(filled, values=filled.values * 1.02)

    monkeypatch.setattr(audit, "fill", spoiled)
    folder = asked_in(tmp_path, count=COUNT)
    worked(folder)
    report = merged(folder)[1]
    facts = audit_of(folder)["variables"]["train_loss"]
    assert facts["within"] < BORNE_OUT and 0.005 < facts["typical"] < 0.1
    found = "interpolated points train_loss is further off than the stated error (typically 0.0"
    (line,) = (x for x in report.lines() if found in x)
    assert f"  {line}" in lines(status(folder)) and report.clean


def test_who_dies_over_it_leaves_it_to_the_next_and_it_comes_out_the_same(
    calm: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = asked_in(calm.root.parent, "killed", splits=("train", "test"), count=COUNT)
    with monkeypatch.context() as m:
        m.setattr(Picker, "losses", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert in_child(worker.work, folder, Role(device="cpu")) == Died(signal.SIGKILL)
    assert not is_complete(folder) and status(folder)["missing"] == 0
    before = evaluated(folder)
    assert worked(folder) == 0 and is_complete(folder)
    assert evaluated(folder) == before  # it adds no row
    assert audit_of(folder) == audit_of(calm)
    assert differences(merged(folder)[0], merged(calm)[0]) == []


def test_whoever_makes_it_it_is_the_same(calm: RunFolder) -> None:
    folder = asked_in(calm.root.parent, "static", splits=("train", "test"), count=COUNT)
    pids = [start(folder, index=i, of=2, claims="static") for i in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert audit_of(folder) == audit_of(calm)


@pytest.mark.parametrize(
    ("evaluate", "options", "reason"),
    [
        ("", {"kind": "opaque"}, "train_loss is one number for each batch"),
        ("", {"kind": "batches"}, "data['train'] is batches of its own, which cannot be cut"),
        ('batch_norm = "batch"', {}, 'batch_norm = "batch": a value depends on the rest'),
        ("", {"train": 300}, "16 of 300 samples would be more than 5% of what was evaluated"),
    ],
)
def test_where_it_is_not_possible_the_reason_is_kept(
    tmp_path: Path, evaluate: str, options: dict[str, Any], reason: str
) -> None:
    folder = asked_in(tmp_path, evaluate=evaluate, **options)
    worked(folder)
    surface, report = merged(folder)
    facts = surface.provenance["refinement"]["audit"]["variables"]
    assert facts["train_loss"]["left_out"].startswith(reason)
    said = f"interpolation check not made: {reason}"
    assert report.lines()[1].startswith(said) and said in surface.provenance["caption"]


def test_of_a_subset_in_slices_and_the_network_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "problem.py").write_text(FACTORY)
    problem = lsweep.Problem.from_factory(f"{tmp_path}/problem.py:two")
    tensors = {
        n: (p, p.data_ptr(), p.detach().clone()) for n, p in problem.model.named_parameters()
    }
    s = lsweep.sweep(problem, x=(-1, 1, 101), refine=0.005, slices=2, samples=1000, device="cpu",
                     directions={"parameters": ["a.*"]}, progress=False)  # fmt: skip
    facts = s.provenance["refinement"]["audit"]["variables"]["train_loss"]
    assert facts["of"] == 1000 and facts["within"] >= BORNE_OUT
    for name, p in problem.model.named_parameters():
        same, place, value = tensors[name]
        assert p is same and p.data_ptr() == place and torch.equal(p, value) and p.grad is None


# -- what it rests on ------------------------------------------------------------------------------


def test_coefficients_give_what_the_interpolant_gives() -> None:
    rng = np.random.default_rng(0)
    nodes, points = rng.random((30, 2)), rng.random((7, 2))
    values = 5 + np.sin(3 * nodes).sum(axis=1)
    model = Interpolant(nodes, values)
    c = model.coefficients(points)
    assert np.allclose(c @ values, model.predict(points)[0], rtol=1e-10)
    assert np.allclose(c.sum(axis=1), 1.0) and np.allclose(model.coefficients(nodes), np.eye(30))


def bowl(offsets: np.ndarray) -> np.ndarray:
    return np.asarray(1 + (offsets**2).sum(axis=1))


class Broken:
    """Samples of which some are infinite at one of the points."""

    def count(self, name: str) -> int:
        return 10_000

    def losses(self, name: str, samples: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        losses = bowl(offsets)[:, None] * np.ones(len(samples))
        losses[3, 5] = np.inf
        return losses


def test_a_point_that_is_not_finite_after_all_is_held_against_it() -> None:
    lattice = Lattice({"x": np.linspace(0, 1, 21), "y": np.linspace(0, 1, 21)})
    at = np.arange(0, 441, 4)
    found = Evaluated(at, bowl(lattice.offsets(at)), at % 3 == 0)
    told = audited(lattice, {"train_loss": found}, "key", Broken())
    facts = told["variables"]["train_loss"]
    assert facts["mean"][3] is None and facts["mean"].count(None) == 1
    assert facts["within"] == 15 / 16 and 0 < facts["typical"] < 1e-2
    assert contradictions(told) == []
    facts["within"] = 12 / 16
    (line,) = contradictions(told)
    assert line.startswith("interpolation check: at 4 of 16 interpolated points train_loss")


def test_nothing_is_audited_where_nothing_is_interpolated() -> None:
    lattice = Lattice({"x": np.linspace(0, 1, 9)})
    whole = Evaluated(np.arange(9), np.ones(9), np.zeros(9, dtype=bool))
    blank = Evaluated(np.arange(0, 9, 2), np.full(5, np.nan), np.zeros(5, dtype=bool))
    assert audited(lattice, {"train_loss": whole}, "key", Broken()) == {}
    assert audited(lattice, {"train_loss": blank}, "key", Broken()) == {}
    assert phrase({}) == "" and contradictions({}) == []


def test_an_error_too_small_to_be_seen_is_not_called_none() -> None:
    facts = {"typical": 0.0, "within": 1.0, "se": [0.003, None, 0.004], "stated": [0.2, None, 0.2]}
    told = phrase({"points": [1, 2, 3], "variables": {"a_loss": facts, "b_loss": {"left_out": ""}}})
    assert told.endswith(
        "3 of 3 interpolated points within their stated error (typically below 0.0035 off, "
        "stated 0.2, in a_loss)"
    )
