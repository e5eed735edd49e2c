"""How much resolution a minute buys: whole sweeps with [refine] against the reference's grid.

``python benchmarks/resolution.py --reference CHECKOUT`` runs ``lsweep run`` as a user would, one
worker a CPU, and takes the seconds of the whole command: pre-flight, the timing of backends, audit,
merge and picture included. Beside it stands what the reference implementation would need for every
point of the same grid, extrapolated from points that are timed before and after, and the same of
the plain preloaded loop at batch size 128.

The true error is the design's: |T̂ − T| over (q98 − q2) of T = ln L on evaluated points, its maximum
over random interpolated points (for the perceptron over all points of a dense grid), which are
evaluated by the plain loop in float32. Also: 1001 x 1001 points with a map of their stated error,
the peak of a worker's memory, and the README's picture. Prints the tables of resolution.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import networks
import numpy as np
import peers
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsweep.hosts.machine import cpu_model
from lsweep.pictures.drawing import render, save
from lsweep.plans.plan import Plan
from lsweep.plans.settings import Settings
from lsweep.preparing.planning import plan_run
from lsweep.preparing.restoring import load_problem
from lsweep.problems.problem import make_problem
from lsweep.storage.files import readable
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Status, Surface

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
TOLERANCE = 0.01
TIMED = 3  # points of a peer before a sweep, and as many after it
TOML = """\
[problem]
factory = "networks.py:problem"
options = {{ name = "{network}", samples = {samples}, checkpoint = "{checkpoint}" }}
[grid]
x = {{ range = [-1, 1], count = {count} }}
y = {{ range = [-1, 1], count = {count} }}
[evaluate]
precision = "{precision}"
"""
BASELINE = """\
import networks, torch
problem = networks.problem("{network}", 64, "{checkpoint}")
with torch.no_grad():
    problem.model(problem.data["train"][0])
"""
IMPORTS = "import networks, torch\n"
WORKERS = """\
import lsweep.commands.cli, lsweep.commands.running, lsweep.working.worker
"""
WORK = """\
from lsweep.commands.cli import main
main(["work", "sweep.run", "--index", "0", "--of", "1"])
"""
PEAK = """
status = open("/proc/self/status").read()  # kB; Linux
print(*(status.partition(key + ":")[2].split()[0] for key in ("VmHWM", "RssFile")))
"""
PROCESSES = 3  # of each kind, in turns: how much of a library is mapped differs from one to another


@dataclass(frozen=True)
class Goal:
    """One sweep of the table.

    Args:
        title: as printed.
        network: its name in `networks`.
        samples: how many images.
        precision: of the evaluation.
        floor: times faster than the reference's dense grid, at least.
        dense: whether a point is cheap enough for the dense truth.
    """

    title: str
    network: str
    samples: int
    precision: str
    floor: float | None
    dense: bool


GOALS = {
    "resnet20": Goal("ResNet-20, float32", "resnet20", 1797, "float32", 40, False),
    "resnet20-bfloat16": Goal("ResNet-20, bfloat16", "resnet20", 1797, "bfloat16", 60, False),
    "mlp12": Goal("12-layer MLP", "mlp12", 1797, "float32", None, True),
}
WEIGHTY = {"wide": Goal("50 MB of weights", "wide", 8192, "float32", None, False)}
QUICK = {"mlp": Goal("MLP, untrained", "mlp", 64, "float32", None, False)}


@dataclass(frozen=True)
class Swept:
    """What one command gave."""

    folder: RunFolder
    surface: Surface
    seconds: float

    @property
    def evaluated(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which points are not interpolated."""
        return np.asarray(self.surface.status != Status.INTERPOLATED)

    @property
    def backend(self) -> str:
        """What was chosen by measurement."""
        return str(next(iter(readable(self.folder.all_devices())))["backend"])

    @property
    def how(self) -> str:
        """The same, with the precision that it computes in."""
        return f"{self.backend} in {self.surface.provenance['numerics']['precision']}"


def lsweep(*arguments: object) -> float:
    """Run a command as a user would; return its seconds."""
    start = time.perf_counter()
    said([sys.executable, "-m", "lsweep", *map(str, arguments)])
    return time.perf_counter() - start


