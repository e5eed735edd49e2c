"""The watchdog: a worker that hangs at a unit which others did meanwhile ends its process.

mpiexec waits for every rank, and the merge for all tasks of an array: one device that never
answers would hold up a run that is complete.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from lsweep.errors import LsweepError
from lsweep.runs.status import is_complete
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import Heartbeat, State

LOOK = 10.0  # seconds between looks
HANGS = "hangs at a unit that others did, and ends: nothing is missing"


@contextlib.contextmanager
def watched(folder: RunFolder, heart: Heartbeat) -> Iterator[None]:
    """End this process, with exit code 0, once it hangs within this block and nothing is missing.

    Args:
        folder: the run.
        heart: tells since when the worker is at its unit.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            if not heart.hangs:
                continue
            with contextlib.suppress(LsweepError, OSError):  # its disk may be what hangs
                if is_complete(folder) and not over.is_set():
                    heart.end(State.FAILED, HANGS)
                    sys.stderr.write(f"lsweep: this worker {HANGS}\n")
                    sys.stderr.flush()
                    os._exit(0)  # the thread that hangs cannot be asked to

    thread = threading.Thread(target=watch, daemon=True, name="lsweep-watchdog")
    thread.start()
    try:
        yield
    finally:
        over.set()
