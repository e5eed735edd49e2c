"""Many rows: blocks checked at once as one by one, parts read on, slices in blocks, slow hands."""

from __future__ import annotations

import os
import random
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import (
    command,
    finished,
    hurry,
    merged,
    planned,
    process,
    start,
    sweep_file,
    wait_for,
    worked,
)

from lsweep.hosts.machine import host_identity, start_time
from lsweep.merging.merge import merge
from lsweep.outcomes import winners
from lsweep.outcomes.committed import Committed
from lsweep.outcomes.reading import DOUBT, PartReader, read_part
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.refinement.asking import LEASES_WANTED
from lsweep.runs.prune import prune
from lsweep.runs.status import lines, status
from lsweep.storage.files import replace, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.parts import PartWriter
from lsweep.storage.rows import BLOCK, KIND_AT, STATUS_AT, Kind, row_type, seed_of, valid_rows
from lsweep.storage.workers import PATIENCE
from lsweep.surfaces.differing import difference
from lsweep.surfaces.surface import Status

PLAN = "b" * 64


def filled(points: range, variables: int = 1) -> np.ndarray:
    rows = np.zeros(len(points), row_type(variables))
    rows["point"], rows["status"] = points, Status.OK
    rows["sums"] = np.random.default_rng(points.start).standard_normal(rows["sums"].shape)
    return rows


def written(path: Path, rows: np.ndarray, capacity: int) -> PartWriter:
    writer = PartWriter(
        path, plan=PLAN, variables=rows["sums"].shape[1], capacity=capacity, header={}
    )
    writer.append(rows)
    return writer


def numbers(reader: PartReader) -> list[int]:
    return [int(p) for _, rows in reader.news() for p in rows["point"]]


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# -- checksums -------------------------------------------------------------------------------------


