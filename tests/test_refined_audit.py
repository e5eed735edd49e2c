"""The audit of a refinement: interpolated points are as far off as a few samples say they are.

The problem is logistic regression with two weights, of which every sample's loss is known
everywhere, so that the audit's estimates are compared with true errors. One of its two splits has
weighted samples.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Died, command, differences, evaluated, in_child, merged, worked

import lsweep
from lsweep import known, refining, worker
from lsweep.audit import POINTS, SAMPLES
from lsweep.folder import RunFolder
from lsweep.picking import Picker
from lsweep.plan import Plan
from lsweep.role import Role
from lsweep.rounds import Rounds
from lsweep.status import is_complete, lines, status
from lsweep.surface import Status, Surface

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
    return {"loss": (nn.functional.softplus(-3 * (a * u + b * v)), w)}


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
    signs = [float(np.sign(surface.provenance["signs"][a])) for a in "xy"]
    a, b = 1 + signs[0] * x[..., None], 1 + signs[1] * y[..., None]
    return np.asarray((np.logaddexp(0, -3 * (a * u + b * v)) * w).sum(-1) / w.sum())


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
        folder = asked_in(
            tmp_path_factory.mktemp("audit"), splits=("train", "test"), count=COUNT
        )
        assert isinstance(worked(folder), int)
    return folder


def test_x(calm):
    surface, report = merged(calm)
    print(report.lines(), "\n".join(lines(status(calm))), surface.provenance["caption"])
    print(json.dumps(audit_of(calm), indent=1))
    print(Plan.read(calm).facts)
