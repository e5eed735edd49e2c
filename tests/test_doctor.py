"""The doctor: what it says of good and bad file systems, alone and from two nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cases import command
from weak_filesystem import mounted, tell

from lsweep.doctor import Level, diagnose

needs_fuse = pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")


def together(*folders: Path) -> list[dict[str, object]]:
    """Run a doctor on each folder at once, as on as many nodes, and return what they say."""
    words = [sys.executable, "-m", "lsweep", "doctor", "--json", "--wait", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    doctors = [subprocess.Popen([*words, str(f)], **pipes) for f in folders]
    ended = [(*d.communicate(), d.returncode) for d in doctors]
    assert all("Traceback" not in err for _, err, _ in ended), ended
    return [{**json.loads(out), "code": code} for out, _, code in ended]


def finding(said: dict[str, object], name: str) -> dict[str, object]:
    return next(f for f in said["findings"] if f["name"] == name)  # type: ignore[attr-defined]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def nodes(base: Path, stack: ExitStack, **settings: object) -> list[Path]:
    """Two mounts of one backing folder, with the weaknesses that are asked for."""
    backing = base / "server"
    backing.mkdir()
    mounts = [base / f"node{i}" for i in range(2)]
    return [stack.enter_context(mounted(backing, m, **settings)) for m in mounts]


def test_a_good_folder_is_safe_and_left_as_it_was(tmp_path):
    done = command("doctor", tmp_path, "--wait", 0)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "safe with leases"
    assert list(tmp_path.iterdir()) == []


def test_alone_it_says_what_was_not_probed(tmp_path):
    done = command("doctor", tmp_path, "--wait", 0.2)
    assert done.code == 0
    assert "none came: what another node sees was not probed" in done.out
    assert list(tmp_path.iterdir()) == []


def test_two_doctors_find_each_other(tmp_path):
    said = together(tmp_path, tmp_path)
    assert [s["code"] for s in said] == [0, 0]
    for one in said:
        assert finding(one, "other node's rows")["figures"]["seconds"] < 30  # type: ignore[index]
    won = [finding(s, "claims raced by two nodes")["figures"]["won"] for s in said]  # type: ignore[index]
    assert sum(won) == 200
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path):
    for folder, why in ((tmp_path / "nowhere", "no folder"), (tmp_path / "file", "no folder")):
        (tmp_path / "file").write_text("")
        done = command("doctor", folder, "--wait", 0)
        assert done.code == 1 and done.err.startswith(f"lsweep: {why} {folder}")
        assert done.err.count("\n") == 1


@needs_fuse
def test_late_names_are_told_and_harmless(tmp_path, stack):
    places = nodes(tmp_path, stack, seconds=2.0, open_folder_asks=False)
    said = together(*places)
    assert [s["code"] for s in said] == [0, 0], said
    late = [finding(s, "other node's names in a listing")["figures"] for s in said]
    assert max(f["seconds"] for f in late) > 0.5  # type: ignore[index]
    assert all(s["verdict"] == "safe with leases" for s in said)


@needs_fuse
def test_lost_replies_and_stale_handles_are_harmless(tmp_path, stack):
    place, _ = nodes(tmp_path, stack, seconds=0.5, lost=0.05, stale=0.02, seed=3)
    found = diagnose(place)
    assert found.level <= Level.NOTE, found.lines()


@needs_fuse
def test_links_decided_by_what_a_node_remembers_are_not_safe(tmp_path, stack):
    # Alone nobody could tell: only the race of two nodes shows it.
    said = together(*nodes(tmp_path, stack, seconds=3.0, links="overwrite"))
    assert [s["code"] for s in said] == [1, 1], said
    assert all("both nodes won" in str(s["verdict"]) for s in said)


@needs_fuse
def test_without_hard_links_exclusive_names_serve(tmp_path, stack):
    said = together(*nodes(tmp_path, stack, links="none"))
    assert [s["code"] for s in said] == [0, 0], said
    assert str(finding(said[0], "hard links")["text"]).startswith("no: exclusive names")


@needs_fuse
def test_a_disk_that_refuses_is_named(tmp_path, stack):
    place, _ = nodes(tmp_path, stack)
    tell(place, disk=1.0)
    found = diagnose(place)
    assert found.exit_code == 1
    assert any(f.level is Level.UNSAFE and f.name == "sync" for f in found.findings)
    tell(place, disk=0.0)
    assert list(place.iterdir()) == []
