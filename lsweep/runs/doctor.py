"""The doctor: whether runs are safe on the user's file system, by probing it as runs use it.

Each probe tells one thing with its consequence. What one node can see is probed here; what another
node sees, and when, in `lsweep.runs.meeting`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError
from lsweep.outcomes.reading import read_part
from lsweep.storage.files import NO_LINKS, link_once, publish, replace, write_scratch
from lsweep.storage.insist import discard, insist, link, make_folder, names, read, there
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import Kind, Rows, row_type

CLAIMS = 50
COMMITS = 20
A_WHILE = 3.0  # seconds for one probe
SLOW_CLAIM = 0.2  # seconds; then even large units spend their time on leases
OVERHEAD = 0.01  # share of a worker's time that bookkeeping may take
ENOUGH_BYTES = 256 * 2**20
ENOUGH_FILES = 10_000
PLAN = "probe"


class Level(enum.IntEnum):
    """What a finding means for runs."""

    OK = 0
    NOTE = 1
    STATIC = 2
    UNSAFE = 3


@dataclass(frozen=True)
class Finding:
    """What one probe found.

    Attributes:
        name: of the probe.
        level: what it means for runs.
        text: what was found and what follows from it, for people.
        figures: seconds and counts, for programs.
    """

    name: str
    level: Level
    text: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one folder."""

    folder: Path
    kind: str
    findings: list[Finding]

    @property
    def level(self) -> Level:
        """The worst of all."""
        return max((f.level for f in self.findings), default=Level.OK)

    @property
    def verdict(self) -> str:
        """One line: whether runs are safe here, and how."""
        because = "; ".join(f.text for f in self.findings if f.level is self.level)
        if self.level is Level.UNSAFE:
            return f"not safe for runs because {because}"
        if self.level is Level.STATIC:
            return f"use --claims static because {because}"
        return "safe with leases"

    @property
    def exit_code(self) -> int:
        """0 when leases are safe, 3 with ``--claims static`` only, 1 when runs are not safe."""
        return {Level.UNSAFE: 1, Level.STATIC: 3}.get(self.level, 0)

    def lines(self) -> list[str]:
        """Return the diagnosis for people, the verdict last."""
        words = {Level.OK: "ok", Level.NOTE: "note", Level.STATIC: "static", Level.UNSAFE: "BAD"}
        width = max(len(f.name) for f in self.findings)
        out = [f"{self.folder} ({self.kind})"]
        out += [f"  {words[f.level]:6} {f.name:{width}}  {f.text}" for f in self.findings]
        return [*out, self.verdict]

    def as_json(self) -> dict[str, Any]:
        """Return the diagnosis for programs."""
        found = [{**asdict(f), "level": f.level.name.lower()} for f in self.findings]
        return {"folder": str(self.folder), "filesystem": self.kind, "verdict": self.verdict,
                "level": self.level.name.lower(), "findings": found}  # fmt: skip


def diagnose(folder: Path) -> Diagnosis:
    """Probe a folder as one node sees it; what was written is removed.

    Raises:
        LsweepError: there is no such folder, or nothing can be written to it.

    >>> diagnose(Path("nowhere"))
    Traceback (most recent call last):
    lsweep.errors.LsweepError: no folder nowhere
    """
    if not insist(folder.is_dir):
        raise LsweepError(f"no folder {folder}")
    place = folder / f".lsweep-doctor.{uuid.uuid4().hex[:12]}"
    try:
        make_folder(place)
    except OSError as e:
        raise LsweepError(f"cannot write to {folder}: {e.strerror}") from None
    try:
        return Diagnosis(folder, filesystem(folder), [_probed(p, place) for p in PROBES])
    finally:
        remove(place)


def remove(place: Path) -> None:
    """Remove what probes wrote, as far as the file system lets."""
    for _ in range(3):  # a node may list late what it holds
        with contextlib.suppress(OSError):  # which rmtree does not ignore of its own looks
            shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            if not there(place):
                return


def filesystem(folder: Path) -> str:
    """Return the type of the file system that holds ``folder``, such as ``nfs4`` or ``lustre``."""
    kind, longest = "unknown", -1
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            mount, type_ = line.split()[1:3]
            mount = mount.encode().decode("unicode_escape")
            if folder.resolve().is_relative_to(mount) and len(mount) >= longest:
                kind, longest = type_, len(mount)
    return kind


def _probed(probe: Callable[[Path], Finding], place: Path) -> Finding:
    name = probe.__name__.strip("_").replace("_", " ")
    own = place / name.replace(" ", "-")
    try:
        make_folder(own)
        found = probe(own)
    except (OSError, LsweepError) as e:
        reason = " ".join(str(e).replace(f"{place}{os.sep}", "").split())
        return Finding(name, Level.UNSAFE, f"{name}: {reason}")
    return Finding(name, found.level, found.text, found.figures)


def _opened(place: Path) -> int:
    # The second try of a lost reply meets the file that the first made.
    path = place / "file"
    return insist(lambda: os.open(path, os.O_RDWR | os.O_CREAT, 0o666), also=(errno.EEXIST,))


def _ok(text: str, **figures: float) -> Finding:
    return Finding("", Level.OK, text, figures)


def timed(call: Callable[[int], object], count: int) -> float:
    """Return the median seconds of ``call(i)`` for i below ``count``, or what a while allows."""
    seconds: list[float] = []
    for i in range(count):
        if sum(seconds) > A_WHILE:
            break
        start = time.perf_counter()
        call(i)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# -- probes ----------------------------------------------------------------------------------------


