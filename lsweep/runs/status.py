"""Status: what is done, missing and failed, and who works; from the files alone, on any node."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections import Counter
from typing import Any

import numpy as np

from lsweep.errors import LsweepError
from lsweep.outcomes.audits import Audits, audit_lines, audited_variables
from lsweep.outcomes.committed import Committed, read_run
from lsweep.outcomes.frozen import audit_tolerances, frozen
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Goal, Refining, Rounds, describe_refining
from lsweep.refinement.audit import contradictions, phrase
from lsweep.runs.display import dropped, duration, speed
from lsweep.slurm import tasks as slurm
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there
from lsweep.storage.workers import (
    Observer,
    State,
    Verdict,
    all_workers,
    at_one_unit,
    patience,
)
from lsweep.surfaces.surface import Status
from lsweep.wording import counted

DEAD = "dead"
SLOW = 2.0  # times the seconds per point that are usual among the others
LATE, BEATS_LATE = 30.0, 3.0  # seconds, and times its own interval, without a beat
FROZEN = ("device", "backend", "precision", "batch_sizes", "error", "seconds_per_point")
MOST_NAMED = 20  # workers that are not well, one line each


class Overview:
    """The state of a run, again and again; a second look reads only what is new.

    Args:
        folder: the run.

    Raises:
        LsweepError: this is no run.
        DamagedFile: its plan or a round was altered.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._plan = folder, Plan.read(folder)
        self._rounds = Rounds.read(folder, self._plan)
        self._committed = Committed(folder, self._plan, self._rounds)
        self._audited = audited_variables(self._plan)
        self._observer = Observer(folder)
        self._audits = Audits(self._rounds.last.unit_points)

    def look(self) -> dict[str, Any]:
        """Return the state as plain values, ready for JSON."""
        rounds = Rounds.read(self._folder, self._plan)
        self._audits.unit = max(r.unit_points for r in rounds.all)
        for reader, _, rows in self._committed.news(rounds):
            self._audits.add(reader.path.name, rows)
        outcome, reason = (a[rounds.required] for a in self._committed.standing())
        texts = self._committed.reasons
        codes = reason[np.nonzero(outcome == Status.FAILED)[0]]
        failed = {texts[c]: int((codes == c).sum()) for c in np.unique(codes).tolist()}
        done, total = self._committed.share
        refine = rounds.last.refine
        workers, beat = worker_states(self._folder, self._observer)
        rate = sum(w["rate"] for w in workers if w["state"] == State.WORKING)
        merged = there(self._folder.surface)
        tasks, silent = slurm.told(self._folder)
        damaged = self._committed.damage
        classes = frozen(self._folder, self._plan, damaged)
        allowed = functools.partial(audit_tolerances, self._plan, classes)
        return {
            "run": str(self._folder.root),
            "plan": self._plan.digest,
            "rounds": len(rounds.all),
            "grid": {a: list(v) for a, v in rounds.last.grid.items()},
            "points": total,
            "done": done,
            "missing": total - done,
            "nonfinite": int(np.count_nonzero(outcome == Status.NONFINITE)),
            "failed": failed,
            "interpolated": _interpolated(rounds),
            "refine": dataclasses.asdict(refine) if refine else None,
            "complete": self._committed.complete,
            "rate": rate,
            "eta": (total - done) / rate if rate else None,
            "workers": workers,
            "tasks": tasks,
            "slurm": silent,
            "devices": {
                c: {**{k: d.get(k) for k in FROZEN}, "dropped": dropped(d)}
                for c, d in classes.items()
            },
            "audit": self._audits.compared(self._audited, allowed),
            "damaged": damaged,
            "merged": merged,
            "children": _children(self._folder),
            "last_beat": beat,
        }


def _interpolated(rounds: Rounds) -> int:
    """How many points of the grid a finished refinement has left out."""
    refine = rounds.last.refine
    if refine is None or refine.state != Goal.DONE:
        return 0
    numbers = rounds.numbers_of(rounds.last.lattice)
    return int(((numbers < 0) | ~rounds.required[numbers]).sum())