def said(command: Sequence[str]) -> str:
    """Run a process, which must not fail; return what it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def peak(code: str, place: Path) -> FloatArray:
    """Return the peak memory of a process that runs Python code, and that of files, in MiB."""
    command = [sys.executable, "-c", code + PEAK]
    text = subprocess.check_output(command, text=True, cwd=place)
    return np.array(text.split()[-2:], dtype=float) / 1024


def written(place: Path, goal: Goal, count: int, refine: bool) -> Path:
    """Write sweep.toml and the factory beside it."""
    place.mkdir(parents=True)
    shutil.copy(networks.__file__, place)
    text = TOML.format(
        network=goal.network, samples=goal.samples, checkpoint=checkpoint_of(goal.network),
        precision=goal.precision, count=count,
    )  # fmt: skip
    if refine:
        text += f"[refine]\ntolerance = {TOLERANCE}\n"
    (place / "sweep.toml").write_text(text)
    return place / "sweep.toml"


def planned(place: Path, goal: Goal, count: int) -> RunFolder:
    """Plan a dense sweep here and now."""
    toml = written(place, goal, count, refine=False)
    settings, folder = Settings.from_file(toml), RunFolder(place / "sweep.run")
    plan_run(settings, make_problem(settings.problem, place), place, folder)
    return folder


def swept(place: Path, goal: Goal, count: int, refine: bool, *options: str) -> Swept:
    """Run one sweep from nothing to surface and picture."""
    seconds = lsweep("run", written(place, goal, count, refine), *options)
    folder = RunFolder(place / "sweep.run")
    return Swept(folder, Surface.load(folder.surface), seconds)


def checkpoint_of(network: str) -> str:
    """Return where its trained weights lie; for a network of the quick form, nowhere."""
    return str(networks.trained(network)) if network in {t.network for t in GOALS.values()} else ""


def case_of(folder: RunFolder, points: Sequence[peers.Point], large: bool) -> peers.Case:
    """Return what the peers need to evaluate the sweep's own plane at points of it."""
    problem, directions = load_problem(folder, Plan.read(folder), trust=True)
    x, y = problem.data["train"]
    raw, _ = networks.images(large, len(y))
    return peers.Case(
        problem.model,
        [d.tensors for d in directions.axes.values()],
        points,
        raw,
        x,
        y,
        networks.GREY if not large else (networks.MEAN, networks.STD),
    )


def true_error(sweep: Swept, index: Sequence[tuple[int, int]], losses: Sequence[float]) -> float:
    """Return the largest |T̂ − T| over (q98 − q2) of T = ln L on evaluated points."""
    values = sweep.surface["train_loss"]
    seen = np.log(values[sweep.evaluated])
    low, high = np.quantile(seen, [0.02, 0.98])
    there = np.array([np.log(values[j, i]) for i, j in index])
    return float(np.abs(there - np.log(losses)).max() / (high - low))


def some(sweep: Swept, count: int) -> list[tuple[int, int]]:
    """Return random points (i, j) that were interpolated; any points where none was."""
    where = np.argwhere(~sweep.evaluated)
    if not len(where):
        where = np.argwhere(sweep.evaluated)
    chosen = np.random.default_rng(0).permutation(len(where))[:count]
    return [(int(i), int(j)) for j, i in where[chosen]]


def timed(evaluate: peers.Evaluate, count: int) -> list[float]:
    """Return the seconds of some evaluations."""
    out = []
    for k in range(count):
        start = time.perf_counter()
        evaluate(k)
        out.append(time.perf_counter() - start)
    return out


def head() -> str:
    """Return the table's first lines."""
    return (
        f"{'':22}{'':24}{'command':>9}{'points':>15}{'stated':>8}{'true error':>22}"
        f"{'reference, dense':>18}{'times':>8}{'plain, dense':>14}{'times':>8}"
    )


