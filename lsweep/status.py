"""Status: what is done, missing and failed, and who works; from the files alone, on any node."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np

from lsweep.committed import read_run
from lsweep.display import duration, speed
from lsweep.folder import RunFolder
from lsweep.insist import there
from lsweep.merge import damage
from lsweep.parts import Kind
from lsweep.surface import Status
from lsweep.workers import Observer, State, Verdict, all_workers


def status(folder: RunFolder) -> dict[str, Any]:
    """Return the state of a run as plain values, ready for JSON.

    Raises:
        LsweepError: this is no run.
        DamagedFile: its plan or a round was altered.
    """
    plan, rounds, committed = read_run(folder)
    reasons: dict[tuple[int, int], str] = {}
    succeeded: set[tuple[int, int]] = set()  # of those that failed and were asked again
    nonfinite = 0
    for part in committed.parts:
        values = part.rows[part.rows["kind"] == Kind.VALUE]
        values = values[values["point"] < rounds.total]
        nonfinite += int((values["status"] == Status.NONFINITE).sum())
        first = rounds.first_asked[values["point"].astype(np.int64)]
        for point, row in zip(first, values, strict=True) if rounds.asked_again else ():
            if row["status"] != Status.FAILED:
                succeeded.add((int(point), int(row["slice"])))
        bad = values["status"] == Status.FAILED
        for point, row in zip(first[bad], values[bad], strict=True):
            reasons[int(point), int(row["slice"])] = part.reason(row)
    failed = Counter(reason for key, reason in reasons.items() if key not in succeeded)
    observer = Observer(folder)
    workers = []
    for w in all_workers(folder):
        alive = w["state"] == State.WORKING and observer.verdict(w["worker"]) is Verdict.ALIVE
        state = w["state"] if w["state"] != State.WORKING or alive else "dead"
        rate = w["points"] / w["busy"] if w["busy"] else 0.0
        workers.append(
            {
                "worker": w["worker"],
                "host": w["host"],
                "state": str(state),
                "points": w["points"],
                "rate": rate,
                "message": w["message"],
            }
        )
    done = int(committed.done.sum())
    total = int(committed.done.size)
    rate = sum(w["rate"] for w in workers if w["state"] == State.WORKING)
    last = max((w["now"] for w in all_workers(folder)), default=None)
    return {
        "run": str(folder.root),
        "plan": plan.digest,
        "rounds": len(rounds.all),
        "grid": {a: list(v) for a, v in rounds.last.grid.items()},
        "points": total,
        "done": done,
        "missing": total - done,
        "nonfinite": nonfinite,
        "failed": dict(failed),
        "interpolated": 0,
        "rate": rate,
        "eta": (total - done) / rate if rate else None,
        "workers": workers,
        "damaged": damage(committed.parts),
        "merged": there(folder.surface),
        "last_beat": time.time() - last if last is not None else None,
    }


def lines(state: dict[str, Any]) -> list[str]:
    """Return the state for people, one line a fact."""
    grid = " x ".join(str(v[2]) for _, v in sorted(state["grid"].items()))
    out = [
        f"{state['run']}: {state['done']}/{state['points']} points done "
        f"({state['done'] / max(1, state['points']):.0%}), grid {grid}, "
        f"{state['rounds']} round{'s' if state['rounds'] > 1 else ''}"
    ]
    if state["nonfinite"]:
        out.append(f"  {state['nonfinite']} NaN or infinite")
    out += [f"  {n} failed: {reason}" for reason, n in state["failed"].items()]
    out += [f"  {name}: {what}" for name, what in state["damaged"].items()]
    counts = Counter(w["state"] for w in state["workers"])
    if counts:
        out.append("  workers: " + ", ".join(f"{n} {s}" for s, n in sorted(counts.items())))
    for w in state["workers"]:
        if w["message"] and w["state"] in (State.SICK, State.FAILED):
            out.append(f"  {w['worker']}: {w['message']}")
    if state["eta"] is not None and state["missing"]:
        out.append(f"  {speed(state['rate'])}, {duration(state['eta'])} left")
    if state["missing"] and not counts.get("working"):
        out.append(f"  nobody works on it: 'lsweep run {state['run']}' computes what is missing")
    if not state["missing"]:
        out.append("  complete" + (", merged" if state["merged"] else ": 'lsweep merge' it"))
    return out


def share_done(folder: RunFolder) -> tuple[int, int]:
    """Return (done, total) points times slices of a run."""
    _, _, committed = read_run(folder)
    done = committed.done
    return int(np.count_nonzero(done)), int(done.size)
