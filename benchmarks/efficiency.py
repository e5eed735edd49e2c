"""How busy workers are kept: points of uneven cost, one worker three times slower, two nodes.

``python benchmarks/efficiency.py`` lets eight workers sweep points that sleep: log-normal costs
(sigma 0.5) and a block of points six times dearer, so that eight of them run on two cores as on
eight GPUs. Efficiency is the busy seconds of all workers over their seconds, from the first sign of
life, which comes after loading, to the last. Prints the table of efficiency.md.

Launchers: mpiexec on this host, and two emulated nodes, each with network, host name, processes and
/dev/shm of its own (needs root), whose workers share nothing but the run folder.
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
from collections.abc import Callable
from pathlib import Path

from lsweep.hosts.machine import cpu_model
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.status import share_done
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import all_workers

WORKERS = 8
FACTORY = '''\
import os, time
import numpy as np
import torch
from torch import nn
import lsweep

SLOW = 3.0 if os.environ.get("PMI_RANK", os.environ.get("LSWEEP_WORKER")) == os.environ.get(
    "LSWEEP_SLOW") else 1.0


def sleepy(mean=0.05):
    """A bowl whose points sleep for a time that follows from where they are."""
    net = nn.Module()
    net.a, net.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.a.weight), nn.init.ones_(net.b.weight)

    def forward(model, batch):
        a, b = float(model.a.weight) - 1, float(model.b.weight) - 1
        chance = np.random.default_rng([int((a + 2) * 1e6), int((b + 2) * 1e6)])
        dear = 6.0 if 0.2 < a < 0.5 and 0.2 < b < 0.5 else 1.0
        if a or b:
            time.sleep(SLOW * dear * mean * float(np.exp(0.5 * chance.standard_normal() - 0.125)))
        return {"loss": batch[0] * (model.a.weight**2 + 3 * model.b.weight**2).flatten()}

    forward.metrics = ("loss",)
    return lsweep.Problem(net, {"train": (torch.tensor([0.5, 1.5]),)}, forward=forward)
'''
TOML = """\
[problem]
factory = "problem.py:sleepy"
[grid.x]
range = [-1, 1]
count = {count}
[grid.y]
range = [-1, 1]
count = {count}
[directions.x]
parameters = ["a.*"]
[directions.y]
parameters = ["b.*"]
"""


def planned(base: Path, count: int) -> RunFolder:
    """Plan a sweep of count x count sleeping points."""
    base.mkdir()
    (base / "problem.py").write_text(FACTORY)
    (base / "sweep.toml").write_text(TOML.format(count=count))
    folder = RunFolder(base / "sweep.run")
    subprocess.run(
        [sys.executable, "-m", "lsweep", "plan", base / "sweep.toml"], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return folder


def by_mpiexec(folder: RunFolder, slow: str) -> None:
    """Start the workers as ranks of one mpiexec."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if mpiexec is None:
        sys.exit("no mpiexec here: pip install 'lsweep[mpi]'")
    subprocess.run(
        [mpiexec, "-n", str(WORKERS), sys.executable, "-m", "lsweep", "run", folder.root,
         "--on", "mpi", "--no-picture"],
        env={**os.environ, "LSWEEP_SLOW": slow}, check=True, capture_output=True,
    )  # fmt: skip


def on_two_nodes(folder: RunFolder, slow: str) -> None:
    """Start half of the workers on each of two emulated nodes."""
    nodes = []
    for node in range(2):
        half = range(node * WORKERS // 2, (node + 1) * WORKERS // 2)
        script = [f"hostname node{node}", "mount -t tmpfs tmpfs /dev/shm"]
        script += [
            f"LSWEEP_WORKER={i} {sys.executable} -m lsweep work {folder.root} --index {i} "
            f"--of {WORKERS} --local {i - half[0]} --beat 1 &"
            for i in half
        ]
        shell = ["sh", "-c", "\n".join([*script, "wait"])]
        nodes.append(
            subprocess.Popen(
                ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork",
                 "--mount-proc", *shell],
                env={**os.environ, "LSWEEP_SLOW": slow},
            )
        )  # fmt: skip
    codes = [node.wait() for node in nodes]
    if any(codes):
        sys.exit("two nodes cannot be emulated here: root is needed, and unshare")


def figures(folder: RunFolder) -> tuple[float, float, float]:
    """Return efficiency, the slowest-to-first-idle gap in seconds, and the makespan."""
    workers = all_workers(folder)
    done, total = share_done(folder)
    assert done == total and len(workers) == WORKERS, (done, total, len(workers))
    plan = Plan.read(folder)
    assert Rounds.read(folder, plan).total == total
    busy = sum(w["busy"] for w in workers)
    there = sum(w["now"] - w["since"] for w in workers)
    makespan = max(w["now"] for w in workers) - min(w["since"] for w in workers)
    begun = [w["since"] for w in workers]
    return busy / there, max(begun) - min(begun), makespan


def main() -> None:
    """Run all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=51, help="points a side (default: 51)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    launchers: dict[str, Callable[[RunFolder, str], None]] = {"mpiexec -n 8": by_mpiexec}
    if os.geteuid() == 0:
        launchers["two nodes, 4 workers each"] = on_two_nodes
    print(f"{datetime.date.today()}; {cpu_model()}, {os.cpu_count()} cores; Linux "
          f"{platform.release()}; {options.count} x {options.count} points")  # fmt: skip
    print(f"{'launcher':28}{'workers':22}{'efficiency':>11}{'(all runs)':>20}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as place:
        for launcher, start in launchers.items():
            for kind, slow in (("equal", "none"), ("one 3 times slower", "7")):
                found = []
                for i in range(options.repeats):
                    folder = planned(Path(place, f"{launcher[:3]}{slow}{i}"), options.count)
                    start(folder, slow)
                    found.append(figures(folder))
                shares = [f[0] for f in found]
                each = " ".join(f"{s:.3f}" for s in shares)
                print(f"{launcher:28}{kind:22}{statistics.median(shares):>11.3f}{each:>20}"
                      f"{statistics.median(f[2] for f in found):>9.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
