"""Who comes first wins, everywhere, once: plans, rounds, leases, their generations, parts."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import (
    Raised,
    differences,
    evaluated,
    finished,
    fork,
    in_child,
    merged,
    planned,
    process,
    sweep_file,
    worked,
)

from lsweep.outcomes.committed import Committed
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.refinement.asking import ask_again
from lsweep.runs.verify import verify
from lsweep.storage import files, leases
from lsweep.storage.files import link_once, publish, write_new
from lsweep.storage.folder import RunFolder
from lsweep.storage.leases import Lease
from lsweep.storage.parts import PartWriter
from lsweep.surfaces.surface import Surface

RACERS = 8


def race(root: Path, run: Callable[[int], list[Any]]) -> list[list[str]]:
    """Let eight processes run at once; return what each of them says."""
    root.mkdir(exist_ok=True)
    start = time.monotonic() + 0.3
    pids = []
    for i in range(RACERS):
        pid = fork()
        if pid == 0:
            code = 1
            try:
                time.sleep(max(0.0, start - time.monotonic()))
                lines = [str(x) for x in run(i)]
                (root / f"racer-{i}").write_text("\n".join(lines))
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * RACERS
    return [(root / f"racer-{i}").read_text().splitlines() for i in range(RACERS)]


# -- runs ------------------------------------------------------------------------------------------


def test_two_runs_started_at_once_on_one_folder_share_it(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path / "both", x=21, y=5, pause=0.02, all_at=2)
    folder = RunFolder(tmp_path / "both.run")
    arguments = ("run", toml, "--run", folder.root, "--workers", 1, "--no-picture")
    both = [process(*arguments) for _ in range(2)]
    for p in both:
        out, err = p.communicate()
        assert (p.returncode, "Traceback" in out + err) == (0, False), err
    assert len(list(folder.rounds.iterdir())) == 1
    assert evaluated(folder) == [(p, 0) for p in range(105)]  # and nobody did anything twice
    assert {p.header["worker"] for p in Committed.read(folder, *plan_of(folder)).readers} == {
        p.stem for p in folder.all_workers()
    }
    alone = merged(finished(sweep_file(tmp_path / "alone", x=21, y=5)))[0]
    assert differences(Surface.load(folder.surface), alone) == []
    assert verify(folder).problems == []


def plan_of(folder: RunFolder) -> tuple[Plan, Rounds]:
    plan = Plan.read(folder)
    return plan, Rounds.read(folder, plan)


def test_many_who_ask_for_failed_points_again_ask_in_rounds_of_their_own(tmp_path: Path) -> None:
    folder = planned(sweep_file(tmp_path, x=9))

    def ask(i: int) -> list[int]:
        ask_again(folder, lambda: [i])
        return []

    race(tmp_path / "race", ask)
    _, rounds = plan_of(folder)
    assert [r.number for r in rounds] == list(range(RACERS + 1))
    assert sorted(r.again[0] for r in rounds.all[1:]) == list(range(RACERS))
    assert rounds.total == 9 + RACERS
    assert worked(folder) == 9 + RACERS


# -- leases ----------------------------------------------------------------------------------------


def test_every_lease_is_claimed_by_exactly_one_of_eight(tmp_path: Path) -> None:
    folder, count = RunFolder(tmp_path), 300

    def claim_all(i: int) -> list[int]:
        turn = [(n + 37 * i) % count for n in range(count)]
        return [n for n in turn if leases.claim(folder, 0, n, Lease(f"w{i}", 0))]

    won = race(tmp_path / "race", claim_all)
    assert Counter(n for mine in won for n in mine) == {str(n): 1 for n in range(count)}
    for i, mine in enumerate(won):
        assert {leases.newest(folder, 0, int(n)).worker for n in mine} <= {f"w{i}"}
    assert leases.unclaimed(folder, 0, range(0, 2 * count, 50)) == {*range(count, 2 * count, 50)}
    assert not list(folder.leases.rglob(".*"))


def test_every_generation_of_a_stolen_lease_has_exactly_one_winner(tmp_path: Path) -> None:
    folder, count, generations = RunFolder(tmp_path), 20, 6
    for n in range(count):
        assert leases.claim(folder, 0, n, Lease("dead", 0, suspect=5))

    def steal(i: int) -> list[str]:
        won = []
        while True:
            last = [leases.newest(folder, 0, n) for n in range(count)]
            open_ = [n for n in range(count) if last[n].generation < generations]
            if not open_:
                return won
            for n in open_:
                mine = last[n].next(f"w{i}", 5, died=True)
                if leases.claim(folder, 0, n, mine):
                    won.append(f"{n}.{mine.generation}")

    won = race(tmp_path / "race", steal)
    wanted = {f"{n}.{g}": 1 for n in range(count) for g in range(1, generations + 1)}
    assert Counter(w for mine in won for w in mine) == wanted
    # Each knew of all deaths before it: three until the points are taken singly, two more to fail.
    for n in range(count):
        last = leases.newest(folder, 0, n)
        assert (last.deaths, last.single, last.poisoned) == (generations, True, True)
        assert last.kills == generations - leases.DEATHS_UNTIL_SINGLE


# -- publishing ------------------------------------------------------------------------------------


def publish_all(root: Path, count: int) -> Callable[[int], list[str]]:
    """Publish, then read at once what stands there: the winner's, whole."""

    def run(i: int) -> list[str]:
        out = []
        for n in range(count):
            data = f"{i}:".encode() + bytes([65 + i]) * 5000
            won = publish(root / f"file-{n}", data)
            there = (root / f"file-{n}").read_bytes()
            assert there == there[:2] + bytes([65 + int(there[:1])]) * 5000
            assert not won or there == data
            out.append(f"{n} {int(won)} {there[:1].decode()}")
        return out

    return run


