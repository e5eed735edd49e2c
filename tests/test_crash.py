"""A part after a crash at any instant: what was committed is read, nothing wrong is, nothing hangs.

A real writer's file operations are recorded, then the file is rebuilt as a crash would have left
it: after every operation, with every write torn, and after a power loss that kept or dropped each
512-byte sector written since the last sync. HDF5 may hang on such files, so children read them.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import each_in_child

from lsweep.outcomes.reading import read_part
from lsweep.storage.folder import RunFolder
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import row_type
from lsweep.storage.sums import SUMS
from lsweep.surfaces.surface import Status

PLAN, VARIABLES, CAPACITY = "a" * 64, 2, 256
SECTOR = 512
COMMITS = [1, 3, 1, 16, 2, 1, 5, 1, 1, 8, 2, 1, 30, 1, 4, 1, 1, 2, 16, 1]  # rows of each unit
SYNC_EVERY = 3  # commits
FAILING = 7  # every so many rows
Op = tuple[Any, ...]


def rows(count: int) -> np.ndarray:
    """The rows that the writer commits, in order; values that no accident makes."""
    rng = np.random.default_rng(3)
    out = np.zeros(count, row_type(VARIABLES))
    out["point"], out["slice"] = np.arange(count) + 1000, 2
    out["status"], out["seconds"] = Status.OK, rng.random(count)
    out["sums"] = rng.standard_normal((count, VARIABLES, len(SUMS)))
    out["status"][::FAILING] = Status.FAILED
    out["device"] = 77
    return out


ROWS = rows(sum(COMMITS))


def write_part(path: Path, mark: Any) -> None:
    """Be the writer; ``mark(word, n)`` is told what is committed and what is synced."""
    writer = PartWriter(
        path, plan=PLAN, variables=VARIABLES, capacity=CAPACITY, header={"worker": "w"}
    )
    done = 0
    for i, count in enumerate(COMMITS):
        unit = ROWS[done : done + count].copy()
        for k in np.flatnonzero(unit["status"] == Status.FAILED):
            unit[k]["text"] = writer.note(f"reason of {unit[k]['point']}")
        writer.append(unit)
        done += count
        mark("committed", done)
        if i % SYNC_EVERY == 0:
            writer.sync()
            mark("synced", done)
    writer.close()


# -- recording -------------------------------------------------------------------------------------


def recorded_by_shim(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[Op]:
    """Record what lsweep asks of the file; what h5py wrote under the hidden name is one write."""
    path = folder.part("w", 0)
    ops: list[Op] = []
    ours: dict[int, Path] = {}
    real = {n: getattr(os, n) for n in ("open", "close", "link", "fsync", "fdatasync", "pwrite")}
    real |= {n: getattr(os, n) for n in ("posix_fallocate", "ftruncate")}

    def opened(file: Any, *arguments: Any) -> int:
        fd: int = real["open"](file, *arguments)
        ours[fd] = Path(file)
        if Path(file).parent == path.parent:
            ops.append(("write", 0, Path(file).read_bytes()))
        return fd

    def closed(fd: int) -> None:
        ours.pop(fd, None)
        real["close"](fd)

    def synced(name: str, fd: int) -> None:
        real[name](fd)
        ops.append(("folder synced",) if ours[fd] == path.parent else ("sync",))

    def wrote(fd: int, data: Any, at: int) -> int:
        n: int = real["pwrite"](fd, data, at)
        ops.append(("write", at, bytes(data[:n])))
        return n

    def linked(source: Any, target: Any) -> None:
        real["link"](source, target)
        ops.append(("name",))

    def extended(fd: int, at: int, size: int) -> None:
        real["posix_fallocate"](fd, at, size)
        ops.append(("extend", at + size))

    with monkeypatch.context() as m:
        m.setattr(os, "open", opened)
        m.setattr(os, "close", closed)
        m.setattr(os, "link", linked)
        m.setattr(os, "pwrite", wrote)
        m.setattr(os, "posix_fallocate", extended)
        m.setattr(os, "fsync", lambda fd: synced("fsync", fd))
        m.setattr(os, "fdatasync", lambda fd: synced("fdatasync", fd))
        write_part(path, lambda *what: ops.append(what))
    return ops


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_crash import write_part
write_part(Path({path!r}), lambda word, n: os.write({fd}, f"MARK {{word}} {{n}}".encode()))
"""
TRACED = "openat,open,close,fallocate,pwrite64,write,lseek,ftruncate,fsync,fdatasync,link,linkat"


