"""The local launcher: one process per worker on this machine, watched until the run is complete."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lsweep.hosts.machine import cpus
from lsweep.hosts.stopping import MARGIN, Stop
from lsweep.runs.status import is_complete, share_done
from lsweep.storage.files import writing
from lsweep.storage.folder import RunFolder
from lsweep.working.role import Role

RESTARTS_WITHOUT_PROGRESS = 6  # more than a poison point needs to be found out
GRACE = 20.0  # seconds that a worker has to end once it was told
POLL = 0.2
PROMPT = "$ "


@dataclass
class Outcome:
    """How local workers ended.

    Attributes:
        code: 0, or the worst exit code of a worker that could not go on.
        events: what happened to workers, in lines for people.
        refusal: what the last of them said that could not go on.
        interrupted: True after Ctrl-C, another signal or a time limit.
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
    role: Role,
    count: int,
    stop: Stop,
    *,
    one_device: bool = False,
    on_event: Callable[[str], None] = lambda text: None,
    on_refusal: Callable[[str], None] | None = None,
) -> Outcome:
    """Run ``count`` workers, which together have one role, to the end.

    A worker that dies is reported and replaced; its unit is done by whoever comes first. Workers
    that end with an error of their own (exit 1 or 3) are not replaced.

    Args:
        folder: a planned run.
        role: what they share: worker k of ``role.index`` is ``role.index * count + k``.
        count: number of processes.
        stop: asked all the time whether to go on; they are told what it was told.
        one_device: all take the device of ``role.local``; otherwise GPUs are dealt out in turn.
        on_event: told when a worker dies or refuses.
        on_refusal: told instead when one refuses.
    """
    outcome = Outcome()
    threads = str(role.threads)
    command = [sys.executable, "-m", "lsweep", "work", str(folder.root.absolute())]
    command += ["--of", str(role.of * count), "--device", role.device, "--threads", threads]
    command += ["--claims", role.claims, "--beat", str(role.beat), "--parent", str(os.getpid())]
    command += ["--trust"] if role.trust else []
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def start(index: int) -> subprocess.Popen[bytes]:
        local = role.local if one_device else index
        with writing(folder.logs):
            folder.logs.mkdir(parents=True, exist_ok=True)
            with folder.log(index).open("a") as log:
                # One line takes the block in which a worker can still say that the disk is full.
                log.write(f"{PROMPT}{' '.join(command[1:])}\n")
        with folder.log(index).open("ab") as log:
            process = subprocess.Popen(
                [*command, "--index", str(index), "--local", str(local)],
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

    running: dict[int, subprocess.Popen[bytes]] = {}
    restarts, seen, over = 0, done(), math.inf
    try:
        for index in range(role.index * count, (role.index + 1) * count):
            running[index] = start(index)
        while running:
            stop.check()
            if time.monotonic() - over > GRACE:
                hanging = ", ".join(map(str, running))
                tell(f"worker {hanging} hangs and is ended: nothing is missing")
                break
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
                    outcome.refusal = message or f"worker {index} ended with {process.returncode}"
                    tell(outcome.refusal, on_refusal or on_event)
                    outcome.code = max(outcome.code, process.returncode)
                elif over == math.inf and is_complete(folder):
                    over = time.monotonic()
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        _end(running, stop)
    return outcome


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    if not lines or lines[-1].startswith(PROMPT):
        return ""
    return lines[-1].removeprefix("lsweep: ")


def _end(running: dict[int, subprocess.Popen[bytes]], stop: Stop) -> None:
    for process in running.values():
        process.send_signal(signal.SIGTERM if stop.at_once else signal.SIGUSR1)
    left = MARGIN if stop.end is None else stop.end - time.time() - MARGIN
    deadline = time.monotonic() + (GRACE if stop.at_once else max(GRACE, left))
    for process in running.values():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
