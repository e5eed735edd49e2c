"""What `lsweep run` does: plan, evaluate with workers started here or by MPI, merge, show.

A run's children, which compute its measures, come after it, each by the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

import numpy as np

from lsweep.commands.making import (
    INCOMPLETE,
    INTERRUPTED,
    along_eigenvectors,
    otherwise,
    planned,
    planned_children,
    role_for,
    wanted_children,
)
from lsweep.errors import LsweepError, SickDevice
from lsweep.hosts.ranks import Rank, own_rank
from lsweep.hosts.requeue import another_turn, end_of_job
from lsweep.hosts.startup import CROWD, delay, turn
from lsweep.hosts.stopping import Stop, Stopped
from lsweep.storage.folder import RunFolder
from lsweep.wording import counted
from lsweep.working.role import Role

if TYPE_CHECKING:
    from lsweep.plans.children import Child
    from lsweep.plans.rounds import Rounds
    from lsweep.problems.problem import Problem
    from lsweep.runs.display import Display
    from lsweep.surfaces.surface import Surface


def do_run(options: Namespace) -> int:
    """Plan if needed, evaluate what is missing, merge, draw; the same for its children."""
    wanted = wanted_children(options)
    if options.on == "mpi":
        return _run_on_mpi(options, wanted)
    if options.device not in ("auto", "cpu"):  # refused before anything is made or waited for
        from lsweep.hosts.device import choose_device

        choose_device(options.device)
    folder, problem, plan = planned(options)
    if problem is not None:  # it was planned here
        _say_how_far(folder)
    children, problem = planned_children(folder, wanted, problem, options)
    code = _run_here(folder, problem, options, Look(not options.no_picture), plan)
    for child in children:
        if code == INTERRUPTED:
            return code
        try:
            code = max(code, _run_here(child, problem, options, CHILD))
        except LsweepError as e:  # what one of them cannot, the others may
            print(f"lsweep: {child.root.name}: {e}", file=sys.stderr)
            code = max(code, e.exit_code)
    then = getattr(options, "then", folder.root)  # of a study's runs, the last tells what is next
    if children and then:
        print(f"next: lsweep measure {then}")
    return code


def _say_how_far(folder: RunFolder) -> None:
    for axis, lines in along_eigenvectors(folder).items():
        for line in lines:
            print(f"{axis}: {line}")
    for line in otherwise(folder):
        print(line)


@dataclasses.dataclass(frozen=True)
class Look:
    """What is shown of a run at its end: a picture, and the centre and the minimum."""

    draw: bool
    values: bool = True


CHILD = Look(draw=False, values=False)  # 'lsweep measure' shows what it holds


def _run_here(folder: RunFolder, problem: Problem | None, options: Namespace, look: Look,
              plan: str = "") -> int:  # fmt: skip
    """Evaluate what is missing of a planned run on this machine, and merge.

    ``plan`` is the digest of a plan that may have been replaced since the problem was made for it.
    """
    from lsweep.outcomes.committed import read_run
    from lsweep.runs.display import Display

    _, rounds, committed = read_run(folder)
    done, total = committed.share
    code, interrupted, now = 0, False, rounds
    asked, beside = _asked(rounds)
    if committed.complete and beside:
        print(f"{folder.root}: {asked - beside} of {asked} computed points are on this grid and "
              "make surface.h5; the others stay, for a grid that has them")  # fmt: skip
    if not committed.complete:
        more = ", then more where the picture needs them" if rounds.refining else ""
        todo = f"{total - done} of {total} points to evaluate{more}"
        if done == total:
            todo = (
                f"all {total} points so far are evaluated; whether more are needed is decided now"
            )
        if beside:
            print(f"{folder.root}: {counted(beside, 'point')} of earlier grids are not on this one "
                  "(a count of 2n - 1 has all points of n)")  # fmt: skip
        print(f"{folder.root}: {todo}", flush=True)
        before = done
        with Stop(end_of_job()) as stop, Display(folder, total, done, sys.stderr) as display:
            code, interrupted = _evaluate(folder, options, problem, display, stop, plan)
        _, now, committed = read_run(folder)
        done, total = committed.share
    if interrupted:
        again = another_turn(stop.reason, done - before)
        if again:
            print(f"lsweep: {again}", file=sys.stderr)
        print(f"lsweep: interrupted with {done} of {total} points committed; the same command "
              "goes on", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    if code and not done:
        return code
    merged = _merge_and_show(folder, look)
    if now.last.grid != rounds.last.grid or _tolerance(now) != _tolerance(rounds):
        print(f"lsweep: {folder.root}: meanwhile another command asked for another grid or "
              "tolerance, and this is its surface; the same command again goes on with yours",
              file=sys.stderr)  # fmt: skip
        return INCOMPLETE
    return merged if committed.complete else (code or merged)


def _tolerance(rounds: Rounds) -> float | None:
    """Return what a refinement aims at; None where every point is asked for."""
    return rounds.last.refine.tolerance if rounds.last.refine else None


def _asked(rounds: Rounds) -> tuple[int, int]:
    """How many points were asked, and how many of them are not on the present grid."""
    if len(rounds.all) < 2 or all(r.lattice is rounds.last.lattice for r in rounds):
        return rounds.total, 0
    numbers = rounds.numbers_of(rounds.last.lattice)
    asked = np.unique(rounds.first_asked[rounds.required & (rounds.step < 0)])
    return len(asked), len(np.setdiff1d(asked, rounds.first_asked[numbers[numbers >= 0]]))


def _evaluate(
    folder: RunFolder,
    options: Namespace,
    problem: Problem | None,
    display: Display,
    stop: Stop,
    plan: str,
) -> tuple[int, bool]:
    if options.on == "inline" and (options.workers or 1) > 1:
        raise LsweepError(f"--on inline is one worker: leave out --workers {options.workers}")
    count = 1 if options.on == "inline" else options.workers
    if count is None:
        import torch

        from lsweep.working.launch import default_workers

        gpus = 0 if options.device == "cpu" else torch.cuda.device_count()
        count = default_workers(gpus, options.workers_per_gpu)
    role = role_for(options, Rank(job=own_rank().job), 1.0)
    display.started(count)
    if count == 1:
        from lsweep.working.worker import work

        try:
            work(folder, dataclasses.replace(role, plan=plan), problem, stop)
        except KeyboardInterrupt:
            return 0, True
        return 0, False
    from lsweep.working.launch import run_workers

    outcome = run_workers(folder, role, count, stop, on_event=display.say)
    return outcome.code, outcome.interrupted


def _run_on_mpi(options: Namespace, wanted: list[Child]) -> int:
    """Be one rank of several, or alone where no launcher is found."""
    from lsweep.runs.status import share_done
    from lsweep.working import together
    from lsweep.working.shift import STANDING_BY

    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    with Stop(end_of_job()) as stop:
        rank = own_rank(ask_mpi=True)
        folder, before = None, 0
        try:
            try:
                if options.workers is not None:
                    raise LsweepError("--on mpi starts no processes: leave out --workers, and give "
                                      f"mpiexec or srun -n {options.workers}")  # fmt: skip
                if not rank.source:
                    together.say("found no launcher (mpiexec, mpirun, srun): this is one worker "
                                 "alone")  # fmt: skip
                time.sleep(delay(rank.of))
                with turn(str(options.sweep.absolute())):
                    folder, problem, plan = planned(options)
                    say = print if rank.index == 0 else _silent
                    if problem is not None and rank.index == 0:
                        _say_how_far(folder)
                    children, problem = planned_children(folder, wanted, problem, options, say)
                # Someone looks at a live line.
                role = role_for(options, rank, 1.0 if rank.of <= CROWD else None)
                look, worst = Look(not options.no_picture), 0
                for target in (folder, *children):
                    folder = target
                    before = share_done(folder)[0]
                    role = dataclasses.replace(role, plan=plan if folder not in children else "")
                    work = functools.partial(_be_rank, folder, role, problem, stop,
                                             options.workers_per_gpu)  # fmt: skip
                    code = together.take_part(
                        folder, rank, rank.of * options.workers_per_gpu, work, stop,
                        may_leave=role.claims == "lease" and rank.of > STANDING_BY)  # fmt: skip
                    if code:
                        return max(code, worst)
                    if code is not None and together.is_closer(folder, rank, stop):
                        worst = max(worst, _merge_and_show(folder, look))
                    look = CHILD
                return worst
            except (LsweepError, OSError) as e:
                return together.refuse(rank, e, stop)
        except KeyboardInterrupt:
            if rank.index == 0 and folder is not None:
                done, total = share_done(folder)
                again = another_turn(stop.reason, done - before)
                together.say(again or f"interrupted with {done} of {total} points committed; the "
                             "same command goes on")  # fmt: skip
            return INTERRUPTED


def _be_rank(
    folder: RunFolder,
    role: Role,
    problem: Problem | None,
    stop: Stop,
    per_gpu: int,
    display: Display,
    pids: set[int],
) -> None:
    """Evaluate with this rank's workers: itself, or several on its device."""
    if per_gpu == 1:
        from lsweep.working.worker import work

        work(folder, role, problem, stop)
        return
    from lsweep.working.launch import run_workers

    outcome = run_workers(folder, role, per_gpu, stop, one_device=True, on_event=display.say,
                          on_refusal=lambda text: None)  # fmt: skip
    pids |= outcome.pids
    if outcome.interrupted:
        raise Stopped(stop.reason)
    if outcome.code:
        kind = SickDevice if outcome.code == SickDevice.exit_code else LsweepError
        raise kind(outcome.refusal or outcome.events[-1])


