"""Refined runs: whoever works, however often killed, the same few points make the same surface.

The problem's loss is a closed form of the offsets, so a refined surface is compared with what its
formula gives everywhere. Its points cost next to nothing, so most tests say that deciding costs
less; and they take some milliseconds each, so that several workers find something to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    Died,
    command,
    committed,
    differences,
    evaluated,
    in_child,
    merged,
    start,
    worked,
)

import lsweep
from lsweep.commands.submitting import work_left
from lsweep.errors import LsweepError
from lsweep.evaluating import choice
from lsweep.measures.measures import measure
from lsweep.merging.merge import merge
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Goal, Rounds
from lsweep.refinement import refining
from lsweep.refinement.asking import Ask, publish_round
from lsweep.runs.prune import prune
from lsweep.runs.status import is_complete, lines, share_done, status
from lsweep.runs.verify import verify
from lsweep.storage.files import publish, read_json, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import all_workers
from lsweep.surfaces.surface import Status, Surface
from lsweep.working import shift, worker
from lsweep.working.role import Role

FACTORY = """\
import math, pathlib, time, uuid
import torch
from torch import nn
import lsweep

HERE = pathlib.Path(__file__).parent


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight), nn.init.ones_(self.b.weight)


def flat(shape="bowl", pause=0.003):
    s, t = torch.linspace(0.5, 1.5, 16), torch.linspace(0.0, 0.4, 16)
    me = uuid.uuid4().hex

    def forward(model, batch):
        s, t = batch
        time.sleep(pause)
        x, y = abs(float(model.a.weight) - 1), abs(float(model.b.weight) - 1)
        if x + y > 0 and (HERE / "company").exists():
            (HERE / f"{me}.came").touch()
            while len(list(HERE.glob("*.came"))) < int((HERE / "company").read_text()):
                time.sleep(0.02)
        if shape == "raise" and x > 0.7 and (HERE / "broken").exists():
            raise ValueError("no value out there")
        loss = s * (x * x + 3 * y * y) + t
        if shape == "nan" and x + y > 1.54:
            loss = loss * math.nan
        if shape == "chaos":
            loss = s + math.sin(1e4 * x + 3e3 * y * y) / 2
        return {"loss": loss, "height": s * (x + y)}

    forward.metrics = ("loss", "height")
    return lsweep.Problem(Flat(), {"train": (s, t)}, forward=forward)
"""
COUNT = 25
TOLERANCE = 0.005


def toml_in(
    base: Path, *, count: int = COUNT, tolerance: float | None = TOLERANCE, **options: Any
) -> Path:
    """Write problem.py and sweep.toml: a square of |offsets| up to 1."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "problem.py").write_text(FACTORY)
    table = ", ".join(f"{k} = {json.dumps(v)}" for k, v in options.items())
    text = ['[problem]\nfactory = "problem.py:flat"', f"options = {{ {table} }}"]
    for axis, weight in (("x", "a"), ("y", "b")):
        text += [f"[grid.{axis}]\nrange = [-1, 1]\ncount = {count}"]
        text += [f'[directions.{axis}]\nparameters = ["{weight}.*"]']
    text += ["[evaluate]", 'metrics = ["loss", "height"]']
    text += [f"[refine]\ntolerance = {tolerance}"] if tolerance else []
    toml = base / "sweep.toml"
    toml.write_text("\n".join(text) + "\n")
    return toml


def asked_in(base: Path, run: Path | None = None, **options: Any) -> RunFolder:
    """Plan a refined run."""
    toml = toml_in(base, **options)
    folder = run or toml.with_name("sweep.run")
    done = command("plan", toml, "--run", folder)
    assert done.code == 0, done.err
    return RunFolder(folder)


def truth(surface: Surface) -> np.ndarray:
    return surface.x**2 + 3 * surface.y[:, None] ** 2 + 0.2


