"""Pointwise metrics in runs: the value at each point is that of the dense Hessian there."""

from __future__ import annotations

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
from lsweep.axes.noise import random_signs, random_tensor
from lsweep.errors import LsweepError

FLOAT64: dict[str, Any] = {"precision": "float64"}
WEIGHTS = ("0.weight", "2.weight")


def dense(problem: lsweep.Problem, x: float) -> tuple[dict[str, int], np.ndarray]:
    """The Hessian of a classifier's loss over its weights at θ + x·d, and each weight's size."""
    model, (inputs, target) = problem.model, problem.data["train"]
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n in WEIGHTS:
        d = random_tensor(0, "x", n, state[n])
        state[n] += x * d * state[n].norm(dim=1, keepdim=True) / d.norm(dim=1, keepdim=True)
    sizes = {n: state[n].numel() for n in WEIGHTS}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split(list(sizes.values()))
        moved = {n: t.view(state[n].shape) for n, t in zip(WEIGHTS, parts, strict=True)}
        output = functional_call(model, {**state, **moved}, (inputs,))
        return torch.nn.functional.cross_entropy(output, target)

    flat = torch.cat([state[n].flatten() for n in WEIGHTS])
    return sizes, torch.autograd.functional.hessian(loss, flat).numpy()


def probe(sizes: dict[str, int], replicate: int) -> np.ndarray:
    key = f"probe.{replicate}" if replicate else "probe"
    signs = [random_signs(0, key, n, torch.zeros(k).double()) for n, k in sizes.items()]
    return np.concatenate(signs)


def test_a_quadratic_has_the_same_curvature_everywhere_and_a_mean_beside_it():
    problem = problems.quadratic()
    h = problems.hessian_of(problem)
    metrics = ["hessian_extremes", "loss", "hessian_trace"]
    s = lsweep.sweep(problem, x=(-1, 1, 3), y=(0, 1, 2), metrics=metrics, **FLOAT64)
    plain = lsweep.sweep(problem, x=(-1, 1, 3), y=(0, 1, 2), **FLOAT64)
    assert s["train_loss"].tobytes() == plain["train_loss"].tobytes()
    assert s["train_loss_se"].tobytes() == plain["train_loss_se"].tobytes()
    low, high = np.linalg.eigvalsh(h)[[0, -1]]
    np.testing.assert_allclose(s["train_hessian_max"], high, rtol=1e-8)
    np.testing.assert_allclose(s["train_hessian_min"], low, rtol=1e-6)
    v = probe({"weight": 6}, 0)
    np.testing.assert_allclose(s["train_hessian_trace"], v @ h @ v, rtol=1e-9)
    assert not [n for n in s.values if n.startswith("train_hessian") and n.endswith("_se")]
    assert s.provenance["audit"]["left_out"] == ["hessian_extremes", "hessian_trace"]
    assert s.attributes["train_hessian_trace"]["long_name"].startswith("train trace of the Hessian")


def test_each_point_has_its_own_hessian_and_each_replicate_its_own_probe():
    problem = problems.classifier()
    recipes = {"y": {"kind": "replicate"}}
    s = lsweep.sweep(
        problem, x=(0, 1, 2), y=(0, 2, 3), directions=recipes, splits=["train"],
        metrics=["hessian_trace"], **FLOAT64,
    )  # fmt: skip
    sizes, h = dense(problem, 0.0)
    wanted = [probe(sizes, k) @ h @ probe(sizes, k) for k in range(3)]
    np.testing.assert_allclose(s["train_hessian_trace"][:, 0], wanted, rtol=1e-9)
    sizes, h = dense(problem, 1.0)  # replicate 0 moves along the plain direction
    wanted = probe(sizes, 0) @ h @ probe(sizes, 0)
    np.testing.assert_allclose(s["train_hessian_trace"][0, 1], wanted, rtol=1e-9)


def test_along_layers_the_curvature_is_that_of_each_layer():
    problem = problems.classifier()
    s = lsweep.sweep(
        problem, x=(0, 1, 2), directions={"x": {"kind": "layer"}}, splits=["train"],
        metrics=["hessian_trace", "hessian_extremes"], **FLOAT64,
    )  # fmt: skip
    sizes, h = dense(problem, 0.0)
    first = sizes["0.weight"]
    v = probe(sizes, 0)
    for k, block in enumerate((slice(0, first), slice(first, None))):
        part = h[block, block]
        np.testing.assert_allclose(s["train_hessian_trace"][k], v[block] @ part @ v[block])
        np.testing.assert_allclose(s["train_hessian_max"][k], np.linalg.eigvalsh(part)[-1])


def test_a_value_per_sample_has_a_standard_error_over_samples():
    problem = problems.classifier()
    s = lsweep.sweep(
        problem, x=(0, 1, 2), metrics=["input_jacobian", "accuracy"], splits=["test"], **FLOAT64
    )
    model, (x, _) = problem.model, problem.data["test"]
    norms = [float(torch.autograd.functional.jacobian(model, row[None]).norm()) for row in x]
    np.testing.assert_allclose(s["test_input_jacobian"][0], np.mean(norms), rtol=1e-12)
    wanted = np.std(norms, ddof=1) / np.sqrt(len(norms))
    np.testing.assert_allclose(s["test_input_jacobian_se"][0], wanted, rtol=1e-9)
    assert "test_input_jacobian_diff_se" not in s.values and "test_accuracy_diff_se" in s.values


