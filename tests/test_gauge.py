"""With gauge = "equi" a picture depends on the function and not on how its neurons are scaled.

Promises: two ReLU networks that are one function have one filter-normalised picture, where without
the gauge they differ by more than the picture's range; the fixed point is unique, balanced and
computes what the network did; every worker starts from the planned bits; where nothing can be
rescaled, or checkpoints would stay behind, it is refused by name.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import merged, planned, worked
from problems import fixed, labels, numbers
from tiny import PROBLEM, SWEEP, lsweep, write_sweep
from torch import nn

import lsweep as package
from lsweep import Problem
from lsweep.axes.vectors import Origin
from lsweep.errors import PlanChanged
from lsweep.invariance.gauge import find_factors, gauged
from lsweep.measures.from_surface import rows_at_centre
from lsweep.measures.measures import Report
from lsweep.measures.sheet import text
from lsweep.plans.plan import Plan
from lsweep.preparing.restoring import load_problem
from lsweep.problems import weights
from lsweep.storage.folder import RunFolder

WIDTH = 32


def relu_network():
    """The notes' network: three hidden ReLU layers, trained until the labels are learned."""
    x = numbers(512, 20, seed=1)
    y = (torch.tanh(x) @ numbers(20, 4, seed=2)).argmax(1)
    net = nn.Sequential(
        *(m for i in range(3) for m in (nn.Linear(WIDTH if i else 20, WIDTH), nn.ReLU())),
        nn.Linear(WIDTH, 4),
    )
    fixed(net.double(), scale=0.25)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(30):
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(512))
        for rows in order.split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net, {"train": (x, y)}


def twin(net, seed=3):
    """The same function, its neurons rescaled by exp(N(0, 1))."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for i in (0, 2, 4):
            c = numbers(WIDTH, seed=seed + i).exp().to(other[0].weight)
            other[i].weight *= c[:, None]
            other[i].bias *= c
            other[i + 2].weight /= c
    return other


def line(net, data, gauge, precision, count=11):
    problem = Problem(net, data, loss=nn.CrossEntropyLoss())
    s = package.sweep(
        problem,
        (-1, 1, count),
        directions={"gauge": gauge, "seed": 7},
        precision=precision,
        backend="eager",
    )
    return s["train_loss"]


def test_one_function_has_one_picture():
    """The notes' figures: 29 apart along a slice whose range is 6, and 0 with the gauge."""
    net, data = relu_network()
    other = twin(net)
    torch.testing.assert_close(net(data["train"][0]), other(data["train"][0]))  # one function
    gaps, spans = {}, {}
    for gauge in ("none", "equi"):
        a, b = (line(n, data, gauge, "float64") for n in (net, other))
        gaps[gauge], spans[gauge] = np.abs(a - b).max(), np.ptp(a)
        assert a[5] == pytest.approx(b[5], rel=1e-9)  # the centre is the network itself
    print(f"filter alone: {gaps['none']:.3g} apart on a range of {spans['none']:.3g}")
    print(f"equi-normalised first: {gaps['equi']:.1e} on {spans['equi']:.3g}")
    assert gaps["none"] > spans["none"]
    assert gaps["equi"] <= 1e-9 * spans["equi"]
    a, b = (line(n.float(), data, "equi", "float32") for n in (net, other))
    assert np.abs(a - b).max() <= 1e-3 * np.ptp(a)


