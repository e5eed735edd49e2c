"""Workers killed at random lose nothing: every value is the undisturbed run's, bit for bit.

The storm forks its workers from this process, which spares each the import of torch, so that a
worker can be killed every few tens of milliseconds. The launcher is killed at for real.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import (
    PATIENCE,
    Command,
    Done,
    command,
    committed,
    differences,
    evaluated,
    finished,
    fork,
    hurry,
    merged,
    planned,
    process,
    sweep_file,
    truth,
    wait_for,
    worked,
)

from lsweep.plans.plan import Plan
from lsweep.preparing.restoring import load_problem
from lsweep.runs.status import share_done
from lsweep.runs.verify import verify
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface
from lsweep.working.role import Role
from lsweep.working.worker import work

WORKERS = 6
KILLS = 200


class Storm:
    """Workers of one run, one of which is killed and replaced again and again."""

    def __init__(self, folder: RunFolder, rng: random.Random) -> None:
        self.folder, self.kills, self._rng = folder, 0, rng
        self._problem = load_problem(folder, Plan.read(folder))[0]  # once, for all its children
        self._errors = folder.root / "errors.log"
        self._dying: set[int] = set()
        self._alive = {self._start(i): i for i in range(WORKERS)}

    def _start(self, index: int) -> int:
        pid = fork()
        if pid == 0:
            try:
                task = Role(index=index, of=WORKERS, device="cpu", beat=1.0)
                work(self.folder, task, self._problem)
            except BaseException:
                self._errors.write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        return pid

    def _reap(self, options: int) -> None:
        """See which workers ended: killed, or with nothing left to do."""
        for pid in [*self._alive, *self._dying]:
            found, status = os.waitpid(pid, options)
            if found:
                code = os.waitstatus_to_exitcode(status)
                self.kills += code == -signal.SIGKILL
                assert code in (0, -signal.SIGKILL), self._errors.read_text()
                self._alive.pop(pid, None)
                self._dying.discard(pid)

    def rage(self, kills: int) -> None:
        """Kill until the run is complete, or has seen so many kills; then let it end."""
        while self._alive and self.kills + len(self._dying) < kills:
            time.sleep(self._rng.uniform(0.01, 0.1))
            self._reap(os.WNOHANG)
            if self._alive:
                victim = self._rng.choice(sorted(self._alive))
                os.kill(victim, signal.SIGKILL)
                index = self._alive.pop(victim)
                self._dying.add(victim)
                self._alive[self._start(index)] = index
        self._reap(0)


@pytest.mark.timeout(240)
def test_two_hundred_kills_change_no_bit(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, x=65, y=49, pause=0.004)
    rng = random.Random(17)
    calm = planned(toml, run=tmp_path / "calm.run", unit_points=4)
    Storm(calm, rng).rage(0)
    reference, report = merged(calm)
    assert report.lines() == []
    assert np.allclose(reference["train_loss"], truth(reference), rtol=1e-6)

    kills = duplicates = 0
    for n in range(20):  # a machine that is fast needs more than one run for so many kills
        folder = planned(toml, run=tmp_path / f"stormy-{n}.run", unit_points=4)
        storm = Storm(folder, rng)
        storm.rage(KILLS - kills)
        kills += storm.kills
        surface, report = merged(folder)
        assert differences(surface, reference) == []
        assert report.lines() == []
        found = verify(folder)
        assert (found.problems, found.notes) == ([], [])
        duplicates += len(evaluated(folder)) - reference.status.size
        if kills >= KILLS:
            break
    assert kills >= KILLS
    # Rows are committed once: who takes a unit over computes only what is missing.
    assert duplicates <= kills / 10


def test_what_killed_workers_leave_behind_disturbs_nobody(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, x=9)
    folder = planned(toml, unit_points=1)
    junk = b"\x89HDF\r\n\x1a\n" + bytes(100)
    folder.parts.mkdir()
    folder.workers.mkdir()
    folder.devices.mkdir()
    for path in (
        folder.part("w", 0),
        folder.worker("w"),
        folder.device("d"),
        folder.round(1),
        folder.lease(0, 0, 0),
        folder.plan,
        folder.surface,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.0123456789ab").write_bytes(junk)
    assert worked(folder) == 9
    surface, report = merged(folder)
    assert (report.clean, report.damaged, len(committed(folder).parts)) == (True, {}, 1)
    assert np.allclose(surface["train_loss"], truth(surface), rtol=1e-6)
    assert command("verify", folder.root).code == 0
    assert command("status", folder.root).out.splitlines()[0].endswith("1 round")


# -- the real launcher -----------------------------------------------------------------------------


def working(folder: RunFolder) -> dict[int, int]:
    """Return the pids of living workers that have finished points, with their numbers."""
    found = {}
    for path in folder.all_workers():
        facts = json.loads(path.read_bytes())
        alive = Path(f"/proc/{facts['pid']}").exists()
        if facts["state"] == "working" and facts["points"] and alive:
            found[facts["pid"]] = facts["points"]
    return found


@pytest.fixture
def reference(tmp_path: Path) -> Surface:
    """The undisturbed surface of a sweep that takes about two minutes of one worker."""
    toml = sweep_file(tmp_path / "calm", x=21, y=11)
    return merged(finished(toml))[0]


def slow_sweep(base: Path, workers: int) -> Path:
    return sweep_file(base, x=21, y=11, pause=0.5, all_at=workers)


def test_a_launcher_replaces_killed_workers_and_ends_as_if_nothing_had_happened(
    tmp_path: Path, reference: Surface
) -> None:
    toml = slow_sweep(tmp_path / "stormy", 3)
    folder = RunFolder(toml.with_name("stormy.run"))
    running = Command(
        "run", toml, "--run", folder.root, "--workers", 3, "--no-picture", "--unit-points", 2
    )
    killed: set[int] = set()
    for _ in range(3):
        fresh = wait_for(lambda: set(working(folder)) - killed)
        victim = min(fresh)
        os.kill(victim, signal.SIGKILL)
        killed.add(victim)
    hurry(folder)
    done = running.wait()
    assert done.code == 0, done.err
    assert "was killed (SIGKILL); another takes its unit over" in done.err
    # The sweep differs in a factory option alone, which changes no value.
    assert differences(Surface.load(folder.surface), reference) == []
    assert verify(folder).problems == []


def test_an_interrupted_run_exits_130_and_its_successor_computes_what_is_missing_and_no_more(
    tmp_path: Path, reference: Surface
) -> None:
    toml = slow_sweep(tmp_path / "stopped", 2)
    arguments = ("run", toml, "--run", toml.with_name("a.run"), "--workers", 2, "--no-picture")
    folder = RunFolder(toml.with_name("a.run"))
    running = process(*arguments, "--unit-points", 2)
    wait_for(lambda: working(folder))
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=PATIENCE)
    done, total = share_done(folder)
    assert (running.returncode, 0 < done < total) == (130, True), err
    assert f"{done} of {total} points committed" in err
    assert "Traceback" not in out + err + "".join(p.read_text() for p in folder.logs.iterdir())
    assert Counter(evaluated(folder)).most_common(1)[0][1] == 1

    hurry(folder)
    resumed: Done = command(*arguments)
    assert resumed.code == 0, resumed.err
    assert f"{total - done} of {total} points to evaluate" in resumed.out + resumed.err
    assert evaluated(folder) == [(p, 0) for p in range(total)]  # each exactly once
    assert differences(Surface.load(folder.surface), reference) == []
