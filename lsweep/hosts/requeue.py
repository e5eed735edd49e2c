"""Requeue: when the Slurm job around this process ends, why it was told to, and another turn.

Slurm requeues a preempted job by itself only if it is killed: one that ends in order within its
grace time counts as timed out, and where the site cancels what it preempts nothing comes back. So a
worker that was stopped by a time limit or a preemption asks for another turn itself, but not when
a person cancelled the job, nor for ever, nor when this turn brought nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from datetime import datetime

MOST_TURNS = 10
PATIENCE = 20.0  # seconds for an answer of scontrol


def end_of_job(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return when the enclosing Slurm job reaches its time limit, in seconds since the epoch.

    None outside Slurm, without a limit, and where Slurm does not answer.

    >>> end_of_job({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1795435200"})
    1795435200.0
    >>> end_of_job({}) is None
    True
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    told = environment.get("SLURM_JOB_END_TIME", "")  # Slurm 23.02 and newer
    if told.isdigit():
        return float(told)
    end = _asked(_number(environment)).get("EndTime", "")
    try:
        return datetime.fromisoformat(end).timestamp()
    except ValueError:  # Unknown
        return None


def another_turn(
    reason: str, committed: int, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Requeue the enclosing Slurm job if that is right; return what was done, for people.

    Args:
        reason: what stopped this process: a signal's name, or ``the time limit``.
        committed: how many points this incarnation committed.
        environment: where ``SLURM_JOB_ID`` and ``SLURM_RESTART_COUNT`` are.

    Returns:
        One line; None outside Slurm, or when the job is not ours to requeue.

    >>> another_turn("the time limit", 5, {}) is None
    True
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    number = _number(environment)
    turns = int(environment.get("SLURM_RESTART_COUNT") or 0)
    if reason == "SIGINT" or (reason == "SIGTERM" and not _is_told_by_slurm(_asked(number))):
        return None
    if not committed:
        return (
            f"job {number}: {reason}, and no unit was finished in this turn: not requeued; ask for "
            "more time, or smaller units (--unit-points)"
        )
    if turns >= MOST_TURNS:
        return f"job {number}: {reason}, after {turns} turns: not requeued again"
    done = _scontrol("requeue", number)
    if done is None or done.returncode:
        why = " ".join(done.stderr.split()) if done else "scontrol does not answer"
        return f"job {number}: {reason}; not requeued: {why}"
    return f"job {number}: {reason}; requeued for turn {turns + 2}"


def _is_told_by_slurm(job: Mapping[str, str]) -> bool:
    """True for a preemption and a time limit; not for scancel, nor for a requeue by others."""
    preempted = job.get("PreemptTime", "None") not in ("None", "Unknown", "")
    return preempted or job.get("Reason") == "TimeLimit"


def _number(environment: Mapping[str, str]) -> str:
    # The last task of an array to start has the array's own id: that would requeue all of them.
    array = environment.get("SLURM_ARRAY_JOB_ID")
    if array:
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _asked(number: str) -> dict[str, str]:
    done = _scontrol("show", "job", "-o", number)
    words = done.stdout.split() if done and not done.returncode else []
    return dict(w.split("=", 1) for w in words if "=" in w)


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
