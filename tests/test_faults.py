"""The fault table on a real Slurm: whatever dies, what is left is exactly what is computed next.

After each fault the run ends with the values, bit for bit, of one that was never disturbed; the
same command as before does what is missing, and there is nothing to clean up first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    command,
    differences,
    evaluated,
    finished,
    hurry,
    merged,
    planned,
    sweep_file,
    wait_for,
)
from cluster import Cluster, slurm

from lsweep.runs.status import share_done, status
from lsweep.slurm.submission import Submission
from lsweep.slurm.tasks import GONE, Task, queue, view
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import all_workers
from lsweep.surfaces.surface import Status, Surface

POINTS = 35


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    """What one worker computes when nothing happens to it."""
    return merged(finished(sweep_file(tmp_path_factory.mktemp("undisturbed"), x=7, y=5)))[0]


def submitted(
    base: Path, *words: object, pause: float = 0.4, company: int = 3, **problem: Any
) -> RunFolder:
    """Plan a sweep of a known number of seconds, and submit it."""
    toml = sweep_file(base, x=7, y=5, pause=pause, company=company, **problem)
    run = planned(toml, unit_points=1)
    done = command("submit", run.root, "--tasks", 3, *words)
    assert (done.code, done.err) == (0, ""), done
    return run


def at_work(run: RunFolder, least: int) -> list[dict[str, Any]]:
    """Wait until so many workers have committed something; return what they say of themselves."""
    return wait_for(lambda: w if len(w := _active(run)) >= least else None, 120)


def _active(run: RunFolder) -> list[dict[str, Any]]:
    return [w for w in all_workers(run) if any(run.parts.glob(f"{w['worker']}.*"))]


def task_of(run: RunFolder, worker: dict[str, Any]) -> str:
    """Return the task that a worker is."""
    return worker["job"].partition(".")[0]


def tasks(run: RunFolder) -> dict[str, Task]:
    """Return what is known of each task."""
    return {t.job: t for t in view(run)}


def over(cluster: Cluster, run: RunFolder | None = None) -> None:
    """Wait until no job waits or runs; what is left of ``run`` takes no pauses."""
    if run is not None:
        hurry(run)
    wait_for(lambda: not cluster.jobs(), 180)


def node_of(job: str) -> str:
    """Return the node on which a task runs."""
    return queue()[job].node


def script_of(job: str) -> int:
    """Return the pid of a task's batch shell."""
    folder = f"job{int(slurm('squeue', '-h', '-j', job, '-o', '%A')):05d}/slurm_script"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder in path.read_text():
                return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no {folder}")


def is_as_if_nothing_had_been(run: RunFolder, undisturbed: Surface) -> None:
    """The same command, with fewer tasks, does what is missing: as if nothing had been."""
    hurry(run)
    done = command("submit", run.root, "--tasks", 1, "--wait")
    assert done.code == 0, done
    assert differences(merged(run)[0], undisturbed) == []
    assert command("verify", run.root).code == 0


# -- one process -----------------------------------------------------------------------------------


def test_a_worker_is_killed(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path)
    victim = at_work(run, 3)[0]
    job = task_of(run, victim)
    os.kill(victim["pid"], signal.SIGKILL)
    over(cluster, run)
    task = tasks(run)[job]
    assert (task.state, task.exit, task.node != "") == ("FAILED", "137:0", True)
    assert f"1 FAILED ({job} on {task.node})" in "\n".join(
        command("status", run.root).out.splitlines()
    )
    assert share_done(run) == (POINTS, POINTS)  # by the others
    is_as_if_nothing_had_been(run, undisturbed)


@pytest.mark.full
def test_a_batch_shell_is_killed(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path)
    job = task_of(run, at_work(run, 3)[0])
    os.kill(script_of(job), signal.SIGKILL)
    over(cluster, run)
    assert tasks(run)[job].state == "FAILED"
    is_as_if_nothing_had_been(run, undisturbed)


@pytest.mark.full
def test_all_workers_are_killed(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path)
    for worker in at_work(run, 3):
        os.kill(worker["pid"], signal.SIGKILL)
    over(cluster, run)
    done = share_done(run)[0]
    assert 0 < done < POINTS
    surface = Surface.load(run.surface)  # the merge made a picture of what there was
    assert int((surface.status == Status.OK).sum()) == done
    # By hand this time, with other means.
    assert command("run", run.root, "--workers", 2, "--no-picture").code == 0
    assert len(evaluated(run)) == POINTS  # exactly what was missing
    is_as_if_nothing_had_been(run, undisturbed)


