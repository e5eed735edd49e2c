"""Prune: few parts, no leases, and a run that gives the same and goes on, whatever kills it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cases import (
    Died,
    command,
    committed,
    differences,
    evaluated,
    finished,
    in_child,
    merged,
    planned,
    sweep_file,
    worked,
)

from lsweep.errors import LsweepError
from lsweep.hosts.machine import host_identity, start_time
from lsweep.outcomes.reading import Part
from lsweep.plans.plan import Plan
from lsweep.runs.prune import prune
from lsweep.runs.status import status
from lsweep.runs.verify import verify
from lsweep.storage.files import replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import Kind, device_code
from lsweep.surfaces.differing import difference
from lsweep.surfaces.surface import Status, Surface


def held(folder: RunFolder) -> Counter[bytes]:
    """Every row of a run, with its reason instead of the reason's number."""
    found: Counter[bytes] = Counter()
    for part in committed(folder).parts:
        for i, row in enumerate(part.rows):
            bare = part.rows[i : i + 1].copy()
            bare["text"] = bare["crc"] = 0
            text = part.reason(row) if row["status"] == Status.FAILED else ""
            found[bare.tobytes() + text.encode()] += 1
    return found


def merge_it(folder: RunFolder) -> Surface:
    assert command("merge", folder.root).code in (0, 3)
    assert not leases(folder)  # nothing is missing
    return Surface.load(folder.surface)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two rounds of two workers each, with audits and failed points, merged."""
    base = tmp_path_factory.mktemp("prune")
    (base / "broken").touch()
    folder = planned(sweep_file(base, x=5, y=3, trouble="raise"), unit_points=1)
    for index in range(2):
        assert isinstance(worked(folder, index=index, of=2, claims="static"), int)
    planned(sweep_file(base, x=9, y=3, trouble="raise"), run=folder.root, unit_points=2)
    for index in range(2):
        assert isinstance(worked(folder, index=index, of=2), int)
    assert len(folder.all_parts()) > 2
    surface = merged(folder)[0]
    surface.save(folder.surface)
    assert surface.complete
    return folder


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to prune."""
    shutil.copytree(whole.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def leases(folder: RunFolder) -> list[Path]:
    return sorted(p for p in folder.leases.rglob("*") if p.is_file())


def test_a_pruned_run_holds_every_row_in_one_part_and_gives_the_same(run: RunFolder) -> None:
    before, rows, image = merged(run)[0], held(run), run.surface.read_bytes()
    failed = status(run)["failed"]
    assert leases(run) and run.all_workers() and failed
    old = run.all_parts()
    files = [*old, *leases(run), *run.all_workers()]
    freed = sum(p.stat().st_size for p in files)
    done = command("prune", run.root)
    assert (done.code, done.err) == (0, "")
    (part,) = run.all_parts()
    megabytes = (freed - part.stat().st_size) / 1e6
    assert done.out == (
        f"{run.root}: {len(old)} parts are now 1; {len(files) - 1} files and {megabytes:.1f} MB "
        "less\n"
    )
    assert part not in old
    assert held(run) == rows
    assert (leases(run), run.all_workers()) == ([], [])
    assert differences(merged(run)[0], before) == []
    assert difference(before, merged(run)[0]) == ""
    state = status(run)
    assert (state["missing"], state["failed"], state["damaged"]) == (0, failed, {})
    found = verify(run)
    assert (found.problems, found.notes) == ([], [])
    merge_it(run)
    assert run.surface.read_bytes() == image  # its provenance too
    assert worked(run) == 0


def test_a_second_prune_changes_nothing(run: RunFolder) -> None:
    prune(run)
    before = {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}
    done = prune(run)
    assert (done.after, done.files, done.bytes) == (0, 0, 0)
    assert {p: p.stat().st_mtime_ns for p in run.root.rglob("*")}.keys() == before.keys()


def test_after_it_a_finer_grid_computes_the_new_points_only(
    run: RunFolder, whole: RunFolder
) -> None:
    prune(run)
    known = evaluated(run)
    (run.root.parent / "broken").touch()
    toml = sweep_file(run.root.parent, x=9, y=5, trouble="raise")
    planned(toml, run=run.root, unit_points=2)
    assert worked(run) == 45 - 27 - 4  # the failed ones raise again and count as no evaluation
    assert len(evaluated(run)) == len(known) + 45 - 27
    shutil.copytree(whole.root, run.root.parent / "unpruned")
    other = RunFolder(run.root.parent / "unpruned")
    planned(toml, run=other.root, unit_points=2)
    worked(other)
    assert differences(merged(run)[0], merged(other)[0]) == []
    assert merge_it(run).complete
    prune(run)
    assert len(run.all_parts()) == 1


def test_after_it_failed_points_can_be_asked_again(run: RunFolder, whole: RunFolder) -> None:
    prune(run)
    assert sum(status(run)["failed"].values()) == 6
    (whole.root.parent / "broken").unlink()  # mended
    try:
        done = command("run", run.root, "--retry-failed", "--workers", 1, "--no-picture")
    finally:
        (whole.root.parent / "broken").touch()
    assert done.code == 0, done.err
    assert (status(run)["failed"], merged(run)[1].failed) == ({}, {})
    prune(run)
    assert (status(run)["failed"], len(run.all_parts())) == ({}, 1)
    assert verify(run).problems == []


# -- refusals --------------------------------------------------------------------------------------


def refused(folder: RunFolder) -> str:
    """Return why prune refuses; it is one line, and nothing was touched."""
    before = {p: p.read_bytes() for p in folder.root.rglob("*") if p.is_file()}
    done = command("prune", folder.root)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert {p: p.read_bytes() for p in folder.root.rglob("*") if p.is_file()} == before
    return done.err


def test_it_refuses_while_a_worker_may_be_at_work(run: RunFolder) -> None:
    facts = json.loads(run.all_workers()[0].read_bytes())
    del facts["sha256"]
    facts |= {"worker": "w", "state": "working", "pid": os.getpid(), "host": "here"}
    facts |= {"identity": host_identity(), "start": start_time(os.getpid())}
    replace(run.worker("w"), sealed(facts))
    assert "w on here may be at work on it: wait until it has ended" in refused(run)
    # Elsewhere, and heard lately; a moment ago would be refused too, a day ago not.
    replace(run.worker("w"), sealed({**facts, "identity": "another", "now": facts["now"] + 1e5}))
    assert "may be at work" in refused(run)
    replace(run.worker("w"), sealed({**facts, "identity": "another", "now": facts["now"] - 1e5}))
    assert prune(run).after == 1


def test_it_refuses_what_is_not_merged(run: RunFolder) -> None:
    part = run.all_parts()[0]
    data = part.read_bytes()
    part.unlink()
    assert "points are missing: 'lsweep run' it first" in refused(run)
    part.write_bytes(data)
    older = Surface.load(run.surface)
    values = {**older.values, "train_loss": older["train_loss"] + 1e-9}
    Surface(older.axes, values, older.status, older.attributes, provenance=older.provenance).save(
        run.surface
    )
    assert "is not what the parts give: 'lsweep merge' it first" in refused(run)
    run.surface.unlink()
    assert f"no surface at {run.surface}" in refused(run)


def test_rewritten_parts_that_give_anything_else_are_thrown_away(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    sync = PartWriter.sync

    def spoiled(writer: PartWriter) -> None:
        """A disk that keeps other bytes than it was given."""
        sync(writer)
        data = bytearray(writer.path.read_bytes())
        data[-writer._size * writer.free - 30] ^= 4
        writer.path.write_bytes(data)

    monkeypatch.setattr(PartWriter, "sync", spoiled)
    with pytest.raises(LsweepError, match="the old ones stay"):
        prune(run)
    assert {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()} == before


def test_a_part_of_another_plan_is_left_where_it_is(run: RunFolder, tmp_path: Path) -> None:
    other = finished(sweep_file(tmp_path / "other", x=5, shift=1.0))
    stranger = run.parts / "stranger.0000.h5"
    shutil.copy(other.all_parts()[0], stranger)
    prune(run)
    assert stranger.read_bytes() == other.all_parts()[0].read_bytes()
    assert len(run.all_parts()) == 2


# -- what rows there may be ------------------------------------------------------------------------


def test_slices_are_pruned_like_points(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9, evaluate="slices = 3"), unit_points=2)
    for index in range(3):
        worked(folder, index=index, of=3, claims="static")
    before, rows = merge_it(folder), held(folder)
    prune(folder)
    assert (held(folder), len(folder.all_parts())) == (rows, 1)
    assert difference(merge_it(folder), before) == ""


def rival(folder: RunFolder, part: Part, name: str, device: str, change: float = 0.0) -> None:
    """Commit every value row of a part once more, as another worker would have."""
    plan = Plan.read(folder)
    rows = part.rows[part.rows["kind"] == Kind.VALUE].copy()
    rows["device"], rows["seconds"] = device_code(device), len(folder.all_parts())
    rows["sums"][..., 2] *= 1 + change
    header = {**part.header, "worker": name, "device_class": device}
    del header["plan"]
    writer = PartWriter(
        folder.part(name, 0), plan=plan.digest, variables=1, capacity=256, header=header
    )
    writer.append(rows)
    writer.sync()
    writer.close()


@pytest.mark.parametrize(("first", "change", "conflicts"), [("0", 1e-7, 0), ("zz", 1e-3, 9)])
def test_rows_that_won_win_again(tmp_path: Path, first: str, change: float, conflicts: int) -> None:
    folder = planned(sweep_file(tmp_path, x=9), unit_points=1)
    worked(folder)
    alone, (part,) = merged(folder)[0], committed(folder).parts
    for i in range(3):
        rival(folder, part, f"{first}-{i}", "another", change)
    rival(folder, part, "same", part.header["device_class"])
    before, report = merged(folder)
    assert (differences(before, alone) == []) == (first == "zz")
    assert report.conflicts == conflicts
    rows = held(folder)
    merge_it(folder)
    prune(folder)
    assert held(folder) == rows
    assert len(folder.all_parts()) == 3  # of the class that won its winners, then the rest of both
    again, report = merged(folder)
    assert (difference(again, before), report.conflicts) == ("", conflicts)
    assert prune(folder).after == 0


def test_more_reasons_than_a_part_has_room_for_take_another_part(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    folder = planned(sweep_file(tmp_path, x=101, trouble="words"), unit_points=1)
    for index in range(2):
        worked(folder, index=index, of=2, claims="static")
    before, reasons, rows = merge_it(folder), status(folder)["failed"], held(folder)
    assert len(reasons) == 100
    prune(folder)
    assert len(folder.all_parts()) == 2
    assert (status(folder)["failed"], held(folder)) == (reasons, rows)
    assert difference(merge_it(folder), before) == ""


# -- killed ----------------------------------------------------------------------------------------


OPERATIONS = ("link", "unlink", "rmdir", "pwrite", "fsync", "fdatasync", "open")


def prune_until(folder: RunFolder, last: int) -> int:
    """Prune, and die by SIGKILL after so many operations that change something; return how many."""
    count = 0

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            answer = real(*arguments, **options)
            if real is not os_open or arguments[1] & os.O_CREAT:
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return call

    os_open = os.open
    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    prune(folder)
    return count


def test_a_kill_at_any_operation_loses_nothing_and_the_next_prune_ends_it(
    run: RunFolder, tmp_path: Path
) -> None:
    before, rows = merged(run)[0], held(run)
    once = tmp_path / "once"
    shutil.copytree(run.root, once)
    operations = in_child(prune_until, RunFolder(once), -1)
    assert operations > 20
    left: set[int] = set()
    for last in range(1, operations + 1):
        folder = RunFolder(tmp_path / f"killed-{last}")
        shutil.copytree(run.root, folder.root)
        died = in_child(prune_until, folder, last)
        assert died == Died(signal.SIGKILL)
        left.add(len(folder.all_parts()))
        surface, report = merged(folder)
        assert (differences(surface, before), report.conflicts) == ([], 0), last
        assert set(held(folder)) == set(rows), last
        found = verify(folder)
        assert (found.problems, found.notes) == ([], []), last
        prune(folder)
        assert (held(folder), len(folder.all_parts())) == (rows, 1), last
        assert differences(merged(folder)[0], before) == []
        shutil.rmtree(folder.root)
    many = len(run.all_parts())
    assert left == {many, *range(1, many + 2)}  # before, while both are there, and after
