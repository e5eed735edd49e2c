"""Asking Slurm: what it says of each task of a run.

squeue is exact while the controller remembers a job; sacct is seconds late, but has the past and
the steps, where alone an out of memory shows. Either may be silent, so both are asked at once and
what one does not know the other may. Nothing here changes anything.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lsweep.errors import LsweepError
from lsweep.slurm.submission import Submission
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import State, all_workers

SECONDS = 5.0  # to answer in
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "TIMEOUT",
}  # fmt: skip
GONE, UNKNOWN = "GONE", "UNKNOWN"
NEVER = {  # reasons of a pending task that time alone does not mend
    "AccountNotAllowed", "BadConstraints", "DependencyNeverSatisfied", "InvalidAccount",
    "InvalidQOS", "JobHeldAdmin", "JobHeldUser", "PartitionConfig", "PartitionNodeLimit",
    "PartitionTimeLimit", "QOSNotAllowed", "QOSTimeLimit", "launch_failed_requeued_held",
}  # fmt: skip
NAMED = 3  # tasks of one bad state that are named


def ask(*command: str, must_succeed: bool = True) -> str:
    """Return what a Slurm command prints.

    Raises:
        LsweepError: there is no such command, or it failed, or it did not answer in time.
    """
    # Its output must not depend on what the user set for his own eyes, or for a job around this.
    personal = ("SQUEUE_", "SACCT_", "SLURM_TIME_FORMAT")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(personal)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment
        )
    except FileNotFoundError:
        raise LsweepError(f"no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise LsweepError(f"{command[0]} did not answer in {SECONDS:g} s") from None
    if done.returncode and must_succeed:
        raise LsweepError(f"{command[0]}: {complaint(done.stderr) or 'failed'}")
    return done.stdout


def complaint(text: str) -> str:
    r"""Return what a Slurm command complains of, in one line without its own name.

    >>> complaint("sbatch: error: invalid partition\nsbatch: error: Batch job failed\n")
    'invalid partition; Batch job failed'
    """
    lines = (re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines())
    return "; ".join(line for line in lines if line and not line.startswith("Try "))


def require_controller() -> None:
    """Find out at once whether slurmctld is there: everything else takes long to give up.

    Raises:
        LsweepError: it is not.
    """
    if "is UP" not in ask("scontrol", "ping", must_succeed=False):
        raise LsweepError("slurmctld is down")


# -- tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What Slurm, or failing that the run, says of one task.

    Attributes:
        job: as Slurm writes it, ``51_7``.
        state: Slurm's word; ``GONE``: Slurm has no trace of it; ``UNKNOWN``: it cannot be asked.
        reason: why it waits, or how it ended.
        node: where it runs or ran.
        restarts: how often Slurm started it again.
        exit: ``code:signal``, where known.
        merge: it is the merge after an array.
        submission: number of the submission that it belongs to, -1 for jobs submitted by hand.
    """

    job: str
    state: str
    reason: str = ""
    node: str = ""
    restarts: int = 0
    exit: str = ""
    merge: bool = False
    submission: int = -1

    @property
    def active(self) -> bool:
        """True while it runs or may run."""
        return self.state not in ENDED and self.state not in (GONE, UNKNOWN)


_QUEUE = ("ArrayJobID", "ArrayTaskID", "JobID", "State", "Reason", "NodeList", "RestartCnt",
          "exit_code")  # fmt: skip


def queue() -> dict[str, Task]:
    """Return the user's tasks that the controller knows, also those that ended lately.

    Raises:
        LsweepError: it does not answer.
    """
    require_controller()
    form = ",".join(f"{name}:|" for name in _QUEUE)
    return parse_queue(ask("squeue", "--me", "--noheader", "--states=all", "--array", "-O", form))


def parse_queue(text: str) -> dict[str, Task]:
    """Read what squeue prints.

    >>> parse_queue("51|7|58|PENDING|Priority||0|0|")["51_7"].reason
    'Priority'
    """
    tasks = {}
    for line in text.splitlines():
        array, index, job, state, reason, node, restarts, status = line.split("|")[: len(_QUEUE)]
        name = job if index == "N/A" else f"{array}_{index}"
        waited = int(status or 0)  # as wait(2) has it
        tasks[name] = Task(
            name, state, "" if reason == "None" else reason, node, int(restarts or 0),
            f"{waited >> 8}:{waited & 127}",
        )  # fmt: skip
    return tasks


def accounts(jobs: Iterable[str]) -> dict[str, Task]:
    """Return what accounting recorded of jobs, their steps included; seconds late.

    Raises:
        LsweepError: it does not answer.
    """
    form = "JobID,State,ExitCode,NodeList"
    return parse_accounts(ask("sacct", "-D", "-n", "-P", "-j", ",".join(sorted(jobs)), "-o", form))


def parse_accounts(text: str) -> dict[str, Task]:
    r"""Read what sacct prints; a step out of memory makes its task so, whatever its script said.

    >>> text = "6_1|FAILED|1:0|n1\n6_1.0|OUT_OF_MEMORY|0:125|n1\n6_[2-3%4]|PENDING|0:0|\n"
    >>> text += "6_2|RUNNING|0:0|n1\n"
    >>> [(t.job, t.state) for t in parse_accounts(text).values()]
    [('6_1', 'OUT_OF_MEMORY'), ('6_2', 'RUNNING'), ('6_3', 'PENDING')]
    """
    tasks: dict[str, Task] = {}
    for line in text.splitlines():
        job, words, status, node = line.split("|")[:4]
        state, _, by = words.partition(" ")  # CANCELLED by 1000
        name, _, step = job.partition(".")
        if step:
            if state == "OUT_OF_MEMORY" and name in tasks:
                tasks[name] = dataclasses.replace(tasks[name], state=state, exit=status)
            continue
        for one in _expanded(name):
            before = tasks.get(one)  # an earlier turn, or the array when the task still waited
            restarts = before.restarts + (before.state != "PENDING") if before else 0
            node = "" if node == "None assigned" else node
            tasks[one] = Task(one, state, by, node, restarts, status)
    return tasks


