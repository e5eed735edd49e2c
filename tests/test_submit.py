"""Submitting to a real Slurm: what was asked for is what runs, and what it says is what happened.

Every run that is finished here has the values, bit for bit, of one that was never disturbed. Tasks
that need not compute are held.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cases import command, differences, finished, merged, planned, process, sweep_file, wait_for
from cluster import MOST_TASKS, slurm
from tiny import contents

from lsweep.errors import LsweepError
from lsweep.runs.status import share_done, status
from lsweep.slurm.limits import Site, require_time
from lsweep.slurm.submission import Options, Submission
from lsweep.slurm.submit import check
from lsweep.slurm.tasks import GONE, UNKNOWN, lines, view
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import all_workers
from lsweep.surfaces.surface import Surface

FILES = Path(__file__).parent.parent / "slurm"
HELD = ("--", "--hold")

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Surface:
    """What one worker computes of `toml` when nothing happens to it."""
    folder = finished(sweep_file(tmp_path_factory.mktemp("undisturbed"), x=11, y=3))
    return merged(folder)[0]


@pytest.fixture
def toml(tmp_path) -> Path:
    """33 points, three of them a unit."""
    return sweep_file(tmp_path, x=11, y=3)


@pytest.fixture
def run(toml) -> RunFolder:
    """The same, planned."""
    return planned(toml, unit_points=3)


def submitted(*words: object) -> str:
    """Submit, and return what that printed."""
    done = command("submit", *words)
    assert (done.code, done.err) == (0, ""), done
    return done.out


def newest(folder: RunFolder) -> Submission:
    """Return the last submission of a run."""
    return Submission.all(folder)[-1]


def states(folder: RunFolder) -> dict[str, str]:
    """Return the state of each task."""
    return {t.job: t.state for t in view(folder)}


def log_of(folder: RunFolder, pattern: str) -> str:
    """Return what tasks of the last submission printed."""
    logs = sorted(folder.slurm_logs(newest(folder).logs).glob(pattern))
    assert logs, pattern
    return "".join(p.read_text() for p in logs)


# -- submit ----------------------------------------------------------------------------------------


def test_from_a_toml_to_a_picture_and_again_from_the_run(toml, undisturbed):
    wrapper = toml.with_name("wrapper.sh")
    wrapper.write_text('#!/bin/sh\necho "inside $LSWEEP_X, nice $(nice)"\nexec "$@"\n')
    wrapper.chmod(0o755)
    run = RunFolder(toml.with_suffix(".run"))
    done = command(
        "submit", toml, "--unit-points", 3, "--tasks", 2, "--ranks", 2, "--time", 5,
        "--setup", "echo set up", "--setup", "export LSWEEP_Y='a b'",
        "--wrap", f"env LSWEEP_X=1 nice -n 5 {wrapper}", "--wait",
        "--", "--comment=two words", "-J", "mine",
    )  # fmt: skip
    assert done.code == 0, done
    one = newest(run)
    assert f"array {one.array}: 2 tasks of 2 workers; merge {one.merge} after it" in done.out
    assert (
        f"lsweep status {run.root}" in done.out and f"scancel {one.array} {one.merge}" in done.out
    )
    assert str(run.slurm_logs(one.logs)) in done.out and "33/33 points done" in done.out
    assert states(run) == dict.fromkeys([*one.tasks, one.merge], "COMPLETED")
    assert differences(Surface.load(run.surface), undisturbed) == []  # by the merge job
    assert not run.all_leases()
    assert (run.figures / "train_loss.png").read_bytes().startswith(b"\x89PNG")
    # What was asked for is what ran.
    assert log_of(run, "*_log.out").count("inside 1, nice 5\n") == 5
    assert log_of(run, f"{one.array}_0_0_log.out").startswith("set up\n")
    form = "Name:|,Comment:|,NumTasks:|"
    told = slurm("squeue", "-h", "-t", "all", "-j", one.array, "-r", "-O", form)
    assert told.split("\n")[:2] == ["mine|two words|2|"] * 2
    tasks = {w["job"].partition(".")[0] for w in all_workers(run)}
    assert tasks and tasks <= set(one.tasks)  # one that came late found nothing to do
    assert log_of(run, f"{one.array}_*_log.out").count(" -m lsweep work ") == 4
    # Complete: nothing is submitted.
    again = command("submit", run.root)
    assert again.code == 0 and "is complete, nothing was submitted" in again.out
    assert len(Submission.all(run)) == 1
    # Half of it is lost; the run remembers how it was submitted.
    for part in run.all_parts()[::2]:
        part.unlink()
    assert share_done(run)[0] < 33
    done = command("submit", run.root, "--ranks", 1, "--setup", "", "--wrap", "", "--wait")
    assert done.code == 0, done
    assert newest(run).options == dataclasses.replace(one.options, ranks=1, setup=(), wrap="")
    assert differences(Surface.load(run.surface), undisturbed) == []
    assert command("verify", run.root).code == 0


@pytest.mark.full
def test_a_study_is_an_array_for_each_of_its_runs(tmp_path):
    toml = sweep_file(tmp_path, x=3)
    toml.write_text(f"{toml.read_text()}\n[study]\norigins = [{{shift = 0.0}}, {{shift = 1.0}}]\n")
    done = command("submit", toml, "--tasks", 1, "--wait")
    assert done.code == 0, done
    assert done.out.count("array ") == 2 and done.out.count("complete, merged") == 2
    runs = [RunFolder(tmp_path / "sweep.study" / f"shift={s}-s0.run") for s in ("0.0", "1.0")]
    low, high = (Surface.load(r.surface)["train_loss"] for r in runs)
    assert high == pytest.approx(low + 1)


def test_options_are_remembered_and_overridden(run):
    submitted(
        run.root, "--tasks", 3, "--partition", "low", "--gpus-per-task", 1, "--time", 9, *HELD
    )
    first = newest(run).options
    assert (first.tasks, first.partition, first.time, first.sbatch) == (3, "low", 9, ("--hold",))
    done = command("submit", run.root, "--time", 7, "--gpus-per-task", 2, "--array-parallelism", 2)
    assert done.code == 0
    array = Submission.all(run)[0].array
    assert f"array {array} of this run still has 3 tasks; both at once is harmless" in done.err
    second = newest(run)
    assert second.options == dataclasses.replace(
        first, time=7, gpus_per_task=2, array_parallelism=2
    )
    facts = slurm("scontrol", "show", "job", "-o", second.array)
    assert "Partition=low " in facts and "TimeLimit=00:07:00" in facts
    assert (
        "ArrayTaskThrottle=2 " in facts
        and "TresPerTask=gres:gpu:2 " in facts
        and "Requeue=1 " in facts
    )
    assert f"afterany:{second.array}_" in slurm("squeue", "-h", "-j", second.merge, "-o", "%E")
    assert "tasks: 6 pending (JobHeldUser, will never start as it is)" in "".join(lines(view(run)))
    # 0 and "" forget; more tasks than work are not submitted, but remembered.
    done = command("submit", run.root, "--time", 0, "--partition", "", "--tasks", 99)
    assert done.code == 0 and "11 tasks instead of 99: there is no more work" in done.out
    assert (newest(run).options.time, newest(run).options.tasks, newest(run).count) == (0, 99, 11)
    assert "Partition=batch " in slurm("scontrol", "show", "job", "-o", newest(run).array)


def test_what_a_user_set_for_all_jobs_counts_less_than_what_is_typed(run, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "low")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "0:30:00")
    out = submitted(run.root, "--tasks", 1, "--dry-run")
    assert "#SBATCH --partition=low" in out and "#SBATCH --time=0:30:00" in out
    submitted(run.root, "--tasks", 1, "--partition", "high", *HELD)
    facts = slurm("scontrol", "show", "job", "-o", newest(run).array)
    assert "Partition=high " in facts and "TimeLimit=00:30:00" in facts


def test_a_dry_run_writes_and_submits_nothing(toml, run, cluster):
    before = contents(run.root)
    words = ["--tasks", 2, "--wrap", "nice -n 5", "--dry-run", "--", "-J", "mine"]
    out = submitted(run.root, *words)
    assert "#SBATCH --array=0-1%2" in out and "#SBATCH -J mine" in out
    assert "nice -n 5" in out and "--dependency=afterany:" in out
    assert contents(run.root) == before and cluster.jobs() == []
    # Also where there is no run yet.
    there = toml.with_name("other.run")
    assert "#SBATCH --array=0-1%2" in submitted(toml, "--run", there, *words)
    assert not there.exists() and cluster.jobs() == []
    # The script is one that sbatch takes.
    script = out.partition("<<'ARRAY'\n")[2].partition("\nARRAY\n")[0]
    done = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_array_is_no_longer_than_the_site_allows(tmp_path):
    run = planned(sweep_file(tmp_path, x=50), unit_points=1)
    out = submitted(run.root, "--tasks", 45, *HELD)
    assert f"{MOST_TASKS} tasks instead of 45: MaxArraySize allows {MOST_TASKS}" in out
    assert len(slurm("squeue", "-h", "-r", "-j", newest(run).array).splitlines()) == MOST_TASKS
    assert "tasks: 40 pending" in command("status", run.root).out


REFUSED = {
    "time": (["--time", "1441"], "partition 'batch' allows at most 1440 minutes"),
    "time by hand": (["--", "-t2-00:00:00"], "--time 2880: partition 'batch' allows at most 1440"),
    "partition": (["--partition", "btach"], "no partition 'btach' here; did you mean 'batch'?"),
    "partition by hand": (["--", "-p", "zzz"], "no partition 'zzz' here; one of: batch, low, high"),
    "option": (["--", "--bogus=1"], "sbatch refused: unrecognized option '--bogus=1'"),
    "value": (["--", "--mem=many"], "sbatch refused: Invalid --mem specification"),
    "memory": (["--", "--mem=9T"], "sbatch refused: Memory specification can not be satisfied"),
    "array": (["--", "--array=0-9"], "--tasks and --array-parallelism make the array"),
    "short": (["--", "-a0-9"], "--tasks and --array-parallelism make the array"),
    "parsable": (["--", "--parsable"], "its output is read here"),
    "quotes": (["--wrap", "nice 'x"], '--wrap "nice \'x": No closing quotation'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_and_leaves_nothing(name, run, cluster):
    words, why = REFUSED[name]
    before = contents(run.root)
    done = command("submit", run.root, "--tasks", 2, *words)
    assert done.code == 1 and done.out == ""
    assert done.err.startswith("lsweep: ") and done.err.count("\n") == 1 and why in done.err
    assert contents(run.root) == before and cluster.jobs() == []


def test_tasks_must_be_said_once(run):
    done = command("submit", run.root)
    assert (done.code, done.out) == (1, "") and "--tasks N is missing" in done.err


def test_what_may_never_start_is_said(run):
    done = command("submit", run.root, "--tasks", 2, "--", "--nodes=9")
    assert done.code == 0
    assert "Slurm says: Requested node configuration is not available" in done.err


def test_submitted_from_inside_a_job_nothing_of_it_leaks(run, undisturbed):
    out = run.root / "job.out"
    script = f"#!/bin/bash\nlsweep submit {run.root} --tasks 2 --wait\necho ended with $?\n"
    around = ["sbatch", "-n3", "-c2", "--mem=300M", "--time=3", "-o", out]
    subprocess.run(around, input=script, text=True, check=True, stdout=subprocess.PIPE)
    wait_for(lambda: out.exists() and "ended with" in out.read_text())
    assert "ended with 0" in out.read_text(), out.read_text()
    facts = slurm("scontrol", "show", "job", "-o", newest(run).array)
    assert facts.count("NumTasks=1 CPUs/Task=1 ") == 2
    assert differences(Surface.load(run.surface), undisturbed) == []


# -- waiting ---------------------------------------------------------------------------------------


def test_interrupted_it_stops_waiting_and_the_jobs_go_on(run, cluster):
    waiting = process("submit", run.root, "--tasks", 2, "--wait", *HELD)
    first = waiting.stdout.readline()
    wait_for(lambda: Submission.all(run))
    one = newest(run)
    assert one.array in first
    assert "will never start as it is: JobHeldUser" in waiting.stderr.readline()
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate()
    assert waiting.returncode == 130
    assert f"'scancel {one.array} {one.merge}' ends them" in err and "Traceback" not in err
    assert set(cluster.jobs()) == {*one.tasks, one.merge}


def test_points_that_failed_are_exit_code_3(tmp_path):
    run = planned(sweep_file(tmp_path, trouble="raise"))
    (tmp_path / "broken").touch()
    done = command("submit", run.root, "--tasks", 1, "--wait")
    assert done.code == 3 and "1 failed: ValueError: no value at 0.25" in done.out
    assert newest(run).tasks == [newest(run).array]  # an array of one is a plain job
    assert set(Surface.load(run.surface).status.tolist()) == {1, 3}


def test_without_accounting_and_then_without_controller(run, cluster, undisturbed):
    cluster.stop("slurmdbd")
    submitted(run.root, "--tasks", 2, *HELD)
    one = newest(run)
    assert states(run) == dict.fromkeys([*one.tasks, one.merge], "PENDING")  # squeue alone
    slurm("scancel", f"{one.array}_1")
    wait_for(lambda: f"{one.array}_1" not in cluster.jobs())
    task = next(t for t in view(run) if t.job == f"{one.array}_1")
    # It may have left a trace where nobody can look now.
    assert task.state == UNKNOWN and "sacct" in task.reason
    cluster.up()
    wait_for(lambda: states(run)[f"{one.array}_1"] == GONE)  # now nobody has a trace of it
    slurm("scancel", one.array, one.merge)

    waiting = process("submit", run.root, "--tasks", 2, "--wait", *HELD)
    waiting.stdout.readline()
    two = wait_for(lambda: newest(run) if newest(run).number == 1 else None)
    wait_for(lambda: slurm("sacct", "-n", "-X", "-j", two.merge).strip())
    cluster.saved(f"{two.logs}/%j_0_log.out")
    cluster.stop("slurmctld")
    line = "slurmctld is away"
    while "waiting all the same" not in line:
        line = waiting.stderr.readline()
    assert "slurmctld is down" in line
    assert states(run)[two.tasks[0]] == "PENDING"  # sacct alone
    cluster.stop("slurmdbd")
    with pytest.raises(LsweepError, match=r"Slurm cannot be asked: slurmctld is down; sacct: "):
        view(run)
    state = status(run)
    assert state["tasks"] == [] and "Slurm cannot be asked" in state["slurm"]
    assert json.loads(command("status", run.root, "--json").out)["done"] == 0
    done = command("submit", run.root)
    assert done.code == 1 and "Slurm does not answer" in done.err and "Traceback" not in done.err
    cluster.up()
    slurm("scontrol", "release", two.array, two.merge)
    out, err = waiting.communicate()
    assert waiting.returncode == 0, (out, err)
    assert differences(Surface.load(run.surface), undisturbed) == []


def test_without_slurm_the_remedy_is_named(run, monkeypatch):
    before = contents(run.root)
    for name, value, why in (
        ("SLURM_CONF", "/nonexistent", "Slurm does not answer (scontrol did not"),
        (
            "PATH",
            str(Path(sys.executable).parent),
            "no sbatch on this machine: submit from",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            done = command("submit", run.root, "--tasks", 2)
        assert done.code == 1 and why in done.err and done.err.count("\n") == 1
    with monkeypatch.context() as patch:  # what would be submitted can be seen all the same
        patch.setenv("SLURM_CONF", "/nonexistent")
        out = submitted(run.root, "--tasks", 2, "--dry-run")
    assert "# Slurm does not answer" in out and "#SBATCH --array=0-1" in out
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)  # as where the extra is not installed
        done = command("submit", run.root, "--tasks", 2)
    assert done.code == 1 and "pip install 'lsweep[slurm]'" in done.err
    assert contents(run.root) == before


def test_no_merge_job_is_no_loss(run, undisturbed, monkeypatch, tmp_path):
    """Where the merge is refused, the array stands and what to do instead is said."""
    # A site's sbatch that takes no job without --array.
    real = slurm("which", "sbatch").strip()
    fussy = tmp_path / "bin" / "sbatch"
    fussy.parent.mkdir()
    fussy.write_text(
        f'#!/bin/bash\nlast="${{@: -1}}"\nif [ -f "$last" ] && grep -q afterany "$last"; then\n'
        f'echo "sbatch: error: no merges here" >&2; exit 1; fi\nexec {real} "$@"\n'
    )
    fussy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fussy.parent}:{os.environ['PATH']}")
    done = command("submit", run.root, "--tasks", 2, "--wait")
    assert done.code == 3 and "no merge after it (sbatch refused: no merges here)" in done.err
    assert newest(run).merge == "" and "complete: 'lsweep merge' it" in done.out
    assert differences(merged(run)[0], undisturbed) == []


# -- limits as scontrol prints them ----------------------------------------------------------------


def test_limits_are_those_of_the_site():
    site = Site.read()
    assert site.array == MOST_TASKS and list(site.partitions) == ["batch", "low", "high"]
    assert [p.name for p in site.chosen(None)] == ["batch"]
    batch = site.partitions["batch"]
    assert (batch.state, batch.longest, batch.usual) == ("UP", 1440.0, 10.0)
    require_time(site.chosen("low,high"), 1440)
    shorter = [dataclasses.replace(batch, longest=60.0), dataclasses.replace(batch, longest=None)]
    require_time(shorter, 1e9)
    with pytest.raises(LsweepError, match="allows at most 60 minutes"):
        require_time(shorter[:1], 61)


def test_a_closed_partition_is_named(run):
    slurm("scontrol", "update", "partition=low", "state=down")
    try:
        done = command("submit", run.root, "--tasks", 2, "--partition", "low")
        assert done.code == 1 and "partition 'low' is DOWN" in done.err
        options = Options(partition="low,batch")
        assert check(Site.read(), options) == 10.0
    finally:
        slurm("scontrol", "update", "partition=low", "state=up")


# -- by hand ---------------------------------------------------------------------------------------


def test_the_sbatch_files_do_a_sweep(run, undisturbed, monkeypatch):
    monkeypatch.chdir(run.root)
    jobs = []
    for name in ("array", "mpi"):
        answer = slurm("sbatch", FILES / f"{name}.sbatch", run.root)
        jobs.append(answer.split()[-1])
    after = f"--dependency=afterany:{':'.join(jobs)}"
    merge = slurm("sbatch", after, FILES / "merge.sbatch", run.root).split()[-1]
    wait_for(lambda: not slurm("squeue", "-h", "-t", "all", "-j", merge, "-o", "%T").startswith(
        ("PENDING", "RUNNING", "COMPLETING")), 120)  # fmt: skip
    said = "".join(p.read_text() for p in run.root.glob("lsweep-*.out"))
    assert run.surface.exists(), said
    assert differences(Surface.load(run.surface), undisturbed) == []
    assert (run.figures / "train_loss.png").exists()
    assert (
        slurm("sacct", "-n", "-X", "-P", "-j", ",".join(jobs), "-o", "ExitCode").split()[0] == "0:0"
    )


def test_each_sbatch_file_says_in_two_lines_what_to_edit():
    for path in sorted(FILES.glob("*.sbatch")):
        first, *head = path.read_text().splitlines()
        assert first == "#!/bin/bash" and len(head) < 10
        assert head[0].startswith("# sbatch ") and "Edit: " in "".join(head[:2])
        assert not head[2].startswith("# ")


def test_ranks_of_srun_do_a_sweep(run, undisturbed):
    slurm("srun", "--mpi=pmi2", "-n", 4, "lsweep", "work", run.root)
    assert share_done(run) == (33, 33)
    assert differences(merged(run)[0], undisturbed) == []


# -- children --------------------------------------------------------------------------------------


def test_each_child_is_an_array_of_its_own(toml):
    arguments = ("--measures", "sharpness", "--replicates", 2)
    done = command("submit", toml, "--tasks", 2, *arguments, "--wait")
    assert done.code == 0, done
    run = RunFolder(toml.with_suffix(".run"))
    child = run.child("sharpness")
    arrays = [newest(folder).array for folder in (run, child)]
    assert [f"array {a}: 2 tasks" in done.out for a in arrays] == [True, True]
    assert Surface.load(child.surface).shape == (2, 21)
    again = command("submit", run.root, "--measures", "sharpness")  # both know how
    assert again.code == 0 and again.out.count("is complete, nothing was submitted") == 2
    assert [newest(folder).array for folder in (run, child)] == arrays
    more = command("submit", run.root, "--measures", "sharpness", "--replicates", 3, *HELD)
    assert more.code == 0 and len(Submission.all(child)) == 2 and len(Submission.all(run)) == 1
    slurm("scancel", newest(child).array, newest(child).merge)
