"""Networks so small that their whole Hessian is known, in float64, from torch's own `hessian`.

A `Case` pairs a problem with its loss as one formula over all data at once, written down again and
without lsweep: class weights, ignored labels and means over batches must come out of it the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from problems import fixed, labels, numbers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import lsweep
from lsweep.derivatives.objective import Objective

Network = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A problem, and its mean loss as a function of the network."""

    problem: lsweep.Problem
    whole: Callable[[Network], Tensor]
    batch_size: int = 7

    @property
    def names(self) -> list[str]:
        """The weights that a random direction moves."""
        norms = {n for n, m in self.problem.model.named_modules() if "Norm" in type(m).__name__}
        named = self.problem.model.named_parameters()
        return [n for n, p in named if p.dim() > 1 and n.rpartition(".")[0] not in norms]

    def objective(self, names: list[str] | None = None) -> Objective:
        self.problem.model.eval()
        return Objective(self.problem, self.batches, names or self.names)

    def batches(self) -> Iterator[Any]:
        return self.problem.splits["train"].batches(self.batch_size)

    def loss(self, vector: Tensor) -> Tensor:
        """The mean loss at a flat vector, by `functional_call`."""
        model = self.problem.model.eval()
        own, at, tensors = dict(model.named_parameters()), 0, {}
        for n in self.names:
            tensors[n] = vector[at : at + own[n].numel()].view(own[n].shape)
            at += own[n].numel()
        with sdpa_kernel(SDPBackend.MATH):
            return self.whole(lambda *x, **y: functional_call(model, tensors, x, y))

    @property
    def here(self) -> Tensor:
        own = dict(self.problem.model.named_parameters())
        return torch.cat([own[n].detach().flatten() for n in self.names])

    def hessian(self) -> Tensor:
        return torch.autograd.functional.hessian(self.loss, self.here)

    def scales(self) -> Tensor:
        """D of the filter metric, by a loop over rows."""
        own, out = dict(self.problem.model.named_parameters()), []
        for n in self.names:
            for row in own[n].detach():
                out.append((row.norm() / row.numel() ** 0.5).expand(row.numel()))
        return torch.cat(out)


# -- cases -----------------------------------------------------------------------------------------


def squared_error() -> Case:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = numbers(20, 3, seed=1), numbers(20, 2, seed=2)
    problem = lsweep.Problem(fixed(model), {"train": (x, y)}, loss=nn.MSELoss())
    return Case(problem, lambda net: ((net(x) - y) ** 2).mean())


def weighted_classes() -> Case:
    """Class weights, one of them zero, and labels that are ignored, unevenly over the batches."""
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3, bias=False)).double()
    x, y = numbers(24, 4, seed=1), labels(24, 3)
    y[[0, 1, 2, 9]] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.0, 3.0]).double())
    problem = lsweep.Problem(fixed(model), {"train": (x, y)}, loss=loss)
    return Case(problem, lambda net: loss(net(x), y))


def opaque_forward() -> Case:
    """A loss that is one number per batch, from a ``forward`` of its own."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Softplus(), nn.Linear(6, 1)).double()
    x, y = numbers(18, 3, seed=1), numbers(18, 1, seed=2)

    def forward(net: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": ((net(batch["x"]) - batch["y"]) ** 4).mean()}

    problem = lsweep.Problem(fixed(model), {"train": {"x": x, "y": y}}, forward=forward)
    return Case(problem, lambda net: ((net(x) - y) ** 4).mean())


def convolution() -> Case:
    """Batch norm by the statistics of the checkpoint; its own weights do not move."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    fixed(model)
    model[1].running_mean.copy_(0.3 * numbers(3, seed=5))
    model[1].running_var.copy_(1 + numbers(3, seed=6).abs())
    x, y = numbers(15, 1, 3, 3, seed=1), labels(15, 3)
    problem = lsweep.Problem(model, {"train": (x, y)}, forward=lsweep.classifier)
    return Case(problem, lambda net: nn.functional.cross_entropy(net(x), y))


class Attentive(nn.Module):
    """One transformer block over four numbers at three positions."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            4, 2, dim_feedforward=4, dropout=0.5, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def transformer() -> Case:
    x, y = numbers(8, 3, 4, seed=1), labels(8, 3)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    problem = lsweep.Problem(fixed(Attentive().double()), {"train": (x, y)}, loss=loss)
    return Case(problem, lambda net: loss(net(x), y), batch_size=8)


class Tied(nn.Module):
    """An auto-encoder whose decoder is its encoder turned round."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.encoder.weight


def tied() -> Case:
    x = numbers(12, 4, seed=1)
    problem = lsweep.Problem(fixed(Tied().double()), {"train": (x, x)}, loss=nn.L1Loss())
    return Case(problem, lambda net: (net(x) - x).abs().mean())


def residual_of(net: Network, x: Tensor) -> Tensor:
    """Of u' = -u, as a physics-informed network has it."""
    u = net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (slope + u)[:, 0] ** 2


def physics() -> Case:
    model = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = numbers(10, 1, seed=1)

    def forward(net: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": residual_of(net, batch.detach().requires_grad_())}

    problem = lsweep.Problem(fixed(model), {"train": x}, forward=forward, grad=True)
    return Case(problem, lambda net: residual_of(net, x.detach().requires_grad_()).mean())


CASES = [
    squared_error,
    weighted_classes,
    opaque_forward,
    convolution,
    transformer,
    tied,
    physics,
]
