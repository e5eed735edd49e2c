"""Bit flips and truncations of every file of a run: a correct value or a clear error, no other.

Each damaged file is met by status, merge, verify and open in a forked child, because HDF5 may hang
or crash; a value counts as correct only when its bytes are those of the undamaged run.
"""

from __future__ import annotations

import contextlib
import functools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cases import (
    Raised,
    command,
    committed,
    differences,
    each_in_child,
    evaluated,
    finished,
    merged,
    planned,
    sweep_file,
    worked,
)

from lsweep.errors import LsweepError
from lsweep.hosts.machine import versions
from lsweep.merging.merge import merge
from lsweep.merging.opening import open_surface
from lsweep.outcomes.reading import read_part
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.status import status
from lsweep.runs.verify import verify
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Status, Surface

FILES: dict[str, Callable[[RunFolder], Path]] = {
    "plan": lambda f: f.plan,
    "source": lambda f: f.source,
    "sweep.toml": lambda f: f.settings,
    "factory": lambda f: f.factory("problem.py"),
    "round 0": lambda f: f.round(0),
    "round 1": lambda f: f.round(1),
    "device": lambda f: f.all_devices()[0],
    "worker": lambda f: f.all_workers()[0],
    "lease": lambda f: f.lease(0, 2, 0),
    "part": lambda f: f.all_parts()[0],
    "directions": lambda f: f.directions,
    "surface": lambda f: f.surface,
}
SEALED = ("plan", "source", "round 0", "round 1", "device", "worker", "lease")
NEEDED = ("plan", "round 0", "round 1")
UNCHECKED = ("sweep.toml",)  # a copy for people: nothing is read from it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished, merged run with two rounds, a failed point and one that is not finite."""
    base = tmp_path_factory.mktemp("damage")
    (base / "broken").touch()
    folder = finished(sweep_file(base, x=5, trouble="raise"), unit_points=2)
    finished(sweep_file(base, x=9, trouble="raise"), run=folder.root)
    assert merge_with_leases(folder) == 3
    assert verify(folder).problems == []
    return folder


def merge_with_leases(folder: RunFolder) -> int:
    """Merge, and keep the leases: of a complete run they are forgotten, of one that goes on not."""
    kept = folder.root.parent / "kept"
    shutil.copytree(folder.leases, kept)
    code = command("merge", folder.root).code
    shutil.copytree(kept, folder.leases, dirs_exist_ok=True)
    return code


