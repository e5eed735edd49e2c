"""How few evaluations [refine] takes, and whether the error that it states is the true one.

``python benchmarks/honesty.py`` evaluates the whole 51 x 51 grid of trained networks, then plays
refinement against it with the product's own decisions, several times each with other random
held-out points. Evaluations do not count the held-out points. The true error is the design's:
|T̂ − T| over (q98 − q2 of T on evaluated points), T the log scale, at all points that were not
evaluated; covered is the share of them that lie within their stated error. Limits, of every run:
120 evaluations (250 of twelve layers; deeper and wider ones have none), 1 % true error, 95 %
covered, a median of stated over true of 5. Prints the table of honesty.md.

The constants of the refinement were chosen on the planes marked *; the others were not looked at.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import networks
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsweep
from lsweep.digits import digits
from lsweep.hosts.machine import cpu_model
from lsweep.plans.points import Lattice
from lsweep.refinement.refine import Evaluated, decide, fill, first_points
from lsweep.surfaces.scales import log_scale

FloatArray = npt.NDArray[np.float64]

TOLERANCE = 0.01
COUNT = 51
SMOOTH, ROUGH = 120, 250


class Skip(nn.Sequential):
    """Layers that are added to what goes in."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        change: Tensor = nn.Sequential.forward(self, x)  # type: ignore[no-untyped-call]
        return x + change