def test_the_fixed_point_is_balanced_unique_and_the_same_function():
    net = fixed(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 3))
    ).double()
    x, y = numbers(20, 4, seed=1), labels(20, 3)
    balanced = []
    for seed in (0, 1):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for i in (0, 2) if seed else ():
                c = numbers(8, seed=seed + i).exp()
                other[i].weight *= c[:, None]
                other[i].bias *= c
                other[i + 2].weight /= c
        problem = Problem(other, {"train": (x, y)}, loss=nn.CrossEntropyLoss())
        origin = gauged(Origin.of(other), find_factors(problem, "loss"))
        other.load_state_dict(origin.parameters)
        torch.testing.assert_close(other(x), net(x), rtol=1e-11, atol=1e-11)
        balanced.append(origin.parameters)
    for a, b in zip(*(p.values() for p in balanced), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for i in (0, 2):
        rows = torch.cat([balanced[0][f"{i}.weight"], balanced[0][f"{i}.bias"][:, None]], 1)
        torch.testing.assert_close(rows.norm(dim=1), balanced[0][f"{i + 2}.weight"].norm(dim=0))


RELU = PROBLEM.replace("nn.Tanh()", "nn.ReLU()")
GAUGED = SWEEP.replace("seed = 0", 'seed = 0\ngauge = "equi"')


def test_every_worker_starts_from_the_planned_bits(tmp_path):
    toml = write_sweep(tmp_path, GAUGED, RELU)
    folder = planned(toml)
    plan = Plan.read(folder)
    assert worked(folder) == 3
    surface, _ = merged(folder)
    problem, directions = load_problem(folder, plan)
    own = Origin.of(problem.model)
    assert set(directions.origin) == {"0.weight", "0.bias", "2.weight"}
    moved = own.everything | directions.origin
    assert plan.origin["sha256"] == weights.fingerprint(moved)
    assert plan.origin["sha256"] != weights.fingerprint(own.everything)
    for name, t in Origin.of(problem.model).parameters.items():  # the model itself is as it was
        assert torch.equal(t, own.parameters[name])
    assert surface.provenance["caption"].count("equi-normalised first") == 1
    rows = rows_at_centre(surface)
    assert [r.name for r in rows][-1] == "weight_norm"
    assert {r.context["gauge"] for r in rows} == {"equi"}
    assert text(Report("a.run", "", rows, [])).count("equi-normalised first") == 1
    more = write_sweep(tmp_path, GAUGED.replace("count = 3", "count = 5"), RELU)
    assert lsweep("run", more, "--on", "inline", "--no-picture") == 0  # one more round
    again, _ = merged(folder)
    assert again["train_loss"][::2].tobytes() == surface["train_loss"].tobytes()
    assert surface.center("train_loss") == pytest.approx(float(plain_centre(tmp_path)), rel=1e-6)


def plain_centre(base):
    toml = write_sweep(base / "plain", SWEEP, RELU)
    assert lsweep("run", toml, "--on", "inline", "--no-picture") == 0
    surface, _ = merged(RunFolder(toml.with_name("sweep.run")))
    assert {r.context["gauge"] for r in rows_at_centre(surface)} == {"none"}
    return surface.center("train_loss")


def test_another_network_on_the_plan_of_a_gauge_is_refused(tmp_path):
    folder = planned(write_sweep(tmp_path, GAUGED, RELU))
    plan = Plan.read(folder)
    other = Problem(
        nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)),
        {"train": (torch.zeros(2, 2), torch.tensor([0, 1]))},
        loss=nn.CrossEntropyLoss(),
    )
    with pytest.raises(PlanChanged, match=r"along \[0\], which this network does not have"):
        load_problem(folder, plan, other)


REFUSED = [
    (SWEEP.replace("seed = 0", 'gauge = "eqi"'), RELU, "gauge = 'eqi'; did you mean 'equi'?"),
    (GAUGED, PROBLEM.replace("Tanh", "GELU"), "can be rescaled one by one: tried 0 -> 2 (broken)"),
    (
        GAUGED.replace('"random"\nseed = 0', '"to"\ncheckpoint = "b.pt"').replace(
            'normalize = "filter"', ""
        ),
        RELU,
        'gauge = "equi" with kind = "to"',
    ),
    (
        GAUGED + '[trajectory]\ncheckpoints = ["b.pt"]\n',
        RELU,
        'gauge = "equi" with [trajectory]: it rescales the origin and not the checkpoints',
    ),
    (
        GAUGED + '[grid.y]\nrange = [-1, 1]\ncount = 3\n[directions.y]\ngauge = "none"\n',
        RELU,
        "gauge is equi and none: all axes start from one origin",
    ),
]


@pytest.mark.parametrize(("sweep", "code", "text"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_a_gauge_cannot_do_is_refused(tmp_path, capsys, sweep, code, text):
    assert lsweep("plan", write_sweep(tmp_path, sweep, code)) == 1
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1
    assert not (tmp_path / "sweep.run").exists()


def test_child_runs_start_from_the_same_origin(tmp_path, capsys):
    toml = write_sweep(tmp_path, GAUGED, RELU)
    arguments = ("--measures", "sharpness", "--replicates", 2)
    assert lsweep("plan", toml, *arguments) == 0, capsys.readouterr().err
    assert "gauge equi: the same function, its weights rescaled by 0." in capsys.readouterr().out
    folder = RunFolder(tmp_path / "sweep.run")
    child = Plan.read(folder.child("sharpness"))
    assert child.origin == Plan.read(folder).origin
    assert child.facts["gauge"] == Plan.read(folder).facts["gauge"]