def one_by_one(data: bytes, size: int, seed: int) -> list[bool]:
    rows = [data[at : at + size] for at in range(0, len(data) // size * size, size)]
    return [zlib.crc32(r[:-4], seed) == int.from_bytes(r[-4:], "little") for r in rows]


@pytest.mark.parametrize("variables", [1, 3, 200])
def test_blocks_of_rows_are_judged_as_each_row_alone(tmp_path: Path, variables: int) -> None:
    size, seed = row_type(variables).itemsize, seed_of(PLAN)
    count = 5 * max(1, BLOCK // size) + 3
    writer = written(tmp_path / "p.h5", filled(range(count), variables), count)
    start = writer._row_at
    whole = writer.path.read_bytes()[start : start + count * size]
    assert valid_rows(whole, size, seed).tolist() == [True] * count
    assert not valid_rows(whole, size, seed + 1).any()
    rng = random.Random(variables)
    for kind in ("flip", "flips", "zeros", "swap", "shift") * 20:
        data = bytearray(whole)
        at = rng.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "flips":
            for _ in range(rng.randrange(2, 40)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "zeros":  # a sector that never reached the disk
            data[at // 512 * 512 : at // 512 * 512 + 512] = bytes(512)
            del data[len(whole) :]
        elif kind == "swap":  # whole rows that changed places are valid rows
            a, b = (rng.randrange(count) * size for _ in range(2))
            data[a : a + size], data[b : b + size] = whole[b : b + size], whole[a : a + size]
        else:
            data = bytearray(len(data))
            data[at:] = whole[: len(data) - at]
        found = valid_rows(bytes(data), size, seed).tolist()
        assert found == one_by_one(bytes(data), size, seed), kind
        assert all(found) == (kind == "swap" or bytes(data) == whole)


def test_any_flipped_bit_of_a_block_shows() -> None:
    seed = seed_of(PLAN)
    record = b"a row of 24 bytes + "
    row = record + zlib.crc32(record, seed).to_bytes(4, "little")
    block = row * 40
    for bit in range(8 * len(block)):
        data = bytearray(block)
        data[bit // 8] ^= 1 << bit % 8
        expected = [i != bit // 8 // len(row) for i in range(40)]
        assert valid_rows(bytes(data), len(row), seed).tolist() == expected


def test_salvage_looks_where_kind_and_outcome_lie() -> None:
    fields = row_type(2).fields
    assert fields is not None
    assert (fields["kind"][1], fields["status"][1]) == (KIND_AT, STATUS_AT)


# -- reading on ------------------------------------------------------------------------------------


def test_what_was_appended_is_read_once_and_a_full_part_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = written(tmp_path / "p.h5", filled(range(3)), 700)
    reader = PartReader(writer.path, PLAN, 1)
    assert numbers(reader) == [0, 1, 2]
    opened: list[Any] = []
    read: list[int] = []
    real = os.open, os.pread

    def pread(fd: int, size: int, at: int) -> bytes:
        data = real[1](fd, size, at)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "open", lambda p, *rest: opened.append(p) or real[0](p, *rest))
    monkeypatch.setattr(os, "pread", pread)
    assert numbers(reader) == []
    assert (len(opened), len(read), read[0] < 20000) == (1, 1, True)
    writer.append(filled(range(3, 4)))
    assert numbers(reader) == [3]
    writer.append(filled(range(4, 650)))  # more than one look reads at once
    assert numbers(reader) == list(range(4, 650))
    writer.append(filled(range(650, 700)))
    assert numbers(reader) == list(range(650, 700))
    opened.clear()
    assert numbers(reader) == []
    assert opened == []  # it is full
    again = [int(p) for _, rows in reader.again() for p in rows["point"]]
    assert again == list(range(700))


def test_a_damaged_row_is_passed_over_and_not_read_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, clock = written(tmp_path / "p.h5", filled(range(8)), 8), Clock()
    at = writer._row_at + 5 * row_type(1).itemsize
    data = bytearray(writer.path.read_bytes())
    data[at + 30] ^= 1
    writer.path.write_bytes(data)
    reader = PartReader(writer.path, PLAN, 1, clock)
    assert numbers(reader) == [0, 1, 2, 3, 4, 6, 7]
    assert reader.damaged == 1
    real, reads = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or real(*a))
    clock.now = DOUBT
    assert (numbers(reader), len(reads)) == ([], 1)  # perhaps it was only late
    clock.now = DOUBT + 1
    assert numbers(reader) == []
    reads.clear()
    assert (numbers(reader), reads, reader.damaged) == ([], [], 1)


def test_rows_that_show_late_and_out_of_order_are_found(tmp_path: Path) -> None:
    """As a shared file system shows them: a later page before an earlier one."""
    whole = written(tmp_path / "whole.h5", filled(range(400)), 600)
    data, size, start = whole.path.read_bytes(), row_type(1).itemsize, whole._row_at
    path = tmp_path / "p.h5"

    def shown(*slots: range) -> None:
        now = bytearray(data)
        now[start : start + 600 * size] = bytes(600 * size)
        for here in slots:
            a, b = start + here.start * size, start + here.stop * size
            now[a:b] = data[a:b]
        path.write_bytes(now)

    shown(range(10))
    reader = PartReader(path, PLAN, 1)
    assert numbers(reader) == list(range(10))
    shown(range(10), range(60, 90))
    assert numbers(reader) == list(range(60, 90))
    assert reader.damaged == 0  # nothing is there, and nothing is wrong
    shown(range(40), range(60, 400))
    assert numbers(reader) == [*range(10, 40), *range(90, 400)]
    shown(range(400))
    assert numbers(reader) == list(range(40, 60))
    # A first look finds what lies behind any hole, as a power loss may leave it.
    shown(range(5), range(390, 400))
    assert read_part(path, PLAN, 1).rows["point"].tolist() == [*range(5), *range(390, 400)]


def test_a_row_that_is_just_being_written_is_read_when_it_is_there(tmp_path: Path) -> None:
    writer = written(tmp_path / "p.h5", filled(range(4)), 8)
    end = writer._row_at + 4 * row_type(1).itemsize
    data = writer.path.read_bytes()
    writer.path.write_bytes(data[: end - 20] + bytes(20) + data[end:])
    reader = PartReader(writer.path, PLAN, 1)
    assert (numbers(reader), reader.damaged) == ([0, 1, 2], 1)
    writer.path.write_bytes(data)
    assert (numbers(reader), reader.damaged) == ([3], 0)


def test_a_salvaged_part_gives_what_is_appended_too(tmp_path: Path) -> None:
    writer = written(tmp_path / "p.h5", filled(range(4)), 8)
    with writer.path.open("r+b") as f:
        f.write(bytes(64))  # HDF5's own superblock
    reader = PartReader(writer.path, PLAN, 1)
    assert (numbers(reader), reader.salvaged) == ([0, 1, 2, 3], 4)
    assert (numbers(reader), reader.salvaged) == ([], 4)
    time.sleep(0.02)  # so that the file's time differs
    writer.append(filled(range(4, 6)))
    assert (numbers(reader), reader.salvaged) == ([4, 5], 6)


# -- what is committed -----------------------------------------------------------------------------


def run_of(folder: RunFolder) -> tuple[Plan, Rounds]:
    plan = Plan.read(folder)
    return plan, Rounds.read(folder, plan)


def test_looking_on_while_workers_commit_finds_what_a_fresh_look_finds(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9, y=9, pause=0.5), unit_points=3)
    plan, rounds = run_of(folder)
    growing = Committed.read(folder, plan, rounds)
    counts = [int(growing.done.sum())]
    running = [
        process("work", folder.root, "--index", i, "--of", 2, "--device", "cpu") for i in range(2)
    ]

    def looked() -> bool:
        growing.look()
        counts.append(int(growing.done.sum()))
        if len(set(counts)) > 3:
            hurry(folder)
        return counts[-1] == 81

    wait_for(looked)
    assert [p.communicate()[1] for p in running] == ["", ""]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert (growing.status == Committed.read(folder, plan, rounds).status).all()


def test_rows_of_a_round_that_came_meanwhile_are_kept_until_it_is_known(tmp_path: Path) -> None:
    folder = finished(sweep_file(tmp_path, x=5), unit_points=1)
    plan, first = run_of(folder)
    committed = Committed.read(folder, plan, first)
    finished(sweep_file(tmp_path, x=9), run=folder.root)
    committed.look()
    assert committed.status.shape == (5, 1)
    both = Rounds.read(folder, plan)
    committed.look(both)
    assert committed.done.sum() == 9
    assert (committed.first_missing(both.last) == -1).all()


def test_a_run_that_is_pruned_while_it_is_looked_at_loses_nothing(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9), unit_points=1)
    for index in range(3):
        worked(folder, index=index, of=3, claims="static")
    assert command("merge", folder.root).code == 0
    plan, rounds = run_of(folder)
    known, between = Committed.read(folder, plan, rounds), Committed(folder, plan, rounds)
    news = between.news()
    next(news)  # it has listed the parts, and read one
    prune(folder)
    assert [reader.path for reader, _, _ in news] == folder.all_parts()
    known.look()
    assert between.done.all() and known.done.all()


@pytest.mark.parametrize(("slices", "unit"), [(1, 1), (1, 4), (3, 2), (4, 16)])
def test_what_a_lease_misses_first_is_what_its_units_miss(
    tmp_path: Path, slices: int, unit: int
) -> None:
    folder = planned(
        sweep_file(tmp_path, x=7, y=5, evaluate=f"slices = {slices}"), unit_points=unit
    )
    plan, rounds = run_of(folder)
    last = rounds.last
    object.__setattr__(last, "lease_units", 3)
    committed, rng = Committed(folder, plan, rounds), np.random.default_rng(4)
    for share in (0.0, 0.5, 0.9, 0.98, 1.0):
        committed.status[:] = rng.random(committed.status.shape) < share
        expected = []
        for lease in range(last.leases(slices)):
            missing = [committed.missing(last, u, slices) for u in last.lease_range(lease, slices)]
            expected.append(next((m[0] for m in missing if m), -1))
        assert committed.first_missing(last).tolist() == expected
    points, slice_ = last.unit(slices, slices)  # the first slice of the second block
    committed.status[points[0], slice_] = Status.PENDING
    assert committed.missing(last, slices, slices) == [points[0]]


def test_a_large_grid_has_leases_for_ten_thousand_workers(tmp_path: Path) -> None:
    plan, rounds = run_of(planned(sweep_file(tmp_path, x=512, y=512)))
    assert 10_000 < rounds.last.leases(plan.slices) <= LEASES_WANTED
    covered = [u for n in range(20) for u in rounds.last.lease_range(n, 1)]
    assert covered == list(range(len(covered)))
    # Who only counts points needs neither their order nor their places.
    assert not {"offsets", "step", "first_asked", "_orders"} & set(rounds.__dict__)
    assert rounds.offsets.shape == (512 * 512, 2)


# -- merging in blocks -----------------------------------------------------------------------------


def test_slices_added_in_blocks_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = planned(sweep_file(tmp_path, x=9, y=3, evaluate="slices = 4"), unit_points=2)
    for index in range(3):
        worked(folder, index=index, of=3, claims="static")
    whole, report = merged(folder)
    assert report.clean
    for size in (1, 700, 5000):
        monkeypatch.setattr(winners, "MOST_SUMS", size)
        again, other = merge(folder)
        assert (difference(again, whole), other) == ("", report)


def test_a_value_that_is_lost_is_no_finding_of_its_audit(tmp_path: Path) -> None:
    folder = finished(sweep_file(tmp_path, x=9), unit_points=1)
    audits = merged(folder)[1].audit["points"]
    part = folder.all_parts()[0]
    rows = read_part(part, Plan.read(folder).digest, 1).rows
    audited = rows["point"][rows["kind"] == Kind.AUDIT]
    hit = np.flatnonzero((rows["kind"] == Kind.VALUE) & np.isin(rows["point"], audited))[0]
    data = bytearray(part.read_bytes())
    at = data.index(rows[hit].tobytes())
    data[at + 40] ^= 1
    part.write_bytes(data)
    _, report = merged(folder)
    assert (report.missing, report.audit["points"], report.audit["one_finite"]) == (
        1,
        audits - 1,
        0,
    )


# -- who works -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished(sweep_file(tmp_path_factory.mktemp("done"), x=3))


@pytest.fixture
def run(done: RunFolder, tmp_path: Path) -> RunFolder:
    """A run whose only worker files are those that a test writes."""
    shutil.copytree(done.root, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "workers")
    (tmp_path / "run" / "workers").mkdir()
    return RunFolder(tmp_path / "run")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds since the epoch, for all that is told and said: what is late is so by as much."""
    frozen = time.time()
    monkeypatch.setattr(time, "time", lambda: frozen)
    return frozen


def tell(folder: RunFolder, name: str, seconds: float, **facts: Any) -> None:
    """Write a worker's file as a worker on this host would that took so long for 100 points."""
    now = time.time()
    value = {
        "worker": name, "host": "node1", "identity": host_identity(), "pid": os.getpid(),
        "start": start_time(os.getpid()), "state": "working", "beat": 11, "since": now - 100,
        "now": now, "points": 100, "busy": seconds, "longest": seconds / 100, "minimum": None,
        "message": "", **facts,
    }  # fmt: skip
    replace(folder.worker(name), sealed(value))


@pytest.mark.usefixtures("now")
def test_a_worker_that_takes_twice_as_long_as_the_others_is_slow(run: RunFolder) -> None:
    for i, seconds in enumerate((9.0, 10.0, 11.0, 19.0)):
        tell(run, f"w{i}", seconds)
    tell(run, "snail", 31.0, host="node7", job="51_3")
    state = status(run)
    assert {w["worker"]: w["slow"] for w in state["workers"] if w["slow"]} == {
        "snail": "3.0 times the others' seconds per point"
    }
    text = lines(state)
    assert "  workers: 5 working (1 slow)" in text
    assert "  snail on node7, job 51_3: slow: 3.0 times the others' seconds per point" in text
    assert not any(line.startswith("  w0 ") for line in text)


@pytest.mark.usefixtures("now")
def test_one_worker_alone_is_not_slow_and_two_are_compared(run: RunFolder) -> None:
    tell(run, "a", 50.0)
    assert [w["slow"] for w in status(run)["workers"]] == [""]
    tell(run, "b", 10.0)
    assert [bool(w["slow"]) for w in status(run)["workers"]] == [True, False]


def test_a_late_beat_is_slow_and_a_very_late_one_dead(run: RunFolder, now: float) -> None:
    tell(run, "prompt", 10.0)
    tell(run, "late", 10.0, now=now - 60, since=now - 160)
    tell(run, "hung", 200.0, unit=now - 600, host="node7", job="51_3.1")
    tell(run, "alone", 0.0, unit=now - 200, longest=0.0, pid=os.getppid(),
         start=start_time(os.getppid()))  # fmt: skip
    tell(run, "gone", 10.0, now=now - PATIENCE - 9, since=now - 999, identity="another host")
    tell(run, "sick", 10.0, state="sick", message="node1 cpu: the centre fails")
    tell(run, "killed", 10.0, pid=2**22 + 1)
    state = {w["worker"]: w["state"] for w in status(run)["workers"]}
    assert state == {"prompt": "working", "late": "working", "hung": "working", "gone": "dead",
                     "alone": "working", "sick": "sick", "killed": "dead"}  # fmt: skip
    text = lines(status(run))
    assert "  workers: 2 dead, 1 sick, 4 working (3 slow)" in text
    assert (
        "  late on node1: slow: last heard 1 min 0 s ago, after 3 min 0 s its units are free"
    ) in text
    assert (
        "  hung on node7, job 51_3.1: slow: at one unit for 10 min 0 s, its longest took 2 s: it "
        "may hang, 'scancel 51_3' frees its units"
    ) in text
    assert (
        "  alone on node1: slow: at one unit for 3 min 20 s: it may hang, 'kill -9 "
        f"{os.getppid()}' on node1 frees its units"
    ) in text
    assert "  gone on node1: dead: last heard 3 min 9 s ago" in text
    assert "  sick on node1: sick: node1 cpu: the centre fails" in text


def test_status_names_so_many_unwell_workers_and_no_more(run: RunFolder) -> None:
    for i in range(25):
        tell(run, f"w{i:02d}", 10.0, state="failed", message="no disk")
    text = lines(status(run))
    assert sum("no disk" in line for line in text) == 20
    assert "  and 5 more; --json has all" in text


def test_watching_reads_on_and_ends_when_nothing_is_missing(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9, pause=2.0), unit_points=1)
    watching = process("status", folder.root, "--watch", "--interval", "0.05")
    lines_of = iter(watching.stdout.readline, "")
    said = [next(lines_of)]  # it looks already

    def counts() -> list[int]:
        return [int(line.split(": ")[1].split("/")[0]) for line in said if "/9 " in line]

    pid = start(folder)
    for line in lines_of:
        said.append(line)
        if len(set(counts())) > 2:
            break
    hurry(folder)
    out, err = watching.communicate()
    said += out.splitlines()
    assert (watching.returncode, err, os.waitpid(pid, 0)[1]) == (0, "", 0)
    assert counts() == sorted(counts())
    assert counts()[-1] == 9
    assert len(set(counts())) > 2
