"""The mean loss and its derivatives are those of the whole data, for any network and any loss.

Values are those of a sweep; gradients and Hessian-vector products those of torch's dense Hessian.
Where autograd has no second derivative, or a wrong one, that is found out and said.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact import CASES, Case, convolution, squared_error, transformer, weighted_classes
from problems import fixed, labels, numbers
from torch import Tensor, nn

import lsweep
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError


@pytest.mark.parametrize("make", CASES)
def test_derivatives_are_those_of_the_dense_hessian(make):
    case = make()
    objective, here = case.objective(), case.here
    assert objective.size == len(here) and torch.equal(objective.here, here)
    exact = case.hessian()
    assert objective.value() == pytest.approx(case.loss(here).item(), rel=1e-12)
    slope = torch.autograd.functional.jacobian(case.loss, here)
    assert torch.allclose(objective.gradient(), slope, rtol=1e-9, atol=1e-12)
    for seed in (1, 2):
        v = numbers(len(here), seed=seed)
        assert torch.allclose(objective.hessian_product(v), exact @ v, rtol=1e-9, atol=1e-11)
    assert objective.note == "" and objective.passes >= 3


def test_elsewhere_is_as_if_the_network_were_there():
    case = transformer()
    objective, there = case.objective(), case.here + 0.1 * numbers(len(case.here))
    value, slope = objective.with_gradient(there)
    assert value == pytest.approx(objective.value(there), rel=1e-13)
    assert value == pytest.approx(case.loss(there).item(), rel=1e-12)
    assert value != pytest.approx(objective.value(), rel=1e-3)
    assert torch.allclose(slope, torch.autograd.functional.jacobian(case.loss, there), rtol=1e-9)
    exact = torch.autograd.functional.hessian(case.loss, there)
    v = numbers(len(there), seed=3)
    assert torch.allclose(objective.hessian_product(v, there), exact @ v, rtol=1e-9, atol=1e-11)


def test_value_is_that_of_a_sweep():
    for make in (weighted_classes, convolution):
        case = make()
        surface = lsweep.sweep(case.problem, x=(-1, 1, 3), precision="float64")
        assert case.objective().value() == pytest.approx(surface.center("train_loss"), rel=1e-13)


def test_float32_networks_have_float64_sums():
    case = squared_error()
    exact = case.hessian()
    case.problem.model.float()
    single = Case(
        lsweep.Problem(
            case.problem.model,
            {"train": tuple(t.float() for t in case.problem.data["train"])},
            loss=nn.MSELoss(),
        ),
        case.whole,
    )
    objective, v = single.objective(), numbers(len(exact), seed=4)
    product = objective.hessian_product(v)
    assert product.dtype == torch.float64
    assert torch.allclose(product, exact @ v, rtol=1e-4, atol=1e-6)


def test_what_has_no_weight_may_be_anything():
    model = fixed(nn.Linear(2, 1, bias=False).double())
    x, y = numbers(6, 2), numbers(6, 1, seed=1)
    y[2] = float("nan")

    def loss(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        known = ~target[:, 0].isnan()
        return torch.where(known, (output - target.nan_to_num())[:, 0] ** 2, 0.0), known.double()

    problem = lsweep.Problem(model, {"train": (x, y)}, loss=loss)
    objective = Objective(problem, lambda: problem.splits["train"].batches(2), ["weight"])
    kept = [0, 1, 3, 4, 5]
    exact = 2 * x[kept].T @ x[kept] / 5
    v = numbers(2, seed=2)
    assert torch.allclose(objective.hessian_product(v), exact @ v)


def test_the_network_is_left_as_it_was():
    case = convolution()
    model = case.problem.model
    model[4].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)

    def state() -> list[Any]:
        kept = [(p.data_ptr(), p.requires_grad, p.grad is None) for p in model.parameters()]
        return [
            kept,
            [b.tolist() for b in model.buffers()],
            [p.tolist() for p in model.parameters()],
        ]

    objective, before = case.objective(), state()
    v = numbers(objective.size)
    objective.hessian_product(v, objective.here + v)
    assert state() == before

    def broken(*_: Any) -> Tensor:
        raise ValueError("no loss today")

    failing = lsweep.Problem(model, {"train": case.problem.data["train"]}, loss=broken)
    with pytest.raises(ValueError, match="no loss today"):
        Objective(failing, case.batches, case.names).gradient(objective.here + v)
    assert state() == before


# -- where autograd is not enough ------------------------------------------------------------------


class Once(torch.autograd.Function):
    """x³, whose derivative says that it has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Silent(Once):
    """x³, whose derivative is a constant to autograd, in silence."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].data ** 2 * g


class Cubic(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)
        self.cube = function.apply if function else lambda x: x**3

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cube(self.first(x)))


@pytest.mark.parametrize("function", [Once, Silent])
def test_differences_take_the_place_of_a_wrong_second_derivative(function):
    x, y = numbers(9, 3), numbers(9, 1, seed=1)

    def case(which: Any) -> Case:
        model = fixed(Cubic(which).double())
        problem = lsweep.Problem(model, {"train": (x, y)}, loss=nn.MSELoss())
        return Case(problem, lambda net: ((net(x) - y) ** 2).mean())

    exact, objective = case(None).hessian(), case(function).objective()
    v = numbers(objective.size, seed=2)
    objective.gradient()
    assert torch.allclose(objective.hessian_product(v), exact @ v, rtol=1e-6, atol=1e-6)
    assert "central differences of the gradient, step 8.9e-06" in objective.note
    assert "an autograd function of its own has a wrong one" in objective.note


def test_differences_take_the_place_of_a_missing_second_derivative():
    rows = torch.tensor([[0, 1, 2], [2, 3, 3], [1, 1, 0]])

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(4, 3, mode="max")

        def forward(self, x: Tensor) -> Tensor:
            return self.bag(x)

    y = numbers(3, 3)
    model = fixed(Mean().double())
    problem = lsweep.Problem(model, {"train": (rows, y)}, loss=nn.MSELoss())
    largest = torch.stack([model.bag.weight[r].amax(0) for r in rows]).detach()
    objective = Case(problem, lambda net: ((net(rows) - y) ** 2).mean()).objective()
    assert objective.value() == pytest.approx(float(((largest - y) ** 2).mean()))
    taken = torch.zeros(4, 3).double()  # how often each number is the largest of its row
    for r in rows:
        best = model.bag.weight[r].argmax(0)
        for column in range(3):
            taken[r[best[column]], column] += 1
    v = numbers(12, seed=3)
    assert torch.allclose(objective.hessian_product(v), 2 / 9 * taken.flatten() * v, atol=1e-8)
    assert "central differences" in objective.note


def test_a_linear_loss_has_no_curvature():
    model = fixed(nn.Linear(3, 1, bias=False).double())
    x = numbers(5, 3)
    problem = lsweep.Problem(model, {"train": (x, x)}, loss=lambda output, _: output[:, 0])
    objective = Objective(problem, lambda: problem.splits["train"].batches(2), ["weight"])
    assert torch.allclose(objective.gradient(), x.mean(0))
    assert not objective.hessian_product(numbers(3)).any()


def test_recurrent_networks_have_curvature():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    x, y = numbers(6, 4, 2), labels(6, 2)
    loss = nn.CrossEntropyLoss()
    problem = lsweep.Problem(fixed(Reader().double()), {"train": (x, y)}, loss=loss)
    case = Case(problem, lambda net: loss(net(x), y))
    objective, v = case.objective(), numbers(len(case.here), seed=2)
    assert torch.allclose(objective.hessian_product(v), case.hessian() @ v, rtol=1e-8, atol=1e-10)


def test_a_detached_loss_is_refused():
    model = fixed(nn.Linear(1, 1).double())
    x = numbers(4, 1)

    def objective(forward: Any, grad: bool = False) -> Objective:
        problem = lsweep.Problem(model, {"train": x}, forward=forward, grad=grad)
        return Objective(problem, lambda: problem.splits["train"].batches(4), ["weight"])

    @torch.no_grad()
    def unseen(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": net(batch)[:, 0] ** 2}

    with pytest.raises(LsweepError, match="detached from the weights"):
        objective(unseen).gradient()

    def half_seen(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        batch = batch.detach().requires_grad_()
        u = net(batch)
        (slope,) = torch.autograd.grad(u.sum(), batch, retain_graph=True)  # no create_graph
        return {"loss": (u**2 + 5 * slope**2)[:, 0]}

    with pytest.raises(LsweepError, match="a part of it is detached"):
        objective(half_seen, grad=True).hessian_product(numbers(1))


def test_names_must_be_parameters():
    with pytest.raises(LsweepError, match="no parameter 'nothing'"):
        squared_error().objective(["nothing"])
