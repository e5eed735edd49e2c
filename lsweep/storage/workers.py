"""Signs of life: what each worker tells about itself, and whether it is still there.

A worker on the same host (same boot, same pid namespace) is judged by its process; one elsewhere
is dead only when the content of its file has stood still for long on the observer's own clock,
because a shared file system may show names and times a minute late. One that lives and is at one
unit for as long, or five times its longest, hangs: others do that unit too, and count no death. A
wrong verdict costs duplicate work, never a wrong value.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lsweep.errors import DamagedFile, LsweepError
from lsweep.hosts.machine import host_identity, start_time
from lsweep.storage.files import read_json, readable, replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there

PATIENCE = 180.0  # seconds
UNITS_OF_PATIENCE = 5


class State(enum.StrEnum):
    """What a worker does, or how it ended."""

    WORKING = "working"
    DONE = "done"
    STOPPED = "stopped"
    SICK = "sick"
    FAILED = "failed"


class Verdict(enum.Enum):
    """What another worker thinks of one."""

    ALIVE = "alive"
    ENDED = "ended"
    DIED = "died"


class Heartbeat:
    """A worker's own file, rewritten by a thread that also syncs what the worker committed."""

    def __init__(
        self, folder: RunFolder, name: str, interval: float, sync: Callable[[], None], **more: Any
    ) -> None:
        self._path, self._interval, self._sync = folder.worker(name), interval, sync
        self._facts: dict[str, Any] = {
            "worker": name,
            "host": socket.gethostname(),
            "identity": host_identity(),
            "pid": os.getpid(),
            "start": start_time(os.getpid()),
            "state": State.WORKING,
            "beat": 0,
            "since": time.time(),
            "points": 0,
            "busy": 0.0,
            "longest": 0.0,
            "unit": None,  # when the present one began
            "minimum": None,
            "message": "",
            **more,
        }
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.disk_error: OSError | None = None
        self._write()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lsweep-heartbeat")
        self._thread.start()

    def tell(self, **facts: Any) -> None:
        """Change what the next beat says."""
        with self._lock:
            self._facts.update(facts)

    @property
    def longest(self) -> float:
        """Seconds of the longest unit so far."""
        return float(self._facts["longest"])

    @property
    def hangs(self) -> bool:
        """Whether this worker is too long at one unit, be it its first."""
        with self._lock:
            return at_one_unit(self._facts, time.time()) > patience(self._facts["longest"])

    def did(self, points: int, seconds: float, minimum: float | None) -> None:
        """Count finished work."""
        with self._lock:
            f = self._facts
            f["points"] += points
            f["busy"] += seconds
            f["longest"] = max(f["longest"], seconds)
            if minimum is not None and (f["minimum"] is None or minimum < f["minimum"]):
                f["minimum"] = minimum

    def _write(self) -> None:
        with self._lock:
            self._facts["beat"] += 1
            self._facts["now"] = time.time()
            data = sealed(self._facts)
        # A full disk must not stop a worker whose part still has room.
        with contextlib.suppress(OSError):
            replace(self._path, data)

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._over.wait(min(1.0, self._interval)):
            try:
                self._sync()
            except OSError as e:
                self.disk_error = e
            if time.monotonic() - last >= self._interval:
                last = time.monotonic()
                self._write()

    def end(self, state: State, message: str = "") -> None:
        """Stop beating and say how it ended."""
        self._over.set()
        self._thread.join()
        self.tell(state=state, message=message[:500])
        self._write()


class Observer:
    """Judges whether other workers are alive, remembering when it saw their files change."""

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._seen: dict[str, tuple[int, float, float]] = {}
        self._here = host_identity()

    def verdict(self, worker: str) -> Verdict:
        """Say whether a worker is alive, has ended in order, or died."""
        path = self._folder.worker(worker)
        try:
            facts = read_json(path)
        except DamagedFile:
            return Verdict.DIED
        except LsweepError:
            if not there(path):
                return Verdict.DIED  # a worker writes its file before it leases
            return self._unchanged(worker)  # the disk's error says nothing about the worker
        if facts.get("state") != State.WORKING:
            return Verdict.ENDED
        if facts.get("identity") == self._here:
            same = start_time(int(facts["pid"])) == facts.get("start")
            return Verdict.ALIVE if same else Verdict.DIED
        beat = int(facts["beat"])
        if worker not in self._seen or self._seen[worker][0] != beat:
            self._seen[worker] = (beat, self._clock(), float(facts["longest"]))
        return self._unchanged(worker)

    def _unchanged(self, worker: str) -> Verdict:
        _, since, longest = self._seen.setdefault(worker, (-1, self._clock(), 0.0))
        return Verdict.DIED if self._clock() - since > patience(longest) else Verdict.ALIVE

    def hangs(self, worker: str) -> bool:
        """Say whether a living worker is too long at one unit, or on this host beats no more.

        Of its first unit nobody knows how long that may take.
        """
        try:
            facts = read_json(self._folder.worker(worker))
        except LsweepError:
            return False
        most, said = patience(facts["longest"]), float(facts["now"])
        silent = facts.get("identity") == self._here and time.time() - said > most
        return silent or (facts["longest"] > 0 and at_one_unit(facts, said) > most)


def patience(longest: float) -> float:
    """Return for how many seconds a worker may be silent, or at one unit.

    Args:
        longest: seconds that the longest of its units took.

    >>> patience(1.0), patience(100.0)
    (180.0, 500.0)
    """
    return max(PATIENCE, UNITS_OF_PATIENCE * longest)


def at_one_unit(facts: Mapping[str, Any], now: float) -> float:
    """Return for how many seconds a worker is at its present unit.

    Args:
        facts: what it last said.
        now: by its own clock.
    """
    since = facts.get("unit")  # older versions do not tell
    return now - since if since else 0.0


def all_workers(folder: RunFolder) -> list[dict[str, Any]]:
    """Return what every worker of a run last said; unreadable files are passed over."""
    return readable(folder.all_workers())
