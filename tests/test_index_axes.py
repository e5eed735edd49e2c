"""Axes that count: replicates of random directions, layers, radii that move nothing.

Every value is compared with the network at θ + x·d_k computed here, d_k from its own definition.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import cases
import numpy as np
import problems
import pytest
import torch
from torch.func import functional_call

import lsweep
from lsweep.errors import LsweepError

EXACT = {"rtol": 1e-12, "atol": 1e-13}
REPLICATES = {"y": {"kind": "replicate"}}


def noise(key: str, name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    digest = hashlib.sha256(f"{seed}\0{key}\0{name}".encode()).digest()[:16]
    bits = np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64))
    return np.random.Generator(bits).standard_normal(shape)


def filtered(key: str, name: str, weight: np.ndarray) -> np.ndarray:
    d = noise(key, name, weight.shape)
    return (
        d * np.linalg.norm(weight, axis=1, keepdims=True) / np.linalg.norm(d, axis=1, keepdims=True)
    )


def test_each_replicate_is_a_direction_of_its_own_and_the_first_is_the_plain_one():
    problem = problems.quadratic()
    h, w = problems.hessian_of(problem), problem.model.weight.detach().numpy().copy()
    options: dict[str, Any] = {"precision": "float64"}
    s = lsweep.sweep(problem, x=(-1, 1, 5), y=(0, 3, 4), directions=REPLICATES, **options)
    for k, row in enumerate(s["train_loss"]):
        d = filtered("x" if k == 0 else f"x.{k}", "weight", w)[0]
        points = [w[0] + x * d for x in s.x]
        np.testing.assert_allclose(row, [0.5 * t @ h @ t for t in points], rtol=1e-9)
    plain = lsweep.sweep(problem, x=(-1, 1, 5), **options)
    assert plain["train_loss"].tobytes() == s["train_loss"][0].tobytes()
    assert len({row.tobytes() for row in s["train_loss"]}) == 4
    assert s.attributes["y"]["kind"] == "replicate"
    assert "weight_sq" in plain.values and "weight_sq" not in s.values


def test_at_a_layer_only_its_tensors_move(tmp_path: Path):
    problem = problems.classifier()
    model, (x, y) = problem.model, problem.data["train"]
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.save(problems.another(model), tmp_path / "b.pt")
    end = torch.load(tmp_path / "b.pt")
    recipes = {"x": {"kind": "to", "checkpoint": str(tmp_path / "b.pt")}, "y": {"kind": "layer"}}
    s = lsweep.sweep(
        problem,
        x=(-1, 1, 3),
        y=(0, 1, 2),
        directions=recipes,
        precision="float64",
        splits=["train"],
    )
    assert s.attributes["y"]["layers"] == "0 2"
    for row, layer in zip(s["train_loss"], ("0", "2"), strict=True):
        for value, offset in zip(row, s.x, strict=True):
            state = {
                n: t + (offset * (end[n] - t) if n.startswith(layer) else 0)
                for n, t in start.items()
            }
            loss = torch.nn.functional.cross_entropy(functional_call(model, state, (x,)), y)
            np.testing.assert_allclose(value, float(loss), **EXACT)


def test_a_radius_moves_nothing_and_a_plane_with_one_keeps_the_squared_norm():
    problem = problems.quadratic()
    s = lsweep.sweep(
        problem, x=(-1, 1, 3), y=(0, 0.5, 3), directions={"y": {"kind": "radius"}},
        precision="float64",
    )  # fmt: skip
    assert len({row.tobytes() for row in s["train_loss"]}) == 1
    assert np.array_equal(s["weight_sq"][0], s["weight_sq"][2])
    only = lsweep.sweep(problem, x=(0, 2, 3), directions={"x": {"kind": "replicate"}})
    assert np.ptp(only["train_loss"]) == 0 and np.ptp(only["weight_sq"]) == 0


@pytest.mark.parametrize(
    "backend", [pytest.param("native", marks=pytest.mark.full), "fused", "channels_last"]
)
def test_other_backends_turn_to_the_same_directions(backend: str):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 3),
    )  # fmt: skip
    images = problems.numbers(24, 1, 6, 6, dtype=torch.float32)
    data = {"train": (images, problems.labels(24, 3))}
    problem = lsweep.Problem(model, data, loss=torch.nn.CrossEntropyLoss())
    asked = {"x": (-1, 1, 3), "y": (0, 4, 5), "z": (0, 1, 2)}
    recipes = {**REPLICATES, "z": {"kind": "layer"}}
    eager, other = (
        lsweep.sweep(problem, **asked, directions=recipes, backend=b) for b in ("eager", backend)
    )
    np.testing.assert_allclose(other["train_loss"], eager["train_loss"], rtol=1e-5)
    assert len(np.unique(eager["train_loss"])) == 2 * 5 * 2 + 1


def toml(base: Path, count: int, more: str = "") -> Path:
    base.mkdir(exist_ok=True)
    factory = problems.factory_file(base, "classifier")
    (base / "sweep.toml").write_text(
        f'[problem]\nfactory = "{factory}"\n[grid.x]\nrange = [-1, 1]\ncount = 5\n'
        f"[grid.y]\nrange = [0, {count - 1}]\ncount = {count}\n[directions.y]\n"
        f'kind = "replicate"\n{more}[evaluate]\nprecision = "float64"\nbackend = "eager"\n'
    )
    return base / "sweep.toml"


def test_workers_kills_and_more_replicates_give_the_same_bits(tmp_path: Path):
    whole = cases.merged(cases.finished(toml(tmp_path / "a", 6)))[0]
    folder = cases.planned(toml(tmp_path / "b", 4))
    children = [cases.start(folder, index=i, of=3) for i in range(3)]
    cases.wait_for(lambda: len(list(folder.parts.glob("*"))) > 0)
    os.kill(children[0], 9)
    for child in children:
        os.waitpid(child, 0)
    cases.worked(folder)
    first = cases.merged(folder)[0]
    assert first["train_loss"].tobytes() == whole["train_loss"][:4].tobytes()
    before = len(cases.evaluated(folder))
    cases.planned(toml(tmp_path / "b", 6))
    cases.worked(folder)
    assert cases.differences(cases.merged(folder)[0], whole) == []
    assert len(cases.evaluated(folder)) == before + 2 * 5
    picture = tmp_path / "p.png"
    for words in (["merge"], ["verify"], ["status"], ["render", "-o", picture], ["prune"]):
        done = cases.command(words[0], folder.root, *words[1:])
        assert done.code == 0, done.err
    assert picture.exists()


def test_all_layers_are_counted_on_request(tmp_path: Path):
    text = toml(tmp_path, 2, 'kind = "layer"\n').read_text()
    text = text.replace('kind = "replicate"\n', "").replace("[0, 1]", '"auto"')
    (tmp_path / "sweep.toml").write_text(text)
    done = cases.command("plan", tmp_path / "sweep.toml")
    assert done.code == 0 and "y: layer, moves nothing itself: 0, 2" in done.out, done.err
    (tmp_path / "sweep.toml").write_text(text.replace("count = 2", "count = 9"))
    assert cases.command("plan", tmp_path / "sweep.toml").code == 0


@pytest.mark.parametrize(
    ("x", "y", "recipes", "words"),
    [
        ((-1, 1, 3), (0, 5, 3), REPLICATES, "counts 0, 1, …: with count = 3 write range = [0, 2]"),
        ((-1, 1, 3), (0, 2, 3), {"y": {"kind": "layer"}}, "count = 3: 2 layers move (0, 2)"),
        ((-1, 1, 3), (-1, 2, 3), {"y": {"kind": "radius"}}, "a radius is at least 0"),
        ((0, 1, 2), (0, 1, 2), {a: {"kind": "layer"} for a in "xy"}, "serves one axis"),
        (
            (-1, 1, 3),
            (0, 1, 2),
            {"x": {"orthogonalize": True}, **REPLICATES},
            "orthogonalize = true does not go with an axis of kind replicate",
        ),
    ],
)  # fmt: skip
def test_axes_that_cannot_be_counted_are_refused(x, y, recipes, words):
    with pytest.raises(LsweepError, match=r"^[^\n]*$") as caught:
        lsweep.sweep(problems.classifier(), x=x, y=y, directions=recipes)
    assert words in str(caught.value)


def test_what_cannot_follow_the_index_says_so():
    with pytest.raises(LsweepError, match="directions change along an axis of kind replicate"):
        lsweep.sweep(
            problems.classifier(), x=(-1, 1, 3), y=(0, 1, 2), directions=REPLICATES, backend="vmap"
        )
    with pytest.raises(LsweepError, match=r"\[refine\] interpolates along every axis, but y"):
        lsweep.sweep(
            problems.classifier(), x=(-1, 1, 9), y=(0, 1, 2), directions=REPLICATES, refine=0.1
        )
