"""The demo's problem: real handwritten digits, deep networks with and without skip connections."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsweep.errors import LsweepError
from lsweep.problems.losses import accuracy
from lsweep.problems.problem import Problem
from lsweep.problems.weights import load_state

DEPTH, WIDTH = 22, 64
TRAIN = 1000  # of 1797 images
TARGET = 0.02  # training ends at this loss, so that networks are compared at matched training loss
MOST_EPOCHS = 200


class Plain(nn.Sequential):
    """Two layers, each BatchNorm-ReLU-Linear."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width, bias=False)]
        super().__init__(*layers)


class Residual(Plain):
    """The same two layers, added to what goes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        change: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return x + change


class Network(nn.Sequential):
    """A fully connected classifier of 8 x 8 digits with ``depth`` linear layers.

    The initial weights depend on ``seed`` alone, so both variants start from the same numbers, and
    their parameters have the same names, so that they meet the same noise.
    """

    def __init__(self, skip: bool, seed: int = 0, depth: int = DEPTH, width: int = WIDTH) -> None:
        block = Residual if skip else Plain
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            super().__init__(
                nn.Linear(64, width),
                *(block(width) for _ in range((depth - 2) // 2)),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, 10),
            )


def digits(train: int = TRAIN) -> dict[str, tuple[Tensor, Tensor]]:
    """Return scikit-learn's 1797 digits, shuffled once, standardised, as train and test.

    Returns:
        split -> (images (n, 64) float32, labels (n,) int64).

    Raises:
        LsweepError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise LsweepError(
            "the demo's data ships with scikit-learn: pip install 'lsweep[demo]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    x = (x - x[:train].mean()) / x[:train].std()
    return {"train": (x[:train], y[:train]), "test": (x[train:], y[train:])}


def assess(network: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return mean loss and error in per cent, with the statistics of training."""
    with torch.no_grad():
        output = network.eval()(x)
        wrong = (output.argmax(1) != y).double().mean()
        return F.cross_entropy(output, y).item(), 100 * wrong.item()


def train(network: nn.Module, x: Tensor, y: Tensor, seed: int) -> tuple[float, int]:
    """Train in place until the loss over all of x is at most `TARGET`; return loss and epochs.

    SGD with Nesterov momentum, batches of 100 whose order depends on ``seed`` alone, the learning
    rate warmed up over the first 50 steps. A loss above `TARGET` means: not matched.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    loss, epoch = float("inf"), 0
    while loss > TARGET and epoch < MOST_EPOCHS:
        epoch += 1
        network.train()
        for batch in torch.split(torch.randperm(len(y), generator=order), 100):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(x[batch]), y[batch]))
            optimizer.step()
            warmup.step()
        loss, _ = assess(network, x, y)
    return loss, epoch


def make(checkpoint: str, skip: bool) -> Problem:
    """Return the problem of one trained network: the factory of the demo's runs."""
    network = Network(skip)
    network.load_state_dict(load_state(Path(checkpoint)))
    metrics = {"accuracy": accuracy}
    return Problem(network, digits(), loss=nn.CrossEntropyLoss(), metrics=metrics)
