"""Eigenvectors and gradients as directions: exact ones of a quadratic; stored, never remade."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

import cases
import numpy as np
import problems
import pytest
import torch

import lsweep
from lsweep.errors import LsweepError
from lsweep.plans.plan import Plan
from lsweep.plans.settings import Settings
from lsweep.preparing import planning
from lsweep.problems.subsets import subsampled
from lsweep.storage.folder import RunFolder
from lsweep.storage.stored import read_arrays


def exact(problem: lsweep.Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """H, θ, eigenvalues upward and unit eigenvectors as columns, the largest component positive."""
    h, theta = problems.hessian_of(problem), problem.model.weight.detach().numpy()[0].copy()
    values, vectors = np.linalg.eigh(h)
    peaks = vectors[np.abs(vectors).argmax(axis=0), np.arange(len(h))]
    return h, theta, values, vectors * np.sign(peaks)


def test_top_bottom_and_second_eigenvectors_span_the_volume():
    problem = problems.quadratic()
    h, theta, values, vectors = exact(problem)
    s = lsweep.sweep(
        problem, x=(-1, 1, 3), y=(0, 1, 3), z=(0, 0.5, 2), directions={"kind": "hessian"},
        precision="float64",
    )  # fmt: skip
    length = np.linalg.norm(theta)  # the only filter's, and so the random direction's
    d = [length * vectors[:, k] for k in (-1, 0, -2)]
    for k, j, i in np.ndindex(s.shape):
        t = theta + s.x[i] * d[0] + s.y[j] * d[1] + s.axes["z"][k] * d[2]
        np.testing.assert_allclose(s["train_loss"][k, j, i], 0.5 * t @ h @ t, rtol=1e-6)
    facts = s.provenance["plan"]["facts"]["axes"]
    found = [facts[a]["eigenvalue"] for a in "xyz"]
    np.testing.assert_allclose(found, values[[-1, 0, -2]], rtol=1e-9)
    assert max(facts[a]["residual"] for a in "xyz") < 1e-6
    assert "x: hessian, eigenvector 1, bias+norm ignored, eigenvalue" in s.provenance["caption"]
    assert s.attributes["y"]["direction"] == "hessian, eigenvector -1"


def test_a_gradient_points_uphill_and_is_as_long_as_a_random_direction():
    problem = problems.quadratic()
    h, theta, _, vectors = exact(problem)
    recipes = {"x": {"kind": "gradient"}, "y": {"kind": "hessian", "eigenvector": -2}}
    s = lsweep.sweep(problem, x=(-1, 1, 3), y=(0, 1, 2), directions=recipes, precision="float64")
    slope = np.linalg.norm(h @ theta)
    length = np.linalg.norm(theta)
    ends = [theta + x * length * h @ theta / slope for x in (-1, 0, 1)]
    np.testing.assert_allclose(s["train_loss"][0], [0.5 * t @ h @ t for t in ends], rtol=1e-8)
    end = theta + length * vectors[:, 1]
    np.testing.assert_allclose(s["train_loss"][1, 1], 0.5 * end @ h @ end, rtol=1e-6)
    facts = s.provenance["plan"]["facts"]["axes"]
    np.testing.assert_allclose(facts["x"]["slope"], slope, rtol=1e-12)
    np.testing.assert_allclose([facts["x"]["norm"], facts["y"]["norm"]], length, rtol=1e-8)


def test_the_plan_says_how_far_the_quadratic_goes(tmp_path: Path):
    (tmp_path / "sweep.toml").write_text(
        f'[problem]\nfactory = "{problems.factory_file(tmp_path, "quadratic")}"\n'
        "[grid.x]\nrange = [-50, 50]\ncount = 3\n[grid.y]\nrange = [-0.1, 0.1]\ncount = 3\n"
        '[directions]\nkind = "hessian"\n[evaluate]\nprecision = "float64"\n'
    )
    done = cases.command("plan", tmp_path / "sweep.toml")
    assert done.code == 0, done.err
    said = [line.strip() for line in done.out.splitlines() if "quadratic" in line]
    advice = [line.strip() for line in done.out.splitlines() if "take one near" in line]
    problem = problems.quadratic()
    h, theta, values, vectors = exact(problem)
    centre, length = 0.5 * theta @ h @ theta, np.linalg.norm(theta)
    for line, word, k in zip(said, ("rises", "falls"), (-1, 0), strict=True):
        bend = 0.5 * values[k] * length**2
        far = float(re.search(r"by ([^ ]+) at . = 1,", line)[1])
        assert word in line and far == pytest.approx(abs(bend), rel=0.01)
        there = float(line.rpartition(" = ")[2])
        # Halfway between both sides, where the slope cancels.
        ends = [theta + s * there * length * vectors[:, k] for s in (1, -1)]
        moved = np.mean([0.5 * t @ h @ t for t in ends]) - centre
        goal = -centre if word == "falls" and centre > 0 else max(1, centre) * np.sign(bend)
        assert moved == pytest.approx(goal, rel=0.1)
    assert len(advice) == 1 and advice[0].startswith("the range [-50, 50] goes ")
    again = cases.command("run", tmp_path / "sweep.toml", "--on", "inline", "--no-picture")
    assert f"x: {said[0]}\nx: {advice[0]}\ny: {said[1]}\n" in again.out


def test_a_subset_of_the_samples_is_what_derivatives_are_taken_over():
    problem = problems.quadratic(samples=40)
    s = lsweep.sweep(
        problem, x=(0, 1, 2), directions={"kind": "hessian"}, precision="float64", samples=12
    )
    subset = subsampled(problem, {"splits": ["train"], "samples": 12, "batch_norm": "eval"})
    a, t = (p.double().numpy() for p in next(iter(subset.splits["train"].batches(12))))
    top = np.linalg.eigvalsh((a * t[:, None]).T @ a / 12)[-1]
    facts = s.provenance["plan"]["facts"]["axes"]["x"]
    np.testing.assert_allclose(facts["eigenvalue"], top, rtol=1e-6)


def toml(base: Path, count: int = 5) -> Path:
    base.mkdir(exist_ok=True)
    factory = problems.factory_file(base, "classifier")
    (base / "sweep.toml").write_text(
        f'[problem]\nfactory = "{factory}"\n[grid.x]\nrange = [-1, 1]\ncount = {count}\n'
        '[grid.y]\nrange = [-1, 1]\ncount = 3\n[directions]\nkind = "hessian"\n'
        '[directions.y]\nkind = "gradient"\n[evaluate]\nprecision = "float64"\n'
    )
    return base / "sweep.toml"


def state(folder: RunFolder) -> dict[str, tuple[int, bytes]]:
    arrays = folder.arrays.glob("*.h5")
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in arrays}


def test_workers_read_what_was_computed_once(tmp_path: Path):
    folder = cases.planned(toml(tmp_path))
    stored = state(folder)
    assert [n[0] for n in sorted(stored)] == ["x", "y"]
    for child in [cases.start(folder, index=i, of=2) for i in range(2)]:
        assert os.waitpid(child, 0)[1] == 0
    first = cases.merged(folder)[0]
    done = cases.command("plan", toml(tmp_path, 9), "--run", folder.root)
    assert done.code == 0 and "eigenvalue" in done.out and "norm of the gradient" in done.out
    assert {
        p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.arrays.glob("*.h5")
    } == stored
    cases.worked(folder)
    s = cases.merged(folder)[0]
    assert s["train_loss"][:, ::2].tobytes() == first["train_loss"].tobytes()
    assert len(cases.evaluated(folder)) == 9 * 3
    assert cases.command("verify", folder.root).code == 0
    again = cases.command("plan", toml(tmp_path, 9), "--set", "directions.x.seed=4")
    assert again.code == 1 and "directions.x has another recipe" in again.err


def test_of_two_that_plan_at_once_the_first_ones_vectors_count(tmp_path: Path, monkeypatch):
    settings, folder = Settings.from_file(toml(tmp_path)), RunFolder(tmp_path / "sweep.run")
    problem = problems.classifier()
    derive, calls = planning.derive, []

    def slowly(*arguments, **options):
        """Another machine, whose bits differ, is done before this one."""
        found = derive(*arguments, **options)
        calls.append(found["x"].tensors["0.weight"].numpy())
        if len(calls) == 1:
            planning.plan_run(settings, problem, tmp_path, folder)
            return found
        flipped = {n: -t for n, t in found["x"].tensors.items()}
        return {**found, "x": dataclasses.replace(found["x"], tensors=flipped)}

    monkeypatch.setattr(planning, "derive", slowly)
    planned = planning.plan_run(settings, problem, tmp_path, folder)
    assert len(calls) == 2 and planned.plan.digest == Plan.read(folder).digest
    assert len([p for p in folder.arrays.glob("*.h5") if p.name.startswith("x-")]) == 2
    found = read_arrays(folder, "x", planned.plan.directions["x"]["stored"])["0.weight"]
    assert np.array_equal(found, -calls[0])


def test_a_map_of_the_curvature_lies_in_the_plane_of_its_parent(tmp_path: Path):
    folder = cases.planned(toml(tmp_path))
    done = cases.command("plan", folder.root, "--measures", "convexity", "--samples", 12)
    assert done.code == 0, done.err
    parent, child = (Plan.read(f) for f in (folder, folder.child("convexity")))
    assert (child.evaluate["samples"], parent.evaluate["samples"]) == (12, None)
    assert child.directions == parent.directions
    for axis in "xy":
        assert child.facts["axes"][axis] == parent.facts["axes"][axis]


@pytest.mark.parametrize("trouble", ["missing", "damaged", "another"])
def test_stored_directions_that_are_not_there_are_one_line(tmp_path: Path, trouble: str):
    folder = cases.planned(toml(tmp_path))
    x, y = sorted(folder.arrays.glob("*.h5"))
    if trouble == "missing":
        x.unlink()
    elif trouble == "damaged":
        data = bytearray(x.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        x.write_bytes(data)
    else:
        x.write_bytes(y.read_bytes())
    word = "missing" if trouble == "missing" else "damaged"
    for arguments in (("work", folder.root), ("plan", tmp_path / "sweep.toml")):
        done = cases.command(*arguments)
        assert done.code == 1 and done.err.count("\n") == 1
        assert f"{x.name} is {word}: it was computed when the run was planned" in done.err
    assert f"{x.name} is {word}" in cases.command("verify", folder.root).err


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"kind": "hessian", "eigenvector": 0}, "eigenvector = 0: 1 is the largest"),
        ({"kind": "hessian", "eigenvector": 99}, "eigenvector 99: there are 56"),
        ({"kind": "random", "eigenvector": 1}, 'eigenvector goes with kind = "hessian"'),
        ({"kind": "hessian", "normalize": "filter"}, "it would be another vector"),
        ({"kind": "gradient", "parameters": ["9.*"]}, "leaves nothing to move"),
    ],
)
def test_directions_that_have_no_derivative_are_refused(recipe, words):
    with pytest.raises(LsweepError, match=r"^[^\n]*$") as caught:
        lsweep.sweep(problems.classifier(), x=(-1, 1, 3), directions=recipe)
    assert words in str(caught.value)


def test_two_axes_are_not_one_gradient():
    uphill, other = {"kind": "gradient"}, {"kind": "gradient", "parameters": ["0.*"]}
    with pytest.raises(LsweepError, match="but there is one gradient: sweep a line, or give"):
        lsweep.sweep(problems.classifier(), x=(-1, 1, 3), y=(-1, 1, 3), directions=uphill)
    recipes = {"x": uphill, "y": other}  # of fewer weights it is another
    s = lsweep.sweep(problems.classifier(), x=(-1, 1, 3), y=(-1, 1, 3), directions=recipes)
    assert np.isfinite(s["train_loss"]).all()


def test_without_scipy_the_kind_that_needs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    words = r'^directions\.x: kind = "hessian" needs scipy: pip install'
    with pytest.raises(LsweepError, match=words):
        lsweep.sweep(problems.classifier(), x=(-1, 1, 3), directions={"kind": "hessian"})


def test_at_a_stationary_point_the_gradient_gives_no_direction():
    problem = problems.quadratic()
    with torch.no_grad():
        problem.model.weight.zero_()
    with pytest.raises(LsweepError, match="the gradient is zero at the centre"):
        lsweep.sweep(problem, x=(-1, 1, 3), directions={"kind": "gradient"}, precision="float64")


def test_a_plan_keeps_its_recipes(tmp_path: Path):
    folder = cases.planned(toml(tmp_path))
    asked = Settings.from_file(tmp_path / "sweep.toml").directions
    plan = Plan.read(folder).directions
    assert [(a, plan[a]["kind"], plan[a]["eigenvector"]) for a in "xy"] == [
        ("x", "hessian", 1), ("y", "gradient", None),
    ]  # fmt: skip
    assert asked["x"].ignore == "bias+norm" and asked["x"].normalize == "none"
