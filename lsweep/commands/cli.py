"""The command line: arguments in, exit codes out; the only module that knows argparse.

Exit: 0 done; 1 the user's error, one line on stderr; 2 usage; 3 finished with failed or missing
points; 130 interrupted, all committed. Torch is imported by the commands that compute, not before.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lsweep.commands import invariance, looking, running, submitting
from lsweep.commands import making as commands
from lsweep.commands.printing import flush, named
from lsweep.errors import LsweepError, nearest
from lsweep.plans.children import CHILDREN
from lsweep.plans.study import through


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    >>> main(["status", "nowhere.run"])
    1
    """
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    finally:  # of --help, which ends the program
        with contextlib.suppress(OSError):
            flush()
    if not hasattr(options, "run_command"):
        _parser().print_help()
        return 2
    try:
        code = int(options.run_command(options))
        flush()
        return code
    except KeyboardInterrupt:
        print("lsweep: interrupted; all that was committed is kept", file=sys.stderr)
        return commands.INTERRUPTED
    except BrokenPipeError:  # 'lsweep status RUN | head' has read enough
        flush()
        return 0
    except (LsweepError, OSError) as e:
        with contextlib.suppress(OSError):
            flush()
        if options.verbose:
            traceback.print_exc()
        text = str(e) if isinstance(e, LsweepError) else named(e)
        print("lsweep:", " ".join(text.splitlines()), file=sys.stderr)
        return e.exit_code if isinstance(e, LsweepError) else LsweepError.exit_code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line; what follows ``--`` in a submit is sbatch's.

    >>> parse(["submit", "a.toml", "--tasks", "4", "--", "-J", "mine"]).sbatch
    ['-J', 'mine']
    """
    own = list(arguments)
    sbatch = None
    if "--" in own and "submit" in own[: own.index("--")]:
        own, sbatch = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = _parser()
    options, rest = parser.parse_known_args(own)
    if rest:
        hint = any("=" in word for word in rest) and "overrides" in options
        parser.error(f"unrecognized arguments: {' '.join(rest)}"
                     + (" (each KEY=VALUE takes a --set of its own)" if hint else ""))  # fmt: skip
    options.sbatch = sbatch
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("argument COMMAND: invalid choice: "):
            word = message.split("'")[1]
            message = f"no command {word!r}{nearest(word, _COMMANDS)}"
        else:
            message = f"{message}; see '{self.prog} --help'"
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
        sub.set_defaults(run_command=through(function) if name in _OF_A_STUDY else function)
        sub.add_argument("-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
                         help="show tracebacks")  # fmt: skip
        add(sub)
    return parser


def _version() -> str:
    from importlib import metadata

    return f"lsweep {metadata.version('lsweep')}"


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _plane(text: str) -> float | None:
    name, _, value = text.partition("=")
    try:
        if name != "z":
            raise ValueError
        return None if value == "all" else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not z=NUMBER or z=all") from None


def _duration(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.01 and 86400 seconds")
    return value


def _waiting(text: str) -> float:
    return _duration(text) if float(text) else 0.0


# -- arguments that several commands share ---------------------------------------------------------


class _Override(argparse.Action):
    """Collects KEY=VALUE, and refuses a key that is there already: which was meant?"""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Any, option_string: str | None = None) -> None:  # fmt: skip
        before = getattr(namespace, self.dest)
        key = values.partition("=")[0].strip()
        for other in before:
            if other.partition("=")[0].strip() == key:
                parser.error(f"--set {other} and --set {values}: give {key} once")
        setattr(namespace, self.dest, [*before, values])


def _takes_set(p: argparse.ArgumentParser, example: str) -> None:
    p.add_argument("--set", action=_Override, default=[], metavar="KEY=VALUE", dest="overrides",
                   help=f"override a TOML key, such as {example}")  # fmt: skip


def _takes_sweep(p: argparse.ArgumentParser) -> None:
    p.add_argument("sweep", metavar="SWEEP", type=Path, help="a sweep.toml, a run, or a study")
    p.add_argument("--run", type=Path, metavar="DIR", help="the run (default: <stem>.run)")
    _takes_set(p, "grid.x.count=11")
    p.add_argument("--unit-points", type=_at_least(1), metavar="K", help="points of a unit")
    p.add_argument("--retry-failed", action="store_true", help="ask for failed points again")
    _takes_kept_code(p)
    _takes_trust(p)


def _takes_kept_code(p: argparse.ArgumentParser) -> None:
    p.add_argument("--kept-code", action="store_true",
                   help="go on with the run's own copy of the factory's file")  # fmt: skip


def _takes_trust(p: argparse.ArgumentParser) -> None:
    p.add_argument("--trust", action="store_true", help="import code that belongs to another user")


def _takes_measures(p: argparse.ArgumentParser) -> None:
    p.add_argument("--measures", metavar="NAME,…",
                   help="also what is measured at the centre: all, or some of "
                        + ", ".join(CHILDREN))  # fmt: skip
    p.add_argument("--replicates", type=_at_least(2), metavar="N",
                   help="directions, probes or start vectors of each of these")  # fmt: skip
    p.add_argument("--samples", type=_at_least(2), metavar="N",
                   help="samples that these take (default: the sweep's)")  # fmt: skip
    p.add_argument("--to", type=Path, metavar="CHECKPOINT",
                   help="of the other network, for the measure barrier")  # fmt: skip


def _takes_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    p.add_argument("--threads", type=_at_least(0), default=1, metavar="N",
                   help="torch threads of a worker (default: 1; 0: as torch likes)")  # fmt: skip
    p.add_argument("--workers-per-gpu", type=_at_least(1), default=1, metavar="K",
                   help="processes on each GPU, rank or task (default: 1)")  # fmt: skip
    p.add_argument("--claims", choices=("lease", "static"), default="lease",
                   help="static: each worker its own shard, no leases")  # fmt: skip


def _takes_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", type=Path, help="a run")


def _takes_l2(p: argparse.ArgumentParser) -> None:
    p.add_argument("--l2", type=float, metavar="λ", help="add λ/2·‖θ‖² to the loss, from the "
                   "stored squared norm")  # fmt: skip


# -- the commands' own arguments -------------------------------------------------------------------


def _add_plan(p: argparse.ArgumentParser) -> None:
    _takes_sweep(p)
    _takes_measures(p)


def _add_run(p: argparse.ArgumentParser) -> None:
    _takes_sweep(p)
    _takes_measures(p)
    p.add_argument("--on", choices=("inline", "local", "mpi"), default="local",
                   help="where workers run (default: local)")  # fmt: skip
    p.add_argument(
        "--workers", type=_at_least(1), metavar="N", help="processes (default: one a GPU or CPU)"
    )
    p.add_argument("--no-picture", action="store_true", help="do not draw at the end")
    _takes_device(p)


def _add_submit(p: argparse.ArgumentParser) -> None:
    _takes_sweep(p)
    _takes_measures(p)
    p.usage = "lsweep submit SWEEP --tasks N [options] [-- sbatch options]"
    p.epilog = "All but --trust, --wait and --dry-run is remembered; 0 or '' forgets it again."
    for name, metavar, text in (
        ("--tasks", "N", "tasks of the array; each helps until nothing is missing"),
        ("--gpus-per-task", "G", "GPUs of each process"),
        ("--time", "MINUTES", "time limit of a task (default: the partition's)"),
        ("--array-parallelism", "M", "how many tasks may run at once"),
        ("--cpus-per-task", "C", "CPUs of each process"),
    ):
        p.add_argument(name, type=_at_least(0), metavar=metavar, help=text)
    p.add_argument("--ranks", type=_at_least(1), metavar="K",
                   help="processes of each array task, started by srun (default: 1)")  # fmt: skip
    p.add_argument("--partition", metavar="P", help="one, or several with commas")
    p.add_argument("--setup", action="append", metavar="LINE",
                   help="a shell line before the work, such as 'module load cuda'")  # fmt: skip
    p.add_argument("--wrap", metavar="WORDS",
                   help="what the Python runs in, such as 'apptainer exec --nv x.sif'")  # fmt: skip
    p.add_argument("--wait", action="store_true", help="until array and merge are over")
    p.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    _takes_device(p)
    p.set_defaults(device=None, threads=None, claims=None)  # not given: as remembered


def _add_work(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--index", type=_at_least(0), metavar="I",
                   help="this worker's number, from 0 (default: as MPI or Slurm says)")  # fmt: skip
    p.add_argument("--of", type=_at_least(1), metavar="N",
                   help="how many workers there are")  # fmt: skip
    p.add_argument("--local", type=_at_least(0), metavar="I",
                   help="its number on this node, which picks its GPU")  # fmt: skip
    p.add_argument("--beat", type=_duration, metavar="S",
                   help="seconds between heartbeats (default: 10, more in a crowd)")  # fmt: skip
    p.add_argument("--parent", type=int, default=0, metavar="PID",
                   help="end when this process, which started it, is gone")  # fmt: skip
    _takes_device(p)
    _takes_trust(p)


def _add_status(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--watch", action="store_true", help="again and again, until it is complete")
    p.add_argument("--interval", type=_duration, default=2.0, metavar="S",
                   help="seconds between looks")  # fmt: skip
    p.add_argument("--json", action="store_true", help="for programs")


def _add_merge(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--partial", action="store_true", help="also when points are missing")
    p.add_argument("--picture", action="store_true", help="draw it too")


def _add_verify(p: argparse.ArgumentParser) -> None:
    _takes_run(p)
    p.add_argument("--data", action="store_true", help="also hash all data (imports the factory)")
    _takes_trust(p)


def _add_doctor(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path(),
                   help="a folder of the file system where runs will be")  # fmt: skip
    p.add_argument("--wait", type=_waiting, default=10.0, metavar="S",
                   help="seconds to wait for the same command on another node")  # fmt: skip
    p.add_argument("--json", action="store_true", help="for programs")


def _add_render(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="RUN|FILE", type=Path, nargs="+",
                   help="runs, studies or surface files")  # fmt: skip
    p.add_argument("-o", "--output", type=Path, required=True, help=".png, .pdf or .svg")
    p.add_argument("--kind", default="auto",
                   help="line, contour, filled, heat, 3d; what was measured: sharpness, worst, "
                   "spectrum, layers, convexity, persistence; study: measures of several networks "
                   "against their gap")  # fmt: skip
    _takes_l2(p)
    p.add_argument("--metric", help="such as train_loss or test_accuracy")
    p.add_argument("--log", action=argparse.BooleanOptionalAction, default=None,
                   help="logarithmic scale (default: beyond two decades)")  # fmt: skip
    p.add_argument("--vmin", type=float, help="lowest value of the scale")
    p.add_argument("--vmax", type=float, help="highest; above it is hatched")
    p.add_argument("--at", type=_plane, action="append", default=[], metavar="z=Z",
                   help="of three axes, the plane with the nearest z (default: the middle); "
                   "several stand side by side, z=all is each")  # fmt: skip
    p.add_argument("--points", action="store_true", help="show which points were evaluated")
    p.add_argument("--dpi", type=_at_least(1), default=150, help="dots per inch (default: 150)")


def _add_convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("source", metavar="IN", type=Path, help="a run, a surface, or a reference .h5")
    p.add_argument("target", metavar="OUT", type=Path, help=".vts .vtp .csv .npz, or .h5")
    p.add_argument("--metric", help="what is the height in .vts and .vtp")
    p.add_argument("--log", action="store_true", help="logarithmic height")
    p.add_argument("--directions", action="store_true",
                   help="a run's directions, not its surface (imports the factory)")  # fmt: skip
    _takes_trust(p)


def _add_measure(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+",
                   help="runs, studies or surface files; several are compared")  # fmt: skip
    p.add_argument("--metric", help="by default the first")
    p.add_argument("--only", metavar="NAME,…", help="only these; sharpness means all its radii")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--csv", action="store_true", help="for spreadsheets")
    p.add_argument("--figures", action="store_true", help="draw them too, into RUN/figures/")
    _takes_l2(p)
    p.add_argument("--gap", default="", help="error or loss: what measures of several networks are "
                   "related to (default: error, where both splits have an accuracy)")  # fmt: skip
    p.add_argument("--match", type=float, default=0.1, metavar="T", help="networks are matched "
                   "whose training losses are within this share (default: 0.1)")  # fmt: skip
    p.add_argument("--regularizer", "--regulariser", default="", metavar="KEY",
                   help="the option that regularises (default: weight_decay, wd, l2)")  # fmt: skip
    p.add_argument("--permutations", type=_at_least(100), default=2000, metavar="N",
                   help="of the gaps, for null intervals (default: 2000)")  # fmt: skip


def _add_invariance(p: argparse.ArgumentParser) -> None:
    p.add_argument("sweep", metavar="SWEEP", type=Path, help="a sweep.toml, or a run")
    p.add_argument("--run", type=Path, metavar="DIR", help="the run (default: <stem>.run)")
    _takes_set(p, "directions.gauge=equi")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    p.add_argument("--samples", type=_at_least(2), default=256, metavar="N",
                   help="samples that the network is compared on (default: 256)")  # fmt: skip
    form = p.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="for programs")
    form.add_argument("--csv", action="store_true", help="for spreadsheets, the table alone")
    _takes_kept_code(p)
    _takes_trust(p)


def _add_init(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path(), help="where")


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=Path("lsweep-demo"),
                   help="where to put it (default: lsweep-demo)")  # fmt: skip
    p.add_argument(
        "--workers", type=_at_least(1), metavar="N", help="processes (default: a CPU each)"
    )


Command = Callable[[argparse.Namespace], int]
_OF_A_STUDY = ("plan", "run", "merge", "verify", "prune", "invariance")  # gone through run by run
_COMMANDS: dict[str, tuple[Command, Callable[[argparse.ArgumentParser], None], str]] = {
    "demo": (commands.do_demo, _add_demo, "two small nets on real digits, with and without skips"),
    "init": (commands.do_init, _add_init, "write a commented sweep.toml and problem.py to edit"),
    "plan": (commands.do_plan, _add_plan, "freeze the plan and publish the first round"),
    "run": (running.do_run, _add_run, "plan if needed, evaluate what is missing, merge, draw"),
    "submit": (submitting.do_submit, _add_submit, "a Slurm array of workers, and a merge after it"),
    "work": (commands.do_work, _add_work, "be one worker of a run"),
    "status": (looking.do_status, _add_status, "what is done and who works"),
    "merge": (looking.do_merge, _add_merge, "combine what is committed into surface.h5"),
    "verify": (looking.do_verify, _add_verify, "check every file of a run"),
    "prune": (looking.do_prune, _takes_run, "few parts and no leases, once a run is merged"),
    "doctor": (looking.do_doctor, _add_doctor, "whether a file system is safe for runs"),
    "measure": (looking.do_measure, _add_measure, "numbers from surfaces"),
    "invariance": (
        invariance.do_invariance,
        _add_invariance,
        "which rescalings leave the network unchanged",
    ),
    "render": (looking.do_render, _add_render, "draw runs or surfaces"),
    "convert": (looking.do_convert, _add_convert, "to and from other formats"),
}