def largest_error(surface: Surface, wanted: np.ndarray) -> float:
    """The refinement error as the design defines it, against dense truth."""
    t = np.log(wanted)
    low, high = np.quantile(t[surface.evaluated], [0.02, 0.98])
    return float(np.abs(np.log(surface["train_loss"]) - t).max() / (high - low))


def rounds_of(folder: RunFolder) -> Rounds:
    return Rounds.read(folder, Plan.read(folder))


@pytest.fixture(scope="module", autouse=True)
def deciding_costs_nothing() -> Iterator[None]:
    """In all workers that are forked from here."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(refining, "CHEAP", 0.0)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refined")


@pytest.fixture(scope="module")
def calm(base: Path) -> RunFolder:
    """A refined run that one worker made, undisturbed."""
    folder = asked_in(base)
    points = worked(folder)
    assert isinstance(points, int), points
    assert points == share_done(folder)[0]
    return folder


@pytest.fixture(scope="module")
def reference(calm: RunFolder) -> Surface:
    surface, report = merged(calm)
    surface.save(calm.surface)
    assert report.clean
    return surface


def fresh(base: Path, name: str) -> RunFolder:
    """The same plan in a folder of its own."""
    return asked_in(base, base / f"{name}.run")


@pytest.fixture
def company(base: Path) -> Iterator[Callable[[int], None]]:
    """Let nobody leave its first point before so many workers are at one."""

    def wanted(workers: int) -> None:
        (base / "company").write_text(str(workers))

    yield wanted
    for path in (base / "company", *base.glob("*.came")):
        path.unlink(missing_ok=True)


def copied(calm: RunFolder, path: Path) -> RunFolder:
    shutil.copytree(calm.root, path)
    return RunFolder(path)


# -- what a refined surface is ---------------------------------------------------------------------


def test_few_points_give_the_surface_within_the_stated_error(
    calm: RunFolder, reference: Surface
) -> None:
    few = int(reference.evaluated.sum())
    assert 48 + 25 <= few <= 150
    assert len(evaluated(calm)) == few == share_done(calm)[0]
    error = reference["train_loss_error"]
    assert largest_error(reference, truth(reference)) <= error.max() <= TOLERANCE
    assert np.allclose(reference["train_loss"][reference.evaluated],
                       truth(reference)[reference.evaluated], rtol=1e-5)  # fmt: skip
    interpolated = reference.status == Status.INTERPOLATED
    assert np.array_equal(interpolated, ~reference.evaluated)
    assert (error[interpolated] > 0).all() and (error[~interpolated] == 0).all()
    off = np.abs(reference["train_loss"] - truth(reference))[interpolated]
    stated = reference["train_loss_abs_error"][interpolated]
    assert (off <= stated).mean() >= 0.95
    for name in ("train_loss_se", "train_loss_diff_se"):
        assert np.array_equal(np.isnan(reference[name]), interpolated)
    assert np.isfinite(reference["train_height"]).all()  # a metric that is not a loss is filled too
    assert reference.metrics == ("train_loss", "train_height")
    facts = reference.provenance["refinement"]
    assert (facts["state"], facts["evaluated"], facts["held_out"]) == ("done", few, 48)
    assert facts["largest_error"]["train_loss"] == error.max()


def test_what_looks_at_it_says_that_it_is_refined(calm: RunFolder, reference: Surface) -> None:
    few = int(reference.evaluated.sum())
    words = f"{few} of {COUNT**2} points evaluated, the rest interpolated, stated error up to"
    assert merge(calm)[1].lines()[0].startswith(words)
    assert ", a factor of 1.0" in merge(calm)[1].lines()[0]
    assert words in reference.provenance["caption"]
    state = status(calm)
    assert (state["complete"], state["missing"], state["points"]) == (True, 0, few)
    assert state["interpolated"] == COUNT**2 - few
    assert "  refinement: tolerance 0.5%, stated error up to" in "\n".join(lines(state))
    found = measure(reference)
    assert found["evaluated"] == few and "interpolated values" in found["values"]
    assert found["minimum_is"] == "evaluated" and found["minimum_at"] == {"x": 0.0, "y": 0.0}
    assert "values" not in measure(Surface({"x": np.arange(3.0)}, {"train_loss": np.arange(3.0)}))
    assert (verify(calm).problems, verify(calm).notes) == ([], [])


def test_the_error_and_the_evaluated_points_can_be_drawn(calm: RunFolder, tmp_path: Path) -> None:
    surface = merged(calm)[0]
    page = lsweep.render(surface, kind="heat", points=True)
    dots = [line for line in page.axes[0].get_lines() if line.get_marker() == "o"]
    at = {(float(x), float(y)) for x, y in zip(*dots[0].get_data(), strict=True)}
    rows, columns = np.nonzero(surface.evaluated)
    assert at == set(zip(surface.x[columns], surface.y[rows], strict=True))
    done = command("render", calm.root, "-o", tmp_path / "e.png", "--metric", "train_loss_error",
                   "--points", "--dpi", 40)  # fmt: skip
    assert done.code == 0 and (tmp_path / "e.png").exists()
    done = command("render", calm.root, "-o", tmp_path / "r.png", "--kind", "3d", "--points")
    assert done.code == 1 and "shows no points" in done.err


# -- whoever does it -------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [3, 400])  # of 400 the others never come, and these do not stand by
def test_three_workers_ask_the_same_and_evaluate_ahead(
    base: Path, calm: RunFolder, reference: Surface, of: int, company: Callable[[int], None]
) -> None:
    folder = fresh(base, f"three-of-{of}")
    company(3)
    first = 0 if of == 3 else 1
    pids = [start(folder, index=first + i, of=of) for i in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert differences(merged(folder)[0], reference) == []
    assert [(r.asked, r.adopted) for r in rounds_of(folder)] == [
        (r.asked, r.adopted) for r in rounds_of(calm)
    ]
    rows = evaluated(folder)
    assert len(rows) == len(set(rows)) >= share_done(folder)[0]
    owners = {p.header["worker"] for p in committed(folder).parts if len(p.rows)}
    assert len(owners) == 3


def test_static_shards_wait_for_each_other(base: Path, reference: Surface) -> None:
    folder = fresh(base, "static")
    pids = [start(folder, index=i, of=3, claims="static") for i in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert not folder.leases.exists()
    assert differences(merged(folder)[0], reference) == []
    assert len(evaluated(folder)) == share_done(folder)[0]


def test_a_static_worker_whose_fellows_never_come_goes_home(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fresh(base, "alone")
    monkeypatch.setattr(shift, "QUIET", 0.2)
    points = worked(folder, index=0, of=2, claims="static")
    assert 0 < points < share_done(folder)[1] and not is_complete(folder)
    assert merge(folder)[1].missing == COUNT**2 - points  # nothing is interpolated too early
    assert work_left(folder) == (COUNT**2 - points,) * 2


def test_kills_at_any_instant_change_no_bit(base: Path, reference: Surface) -> None:
    folder, rng = fresh(base, "stormy"), random.Random(3)
    for _ in range(12):
        pids = [start(folder, index=i, of=2) for i in range(2)]
        time.sleep(rng.uniform(0.05, 0.4))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert isinstance(worked(folder), int)
    assert differences(merged(folder)[0], reference) == []


def test_who_dies_between_completing_and_planning_leaves_that_to_the_next(
    base: Path, reference: Surface, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, turns = fresh(base, "gaps"), 0
    while not is_complete(folder):
        known = len(rounds_of(folder).all)
        with monkeypatch.context() as m:  # dies when this round is complete, before the next is
            m.setattr(shift, "plan_next", dies_after(known))
            assert in_child(worker.work, folder, Role(device="cpu")) == Died(signal.SIGKILL)
        assert share_done(folder)[0] == share_done(folder)[1]
        assert status(folder)["missing"] == 0 and "nobody works on it" in lines(status(folder))[-1]
        plan = Plan.read(folder)
        refining.plan_next(folder, plan, Rounds.read(folder, plan))
        turns += 1
    assert turns == len(rounds_of(folder).all) - 1
    assert worked(folder) == 0
    assert differences(merged(folder)[0], reference) == []


def dies_after(known: int) -> Callable[..., Any]:
    def plan_next(folder: RunFolder, plan: Plan, rounds: Rounds, sampler: Any) -> Any:
        assert len(rounds.all) == known
        os.kill(os.getpid(), signal.SIGKILL)

    return plan_next


def dear(folder: RunFolder, calm: RunFolder) -> RunFolder:
    """Have points cost so much that no other process finds the whole grid cheap."""
    folder.devices.mkdir()
    for known in map(read_json, calm.all_devices()):
        publish(folder.device(known["class"]), sealed({**known, "seconds_per_point": 60.0}))
    return folder


@pytest.mark.usefixtures("cluster")
def test_tasks_of_slurm_refine_together(
    base: Path, calm: RunFolder, reference: Surface, company: Callable[[int], None]
) -> None:
    folder = dear(fresh(base, "tasks"), calm)
    company(2)
    done = command("submit", folder.root, "--tasks", 2, "--ranks", 2, "--time", 5, "--wait")
    assert done.code == 0, done
    assert differences(Surface.load(folder.surface), reference) == []
    assert len(all_workers(folder)) > 1


def test_ranks_of_mpi_refine_together(base: Path, calm: RunFolder, reference: Surface) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec.hydra")
    if not mpiexec.exists():
        pytest.skip("needs the mpich wheel: pip install 'lsweep[mpi]'")
    from test_mpi import Launcher

    folder = dear(fresh(base, "ranks"), calm)
    done = Launcher((str(mpiexec),)).run(
        2, "run", base / "sweep.toml", "--run", folder.root, "--on", "mpi", "--no-picture"
    )
    assert done.code == 0, done.err
    assert differences(Surface.load(folder.surface), reference) == []


# -- what does not count ---------------------------------------------------------------------------


def test_points_evaluated_ahead_that_nobody_asked_for_change_nothing(
    calm: RunFolder, reference: Surface, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(calm, tmp_path / "ahead.run")
    rounds = rounds_of(folder)
    optional = np.flatnonzero(~rounds.required)
    assert len(optional)
    with monkeypatch.context() as m:
        m.setattr(Rounds, "required", property(lambda self: np.ones(self.total, dtype=bool)))
        assert worked(folder) == len(optional)
    assert differences(merged(folder)[0], reference) == []
    assert share_done(folder) == share_done(calm)
    before = evaluated(folder)
    folder.surface.unlink()
    merged(folder)[0].save(folder.surface)
    prune(folder)  # keeps them
    assert evaluated(folder) == before
    # Whoever removes [refine] is spared them.
    command("plan", toml_in(tmp_path / "dense", tolerance=None), "--run", folder.root)
    new = worked(folder)
    assert new == COUNT**2 - len(before)
    dense, report = merged(folder)
    assert (report.refined, report.missing) == ("", 0)
    assert (dense.status == Status.OK).all() and np.allclose(
        dense["train_loss"], truth(dense), rtol=1e-5
    )


# -- more and less ---------------------------------------------------------------------------------


def test_a_tighter_tolerance_and_a_finer_grid_reuse_what_there_is(
    calm: RunFolder, tmp_path: Path
) -> None:
    folder = copied(calm, tmp_path / "tight.run")
    toml, tolerance = toml_in(tmp_path / "tight"), 0.004
    for count in (COUNT, 2 * COUNT - 1):
        before = set(evaluated(folder))
        wanted = ["--run", folder.root, "--set", f"refine.tolerance={tolerance}"]
        wanted += ["--set", f"grid.x.count={count}", "--set", f"grid.y.count={count}"]
        assert command("plan", toml, *wanted).code == 0
        assert not is_complete(folder)
        again = command("plan", toml, *wanted)
        assert again.code == 0 and "at most all" in again.out
        new = worked(folder)
        rows = evaluated(folder)
        assert len(rows) == len(set(rows)) == len(before) + new
        surface, report = merged(folder)
        assert report.clean and surface.shape == (count, count)
        assert largest_error(surface, truth(surface)) <= tolerance
        assert surface["train_loss_error"].max() <= tolerance
        assert new < int(surface.evaluated.sum())
    assert command("plan", toml, *wanted).code == 0
    assert is_complete(folder) and verify(folder).problems == []


def test_what_is_still_to_be_merged_or_asked_is_told(
    calm: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(calm, tmp_path / "calm.run")
    merge(folder)[0].save(folder.surface)
    told = lines(status(folder))
    filled = status(folder)["interpolated"]
    assert f"  {filled} interpolated" in told and filled > 300
    folder.surface.unlink()
    told = "\n".join(lines(status(folder)))
    assert f"  {filled} to be interpolated" in told and "every point is evaluated" not in told
    open_ = asked_in(tmp_path)
    monkeypatch.setattr(shift, "QUIET", 0.0)
    worked(open_, index=0, of=3, claims="static")  # and nobody else
    asked = rounds_of(open_).last.points
    left = asked - len(evaluated(open_))
    assert 0 < left < asked
    assert f"{left} of {asked} points asked so far are missing" in merged(open_)[1].lines()


def test_a_merge_that_rounds_otherwise_gives_the_same_surface(
    calm: RunFolder, tmp_path: Path
) -> None:
    """Threads and kinds of CPU differ between nodes, and with them an interpolant's last bits."""
    folder = copied(calm, tmp_path / "calm.run")
    surface = merge(folder)[0]
    filled = surface.status == Status.INTERPOLATED
    for where, much, same in ((filled, 1e-2, False), (~filled, 1e-9, False), (filled, 1e-9, True)):
        values = dict(surface.values)
        values["train_loss"] = values["train_loss"] * (1 + much * where)
        dataclasses.replace(surface, values=values).save(folder.surface)
        assert ("older than the parts" in str(verify(folder).notes)) is not same
    prune(folder)  # of the last


