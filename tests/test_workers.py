"""Signs of life: who is judged alive, ended or dead, on this host and on another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import (
    Command,
    evaluated,
    hurry,
    planned,
    process,
    start,
    sweep_file,
    wait_for,
    worked,
)

from lsweep.hosts.machine import host_identity, start_time
from lsweep.runs.status import share_done
from lsweep.storage import leases, workers
from lsweep.storage.files import replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import PATIENCE, Observer, State, Verdict, all_workers
from lsweep.working import launch


class Clock:
    """An observer's own clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.workers.mkdir()
    return folder


def tell(folder: RunFolder, **facts: object) -> None:
    """Write a worker's file as the worker would."""
    value = {
        "worker": "w",
        "identity": host_identity(),
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "state": State.WORKING,
        "beat": 1,
        "longest": 0.0,
        **facts,
    }
    replace(folder.worker("w"), sealed(value))


def test_on_this_host_the_process_decides(folder):
    tell(folder)
    assert Observer(folder).verdict("w") is Verdict.ALIVE
    # The same pid, started at another time, is another process.
    tell(folder, start="1")
    assert Observer(folder).verdict("w") is Verdict.DIED
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tell(folder, pid=child.pid, start=start_time(child.pid))
    assert Observer(folder).verdict("w") is Verdict.ALIVE
    child.kill()
    # Dead although nobody has waited for it yet: a zombie works on nothing.
    wait_for(lambda: start_time(child.pid) is None)
    assert Observer(folder).verdict("w") is Verdict.DIED
    child.communicate()


@pytest.mark.parametrize("state", [State.DONE, State.STOPPED, State.SICK, State.FAILED])
def test_who_ended_in_order_did_not_die(folder, state):
    tell(folder, state=state, start="1")
    assert Observer(folder).verdict("w") is Verdict.ENDED


def test_elsewhere_only_a_heartbeat_that_stands_still_for_long_is_death(folder):
    clock = Clock()
    observer = Observer(folder, clock)
    tell(folder, identity="another host", pid=1, start="1")  # a pid of that host means nothing here
    assert observer.verdict("w") is Verdict.ALIVE
    clock.now = PATIENCE - 1
    assert observer.verdict("w") is Verdict.ALIVE
    tell(folder, identity="another host", beat=2)  # seen late: patience begins anew
    assert observer.verdict("w") is Verdict.ALIVE
    clock.now = 2 * PATIENCE - 2
    assert observer.verdict("w") is Verdict.ALIVE
    clock.now = 2 * PATIENCE
    assert observer.verdict("w") is Verdict.DIED


def test_a_worker_with_long_units_is_given_five_of_them(folder):
    clock = Clock()
    observer = Observer(folder, clock)
    tell(folder, identity="another host", longest=100.0)
    assert observer.verdict("w") is Verdict.ALIVE
    clock.now = 499
    assert observer.verdict("w") is Verdict.ALIVE
    clock.now = 501
    assert observer.verdict("w") is Verdict.DIED


def test_who_left_no_file_or_a_damaged_one_holds_nothing(folder):
    assert Observer(folder).verdict("nobody") is Verdict.DIED
    folder.worker("w").write_text("{")
    assert Observer(folder).verdict("w") is Verdict.DIED


def test_workers_end_when_their_launcher_is_killed(tmp_path):
    toml = sweep_file(tmp_path, x=41, y=21, pause=0.5, all_at=2)
    folder = RunFolder(tmp_path / "a.run")
    words = ("run", toml, "--run", folder.root, "--workers", 2, "--no-picture")
    launcher = process(*words, "--unit-points", 1)
    wait_for(lambda: len(folder.all_parts()) == 2)  # both have done some
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    wait_for(lambda: {w["state"] for w in all_workers(folder)} == {State.STOPPED})
    wait_for(lambda: all(start_time(w["pid"]) is None for w in all_workers(folder)))


def test_of_a_crowd_who_finds_nothing_left_goes_home(tmp_path):
    # One lease for all: whoever is second has nothing to do, and only some stand by for deaths.
    folder = planned(sweep_file(tmp_path, x=9, pause=1000.0), unit_points=9)
    first = process("work", folder.root, "--index", 0, "--of", 200)
    wait_for(lambda: list(folder.leases.rglob("*.g0")))
    second = process("work", folder.root, "--index", 1, "--of", 200)
    _, err = second.communicate()
    assert (second.returncode, err, share_done(folder)[0]) == (0, "", 0)
    hurry(folder)
    first.communicate()
    assert (first.returncode, share_done(folder)[0]) == (0, 9)


def test_cheap_units_share_leases_and_whoever_cuts_them_otherwise_is_not_waited_for(tmp_path):
    folder = planned(sweep_file(tmp_path, x=33, y=8, pause=0.1), unit_points=1)
    pids = [start(folder, index=0, of=3)]
    wait_for(lambda: share_done(folder)[0] > 20)
    assert 3 * len(list(folder.leases.rglob("*.g0"))) <= 20 + share_done(folder)[0]
    # Twice the agreement is lost and made anew, while who knows the old ones is at work.
    for index, units in ((1, 4), (2, 7)):
        replace(folder.lease_size(0), sealed({"units": units}))
        pids.append(start(folder, index=index, of=3))
        wait_for(lambda index=index: len(folder.all_workers()) > index)
    hurry(folder)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert set(evaluated(folder)) == {(p, 0) for p in range(33 * 8)}
    folder.lease_size(0).write_text("{")
    assert leases.agreed(folder, 0, 2) is None


def test_what_a_hanging_worker_holds_others_do_and_count_no_death(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 1.0)
    folder = planned(sweep_file(tmp_path, x=9, pause=1000.0), unit_points=1)
    pid = start(folder, index=0, of=2)
    try:
        wait_for(lambda: share_done(folder)[0] and len(list(folder.leases.rglob("*.g0"))) == 2)
        os.kill(pid, signal.SIGSTOP)
        hurry(folder)
        assert isinstance(worked(folder, index=1, of=2), int)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert set(evaluated(folder)) == {(p, 0) for p in range(9)}
    taken = [p for p in folder.all_leases() if p.suffix == ".g1"]
    assert {leases.newest(folder, 0, int(p.stem)).deaths for p in taken} == {0}


def test_who_beats_but_is_too_long_at_one_unit_hangs_unless_it_is_the_first(folder):
    observer = Observer(folder)
    for longest, unit, hangs in ((1.0, 99.0, False), (1.0, 300.0, True), (100.0, 300.0, False),
                                 (0.0, 300.0, False), (1.0, None, False)):  # fmt: skip
        since = unit and 1000.0 - unit
        tell(folder, identity="another host", longest=longest, unit=since, now=1000.0)
        assert observer.hangs("w") is hangs


@pytest.mark.full
def test_a_launcher_ends_a_worker_that_hangs_once_nothing_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 1.0)
    monkeypatch.setattr(launch, "MARGIN", 1.0)
    folder = planned(sweep_file(tmp_path, x=9, pause=1000.0), unit_points=1)
    launcher = Command("run", folder.root, "--workers", 2, "--no-picture")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")

    def begun() -> list[int]:
        """Those that are Python already: a launcher stands still until then."""
        found = [int(p) for p in children.read_text().split()]
        return [p for p in found if b"work" in Path(f"/proc/{p}/cmdline").read_bytes().split(b"\0")]

    hung = wait_for(begun)[0]
    os.kill(hung, signal.SIGSTOP)
    hurry(folder)
    done = launcher.wait()
    assert (done.code, "hangs and is ended: nothing is missing" in done.err) == (0, True), done
    assert start_time(hung) is None
