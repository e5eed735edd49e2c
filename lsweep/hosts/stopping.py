"""Stopping: what asks a process to end early, and whether another unit may still begin.

INT and TERM drop the unit in flight at once, for a kill may follow within seconds; USR1 and USR2,
which come ahead of a time limit, let it finish. A known end time is obeyed without any signal:
a batch shell often gets none.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

AT_ONCE = ("SIGINT", "SIGTERM")
AFTER_THE_UNIT = ("SIGUSR1", "SIGUSR2")
TIME_LIMIT = "the time limit"
MARGIN = 10.0  # seconds to sync, to write the last heartbeat and to ask for another turn
CAUTION = 1.5  # a unit may take so much longer than the longest so far


class Stopped(KeyboardInterrupt):
    """Asked to end, in order: all that was committed is kept; ``points`` of it by this process."""

    points = 0


class Stop:
    """One answer to "go on?", from signals, an end time and the process that started this one.

    As a context manager it takes the four signals over; in a thread, which cannot, it leaves
    Ctrl-C to Python.

    Attributes:
        reason: what asked it to end, such as ``SIGTERM``; "" while nothing has.
        end: when this process will be killed, in seconds since the epoch; None: nobody knows.

    >>> Stop(end=time.time() + 60).check(unit=1.0)
    """

    def __init__(self, end: float | None = None, parent: int = 0) -> None:
        self.end, self.reason = end, ""
        self._parent = parent
        self._raised = False
        self._before: dict[int, Any] = {}

    @property
    def at_once(self) -> bool:
        """True unless the unit in flight may still be finished."""
        return self.reason not in (*AFTER_THE_UNIT, TIME_LIMIT)

    def __enter__(self) -> Stop:
        for name in (*AT_ONCE, *AFTER_THE_UNIT):
            try:
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._told)
            except (AttributeError, ValueError):  # another system; not the main thread
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _told(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.reason = name if name in AT_ONCE else self.reason or name
        # Raised once: a second TERM must not interrupt the syncing that the first one asked for.
        # A second Ctrl-C may: someone waits at a keyboard.
        if name == "SIGINT" or (name == "SIGTERM" and not self._raised):
            self._raise(name)

    def _raise(self, reason: str) -> None:
        self.reason, self._raised = reason, True
        raise Stopped(reason)

    def check(self, unit: float = 0.0) -> None:
        """Return if work that takes ``unit`` seconds, 0 when unknown, may begin.

        Raises:
            Stopped: it may not.
        """
        if self.reason:
            self._raise(self.reason)
        if self._parent and os.getppid() != self._parent:
            self._raise("the launcher is gone")
        if self.end is not None and time.time() + CAUTION * unit + MARGIN > self.end:
            self._raise(TIME_LIMIT)