def recorded_by_strace(folder: RunFolder, scratch: Path) -> list[Op]:
    """Record every system call that changes the file, HDF5's own included."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed; the shim records what lsweep itself does")
    path, trace = folder.part("w", 0), scratch / "trace"
    strace = ["strace", "-f", "-xx", "-s", "10000000", "-e", f"trace={TRACED}", "-o", str(trace)]
    with Path(os.devnull).open("wb") as nowhere:
        fd = nowhere.fileno()
        script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(path), fd=fd)
        python = [sys.executable, "-c", script]
        done = subprocess.run([*strace, *python], pass_fds=[fd], capture_output=True, text=True)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return list(_parsed(trace.read_text(), path))


def _parsed(trace: str, path: Path) -> Iterator[Op]:
    fds: dict[int, str] = {}
    at: dict[int, int] = {}
    for line in trace.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)", line)
        if not call or int(call[3]) < 0:
            continue
        name, text, result = call[1], call[2], int(call[3])
        words = [bytes.fromhex(w.replace("\\x", "")) for w in re.findall(r'"((?:\\x..)*)"', text)]
        first = text.split(",")[0]
        if name in ("openat", "open"):
            file = os.fsdecode(words[0])
            if Path(file).parent == path.parent and Path(file).name.startswith((".", path.name)):
                fds[result], at[result] = file, 0
                if "O_TRUNC" in text:
                    yield ("size", 0)
            elif Path(file) == path.parent:
                fds[result] = file
            else:
                fds.pop(result, None)
        elif name == "close":
            fds.pop(int(first), None)
        elif name in ("link", "linkat"):
            yield ("name",)
        elif name == "write" and words and words[0].startswith(b"MARK"):
            _, word, n = words[0].split()
            yield (word.decode(), int(n))
        elif not first.isdigit() or int(first) not in fds:
            continue
        elif name == "pwrite64":
            yield ("write", int(text.rsplit(",", 1)[1]), words[0][:result])
        elif name == "write":
            yield ("write", at[int(first)], words[0][:result])
            at[int(first)] += result
        elif name == "lseek":
            at[int(first)] = result
        elif name == "ftruncate":
            yield ("size", int(text.split(",")[1]))
        elif name == "fallocate":
            yield ("extend", sum(int(n) for n in text.split(",")[2:4]))
        elif name in ("fsync", "fdatasync"):
            yield ("folder synced",) if fds[int(first)] == str(path.parent) else ("sync",)


@pytest.fixture(scope="module", params=["shim", "strace"])
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Op]:
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.parts.mkdir()
    if request.param == "strace":
        return recorded_by_strace(folder, folder.root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return recorded_by_shim(folder, monkeypatch)


# -- rebuilding ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a crash leaves: the file, its name or none, and what was promised of it by then."""

    content: bytes = b""
    named: bool = False
    committed: int = 0
    synced: int = 0

    def after(self, op: Op) -> State:
        match op:
            case ("write", at, data):
                old = self.content.ljust(at, b"\0")
                return replace(self, content=old[:at] + data + old[at + len(data) :])
            case ("size", n):
                return replace(self, content=self.content[:n].ljust(n, b"\0"))
            case ("extend", n):
                return replace(self, content=self.content.ljust(n, b"\0"))
            case ("name",):
                return replace(self, named=True)
            case ("committed", n):
                return replace(self, committed=n)
            case ("synced", n):
                return replace(self, synced=n)
        return self


def killed(ops: list[Op]) -> Iterator[State]:
    """A kill -9 after each operation, and in the middle of each write."""
    rng = random.Random(11)
    state = State()
    for op in ops:
        if op[0] == "write":
            _, at, data = op
            cuts = set(range(SECTOR - at % SECTOR, len(data), SECTOR))
            cuts |= {rng.randrange(len(data)) for _ in range(3)}
            yield from (state.after(("write", at, data[:cut])) for cut in sorted(cuts))
        state = state.after(op)
        yield state


