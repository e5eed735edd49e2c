"""What `lsweep submit` does, from its options to its exit code: check, submit, tell, wait."""

from __future__ import annotations

import shlex
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from lsweep.commands.making import (
    INCOMPLETE,
    INTERRUPTED,
    planned,
    planned_children,
    run_of,
    wanted_children,
)
from lsweep.errors import LsweepError
from lsweep.hosts.machine import refuse_foreign
from lsweep.plans.study import through
from lsweep.slurm.submission import Options, Submission, remember
from lsweep.storage.folder import RunFolder
from lsweep.wording import counted

if TYPE_CHECKING:
    from lsweep.slurm.limits import Site

LOOKS = (1.0, 15.0)  # seconds between looks at the queue, first and last


def do_submit(options: Namespace) -> int:
    """Submit an array of workers and a merge: of a run or a study's runs, and of their children."""
    jobs: list[tuple[RunFolder, Submission]] = []

    def submit_run(one: Namespace) -> int:
        jobs.extend(_submit_run(one))
        return 0

    code = through(submit_run)(options)
    # All are in the queue before the first is waited for.
    return max([code, *(wait(*job) for job in jobs if options.wait)])


def _submit_run(options: Namespace) -> list[tuple[RunFolder, Submission]]:
    from lsweep.slurm.submit import NoAnswer, check, require_slurm

    measures = wanted_children(options)
    folder = run_of(options)
    wanted = _options(folder, options)
    site: Site | None = None
    try:
        site = require_slurm()
    except NoAnswer as e:
        if not options.dry_run:
            raise
        print(f"# {e}, and neither the site's limits nor what sbatch says were checked")
    limit = check(site, wanted)
    children: list[RunFolder] = []
    if not options.dry_run:
        folder, problem, _ = planned(options)
        children, _ = planned_children(folder, measures, problem, options)
    jobs = [_submit(folder, wanted, site, limit, options)]
    if options.dry_run and measures:
        print(f"# and as much again for each of: {', '.join(c.name for c in measures)}")
    for child in children:
        own = _options(child, options, wanted)
        jobs.append(_submit(child, own, site, check(site, own), options))
    return [job for job in jobs if job]