def test_a_chaotic_surface_is_evaluated_whole(tmp_path: Path) -> None:
    folder = asked_in(tmp_path, count=17, shape="chaos")
    assert worked(folder) == 17**2 == len(evaluated(folder))
    surface, report = merged(folder)
    assert (surface.status == Status.OK).all() and "train_loss_error" not in surface.values
    assert "the whole grid: the surface is too rough" in report.lines()[0]
    assert rounds_of(folder).last.refine.state == Goal.DENSE
    # Nothing is left that another tolerance could ask for.
    command("plan", toml_in(tmp_path, count=17, tolerance=0.1, shape="chaos"))
    assert is_complete(folder)


def test_where_a_point_is_cheaper_than_deciding_all_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refining, "CHEAP", 1e3)  # on a busy machine anything takes long
    folder = asked_in(tmp_path, count=15, pause=0.0)
    assert worked(folder) == 15**2
    report = merged(folder)[1]
    assert report.clean and "less than deciding" in report.lines()[0]
    assert len(rounds_of(folder).all) == 2


def test_a_loss_that_waits_is_not_cheap(tmp_path: Path) -> None:
    """Its seconds are not the processor's: they are told, and the grid is refined."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return (output - target).square().mean(1)

    net = torch.nn.Linear(1, 1)
    torch.nn.init.ones_(net.weight)
    problem = lsweep.Problem(net, {"train": (torch.ones(4, 1), torch.ones(4, 1))}, loss)
    lsweep.sweep(problem, x=(-1, 1, 65), run=tmp_path / "run", refine=0.2)
    folder = RunFolder(tmp_path / "run")
    assert read_json(folder.all_devices()[0])["seconds_per_point"] >= 0.03
    assert len(evaluated(folder)) < 65


# -- troubles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", [choice.WORTH, 0.0])
def test_failed_points_count_as_done_and_can_be_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worth: float
) -> None:
    monkeypatch.setattr(choice, "WORTH", worth)  # backends are compared at corners, which raise
    monkeypatch.setattr(choice, "SHARE", 1e3)
    (tmp_path / "broken").touch()
    folder = asked_in(tmp_path, shape="raise")
    assert isinstance(worked(folder), int)
    assert is_complete(folder)
    surface, report = merged(folder)
    failed = surface.status == Status.FAILED
    assert report.failed == {"ValueError: no value out there (problem.py:29)": int(failed.sum())}
    assert failed.any() and (np.abs(surface.x[np.nonzero(failed)[1]]) > 0.7).all()
    inner = np.abs(surface.x) < 0.6
    assert np.allclose(surface["train_loss"][:, inner], truth(surface)[:, inner], rtol=0.1)
    (tmp_path / "broken").unlink()
    done = command("run", folder.root, "--retry-failed", "--on", "inline", "--no-picture")
    assert done.code == 0, done.err
    surface = Surface.load(folder.surface)
    assert not (surface.status == Status.FAILED).any()
    assert largest_error(surface, truth(surface)) <= TOLERANCE


def test_what_is_not_finite_is_refined_around(tmp_path: Path) -> None:
    folder = asked_in(tmp_path, shape="nan")
    assert isinstance(worked(folder), int) and is_complete(folder)
    surface, report = merged(folder)
    assert report.clean and report.nonfinite == (surface.status == Status.NONFINITE).sum() > 0
    outside = np.abs(surface.x) + np.abs(surface.y[:, None]) > 1.54
    assert (surface.status[outside] != Status.OK).all()
    inside = ~outside & surface.evaluated
    assert np.allclose(surface["train_loss"][inside], truth(surface)[inside], rtol=1e-5)
    smooth = np.abs(surface.x) + np.abs(surface.y[:, None]) < 1.3
    off = np.abs(np.log(surface["train_loss"]) - np.log(truth(surface)))
    assert off[smooth].max() < 0.05


def test_a_round_that_asks_no_point_is_no_round_to_wait_for(tmp_path: Path) -> None:
    folder = asked_in(tmp_path, count=9, tolerance=None, pause=0.0)
    plan = Plan.read(folder)
    last = rounds_of(folder).last
    publish_round(folder, plan, lambda before: Ask(last.grid, {}, asked=[]) if len(before.all) == 1
                  else None)  # fmt: skip
    assert worked(folder) == 81 and is_complete(folder)
    assert merged(folder)[1].clean


# -- in this process -------------------------------------------------------------------------------


def test_sweep_refines_by_keyword(tmp_path: Path) -> None:
    (tmp_path / "problem.py").write_text(FACTORY)
    problem = lsweep.Problem.from_factory(f"{tmp_path}/problem.py:flat", pause=0.01)
    start = problem.model.state_dict()
    torch.save({k: 1.5 * v for k, v in start.items()}, tmp_path / "step.pt")
    line = (-1, 1, 201)
    options = {"directions": {"parameters": ["a.*"]}, "device": "cpu", "progress": False}
    s = lsweep.sweep(problem, x=line, refine=0.005, slices=2, **options,
                     trajectory=[str(tmp_path / "step.pt")])  # fmt: skip
    assert 9 + 20 <= s.evaluated.sum() < 80
    assert (s.status == Status.INTERPOLATED).sum() == 201 - s.evaluated.sum()
    t = np.log(s.x**2 + 0.2)
    low, high = np.quantile(t[s.evaluated], [0.02, 0.98])
    assert np.abs(np.log(s["train_loss"]) - t).max() <= 0.005 * (high - low)
    assert s.trajectory.values["train_loss"] == pytest.approx([0.2 + 4 * 0.5**2])
    with pytest.raises(LsweepError, match="refine: tolerance = 2: a share of the loss's range"):
        lsweep.sweep(problem, x=line, refine={"tolerance": 2}, **options)