def test_a_task_out_of_memory(cluster, tmp_path, undisturbed):
    if "task/cgroup" not in slurm("scontrol", "show", "config"):
        pytest.skip("Slurm cannot limit memory here: no writable cgroup of version 1")
    run = submitted(tmp_path, "--", "--mem=1G", trouble="hog")
    over(cluster)
    job = Submission.all(run)[0].tasks[0]
    assert wait_for(lambda: tasks(run)[job].state == "OUT_OF_MEMORY")  # said by its step alone
    assert "OUT_OF_MEMORY" in command("status", run.root).out
    is_as_if_nothing_had_been(run, undisturbed)


def test_a_poison_point_ends_failed(cluster, tmp_path, undisturbed):
    """It kills each worker that touches it; who comes later is not killed for ever."""
    run = planned(sweep_file(tmp_path, x=5, trouble="poison"), unit_points=1)
    clean = merged(finished(sweep_file(tmp_path / "clean", x=5)))[0]
    done = command("submit", run.root, "--tasks", 3, "--wait")
    for _ in range(3):
        if share_done(run)[0] == 5:
            break
        done = command("submit", run.root, "--wait")
    assert done.code == 3
    state = status(run)
    assert state["missing"] == 0 and sum(state["failed"].values()) == 1
    assert "killed" in next(iter(state["failed"]))
    surface = merged(run)[0]
    assert surface.status.tolist() == [1, 1, 3, 1, 1]
    same = surface.status == 1
    assert np.array_equal(surface["train_loss"][same], clean["train_loss"][same])


def test_a_sick_device_marks_nothing_and_is_named(cluster, tmp_path):
    run = planned(sweep_file(tmp_path, x=5, trouble="sick"), unit_points=1)
    done = command("submit", run.root, "--tasks", 2, "--wait")
    assert done.code == 3
    state = status(run)
    assert state["failed"] == {} and state["missing"] > 0
    sick = [w for w in state["workers"] if w["state"] == "sick"]
    assert sick and all("the device fell off the bus" in w["message"] for w in sick)
    ended = [t for t in view(run) if t.state == "FAILED" and not t.merge]
    assert ended and all(t.exit == "3:0" and "fell off the bus" in t.reason for t in ended)


# -- nodes -----------------------------------------------------------------------------------------


@pytest.fixture
def mended(cluster: Cluster) -> Iterator[list[str]]:
    """Nodes to bring back at the end."""
    nodes: list[str] = []
    yield nodes
    for node in nodes:
        cluster.fault("node-start", node)


def lose(cluster: Cluster, how: str, node: str) -> None:
    """Let a node fail; that it is down is said to Slurm, which needs half a minute to see it."""
    cluster.fault(how, node)
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def test_a_node_crashes(cluster, mended, tmp_path, undisturbed):
    run = submitted(tmp_path, "--", "--exclusive")
    victim = at_work(run, 3)[0]
    job = task_of(run, victim)
    node = node_of(job)
    mended.append(node)
    lose(cluster, "node-crash", node)
    wait_for(lambda: tasks(run)[job].restarts == 1)  # Slurm starts the task again elsewhere
    over(cluster, run)
    assert tasks(run)[job].node != node
    is_as_if_nothing_had_been(run, undisturbed)


@pytest.mark.full
def test_a_node_is_cut_off_and_its_task_runs_twice(cluster, mended, tmp_path, undisturbed):
    run = submitted(tmp_path, "--", "--exclusive", pause=1.5)
    victim = at_work(run, 3)[0]
    job = task_of(run, victim)
    node = node_of(job)
    mended.append(node)
    lose(cluster, "node-kill", node)
    # What only hints is lost too, as if the two saw different file systems: both take one unit.
    shutil.rmtree(run.leases)
    again = wait_for(lambda: [w for w in all_workers(run) if task_of(run, w) == job
                              and w["worker"] != victim["worker"]], 120)  # fmt: skip
    before = read_json(run.worker(victim["worker"]))["points"]
    wait_for(lambda: read_json(run.worker(victim["worker"]))["points"] > before)
    assert len(again) == 1
    over(cluster, run)
    assert share_done(run) == (POINTS, POINTS)
    assert len(evaluated(run)) > POINTS and merged(run)[1].conflicts == 0
    is_as_if_nothing_had_been(run, undisturbed)


