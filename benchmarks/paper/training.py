"""Training: SGD or SAM until a training loss is reached or for some epochs; kept in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsweep

from .data import TRAIN, hard_digits
from .nets import build

VERSION = 1  # of what is cached: raise it when data, networks or training change
CHECK = 10  # steps between two looks at the training loss
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spec:
    """One network and how it is trained."""

    kind: str = "plain"
    depth: int = 24
    width: int = 64
    seed: int = 0
    batch: int = 100
    rate: float = 0.03
    decay: float = 5e-4
    loss: str = "cross-entropy"
    sam: float = 0.0  # radius of the ascent step; 0 is plain SGD
    stop: float | None = 0.02  # training ends at this loss; None: after all epochs
    epochs: int = 200  # at most
    train: int = TRAIN

    @property
    def stem(self) -> str:
        """The name of its files: what can be read, and a digest of all of it."""
        every = json.dumps([VERSION, dataclasses.astuple(self)])
        return (
            f"{self.kind}-{self.depth}-{self.width}-s{self.seed}-"
            + (hashlib.sha256(every.encode()).hexdigest()[:10])
        )


def squared(output: Tensor, target: Tensor) -> Tensor:
    """Return ½·‖output - onehot‖², one value per sample."""
    return 0.5 * (output - F.one_hot(target, output.shape[1])).square().sum(1)


LOSSES: dict[str, Loss] = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "squared error": squared,
}


def assess(network: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return mean loss and error in per cent, with the statistics of training."""
    with torch.no_grad():
        output = network.eval()(x)
        return loss(output, y).mean().item(), 100 * (output.argmax(1) != y).double().mean().item()


def climb(network: nn.Module, radius: float) -> list[Tensor]:
    """Move to θ + ρ·g/‖g‖, SAM's ascent step, and return what was added.

    P. Foret et al., *Sharpness-aware minimization for efficiently improving generalization*, 2021.
    """
    with torch.no_grad():
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm() + 1e-12
        steps = [g * (radius / norm) for g in gradients]
        for p, step in zip(network.parameters(), steps, strict=True):
            p.add_(step)
    return steps


def step(network: nn.Module, loss: Loss, x: Tensor, y: Tensor, sam: float) -> None:
    """Leave the gradient of one step in the parameters: SGD's, or SAM's."""
    network.zero_grad()
    torch.autograd.backward(loss(network(x), y).mean())
    if sam:
        steps = climb(network, sam)
        network.zero_grad()
        torch.autograd.backward(loss(network(x), y).mean())
        with torch.no_grad():
            for p, added in zip(network.parameters(), steps, strict=True):
                p.sub_(added)


def enough(spec: Spec, network: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether training ends: at the loss, or where losses cannot be matched, at 0.1 % error."""
    loss, error = assess(network, LOSSES[spec.loss], x, y)
    network.train()
    assert spec.stop is not None
    return loss <= spec.stop if spec.loss == "cross-entropy" else error <= 0.1


def train(spec: Spec, each_epoch: Callable[[nn.Module], None] | None = None) -> nn.Module:
    """Return the trained network; batches depend on the seed alone.

    SGD with Nesterov momentum, the rate warmed up over 50 steps. With ``stop``, the training loss
    over all samples is looked at every ten steps, so that networks end just below the same loss.
    """
    network = build(spec.kind, spec.depth, spec.width, spec.seed).train()
    x, y = hard_digits(spec.train)["train"]
    loss, order = LOSSES[spec.loss], torch.Generator().manual_seed(spec.seed)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=spec.rate, momentum=0.9, nesterov=True, weight_decay=spec.decay
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    steps = 0
    for _ in range(spec.epochs):
        for batch in torch.split(torch.randperm(len(y), generator=order), spec.batch):
            step(network, loss, x[batch], y[batch], spec.sam)
            optimizer.step()
            warmup.step()
            steps += 1
            if spec.stop is not None and steps % CHECK == 0 and enough(spec, network, x, y):
                return network.eval()
        if each_epoch is not None:
            each_epoch(network)
    return network.eval()


def trained(spec: Spec, cache: Path) -> nn.Module:
    """Return the network from the cache, after training it where it is not there yet."""
    path = cache / f"{spec.stem}.pt"
    if not path.exists():
        save(train(spec), path)
    network = build(spec.kind, spec.depth, spec.width, spec.seed)
    network.load_state_dict(lsweep.load_state(path))
    return network.eval()


def save(network: nn.Module, path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(network.state_dict(), temporary)
    temporary.replace(path)


def problem(spec: Spec, network: nn.Module) -> lsweep.Problem:
    """Return what lsweep sweeps: the network with its data, its training loss and accuracy."""
    return lsweep.Problem(
        network,
        dict(hard_digits(spec.train)),
        loss=LOSSES[spec.loss],
        metrics={"accuracy": lsweep.accuracy},
    )


def remade(checkpoint: str, spec: str) -> lsweep.Problem:
    """Return the same from a checkpoint and a spec in JSON: a factory for commands of lsweep."""
    made = Spec(**json.loads(spec))
    network = build(made.kind, made.depth, made.width, made.seed)
    network.load_state_dict(lsweep.load_state(Path(checkpoint)))
    return problem(made, network.eval())