@pytest.fixture(scope="module")
def truth(whole: RunFolder) -> Surface:
    return Surface.load(whole.surface)


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy to damage."""
    monkeypatch.setattr(
        "lsweep.merging.merge.versions", functools.cache(versions)
    )  # reads many files
    shutil.copytree(whole.root, tmp_path / "run")
    return RunFolder(tmp_path / "run")


Damage = tuple[str, int]  # ("flip", bit) or ("cut", length)


def damaged(data: bytes, damage: Damage) -> bytes:
    what, where = damage
    if what == "cut":
        return data[:where]
    out = bytearray(data)
    out[where // 8] ^= 1 << where % 8
    return bytes(out)


def flips(size: int, count: int, seed: int) -> list[Damage]:
    rng = random.Random(seed)
    return [("flip", rng.randrange(8 * size)) for _ in range(count)]


def cuts(size: int, count: int, seed: int) -> list[Damage]:
    rng = random.Random(seed)
    return [("cut", n) for n in {0, 1, size // 2, size - 1, *rng.sample(range(size), count)}]


def asked(ask: Callable[[], Any]) -> Any:
    """The answer, or the text of an `LsweepError`; other exceptions are not caught."""
    try:
        return ask()
    except LsweepError as e:
        text = str(e)
        assert text
        assert "\n" not in text
        return Raised(type(e).__name__, text)


def wrong_values(surface: Surface, truth: Surface) -> list[str]:
    """Names of what is neither the true value nor, where rows were lost, missing."""
    lost = surface.status == Status.PENDING
    names = [n for n in truth.values if n not in surface.values]
    for name, there in [*surface.values.items(), ("status", surface.status)]:
        known = {**truth.values, "status": truth.status}[name]
        same = there.view(f"u{there.itemsize}") == known.view(f"u{known.itemsize}")
        if not (same | lost).all():
            names.append(name)
        if name not in ("status", "weight_sq") and not np.isnan(there[lost]).all():
            names.append(name)
    names += [a for a in truth.axes if truth.axes[a].tobytes() != surface.axes[a].tobytes()]
    return names


def look(folder: RunFolder, truth: Surface) -> dict[str, Any]:
    """Ask all that can be asked of a run; "wrong" names what should never have been said."""
    wrong: list[str] = []
    state = asked(lambda: status(folder))
    found = asked(lambda: verify(folder))
    merged = asked(lambda: open_surface(folder.root))  # which is what merge would save
    kept = asked(lambda: open_surface(folder.surface))
    lost = 0
    if not isinstance(merged, Raised):
        lost = int((merged.status == Status.PENDING).sum())
        wrong += wrong_values(merged, truth)
        # A reason may be lost with its bytes; it is never another.
        known = {*truth.provenance["failures"], "reason not recorded"}
        wrong += [r for r in merged.provenance["failures"] if r not in known]
        if not isinstance(state, Raised) and state["missing"] < lost:
            wrong.append("status counts a lost point as done")
    if not isinstance(kept, Raised):
        wrong += differences(kept, truth)
        same = kept.attributes == truth.attributes and kept.provenance == truth.provenance
        wrong += [] if same else ["attributes"]
    problems = [found.text] if isinstance(found, Raised) else found.problems
    errors = [a.text for a in (state, merged) if isinstance(a, Raised)]
    return {"wrong": wrong, "problems": problems, "errors": errors, "lost": lost}


def each_damage(
    run: RunFolder, path: Path, damages: list[Damage], check: Callable[[], Any]
) -> list[Any]:
    data = path.read_bytes()

    def one(damage: Damage) -> Any:
        path.write_bytes(damaged(data, damage))
        return check()

    try:
        return each_in_child(one, damages, seconds=10)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_gives_correct_values_or_a_clear_error(
    run: RunFolder, truth: Surface, kind: str
) -> None:
    path = FILES[kind](run)
    size = path.stat().st_size
    many = 4 if kind in ("part", "surface") else 1
    damages = flips(size, 24 * many, seed=1) + cuts(size, 8 * many, seed=2)
    answers = each_damage(run, path, damages, lambda: look(run, truth))
    assert {str(a) for a in answers if not isinstance(a, dict)} == set()  # no hang, no crash
    assert [a["wrong"] for a in answers if a["wrong"]] == []
    for damage, a in zip(damages, answers, strict=True):
        if kind in NEEDED and a["problems"]:
            assert len(a["errors"]) == 2, damage  # status and merge refuse
            assert all(str(path) in e or run.root.name in e for e in a["errors"])
        elif kind not in NEEDED:
            assert a["errors"] == [], damage  # nothing else is needed to read a run
        if a["lost"]:
            assert kind == "part"
            assert a["problems"], damage
    silent = [d for d, a in zip(damages, answers, strict=True) if not a["problems"]]
    harmless = set(silent) if kind in UNCHECKED else {d for d in silent if is_same(path, d, kind)}
    assert set(silent) == harmless  # verify reports all that changes what the file says
    assert kind in UNCHECKED or len(silent) < len(damages) * 2 / 3


def is_same(path: Path, damage: Damage, kind: str) -> bool:
    """True when what lsweep reads from the file is the same after the damage: spare bytes."""
    before, folder = path.read_bytes(), RunFolder(path.parent.parent)
    after = damaged(before, damage)
    if before == after:
        return True
    if kind in SEALED:
        values = []
        for data in (before, after):
            path.write_bytes(data)
            values.append(asked(lambda: read_json(path)))
        path.write_bytes(before)
        return values[0] == values[1]
    if kind == "part":
        plan = Plan.read(folder)
        parts = []
        for data in (before, after):
            path.write_bytes(data)
            parts.append(read_part(path, plan.digest, len(plan.variables)))
        path.write_bytes(before)
        texts = {p.reason(row) for p in parts for row in p.rows if row["status"] == Status.FAILED}
        assert texts == set(merged(folder)[1].failed)
        return parts[0].rows.tobytes() == parts[1].rows.tobytes()
    if kind in ("directions", "surface"):
        said = []
        for data in (before, after):
            path.write_bytes(data)
            said.append(contents(path))
        path.write_bytes(before)
        return said[0] == said[1]
    return False


def contents(path: Path) -> list[Any]:
    """Every name, attribute and array of an HDF5 file."""
    out: list[Any] = []

    def add(name: str, node: Any) -> None:
        for key in sorted(node.attrs):
            if key not in ("DIMENSION_LIST", "REFERENCE_LIST"):
                out.append((name, key, np.asarray(node.attrs[key]).tobytes()))
        if isinstance(node, h5py.Dataset):
            out.append((name, node.shape, node[()].tobytes()))
            return
        for child in sorted(node):
            add(f"{name}/{child}", node[child])

    with contextlib.suppress(Exception), h5py.File(path, "r") as f:
        add("", f)
    return out


@pytest.mark.parametrize("kind", SEALED)
def test_any_flip_in_a_sealed_file_is_an_error_or_changes_nothing(
    run: RunFolder, kind: str
) -> None:
    path = FILES[kind](run)
    value, size = read_json(path), path.stat().st_size
    every = [("flip", 8 * byte + byte * 5 % 8) for byte in range(min(512, size))]
    damages = every + flips(size, 300, seed=3) + cuts(size, 60, seed=4)
    answers = each_damage(run, path, damages, lambda: asked(lambda: read_json(path)))
    refused = Raised("DamagedFile", f"{path} is damaged: its content does not match its checksum")
    assert all(a in (refused, value) for a in answers)
    kept = sum(a == value for a in answers)
    assert answers.count(refused) > 0
    assert kept < len(answers) / 10  # a space that became a tab, the last newline


# -- parts -----------------------------------------------------------------------------------------


def rows_at(part: Path) -> tuple[int, int, int]:
    """Where the rows of a part begin, their size, and how many are written."""
    with h5py.File(part, "r") as f:
        rows = f["rows"]
        return rows.id.get_offset(), rows.dtype.itemsize, int((rows["status"] > 0).sum())


@pytest.fixture
def good(tmp_path: Path) -> RunFolder:
    """A finished run of 40 points, none of which failed."""
    return finished(sweep_file(tmp_path, x=8, y=5), unit_points=5)


def hit_rows(good: RunFolder, hits: list[int]) -> Iterator[tuple[int, int]]:
    """Flip a bit in each of these rows; yield their (point, slice)."""
    part = good.all_parts()[0]
    at, size, _ = rows_at(part)
    data = bytearray(part.read_bytes())
    for hit in hits:
        row = np.frombuffer(bytes(data[at + hit * size : at + (hit + 1) * size]), "<u8")
        yield int(row[0]), 0
        data[at + hit * size + 30] ^= 4
    part.write_bytes(data)


def test_a_damaged_part_loses_only_the_damaged_rows_and_these_are_computed_again(
    good: RunFolder,
) -> None:
    before, _ = merged(good)
    part = good.all_parts()[0]
    values = [i for i, r in enumerate(committed(good).parts[0].rows) if r["kind"] == 0]
    hits = sorted(hit_rows(good, [values[0], values[7], values[23]]))
    surface, report = merged(good)
    words = "3 rows fail their checksum; they count as not computed"
    assert report.damaged == {part.name: words}
    assert report.missing == 3
    assert wrong_values(surface, before) == []
    done = command("verify", good.root)
    assert (done.code, f"{part.name}: {words}; 'lsweep run' computes what is lost" in done.err) == (
        1,
        True,
    )
    damaged_bytes = part.read_bytes()
    assert worked(good) == 3
    assert part.read_bytes() == damaged_bytes  # nothing is repaired
    again = read_part(good.all_parts()[-1], Plan.read(good).digest, 1).rows
    new = [p for p in good.all_parts() if p != part]
    assert len(new) == 1
    plan = Plan.read(good)
    again = read_part(new[0], plan.digest, 1).rows
    assert sorted((int(r["point"]), 0) for r in again if r["kind"] == 0) == hits
    assert differences(merged(good)[0], before) == []


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6, 0.99])
def test_a_truncated_part_loses_what_was_cut_off_and_that_is_computed_again(
    good: RunFolder, cut: float
) -> None:
    before, _ = merged(good)
    part = good.all_parts()[0]
    at, size, rows = rows_at(part)
    length = int(cut * (at + size * rows))
    part.write_bytes(part.read_bytes()[:length])
    whole_rows = max(0, (length - at) // size)
    kept = len(evaluated(good))
    assert whole_rows - 3 <= kept <= whole_rows  # three are audits
    surface, report = merged(good)
    assert report.damaged[part.name] == f"HDF5 cannot open it; {whole_rows} rows were salvaged"
    assert (report.missing, wrong_values(surface, before)) == (40 - kept, [])
    assert verify(good).problems
    assert worked(good) == 40 - kept
    assert evaluated(good) == [(p, 0) for p in range(40)]
    assert differences(merged(good)[0], before) == []


def test_a_part_whose_header_is_gone_gives_all_its_rows(good: RunFolder) -> None:
    before, _ = merged(good)
    part = good.all_parts()[0]
    at, _, _ = rows_at(part)
    for start, stop in ((0, 512), (0, at)):
        data = bytearray(part.read_bytes())
        data[start:stop] = bytes(stop - start)
        part.write_bytes(data)
        surface, report = merged(good)
        assert "rows were salvaged" in report.damaged[part.name]
        assert differences(surface, before) == []


def test_rows_of_another_plan_are_never_taken_for_this_ones(tmp_path: Path) -> None:
    mine = finished(sweep_file(tmp_path / "a", x=5))
    other = finished(sweep_file(tmp_path / "b", x=5, shift=1.0))
    before, _ = merged(mine)
    shutil.copy(other.all_parts()[0], mine.parts / "stranger.0000.h5")
    surface, report = merged(mine)
    assert differences(surface, before) == []
    assert list(report.damaged) == ["stranger.0000.h5"]
    assert verify(mine).problems
    for path in mine.all_parts():
        if path.name != "stranger.0000.h5":
            path.unlink()
    assert (committed(mine).done.any(), len(committed(mine).parts)) == (False, 1)


# -- everything but plan, rounds and parts can be deleted ------------------------------------------


def test_all_but_plan_rounds_and_parts_is_made_again(run: RunFolder, truth: Surface) -> None:
    for path in (run.devices, run.workers, run.leases):
        shutil.rmtree(path)
    for path in (run.directions, run.surface):
        path.unlink()
    surface, _ = merged(run)
    assert differences(surface, truth) == []
    assert verify(run).problems == []
    assert status(run)["missing"] == 0


def test_a_lost_round_is_an_error_and_a_lost_part_is_only_missing(run: RunFolder) -> None:
    kept = run.round(0).read_bytes()
    run.round(0).unlink()
    answer = asked(lambda: merge(run))
    assert isinstance(answer, Raised)
    run.round(0).write_bytes(kept)
    plan = Plan.read(run)
    total = Rounds.read(run, plan).total
    shutil.rmtree(run.parts)
    assert (status(run)["missing"], merged(run)[1].missing) == (total, 9)


@pytest.mark.parametrize("kind", FILES)
def test_a_worker_on_damaged_files_computes_the_right_values_or_says_what_is_wrong(
    tmp_path: Path, kind: str
) -> None:
    reference, _ = merged(finished(sweep_file(tmp_path / "calm", x=5)))
    folder = finished(sweep_file(tmp_path / "damaged", x=3), unit_points=1)
    merge_with_leases(folder)
    planned(sweep_file(tmp_path / "damaged", x=5), run=folder.root, unit_points=1)
    path = folder.lease(1, 0, 0) if kind == "lease" else FILES[kind](folder)
    if kind == "lease":
        shutil.copytree(folder.lease_folder(0, 0), folder.lease_folder(1, 0))
    path.write_bytes(damaged(path.read_bytes(), ("cut", 100)))
    parts = len(folder.all_parts())
    answer = worked(folder)
    if kind in (*NEEDED, "source", "factory", "device"):
        assert isinstance(answer, Raised)
        assert answer.kind in ("DamagedFile", "PlanChanged")
        assert path.name in answer.text
        assert len(folder.all_parts()) == parts
    else:
        assert answer == (5 if kind == "part" else 2)
        assert differences(merged(folder)[0], reference) == []
