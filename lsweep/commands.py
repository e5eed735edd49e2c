"""What each command that makes or works on a run does, from its options to its exit code.

Torch is imported by the commands that compute, not before; arguments are those of `lsweep.cli`.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

import numpy as np

from lsweep.errors import LsweepError
from lsweep.folder import RunFolder
from lsweep.machine import refuse_foreign
from lsweep.requeue import another_turn, end_of_job
from lsweep.stopping import Stop, Stopped

if TYPE_CHECKING:
    from lsweep.display import Display
    from lsweep.problem import Problem

INTERRUPTED, INCOMPLETE = 130, 3
SIZES = {"sums": 64, "row": 40}


def _folder(options: Namespace) -> RunFolder:
    if options.run is not None:
        return RunFolder(options.run)
    if options.sweep.is_dir():
        return RunFolder(options.sweep)
    return RunFolder(options.sweep.with_name(f"{options.sweep.stem}.run"))


def _plan(options: Namespace) -> tuple[RunFolder, Problem | None]:
    """Freeze the plan of a TOML, or take the run as it is; ask again for what failed.

    Returns the problem too where it had to be made, so that this process need not make it twice.
    """
    from lsweep.plan import Plan

    folder = _folder(options)
    problem = None
    if folder.exists:
        refuse_foreign(folder.plan, options.trust)
    if options.sweep.is_dir() or (folder.exists and not options.sweep.exists()):
        if options.overrides:
            raise LsweepError(f"--set changes a sweep.toml; {options.sweep} is a run, frozen")
        Plan.read(folder)
    else:
        from lsweep.settings import Settings

        settings = Settings.from_file(options.sweep, tuple(options.overrides))
        refuse_foreign(options.sweep, options.trust)  # it names the code that is imported
        from lsweep.planning import plan_run
        from lsweep.problem import make_problem

        base = options.sweep.absolute().parent
        problem = make_problem(settings.problem, base, trust=options.trust)
        text = options.sweep.read_text(encoding="utf-8")
        if options.overrides:
            text += "".join(f"\n# --set {o}" for o in options.overrides) + "\n"
        plan_run(settings, problem, base, folder, text=text, unit_points=options.unit_points)
    if options.retry_failed:
        from lsweep.merge import failed_points
        from lsweep.rounds import ask_again

        ask_again(folder, failed_points(folder))
    return folder, problem


def do_plan(options: Namespace) -> int:
    """Freeze the plan, publish the first round, print cost and promises."""
    from lsweep.plan import Plan
    from lsweep.rounds import Rounds

    folder, _ = _plan(options)

    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    row = SIZES["row"] + SIZES["sums"] * len(plan.variables)
    last = rounds.last
    units = sum(r.units(plan.slices) for r in rounds)
    leases = sum(r.leases(plan.slices) for r in rounds)
    samples = sum(d["samples"] or 0 for d in plan.data.values())
    grid = " x ".join(str(c) for _, (_, _, c) in sorted(last.grid.items()))
    print(f"{folder.root}: plan {plan.digest[:12]}, grid {grid}, {rounds.total} points in "
          f"{len(rounds.all)} rounds")  # fmt: skip
    print(f"  each point: {samples or 'all'} samples in {', '.join(plan.evaluate['splits'])}; "
          f"metrics {', '.join(plan.evaluate['metrics'])}")  # fmt: skip
    print(f"  {units} units of {last.unit_points} points, {leases} leases; {plan.slices} slices")
    print(f"  on disk: about {rounds.total * row * plan.slices / 2**20:.1f} MiB of rows, at most "
          f"{leases + 20} files and 2 more a worker")  # fmt: skip
    for axis in plan.axes:
        facts = plan.facts["axes"][axis]
        print(f"  {axis}: norm {facts['norm']:.4g}, {facts['zero_filters']} filters of norm zero, "
              f"{len(facts['ignored'])} tensors held still"
              + (f": {', '.join(facts['ignored'])}" if facts["ignored"] else ""))  # fmt: skip
    for i, a in enumerate(plan.axes):
        for j, b in enumerate(plan.axes[:i]):
            print(f"  cos({b}, {a}) = {plan.facts['cosines'][j][i]:+.4f}")
    print("  a kill -9 at any moment loses at most the unit in flight; a node's crash at most the "
          "last second")  # fmt: skip
    print(f"  next: lsweep run {folder.root}")
    return 0


def do_run(options: Namespace) -> int:
    """Plan if needed, evaluate what is missing, merge, draw."""
    from lsweep.display import Display
    from lsweep.status import share_done

    if options.on == "mpi":
        raise LsweepError("--on mpi is not built yet: start 'lsweep work RUN --index I --of N'")
    folder, problem = _plan(options)
    done, total = share_done(folder)
    code, interrupted = 0, False
    if done < total:
        print(f"{folder.root}: {total - done} of {total} points to evaluate", flush=True)
        with Display(folder, total, done, sys.stderr) as display:
            code, interrupted = _evaluate(folder, options, problem, display)
        done, total = share_done(folder)
    if interrupted:
        print(f"lsweep: interrupted with {done} of {total} points committed; the same command "
              "goes on", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    if code and not done:
        return code
    merged = _merge_and_draw(folder, draw=not options.no_picture)
    return (code or merged) if done < total else merged


def _evaluate(
    folder: RunFolder, options: Namespace, problem: Problem | None, display: Display
) -> tuple[int, bool]:
    if options.on == "inline" and (options.workers or 1) > 1:
        raise LsweepError(f"--on inline is one worker: leave out --workers {options.workers}")
    count = 1 if options.on == "inline" else options.workers
    if count is None:
        import torch

        from lsweep.launch import default_workers

        count = default_workers(0 if options.device == "cpu" else torch.cuda.device_count())
    if count == 1:
        from lsweep.role import Role
        from lsweep.worker import work

        role = Role(device=options.device, threads=options.threads, claims=options.claims,
                    beat=1.0, trust=options.trust)  # fmt: skip
        try:
            with Stop(end_of_job()) as stop:
                work(folder, role, problem, stop)
        except KeyboardInterrupt:
            return 0, True
        return 0, False
    from lsweep.launch import run_workers

    outcome = run_workers(folder, count, device=options.device, threads=options.threads,
                          claims=options.claims, trust=options.trust,
                          on_event=display.say)  # fmt: skip
    return outcome.code, outcome.interrupted


def _merge_and_draw(folder: RunFolder, draw: bool) -> int:
    from lsweep.merge import merge

    surface, report = merge(folder)
    for line in report.lines():
        print(f"lsweep: {line}", file=sys.stderr)
    if report.missing == report.points:
        return INCOMPLETE
    surface.save(folder.surface)
    name = surface.metrics[0]
    if np.isfinite(surface[name]).any():
        where, least = surface.minimum(name)
        at = ", ".join(f"{axis} = {offset:.4g}" for axis, offset in where.items())
        center = surface.center(name)
        middle = f"{center:.6g} at the centre, " if np.isfinite(center) else ""
        print(f"{name}: {middle}minimum {least:.6g} at {at}")
    print(f"wrote {folder.surface}")
    if draw:
        from lsweep.pictures import render

        folder.figures.mkdir(exist_ok=True)
        picture = folder.figures / f"{name}.png"
        render(surface, picture)
        print(f"wrote {picture}")
    return 0 if report.clean else INCOMPLETE


def do_work(options: Namespace) -> int:
    """Be one worker."""
    # One thread must be asked for before torch is imported.
    if options.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    with Stop(end_of_job(), options.parent) as stop:  # before torch is imported, which takes long
        from lsweep.role import Role
        from lsweep.worker import work

        local = options.index if options.local is None else options.local
        role = Role(options.index, options.of, local, options.device, options.threads,
                    options.claims, options.beat, options.trust)  # fmt: skip
        try:
            work(RunFolder(options.run), role, stop=stop)
        except Stopped as e:
            turn = another_turn(stop.reason, e.points)
            print("lsweep:", turn or f"stopped by {stop.reason}; all that was committed is kept",
                  file=sys.stderr)  # fmt: skip
            return INTERRUPTED
    return 0


def do_init(options: Namespace) -> int:
    """Write the starter's files."""
    from lsweep.starter import write_starter

    for path in write_starter(options.folder):
        print(f"wrote {path}")
    print(f"next: edit them, then 'lsweep run {options.folder / 'sweep.toml'}'")
    return 0


def do_demo(options: Namespace) -> int:
    """Train, sweep and draw the two networks of the demo."""
    from lsweep.demo import demo

    return demo(options.folder, options.workers)
