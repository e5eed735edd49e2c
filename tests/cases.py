"""What the storage tests share: one small problem with known values, and children that may die.

The problem: two weights a and b at 1, each one filter, so that an offset (x, y) moves them by ±x
and ±y, and 64 samples with loss s·(x² + 3y²) + t. Whatever goes wrong in it is asked for by name,
or by the file ``broken`` beside the factory, so that it can be mended without changing the plan;
where a point takes a pause, the file ``hurry`` ends that, once what it was for has happened;
nobody goes to a point before a ``company`` of so many workers is there; and nobody leaves its first
one before as many as ``all_at`` are at one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsweep.commands import cli
from lsweep.errors import LsweepError
from lsweep.merging.merge import Report, merge
from lsweep.outcomes.committed import Committed
from lsweep.outcomes.reading import Part, read_part
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.storage.folder import RunFolder
from lsweep.storage.rows import Kind
from lsweep.surfaces.surface import Surface
from lsweep.working.role import Role
from lsweep.working.worker import work

PATIENCE = 200  # seconds that anything may take on a busy machine

FACTORY = '''\
import os, pathlib, signal, time, uuid
import torch
from torch import nn
import lsweep

HERE = pathlib.Path(__file__).parent


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight), nn.init.ones_(self.b.weight)

    def place(self):
        """|x| and |y| of the point that is evaluated."""
        return abs(float(self.a.weight) - 1), abs(float(self.b.weight) - 1)


def bowl(pause=0.0, trouble="", scale=1.0, shift=0.0, weight=1.0, company=0, all_at=0):
    g = torch.Generator().manual_seed(5)
    s, t = scale * torch.rand(64, generator=g) + 0.5, torch.rand(64, generator=g) + shift
    net = Bowl()
    nn.init.constant_(net.a.weight, weight)
    spoiled = []
    me = uuid.uuid4().hex  # pids of two nodes may be alike

    def forward(model, batch):
        s, t = batch
        x, y = model.place()
        here = round(x, 4)
        moved = x > 0 or y > 0
        while moved and company and len(list(HERE.glob("*.run/workers/[!.]*"))) < company:
            time.sleep(0.02)
        if moved and all_at:
            (HERE / f"{me}.came").touch()
        while moved and all_at and len(list(HERE.glob("*.came"))) < all_at:
            time.sleep(0.02)
        left, end = pause, time.monotonic() + pause
        while moved and left > 0 and not os.path.exists(HERE / "hurry"):  # False on a sick disk
            time.sleep(min(left, 0.1))
            left = end - time.monotonic()
        if trouble == "hangs" and here == 0.375 and not (HERE / "hung").exists():
            (HERE / "hung").touch()
            time.sleep(1e6)
        if trouble == "raise" and here in (0.25, 0.75) and (HERE / "broken").exists():
            raise ValueError(f"no value at {here}")
        if trouble == "words" and here and (HERE / "broken").exists():
            raise ValueError(f"no value at {here}")
        if trouble == "sick":
            if here == 0.5:
                spoiled.append(here)
            if spoiled:
                raise RuntimeError("the device fell off the bus")
        if trouble == "drifts" and here == 0.5:
            spoiled.append(1.0)
            raise RuntimeError("uncorrectable memory error")
        if trouble == "poison" and here == 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "hog" and moved and os.environ.get("SLURM_ARRAY_TASK_ID") == "0":
            spoiled.append(b"x" * 2**31)
        if trouble == "memory" and len(s) > 16 and moved:
            raise torch.OutOfMemoryError("out of memory: asked for too much")
        if trouble == "memory everywhere" and len(s) > 16:
            raise torch.OutOfMemoryError("out of memory: asked for too much")
        if trouble == "bug":
            raise KeyError("labels")
        a, b = model.a.weight - 1, model.b.weight - 1
        loss = s * (a * a + 3 * b * b).flatten() + t + sum(spoiled)
        if trouble == "nan" and here == 0.5:
            loss = loss * float("nan")
        if trouble == "nan" and here == 0.75:
            loss = loss * float("inf")
        return {"loss": loss}

    forward.metrics = ("loss",)
    return lsweep.Problem(net, {"train": (s, t)}, forward=forward)
'''


def sweep_file(
    base: Path,
    *,
    x: int = 5,
    y: int = 0,
    low: str = "0",
    high: str = "1",
    seed: int = 0,
    evaluate: str = "",
    **options: Any,
) -> Path:
    """Write problem.py and sweep.toml: ``x`` points from 0 to 1, times ``y`` of the other weight.

    By default the points are 0, 0.25, 0.5, 0.75 and 1, so each has an |x| of its own.
    """
    base.mkdir(parents=True, exist_ok=True)
    (base / "problem.py").write_text(FACTORY)
    table = ", ".join(f"{k} = {_toml(v)}" for k, v in options.items())
    lines = ["[problem]", 'factory = "problem.py:bowl"', f"options = {{ {table} }}"]
    for axis, count in (("x", x), ("y", y)):
        if count:
            weight = {"x": "a", "y": "b"}[axis]
            lines += [f"[grid.{axis}]", f"range = [{low}, {high}]", f"count = {count}"]
            lines += [f"[directions.{axis}]", f'parameters = ["{weight}.*"]', f"seed = {seed}"]
    lines += ["[evaluate]", evaluate]
    toml = base / "sweep.toml"
    toml.write_text("\n".join(lines) + "\n")
    return toml


def hurry(folder: RunFolder) -> None:
    """Let the points that are left of a run beside its factory take no pause."""
    (folder.root.parent / "hurry").touch()


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def samples(scale: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return s and t of the problem."""
    g = torch.Generator().manual_seed(5)
    s, t = scale * torch.rand(64, generator=g) + 0.5, torch.rand(64, generator=g) + shift
    return s.double().numpy(), t.double().numpy()