def _silent(text: str) -> None:
    """Say nothing: another rank does."""


def _hints(surface: Surface, name: str) -> list[str]:
    """Return what another grid would do better."""
    from lsweep.measures.from_surface import finite_within

    lacking = [a for a, x in sorted(surface.axes.items()) if x.min() < 0 < x.max() and 0 not in x]
    zeros = ", ".join(f"{a} = 0" for a in lacking)
    even = f"the grid does not contain {zeros}: odd counts of a symmetric range do"
    return [*filter(None, [finite_within(surface, name)]), *([even] if lacking else [])]


def _merge_and_show(folder: RunFolder, look: Look) -> int:
    from lsweep.measures.from_surface import guessed
    from lsweep.merging.merge import merge
    from lsweep.runs.display import stage
    from lsweep.runs.prune import forget_leases

    with stage("merging", sys.stderr):
        surface, report = merge(folder)
    for line in report.lines():
        print(f"lsweep: {line}", file=sys.stderr)
    if report.missing == report.points:
        return INCOMPLETE
    surface.save(folder.surface)
    name = surface.metrics[0]
    for hint in _hints(surface, name):
        print(f"lsweep: {hint}", file=sys.stderr)
    if look.values and np.isfinite(surface[name]).any():
        word, where, best = surface.best(name)
        at = ", ".join(f"{axis} = {offset:.4g}" for axis, offset in where.items())
        center = surface.center(name)
        fact = surface.provenance.get("sampling", {}).get(name, {})
        anchored = fact.get("shift") is not None
        over = f" (anchored to all {fact['of']} samples)" if anchored else ""
        middle = f"{center:.6g} at the centre{over}, " if np.isfinite(center) else ""
        guess = guessed(surface, name, where)
        print(f"{name}: {middle}{word} {best:.6g} at {at}" + (f" ({guess})" if guess else ""))
    print(f"wrote {folder.surface}")
    with stage("removing leases", sys.stderr):
        forget_leases(folder)
    if look.draw:
        from lsweep.pictures.cells import which_plane
        from lsweep.pictures.drawing import draw_run

        with stage("drawing", sys.stderr):
            picture = draw_run(surface, folder)
        print(f"wrote {picture}{which_plane(surface)}")
    return 0 if report.clean else INCOMPLETE
