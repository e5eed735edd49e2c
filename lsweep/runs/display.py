"""The live display: done, rate and time left over all workers, and the minimum so far.

One line that rewrites itself on a terminal; a line every ten seconds elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from lsweep.errors import LsweepError
from lsweep.outcomes.frozen import of_this_version
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import Observer, State, Verdict, all_workers
from lsweep.wording import HERE, counted

ON_TERMINAL, ELSEWHERE = 0.5, 10.0  # seconds between updates


class Display:
    """Shows the progress of a run while it is open; a thread of its own reads the heartbeats.

    Args:
        folder: the run.
        total: points of the run, times slices.
        done: how many were committed before.
        stream: where to write; None is silent.
    """

    def __init__(self, folder: RunFolder, total: int, done: int, stream: TextIO | None) -> None:
        self._folder, self._total, self._before = folder, total, done
        self._refining = _is_refining(folder)
        self._stream = stream
        self._live = bool(stream and stream.isatty())
        self._earlier = {w["worker"]: int(w["points"]) for w in all_workers(folder)}
        self._observer = Observer(folder)
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._classes: set[str] = set()
        self._started = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="lsweep-display")

    def __enter__(self) -> Display:
        if self._stream:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._stream:
            self._thread.join()
            if exception[0] is None:  # of a refusal one line is enough
                self._say_preflight()  # a fast run is over before the first look
            if self._live:
                self._write("\r\033[K")

    def started(self, workers: int) -> None:
        """Take note of how many workers were started here, which are not heard of at once."""
        self._started = workers

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._stream:
            self._write(f"\r\033[K{text}\n" if self._live else f"{text}\n")

    def _write(self, text: str) -> None:
        assert self._stream is not None
        with self._lock:
            self._stream.write(text)
            self._stream.flush()

    def _run(self) -> None:
        while not self._over.wait(ON_TERMINAL if self._live else ELSEWHERE):
            self._say_preflight()
            line = self.line()
            self._write(f"\r\033[K{line[: self._columns() - 1]}" if self._live else f"{line}\n")

    def _columns(self) -> int:
        # A line that wraps could not be rewritten.
        assert self._stream is not None
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _say_preflight(self) -> None:
        """Tell once for each device class what its first worker found at the centre."""
        for path in self._folder.all_devices():
            if path.name in self._classes:
                continue
            self._classes.add(path.name)
            with contextlib.suppress(LsweepError, KeyError, TypeError):
                found = of_this_version(read_json(path), Plan.read(self._folder))
                self.say(preflight_line(found, self._total - self._before))
                why = dropped(found)
                if why:
                    self.say(why)

    def line(self) -> str:
        """Return the present state in one line."""
        workers = all_workers(self._folder)
        new = sum(int(w["points"]) - self._earlier.get(w["worker"], 0) for w in workers)
        done = min(self._total, self._before + new)
        working = [
            w
            for w in workers
            if w["state"] == State.WORKING
            and self._observer.verdict(w["worker"]) is Verdict.ALIVE  # not killed
        ]
        hands = counted(len(working), "worker")
        if not new:
            count = max(len(working), self._started)
            hands = counted(count, "worker") if count else "workers"
            return f"{done}/{self._total} points, {hands} starting: network, data, pre-flight"
        if not working:
            return f"{self._before + new if self._refining else done} points, workers are done"
        # Each worker's own busy time gives the rate; starting up is no part of it.
        rate = sum(w["points"] / w["busy"] for w in working if w["busy"] > 0)
        left = f", {duration((self._total - done) / rate)} left" if rate else ""
        lows = [w["minimum"] for w in workers if w["minimum"] is not None]
        low = f", minimum {min(lows):.4g}" if lows else ""
        if self._refining:  # how many points it takes is found out on the way
            return f"{self._before + new} points, refining, {speed(rate)}, {hands}{low}"
        return (
            f"{done}/{self._total} points ({done / self._total:.0%}), {speed(rate)}, "
            f"{hands}{left}{low}"
        )


def _is_refining(folder: RunFolder) -> bool:
    with contextlib.suppress(LsweepError):
        return Rounds.read(folder, Plan.read(folder)).refining
    return False


def preflight_line(found: dict[str, Any], points: int) -> str:
    """Return what a pre-flight found, in one line."""
    anchor = found.get("anchor") or {}
    centre = ", ".join(
        f"{name} {value:.6g}"
        + (f" ({anchor[name]['whole']:.6g} over all)" if name in anchor else "")
        for name, value in found["centre"].items()
        if value is not None
    )
    seconds = float(found["seconds_per_point"])
    backend = f"{found['backend']} in {found['precision']}"
    if found.get("speed") and found["backend"] != "eager":
        error = found["error"]  # None where one of the two is not finite
        off = "not comparable" if error is None else f"off by {error:.1g}"
        tried = found.get("tried") or ()
        timed = [t["precision"] for t in tried if t["backend"] == "eager" and t["seconds"]]
        among = f" in {timed[0]}" if len({t["precision"] for t in tried}) > 1 else ""
        backend += f" ({found['speed']:.3g} times eager's speed{among}, {off})"
    drawn = " and ".join(f"{n}" for n in dict.fromkeys(found["samples"].values()))
    over = f" (over {drawn} drawn samples)" if anchor else ""
    start = f"pre-flight on {found['device']}: {centre} at the centre{over}; {backend}: "
    memory = f"{found['memory'] / 2**20:.0f} MiB"
    if found.get("pointwise"):  # how many passes they take is found out at the first point
        return (
            f"{start}{1e3 * seconds:.3g} ms a pass over the data, of which "
            f"{', '.join(found['pointwise'])} take many, {memory}"
        )
    takes = f"; {points} points take {duration(points * seconds)} of one worker"
    return f"{start}{1e3 * seconds:.3g} ms a point, {memory}{takes * (points * seconds >= 1)}"


def dropped(found: Mapping[str, Any]) -> str:
    """Return why native code was dropped, where that is for the machine; "" otherwise.

    >>> dropped({"tried": [{"backend": "native", "why_not": f"{HERE}there is no C++ compiler"}]})
    'native code was left out: on this machine there is no C++ compiler'
    """
    for trial in found.get("tried") or ():
        if trial["backend"] == "native" and trial["why_not"].startswith(HERE):
            return f"native code was left out: {trial['why_not']}"
    return ""


@contextlib.contextmanager
def stage(text: str, stream: TextIO) -> Iterator[None]:
    """Show on a terminal what happens meanwhile."""
    live = stream.isatty()
    if live:
        stream.write(f"\r\033[K{text} …")
        stream.flush()
    try:
        yield
    finally:
        if live:
            stream.write("\r\033[K")
            stream.flush()


def speed(rate: float) -> str:
    """Return points per second, never in exponents that nobody reads.

    >>> speed(1234.5), speed(0.01234)
    ('1234/s', '0.0123/s')
    """
    return f"{rate:.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def duration(seconds: float) -> str:
    """Return a time span in two units.

    >>> duration(75), duration(3), duration(90061)
    ('1 min 15 s', '3 s', '25 h 1 min')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    return f"{s // 3600} h {s % 3600 // 60} min"
