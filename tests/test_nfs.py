"""On a shared file system with NFS's weaknesses no value is wrong and no row is lost.

Each mount of `weak_filesystem` is a node; its workers live in a pid namespace of their own, so
that they are on another host for everybody else. What a node sees late may cost work twice.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cases import (
    Done,
    command,
    committed,
    differences,
    each_in_child,
    evaluated,
    finished,
    fork,
    in_child,
    merged,
    planned,
    sweep_file,
    truth,
    wait_for,
)
from weak_filesystem import forget, mounted, tell

from lsweep import leases, worker, workers
from lsweep.folder import RunFolder
from lsweep.leases import Lease
from lsweep.surface import Surface
from lsweep.verify import verify
from lsweep.worker import Role, work
from lsweep.workers import Heartbeat, Observer, State, Verdict, all_workers

NODES = 3
SHAPE = {"x": 13, "y": 9}
POINTS = [(p, 0) for p in range(13 * 9)]
UNLUCKY = {"lost": 0.1, "stale": 0.05}


class Nodes:
    """Three clients of one folder."""

    def __init__(self, base: Path, stack: ExitStack, **settings: Any) -> None:
        self.server = base / "server"
        mounts = [base / f"node{i}" for i in range(NODES)]
        self.mounts = [
            stack.enter_context(mounted(self.server, m, **{"seconds": 1.0, "seed": i, **settings}))
            for i, m in enumerate(mounts)
        ]

    def run(self, node: int) -> RunFolder:
        """The run as a node sees it."""
        return RunFolder(self.mounts[node] / "sweep.run")

    @property
    def truth(self) -> RunFolder:
        """The run as the server has it."""
        return RunFolder(self.server / "sweep.run")

    def tell(self, **settings: Any) -> None:
        for mount in self.mounts:
            tell(mount, **settings)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with ExitStack() as stack:
        yield Nodes(tmp_path, stack)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    return merged(finished(sweep_file(tmp_path_factory.mktemp("undisturbed"), **SHAPE)))[0]


def start(folder: RunFolder, index: int, *more: str) -> subprocess.Popen[str]:
    """Start a worker on a host of its own."""
    return subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m",
         "lsweep", "work", str(folder.root), "--index", str(index), "--of", str(NODES),
         "--device", "cpu", "--beat", "1", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return Done(process.returncode, out, err)


def patient_work(folder: RunFolder, index: int = 0) -> int:
    """Be a worker for whom a minute of waiting is a second."""
    worker.Observer = lambda f: Observer(f, lambda: 60 * time.monotonic())
    return work(folder, Role(index, NODES, device="cpu", beat=1.0))


def assert_whole(nodes: Nodes, undisturbed: Surface, again: int = 0) -> None:
    """Every point is committed, at most ``again`` of them twice, and every value is right."""
    count = Counter(evaluated(nodes.truth))
    assert sorted(count) == POINTS
    twice = sum(n - 1 for n in count.values())
    assert twice <= again, twice
    surface, report = merged(nodes.truth)
    assert (report.clean, report.conflicts, report.damaged) == (True, 0, {})
    assert differences(surface, undisturbed) == []
    assert abs(surface["train_loss"] - truth(surface)).max() < 1e-6
    assert verify(nodes.truth).problems == []


def planned_on(nodes: Nodes, node: int = 0, **options: Any) -> RunFolder:
    toml = sweep_file(nodes.mounts[node], **{**SHAPE, "pause": 0.02, **options})
    return planned(toml, run=nodes.mounts[node] / "sweep.run")


# -- whole sweeps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("claims", ["lease", "static"])
@pytest.mark.parametrize("faults", [{}, UNLUCKY], ids=["late", "unlucky"])
def test_three_nodes_finish_a_sweep(nodes, undisturbed, claims, faults):
    planned_on(nodes)
    nodes.tell(**faults)
    said = [ended(p) for p in [start(nodes.run(i), i, "--claims", claims) for i in range(NODES)]]
    assert [(d.code, d.err) for d in said] == [(0, "")] * NODES
    assert {w["state"] for w in all_workers(nodes.truth)} == {State.DONE}
    assert_whole(nodes, undisturbed, again=len(POINTS) if claims == "lease" else 0)