# -- people ----------------------------------------------------------------------------------------


def test_a_waiting_and_a_running_task_are_cancelled(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path, "--tasks", 4, "--array-parallelism", 2, company=2)
    victim = at_work(run, 2)[0]
    job, waiting = task_of(run, victim), Submission.all(run)[0].tasks[2]
    slurm("scancel", waiting)
    slurm("scancel", job)
    over(cluster, run)
    said = tasks(run)
    assert said[job].state == "CANCELLED" and said[job].restarts == 0
    assert said[waiting].state == GONE  # no trace of it anywhere, and that is said
    is_as_if_nothing_had_been(run, undisturbed)


@pytest.mark.full
def test_a_task_is_requeued_by_hand(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path, pause=1.0)
    job = task_of(run, at_work(run, 3)[0])
    slurm("scontrol", "requeue", job)
    wait_for(lambda: len([w for w in all_workers(run) if task_of(run, w) == job]) == 2, 120)
    over(cluster, run)
    assert tasks(run)[job].restarts == 1
    is_as_if_nothing_had_been(run, undisturbed)


# -- Slurm itself ----------------------------------------------------------------------------------


def test_accounting_and_controller_are_gone(cluster, tmp_path, undisturbed):
    run = submitted(tmp_path)
    at_work(run, 3)
    one = Submission.all(run)[0]
    cluster.saved(f"{one.logs}/%j_0_log.out")
    cluster.stop("slurmdbd")
    cluster.stop("slurmctld")
    hurry(run)
    wait_for(lambda: share_done(run) == (POINTS, POINTS), 120)  # workers need neither
    cluster.up()
    with contextlib.suppress(AssertionError):  # a task whose end it missed Slurm may keep for long
        wait_for(lambda: not cluster.jobs(), 60)
    cluster.clear()
    is_as_if_nothing_had_been(run, undisturbed)


# -- time ------------------------------------------------------------------------------------------


@pytest.fixture(params=["REQUEUE", pytest.param("CANCEL", marks=pytest.mark.full)])
def preempted(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """What the site does with jobs of ``low`` when ``high`` wants their nodes."""
    slurm("scontrol", "update", "partitionname=low", f"preemptmode={request.param}")
    yield request.param
    slurm("scontrol", "update", "partitionname=low", "preemptmode=REQUEUE")


def test_a_higher_partition_preempts(cluster, preempted, tmp_path, undisturbed):
    run = submitted(tmp_path, "--partition", "low", "--", "--exclusive", pause=1.0)
    at_work(run, 3)
    urgent = slurm("sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null",
                   "--wrap", "sleep 2").strip()  # fmt: skip
    wait_for(lambda: queue()[urgent].state == "COMPLETED", 120)
    over(cluster, run)
    again = [t for t in view(run) if t.restarts]
    assert again and all(t.state == "COMPLETED" for t in again)
    is_as_if_nothing_had_been(run, undisturbed)


@pytest.mark.full
def test_the_time_is_over_before_the_work(cluster, tmp_path, undisturbed):
    """Tasks of a minute for more than a minute of work: each ends in order and comes again."""
    run = submitted(tmp_path, "--time", 1, "--tasks", 1, pause=2.0, company=1)
    wait_for(lambda: not cluster.jobs(), 280)
    task = tasks(run)[Submission.all(run)[0].array]
    assert task.state == "COMPLETED" and task.restarts >= 1
    assert len(evaluated(run)) == POINTS  # nothing was in flight when a turn ended
    is_as_if_nothing_had_been(run, undisturbed)


# -- the disk --------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 4 MiB, the same on all nodes."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.full
def test_the_run_folder_is_full(cluster, disk, tmp_path):
    calm = merged(finished(sweep_file(tmp_path / "calm", x=41, y=33)))[0]
    toml = sweep_file(tmp_path / "full", x=41, y=33, pause=0.02)
    run = planned(toml, run=disk / "a.run", unit_points=16)
    assert command("submit", run.root, "--tasks", 3).code == 0
    at_work(run, 3)
    space = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as f:  # each worker's next part finds no room
        os.posix_fallocate(f.fileno(), 0, space.f_bavail * space.f_frsize)
    over(cluster)
    done, total = share_done(run)
    assert 0 < done < total
    ballast.unlink()
    is_as_if_nothing_had_been(run, calm)
    assert evaluated(run) == [(p, 0) for p in range(total)]