def compare(goal: Goal, place: Path, options: argparse.Namespace, count: int) -> Swept:
    """Sweep with [refine], time the peers before and after, and print one line."""
    large = networks.NETWORKS[goal.network].large
    tiny = ("--on", "inline") if options.quick else ()
    corners = [(-1.0, -1.0), (0.5, -0.5), (0.25, 1.0)]
    case = case_of(planned(place / "plan", goal, count), corners, large)
    rivals: dict[str, peers.Evaluate] = {"plain": peers.plain(case, peers.BATCH)}
    if options.reference is not None:
        rivals["reference"] = peers.reference(case, options.reference)
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for name, evaluate in rivals.items():
        evaluate(0)
        found[name] += timed(evaluate, 1 if options.quick else TIMED)
    sweep = swept(place / "refined", goal, count, True, *tiny)
    for name, evaluate in rivals.items():
        found[name] += timed(evaluate, 1 if options.quick else TIMED)
    if goal.dense:
        dense = swept(place / "dense", goal, count, False, *tiny).surface["train_loss"]
        index = [(i, j) for j in range(count) for i in range(count)]
        error = true_error(sweep, index, [dense[j, i] for i, j in index])
        where = "all points"
    else:
        index = some(sweep, 60)
        points = [(float(sweep.surface.x[i]), float(sweep.surface.y[j])) for i, j in index]
        case = case_of(sweep.folder, points, large)
        evaluate = peers.plain(case, 64)
        error = true_error(sweep, index, [evaluate(k) for k in range(len(points))])
        where = f"{len(index)} points"
    stated = float(np.nanmax(sweep.surface["train_loss_error"])) if not sweep.evaluated.all() else 0
    line = f"{goal.title:22}{sweep.how:24}{sweep.seconds:>7.1f} s"
    line += f"{int(sweep.evaluated.sum()):>7} of {count**2:<4}"
    line += f"{stated:>8.2%}{error:>8.2%} of {where:<11}"
    for name in ("reference", "plain"):
        if name in found:
            each = statistics.median(found[name])
            whole = count**2 * each
            line += f"{whole:>16.0f} s{whole / sweep.seconds:>8.3g}"
        else:
            line += f"{'left out':>18}{'':>8}"
    print(line)
    if goal.floor is not None and "reference" in found:
        ratio = count**2 * statistics.median(found["reference"]) / sweep.seconds
        floor = 60.0 if sweep.backend == "native" else goal.floor
        word = "meets" if ratio >= floor else "below"
        print(f"    {ratio:.3g} times faster than the reference, {word} {floor:g}; the reference: "
              f"{count**2} x {statistics.median(found['reference']):.3f} s, the median of "
              f"{len(found['reference'])} points")  # fmt: skip
    if not error <= TOLERANCE:
        print(f"    the true error is above {TOLERANCE:.0%}")
    sys.stdout.flush()
    return sweep


def large_grid(place: Path, options: argparse.Namespace, picture: Path, count: int) -> None:
    """Sweep count x count points of ResNet-20, draw loss and error, print what it took."""
    goal = GOALS["resnet20"]
    sweep = swept(place, goal, count, True)
    index = some(sweep, 40)
    points = [(float(sweep.surface.x[i]), float(sweep.surface.y[j])) for i, j in index]
    case = case_of(sweep.folder, points, True)
    evaluate = peers.plain(case, 64)
    error = true_error(sweep, index, [evaluate(k) for k in range(len(points))])
    stated = float(np.nanmax(sweep.surface["train_loss_error"]))
    print(f"\n{count} x {count} points of ResNet-20 ({sweep.how}): {sweep.seconds:.1f} s, "
          f"{int(sweep.evaluated.sum())} evaluated, error up to {stated:.2%} stated, "
          f"{error:.2%} at {len(index)} random points")  # fmt: skip
    if options.reference is not None:
        evaluate = peers.reference(case, options.reference)
        evaluate(0)
        whole = count**2 * statistics.median(timed(evaluate, TIMED))
        print(f"the reference would need {whole / 86400:.3g} days for it (extrapolated from "
              f"{TIMED} points)")  # fmt: skip
    error_map(sweep.surface, picture)
    print(f"wrote {picture.name}")


def error_map(surface: Surface, picture: Path) -> None:
    """Draw the loss beside its stated error."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    surface.plot("train_loss", ax=left, kind="filled", log=True)
    image = right.pcolormesh(
        surface.x, surface.y, 100 * surface["train_loss_error"], cmap="cividis", rasterized=True
    )
    dot(right, surface)
    right.set_aspect("equal")
    count = int((surface.status != Status.INTERPOLATED).sum())
    right.set_title(f"stated error; {count} points were evaluated")
    figure.colorbar(image, ax=right, label="% of the range of ln loss")
    save(figure, picture)


def two_pictures(dense: Surface, refined: Surface, picture: Path) -> None:
    """Draw the same landscape dense and refined, the evaluated points on it: README's picture."""
    count = int((refined.status != Status.INTERPOLATED).sum())
    labels = [f"all {dense.status.size} points", f"{count} points, the rest interpolated"]
    plain = render([dense, refined], kind="filled", name="train_loss", log=True, labels=labels)
    dot(plain.axes[1], refined)
    save(plain, picture)