def unplugged(ops: list[Op], count: int) -> list[State]:
    """Different power losses: each sector written since the last sync is there, or not."""
    states: dict[State, None] = {}
    rng = random.Random(5)
    while len(states) < count:
        stop = rng.randrange(len(ops)) + 1
        last = max((i for i in range(stop) if ops[i][0] == "sync"), default=-1)
        told = max((i for i in range(stop) if ops[i][0] == "folder synced"), default=-1)
        kept = rng.choice([0.1, 0.5, 0.9])
        state = State()
        for i, op in enumerate(ops[:stop]):
            if op[0] == "write" and i > last:
                _, at, data = op
                edges = [0, *range(SECTOR - at % SECTOR, len(data), SECTOR), len(data)]
                for a, b in itertools.pairwise(edges):
                    if rng.random() < kept:
                        state = state.after(("write", at + a, data[a:b]))
                continue
            durable = {"name": told, "extend": last, "size": last}.get(op[0], stop)
            if i < durable or rng.random() < 0.5:
                state = state.after(op)
        states[replace(state, committed=0)] = None  # only the synced rows are promised
    return list(states)


def verdict(root: Path, state: State) -> str:
    """Read the part as a run's reader finds it; "" when all promises are kept."""
    folder = RunFolder(root)
    path = folder.part("w", 0)
    path.unlink(missing_ok=True)
    hidden = path.with_name(f".{path.name}.0123456789ab")
    (path if state.named else hidden).write_bytes(state.content)
    promised = max(state.committed, state.synced)
    parts = [read_part(p, PLAN, VARIABLES) for p in folder.all_parts()]
    if not parts:
        return "committed rows have no file" if promised else ""
    read = parts[0].rows
    index = read["point"].astype(int) - 1000
    if len(set(index)) < len(index) or not set(range(promised)) <= set(index):
        return "committed rows are lost, or read twice"
    for name in ("slice", "status", "seconds", "sums", "device"):
        if not np.array_equal(read[name], ROWS[index][name]):
            return f"wrong {name}"
    for row in read[read["status"] == Status.FAILED]:
        known = [f"reason of {row['point']}"]
        known += ["reason not recorded"] if not state.committed or parts[0].salvaged else []
        if parts[0].reason(row) not in known:
            return f"wrong reason {parts[0].reason(row)!r}"
    return ""


def verdicts(root: Path, states: list[State]) -> Counter[str]:
    RunFolder(root).parts.mkdir(parents=True, exist_ok=True)
    return Counter(
        str(v) for v in each_in_child(lambda state: verdict(root, state), states, seconds=5)
    )


# -- the promises ----------------------------------------------------------------------------------


def test_a_kill_at_any_instant_loses_nothing_that_was_committed(
    ops: list[Op], tmp_path: Path
) -> None:
    states = list(killed(ops))
    assert max(s.committed for s in states) == len(ROWS)
    assert len(states) > 4 * len(COMMITS)
    assert verdicts(tmp_path, states) == {"": len(states)}


def test_a_power_loss_at_any_instant_loses_nothing_that_was_synced(
    ops: list[Op], tmp_path: Path
) -> None:
    states = unplugged(ops, 400)
    assert len({s.synced for s in states}) > 5
    assert verdicts(tmp_path, states) == {"": len(states)}


def test_a_part_has_its_name_only_when_its_structure_is_complete_and_synced(ops: list[Op]) -> None:
    kinds = [op[0] for op in ops]
    named = kinds.index("name")
    writes = [i for i, k in enumerate(kinds[:named]) if k in ("write", "size", "extend")]
    assert "sync" in kinds[writes[-1] : named]
    assert "folder synced" in kinds[named : kinds.index("committed")]
    # Afterwards preallocated bytes change, and nothing else.
    size = len(next(s for s in reversed(list(killed(ops[: named + 1])))).content)
    later = [op for op in ops[named + 1 :] if op[0] in ("write", "size", "extend")]
    assert {op[0] for op in later} == {"write"}
    assert all(at + len(data) <= size for _, at, data in later)


def test_every_sync_covers_all_that_was_committed_before_it(ops: list[Op]) -> None:
    written = synced = told = 0
    for op in ops:
        if op[0] == "committed":
            written = op[1]
        elif op[0] == "sync":
            synced = written
        elif op[0] == "synced":
            told = op[1]
            assert synced == told
    assert told > 0