def _submit(
    folder: RunFolder, wanted: Options, site: Site | None, limit: float | None, options: Namespace
) -> tuple[RunFolder, Submission] | None:
    """Submit one run, unless nothing of it is missing or this is only to show how."""
    from lsweep.slurm.submit import Order, objection, scripts, submit

    most, why = (site.array, f"MaxArraySize allows {site.array}") if site else (wanted.tasks, "")
    if folder.exists:
        points, leases = work_left(folder)
        if not points:
            _complete(folder)
            return None
        if -(-leases // wanted.ranks) < most:
            most, why = -(-leases // wanted.ranks), "there is no more work"
    order = Order(folder, wanted, min(wanted.tasks, most), limit, options.trust)
    if order.count < wanted.tasks:
        print(f"{counted(order.count, 'task')} instead of {wanted.tasks}: {why}")
    array, merge = scripts(order)
    doubt = objection(array) if site else ""
    if options.dry_run:
        print(f"sbatch <<'ARRAY'\n{array}ARRAY\n")
        print(f"# each task becomes: {shlex.join(order.work)}\n")
        print(f"sbatch <<'MERGE'\n{merge}MERGE\n")
        print(f"# which becomes: {shlex.join(order.merge)}")
        if doubt:
            print(f"# Slurm says: {doubt}")
        return None
    _tell_of_others(folder)
    receipt = submit(order)
    from lsweep.plans.plan import Plan

    submission = remember(
        folder, Plan.read(folder).digest, wanted, receipt.array, order.count, receipt.merge,
        receipt.logs,
    )  # fmt: skip
    if doubt:
        _say(f"Slurm says: {doubt}; the tasks wait until that changes")
    if receipt.refusal:
        _say(f"no merge after it ({receipt.refusal}): 'lsweep merge {folder.root}' when it is done")
    jobs = " ".join(j for j in (submission.array, submission.merge) if j)
    tasks, workers = counted(order.count, "task"), counted(wanted.ranks, "worker")
    print(f"array {submission.array}: {tasks} of {workers}"
          + (f"; merge {submission.merge} after it" if submission.merge else ""))  # fmt: skip
    print(f"  look:   lsweep status {folder.root} --watch")
    print(f"  logs:   {folder.slurm_logs(submission.logs)}")
    print(f"  cancel: scancel {jobs}")
    print(f"  again:  lsweep submit {folder.root}, whatever happened to it", flush=True)
    return folder, submission


def _options(folder: RunFolder, options: Namespace, usual: Options | None = None) -> Options:
    """Return what was asked for, else what the run remembers, else what is usual."""
    before = Submission.all(folder)
    if before:  # their lines would run as this user
        refuse_foreign(folder.submission(before[-1].number), options.trust)
    wanted = (before[-1].options if before else usual or Options()).changed(vars(options))
    if not wanted.tasks:
        raise LsweepError("--tasks N is missing: how many tasks? The run remembers it")
    return wanted


def _say(text: str) -> None:
    print(f"lsweep: {text}", file=sys.stderr)


def work_left(folder: RunFolder) -> tuple[int, int]:
    """Return how many points (times slices) are missing, and in how many leases they lie.

    No more workers than leases can have something to do; while a refinement is open, it may be
    all points of the grid.
    """
    from lsweep.outcomes.committed import read_run

    _, rounds, committed = read_run(folder)
    leases = sum(int((committed.first_missing(r) >= 0).sum()) for r in rounds)
    done, total = committed.share
    if rounds.refining:
        whole = len(rounds.last.lattice) * rounds.plan.slices
        return whole - done, whole - done
    return total - done, leases


def _complete(folder: RunFolder) -> None:
    merged = folder.surface.is_file()
    print(f"{folder.root} is complete, nothing was submitted"
          + ("" if merged else f"; 'lsweep merge {folder.root}' it"))  # fmt: skip


def _tell_of_others(folder: RunFolder) -> None:
    from lsweep.slurm.tasks import queue

    mine = {job: s for s in Submission.all(folder) for job in s.tasks}
    if not mine:
        return
    active = [t for job, t in queue().items() if job in mine and t.active]
    for array in sorted({mine[t.job].array for t in active}):
        n = sum(mine[t.job].array == array for t in active)
        _say(f"array {array} of this run still has {counted(n, 'task')}; both at once is harmless")


def wait(folder: RunFolder, submission: Submission) -> int:
    """Wait until an array and its merge are over; return the exit code that the run deserves."""
    from lsweep.runs.display import Display
    from lsweep.runs.status import lines as status_lines
    from lsweep.runs.status import share_done, status
    from lsweep.slurm.tasks import NEVER, queue

    done, total = share_done(folder)
    jobs = {*submission.tasks, submission.merge}
    said: set[str] = set()
    try:
        with Display(folder, total, done, sys.stderr) as display:

            def once(text: str) -> None:
                if text not in said:
                    said.add(text)
                    display.say(f"lsweep: {text}")

            nap = LOOKS[0]
            while True:
                try:
                    active = [t for job, t in queue().items() if job in jobs and t.active]
                except LsweepError as e:
                    once(f"{e}; waiting all the same")
                else:
                    if not active:
                        break
                    for reason in {t.reason for t in active if t.state == "PENDING"} & NEVER:
                        once(f"tasks that will never start as it is: {reason}")
                time.sleep(nap)
                nap = min(LOOKS[1], 1.2 * nap)
    except KeyboardInterrupt:
        ids = " ".join(j for j in (submission.array, submission.merge) if j)
        _say(f"no longer waiting; the jobs go on. 'scancel {ids}' ends them")
        return INTERRUPTED
    state = status(folder)
    print("\n".join(status_lines(state)))
    return INCOMPLETE if state["missing"] or state["failed"] or not state["merged"] else 0
