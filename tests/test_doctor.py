"""The doctor names what a file system does late, says whether it is safe, and clears up."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cases import command, started
from weak_filesystem import mounted

from lsweep.runs import doctor
from lsweep.runs.doctor import Diagnosis, Finding, Level

SEEN = [f"other node's {what}" for what in ("names in a listing", "names looked for", "rows",
                                            "sizes", "heartbeats")]  # fmt: skip
RACED = "claims raced by two nodes"
HOWEVER_SLOW = """
import sys
from lsweep.commands import cli
from lsweep.runs import doctor
doctor.SLOW_CLAIM = 1e3  # of this machine, which may be busy, nothing is asked
sys.exit(cli.main())
"""


def both(folders: list[Path], *more: str) -> list[dict[str, Any]]:
    """Start a doctor in a pid namespace of its own on each folder; return what they say."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c",
             HOWEVER_SLOW, "doctor", "--wait", "150", "--json", *more]  # fmt: skip
    running = [started([*words, str(f)]) for f in folders]
    said = []
    for p in running:
        out, err = p.communicate(timeout=250)
        assert "Traceback" not in err and out, err
        found = json.loads(out)
        found["code"] = p.returncode
        found["by name"] = {f["name"]: f for f in found["findings"]}
        said.append(found)
    return said


def on_two_nodes(base: Path, **settings: Any) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(mounted(base / "server", base / f"n{i}", seed=i, **settings))
            for i in range(2)
        ]
        said = both(nodes)
        left = [p for p in (base / "server").rglob("*") if not p.name.startswith(".fuse_hidden")]
        assert settings.get("lost") or settings.get("links") == "overwrite" or left == []
    return said


def test_alone_it_probes_what_one_node_can_see(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_CLAIM", 1e3)
    done = command("doctor", tmp_path, "--wait", "0.2")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[-1] == "safe with leases" and str(tmp_path) in lines[0]
    assert "none came: what another node sees was not probed" in done.out
    assert all(line.split()[0] in ("ok", "note") for line in lines[1:-1])
    assert list(tmp_path.iterdir()) == []
    found = json.loads(command("doctor", tmp_path, "--wait", "0", "--json").out)
    assert len(found["findings"]) == len(doctor.PROBES) and found["level"] in ("ok", "note")


def test_two_on_one_local_folder_find_each_other(tmp_path):
    for found in both([tmp_path, tmp_path]):
        assert (found["code"], found["verdict"]) == (0, "safe with leases")
        assert set(found["by name"]) >= {*SEEN, RACED}
        assert found["by name"][RACED]["figures"]["both"] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_third_waits_for_a_fourth(tmp_path):
    said = both([tmp_path] * 4)
    assert [RACED in found["by name"] for found in said] == [True] * 4
    assert list(tmp_path.iterdir()) == []


def test_what_is_remembered_is_named_and_safe(tmp_path):
    for found in on_two_nodes(tmp_path, seconds=6, open_folder_asks=False):
        assert (found["code"], found["verdict"]) == (0, "safe with leases"), found
        late = {what: found["by name"][what]["figures"]["seconds"] for what in SEEN}
        # A look is made half a second before the other acts, and is remembered for six; the
        # other may be late to act by most of that, so that less of it is seen.
        assert 1 < late["other node's names in a listing"] < 60
        assert 1 < late["other node's names looked for"] < 60
        assert late["other node's rows"] < late["other node's names looked for"]
        assert "seen after" in found["by name"][SEEN[0]]["text"]


def test_lost_replies_and_stale_handles_are_safe(tmp_path):
    for found in on_two_nodes(tmp_path, lost=0.1, stale=0.01):
        assert (found["code"], found["verdict"]) == (0, "safe with leases"), found
        assert found["by name"][RACED]["figures"]["nobody"] == 0


def test_a_file_system_without_links_is_safe(tmp_path):
    for found in on_two_nodes(tmp_path, links="none"):
        assert found["by name"]["hard links"]["text"] == "no: exclusive names decide instead"
        assert (found["code"], found["verdict"]) == (0, "safe with leases"), found


@pytest.mark.full
def test_links_that_two_nodes_win_are_not_safe(tmp_path):
    said = on_two_nodes(tmp_path, seconds=30, links="overwrite")
    assert 1 in [found["code"] for found in said], said
    bad = next(found for found in said if found["code"] == 1)
    assert bad["verdict"].startswith("not safe for runs because")
    assert "two nodes published one name" in bad["verdict"] or "both nodes won" in bad["verdict"]


def test_slow_claims_ask_for_static(tmp_path):
    with mounted(tmp_path / "server", tmp_path / "node", delay=0.25) as node:
        done = command("doctor", node, "--wait", "0")
    assert done.code == 3
    assert done.out.splitlines()[-1].startswith("use --claims static because a claim takes")


def test_a_disk_that_refuses_is_not_safe(tmp_path):
    with mounted(tmp_path / "server", tmp_path / "node", disk=1.0) as node:
        done = command("doctor", node, "--wait", "0")
    assert done.code == 1 and done.err == ""
    assert done.out.splitlines()[-1].startswith("not safe for runs because")


def test_a_folder_that_is_missing_is_one_line(tmp_path):
    done = command("doctor", tmp_path / "nowhere")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"lsweep: no folder {tmp_path / 'nowhere'}\n"
    assert command("doctor", tmp_path, "--wait", "-1").code == 2


@pytest.mark.parametrize(
    "level, code, start",
    [
        (Level.OK, 0, "safe with leases"),
        (Level.NOTE, 0, "safe with leases"),
        (Level.STATIC, 3, "use --claims static because it is late"),
        (Level.UNSAFE, 1, "not safe for runs because it is late"),
    ],
)
def test_the_worst_finding_decides(level, code, start):
    found = Diagnosis(
        Path(), "x", [Finding("a", Level.OK, "fine"), Finding("b", level, "it is late")]
    )
    assert (found.exit_code, found.verdict) == (code, start)
