"""Data in a file that a node's workers map: the same bits, read once, nothing left behind."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import differences, finished, fork, in_child, merged, planned, wait_for, worked

from lsweep.hosts import startup
from lsweep.hosts.machine import start_time
from lsweep.plans.plan import Plan
from lsweep.preparing.restoring import load_problem
from lsweep.problems import residence
from lsweep.problems.data import tensors_of
from lsweep.problems.residence import resident
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder

PROBLEM = """
import pathlib, time
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
import lsweep

HERE = pathlib.Path(__file__).parent


class Items(Dataset):
    noise = False

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        with open(HERE / "reads", "a") as f:
            f.write(f"{i}\\n")
        x = self.x[i] + torch.randn(3) if self.noise else self.x[i]
        return {"x": x, "labels": int(self.y[i])}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, x):
        return self.a(x)


def make(form="tensors"):
    g = torch.Generator().manual_seed(2)
    y = torch.arange(401) % 4
    x = torch.randn(401, 3, generator=g, dtype=torch.float64)
    net = Net()
    for p in net.parameters():
        nn.init.normal_(p, generator=g)
    data = {"tensors": {"x": x, "labels": y}, "items": Items(x, y),
            "batches": [(x[:50], y[:50]), (x[50:], y[50:])]}[form]
    return lsweep.Problem(net, {"train": data}, loss=nn.CrossEntropyLoss())
