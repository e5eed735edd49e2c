"""The norm of ∂f/∂x at each sample: exact for linear networks, the same for equal functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import Attentive
from problems import fixed, labels, numbers
from torch import Tensor, nn

import lsweep
from lsweep.backends.eager import batchnorm
from lsweep.derivatives import jacobian
from lsweep.derivatives.computing import compute
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError


def values(problem: lsweep.Problem, size: int = 4, **options: Any) -> Tensor:
    problem.model.eval()
    names = [n for n, p in problem.model.named_parameters() if p.dim() > 1]
    objective = Objective(problem, lambda: problem.splits["train"].batches(size), names, **options)
    found = compute("input_jacobian", objective, objective.filter_scales())["input_jacobian"]
    assert torch.equal(found.weights, torch.ones_like(found.values))
    return found.values


def test_a_linear_network_has_the_norm_of_its_matrix():
    model = fixed(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double())
    problem = lsweep.Problem(
        model, {"train": (numbers(10, 5), labels(10, 3))}, loss=nn.CrossEntropyLoss()
    )
    exact = (model[1].weight @ model[0].weight).norm().item()
    assert values(problem).tolist() == pytest.approx([exact] * 10)


def test_each_sample_has_its_own():
    model = fixed(Attentive().double())
    x = numbers(6, 3, 4, seed=1)
    problem = lsweep.Problem(model, {"train": (x, labels(6, 3))}, loss=nn.CrossEntropyLoss())
    model.eval()
    exact = [
        torch.autograd.functional.jacobian(model, x[i : i + 1]).norm().item() for i in range(6)
    ]
    assert values(problem).tolist() == pytest.approx(exact)
    assert torch.allclose(values(problem, 1), values(problem, 6), rtol=1e-12)


def test_all_float_inputs_count_and_whole_numbers_do_not():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.Embedding(5, 3), nn.Linear(3, 2, bias=False)

        def forward(self, ids: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
            return self.head(self.read(ids) * factor + shift)

    model = fixed(Both().double())
    ids, factor = torch.tensor([0, 3, 4]), numbers(3, 3, seed=2)
    data = {"ids": ids, "shift": numbers(3, 3), "factor": factor, "labels": labels(3, 2)}
    problem = lsweep.Problem(model, {"train": data}, loss=nn.CrossEntropyLoss())
    w = model.head.weight.detach()
    exact = [
        (w.norm() ** 2 + (w * model.read.weight[i].detach()).norm() ** 2).sqrt().item() for i in ids
    ]
    assert values(problem).tolist() == pytest.approx(exact)
    only = lsweep.Problem(
        nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double(),
        {"train": (ids, labels(3, 2))},
        loss=nn.CrossEntropyLoss(),
    )
    with pytest.raises(LsweepError, match="token ids"):
        values(only)
    with pytest.raises(LsweepError, match="token ids"):
        values(lsweep.Problem(only.model, {"train": ids}, forward=lsweep.causal_lm))


def test_a_rescaling_by_powers_of_two_changes_no_bit():
    model = fixed(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double())
    data = {"train": (numbers(9, 4), labels(9, 3))}
    problem = lsweep.Problem(model, data, loss=nn.CrossEntropyLoss())
    before = values(problem)
    factors = torch.tensor([2.0, 0.5, 8.0, 1.0, 0.25, 4.0]).double()
    with torch.no_grad():
        model[0].weight *= factors[:, None]
        model[0].bias *= factors
        model[2].weight /= factors
    assert torch.equal(values(problem), before)


def test_many_outputs_are_probed():
    model = fixed(nn.Linear(4, 200).double())
    problem = lsweep.Problem(
        model, {"train": (numbers(64, 4), numbers(64, 200))}, loss=nn.MSELoss()
    )
    problem.model.eval()
    objective, by_sevens = (
        Objective(problem, lambda n=n: problem.splits["train"].batches(n), ["weight"])
        for n in (16, 7)
    )
    found = compute("input_jacobian", objective, objective.filter_scales())["input_jacobian"]
    square, exact = found.values**2, model.weight.detach().norm().item() ** 2
    assert "200 outputs by 16 random probes" in objective.note
    assert abs(square.mean().item() - exact) < 4 * square.std().item() / 8
    assert 0 < square.std().item() < 0.5 * exact
    assert torch.equal(jacobian.input_jacobian(objective).values, found.values)
    others = jacobian.input_jacobian(by_sevens).values  # each sample has its own signs
    assert torch.allclose(others, found.values, rtol=1e-12)
    assert (jacobian.input_jacobian(objective, replicate=1).values != found.values).all()
    s = lsweep.sweep(problem, x=(0, 1, 2), metrics=["input_jacobian"], precision="float64")
    assert [d["derivatives"] for d in s.provenance["devices"].values()] == [objective.note]


def test_samples_that_depend_on_each_other_are_refused():
    model = fixed(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    data = {"train": (numbers(8, 4), labels(8, 3))}
    problem = lsweep.Problem(model, data, loss=nn.CrossEntropyLoss())
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    exact = (scale[:, None] * model[0].weight).norm().item()
    assert values(problem).tolist() == pytest.approx([exact] * 8)
    with pytest.raises(LsweepError, match="1 normalises by the statistics of each batch"):
        values(problem, context=lambda: batchnorm.batch_statistics(model))


def test_an_unknown_output_is_refused():
    model = nn.Linear(4, 3).double()
    data = {"train": (numbers(8, 4), labels(8, 3))}
    known = lsweep.Problem(model, data, forward=lsweep.classifier)
    assert values(known).tolist() == pytest.approx([model.weight.norm().item()] * 8)

    def forward(net: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": net(batch[0]).sum(1)}

    with pytest.raises(LsweepError, match="give the Problem loss=…"):
        values(lsweep.Problem(model, data, forward=forward))


def test_a_constant_has_the_derivative_zero():
    class Constant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(len(x), -1)

    data = {"train": (numbers(5, 4), labels(5, 3))}
    problem = lsweep.Problem(Constant(4, 3).double(), data, loss=nn.CrossEntropyLoss())
    assert values(problem).tolist() == [0.0] * 5