def _children(folder: RunFolder) -> list[dict[str, Any]]:
    """How far each child run is."""
    out = []
    for name in folder.all_children():
        try:
            committed = read_run(folder.child(name))[2]
        except LsweepError as e:
            out.append({"name": name, "done": 0, "points": 0, "complete": False, "damage": str(e)})
            continue
        done, total = committed.share
        complete = committed.complete
        out.append({"name": name, "done": done, "points": total, "complete": complete})
    return out


def status(folder: RunFolder) -> dict[str, Any]:
    """Return the state of a run as plain values, ready for JSON.

    Raises:
        LsweepError: this is no run.
        DamagedFile: its plan or a round was altered.
    """
    return Overview(folder).look()


def worker_states(
    folder: RunFolder, observer: Observer
) -> tuple[list[dict[str, Any]], float | None]:
    """Return what became of each worker, and how many seconds ago the last of them was heard.

    One that stopped without a word is dead; ``slow`` says why one that works is thought slow.
    """
    all_facts, now = all_workers(folder), time.time()
    workers = []
    for w in all_facts:
        age = now - w["now"]
        state = str(w["state"])
        if state == State.WORKING and not _is_alive(w, age, observer):
            state = DEAD
        workers.append(
            {
                "worker": w["worker"],
                "host": w["host"],
                "job": w.get("job", ""),
                "state": state,
                "slow": _late(w, age) if state == State.WORKING else "",
                "points": w["points"],
                "rate": w["points"] / w["busy"] if w["busy"] else 0.0,
                "age": age,
                "message": w["message"],
            }
        )
    working = [w for w in workers if w["state"] == State.WORKING and w["rate"]]
    rates = sorted(w["rate"] for w in working)
    if len(rates) > 1:
        usual = statistics.median(rates[1:])  # of the others, for any that may be slow
        for w in working:
            if w["rate"] * SLOW < usual and not w["slow"]:
                times = usual / w["rate"]
                w["slow"] = f"{times:.1f} times the others' seconds per point"
    return workers, min((w["age"] for w in workers), default=None)


def _is_alive(facts: dict[str, Any], age: float, observer: Observer) -> bool:
    # Who looks once has nothing to compare a beat with: the clocks of two nodes have to do.
    alive = observer.verdict(facts["worker"]) is Verdict.ALIVE
    return alive and age <= patience(facts["longest"])


def _late(facts: dict[str, Any], age: float) -> str:
    usual = (facts["now"] - facts["since"]) / max(1, facts["beat"] - 1)
    longest = float(facts["longest"])
    most = patience(longest)
    if age > max(LATE, BEATS_LATE * usual):
        return f"last heard {duration(age)} ago, after {duration(most)} its units are free"
    lasts = at_one_unit(facts, facts["now"])
    if lasts <= most:
        return ""
    job = str(facts.get("job", "")).partition(".")[0]
    how = f"'scancel {job}'" if job else f"'kill -9 {facts['pid']}' on {facts['host']}"
    known = f", its longest took {duration(longest)}" if longest else ""
    return f"at one unit for {duration(lasts)}{known}: it may hang, {how} frees its units"


def lines(state: dict[str, Any]) -> list[str]:
    """Return the state for people, one line a fact."""
    return [*_progress(state), *_computed(state), *_hands(state["workers"]), *_tasks(state),
            *_ahead(state), *_measures(state)]  # fmt: skip


def _progress(state: dict[str, Any]) -> list[str]:
    grid = " x ".join(str(v[2]) for _, v in sorted(state["grid"].items()))
    out = [
        f"{state['run']}: {state['done']}/{state['points']} points done "
        f"({state['done'] / max(1, state['points']):.0%}), grid {grid}, "
        f"{counted(state['rounds'], 'round')}"
    ]
    if state["nonfinite"]:
        out.append(f"  {state['nonfinite']} NaN or infinite")
    if state["refine"]:
        refine = Refining(**state["refine"])
        if refine.state == Goal.DONE and state["complete"] and not state["interpolated"]:
            why = "none was left to interpolate"
            refine = dataclasses.replace(refine, state=Goal.DENSE, why=why)
        out.append(f"  refinement: {describe_refining(refine)}")
        out += [
            f"  {line}" for line in (phrase(refine.audit), *contradictions(refine.audit)) if line
        ]
    if state["interpolated"]:
        out.append(f"  {state['interpolated']} {'' if state['merged'] else 'to be '}interpolated")
    out += [f"  {n} failed: {reason}" for reason, n in state["failed"].items()]
    out += [f"  {name}: {what}" for name, what in state["damaged"].items()]
    return out


