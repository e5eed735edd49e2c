"""What a million points cost: merge, status and prune as processes, and a worker's own cost.

``python benchmarks/scale.py`` plans a sweep of a problem whose values a formula gives, writes its
rows through the real writer as 256 workers would have, times the commands on it, and lets one real
worker evaluate 10^5 points while its calls are timed. Prints the tables of scale.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lsweep.outcomes.committed import Committed
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.storage import leases
from lsweep.storage.folder import RunFolder
from lsweep.storage.leases import Lease
from lsweep.storage.parts import CAPACITIES, PartWriter
from lsweep.storage.rows import Kind, device_code, row_type
from lsweep.storage.sums import WD, WV, WW, WWD, WWDD, WWV, WWVV, W
from lsweep.storage.workers import Heartbeat, State
from lsweep.surfaces.surface import Status, Surface

FACTORY = '''\
import torch
from torch import nn
import lsweep


def bowl():
    """Loss s·((1 + x)² + 3 (1 + y)²) over two samples s: what a point costs is the framework's."""
    net = nn.Module()
    net.a, net.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.a.weight), nn.init.ones_(net.b.weight)

    def forward(model, batch):
        return {"loss": batch[0] * (model.a.weight**2 + 3 * model.b.weight**2).flatten()}

    forward.metrics = ("loss",)
    return lsweep.Problem(net, {"train": (torch.tensor([0.5, 1.5]),)}, forward=forward)
