"""Random networks: what torch computes, every backend that is made from a graph computes too.

Each is a program of layers, pools, activations and merges drawn from tables; its weights are moved
by a random direction, batch norm's own included. Compared at batches of one and of several samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_native import builds
from torch import Tensor, nn

from lsweep.backends.folded import Folded
from lsweep.backends.fused import FusedNetwork
from lsweep.backends.graph import traced
from lsweep.backends.packed import Packed
from lsweep.native.network import NativeNetwork
from lsweep.problems.weights import buffers_of, parameters_of

CPU = torch.device("cpu")
Step = Callable[..., Tensor]
ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.2),
               nn.ELU(0.7), nn.Hardswish(), nn.ReLU6(), nn.Sigmoid()]  # fmt: skip
CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda h: 0.5 * h - 1, lambda h: 1 - h.abs(), lambda h: h / (1 + h * h), lambda h: -h,
    lambda h: torch.cat([h, h.tanh()[:, :2]], 1), lambda h: h[:, :, 1:, ::2], lambda h: h.mT,
    lambda h: F.pad(h, (1, 0, 2, 1), value=0.3), lambda h: h.add_(0.25), lambda h: h[:, 1:],
    lambda h: torch.sub(h, h.sigmoid(), alpha=2), lambda h: h.flatten(2).view(h.shape),
]  # fmt: skip


class Program(nn.Module):
    """A random network of images (3, 9, 8), drawn by a number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._draw = random.Random(number)
        torch.manual_seed(number)
        self.steps, self._made = (
            nn.ModuleList(),
            list[tuple[str, nn.Module | Callable[..., Tensor]]](),
        )
        h = torch.zeros(2, 3, 9, 8)
        with torch.no_grad():
            for _ in range(self._draw.randint(4, 9)):
                kind, step = self._next(h)
                self._made.append((kind, step))
                if isinstance(step, nn.Module):
                    self.steps.append(step)
                h = self._run(kind, step, h)
        self.head = nn.Linear(h.shape[1], 4)

    def _next(self, h: Tensor) -> tuple[str, Step]:
        one, channels, small = self._draw.choice, h.shape[1], min(h.shape[2:]) < 4
        kind = one(["layer", "layer", "normed", "block", "activation", "change", "pool", "norm"])
        if small and kind in ("pool", "change"):
            kind = "activation"
        if kind in ("layer", "normed"):
            groups = one([g for g in (1, 1, 2, channels) if channels % g == 0])
            size, padding = one([(1, 0), (3, 1), (3, 1), ((1, 3), (0, 1)), (2, 1)])
            stride = 1 if small else one([1, 1, (2, 1)])
            step: nn.Module = nn.Conv2d(channels, groups * one([2, 5, 8]), size, stride, padding,
                                        groups=groups, bias=one([True, False]))  # fmt: skip
            if kind == "normed":
                step = nn.Sequential(step, self._norm(step.out_channels))
            return kind, step
        if kind == "block":
            inner = nn.Conv2d(channels, channels, 3, 1, 1), self._norm(channels), one(ACTIVATIONS)
            return kind, nn.Sequential(*inner[: one([1, 2, 3])])
        if kind == "pool":
            pools = nn.MaxPool2d(2, 1), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d((1, 2))
            return kind, one(pools)
        if kind == "norm":
            return kind, self._norm(channels)
        return kind, one(ACTIVATIONS if kind == "activation" else CHANGES)

    def _norm(self, channels: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(channels, eps=self._draw.choice([1e-5, 1e-2]))
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias)
        return norm

    def _run(self, kind: str, step: Step, h: Tensor) -> Tensor:
        return F.relu(step(h) + h) if kind == "block" else step(1 * h)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for kind, step in self._made:
            h = self._run(kind, step, h)
        return self.head(h.mean((2, 3)))


def compared(number: int, native: bool) -> None:
    net = Program(number).eval()
    batches = [torch.randn(n, 3, 9, 8) for n in (1, 5, 18)]
    origin = {n: t.detach().clone() for n, t in {**parameters_of(net), **buffers_of(net)}.items()}
    direction = {n: 0.3 * t.abs() * torch.rand_like(t) for n, t in origin.items()}
    graph = traced(net, batches[1])
    rows = Folded(graph, Packed(origin, [direction], CPU, torch.float32))
    networks: list[Callable[[Tensor], Tensor]] = [
        FusedNetwork(graph, rows.views, batches[1], CPU, torch.float32, 1)
    ]
    if native:
        networks.append(NativeNetwork(graph, rows, 1))
    for offset in (0.0, 1.0, -1.0):
        rows.move([offset])
        moved = {n: t + offset * direction[n] for n, t in origin.items()}
        for batch in batches:
            with torch.no_grad():
                want = torch.func.functional_call(net, moved, (batch,))
                exact = {n: t.double() for n, t in moved.items()}
                truth = torch.func.functional_call(net, exact, (batch.double(),))
                allowed = 2e-6 * truth.abs().max() + 10 * (want - truth).abs().max()
                for network in networks:
                    assert (network(batch) - truth).abs().max() <= allowed


@pytest.mark.parametrize("number", range(40))
def test_a_random_network_is_the_same_in_fused_operations(number):
    compared(number, native=False)


@builds
@pytest.mark.parametrize("number", range(100, 104))
def test_a_random_network_is_the_same_in_native_code(number):
    compared(number, native=True)