"""


@pytest.fixture(autouse=True)
def folder_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of this test's own, and files for data however small."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(node))
    monkeypatch.setattr(residence, "SMALLEST", 1)
    yield node
    assert list(node.glob("*.data*")) == []


def written(base: Path, form: str = "tensors", more: str = "") -> Path:
    base.mkdir(exist_ok=True)
    (base / "problem.py").write_text(PROBLEM)
    (base / "sweep.toml").write_text(
        f'[problem]\nfactory = "problem.py:make"\n[problem.options]\nform = "{form}"\n'
        f"[grid.x]\nrange = [-1, 1]\ncount = 21\n[evaluate]\n{more}\n"
    )
    return base / "sweep.toml"


def loaded(folder: RunFolder):
    plan = Plan.read(folder)
    return load_problem(folder, plan)[0], plan


def left(node: Path) -> list[Path]:
    return list(node.glob("*.data"))


@pytest.mark.parametrize("form", ["tensors", "items"])
@pytest.mark.parametrize("more", ["", "slices = 2", "samples = 60\nbatch_size = 7"])
def test_values_are_bit_for_bit_those_of_a_worker_with_its_own_copy(tmp_path, form, more):
    own = finished(written(tmp_path / "own", form, more=more))
    shared = planned(written(tmp_path / "shared", form, more=more))
    assert worked(shared, of=2) == (42 if "slices" in more else 21)
    assert differences(merged(own)[0], merged(shared)[0]) == []
    digests = [read_json(f.all_devices()[0])["data"] for f in (own, shared)]
    assert digests[0] == digests[1]


def test_all_map_one_file_and_the_last_one_out_removes_it(tmp_path, folder_of_the_node):
    folder = planned(written(tmp_path))
    problem, plan = loaded(folder)
    own = tensors_of(problem.splits["train"].data)
    with resident(loaded(folder)[0], plan, 2) as a:
        (file,) = left(folder_of_the_node)
        assert file.stat().st_mode & 0o777 == 0o600
        inode = file.stat().st_ino
        with resident(loaded(folder)[0], plan, 2) as b:
            assert [f.stat().st_ino for f in left(folder_of_the_node)] == [inode]
            for problem in (a, b):
                split = problem.splits["train"]
                assert split.data is None
                (batch,) = split.batches(401)
                for t, like in zip(tensors_of(batch), own, strict=True):
                    wanted = like.float() if like.is_floating_point() else like
                    assert t.dtype == wanted.dtype and torch.equal(t, wanted)
            next(a.splits["train"].batches(9))["x"].zero_()  # private: nobody else sees it
            assert next(b.splits["train"].batches(9))["x"].abs().min() > 0
        assert left(folder_of_the_node) == [file]
    assert left(folder_of_the_node) == []
    with resident(loaded(folder)[0], plan, 1) as alone:
        assert alone.splits["train"].data is not None and not left(folder_of_the_node)


def test_a_dataset_is_read_once_for_a_node(tmp_path):
    folder = planned(written(tmp_path, "items"))
    problem, plan = loaded(folder)
    reads = tmp_path / "reads"

    def times() -> int:
        count = len(reads.read_text().split()) if reads.exists() else 0
        reads.write_text("")
        return count

    times()
    with resident(problem, plan, 2) as a:
        assert times() < 401 + 50  # all of it, and a few to look at
        with resident(loaded(folder)[0], plan, 2) as b:
            assert times() < 401 / 2  # those by which the data is known
            for problem in (a, b):
                assert sum(len(x["labels"]) for x in problem.splits["train"].batches(8)) == 401
            assert times() == 0


def test_an_augmentation_is_found_out_all_the_same(tmp_path):
    folder = planned(written(tmp_path / "calm", "items"))
    problem, plan = loaded(folder)
    with resident(problem, plan, 2) as a:
        split = a.splits["train"]
        split._source._dataset.noise = True
        assert split.full_digest(8) != split.full_digest(8)


def test_what_a_killed_worker_left_is_used_or_removed(tmp_path, folder_of_the_node):
    folder = planned(written(tmp_path / "a"))
    other = planned(written(tmp_path / "b", more="slices = 2"))

    def abandon(run: RunFolder) -> None:
        pid = fork()
        if pid == 0:
            problem, plan = loaded(run)
            with resident(problem, plan, 2):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)

    abandon(folder)
    (file,) = left(folder_of_the_node)
    inode = file.stat().st_ino
    with resident(*loaded(folder), 2) as used:
        assert [f.stat().st_ino for f in left(folder_of_the_node)] == [inode]
        assert used.splits["train"].data is None
    assert not left(folder_of_the_node)
    abandon(folder)
    torn = file.with_name(f"{file.name}.4711")  # killed while it wrote
    torn.write_bytes(b"half")
    with resident(*loaded(other), 2):
        assert not file.exists() and not torn.exists() and len(left(folder_of_the_node)) == 1


@pytest.mark.parametrize("harm", ["flip", "cut", "header"])
def test_a_file_that_holds_something_else_is_written_anew(tmp_path, folder_of_the_node, harm):
    folder = planned(written(tmp_path))
    with resident(*loaded(folder), 2):
        (file,) = left(folder_of_the_node)
        data = bytearray(file.read_bytes())
    if harm == "flip":
        data[residence.HEADER] ^= 1  # of the first sample, which is among those compared
    if harm == "header":
        data[:9] = b"not JSON!"
    file.touch(mode=0o600)
    file.write_bytes(data[:-1] if harm == "cut" else data)
    with resident(*loaded(folder), 2) as problem:
        assert problem.splits["train"].data is None
        clean = tensors_of(loaded(folder)[0].splits["train"].data)[0].float()
        assert torch.equal(next(problem.splits["train"].batches(401))["x"], clean)


@pytest.mark.parametrize("why", ["no folder", "no room", "a link", "batches", "small", "slow"])
def test_otherwise_each_keeps_its_own_copy(tmp_path, folder_of_the_node, monkeypatch, why):
    form = "batches" if why == "batches" else "tensors"
    folder = planned(written(tmp_path, form))
    problem, plan = loaded(folder)
    if why == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    if why == "no room":
        monkeypatch.setattr(residence, "SHARE", 1e-12)
    if why == "small":
        monkeypatch.setattr(residence, "SMALLEST", 2**23)
    if why == "a link":
        with resident(*loaded(folder), 2):
            (file,) = left(folder_of_the_node)
        (tmp_path / "elsewhere").write_bytes(b"precious")
        file.symlink_to(tmp_path / "elsewhere")
    if why == "slow":
        monkeypatch.setattr(residence, "PATIENCE", 0.1)
        monkeypatch.setattr(startup, "_lock", lambda fd, kind: False)
    with resident(problem, plan, 2) as kept:
        assert kept.splits["train"].data is not None
        batches = list(kept.splits["train"].batches(401))
        assert sum(len(tensors_of(b)[0]) for b in batches) == 401
    if why == "a link":
        assert file.read_bytes() == b"precious"
        file.unlink()


def test_workers_that_begin_together_write_it_once(tmp_path, folder_of_the_node):
    folder = planned(written(tmp_path, "items"))
    (tmp_path / "reads").unlink()
    pids = []
    for _ in range(3):
        pid = fork()
        if pid == 0:
            code = 1
            try:
                problem, plan = loaded(folder)
                (tmp_path / f"ready-{os.getpid()}").touch()
                while len(list(tmp_path.glob("ready-*"))) < 3:
                    time.sleep(0.01)
                with resident(problem, plan, 3) as shared:
                    code = 0 if shared.splits["train"].data is None else 2
                    (tmp_path / f"in-{os.getpid()}").touch()
                    while len(list(tmp_path.glob("in-*"))) < 3:
                        time.sleep(0.01)
            finally:
                os._exit(code)
        pids.append(pid)
    wait_for(lambda: len(list(tmp_path.glob("in-*"))) == 3)
    assert [os.waitpid(p, 0)[1] for p in pids] == [0, 0, 0]
    # Each looked at its data before, and at a few samples after; one read all of it, twice.
    assert np.bincount(np.loadtxt(tmp_path / "reads", dtype=int)).min() < 3
    assert in_child(left, folder_of_the_node) == []


def test_a_start_leaves_nothing_for_ever_in_the_nodes_folder(folder_of_the_node, monkeypatch):
    with pytest.raises(ValueError), startup.turn("a"):
        raise ValueError
    assert not list(folder_of_the_node.iterdir())
    here = os.getpid()
    for parent, start in ((2**22 + 1, "1"), (here, start_time(here))):  # the first is gone
        monkeypatch.setattr(startup, "PARENT", parent)
        monkeypatch.setattr(startup, "START_OF_PARENT", start)
        assert startup.first_of_siblings("b")
    assert not startup.first_of_siblings("b")
    (once,) = folder_of_the_node.iterdir()
    assert str(here) in once.name