def test_batch_statistics_are_differentiated_through():
    problem = problems.normalized()
    model, (x, y) = problem.model, problem.data["train"]
    s = lsweep.sweep(
        problem, x=(0, 1, 2), metrics=["hessian_trace"], splits=["train"], batch_norm="batch",
        directions={"parameters": ["3.weight"]}, **FLOAT64,
    )  # fmt: skip
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()

    def loss(w: torch.Tensor) -> torch.Tensor:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        output = functional_call(model, {**state, **buffers, "3.weight": w}, (x,))
        return torch.nn.functional.cross_entropy(output, y)

    h = torch.autograd.functional.hessian(loss, state["3.weight"]).reshape(18, 18).numpy()
    model.eval()
    v = probe({"3.weight": 18}, 0)
    np.testing.assert_allclose(s["train_hessian_trace"][0], v @ h @ v, rtol=1e-7)


def test_an_equivalent_network_has_the_same_replicates_and_curvature_in_one_gauge():
    """Neuron-wise rescaling of a ReLU network changes loss and curvature in the filter metric."""
    model = problems.fixed(
        torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).double()
    )
    factors = torch.tensor([0.3, 2.0, 5.0, 0.1, 1.0, 7.0]).double()
    data = problems.classifier().data["train"]
    kinds: list[dict[str, Any]] = [{"gauge": "equi"}, {}]
    found: list[list[lsweep.Surface]] = []
    for _ in range(2):
        problem = lsweep.Problem(model, {"train": data}, loss=torch.nn.CrossEntropyLoss())
        found.append([
            lsweep.sweep(
                problem, x=(-1, 1, 3), y=(0, 1, 2), directions={**k, "y": {"kind": "replicate"}},
                metrics=["loss", "filter_hessian_trace"], **FLOAT64,
            )
            for k in kinds
        ])  # fmt: skip
        with torch.no_grad():
            model[0].weight *= factors[:, None]
            model[0].bias *= factors
            model[2].weight /= factors
    for name in ("train_loss", "train_filter_hessian_trace"):
        fixed, free = ((a[name], b[name]) for a, b in zip(*found, strict=True))
        np.testing.assert_allclose(*fixed, rtol=1e-8, atol=1e-12)
        assert np.abs(free[0] / free[1] - 1).max() > 0.01


def toml(base: Path, count: int) -> Path:
    base.mkdir(exist_ok=True)
    factory = problems.factory_file(base, "classifier")
    (base / "sweep.toml").write_text(
        f'[problem]\nfactory = "{factory}"\n[grid.x]\nrange = [0, {count - 1}]\ncount = {count}\n'
        '[directions.x]\nkind = "replicate"\n[evaluate]\nprecision = "float64"\n'
        'metrics = ["hessian_trace", "hessian_extremes"]\n'
    )
    return base / "sweep.toml"


def test_workers_kills_and_more_probes_give_the_same_bits(tmp_path: Path):
    whole = cases.merged(cases.finished(toml(tmp_path / "a", 6)))[0]
    folder = cases.planned(toml(tmp_path / "b", 4))
    children = [cases.start(folder, index=i, of=2) for i in range(2)]
    cases.wait_for(lambda: len(list(folder.parts.glob("*"))) > 0)
    os.kill(children[0], 9)
    for child in children:
        os.waitpid(child, 0)
    cases.worked(folder)
    first = len(cases.evaluated(folder))
    cases.planned(toml(tmp_path / "b", 6))
    cases.worked(folder)
    assert cases.differences(cases.merged(folder)[0], whole) == []
    assert len(cases.evaluated(folder)) == first + 2
    for name in ("merge", "verify", "status"):
        done = cases.command(name, folder.root)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("metrics", "options", "words"),
    [
        (["hessian_trace"], {"precision": "bfloat16"}, 'precision = "bfloat16" is too coarse'),
        (["spectrum"], {"slices": 2}, "it cannot be put together from slices; use slices = 1"),
        (["keskar"], {"batch_norm": "recalibrate"}, 'use "eval" or "batch"'),
        (["loss", "spectrum"], {"refine": 0.1}, "interpolates means over samples, not metric"),
        (["worst_case"], {}, 'needs an axis of radii: [directions.y] kind = "radius"'),
        (["hessian_trce"], {}, "no metric 'hessian_trce'; did you mean 'hessian_trace'?"),
    ],
)
def test_what_has_no_derivative_is_refused(metrics, options, words):
    with pytest.raises(LsweepError, match=r"^[^\n]*$") as caught:
        lsweep.sweep(problems.classifier(), x=(-1, 1, 9), metrics=metrics, **options)
    assert words in str(caught.value)


def test_a_loss_that_autograd_cannot_follow_is_refused_before_any_point():
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.detach()[:, 0] - target) ** 2

    data = {"train": (problems.numbers(8, 4), problems.labels(8, 3))}
    problem = lsweep.Problem(problems.classifier().model, data, loss=loss)
    with pytest.raises(LsweepError, match="the loss is detached from the weights"):
        lsweep.sweep(problem, x=(0, 1, 2), metrics=["hessian_trace"], **FLOAT64)