def _hard_links(place: Path) -> Finding:
    name = place / "name"
    mine, theirs, third = (write_scratch(name, text) for text in (b"mine", b"theirs", b"third"))
    try:
        link(third, place / "third")
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        return _ok("no: exclusive names decide instead")
    if not link_once(mine, name) or link_once(theirs, name) or read(name) != b"mine":
        return Finding("", Level.UNSAFE, "a second link takes a name that is taken: two workers "
                       "would publish one round or hold one lease")  # fmt: skip
    return _ok("yes: a name that is published stays")


def _exclusive_create(place: Path) -> Finding:
    path = write_scratch(place / "name", b"mine")
    try:
        os.close(insist(lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)))
    except FileExistsError:
        return _ok("yes")
    return Finding("", Level.UNSAFE, "a file is created twice under one name")


def _rename_over(place: Path) -> Finding:

    def over(i: int) -> None:
        replace(place / "name", f"{i}".encode())
        if read(place / "name") != f"{i}".encode():
            raise LsweepError("a file that was replaced shows what it was before")

    timed(over, CLAIMS)
    return _ok("yes: heartbeats are replaced whole")


def _sync(place: Path) -> Finding:
    fd = _opened(place)
    try:

        def commit(i: int) -> None:
            os.pwrite(fd, bytes([i % 256]) * 160, i * 160)
            os.fdatasync(fd)

        seconds = timed(commit, COMMITS)
    finally:
        os.close(fd)
    text = f"a sync takes {1e3 * seconds:.3g} ms"
    folder = insist(lambda: os.open(place, os.O_RDONLY))
    try:
        os.fsync(folder)
    except OSError:
        text += "; folders cannot be synced: a node's crash may lose a new name, never a value"
    finally:
        os.close(folder)
    return _ok(text, seconds=seconds)


def _preallocation(place: Path) -> Finding:
    fd = _opened(place)
    start = time.perf_counter()
    try:
        os.posix_fallocate(fd, 0, 1 << 20)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return _ok("no: a full disk shows in mid-run, and stops that worker only")
    finally:
        os.close(fd)
    return _ok("yes: a full disk shows before a part is used", seconds=time.perf_counter() - start)


def _rows(points: range) -> Rows:
    import numpy as np

    rows = np.zeros(len(points), row_type(1))
    rows["point"], rows["kind"], rows["status"] = points, Kind.VALUE, 1
    rows["sums"] = np.asarray(points)[:, None, None]
    return rows


def _parts(place: Path) -> Finding:
    path = place / "probe.0000.h5"
    writer = insist(
        lambda: PartWriter(path, plan=PLAN, variables=1, capacity=256, header={}),
        also=(errno.EEXIST, errno.EBADF),
    )
    try:

        def commit(i: int) -> None:
            writer.append(_rows(range(i, i + 1)))
            writer.sync()
            part = read_part(path, PLAN, 1)
            for _ in range(4):  # HDF5 hides a stale handle, which passes, behind other errors
                part = read_part(path, PLAN, 1) if part.salvaged else part
            if len(part.rows) != i + 1 or part.salvaged or part.damaged:
                raise LsweepError(
                    f"a part that is written shows {len(part.rows)} of {i + 1} rows to a reader"
                    + (", and HDF5 cannot open it" if part.salvaged else "")
                )

        seconds = timed(commit, COMMITS)
    finally:
        writer.close()
    return _ok(f"can be read while they are written; {1e3 * seconds:.3g} ms for both",
               seconds=seconds)  # fmt: skip


def _locks(place: Path) -> Finding:
    fd = _opened(place)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return _ok(f"no ({os.strerror(e.errno or 0)}): they are not needed")
    finally:
        os.close(fd)
    return _ok("yes, but they are not needed")


def _leases(place: Path) -> Finding:
    claim = timed(lambda i: publish(place / f"{i:06d}.g0", b"{}" * 60, sync=False), CLAIMS)
    listing = timed(lambda i: names(place), 5)
    least = claim / OVERHEAD
    text = (f"a claim takes {1e3 * claim:.3g} ms, a listing {1e3 * listing:.3g} ms: "
            f"leases of {least:.2g} s or more spend under {OVERHEAD:.0%} on claims")  # fmt: skip
    if claim > SLOW_CLAIM:
        return Finding("", Level.STATIC, f"a claim takes {claim:.2g} s", {"claim": claim})
    return _ok(text, claim=claim, listing=listing)


def _room(place: Path) -> Finding:
    st = os.statvfs(place)
    free = st.f_bavail * st.f_frsize
    text = f"{free / 2**30:.3g} GiB free"
    if st.f_files:
        text += f", {st.f_favail} more files"
    short = free < ENOUGH_BYTES or (st.f_files and st.f_favail < ENOUGH_FILES)
    more = ": 'lsweep plan' says what a run takes" if short else ""
    return Finding("", Level.NOTE if short else Level.OK, text + more, {"bytes": float(free)})


def _clock(place: Path) -> Finding:
    skew = clock_offset(place)
    text = f"{abs(skew):.3f} s {'behind' if skew > 0 else 'ahead of'} the server's: nothing "
    return _ok(text + "depends on it", skew=skew)


def clock_offset(place: Path) -> float:
    """Return what is to be added to this node's clock to get the file server's."""
    before = time.time()
    path = write_scratch(place / "clock", b"now")
    after = time.time()

    def modified() -> float:
        fd = os.open(path, os.O_RDONLY)  # what was opened is not remembered
        try:
            return os.fstat(fd).st_mtime
        finally:
            os.close(fd)

    try:
        return insist(modified) - (before + after) / 2
    finally:
        discard(path)


PROBES = (_hard_links, _exclusive_create, _rename_over, _sync, _preallocation, _parts, _locks,
          _leases, _room, _clock)  # fmt: skip
