"""The demo: depth makes a plain network's landscape rough, and skip connections keep it smooth.

After Li et al., section 5: two networks of the same depth, with and without skip connections,
trained on real digits to the same training loss and swept over the same plane.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from lsweep.errors import LsweepError
from lsweep.hosts.machine import cpus
from lsweep.measures.convexity import THRESHOLD, convexity_ratio, nonconvex_fraction
from lsweep.pictures.drawing import render, save
from lsweep.pictures.marks import VERMILLION
from lsweep.storage.files import write_whole
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface

SEEDS = (0, 1, 2)
COUNT = 25
LINE_COUNT = 51
ROUGH, SMOOTH = 0.10, 0.05
NAMES = {False: "plain", True: "skip"}


@dataclass(frozen=True)
class Trained:
    """One network of the demo and what its plane shows."""

    skip: bool
    seed: int
    train_loss: float
    test_error: float
    nonconvex: float
    epochs: int
    seconds: float

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{NAMES[self.skip]}-{self.seed}"


def demo(folder: Path, workers: int | None = None) -> int:
    """Train, sweep, draw and print the table; everything stays in ``folder``.

    Args:
        folder: where checkpoints, runs and pictures go; an earlier demo there is resumed.
        workers: processes; by default one a CPU.

    Raises:
        LsweepError: the folder cannot be written, or scikit-learn is missing.
    """
    start = time.monotonic()
    count = workers or min(cpus(), 2 * len(SEEDS))
    if count < 1:
        raise LsweepError(f"--workers {count}: must be at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise LsweepError(f"cannot write {folder}: {e.strerror}") from None
    print(f"Training {2 * len(SEEDS)} networks on 1000 real digits and sweeping each over "
          f"{COUNT} x {COUNT} points, with {count} processes.", flush=True)  # fmt: skip
    trained: list[Trained] = []
    with _processes(count) as pool:
        futures = [
            pool.submit(train_and_sweep, folder.absolute(), skip, seed)
            for seed in SEEDS
            for skip in (False, True)
        ]
        for future in as_completed(futures):
            t = future.result()
            trained.append(t)
            how = f"after {t.epochs} epochs" if t.epochs else "from its checkpoint"
            print(f"  {t.name}: training loss {t.train_loss:.4f} {how}, swept; {t.seconds:.0f} s",
                  flush=True)  # fmt: skip
    trained.sort(key=lambda t: (t.seed, t.skip))
    text = table(trained)
    pictures = draw(folder)
    write_whole(folder / "table.txt", text.encode())
    print(f"\n{text}")
    for path in pictures:
        print(f"wrote {path}")
    print(f"done in {time.monotonic() - start:.0f} s. Next: look at the pictures; 'lsweep status "
          f"{folder / 'plain-0.run'}'; 'lsweep init' for a network of your own")  # fmt: skip
    return 0


@contextlib.contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Give processes of one thread each, which is fastest; Ctrl-C ends them at once."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is the parent's to handle
    )
    try:
        yield pool
        pool.shutdown()
    except BrokenProcessPool:
        raise LsweepError(
            "a process of the demo was killed; the same command goes on where it was"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def train_and_sweep(folder: Path, skip: bool, seed: int) -> Trained:
    """Train one network unless its checkpoint is there; sweep its plane, for seed 0 a line too."""
    import torch

    from lsweep.digits import Network, assess, digits, train
    from lsweep.problems.problem import Problem
    from lsweep.working.inprocess import sweep

    start = time.monotonic()
    torch.set_num_threads(1)
    os.chdir(folder)
    name = f"{NAMES[skip]}-{seed}"
    data, checkpoint, epochs = digits(), Path(f"{name}.pt"), 0
    if not checkpoint.exists():
        network = Network(skip, seed)
        _, epochs = train(network, *data["train"], seed)
        temporary = checkpoint.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), temporary)
        temporary.replace(checkpoint)
    problem = Problem.from_factory("lsweep.digits:make", checkpoint=str(checkpoint), skip=skip)
    axis = (-1, 1, COUNT)
    directions = {"seed": seed}
    plane = sweep(problem, axis, axis, run=f"{name}.run", directions=directions, device="cpu")
    if seed == SEEDS[0]:
        line = (-1, 1, LINE_COUNT)
        sweep(problem, line, run=f"{name}-line.run", directions=directions, device="cpu")
    loss, _ = assess(problem.model, *data["train"])
    _, error = assess(problem.model, *data["test"])
    nonconvex = nonconvex_fraction(plane)
    return Trained(skip, seed, loss, error, nonconvex, epochs, time.monotonic() - start)


def draw(folder: Path) -> list[Path]:
    """Draw seed 0 of both: a line first, then the plane as contours and in three dimensions.

    The contours are linear and end at a loss of 10, as in the paper's figures.
    """
    names = [f"{NAMES[skip]}-{SEEDS[0]}" for skip in (False, True)]
    labels = ["no skip connections", "skip connections"]
    lines = [Surface.load(RunFolder(folder / f"{n}-line.run").surface) for n in names]
    planes = [Surface.load(RunFolder(folder / f"{n}.run").surface) for n in names]
    paths = [folder / name for name in ("line.png", "contour.png", "relief.png")]
    render(lines, paths[0], name="train_loss", log=True, labels=labels)
    figure = render(planes, name="train_loss", kind="contour", log=False, vmax=10, labels=labels)
    for ax, plane in zip(figure.axes, planes, strict=False):  # the colour bar's comes after them
        shade_nonconvex(plane, ax)
    save(figure, paths[1])
    render(planes, paths[2], name="train_loss", kind="3d", log=True, labels=labels)
    return paths


def shade_nonconvex(surface: Surface, ax: Axes, name: str = "train_loss") -> Axes:
    """Shade the interior points that count for the non-convex fraction, and say so in the plot."""
    bent = np.where(convexity_ratio(surface, name) > THRESHOLD, 1.0, np.nan)
    x, y = surface.x[1:-1], surface.y[1:-1]
    ax.pcolormesh(x, y, bent, cmap=ListedColormap([VERMILLION]), alpha=0.3, zorder=0)
    share = f"shaded: not convex, {nonconvex_fraction(surface, name):.1%}"
    ax.set_title(f"{ax.get_title()}\n({share})", fontsize=float(ax.title.get_fontsize()) - 1)
    return ax


def table(trained: list[Trained]) -> str:
    """Return the numbers of all seeds, and in one line each what may be read off them."""
    rows = [
        f"{'':14}{'training loss':>16}{'test error':>14}{'non-convex':>14}",
        *(
            f"{t.name:14}{t.train_loss:16.4f}{t.test_error:12.1f} %{t.nonconvex:14.3f}"
            for t in trained
        ),
        "",
    ]
    rough = [t.nonconvex for t in trained if not t.skip]
    smooth = [t.nonconvex for t in trained if t.skip]
    rows.append(
        "non-convex: share of the plane where the Hessian has -λ_min > 0.1 max|λ|;\n"
        f"plain {min(rough):.3f} to {max(rough):.3f}, skip {min(smooth):.3f} to {max(smooth):.3f}"
    )
    if min(rough) >= ROUGH and max(smooth) <= SMOOTH:
        rows.append("Without skip connections the landscape is rougher, in every seed.")
    elif min(rough) > max(smooth):
        rows.append("Without skip connections the landscape is rougher, by less than usual.")
    else:
        rows.append("On this machine the two do not differ clearly: nothing follows from it.")
    rows.append(matched(trained))
    return "\n".join(rows) + "\n"


def matched(trained: list[Trained]) -> str:
    """Return whether the training losses are close enough for a comparison to mean something."""
    losses = [t.train_loss for t in trained]
    span = f"{min(losses):.4f} to {max(losses):.4f}"
    if max(losses) <= 2 * min(losses) + 0.01:
        return f"All were trained to about the same training loss ({span}): they are matched."
    return (
        f"Their training losses are NOT matched ({span}): part of the difference may come from "
        "how well each was fitted."
    )