def _computed(state: dict[str, Any]) -> list[str]:
    """One line for what each device class computes with, and one for how far off that was."""
    out = []
    for name, frozen_ in state["devices"].items():
        sizes = ", ".join(f"{n} {split}" for split, n in frozen_["batch_sizes"].items())
        what = f"{frozen_['backend']} in {frozen_['precision']}"
        out.append(f"  {name}: {what}, batches of {sizes}")
        out += [f"    {frozen_['dropped']}"] if frozen_["dropped"] else []
    audit = state["audit"]
    alone = all(d["backend"] == "eager" for d in state["devices"].values())
    if audit.get("points") and not (
        alone and audit["largest_relative"] == 0
    ):  # eager against itself
        out.append(
            f"  backend check: {counted(int(audit['points']), 'value')} evaluated again by eager, "
            f"off by up to {audit['largest_relative']:.1e} (relative)"
        )
    return out + [f"  {line}" for line in audit_lines(audit)]


def _hands(workers: list[dict[str, Any]]) -> list[str]:
    """One line for all workers, and one for each that is not well."""
    if not workers:
        return []
    counts = Counter(w["state"] for w in workers)
    slow = sum(bool(w["slow"]) for w in workers)
    words = {s: f"{n} {s}" for s, n in sorted(counts.items())}
    if slow:
        words[State.WORKING] += f" ({slow} slow)"
    out = ["  workers: " + ", ".join(words.values())]
    unwell = [w for w in workers if w["slow"] or w["state"] in (DEAD, State.SICK, State.FAILED)]
    for w in unwell[:MOST_NAMED]:
        job = f", job {w['job']}" if w["job"] else ""
        why = w["slow"] or w["message"]
        if w["state"] == DEAD:
            why = f"last heard {duration(w['age'])} ago"
        state = "slow" if w["slow"] else w["state"]
        out.append(f"  {w['worker']} on {w['host']}{job}: {state}{f': {why}' if why else ''}")
    if len(unwell) > MOST_NAMED:
        out.append(f"  and {len(unwell) - MOST_NAMED} more; --json has all")
    return out


def _tasks(state: dict[str, Any]) -> list[str]:
    """What Slurm says of the tasks, or why it says nothing."""
    told = slurm.lines([slurm.Task(**t) for t in state["tasks"]])
    return [f"  {line}" for line in (*told, *filter(None, [state["slurm"]]))]


def _ahead(state: dict[str, Any]) -> list[str]:
    out = []
    if state["eta"] is not None and state["missing"]:
        out.append(f"  {speed(state['rate'])}, {duration(state['eta'])} left")
    works = any(w["state"] == State.WORKING for w in state["workers"])
    works |= any(slurm.Task(**t).active for t in state["tasks"])
    if not state["complete"] and not works:
        out.append(f"  nobody works on it: 'lsweep run {state['run']}' computes what is missing")
    if state["complete"]:
        out.append("  complete" + (", merged" if state["merged"] else ": 'lsweep merge' it"))
    return out


def _measures(state: dict[str, Any]) -> list[str]:
    """One line for each child run."""
    out = []
    for child in state["children"]:
        words = "complete" if child["complete"] else (
            f"{child['done']}/{child['points']} points: "
            f"'lsweep run {state['run']} --measures {child['name']}'"
        )  # fmt: skip
        out.append(f"  measure {child['name']}: {child.get('damage') or words}")
    return out


def share_done(folder: RunFolder) -> tuple[int, int]:
    """Return (done, total) points times slices of a run, as far as they have been asked."""
    return read_run(folder)[2].share


def is_complete(folder: RunFolder) -> bool:
    """Return whether nothing is missing, and no later round will ask for more."""
    return read_run(folder)[2].complete
