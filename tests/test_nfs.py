"""On a shared file system with NFS's weaknesses no value is wrong and no row is lost.

Each mount of `weak_filesystem` is a node; its workers live in a pid namespace of their own, so
that they are on another host for everybody else. What a node sees late may cost work twice.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cases import (
    PATIENCE,
    Command,
    Done,
    command,
    differences,
    evaluated,
    finished,
    fork,
    hurry,
    in_child,
    merged,
    planned,
    started,
    sweep_file,
    truth,
    wait_for,
)
from weak_filesystem import forget, mounted, tell

from lsweep.runs.verify import verify
from lsweep.storage import leases, workers
from lsweep.storage.files import link_once, write_scratch
from lsweep.storage.folder import RunFolder
from lsweep.storage.leases import Lease
from lsweep.storage.workers import Heartbeat, Observer, State, Verdict, all_workers
from lsweep.surfaces.surface import Surface
from lsweep.working import shift
from lsweep.working.worker import Role, work

NODES = 3
SHAPE = {"x": 13, "y": 9}
POINTS = [(p, 0) for p in range(13 * 9)]
UNLUCKY = {"lost": 0.1, "stale": 0.02}


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


# A worker whose last words the disk refused is waited for, and only then taken for dead.
IMPATIENT = """
import sys
from lsweep.commands import cli
from lsweep.storage import workers
workers.PATIENCE = 20.0
sys.exit(cli.main())
"""


def start(
    folder: RunFolder, index: int, *more: str, program: tuple[str, ...] = ("-m", "lsweep")
) -> subprocess.Popen[str]:
    """Start a worker on a host of its own."""
    return started(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, *program,
         "work", str(folder.root), "--index", str(index), "--of", str(NODES),
         "--device", "cpu", "--beat", "1", *more],
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    return Done(process.returncode, out, err)


def patient_work(folder: RunFolder, index: int = 0) -> int:
    """Be a worker for whom a minute of waiting is a second."""
    shift.Observer = lambda f: Observer(f, lambda: 60 * time.monotonic())
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


@pytest.mark.parametrize("claims", ["lease", pytest.param("static", marks=pytest.mark.full)])
@pytest.mark.parametrize("faults", [{}, UNLUCKY], ids=["late", "unlucky"])
def test_three_nodes_finish_a_sweep(nodes, undisturbed, claims, faults):
    planned_on(nodes)
    nodes.tell(**faults)
    said = [ended(p) for p in [start(nodes.run(i), i, "--claims", claims) for i in range(NODES)]]
    assert [(d.code, d.err) for d in said] == [(0, "")] * NODES, said
    assert {w["state"] for w in all_workers(nodes.truth)} == {State.DONE}
    assert_whole(nodes, undisturbed, again=len(POINTS) if claims == "lease" else 0)


@pytest.mark.timeout(900)
def test_a_sick_disk_costs_workers_but_no_rows(nodes, undisturbed):
    planned_on(nodes)
    nodes.tell(disk=0.02, **UNLUCKY)

    def impatient(index: int) -> subprocess.Popen[str]:
        return start(nodes.run(index), index, program=("-c", IMPATIENT))

    for _ in range(4):
        for done in [ended(p) for p in [impatient(i) for i in range(NODES)]]:
            assert done.code == 0 or done.err.startswith("lsweep: cannot"), done.err
        if len(set(evaluated(nodes.truth))) == len(POINTS):
            break
    nodes.tell(disk=0.0)
    assert ended(impatient(0)).code == 0
    assert_whole(nodes, undisturbed, again=len(POINTS))


@pytest.mark.parametrize("claims", ["lease", pytest.param("static", marks=pytest.mark.full)])
def test_killed_workers_are_replaced_from_another_node(nodes, undisturbed, claims):
    planned_on(nodes, pause=0.5)
    nodes.tell(**UNLUCKY)
    running = [start(nodes.run(i), i, "--claims", claims) for i in range(NODES)]
    wait_for(lambda: len(evaluated(nodes.truth)) > 20)
    for p in running:
        p.send_signal(signal.SIGKILL)
        p.communicate()
    before = evaluated(nodes.truth)
    assert len(before) < len(POINTS)
    assert {w["state"] for w in all_workers(nodes.truth)} == {State.WORKING}
    hurry(nodes.truth)
    if claims == "static":
        # Each shard is another's now, and no node remembers better than a second ago.
        again = [start(nodes.run((i + 1) % NODES), i, "--claims", claims) for i in range(NODES)]
        assert [(d.code, d.err) for d in map(ended, again)] == [(0, "")] * NODES
    else:
        assert isinstance(in_child(patient_work, nodes.run(1)), int)
    assert set(before) <= set(evaluated(nodes.truth))
    assert_whole(nodes, undisturbed, again=len(POINTS))


@pytest.mark.full
def test_one_is_killed_and_the_others_do_the_rest(nodes, undisturbed):
    planned_on(nodes, pause=1.0)
    victim = start(nodes.run(0), 0)
    wait_for(lambda: evaluated(nodes.truth))
    name = all_workers(nodes.truth)[0]["worker"]
    pids = [fork_patient(nodes.run(i), i) for i in (1, 2)]
    wait_for(lambda: len(all_workers(nodes.truth)) == NODES)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    hurry(nodes.truth)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert_whole(nodes, undisturbed, again=len(POINTS))
    # It is dead for all; that it had one lease in its hands is written in the next generation.
    taken = list(nodes.truth.leases.rglob("*.g1"))
    assert taken
    assert Observer(nodes.truth).verdict(name) is Verdict.ALIVE  # a new observer knows nothing yet


def fork_patient(folder: RunFolder, index: int) -> int:
    pid = fork()
    if pid == 0:
        code = 1
        try:
            patient_work(folder, index)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pid


# -- looking ---------------------------------------------------------------------------------------


def test_a_merge_that_sees_late_tells_what_it_misses(nodes, undisturbed):
    """A node that looked before the sweep remembers: no parts, or parts without rows."""
    planned_on(nodes)
    nodes.tell(seconds=3600.0, open_folder_asks=False)
    late = nodes.run(2)
    assert command("status", late.root).code == 0
    done = command("merge", late.root)
    assert done.code == 3 and f"{len(POINTS)} of {len(POINTS)} points are missing" in done.err
    assert ended(start(nodes.run(0), 0)).code == 0
    done = command("merge", late.root)
    assert done.code == 3 and "points are missing" in done.err
    assert not nodes.truth.surface.exists()
    surface, report = merged(late)
    assert report.missing == len(POINTS) and (surface.status == 0).all()
    forget(nodes.mounts[2])
    assert command("merge", late.root).code == 0
    assert differences(Surface.load(nodes.truth.surface), undisturbed) == []


def test_a_merge_during_the_sweep_never_shows_a_wrong_value(nodes, undisturbed):
    planned_on(nodes, pause=0.5)
    nodes.tell(**UNLUCKY)
    running = [start(nodes.run(i), i) for i in range(2)]
    seen = []
    while any(p.poll() is None for p in running):
        surface, report = merged(nodes.run(2))
        there = surface.status == 1
        assert report.missing == (~there).sum() and not report.conflicts
        wanted = undisturbed["train_loss"][there]
        assert surface["train_loss"][there].tobytes() == wanted.tobytes()
        seen.append(int(there.sum()))
        if seen[-1]:
            hurry(nodes.truth)
        done = command("status", nodes.run(2).root)
        assert done.code == 0 and not done.err, done.err
    assert [(d.code, d.err) for d in map(ended, running)] == [(0, "")] * 2
    assert seen[0] < len(POINTS)
    forget(nodes.mounts[2])
    assert command("merge", nodes.run(2).root).code == 0
    assert_whole(nodes, undisturbed, again=len(POINTS))


@pytest.mark.full
def test_another_node_goes_on_where_the_first_ended(nodes, undisturbed):
    planned_on(nodes, pause=0.05)
    other = nodes.run(1)
    assert command("status", other.root).code == 0  # it remembers an empty run
    first = start(nodes.run(0), 0)
    wait_for(lambda: len(evaluated(nodes.truth)) > 20)
    first.terminate()
    first.communicate()
    assert ended(start(other, 1)).code == 0
    assert_whole(nodes, undisturbed, again=len(POINTS))
    assert worked_nothing(nodes.run(2))


def worked_nothing(folder: RunFolder) -> bool:
    return in_child(patient_work, folder) == 0


# -- one by one ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lost": 0.3, "stale": 0.02}, {"links": "none"}])
def test_a_lease_has_one_winner_whatever_replies_are_lost(nodes, tmp_path, settings):
    count = 60
    nodes.tell(**settings)
    begin = time.monotonic() + 1.0

    def claim(i: int) -> list[int]:
        folder = nodes.run(i)
        time.sleep(max(0.0, begin - time.monotonic()))
        return [n for n in range(count) if leases.claim(folder, 0, n, Lease(f"w{i}", 0))]

    with ThreadPoolExecutor(NODES) as pool:
        won = list(pool.map(claim, range(NODES)))
    assert Counter(n for mine in won for n in mine) == dict.fromkeys(range(count), 1)
    for i, mine in enumerate(won):
        assert {leases.newest(nodes.truth, 0, n).worker for n in mine} <= {f"w{i}"}
    for mount in nodes.mounts:
        forget(mount)
    nodes.tell(lost=0.0, stale=0.0)
    for i in range(NODES):
        assert leases.unclaimed(nodes.run(i), 0, range(count + 1)) == {count}


def test_a_link_whose_reply_was_lost_is_known_by_asking_the_server(nodes):
    """What the node remembers of the file says that it has one name still."""
    path = nodes.mounts[0] / "file"
    nodes.tell(seconds=3600.0)
    temporary = write_scratch(path, b"mine")
    assert temporary.stat().st_nlink == 1
    nodes.tell(lost=1.0)
    link_once_seen = link_once(temporary, path)
    assert temporary.stat().st_nlink == 2 and link_once_seen
    nodes.tell(lost=0.0)
    assert (nodes.server / "file").read_bytes() == b"mine"


def test_a_heartbeat_that_is_replaced_all_the_time_is_never_death(nodes):
    mine, theirs = nodes.run(0), nodes.run(1)
    mine.workers.mkdir(parents=True)
    nodes.tell(lost=0.1, stale=0.05)
    heart = Heartbeat(mine, "w", 0.02, lambda: None)
    heart.tell(identity="another host")
    beats = set()
    observer = Observer(theirs)
    wait_for(lambda: "another host" in {w["identity"] for w in all_workers(theirs)})
    for _ in range(200):
        assert observer.verdict("w") is Verdict.ALIVE
        beats |= {w["beat"] for w in all_workers(theirs)}
    wait_for(lambda: {w["beat"] for w in all_workers(theirs)} - beats)
    heart.end(State.DONE)
    wait_for(lambda: observer.verdict("w") is Verdict.ENDED)


def test_a_disk_that_cannot_be_read_says_nothing_about_a_worker(nodes, monkeypatch):
    mine, theirs = nodes.run(0), nodes.run(1)
    mine.workers.mkdir(parents=True)
    heart = Heartbeat(mine, "w", 10.0, lambda: None)
    heart.end(State.DONE)
    now = [0.0]
    observer = Observer(theirs, lambda: now[0])
    assert observer.verdict("w") is Verdict.ENDED
    assert observer.verdict("nobody") is Verdict.DIED

    def fails(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    assert observer.verdict("w") is Verdict.ALIVE
    now[0] = workers.PATIENCE + 1
    assert observer.verdict("w") is Verdict.DIED


def test_nodes_that_plan_at_once_have_one_plan(nodes, tmp_path):
    toml = sweep_file(tmp_path, **SHAPE)
    nodes.tell(**UNLUCKY)
    commands = [Command("plan", toml, "--run", nodes.run(i).root) for i in range(NODES)]
    for done in [c.wait() for c in commands]:
        assert done.code == 0, done.err
    assert len(list(nodes.truth.rounds.glob("*.json"))) == 1
    assert verify(nodes.truth).problems == []