def assert_one_winner_each(said: list[list[str]]) -> None:
    by_file: dict[str, list[tuple[str, str]]] = {}
    for lines in said:
        for line in lines:
            n, won, there = line.split()
            by_file.setdefault(n, []).append((won, there))
    for answers in by_file.values():
        assert len({there for _, there in answers}) == 1
        assert sum(won == "1" for won, _ in answers) == 1


def no_links(source: Any, target: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_a_file_is_published_by_exactly_one_of_eight(tmp_path: Path) -> None:
    assert_one_winner_each(race(tmp_path, publish_all(tmp_path / "files", 40)))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_links_are_not_allowed_an_exclusive_name_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    assert_one_winner_each(race(tmp_path, publish_all(tmp_path / "files", 20)))


def test_who_dies_between_the_exclusive_name_and_the_rename_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"

    def die(temporary: Path, target: Path) -> None:
        os._exit(9)

    def publish_and_die() -> None:
        monkeypatch.setattr(os, "link", no_links)
        monkeypatch.setattr(Path, "replace", die)
        publish(path, b"never")

    with pytest.raises(AssertionError, match="without an answer"):
        in_child(publish_and_die)
    assert not path.exists()
    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(files, "RENAME_PATIENCE", 0.1)
    assert publish(path, b"second")
    assert not publish(path, b"third")
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EEXIST])
def test_a_link_whose_reply_was_lost_has_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.link

    def linked_but_says_no(source: Any, target: Any) -> None:
        real(source, target)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", linked_but_says_no)
    assert publish(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_that_failed_for_another_reason_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Any, target: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", fails)
    write_new(tmp_path / "temporary", b"mine")
    with pytest.raises(OSError, match="Input/output error"):
        link_once(tmp_path / "temporary", tmp_path / "a")
    assert str(in_child(publish, tmp_path / "a", b"mine")) == str(
        Raised("LsweepError", f"cannot write {tmp_path / 'a'}: Input/output error")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]


def test_a_run_is_planned_and_swept_where_links_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = merged(finished(sweep_file(tmp_path / "a", x=9)))[0]
    monkeypatch.setattr(os, "link", no_links)
    folder = planned(sweep_file(tmp_path / "b", x=9), unit_points=1)
    points = race(tmp_path / "race", lambda i: [worked(folder, index=i, of=RACERS)])
    assert all(line.isdigit() for lines in points for line in lines)
    assert evaluated(folder) == [(p, 0) for p in range(9)]
    assert differences(merged(folder)[0], reference) == []


def test_two_writers_never_share_a_part(tmp_path: Path) -> None:
    def write(i: int) -> list[str]:
        try:
            PartWriter(tmp_path / "w.0000.h5", plan="p", variables=1, capacity=256, header={})
        except Exception as e:
            return [str(e)]
        return ["made it"]

    said = Counter(lines[0] for lines in race(tmp_path / "race", write))
    refusal = f"part {tmp_path / 'w.0000.h5'} exists: two workers share one name"
    assert said == {"made it": 1, refusal: RACERS - 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["race", "w.0000.h5"]