'''
TOML = """\
[problem]
factory = "problem.py:bowl"
[grid]
x = {{ range = [-1, 1], count = {side} }}
y = {{ range = [-1, 1], count = {side} }}
[directions.x]
parameters = ["a.*"]
[directions.y]
parameters = ["b.*"]
"""
CLASS = "closed-form"


def planned(base: Path, side: int, *more: str) -> RunFolder:
    """Plan a sweep of side x side points."""
    base.mkdir(parents=True, exist_ok=True)
    (base / "problem.py").write_text(FACTORY)
    (base / "sweep.toml").write_text(TOML.format(side=side))
    lsweep("plan", base / "sweep.toml", *more)
    return RunFolder(base / "sweep.run")


def write_rows(folder: RunFolder, workers: int) -> None:
    """Leave what ``workers`` leave that took turns: leases, parts, one point in 100 audited."""
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    round_ = rounds.last
    for path in (folder.parts, folder.workers):
        path.mkdir()
    size = round_.unit_points * round_.lease_units
    number = np.arange(rounds.total)
    for index in range(workers):
        name = f"node{index // 8:03d}-{index:04x}"
        mine = number[number // size % workers == index]
        audited = mine[mine % 100 == 50]
        rows = np.zeros(len(mine) + len(audited), row_type(1))
        rows["point"] = np.concatenate([mine, audited])
        rows["kind"][len(mine) :] = Kind.AUDIT
        rows["status"], rows["seconds"], rows["device"] = Status.OK, 1e-3, device_code(CLASS)
        x, y = rounds.offsets[rows["point"].astype(np.int64)].T
        v = (1 + x) ** 2 + 3 * (1 + y) ** 2
        samples = np.array([[0.5], [1.5]])
        for k, value in (
            (W, 0 * samples + 1),
            (WW, 0 * samples + 1),
            (WV, samples * v),
            (WWV, samples * v),
            (WWVV, (samples * v) ** 2),
            (WD, samples * (v - 4)),
            (WWD, samples * (v - 4)),
            (WWDD, (samples * (v - 4)) ** 2),
        ):
            rows["sums"][:, 0, k] = value.sum(axis=0)
        heart = Heartbeat(folder, name, 1e6, lambda: None)
        for lease in range(index, round_.leases(plan.slices), workers):
            unit = round_.lease_range(lease, plan.slices).start
            leases.claim(folder, 0, unit, Lease(name, 0, suspect=lease * size))
        capacity = next((c for c in CAPACITIES if c >= len(rows)), len(rows))
        header = {"worker": name, "device_class": CLASS, "opaque": "", "batch_sizes": "train=2"}
        writer = PartWriter(
            folder.part(name, 0), plan=plan.digest, variables=1, capacity=capacity, header=header
        )
        for start in range(0, len(rows), round_.unit_points):
            writer.append(rows[start : start + round_.unit_points])
        writer.sync()
        writer.close()
        heart.did(len(mine), 1e-3 * len(mine), 0.0)
        heart.end(State.DONE)


# -- processes -------------------------------------------------------------------------------------


# A process inherits the peak of the one that started it: so a small one starts it.
STARTER = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([done.returncode, seconds, peak * 1024 / 1e6]))
"""


def lsweep(*arguments: object) -> tuple[float, float]:
    """Run a command; return its seconds and the most memory it held, in MB."""
    command = [sys.executable, "-m", "lsweep", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", STARTER, *command], stdout=subprocess.PIPE, check=True
    )
    code, seconds, peak = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{command}: exit {code}")
    return seconds, peak


def timed(times: int, *arguments: object) -> tuple[float, float]:
    """Return the median of the seconds and of the memory of some runs of a command."""
    runs = [lsweep(*arguments) for _ in range(times)]
    return statistics.median(s for s, _ in runs), statistics.median(m for _, m in runs)


# -- a worker's own cost ---------------------------------------------------------------------------


class Clock:
    """Adds up the time that calls take, those that they make among each other only once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._stacks = threading.local()

    def wrap(self, where: Any, name: str, label: str) -> None:
        """Time every call of ``where.name`` under a label."""
        function = getattr(where, name)

        def timed_call(*arguments: Any, **options: Any) -> Any:
            stack = self._stacks.__dict__.setdefault("inner", [])
            stack.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                taken = time.perf_counter() - start
                self.seconds[label] += taken - stack.pop()
                self.calls[label] += 1
                if stack:
                    stack[-1] += taken

        setattr(where, name, timed_call)


def work(folder: RunFolder) -> None:
    """Be a worker whose calls are timed; print what they took as JSON."""
    from lsweep.evaluating.evaluate import Evaluator
    from lsweep.outcomes.committed import Committed
    from lsweep.working import worker
    from lsweep.working.ledger import Ledger

    clock, span = Clock(), [0.0, 0.0]
    clock.wrap(Evaluator, "evaluate", "evaluation")
    clock.wrap(leases, "claim", "lease: claim")
    clock.wrap(leases, "unclaimed", "lease: list")
    clock.wrap(leases, "newest", "lease: read")
    clock.wrap(Ledger, "commit", "commit")
    clock.wrap(PartWriter, "__init__", "commit: new part")
    clock.wrap(PartWriter, "sync", "sync")
    for name in ("look", "missing", "first_missing"):
        clock.wrap(Committed, name, "what is missing")
    clock.wrap(Heartbeat, "_write", "heartbeat")
    for i, name in enumerate(("__enter__", "__exit__")):
        function = getattr(Ledger, name)

        def marked(*arguments: Any, function: Callable[..., Any] = function, i: int = i) -> Any:
            before = time.perf_counter()
            answer = function(*arguments)
            span[i] = time.perf_counter() if i else before
            return answer

        setattr(Ledger, name, marked)
    points = worker.work(folder, _role())
    own = {"points": points, "wall": span[1] - span[0]}
    print(json.dumps({**own, "seconds": clock.seconds, "calls": clock.calls}))


def _role() -> Any:
    from lsweep.working.role import Role

    return Role(device="cpu")


# -- the tables ------------------------------------------------------------------------------------


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1000, help="points along each axis")
    parser.add_argument("--parts", type=int, default=256)
    parser.add_argument("--worked", type=int, default=320, help="the same for the real worker")
    parser.add_argument("--times", type=int, default=5, help="runs of each command")
    parser.add_argument("--work", type=Path, metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(RunFolder(options.work))
        return
    machine = f"{processor()}, {os.cpu_count()} cores; {platform.system()} {platform.release()}"
    print(f"{datetime.date.today()}; {machine}; Python {platform.python_version()}, "
          f"numpy {np.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lsweep-scale-") as base:
        commands(Path(base), options.side, options.parts, options.times)
        framework(Path(base) / "worker", options.worked)


def commands(base: Path, side: int, parts: int, times: int) -> None:
    """Time merge, status and prune on a run that is complete."""
    start = time.perf_counter()
    folder = planned(base, side)
    write_rows(folder, parts)
    print(f"\n{side * side} points in {parts} parts, written in "
          f"{time.perf_counter() - start:.1f} s, {size(folder)}")  # fmt: skip
    print(f"{'command':24} {'seconds':>8} {'MB':>6}")

    def row(name: str, found: tuple[float, float]) -> None:
        print(f"{name:24} {found[0]:8.2f} {found[1]:6.0f}", flush=True)

    row("lsweep merge", timed(times, "merge", folder.root))
    surface = Surface.load(folder.surface)
    x, y = surface.x[None, :], surface.y[:, None]
    assert surface.complete
    assert np.allclose(surface["train_loss"], (1 + x) ** 2 + 3 * (1 + y) ** 2, rtol=1e-12)
    row("lsweep status", timed(times, "status", folder.root))
    row("lsweep status --json", timed(times, "status", folder.root, "--json"))
    row("lsweep verify", timed(1, "verify", folder.root))
    look(folder, times)
    row("lsweep prune", timed(1, "prune", folder.root))
    print(f"after it: {size(folder)}")
    row("lsweep merge", timed(times, "merge", folder.root))
    row("lsweep status", timed(times, "status", folder.root))
    assert surface["train_loss"].tobytes() == Surface.load(folder.surface)["train_loss"].tobytes()


def look(folder: RunFolder, times: int) -> None:
    """Time what an idle worker does again and again: look for news, and for what is missing."""
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    committed = Committed.read(folder, plan, rounds)
    for what, call in (
        ("an idle look, no news", committed.look),
        ("what is missing", lambda: committed.first_missing(rounds.last)),
    ):
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        print(f"{what:24} {statistics.median(seconds):8.3f}", flush=True)


def framework(base: Path, side: int) -> None:
    """Time what one worker does beside evaluating."""
    folder = planned(base, side)
    command = [sys.executable, __file__, "--work", str(folder.root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    points, seconds = found["points"], found["seconds"]
    assert points == side * side
    evaluation = seconds.pop("evaluation")
    rest = found["wall"] - evaluation
    print(f"\none worker, {points} points: {found['wall']:.1f} s, of which {evaluation:.1f} s "
          f"evaluation; the framework takes {1e6 * rest / points:.1f} us a point")  # fmt: skip
    print(f"{'':24} {'us/point':>8} {'calls':>8} {'us/call':>8}")
    aside = ("sync", "heartbeat")  # in a thread of its own, while points are evaluated
    for name in sorted(seconds, key=lambda n: (n in aside, n)):
        calls = found["calls"][name]
        where = f"{name} (aside)" if name in aside else name
        print(f"{where:24} {1e6 * seconds[name] / points:8.2f} {calls:8} "
              f"{1e6 * seconds[name] / max(1, calls):8.1f}")  # fmt: skip
    known = sum(s for n, s in seconds.items() if n not in aside)
    print(f"{'the rest: bookkeeping':24} {1e6 * (rest - known) / points:8.2f}")


def size(folder: RunFolder) -> str:
    """Return how many files a run has, and their bytes."""
    files = [p for p in folder.root.rglob("*") if p.is_file()]
    return f"{len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.0f} MB"


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