def perceptron(
    depth: int, width: int = 64, act: type[nn.Module] = nn.ReLU, *, norm: bool, skip: bool
) -> nn.Module:
    """Return a network of 64 inputs with so many hidden layers."""
    layers: list[nn.Module] = [nn.Linear(64, width), act()]
    for _ in range(depth - 1):
        inner = [nn.Linear(width, width), *([nn.BatchNorm1d(width)] if norm else []), act()]
        layers.append(Skip(*inner) if skip else nn.Sequential(*inner))
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutions(depth: int, width: int) -> nn.Module:
    """Return a network of 3 x 3 convolutions with batch norm on images of 8 x 8."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for a, b in itertools.pairwise([1] + depth * [width]):
        layers += [nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(4 * width, 10))


def trained(make: Callable[[], nn.Module], seed: int, epochs: int, rate: float) -> lsweep.Problem:
    """Return a network trained on 600 digits, to be evaluated on 300 of them."""
    images, labels = (t[:600] for t in digits()["train"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.0)
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(images)), 50):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(network(images[batch]), labels[batch]))
                optimizer.step()
    data = {"train": (images[:300], labels[:300])}
    return lsweep.Problem(network.eval(), data, loss=nn.CrossEntropyLoss())


@dataclass(frozen=True)
class Plane:
    """A plane of the table.

    Args:
        problem: makes it.
        most: evaluations that it may take, None where there is no limit.
        tuned: whether constants were chosen on it.
        seed: of its directions.
    """

    problem: Callable[[], lsweep.Problem]
    most: int | None = SMOOTH
    tuned: bool = False
    seed: int = 0


def mlp(depth: int, seed: int, *, most: int | None = SMOOTH, tuned: bool = False, epochs: int = 30,
        rate: float = 2e-3, width: int = 64, act: type[nn.Module] = nn.ReLU, norm: bool = False,
        skip: bool = False) -> Plane:  # fmt: skip
    """Return the plane of a perceptron."""

    def problem() -> lsweep.Problem:
        return trained(
            lambda: perceptron(depth, width, act, norm=norm, skip=skip), seed, epochs, rate
        )

    return Plane(problem, most, tuned, seed)


def benched(name: str, samples: int) -> Callable[[], lsweep.Problem]:
    """Return what makes the problem of a network of the other benchmarks."""
    return lambda: networks.problem(name, samples, str(networks.trained(name)))


PLANES = {
    "2 layers *": mlp(2, 0, tuned=True),
    "3 layers, tanh *": mlp(3, 0, act=nn.Tanh, tuned=True),
    "5 layers *": mlp(5, 1, tuned=True),
    "8 layers, skip *": mlp(8, 1, skip=True, rate=1e-3, tuned=True),
    "ResNet-20 *": Plane(benched("resnet20", 96), tuned=True),
    "12 layers *": mlp(12, 0, most=ROUGH, epochs=60, rate=1e-3, tuned=True),
    "12 layers, 128 wide *": mlp(12, 2, most=ROUGH, width=128, epochs=40, rate=1e-3, tuned=True),
    "2 layers, GELU": mlp(2, 31, width=48, act=nn.GELU),
    "4 layers, 96 wide": mlp(4, 32, width=96),
    "6 layers, SiLU": mlp(6, 33, act=nn.SiLU),
    "4 convolutions": Plane(lambda: trained(lambda: convolutions(4, 12), 34, 30, 2e-3), seed=34),
    "12 layers, 1": mlp(12, 35, most=ROUGH, epochs=60, rate=1e-3),
    "12 layers, 2": mlp(12, 36, most=ROUGH, epochs=60, rate=1e-3),
    "12 layers, benchmark's": Plane(benched("mlp12", 600), ROUGH),
    "10 layers, batch norm": mlp(10, 38, most=None, norm=True),
    "14 layers, 96 wide": mlp(14, 39, most=None, width=96, epochs=60, rate=1e-3),
}
QUICK = {"2 layers": mlp(2, 0, epochs=5)}


@dataclass(frozen=True)
class Refined:
    """What one refinement came to; errors in per cent."""

    evaluations: int
    rounds: int
    error: float
    covered: float
    ratio: float


def refined(truth: FloatArray, name: str) -> Refined | None:
    """Refine a surface whose every value is known; None where all of it is asked.

    Args:
        truth: (n, n) losses.
        name: of the random choice of held-out points.
    """
    lattice = Lattice({k: np.linspace(-1, 1, n) for k, n in zip("xy", truth.shape, strict=True)})
    values = truth.ravel()
    first = first_points(lattice, name)
    index = np.concatenate([first.asked, first.held_out])
    rounds = 0
    while True:
        rounds += 1
        known = Evaluated(index, values[index], np.isin(index, first.held_out))
        last = decide(lattice, TOLERANCE, known)
        if last.state == "dense":
            return None
        if last.state == "done":
            break
        index = np.concatenate([index, last.ask])
    filled = fill(lattice, known)
    unseen = np.setdiff1d(np.arange(len(values)), index)
    scale = log_scale(values).forward
    true = np.abs(scale(filled.values[unseen]) - scale(values[unseen])) / filled.spread
    stated = filled.error[unseen]
    return Refined(
        len(index) - len(first.held_out),
        rounds,
        100 * float(true.max()),
        100 * float(np.mean(true <= stated)),
        float(np.median(stated / np.maximum(true, 1e-12))),
    )


def missed(run: Refined, most: int | None) -> list[str]:
    """Return the limits that a run does not meet."""
    limits = {
        "evaluations": most is None or run.evaluations <= most,
        "error": run.error <= 100 * TOLERANCE,
        "covered": run.covered >= 95,
        "ratio": run.ratio <= 5,
    }
    return [name for name, met in limits.items() if not met]


def each(runs: list[Refined], name: str, digits: int = 0) -> str:
    """Return one quantity of all runs."""
    return " ".join(f"{getattr(r, name):.{digits}f}" for r in runs)


def row(name: str, plane: Plane, choices: int) -> list[tuple[Plane, Refined]]:
    """Print one line; return its runs."""
    with_sweep = plane.problem()
    axis = (-1, 1, COUNT)
    surface = lsweep.sweep(
        with_sweep, x=axis, y=axis, directions={"seed": plane.seed}, device="cpu", progress=False
    )
    truth = np.asarray(surface["train_loss"])
    found = [refined(truth, f"choice {k}") for k in range(choices)]
    runs = [r for r in found if r is not None]
    most = "-" if plane.most is None else str(plane.most)
    line = f"{name:24}{most:>6}  {each(runs, 'evaluations'):18}{each(runs, 'rounds'):10}"
    line += f"{each(runs, 'error', 2):21}{each(runs, 'covered', 1):22}{each(runs, 'ratio', 1):17}"
    words = [w for r in runs for w in missed(r, plane.most)]
    told = [f"{w} {words.count(w)} of {len(runs)}" for w in dict.fromkeys(words)]
    if len(runs) < len(found):
        told.append(f"evaluated whole {len(found) - len(runs)} of {len(found)}")
    print(f"{line}{', '.join(told) or 'meets'}", flush=True)
    return [(plane, r) for r in runs]


def summary(title: str, all_runs: list[tuple[Plane, Refined]]) -> None:
    """Print how many of some runs meet each limit."""
    if not all_runs:
        return
    words = [w for p, r in all_runs for w in missed(r, p.most)]
    n = len(all_runs)
    shares = [
        f"{w} {1 - words.count(w) / n:.0%}" for w in ("evaluations", "error", "covered", "ratio")
    ]
    runs = [r for _, r in all_runs]
    print(f"{title}: {n} runs; within the limits: {', '.join(shares)}; "
          f"covered {np.mean([r.covered for r in runs]):.1f}%, at least "
          f"{min(r.covered for r in runs):.1f}%; median stated over true "
          f"{np.median([r.ratio for r in runs]):.1f}; true error {max(r.error for r in runs):.2f}% "
          f"at most, {np.median([r.error for r in runs]):.2f}% typically")  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one plane, to see that it works")
    parser.add_argument("--choices", type=int, default=3, help="of held-out points, for each plane")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small layers are slower on more
    print(f"{datetime.date.today()}; {cpu_model()}, {os.cpu_count()} cores; "
          f"Linux {platform.release()}; Python {platform.python_version()}, "
          f"torch {torch.__version__}; {' '.join(sys.argv[1:]) or 'whole form'}")  # fmt: skip
    print(f"{'':24}{'limit':>6}  {'evaluations':18}{'rounds':10}{'true error, %':21}"
          f"{'covered, %':22}{'stated over true':17}misses")  # fmt: skip
    runs = [
        run
        for name, plane in (QUICK if options.quick else PLANES).items()
        for run in row(name, plane, 1 if options.quick else options.choices)
    ]
    print()
    for title, tuned in (("planes of the tuning", True), ("other planes", False)):
        summary(title, [r for r in runs if r[0].tuned == tuned])
    if not options.quick:
        print(f"{time.process_time():.0f} s of one core")


if __name__ == "__main__":
    main()
