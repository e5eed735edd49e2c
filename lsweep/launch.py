"""The local launcher: one process per worker on this machine, watched until the run is complete."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lsweep.files import writing
from lsweep.folder import RunFolder
from lsweep.machine import cpus
from lsweep.status import share_done

RESTARTS_WITHOUT_PROGRESS = 6  # more than a poison point needs to be found out
GRACE = 20.0  # seconds that an interrupted worker has to end
POLL = 0.2
PROMPT = "$ "


@dataclass
class Outcome:
    """How local workers ended.

    Attributes:
        code: 0, or the worst exit code of a worker that could not go on.
        events: what happened to workers, in lines for people.
        refusal: what the last of them said that could not go on.
        interrupted: True after Ctrl-C or SIGTERM.
        pids: of all workers that ever ran.
    """

    code: int = 0
    events: list[str] = field(default_factory=list)
    refusal: str = ""
    interrupted: bool = False
    pids: set[int] = field(default_factory=set)


def default_workers(gpus: int, per_gpu: int = 1) -> int:
    """Return ``per_gpu`` workers for each GPU, or one for each CPU that this process may use.

    >>> default_workers(4, 2)
    8
    """
    return gpus * per_gpu or cpus()


def run_workers(
    folder: RunFolder,
    count: int,
    *,
    device: str = "auto",
    threads: int = 1,
    claims: str = "lease",
    trust: bool = False,
    first: int = 0,
    of: int | None = None,
    local: int | None = None,
    on_event: Callable[[str], None] = lambda text: None,
    on_refusal: Callable[[str], None] | None = None,
) -> Outcome:
    """Run ``count`` workers to the end.

    A worker that dies is reported and replaced; its unit is done by whoever comes first. Workers
    that end with an error of their own (exit 1 or 3) are not replaced.

    Args:
        folder: a planned run.
        count: number of processes.
        device: for every worker; with ``auto`` or ``cuda`` GPUs are dealt out in turn.
        threads: torch threads of each.
        claims: ``lease`` or ``static``.
        trust: passed on.
        first: number of the first of them among all workers of the run.
        of: how many workers the run has in all; None: these.
        local: what picks their GPU, the same for all; None: each its own number.
        on_event: told when a worker dies or refuses.
        on_refusal: told instead when one refuses.
    """
    outcome = Outcome()
    command = [sys.executable, "-m", "lsweep", "work", str(folder.root), "--of", str(of or count)]
    command += ["--device", device, "--threads", str(threads), "--claims", claims, "--beat", "1"]
    command += ["--parent", str(os.getpid()), *(["--trust"] if trust else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def start(index: int) -> subprocess.Popen[bytes]:
        with writing(folder.logs):
            folder.logs.mkdir(parents=True, exist_ok=True)
            with folder.log(index).open("a") as log:
                # One line takes the block in which a worker can still say that the disk is full.
                log.write(f"{PROMPT}{' '.join(command[1:])}\n")
        with folder.log(index).open("ab") as log:
            process = subprocess.Popen(
                [
                    *command,
                    "--index",
                    str(index),
                    "--local",
                    str(index if local is None else local),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which tells them
            )
        outcome.pids.add(process.pid)
        return process

    def done() -> int:
        return share_done(folder)[0]  # workers that die at once leave rows, but no heartbeat

    def tell(text: str, listener: Callable[[str], None] = on_event) -> None:
        if text not in outcome.events:  # workers that refuse for one reason say it once
            outcome.events.append(text)
            listener(f"lsweep: {text}")

    stop = _Stop()
    running: dict[int, subprocess.Popen[bytes]] = {}
    restarts, seen = 0, done()
    with stop:
        try:
            for index in range(first, first + count):
                running[index] = start(index)
            while running and not stop.asked:
                time.sleep(POLL)
                for index, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[index]
                    message = _last_line(folder.log(index))
                    if process.returncode < 0:
                        name = signal.Signals(-process.returncode).name
                        now = done()
                        restarts, seen = (1, now) if now > seen else (restarts + 1, seen)
                        if restarts > RESTARTS_WITHOUT_PROGRESS * count:
                            tell(f"worker {index} was killed ({name}); too often, it stays down")
                            outcome.code = max(outcome.code, 1)
                            continue
                        tell(f"worker {index} was killed ({name}); another takes its unit over")
                        running[index] = start(index)
                    elif process.returncode:
                        outcome.refusal = (
                            message or f"worker {index} ended with {process.returncode}"
                        )
                        tell(outcome.refusal, on_refusal or on_event)
                        outcome.code = max(outcome.code, process.returncode)
        finally:
            outcome.interrupted = stop.asked
            _end(running)
    return outcome


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    if not lines or lines[-1].startswith(PROMPT):
        return ""
    return lines[-1].removeprefix("lsweep: ")


def _end(running: dict[int, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in running.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Stop:
    """Ctrl-C and SIGTERM ask once, in order; a second Ctrl-C is Python's own."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread, such as a notebook's: Ctrl-C is Python's own
                break
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