def dot(ax: Axes, surface: Surface) -> None:
    """Mark the points that were evaluated."""
    j, i = np.nonzero(surface.status != Status.INTERPOLATED)
    ax.plot(surface.x[i], surface.y[j], "o", ms=2.5, mfc="white", mec="black", mew=0.5)


def memory(place: Path, goal: Goal, count: int) -> None:
    """Print a worker's peak above a process that has imported torch and run one batch.

    Apart: importing h5py and lsweep; more code, mapped from files that all processes share.
    """
    named = {"network": goal.network, "checkpoint": checkpoint_of(goal.network)}
    codes = [BASELINE.format(**named), IMPORTS, IMPORTS + WORKERS, WORK]
    rounds = []
    for i in range(PROCESSES):
        folder = planned(place / str(i), goal, count)
        rounds.append([peak(code, folder.root.parent) for code in codes])
    found = np.array(rounds)
    baseline, imported, with_ours, _ = np.median(found, axis=0)
    imports = with_ours - imported
    each = found[:, -1] - found[:, 0]
    above, files = np.median(each, axis=0)
    low, high = each[:, 0].min(), each[:, 0].max()
    problem = networks.problem(goal.network, goal.samples)
    data = sum(t.numel() * t.element_size() for t in problem.data["train"])
    parameters = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    code = files - imports[1]
    rest = above - imports[0] - code
    backend = next(iter(readable(folder.all_devices())))["backend"]
    most = (1.5 * data + 6 * parameters) / 2**20
    word = "meets" if above <= most else "above"
    print(f"peak memory, {goal.title} ({backend}): {above:.0f} MiB ({low:.0f} to {high:.0f}) "
          f"above the {baseline[0]:.0f} of a process with torch and one batch, {word} {most:.1f} = "
          f"1.5 x {data / 2**20:.1f} (data) + 6 x {parameters / 2**20:.1f} (parameters)\n"
          f"    {imports[0]:.0f} imports of h5py and lsweep, {code:.0f} more code, "
          f"{rest:.0f} the rest{'' if rest > most else ', which meets it'}",
          flush=True)  # fmt: skip


def main() -> None:
    """Print the tables and draw the pictures asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*GOALS, "large", "memory", "picture")
    figures = Path(__file__).parent / "figures"
    parser.add_argument("--reference", type=Path, metavar="PATH", help="checkout of the reference")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--only", choices=parts, help="one part; by default all")
    parser.add_argument("--figures", type=Path, default=figures, help="where pictures go")
    options = parser.parse_args()
    options.figures.mkdir(parents=True, exist_ok=True)
    goals = QUICK if options.quick else GOALS
    count = 17 if options.quick else 51
    chosen = [options.only] if options.only else [*goals, *(() if options.quick else parts[3:])]
    print(f"{datetime.date.today()}; {cpu_model()}, {os.cpu_count()} cores, "
          f"load {os.getloadavg()[0]:.1f}; Linux {platform.release()}; "
          f"Python {platform.python_version()}, torch {torch.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as base:
        if any(c in goals for c in chosen):
            print(f"{count} x {count} points, tolerance {TOLERANCE:.0%}\n{head()}")
        sweeps: dict[str, Swept] = {}
        for name in chosen:
            if name in goals:
                sweeps[name] = compare(goals[name], Path(base, name), options, count)
        if "large" in chosen:
            large_grid(Path(base, "large"), options, options.figures / "thousand.png", 1001)
        if "memory" in chosen or options.quick:
            print()
            for name, goal in (goals if options.quick else {**goals, **WEIGHTY}).items():
                memory(Path(base, f"memory-{name}"), goal, 3 if name in WEIGHTY else 5)
        if "picture" in chosen:
            goal = GOALS["mlp12"]
            place = Path(base, "picture")
            dense = swept(place / "dense", goal, count, False).surface
            refined = sweeps.get("mlp12") or swept(place / "refined", goal, count, True)
            two_pictures(dense, refined.surface, options.figures / "refined.png")
            print("wrote refined.png")


if __name__ == "__main__":
    main()
