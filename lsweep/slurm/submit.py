"""Handing a run to Slurm through submitit: one array of workers, and a merge after it.

Submitit only submits. In a task the function it calls becomes `lsweep work` at once, so that this
process itself gets Slurm's signals, nobody waits for a pickled answer, and inside a container
nothing but lsweep is needed. All else that submitit offers is left alone: it takes a node failure
for an end, a task cancelled while it waits for one that still runs, and knows no steps.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lsweep.errors import LsweepError
from lsweep.slurm.limits import Site, minutes, require_time
from lsweep.slurm.submission import Options
from lsweep.slurm.tasks import complaint
from lsweep.storage.folder import RunFolder

if TYPE_CHECKING:
    from submitit import SlurmExecutor

LONGEST_NOTICE = 90  # seconds between the signal and a task's end
OURS = {  # options of sbatch that a submission makes itself
    "array": "--tasks and --array-parallelism make the array",
    "wait": "say --wait before the --",
    "parsable": "its output is read here",
    "quiet": "its output is read here",
    "test_only": "say --dry-run before the --",
    "wrap": "say --wrap before the --",
}
# What a user set for all his jobs; as variables they would beat what is typed here.
SITE = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_TIMELIMIT": "time",
}
# The Python of this process; a container may not have it, and brings its own.
PYTHON_INSIDE = 'exec "$(command -v "$0" || echo python3)" "$@"'


class NoAnswer(LsweepError):
    """Slurm is installed, but its controller does not answer."""


def require_slurm() -> Site:
    """Return the limits of this site.

    Raises:
        LsweepError: there is no Slurm, or no submitit, naming what to do.
        NoAnswer: the controller is down.
    """
    for program in ("sbatch", "srun", "scontrol", "squeue"):
        if not shutil.which(program):
            raise LsweepError(
                f"no {program} on this machine: submit from a login node, or use 'lsweep run' here"
            )
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise LsweepError(
            "submit needs submitit: pip install 'lsweep[slurm]'; slurm/array.sbatch needs none"
        ) from None
    try:
        return Site.read()
    except LsweepError as e:
        raise NoAnswer(f"Slurm does not answer ({e}); nothing was submitted") from None


@dataclass(frozen=True)
class Order:
    """What is to be submitted, checked against the site.

    Attributes:
        folder: the run.
        options: as asked for.
        count: tasks of the array.
        minutes: that a task may take, or None when that is not known.
        trust: the workers may import a factory that belongs to another user.
    """

    folder: RunFolder
    options: Options
    count: int
    minutes: float | None
    trust: bool = False

    def words(self, *arguments: str) -> list[str]:
        """Return the command line that a task becomes."""
        python = [sys.executable]
        try:
            wrap = shlex.split(self.options.wrap)
        except ValueError as e:
            raise LsweepError(f"--wrap {self.options.wrap!r}: {e}") from None
        if wrap:
            python = [*wrap, "sh", "-c", PYTHON_INSIDE, sys.executable]
        return [*python, "-m", "lsweep", *arguments]

    @property
    def work(self) -> list[str]:
        """The command line of a worker."""
        o = self.options
        words = self.words("work", str(self.folder.root.absolute()))
        words += ["--device", o.device, "--threads", str(o.threads), "--claims", o.claims]
        return words + (["--trust"] if self.trust else [])

    @property
    def merge(self) -> list[str]:
        """The command line of the merge; it shows also what an incomplete array computed."""
        return self.words("merge", str(self.folder.root.absolute()), "--partial", "--picture")


def typed(sbatch: tuple[str, ...]) -> Namespace:
    """Return the partition and the time among options of sbatch, however they are written.

    Raises:
        LsweepError: one of them is made by the submission itself.

    >>> typed(("-pgpu", "--time=2:00:00", "-J", "x")).time
    '2:00:00'
    """
    parser = ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-p", "--partition")
    parser.add_argument("-t", "--time")
    parser.add_argument("-a", "--array")
    for letter, name in (("-W", "wait"), ("-Q", "quiet")):
        parser.add_argument(letter, f"--{name}", action="store_true")
    for name in ("parsable", "test-only"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--wrap")
    try:
        found, _ = parser.parse_known_args(sbatch)
    except ArgumentError:
        return Namespace(partition=None, time=None)  # sbatch will say what is wrong
    for name, why in OURS.items():
        if getattr(found, name):
            raise LsweepError(f"-- --{name.replace('_', '-')} is not for submit: {why}")
    return found


def check(site: Site | None, options: Options) -> float | None:
    """Return how many minutes a task will get, None when that is not known.

    Args:
        site: its limits; None where they cannot be asked for.
        options: of the submission.

    Raises:
        LsweepError: the site does not allow it, naming the limit.
    """
    said = typed(options.sbatch)
    partition = said.partition or options.partition or os.environ.get("SBATCH_PARTITION")
    limit = said.time or options.time or os.environ.get("SBATCH_TIMELIMIT")
    wanted = minutes(str(limit)) if limit else None
    if site is None:
        return wanted
    partitions = site.chosen(partition)
    require_time(partitions, wanted)
    closed = [p for p in partitions if p.state != "UP"]
    if len(closed) == len(partitions):
        raise LsweepError(
            f"partition {closed[0].name!r} is {closed[0].state}: nothing starts there"
        )
    usual = [p.usual or p.longest for p in partitions]
    return wanted or min((m for m in usual if m is not None), default=None)


def notice(limit: float | None) -> int:
    """Return how many seconds before its end a task is told; Slurm may do it a minute earlier.

    >>> [notice(m) for m in (1, 5, 60, None)]
    [6, 30, 90, 90]
    """
    return LONGEST_NOTICE if limit is None else max(5, min(LONGEST_NOTICE, math.floor(limit * 6)))


# -- what submitit is given ------------------------------------------------------------------------


def become(words: list[str]) -> NoReturn:
    """Replace this process by a command: called by submitit in each process of each task.

    A worker finds out from Slurm's variables which it is.
    """
    # Slurm tells every process of the task, the wrapper too, and may do so before lsweep listens.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    print("+", shlex.join(words), flush=True)
    os.execvp(words[0], words)


def _array(order: Order, logs: Path) -> SlurmExecutor:
    o = order.options
    executor = _executor(order, logs)
    srun = [f"--cpus-per-task={o.cpus_per_task}"] if o.cpus_per_task else []  # not inherited
    if o.ranks > 1:  # the death of one, or its end, is no concern of the others
        srun += ["--kill-on-bad-exit=0", "--wait=0"]
    executor.update_parameters(
        ntasks_per_node=o.ranks,
        cpus_per_task=o.cpus_per_task or None,
        gpus_per_task=o.gpus_per_task or None,
        array_parallelism=o.array_parallelism or order.count,
        srun_args=srun,
    )
    return executor


def _after(order: Order, logs: Path, array: str) -> SlurmExecutor:
    executor = _executor(order, logs, f"--dependency=afterany:{array}")
    executor.update_parameters(use_srun=False)  # once, however many processes the options ask for
    return executor


def _executor(order: Order, logs: Path, *last: str) -> SlurmExecutor:
    from submitit import SlurmExecutor

    o = order.options
    site = {name: os.environ[key] for key, name in SITE.items() if os.environ.get(key)}
    given = {"partition": o.partition, "time": o.time}
    executor = SlurmExecutor(folder=logs)
    executor.update_parameters(
        **{"time": None, **site, **{k: v for k, v in given.items() if v}},
        job_name=f"lsweep-{order.folder.root.absolute().stem}",
        signal_delay_s=notice(order.minutes),
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True},
        # Lines before the first command are options still, and the last one counts.
        setup=[*(f"#SBATCH {shlex.join(w)}" for w in (o.sbatch, last) if w), *o.setup],
    )
    return executor


# -- submitting ------------------------------------------------------------------------------------


def scripts(order: Order) -> tuple[str, str]:
    """Return the scripts of the array and of the merge, as sbatch will get them."""
    logs = order.folder.slurm_logs("TIME")
    array, merge = _array(order, logs), _after(order, logs, "ARRAY")
    if order.count > 1:
        array.parameters["map_count"] = order.count
    texts = [e._make_submission_file_text(e._submitit_command_str, "") for e in (array, merge)]
    return texts[0], texts[1]


def objection(script: str) -> str:
    """Return why Slurm could not start a script as the site is now, or ""."""
    with _outside_of_jobs():
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True
        )
    return complaint(done.stderr).removeprefix("allocation failure: ") if done.returncode else ""


@dataclass(frozen=True)
class Receipt:
    """What Slurm answered.

    Attributes:
        array: the array's job id.
        merge: that of the merge, or "".
        refusal: why there is no merge, or "".
        logs: name of the folder of logs.
    """

    array: str
    merge: str
    refusal: str
    logs: str


def submit(order: Order) -> Receipt:
    """Submit the array, then the merge.

    Raises:
        LsweepError: the array was refused; nothing is left behind.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    logs = order.folder.slurm_logs(name)
    executor = _array(order, logs)
    try:
        with _outside_of_jobs(), _one_line():
            first = executor.map_array(become, [order.work] * order.count)[0]
    except BaseException:
        shutil.rmtree(logs, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.removedirs(logs.parent)  # as far as they are empty
        raise
    array = first.job_id.partition("_")[0]
    executor = _after(order, logs, array)
    try:
        with _outside_of_jobs(), _one_line():
            merge = executor.submit(become, order.merge).job_id
    except LsweepError as e:  # a convenience: the array is worth having without it
        return Receipt(array, "", str(e), name)
    return Receipt(array, merge, "", name)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats it there
            yield
    except (FailedJobError, FailedSubmissionError) as e:
        raise LsweepError(f"sbatch refused: {complaint(str(e))}") from None


@contextlib.contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the job that this process may be in, but not where Slurm is or what the user set."""
    from submitit.helpers import clean_env

    kept = {
        k: v
        for k, v in os.environ.items()
        if k in ("SLURM_CONF", "SLURM_JWT") or (k.startswith("SBATCH_") and k not in SITE)
    }
    with clean_env():
        os.environ.update(kept)
        yield