def truth(surface: Surface) -> np.ndarray:
    """Return the loss that the problem's formula gives at each point of a surface."""
    s, t = samples()
    square = surface.x**2
    if "y" in surface.axes:
        square = square[None, :] + 3 * surface.y[:, None] ** 2
    return s.mean() * square + t.mean()


# -- children --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raised:
    """A child's exception: its type's name and its text."""

    kind: str
    text: str


@dataclass(frozen=True)
class Died:
    """A child that a signal ended; SIGALRM is a hang."""

    signal: int

    def __str__(self) -> str:
        return "HANG" if self.signal == signal.SIGALRM else signal.Signals(self.signal).name


_forked: list[int] = []
_started: list[subprocess.Popen[str]] = []


def started(words: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process whose output is read, and which `end_all` ends."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    _started.append(subprocess.Popen(words, **{**pipes, **options}))
    return _started[-1]


def end_all() -> None:
    """End what a row that failed left running: it would slow others, or fail one of them."""
    for process in _started:
        if process.returncode is None:
            process.kill()
            process.communicate()
    for pid in _forked:
        with contextlib.suppress(ChildProcessError):  # it was waited for
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    _started.clear()
    _forked.clear()


def fork() -> int:
    """Fork; the child has the default signal handlers and one torch thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of BLAS; the child uses none
        pid = os.fork()
    if pid == 0:
        gc.disable()  # it would touch, and so copy, every page that the parent shares
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
    else:
        _forked.append(pid)
    return pid


def start(folder: RunFolder, **task: Any) -> int:
    """Start a worker in a child."""
    pid = fork()
    if pid == 0:
        code = 1
        try:
            work(folder, Role(device="cpu", beat=0.2, **task))
            code = 0
        finally:
            os._exit(code)
    return pid


def each_in_child(
    check: Callable[[Any], Any], items: Iterable[Any], seconds: int = 100
) -> list[Any]:
    """Return ``check(item)`` for each item, from forked children: `Raised` and `Died` are answers.

    One child serves until an item kills it or takes ``seconds``; the next goes on after it.
    """
    items, results = list(items), []
    while len(results) < len(items):
        before = len(results)
        reading, writing = os.pipe()
        pid = fork()
        if pid == 0:
            try:
                os.close(reading)
                _answer(check, items[len(results) :], writing, seconds)
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe, contextlib.suppress(EOFError):
            while True:
                results.append(pickle.load(pipe))
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            results.append(Died(os.WTERMSIG(status)))
        assert len(results) > before, "a child ended without an answer"
    return results


def _answer(check: Callable[[Any], Any], items: list[Any], writing: int, seconds: int) -> None:
    with os.fdopen(writing, "wb") as pipe:
        for item in items:
            signal.alarm(seconds)
            try:
                answer = check(item)
            except BaseException as e:
                answer = Raised(type(e).__name__, str(e))
                if not isinstance(e, LsweepError):
                    traceback.print_exc()
            pipe.write(pickle.dumps(answer))
            pipe.flush()


def in_child(function: Callable[..., Any], *arguments: Any, seconds: int = PATIENCE) -> Any:
    """Return ``function(*arguments)`` from a forked child, `Raised` or `Died`."""
    return each_in_child(lambda _: function(*arguments), [None], seconds)[0]


@dataclass(frozen=True)
class Done:
    """A command that ended: exit code (minus the signal that killed it) and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """``lsweep ARGUMENTS`` in a forked child, which spares it the import of torch."""

    def __init__(self, *arguments: object, cwd: Path | None = None) -> None:
        self._files = [_unnamed() for _ in range(2)]
        self.pid = fork()
        if self.pid == 0:
            os.setsid()
            for fd, file in zip((1, 2), self._files, strict=True):
                os.dup2(file, fd)
            sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
            code = 99
            try:
                if cwd:
                    os.chdir(cwd)
                code = cli.main([str(a) for a in arguments])
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> Done:
        """Wait until it ends."""
        _, status = os.waitpid(self.pid, 0)
        texts = []
        for file in self._files:
            with os.fdopen(file, "rb") as f:
                f.seek(0)
                texts.append(f.read().decode(errors="replace"))
        return Done(os.waitstatus_to_exitcode(status), *texts)


def _unnamed() -> int:
    return os.memfd_create("output")


def command(*arguments: object, cwd: Path | None = None) -> Done:
    """Run ``lsweep ARGUMENTS`` to its end."""
    return Command(*arguments, cwd=cwd).wait()


def process(*arguments: object) -> subprocess.Popen[str]:
    """Start ``python -m lsweep ARGUMENTS``, as a user does."""
    return started([sys.executable, "-m", "lsweep", *map(str, arguments)])


# -- runs ------------------------------------------------------------------------------------------


def planned(toml: Path, *, run: Path | None = None, unit_points: int | None = None) -> RunFolder:
    """Plan a sweep and return its run."""
    folder = run or toml.with_name(f"{toml.stem}.run")
    more = ["--unit-points", unit_points] if unit_points else []
    done = command("plan", toml, "--run", folder, *more)
    assert done.code == 0, done.err
    return RunFolder(folder)


def worked(folder: RunFolder, **task: Any) -> Any:
    """Be one worker of a run, in a child; return how many points it evaluated."""
    return in_child(work, folder, Role(**{"device": "cpu", "beat": 1.0, **task}))


def finished(toml: Path, **options: Any) -> RunFolder:
    """Plan a sweep and evaluate all of it, undisturbed."""
    folder = planned(toml, **options)
    points = worked(folder)
    assert isinstance(points, int), points
    return folder


@dataclass(frozen=True)
class Held:
    """What a run holds: its parts, by name, and which points and slices are done."""

    parts: list[Part]
    done: np.ndarray


def committed(folder: RunFolder) -> Held:
    """Return what is committed."""
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    parts = [read_part(p, plan.digest, len(plan.variables)) for p in folder.all_parts()]
    return Held(parts, Committed.read(folder, plan, rounds).done)


def evaluated(folder: RunFolder) -> list[tuple[int, int]]:
    """Return (point, slice) of each value row, once for each time that it was committed."""
    rows = [r for p in committed(folder).parts for r in p.rows if r["kind"] == Kind.VALUE]
    return sorted((int(r["point"]), int(r["slice"])) for r in rows)


def merged(folder: RunFolder) -> tuple[Surface, Report]:
    """Merge a run."""
    return merge(folder)


def differences(a: Surface, b: Surface) -> list[str]:
    """Return the names of what is not equal bit for bit in two surfaces."""
    names = [n for n in {*a.values, *b.values} if n not in a.values or n not in b.values]
    pairs = [(n, a.values[n], b.values[n]) for n in a.values if n in b.values]
    pairs += [("status", a.status, b.status), *((n, a.axes[n], b.axes[n]) for n in a.axes)]
    return names + [n for n, x, y in pairs if x.shape != y.shape or x.tobytes() != y.tobytes()]


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Return what ``condition`` says as soon as it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.01)
    raise AssertionError("waited too long")
