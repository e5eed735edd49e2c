"""What is trained and measured for each group of claims; one call does one group for one seed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import sweeping
from .claims import (
    DECAY,
    DEPTHS,
    DIRECTIONS,
    EPOCHS,
    LARGE_BATCH,
    PLANE,
    SEEDS,
    SMALL_BATCH,
    STEPS,
    UNDERFITTED,
    WIDTHS,
)
from .data import TRAIN, hard_digits
from .nets import build
from .training import LOSSES, Spec, assess, problem, save, train, trained

Record = dict[str, Any]
Records = dict[str, Record]
KINDS = ("plain", "skip")


@dataclass(frozen=True)
class Size:
    """How much is computed: all of it, or as little as runs through every line."""

    depths: tuple[int, ...] = DEPTHS
    widths: tuple[int, ...] = WIDTHS
    epochs: int = EPOCHS
    most: int = 400  # epochs until the training loss is reached
    steps: int = STEPS
    plane: int = PLANE
    line: int = 81
    directions: int = DIRECTIONS
    seeds: tuple[int, ...] = SEEDS
    train: int = TRAIN
    units: int = 64  # in a layer
    curved: int = TRAIN  # samples of the Hessian beyond the paper

    @property
    def middle(self) -> int:
        """The depth of what is not about depth."""
        return self.depths[len(self.depths) // 2]


FULL = Size(curved=500)
QUICK = Size(
    (4,),
    (8, 16),
    epochs=1,
    most=1,
    steps=4,
    plane=5,
    line=9,
    directions=2,
    seeds=(0,),
    train=64,
    units=8,
    curved=32,
)


def fitted(spec: Spec, network: nn.Module) -> Record:
    """Return training loss, test error and weight norm."""
    data, loss = hard_digits(spec.train), LOSSES[spec.loss]
    train_loss, train_error = assess(network, loss, *data["train"])
    _, test_error = assess(network, loss, *data["test"])
    return {
        "train_loss": train_loss,
        "train_error": train_error,
        "test_error": test_error,
        "weight_norm": sweeping.weight_norm(network),
    }


def depth(seed: int, size: Size, cache: Path) -> Records:
    """Plain and residual networks of three depths, stopped at the same training loss."""
    out: Records = {}
    for layers in size.depths:
        for kind in KINDS:
            spec = Spec(
                kind, layers, seed=seed, width=size.units, train=size.train, epochs=size.most
            )
            network = trained(spec, cache)
            of = problem(spec, network)
            record = fitted(spec, network) | sweeping.plane(of, seed, size.plane)
            record |= sweeping.sharpness(of, count=size.directions)
            if layers == size.depths[-1]:
                record |= sweeping.extremes(of) | sweeping.curvatures(of)
            out[f"{kind} {layers}"] = record
    return out


def smooth(seed: int, size: Size, cache: Path) -> Records:
    """Deep GELU networks: their second differences are those of the Hessian."""
    out: Records = {}
    for kind in KINDS:
        layers = size.depths[-1]
        spec = Spec(
            f"{kind}-gelu", layers, seed=seed, width=size.units, train=size.train, epochs=size.most
        )
        network = trained(spec, cache)
        of = problem(spec, network)
        record = fitted(spec, network) | sweeping.sharpness(of, count=size.directions)
        record |= sweeping.saddle(of, size.directions) | sweeping.extremes(of)
        out[f"{kind} {layers}"] = record | sweeping.hessian_plane(of)
    return out


def batch(seed: int, size: Size, cache: Path) -> Records:
    """Small and large batches without weight decay, stopped at the same training loss."""
    out: Records = {}
    for samples in (SMALL_BATCH, LARGE_BATCH):
        spec = Spec(
            "plain",
            6,
            seed=seed,
            width=size.units,
            train=size.train,
            batch=samples,
            decay=0.0,
            epochs=size.most,
        )
        network = trained(spec, cache)
        of = problem(spec, network)
        record = fitted(spec, network) | sweeping.sharpness(of, count=size.directions)
        out[f"batch {samples}"] = record
    return out


def decay(seed: int, size: Size, cache: Path) -> Records:
    """Both batches with and without decay for equal epochs, and one matched to that of decay."""
    out: Records = {}
    networks: dict[str, tuple[Spec, nn.Module]] = {}

    def measure(name: str, spec: Spec) -> None:
        network = trained(spec, cache)
        of = problem(spec, network)
        record = fitted(spec, network) | sweeping.sharpness(of, count=size.directions)
        record |= sweeping.sharpness(of, "layer", count=size.directions)
        if spec.batch == SMALL_BATCH:
            record |= sweeping.extremes(of)
        out[name], networks[name] = record, (spec, network)

    for amount in (0.0, DECAY):
        for samples in (SMALL_BATCH, LARGE_BATCH):
            same = Spec(
                "plain",
                6,
                seed=seed,
                width=size.units,
                train=size.train,
                batch=samples,
                decay=amount,
                stop=None,
            )
            measure(f"batch {samples} decay {amount:g}", replace(same, epochs=size.epochs))
        spec, small = networks[f"batch {SMALL_BATCH} decay {amount:g}"]
        _, large = networks[f"batch {LARGE_BATCH} decay {amount:g}"]
        out[f"line decay {amount:g}"] = sweeping.interpolation(spec, small, large, size.line)
    reached = round(out[f"batch {SMALL_BATCH} decay {DECAY:g}"]["train_loss"], 4)
    matched = Spec(
        "plain",
        6,
        seed=seed,
        width=size.units,
        train=size.train,
        batch=SMALL_BATCH,
        decay=0.0,
        stop=reached,
    )
    measure("matched decay 0", replace(matched, epochs=size.most))
    return out


def width(seed: int, size: Size, cache: Path) -> Records:
    """Plain networks of several widths, stopped at the same training loss."""
    out: Records = {}
    for units in size.widths:
        spec = Spec("plain", size.middle, units, seed=seed, train=size.train, epochs=size.most)
        network = trained(spec, cache)
        of = problem(spec, network)
        record = fitted(spec, network) | sweeping.plane(of, seed, size.plane)
        out[f"width {units}"] = record | sweeping.sharpness(of, count=size.directions)
    return out


def equivalent(seed: int, size: Size, cache: Path) -> Records:
    """A deep plain network, and the same function with its filters rescaled."""
    spec = Spec(
        "plain", size.depths[-1], seed=seed, width=size.units, train=size.train, epochs=size.most
    )
    network = trained(spec, cache)
    other = sweeping.rescaled(network, build(spec.kind, spec.depth, spec.width, seed), seed)
    x, _ = hard_digits(size.train)["test"]
    with torch.no_grad():
        change = (network(x) - other(x)).abs().max() / network(x).abs().max()
    defects = sweeping.equivalence(problem(spec, network), problem(spec, other), size.line)
    return {"rescaled": {"output_change": float(change), **defects}}


def trajectory(seed: int, size: Size, cache: Path) -> Records:
    """The path of training, and a random walk of as many steps in the same weights."""
    out: Records = {}
    random = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in (*KINDS, "walk"):
            paths: list[Path] = []

            def keep(network: nn.Module, name: str = kind, paths: list[Path] = paths) -> None:
                paths.append(Path(scratch) / f"{name}-{len(paths):03d}.pt")
                save(network, paths[-1])

            named = "plain" if kind == "walk" else kind
            spec = Spec(
                named,
                size.middle,
                seed=seed,
                width=size.units,
                train=size.train,
                stop=None,
                epochs=size.steps,
            )
            network = build(spec.kind, spec.depth, spec.width, seed).eval()
            keep(network)
            if kind == "walk":
                for _ in range(size.steps):
                    with torch.no_grad():
                        for p in network.parameters():
                            p.add_(0.01 * torch.randn(p.shape, generator=random))
                    keep(network)
            else:
                network = train(spec, keep)
            out[kind] = sweeping.explained(problem(spec, network), paths)
    return out


def unmatched(seed: int, size: Size, cache: Path) -> Records:
    """Deep networks after two epochs: their losses differ, on purpose."""
    out: Records = {}
    for kind in KINDS:
        spec = Spec(
            kind,
            size.depths[-1],
            seed=seed,
            width=size.units,
            train=size.train,
            stop=None,
            epochs=UNDERFITTED,
        )
        network = trained(spec, cache)
        of = problem(spec, network)
        record = fitted(spec, network) | sweeping.plane(of, seed, size.plane)
        for radius in (0.5, 1.0):
            record |= sweeping.sharpness(of, radius=radius, count=size.directions)
        out[kind] = record
    return out


ZOO = {
    "MLP, ReLU": Spec("skip", 14),
    "MLP, GELU": Spec("skip-gelu", 14),
    "MLP, tanh": Spec("skip-tanh", 14),
    "MLP, label smoothing": Spec("skip", 14, loss="label smoothing"),
    "MLP, squared error": Spec("skip", 14, loss="squared error"),
    "MLP, SAM": Spec("skip", 14, sam=0.05),
    "CNN": Spec("conv", 3, 16),
    "Mixer": Spec("mixer", 3, 32),
    "transformer": Spec("vit", 3, 32),
    "transformer, SAM": Spec("vit", 3, 32, sam=0.05),
}
ERROR_RADIUS = 0.5


def beyond(name: str, seed: int, size: Size, cache: Path) -> Records:
    """One network that the paper does not have."""
    spec = replace(ZOO[name], seed=seed, train=size.train, epochs=size.most)
    network = trained(spec, cache)
    of = problem(spec, network)
    record = fitted(spec, network) | sweeping.plane(of, seed, size.plane)
    record |= sweeping.sharpness(of, count=size.directions)
    record |= sweeping.error_rise(of, ERROR_RADIUS, size.directions)
    record |= sweeping.extremes(of, size.curved)
    if seed == size.seeds[0]:
        record["certificate"] = sweeping.certificate(spec, network, samples=min(64, size.train))
    return {name: record}


Study = Callable[[int, Size, Path], Records]
STUDIES: dict[str, Study] = {
    f.__name__: f for f in (smooth, depth, width, decay, batch, unmatched, trajectory, equivalent)
}
