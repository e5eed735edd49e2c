"""A disk that is full or read-only: one clear line, exit 1, and nothing committed is lost.

A small tmpfs is the disk; it needs root, and the permission to mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cases import Done, command, differences, evaluated, finished, merged, planned, sweep_file

from lsweep.outcomes.reading import read_part
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.status import share_done
from lsweep.runs.verify import verify
from lsweep.storage.folder import RunFolder
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import row_type
from lsweep.storage.workers import all_workers
from lsweep.surfaces.surface import Surface

PAGE = 4096


def mount(*arguments: object) -> None:
    done = subprocess.run(
        ["mount", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 1 MiB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", place)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path, free_pages: int) -> Path:
    """Leave so many pages free; return the file that takes the rest."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    space = os.statvfs(disk)
    pages = space.f_bavail * space.f_frsize // PAGE - free_pages
    with ballast.open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, pages * PAGE)
    return ballast


def lines(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("lsweep: ")]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_line_and_room_is_all_that_the_same_command_needs(
    tmp_path: Path, disk: Path, workers: int
) -> None:
    # Parts hold 256 rows, then 1024, then 4096 rows, which is where this disk ends.
    toml = sweep_file(tmp_path / "full", x=41, y=33)
    reference = merged(finished(sweep_file(tmp_path / "calm", x=41, y=33)))[0]
    folder = planned(toml, run=disk / "a.run", unit_points=16)
    ballast = fill(disk, 30 * workers + 33)
    run = ("run", folder.root, "--workers", workers, "--no-picture", "--device", "cpu")
    stopped = command(*run)
    assert stopped.code == 1, stopped.err
    done, total = share_done(folder)
    clear = [
        line
        for line in lines(stopped)
        if line.startswith(f"lsweep: cannot write {folder.root}")
        and "No space left on device; make room, then run the same command again" in line
    ]
    # Two workers and the launcher may each find the disk full, one line each.
    missing = [f"lsweep: {total - done} of {total} points are missing"] if workers > 1 else []
    assert sorted(lines(stopped)) == sorted([*clear, *missing])
    assert 1 <= len(clear) <= (1 if workers == 1 else 3)
    assert "Traceback" not in stopped.out + stopped.err

    assert 0 < done < total
    surface, report = merged(folder)
    assert (report.missing, report.damaged, report.failed) == (total - done, {}, {})
    known = surface.status > 0
    for name in surface.values:
        assert surface[name][known].tobytes() == reference[name][known].tobytes()

    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    resumed = command(*run)
    assert resumed.code == 0, resumed.err
    assert evaluated(folder) == [(p, 0) for p in range(total)]
    assert differences(Surface.load(folder.surface), reference) == []
    assert verify(folder).problems == []


def test_wherever_the_disk_ends_a_run_says_so_in_one_line(tmp_path: Path, disk: Path) -> None:
    """Every step of a run in turn finds no room: plan, round, device, lease, part, merge."""
    toml = sweep_file(tmp_path, x=5)
    complaints = set()
    for pages in [*range(16), *range(16, 60, 2)]:
        folder = RunFolder(disk / "a.run")
        shutil.rmtree(folder.root, ignore_errors=True)
        fill(disk, pages)
        done = command("run", toml, "--run", folder.root, "--workers", 1, "--no-picture")
        said = done.out + done.err
        assert "Traceback" not in said, said
        if done.code == 0:
            break
        assert done.code == 1, said
        assert len(lines(done)) == 1, said
        assert "No space left on device; make room" in lines(done)[0]
        named = Path(lines(done)[0].split("cannot write ")[1].split(": ")[0])
        complaints.add(named.relative_to(folder.root).parts[0])
        fill(disk, 60)
        again = command("run", toml, "--run", folder.root, "--workers", 1, "--no-picture")
        assert again.code == 0, again.err
        assert verify(folder).problems == []
    assert done.code == 0
    assert {"source.json", "plan.json", "rounds", "devices", "parts", "surface.h5"} <= complaints


