"""What one evaluation costs, against three others on the same weights, plane, points and images.

``python benchmarks/cost.py --reference CHECKOUT`` times, in turns within one process, lsweep's
evaluator as workers use it (its sums included, the backend chosen by measurement and each by name)
and

* the reference implementation's own set_weights and eval_loss with its DataLoader (which counts
  hits, too), imported from a checkout of it;
* the loss-landscapes package (``pip install loss-landscapes==3.0.6``), which takes all images as
  one batch, and at batch size 128 and its best;
* the plain loop over preloaded tensors at batch size 128 and its best.

A ratio is the median over the rounds of the seconds of the other over those of lsweep in the same
round, the spread half of the range over the median; on a busy machine the fastest rounds say more,
so they stand beside. The error is the largest relative one of the points' losses against float64.
Of each row stands the share of the machine's peak, the best rate of a large matrix product in the
same run, and of each floor the limit: the ratio that all of that peak would give (see `limits`).
Prints the tables of cost.md. ``--device cuda`` prints those of a GPU.

Where other processes compute meanwhile, ``--threads 1 --clock cpu`` takes CPU seconds instead, of
all processes together: those of the reference then count the loader's workers, which otherwise load
while it computes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF

import limits
import networks
import ours
import peers
import torch

from lsweep.errors import LsweepError
from lsweep.hosts.device import synchronize
from lsweep.hosts.machine import cpu_model

LEAST_SECONDS = 0.2  # a turn takes at least so long; cheap points are evaluated many times
AGREE = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}  # relative; beyond it something is wrong
REFERENCE, WHOLE, PLAIN = "reference, as shipped", "package, one batch", "plain"
AGAINST = (REFERENCE, WHOLE, PLAIN)


@dataclass(frozen=True)
class Workload:
    """One network on some images.

    Args:
        title: as printed.
        network: its name in `networks`.
        samples: how many images.
        threads: of the CPU.
        floors: precision -> least ratio to reference, package (one batch) and plain at 128.
        points: how many points are evaluated.
        most: milliseconds a point by precision, at most.
        train: whether its checkpoint is trained, or the initial weights serve.
    """

    title: str
    network: str
    samples: int
    threads: int
    floors: dict[str, tuple[float | None, float | None, float | None]]
    points: int = 2
    most: dict[str, float] | None = None
    train: bool = True


CPU = {
    "resnet20": Workload(
        "ResNet-20", "resnet20", 2048, 2, {"float32": (1.9, 5.5, 1.4), "bfloat16": (3.7, 11, 2.8)}
    ),
    "resnet56": Workload("ResNet-56", "resnet56", 256, 1, {"float32": (1.8, 2, 1.4)}),
    "mlp": Workload("digits MLP 64-64-64-10", "mlp", 1797, 2, {"float32": (400, 1.3, 3)}, 8),
    "vit": Workload(
        "small ViT", "vit", 256, 1, {"float32": (None, None, 1.9), "bfloat16": (None, None, 1.9)}
    ),
}
CUDA = {
    "resnet20": Workload(
        "ResNet-20", "resnet20", 50_000, 2, {"float32": (None, None, 10)}, most={"float32": 120}
    ),
    "resnet20-tf32": Workload(
        "ResNet-20", "resnet20", 50_000, 2, {"tf32": (None, None, 10)}, most={"tf32": 40}
    ),
    "resnet20-bfloat16": Workload(
        "ResNet-20", "resnet20", 50_000, 2, {"bfloat16": (None, None, 10)}, most={"bfloat16": 40}
    ),
    "mlp": Workload("digits MLP 64-64-64-10", "mlp", 1797, 2, {"float32": (None, None, 10)}, 64),
}
QUICK = {
    "tiny": Workload(
        "one convolution", "tiny", 64, 1, {"float32": (None, None, None)}, train=False
    ),
}


@dataclass(frozen=True)
class Contender:
    """One way to evaluate the points: ``losses()`` is one pass over all of them."""

    name: str
    precision: str
    batch: int
    losses: Callable[[], list[float]]


@dataclass(frozen=True)
class Timed:
    """A contender's seconds a point in each round, and its largest relative error."""

    contender: Contender
    seconds: list[float]
    error: float

    @property
    def median(self) -> float:
        """Seconds a point."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range over the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / self.median

    def times_faster(self, other: Timed) -> float:
        """Return the median over the rounds of the other's seconds over this one's."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return statistics.median(theirs / mine for theirs, mine in pairs)

    def at_best(self, other: Timed) -> float:
        """Return the other's seconds over this one's, each in its fastest round."""
        return min(other.seconds) / min(self.seconds)


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def seconds(work: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Return the seconds that ``work`` takes on a device."""
    synchronize(device)
    start = CLOCKS[clock]()
    work()
    synchronize(device)
    return CLOCKS[clock]() - start


def best_batch(
    make: Callable[[peers.Case, int], peers.Evaluate], case: peers.Case, largest: int
) -> int:
    """Return the batch size at which a peer is fastest, from one look at each power of two."""
    sizes = [2**k for k in range(5, 14) if 2**k < min(largest, len(case.y))] + [len(case.y)]
    found: dict[int, float] = {}
    for size in sizes:
        evaluate = make(case, size)
        evaluate(0)
        found[size] = min(seconds(lambda e=evaluate: e(1), case.device) for _ in range(2))  # type: ignore[misc]
    return min(found, key=found.__getitem__)


def others(case: peers.Case, checkout: Path | None, notes: list[str]) -> Iterator[Contender]:
    """Yield the peers that are there; of one that is not, note it in one line."""

    def contender(name: str, batch: int, evaluate: peers.Evaluate) -> Contender:
        numbers = range(len(case.points))
        return Contender(name, "float32", batch, lambda: [evaluate(k) for k in numbers])

    n = len(case.y)
    if checkout is None:
        notes.append("the reference is left out: name a checkout of it with --reference")
    else:
        try:
            yield contender(REFERENCE, peers.BATCH, peers.reference(case, checkout))
        except ImportError as e:
            notes.append(f"the reference is left out: {e}")
    try:
        yield contender(WHOLE, n, peers.package(case, n))
        best = best_batch(peers.package, case, 8192)
        for name, size in (("package", peers.BATCH), ("package, its best", best)):
            yield contender(name, size, peers.package(case, size))
    except ImportError as e:
        notes.append(f"the package is left out: {e}")
    yield contender(PLAIN, peers.BATCH, peers.plain(case, peers.BATCH))
    best = best_batch(peers.plain, case, 8192)
    yield contender("plain, its best", best, peers.plain(case, best))


def in_turns(
    contenders: Sequence[Contender],
    rounds: int,
    truth: Sequence[float],
    device: torch.device,
    least: float,
    clock: str,
) -> list[Timed]:
    """Time all contenders in every round, each round beginning with another one."""
    passes, errors = {}, {}
    for c in contenders:
        c.losses()  # the first pass is slower
        losses: list[float] = []
        once = seconds(lambda c=c, out=losses: out.extend(c.losses()), device)  # type: ignore[misc]
        passes[c.name] = max(1, math.ceil(least / once))
        errors[c.name] = max(abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True))
    found: dict[str, list[float]] = {c.name: [] for c in contenders}
    for r in range(rounds):
        start = r % len(contenders)
        for c in [*contenders[start:], *contenders[:start]]:
            count = passes[c.name]
            work = functools.partial(repeated, c.losses, count)
            t = max(seconds(work, device, clock), 1e-9)
            found[c.name].append(t / count / len(truth))
    return [Timed(c, found[c.name], errors[c.name]) for c in contenders]


def repeated(losses: Callable[[], object], count: int) -> None:
    """Pass over the points several times."""
    for _ in range(count):
        losses()


def compare(
    load: Workload, options: argparse.Namespace
) -> tuple[list[Timed], limits.Ceiling, list[str]]:
    """Time one workload; return what was found, and lines to print under the table."""
    device = torch.device(options.device)
    torch.set_num_threads(load.threads)
    checkpoint = str(networks.trained(load.network)) if load.train else ""
    make = functools.partial(networks.problem, load.network, load.samples, checkpoint)
    chance = torch.Generator().manual_seed(1)
    offsets = (2 * torch.rand(load.points, 2, generator=chance) - 1).tolist()
    points = [(round(a, 2), round(b, 2)) for a, b in offsets]
    contenders: list[Contender] = []
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        evaluators = []
        for precision in load.floors:
            backends = ["auto"]
            for backend in backends:  # which grow once a problem is there
                asked = {"precision": precision, "backend": backend}
                place = root / f"{precision}-{backend}"
                try:
                    found = stack.enter_context(ours.ready(make(), place, device, **asked))
                except LsweepError as e:
                    notes.append(f"lsweep {precision}, {backend} is left out: {e}")
                    continue
                evaluators.append(found)
                name = f"lsweep {precision}, {backend}"
                if backend == "auto":
                    backends += found.by_name
                    used = f" in {found.precision}" if found.precision != precision else ""
                    name += f" ({found.backend}{used})"
                    one = functools.partial(found.losses, points, 1)
                    batch = found.precision, found.batch
                    contenders.append(Contender(f"{name}, one by one", *batch, one))
                unit = functools.partial(found.losses, points, found.unit)
                contenders.append(Contender(name, found.precision, found.batch, unit))
        problem = make()
        x, y = problem.data["train"]
        raw, _ = networks.images(networks.NETWORKS[load.network].large, load.samples)
        case = peers.Case(
            problem.model.to(device),
            [d.tensors for d in evaluators[0].evaluator.directions.axes.values()],
            points,
            raw,
            x.to(device),
            y.to(device),
            networks.GREY if raw.dim() == 3 else (networks.MEAN, networks.STD),
        )
        contenders = [*others(case, options.reference, notes), *contenders]
        least = 0.0 if options.quick else LEAST_SECONDS
        clock = CLOCKS[options.clock]
        ceiling = limits.ceiling(case, dict.fromkeys(["float32", *load.floors]), clock)
        timed = in_turns(
            contenders, options.rounds, peers.truth(case), device, least, options.clock
        )
        ceiling.look(device, clock)
    return timed, ceiling, notes


def verdicts(load: Workload, timed: Sequence[Timed], ceiling: limits.Ceiling) -> Iterator[str]:
    """Yield for each precision a line that holds what was chosen against floors and limits."""
    by_name = {t.contender.name: t for t in timed}
    for precision, floors in load.floors.items():
        chosen = next(
            t for n, t in by_name.items()
            if n.startswith(f"lsweep {precision}, auto") and not n.endswith("one by one")
        )  # fmt: skip
        for how, ratio_of in (("", Timed.times_faster), (", fastest rounds", Timed.at_best)):
            parts = []
            for peer, floor in zip(AGAINST, floors, strict=True):
                if floor is not None and peer in by_name:
                    ratio = ratio_of(chosen, by_name[peer])
                    word = "meets" if ratio >= floor else "below"
                    limit = statistics.median(by_name[peer].seconds) / ceiling.least(precision)
                    parts.append(
                        f"{peer.split(',')[0]} {ratio:.3g} {word} the floor {floor:g}, "
                        f"limit on this machine {limit:.3g}"
                    )
            if load.most and not how:
                word = "meets" if 1e3 * chosen.median <= load.most[precision] else "above"
                parts.append(f"{1e3 * chosen.median:.3g} ms {word} {load.most[precision]:g}")
            if parts:
                yield f"{chosen.contender.name}{how}: " + "; ".join(parts)


def report(
    load: Workload, timed: Sequence[Timed], ceiling: limits.Ceiling, notes: Sequence[str]
) -> None:
    """Print one workload's table."""
    columns = [t for t in timed if not t.contender.name.startswith("lsweep")]
    shape = "32 x 32 x 3" if networks.NETWORKS[load.network].large else "8 x 8"
    trained = "trained briefly" if load.train else "untrained"
    print(f"\n{load.title} ({trained}), {load.samples} samples of {shape}, {load.threads} "
          f"thread{'s' * (load.threads > 1)}, {load.points} points")  # fmt: skip
    head = "".join(f"{_short(t.contender.name):>12}" for t in columns)
    print(f"{'':92}  times faster than")
    print(
        f"{'':43}{'batch':>6}{'ms/point':>11}{'fastest':>9}{'spread':>8}{'error':>9}{'peak':>6}{head}"
    )
    for t in timed:
        c = t.contender
        line = f"{c.name:43}{c.batch:>6}{1e3 * t.median:>11.4g}{1e3 * min(t.seconds):>9.4g}"
        share = ceiling.least(c.precision) / t.median
        line += f"{t.spread:>8.0%}{t.error:>9.1e}{share:>6.0%}"
        if t not in columns:
            line += "".join(f"{t.times_faster(other):>12.3g}" for other in columns)
        print(line)
    for text in (str(ceiling), *notes, *verdicts(load, timed, ceiling)):
        print(text)
    sys.stdout.flush()


def _short(name: str) -> str:
    return {
        REFERENCE: "reference", WHOLE: "pkg, whole", "package": "pkg 128",
        "package, its best": "pkg best", PLAIN: "plain 128", "plain, its best": "plain best",
    }[name]  # fmt: skip


def main() -> None:
    """Time the workloads asked for and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the reference")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--rounds", type=int, help="default: 5; 2 with --quick")
    parser.add_argument("--only", metavar="NAME", help=f"one of {', '.join(CPU)}")
    parser.add_argument("--threads", type=int, help="of the CPU, instead of each workload's own")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1: threads that wait count, too")
    loads = QUICK if options.quick else CPU if options.device == "cpu" else CUDA
    if options.only:
        if options.only not in loads:
            parser.error(f"--only {options.only}: one of {', '.join(loads)}")
        loads = {options.only: loads[options.only]}
    if options.threads:
        loads = {n: replace(load, threads=options.threads) for n, load in loads.items()}
    options.rounds = options.rounds or (2 if options.quick else 5)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true")
    where = torch.cuda.get_device_name() if options.device == "cuda" else cpu_model()
    versions = [f"{p} {_version(p)}" for p in ("lsweep", "torch", "loss-landscapes")]
    software = ", ".join((f"Python {platform.python_version()}", *versions))
    print(f"{datetime.date.today()}; {where}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}; Linux {platform.release()}; {software}; "
          f"{options.rounds} rounds, {options.clock} clock", flush=True)  # fmt: skip
    wrong = []
    for load in loads.values():
        timed, ceiling, notes = compare(load, options)
        report(load, timed, ceiling, notes)
        wrong += [t for t in timed if not t.error <= AGREE[t.contender.precision]]
    for t in wrong:
        print(f"{t.contender.name}: its losses are {t.error:.1e} off")
    sys.exit(1 if wrong else 0)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


if __name__ == "__main__":
    main()
