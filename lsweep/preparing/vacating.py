"""Vacating: a plan of which nothing was computed makes room for another on the same folder."""

from __future__ import annotations

import contextlib

from lsweep.storage.folder import RunFolder
from lsweep.storage.holding import alone
from lsweep.storage.workers import Observer, State, Verdict, all_workers


def vacate(folder: RunFolder) -> bool:
    """Remove a run's plan and what was published for it; False where anything would be lost.

    That is: a part, a surface, a child run, a submission that waits for its turn, or somebody at
    work. Stored arrays stay, they are named by what they hold. The plan goes last: who is killed
    before leaves a run whose planning can go on.
    """
    with alone(folder.plan) as mine:
        if not mine or _is_used(folder):
            return False
        rounds = sorted(folder.rounds.glob("[0-9]*.json"), reverse=True)
        leases = [p for p in folder.leases.rglob("*") if p.is_file()]
        notes = [folder.source, folder.settings, folder.directions, folder.invariance]
        for path in (*rounds, *leases, *folder.all_devices(), *folder.all_workers(), *notes):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.measures.rmdir()
        folder.plan.unlink()
    return True


def _is_used(folder: RunFolder) -> bool:
    if folder.all_parts() or folder.all_submissions() or folder.all_children():
        return True
    if folder.surface.exists() or folder.measured.exists():
        return True
    observer = Observer(folder)
    working = [w["worker"] for w in all_workers(folder) if w["state"] == State.WORKING]
    return any(observer.verdict(w) is Verdict.ALIVE for w in working)
