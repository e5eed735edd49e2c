"""Told to end: which signal drops the unit in flight, which lets it finish, and the time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cases import (
    PATIENCE,
    Command,
    evaluated,
    finished,
    hurry,
    merged,
    planned,
    started,
    sweep_file,
    wait_for,
    worked,
)

from lsweep.hosts.requeue import another_turn
from lsweep.hosts.stopping import MARGIN, Stop, Stopped
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import State, all_workers

COUNT = 201  # points: more than are done in the longest wait for a busy machine
UNIT = 4  # of them, of 0.25 s each


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return planned(sweep_file(tmp_path, x=COUNT, pause=0.25), unit_points=UNIT)


def worker(folder: RunFolder) -> Command:
    """Start ``lsweep work`` and wait for its first unit."""
    running = Command("work", folder.root, "--beat", "0.1")
    wait_for(lambda: [w for w in all_workers(folder) if w["points"]])
    return running


def process(folder: RunFolder, **environment: str) -> subprocess.Popen[str]:
    """Start ``lsweep work`` as a user does."""
    words = [sys.executable, "-m", "lsweep", "work", str(folder.root), "--beat", "0.1"]
    return started(words, env={**os.environ, **environment})


def ended(running: Command, folder: RunFolder) -> tuple[int, str, dict[str, object]]:
    done = running.wait()
    (facts,) = all_workers(folder)
    return done.code, done.err, facts


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_ends_a_worker_with_whole_units_and_the_rest_is_done_later(folder, name):
    running = worker(folder)
    os.kill(running.pid, getattr(signal, name))
    code, err, facts = ended(running, folder)
    assert (code, facts["state"], facts["message"]) == (130, State.STOPPED, name)
    assert err == f"lsweep: stopped by {name}; all that was committed is kept\n"
    done = evaluated(folder)
    assert len(done) == facts["points"] and len(done) % UNIT == 0 and 0 < len(done) < COUNT
    hurry(folder)
    assert worked(folder) == COUNT - len(done)
    assert len(evaluated(folder)) == COUNT


def test_usr_lets_the_unit_finish_and_term_drops_it(tmp_path):
    # One unit of all points: what is committed after the signal tells which it was.
    names = ("SIGUSR1", "SIGTERM")
    folders = [planned(sweep_file(tmp_path / n, x=12, pause=1000.0), unit_points=12) for n in names]
    both = [process(f) for f in folders]
    for name, folder, running in zip(names, folders, both, strict=True):
        wait_for(lambda folder=folder: list(folder.leases.rglob("*.g0")))
        running.send_signal(getattr(signal, name))
    hurry(folders[0])
    for points, folder, running in zip((12, 0), folders, both, strict=True):
        running.communicate(timeout=PATIENCE)
        (facts,) = all_workers(folder)
        # All units done: there was nothing to be stopped from.
        assert (running.returncode, facts["points"]) == ((0 if points else 130), points)


def test_no_unit_begins_that_would_run_into_the_time_limit(tmp_path):
    # A unit takes ten seconds: the first may begin, and the second however soon the first did.
    folder = planned(sweep_file(tmp_path, x=COUNT, low="0.1", pause=2.5), unit_points=UNIT)
    end = time.time() + MARGIN + 25
    running = process(folder, SLURM_JOB_ID="1", SLURM_JOB_END_TIME=str(int(end)))
    _, err = running.communicate(timeout=PATIENCE)
    assert time.time() < end
    (facts,) = all_workers(folder)
    assert (running.returncode, facts["state"], facts["message"]) == (
        130,
        State.STOPPED,
        "the time limit",
    )
    # No Slurm answers for this job: said, and nothing else happens.
    assert err.startswith("lsweep: job 1: the time limit; not requeued: ")
    assert len(evaluated(folder)) == facts["points"] == UNIT


def test_a_second_term_does_not_disturb_the_end(folder):
    running = worker(folder)
    for _ in range(50):  # it is not reaped: there is always something to send to
        os.kill(running.pid, signal.SIGTERM)
        time.sleep(0.002)
    _, err, facts = ended(running, folder)
    assert facts["state"] == State.STOPPED and "Traceback" not in err
    assert len(evaluated(folder)) == facts["points"]


def test_the_values_are_those_of_an_undisturbed_run(tmp_path, folder):
    running = worker(folder)
    os.kill(running.pid, signal.SIGTERM)
    ended(running, folder)
    hurry(folder)
    worked(folder)
    calm = merged(finished(sweep_file(tmp_path / "calm", x=COUNT), unit_points=UNIT))[0]
    there = merged(folder)[0]
    assert there["train_loss"].tobytes() == calm["train_loss"].tobytes()


def test_outside_the_main_thread_signals_are_pythons_own():
    import threading

    found: list[bool] = []

    def run() -> None:
        with Stop() as stop:
            stop.check()
            found.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


def test_what_is_asked_of_stop():
    with pytest.raises(Stopped, match="the time limit"):
        Stop(end=time.time() + MARGIN + 5).check(unit=20.0)
    with pytest.raises(Stopped, match="the launcher is gone"):
        Stop(parent=1 if os.getppid() != 1 else 2).check()


def test_who_asks_for_another_turn():
    inside = {"SLURM_JOB_ID": "1"}
    assert another_turn("SIGINT", 9, inside) is None  # a person's Ctrl-C
    assert "no unit was finished in this turn: not requeued" in str(
        another_turn("the time limit", 0, inside)
    )
    tired = {**inside, "SLURM_RESTART_COUNT": "10"}
    assert "after 10 turns: not requeued again" in str(another_turn("SIGUSR2", 9, tired))
