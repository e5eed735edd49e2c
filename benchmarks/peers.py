"""What lsweep is compared with, each doing what its own users do, on the same weights and images.

The reference implementation is imported from a checkout that the user names; nothing of it is here.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Evaluate = Callable[[int], float]  # number of a point -> loss there
Point = tuple[float, float]
BATCH = 128


@dataclass(frozen=True)
class Case:
    """What all evaluate: the same network, plane, points and images.

    Args:
        network: at the trained weights, on the device, in eval mode.
        directions: two, by name of parameter.
        points: offsets along them.
        raw: images as bytes.
        x: images as the network takes them, on the device.
        y: labels, on the device.
        statistics: mean and std by channel that lead from ``raw`` to ``x``.
    """

    network: nn.Module
    directions: Sequence[Mapping[str, Tensor]]
    points: Sequence[Point]
    raw: Tensor
    x: Tensor
    y: Tensor
    statistics: tuple[tuple[float, ...], tuple[float, ...]]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.x.device

    def lists(self) -> tuple[nn.Module, list[list[Tensor]]]:
        """Return a copy of the network; weights and both directions in its parameters' order."""
        network = copy.deepcopy(self.network)
        named = dict(network.named_parameters())
        moves = [
            [d[n].to(p) if n in d else torch.zeros_like(p) for n, p in named.items()]
            for d in self.directions
        ]
        return network, [[p.detach().clone() for p in named.values()], *moves]


def truth(case: Case) -> list[float]:
    """Return the loss at each point in float64: weights, images and sums."""
    network, rows = case.lists()
    network = network.double()
    w, u, v = ([t.double() for t in row] for row in rows)
    out = []
    with torch.no_grad():
        for a, b in case.points:
            for p, *t in zip(network.parameters(), w, u, v, strict=True):
                p.copy_(t[0] + a * t[1] + b * t[2])
            total = math.fsum(
                nn.functional.cross_entropy(network(x.double()), y, reduction="sum").item()
                for x, y in zip(torch.split(case.x, 64), torch.split(case.y, 64), strict=True)
            )
            out.append(total / len(case.y))
    return out


def plain(case: Case, batch: int) -> Evaluate:
    """The loop that a competent user writes: data on the device, no_grad, one item() a batch."""
    network, (w, u, v) = case.lists()
    batches = list(zip(torch.split(case.x, batch), torch.split(case.y, batch), strict=True))
    criterion = nn.CrossEntropyLoss()

    def evaluate(k: int) -> float:
        a, b = case.points[k]
        total = 0.0
        with torch.no_grad():
            for p, w_, u_, v_ in zip(network.parameters(), w, u, v, strict=True):
                p.copy_(w_ + a * u_ + b * v_)
            for x, y in batches:
                total += criterion(network(x), y).item() * len(y)
        return total / len(case.y)

    return evaluate


def package(case: Case, batch: int) -> Evaluate:
    """The loss-landscapes package: its Loss metric, and one add_ of its ModelParameters a point.

    Its metric takes one batch; with several there is one metric for each.

    Raises:
        ImportError: it is not installed.
    """
    metrics = importlib.import_module("loss_landscapes.metrics")
    wrapping = importlib.import_module("loss_landscapes.model_interface.model_wrapper")
    arithmetic = importlib.import_module("loss_landscapes.model_interface.model_parameters")
    network, (_, u, v) = case.lists()
    parts = [
        (len(y), metrics.Loss(nn.CrossEntropyLoss(), x, y))
        for x, y in zip(torch.split(case.x, batch), torch.split(case.y, batch), strict=True)
    ]
    wrapper = wrapping.wrap_model(network)
    here = wrapper.get_module_parameters()
    count = len(case.points)
    steps = {}
    for k in range(count):  # from each point to the next one, and from the centre to each
        for start, (a0, b0) in ((k - 1) % count, case.points[k - 1]), (-1, (0.0, 0.0)):
            a, b = case.points[k][0] - a0, case.points[k][1] - b0
            steps[start, k] = arithmetic.ModelParameters(
                [a * u_ + b * v_ for u_, v_ in zip(u, v, strict=True)]
            )
    at = [-1]

    def evaluate(k: int) -> float:
        if at[0] != k:
            here.add_(steps[at[0], k])
            at[0] = k
        return math.fsum(n * metric(wrapper) for n, metric in parts) / len(case.y)

    return evaluate


class Shipped(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them: bytes to an image to a tensor, one at a time."""

    def __init__(self, case: Case) -> None:
        from PIL import Image

        transforms = importlib.import_module("torchvision.transforms")
        mean, std = case.statistics
        self._image = Image.fromarray
        self._raw, self._y = case.raw.numpy(), case.y.cpu().tolist()
        self._transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]
        )

    def __len__(self) -> int:
        return len(self._y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._image(self._raw[index])), self._y[index]


def reference(case: Case, checkout: Path) -> Evaluate:
    """The reference implementation as it ships: its set_weights, its eval_loss, a DataLoader.

    Batches of 128, two worker processes, pinned memory.

    Raises:
        ImportError: the checkout, or torchvision, cannot be imported.
    """
    plotter, evaluation = (
        _from_checkout(checkout, "net_plotter"),
        _from_checkout(checkout, "evaluation"),
    )
    network, (w, u, v) = case.lists()
    loader = torch.utils.data.DataLoader(
        Shipped(case), batch_size=BATCH, shuffle=False, num_workers=2, pin_memory=True
    )
    criterion, cuda = nn.CrossEntropyLoss(), case.device.type == "cuda"

    def evaluate(k: int) -> float:
        plotter.set_weights(network, w, [u, v], case.points[k])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pinned memory where there is no GPU
            loss, _ = evaluation.eval_loss(network, criterion, loader, cuda)
        return float(loss)

    return evaluate


def _from_checkout(checkout: Path, name: str) -> Any:
    if not (checkout / f"{name}.py").is_file():
        raise ImportError(f"{checkout} has no {name}.py: name a checkout of the reference")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))  # last, so that nothing of it hides a module of ours
    return importlib.import_module(name)