PART = """
from pathlib import Path
from lsweep.storage.parts import PartWriter
try:
    PartWriter(Path({path!r}), plan="p", variables=1, capacity=256, header={{"worker": "w"}})
except OSError as e:
    print(e.errno)
else:
    print("made")
"""


def test_a_part_that_finds_no_room_is_refused_at_once_and_leaves_nothing(disk: Path) -> None:
    # A process of its own: HDF5 has been seen to crash at exit after a full disk.
    said = []
    for pages in range(12):
        ballast = fill(disk, pages)
        path = disk / "w.0000.h5"
        script = PART.format(path=str(path))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        said.append(done.stdout.strip())
        if said[-1] == "made":
            break
        assert list(disk.iterdir()) == [ballast]
    assert len(said) > 5
    assert said == [str(errno.ENOSPC)] * (len(said) - 1) + ["made"]


def test_a_part_that_exists_has_room_for_all_its_rows_on_a_full_disk(disk: Path) -> None:
    path = disk / "w.0000.h5"
    writer = PartWriter(path, plan="p", variables=1, capacity=256, header={})
    fill(disk, 0)
    rows = np.zeros(256, row_type(1))
    rows["point"], rows["status"] = np.arange(256), 1
    assert writer.note("a reason") == 1
    for start in range(0, 256, 16):
        writer.append(rows[start : start + 16])
    writer.sync()
    assert read_part(path, "p", 1).rows["point"].tolist() == list(range(256))


def test_after_an_error_of_the_disk_a_part_is_closed_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rows = np.ones(1, row_type(1))
    for name, act in (("pwrite", "append"), ("fdatasync", "sync")):
        writer = PartWriter(tmp_path / act, plan="p", variables=1, capacity=256, header={})
        writer.append(rows)
        with monkeypatch.context() as m:
            m.setattr(os, name, fails)
            with pytest.raises(OSError, match="Input/output error"):
                writer.append(rows) if act == "append" else writer.sync()
        assert (writer.closed, writer.free) == (True, 0)
        assert len(read_part(tmp_path / act, "p", 1).rows) == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_sync_that_fails_ends_the_worker_with_an_error_also_when_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    folder = planned(sweep_file(tmp_path, x=9, pause=0.0 if late else 0.4))

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fails)
    done = command("run", folder.root, "--workers", 1, "--no-picture")
    assert (done.code, lines(done)) == (
        1,
        [f"lsweep: cannot write {folder.parts}: Input/output error"],
    )
    assert [w["state"] for w in all_workers(folder)] == ["failed"]
    count, total = share_done(folder)
    assert (count == total) == late


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path, disk: Path) -> None:
    toml = sweep_file(tmp_path)
    half, whole = planned(toml, run=disk / "half.run"), finished(toml, run=disk / "whole.run")
    assert command("merge", whole.root).code == 0
    before = sorted(p for p in disk.rglob("*"))
    with read_only(disk):
        for arguments, named in (
            (("plan", toml, "--run", disk / "new.run"), disk / "new.run"),
            (("run", toml, "--run", disk / "new.run"), disk / "new.run"),
            (("run", half.root, "--workers", 1), half.root),
            (("run", half.root, "--workers", 2), half.root),
            (("work", half.root), half.root),
            (("merge", whole.root), whole.surface),
        ):
            done = command(*arguments)
            assert done.code == 1, done
            assert len(lines(done)) == 1, done.err
            assert lines(done)[0].startswith("lsweep: cannot write ")
            assert str(named) in lines(done)[0]
            assert lines(done)[0].endswith(": Read-only file system")
            assert "Traceback" not in done.err
        # What only reads works.
        assert command("status", whole.root).code == 0
        assert command("verify", whole.root).code == 0
        assert merged(whole)[1].clean
        assert Surface.load(whole.surface).complete
        plan = Plan.read(half)
        assert Rounds.read(half, plan).total == 5
    assert sorted(p for p in disk.rglob("*")) == before