def _expanded(name: str) -> Iterator[str]:
    """Yield the tasks of a pending array, such as ``51_[3,8-20:4%4]``."""
    job, bracket, indices = name.partition("_[")
    if not bracket:
        yield name
        return
    for part in indices.rstrip("]").partition("%")[0].split(","):
        first, last, step = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part).groups()  # type: ignore[union-attr]
        yield from (f"{job}_{i}" for i in range(int(first), int(last or first) + 1, int(step or 1)))


def view(folder: RunFolder) -> list[Task]:
    """Return what is known of each task of a run: of its submissions, and of workers in other jobs.

    Raises:
        LsweepError: neither squeue nor sacct answers; nothing is asked where there are no tasks.
    """
    # Of several in one task, one that has something to say.
    known = sorted(all_workers(folder), key=lambda w: bool(w["message"]))
    workers = {str(w["job"]).partition(".")[0]: w for w in known if w.get("job")}
    expected = {}
    for submission in Submission.all(folder):
        for job in submission.tasks:
            expected[job] = Task(job, UNKNOWN, submission=submission.number)
        if submission.merge:
            expected[submission.merge] = Task(
                submission.merge, UNKNOWN, merge=True, submission=submission.number
            )
    expected |= {job: Task(job, UNKNOWN) for job in workers if job not in expected}
    if not expected:
        return []
    with concurrent.futures.ThreadPoolExecutor(2) as both:
        asked = [both.submit(queue), both.submit(accounts, {j.partition("_")[0] for j in expected})]
    answers: list[dict[str, Task] | None] = []
    silent = []
    for future in asked:
        try:
            answers.append(future.result())
        except LsweepError as e:
            answers.append(None)
            silent.append(str(e))
    queued, recorded = answers
    if queued is None and recorded is None:
        raise LsweepError(f"Slurm cannot be asked: {'; '.join(silent)}")
    found = []
    for job, task in expected.items():
        now, past = (queued or {}).get(job), (recorded or {}).get(job)
        found.append(_reconciled(task, now, past, workers.get(job), "; ".join(silent)))
    return found


def told(folder: RunFolder) -> tuple[list[dict[str, Any]], str]:
    """Return the tasks of a run as plain values, and why Slurm could not be asked, or ""."""
    try:
        return [dataclasses.asdict(t) for t in view(folder)], ""
    except LsweepError as e:
        return [], str(e)


def _reconciled(
    task: Task, now: Task | None, past: Task | None, worker: dict[str, Any] | None, silent: str
) -> Task:
    """One task from what squeue, sacct and its own worker say, in this order."""
    known = now or past
    if known is None:
        # Cancelled while it waited, a task leaves no trace; others are forgotten after a while.
        state, reason = (UNKNOWN, silent) if silent else (GONE, "")
        if worker is not None and worker["state"] != State.WORKING:
            reason = str(worker["message"] or worker["state"])
        node = str(worker["host"]) if worker else ""
        return dataclasses.replace(task, state=state, reason=reason, node=node)
    state, reason, exit_ = known.state, known.reason, known.exit
    if now is not None and past is not None:
        if not now.active and past.state == "OUT_OF_MEMORY":
            state, exit_ = past.state, past.exit
        reason = reason or past.reason
    if state in ENDED and state != "COMPLETED" and worker is not None and worker["message"]:
        reason = str(worker["message"])
    return Task(
        task.job, state, reason, known.node, max(t.restarts for t in (now, past) if t), exit_,
        task.merge, task.submission,
    )  # fmt: skip


def lines(tasks: list[Task]) -> list[str]:
    """Return the tasks of the newest submission, and whatever is active, for people.

    >>> lines([Task("51_0", "RUNNING"), Task("51_1", "PENDING", "Priority"),
    ...        Task("51_2", "OUT_OF_MEMORY", node="n2")])
    ['tasks: 1 running, 1 pending (Priority), 1 OUT_OF_MEMORY (51_2 on n2)']
    """
    newest = max((t.submission for t in tasks), default=-1)
    shown = [t for t in tasks if t.active or t.submission in (-1, newest)]
    work = [t for t in shown if not t.merge]
    counts: Counter[tuple[int, str, str]] = Counter()
    for t in work:
        calm = t.active or t.state == "COMPLETED"
        rank = 0 if t.state == "RUNNING" else 1 if t.active else 2 if calm else 3
        counts[rank, t.state, t.reason if t.state == "PENDING" else ""] += 1
    words = []
    for (rank, state, reason), n in sorted(counts.items()):
        if rank < 3:
            never = ", will never start as it is" if reason in NEVER else ""
            words.append(f"{n} {state.lower()}" + (f" ({reason}{never})" if reason else ""))
            continue
        named = [t for t in work if t.state == state]
        where = [f"{t.job} on {t.node}" if t.node else t.job for t in named[:NAMED]]
        where += ["…"] if n > NAMED else []
        words.append(f"{n} {state} ({', '.join(where)})")
    again = sum(t.restarts for t in work)
    words += [f"{again} restart{'s' if again > 1 else ''}"] if again else []
    out = [f"tasks: {', '.join(words)}"] if words else []
    merges = [t for t in shown if t.merge and t.submission == newest]
    for t in merges:
        out.append(f"merge {t.job}: {t.state.lower()}" + (f" ({t.reason})" if t.reason else ""))
    return out
