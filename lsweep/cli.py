"""The command line: arguments in, exit codes out; the only module that knows argparse.

Exit: 0 done; 1 the user's error, one line on stderr; 2 usage; 3 finished with failed or missing
points; 130 interrupted, all committed. Torch is imported by the commands that compute, not before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from lsweep.errors import LsweepError, nearest
from lsweep.folder import RunFolder

if TYPE_CHECKING:
    from lsweep.display import Display
    from lsweep.problem import Problem

INTERRUPTED, INCOMPLETE = 130, 3
SIZES = {"sums": 64, "row": 40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    >>> main(["status", "nowhere.run"])
    1
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run_command"):
        parser.print_help()
        return 2
    try:
        return int(options.run_command(options))
    except LsweepError as e:
        if options.verbose:
            raise
        print(f"lsweep: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("lsweep: interrupted; all that was committed is kept", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and "'" in message:
            word = message.split("'")[1]
            message = f"no command {word!r}{nearest(word, _COMMANDS)}"
        self.exit(2, f"lsweep: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lsweep",
        description="Sweep the loss landscape of a trained network.",
        epilog="Start with 'lsweep demo', then 'lsweep init' for a network of your own.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)
    for name, (function, add, text) in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run_command=function)
        sub.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
                         help="show tracebacks")  # fmt: skip
        add(sub)
    return parser


def _version() -> str:
    from importlib import metadata

    return f"lsweep {metadata.version('lsweep')}"


# -- arguments that several commands share ---------------------------------------------------------


def _takes_sweep(p: argparse.ArgumentParser) -> None:
    p.add_argument("sweep", metavar="SWEEP", type=Path, help="a sweep.toml, or a run")
    p.add_argument("--run", type=Path, metavar="DIR", help="the run (default: <stem>.run)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                   help="override a TOML key, such as grid.x.count=11")  # fmt: skip
    p.add_argument("--unit-points", type=int, metavar="K", help="points of a unit")
    p.add_argument("--retry-failed", action="store_true", help="ask for failed points again")
    _takes_trust(p)


def _takes_trust(p: argparse.ArgumentParser) -> None:
    p.add_argument("--trust", action="store_true", help="import code that belongs to another user")


def _takes_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    p.add_argument("--threads", type=int, default=1, help="torch threads of a worker (default: 1)")
    p.add_argument("--claims", choices=("lease", "static"), default="lease",
                   help="static: each worker its own shard, no leases")  # fmt: skip


def _takes_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", type=Path, help="a run")


# -- planning and working --------------------------------------------------------------------------


def _folder(options: argparse.Namespace) -> RunFolder:
    if options.run is not None:
        return RunFolder(options.run)
    if options.sweep.is_dir():
        return RunFolder(options.sweep)
    return RunFolder(options.sweep.with_name(f"{options.sweep.stem}.run"))


def _plan(options: argparse.Namespace) -> tuple[RunFolder, Problem | None]:
    """Freeze the plan of a TOML, or take the run as it is; ask again for what failed.

    Returns the problem too where it had to be made, so that this process need not make it twice.
    """
    from lsweep.plan import Plan

    folder = _folder(options)
    problem = None
    if options.unit_points is not None and options.unit_points < 1:
        raise LsweepError(f"--unit-points {options.unit_points}: must be at least 1")
    if options.sweep.is_dir() or (folder.exists and not options.sweep.exists()):
        if options.overrides:
            raise LsweepError(f"--set changes a sweep.toml; {options.sweep} is a run, frozen")
        Plan.read(folder)
    else:
        from lsweep.factory import factory_file, make_problem
        from lsweep.machine import refuse_foreign
        from lsweep.planning import plan_run
        from lsweep.settings import Settings

        settings = Settings.from_file(options.sweep, tuple(options.overrides))
        base = options.sweep.absolute().parent
        file = factory_file(settings.problem, base)
        if file is not None and file.is_file():
            refuse_foreign(file, options.trust)
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


def _command_plan(options: argparse.Namespace) -> int:
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


def _command_run(options: argparse.Namespace) -> int:
    from lsweep.display import Display
    from lsweep.status import share_done

    folder, problem = _plan(options)
    done, total = share_done(folder)
    code, interrupted = 0, False
    if done < total:
        print(f"{folder.root}: {total - done} of {total} points to evaluate", flush=True)
        with Display(folder, total, done) as display:
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
    folder: RunFolder, options: argparse.Namespace, problem: Problem | None, display: Display
) -> tuple[int, bool]:
    if options.on == "mpi":
        raise LsweepError("--on mpi is not built yet: start 'lsweep work RUN --index I --of N'")
    count = 1 if options.on == "inline" else options.workers
    if count is None:
        import torch

        from lsweep.launch import default_workers

        count = default_workers(0 if options.device == "cpu" else torch.cuda.device_count())
    if count < 1:
        raise LsweepError(f"--workers {count}: must be at least 1")
    if count == 1:
        from lsweep.worker import Task, work

        signal.signal(signal.SIGTERM, _interrupt)
        task = Task(device=options.device, threads=options.threads, claims=options.claims,
                    beat=1.0, trust=options.trust)  # fmt: skip
        try:
            work(folder, task, problem)
        except KeyboardInterrupt:
            return 0, True
        return 0, False
    from lsweep.launch import run_workers

    outcome = run_workers(folder, count, device=options.device, threads=options.threads,
                          claims=options.claims, trust=options.trust, on_event=display.say,
                          progress=display.progress)  # fmt: skip
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
        print(f"{name}: {surface.center(name):.6g} at the centre, minimum {least:.6g} at {at}")
    print(f"wrote {folder.surface}")
    if draw:
        from lsweep.pictures import render

        folder.figures.mkdir(exist_ok=True)
        picture = folder.figures / f"{name}.png"
        render(surface, picture)
        print(f"wrote {picture}")
    return 0 if report.clean else INCOMPLETE


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _command_work(options: argparse.Namespace) -> int:
    # One thread must be asked for before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, options.threads)))
    from lsweep.worker import Task, work

    signal.signal(signal.SIGTERM, _interrupt)
    local = options.index if options.local is None else options.local
    task = Task(options.index, options.of, local, options.device, options.threads, options.claims,
                options.beat, options.trust)  # fmt: skip
    work(RunFolder(options.run), task)
    return 0


def _command_status(options: argparse.Namespace) -> int:
    from lsweep.status import lines, status

    while True:
        state = status(RunFolder(options.run))
        text = json.dumps(state) if options.json else "\n".join(lines(state))
        if options.watch and sys.stdout.isatty() and not options.json:
            text = f"\033[2J\033[H{text}"
        print(text, flush=True)
        if not options.watch or not state["missing"]:
            return 0
        time.sleep(options.interval)


def _command_merge(options: argparse.Namespace) -> int:
    from lsweep.merge import merge

    folder = RunFolder(options.run)
    surface, report = merge(folder)
    for line in report.lines():
        print(f"lsweep: {line}", file=sys.stderr)
    if report.missing and not options.partial:
        print(f"lsweep: nothing written; 'lsweep run {folder.root}' computes what is missing, "
              "--partial merges what is there", file=sys.stderr)  # fmt: skip
        return INCOMPLETE
    surface.save(folder.surface)
    print(f"wrote {folder.surface}")
    return 0 if report.clean else INCOMPLETE


def _command_verify(options: argparse.Namespace) -> int:
    from lsweep.verify import verify

    found = verify(RunFolder(options.run), options.data, options.trust)
    for line in found.notes:
        print(line)
    for line in found.problems:
        print(f"lsweep: {line}", file=sys.stderr)
    print(f"{found.checked} files checked, {len(found.problems)} problems")
    return 1 if found.problems else 0


# -- looking ---------------------------------------------------------------------------------------


def _command_render(options: argparse.Namespace) -> int:
    from lsweep.opening import open_surface
    from lsweep.pictures import render

    surfaces = [open_surface(p) for p in options.source]
    labels = [p.stem for p in options.source] if len(surfaces) > 1 else None
    render(surfaces, options.output, name=options.metric, kind=options.kind, log=options.log,
           vmin=options.vmin, vmax=options.vmax, labels=labels, dpi=options.dpi)  # fmt: skip
    print(f"wrote {options.output}")
    return 0


def _command_convert(options: argparse.Namespace) -> int:
    from lsweep.convert import convert
    from lsweep.opening import open_surface

    source = open_surface(options.source) if options.source.is_dir() else options.source
    print(convert(source, options.target, name=options.metric, log=options.log))
    return 0


def _command_measure(options: argparse.Namespace) -> int:
    from lsweep.measures import measure
    from lsweep.opening import open_surface

    rows = []
    for path in options.runs:
        surface = open_surface(path)
        rows.append({"run": str(path), **measure(surface, options.metric or surface.metrics[0])})
    if options.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        for key, value in row.items():
            print(f"{key:20} {value:.6g}" if isinstance(value, float) else f"{key:20} {value}")
    return 0


def _command_init(options: argparse.Namespace) -> int:
    from lsweep.starter import write_starter

    for path in write_starter(options.folder):
        print(f"wrote {path}")
    print(f"next: edit them, then 'lsweep run {options.folder / 'sweep.toml'}'")
    return 0


def _command_demo(options: argparse.Namespace) -> int:
    from lsweep.demo import demo

    return demo(options.folder, options.workers)


# -- the commands' own arguments -------------------------------------------------------------------


def _add_run(p: argparse.ArgumentParser) -> None:
    _takes_sweep(p)
    p.add_argument("--on", choices=("inline", "local", "mpi"), default="local",
                   help="where workers run (default: local)")  # fmt: skip
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: one a GPU or CPU)")
    p.add_argument("--no-picture", action="store_true", help="do not draw at the end")
    _takes_device(p)


def _add_work(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--index", type=int, default=0, help="this worker's number, from 0")
    p.add_argument("--of", type=int, default=1, help="how many workers there are")
    p.add_argument("--local", type=int, help="its number on this node, which picks its GPU")
    p.add_argument("--beat", type=float, default=10.0, help="seconds between heartbeats")
    _takes_device(p)
    _takes_trust(p)


def _add_status(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--watch", action="store_true", help="again and again, until it is complete")
    p.add_argument("--interval", type=float, default=2.0, help="seconds between looks")
    p.add_argument("--json", action="store_true", help="for programs")


def _add_merge(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--partial", action="store_true", help="also when points are missing")


def _add_verify(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--data", action="store_true", help="also hash all data (imports the factory)")
    _takes_trust(p)


def _add_render(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="RUN|FILE", type=Path, nargs="+", help="runs or surface files")
    p.add_argument("-o", "--output", type=Path, required=True, help=".png, .pdf or .svg")
    p.add_argument("--kind", default="auto", help="line, contour, filled, heat, 3d")
    p.add_argument("--metric", help="such as train_loss or test_accuracy")
    p.add_argument("--log", action="store_true", help="logarithmic scale")
    p.add_argument("--vmin", type=float, help="lowest value of the scale")
    p.add_argument("--vmax", type=float, help="highest; above it is hatched")
    p.add_argument("--dpi", type=int, default=150)


def _add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="IN", type=Path, help="a run, a surface, or a reference .h5")
    p.add_argument("target", metavar="OUT", type=Path, help=".vts .vtp .csv .npz, or .h5")
    p.add_argument("--metric", help="what is the height in .vts and .vtp")
    p.add_argument("--log", action="store_true", help="logarithmic height")


def _add_measure(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="runs or surface files")
    p.add_argument("--metric", help="by default the first")
    p.add_argument("--json", action="store_true", help="for programs")


def _add_init(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path(), help="where")


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path("lsweep-demo"),
                   help="where to put it (default: lsweep-demo)")  # fmt: skip
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: a CPU each)")


Command = Callable[[argparse.Namespace], int]
_COMMANDS: dict[str, tuple[Command, Callable[[argparse.ArgumentParser], None], str]] = {
    "demo": (_command_demo, _add_demo, "two small nets on real digits, with and without skips"),
    "init": (_command_init, _add_init, "write a commented sweep.toml and problem.py to edit"),
    "plan": (_command_plan, _takes_sweep, "freeze the plan and publish the first round"),
    "run": (_command_run, _add_run, "plan if needed, evaluate what is missing, merge, draw"),
    "work": (_command_work, _add_work, "be one worker of a run"),
    "status": (_command_status, _add_status, "what is done and who works"),
    "merge": (_command_merge, _add_merge, "combine what is committed into surface.h5"),
    "verify": (_command_verify, _add_verify, "check every file of a run"),
    "measure": (_command_measure, _add_measure, "numbers from surfaces"),
    "render": (_command_render, _add_render, "draw runs or surfaces"),
    "convert": (_command_convert, _add_convert, "to and from other formats"),
}
