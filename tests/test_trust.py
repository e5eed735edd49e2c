"""Trust: another user's code runs only when asked for, and reading a file never runs any.

Needs root, which alone can give a file to another user; without it those tests are skipped.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from tiny import PROBLEM, contents, lsweep, write_sweep

from lsweep.storage.files import sealed

STRANGER = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
MARKED = PROBLEM + '\nimport pathlib\n(pathlib.Path(__file__).parent / "imported").touch()\n'


@pytest.fixture
def toml(tmp_path):
    """A sweep.toml beside a factory that leaves a mark when it is imported."""
    return write_sweep(tmp_path / "here", problem=MARKED)


@pytest.fixture
def run(toml):
    """The planned run, with the mark of its planning wiped away."""
    assert lsweep("plan", toml) == 0
    (toml.parent / "imported").unlink()
    return toml.with_suffix(".run")


def refused(capfd, *arguments):
    """Return the one line with which a command refuses."""
    capfd.readouterr()
    assert lsweep(*arguments) == 1
    err = capfd.readouterr().err
    assert err.startswith("lsweep: ") and err.count("\n") == 1
    return err


# -- who owns the code -----------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("foreign", ["problem.py", "sweep.toml"])
def test_a_factory_of_another_user_is_refused_without_trust(toml, capfd, foreign):
    os.chown(toml.with_name(foreign), STRANGER, STRANGER)
    before = contents(toml.parent)
    for command in ("plan", "run"):
        line = refused(capfd, command, toml)
        assert f"{toml.with_name(foreign)} belongs to user {STRANGER}" in line
        assert "--trust" in line
    assert contents(toml.parent) == before  # nothing was imported
    assert lsweep("run", toml, "--on", "inline", "--trust") == 0
    assert toml.with_name("imported").exists()


@needs_root
@pytest.mark.parametrize("foreign", ["plan.json", "source.json", "problem.py"])
def test_a_run_of_another_user_is_refused_without_trust(run, capfd, foreign):
    os.chown(run / foreign, STRANGER, STRANGER)
    for words in (["work", run], ["run", run, "--on", "inline"], ["verify", run, "--data"]):
        line = refused(capfd, *words)
        assert f"{run / foreign} belongs to user {STRANGER}" in line and "--trust" in line
    assert not run.with_name("imported").exists()
    assert not (run / "parts").exists()
    assert lsweep("work", run, "--trust") == 0
    assert run.with_name("imported").exists()
    # What imports nothing asks nothing.
    for words in (["status", run], ["merge", run], ["verify", run], ["measure", run]):
        assert lsweep(*words) == 0


@needs_root
def test_workers_are_told_to_trust(run, capfd):
    os.chown(run / "plan.json", STRANGER, STRANGER)
    assert "belongs to user" in refused(capfd, "run", run, "--workers", "2")
    assert lsweep("run", run, "--workers", "2", "--trust", "--no-picture") == 0


@needs_root
@pytest.mark.parametrize("place", ["theirs_alone.py", "theirs_alone/__init__.py"])
def test_a_module_of_another_user_beside_the_sweep_file_is_refused(toml, capfd, place):
    module = toml.parent / place
    module.parent.mkdir(exist_ok=True)
    module.write_text(MARKED.replace("def make", f"def make_{len(place)}"))
    os.chown(module, STRANGER, STRANGER)
    factory = f"problem.factory=theirs_alone:make_{len(place)}"
    assert f"{module} belongs to user" in refused(capfd, "plan", toml, "--set", factory)
    assert not list(toml.parent.rglob("imported"))


# -- files are data --------------------------------------------------------------------------------


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["pickle", "torch", "old torch", "inside a state dict"])
@pytest.mark.parametrize("name", ["net.pt", "net.bin", "net.safetensors", "net.ckpt"])
def test_a_checkpoint_is_never_unpickled(tmp_path, capfd, how, name):
    mark, path = tmp_path / "executed", tmp_path / "here" / name
    toml = write_sweep(tmp_path / "here")
    if how == "pickle":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    elif how == "torch":
        torch.save(Bomb(mark), path)
    elif how == "old torch":
        torch.save(Bomb(mark), path, _use_new_zipfile_serialization=False)
    else:
        torch.save({"state_dict": {"0.weight": torch.zeros(3, 2)}, "extra": Bomb(mark)}, path)
    line = refused(capfd, "plan", toml, "--set", f"problem.options.checkpoint={name}")
    assert name in line and not mark.exists()
    kind = [
        "--set",
        "directions.kind=to",
        "--set",
        f"directions.checkpoint={name}",
        "--set",
        "directions.normalize=none",
    ]
    refused(capfd, "plan", toml, *kind)
    assert not mark.exists()
    with path.open("rb") as f, pytest.raises(FileExistsError):  # the bomb is live
        mark.mkdir()
        torch.load(f, weights_only=False) if how != "pickle" else pickle.load(f)


@pytest.mark.parametrize("where", ["a.npz", "a.h5"])
def test_an_array_file_is_never_unpickled(tmp_path, capfd, where):
    import h5py
    import numpy as np

    mark, path = tmp_path / "executed", tmp_path / where
    bomb = np.array([Bomb(mark)], dtype=object)
    if where == "a.npz":
        np.savez(path, train_loss=bomb, x=bomb)
    else:
        with h5py.File(path, "w") as f:
            f["train_loss"] = np.void(pickle.dumps(Bomb(mark)))
            f.attrs["lsweep_schema"] = np.void(pickle.dumps(Bomb(mark)))
    refused(capfd, "convert", path, tmp_path / "out.csv")
    assert not mark.exists()


# -- names stay in the run -------------------------------------------------------------------------


@pytest.mark.parametrize("factory", ["../evil.py", "{}/evil.py", "a/../../evil.py", "{}/.py"])
def test_the_factory_named_in_a_plan_is_the_copy_in_the_run(run, capfd, factory):
    outside = run.parent
    for name in ("evil.py", ".py"):
        (outside / name).write_text(MARKED)
    plan = json.loads((run / "plan.json").read_text())
    del plan["sha256"]
    plan["problem"]["factory"] = f"{factory.format(outside)}:make"
    (run / "plan.json").write_bytes(sealed(plan))
    round_ = json.loads((run / "rounds" / "0000.json").read_text())
    del round_["sha256"]
    from lsweep.storage.files import digest

    (run / "rounds" / "0000.json").write_bytes(sealed({**round_, "plan": digest(plan)}))
    line = refused(capfd, "work", run)
    name = factory.rpartition("/")[2]
    assert f"cannot read {run / name}: No such file" in line
    shutil.copy(outside / "evil.py", run / name)
    (run / name).write_text("raise RuntimeError('another file')\n")
    assert "is not the factory file that was planned" in refused(capfd, "work", run)
    assert not (outside / "imported").exists()


def test_a_checkpoint_index_names_files_of_its_own_folder_only(tmp_path, capfd):
    toml = write_sweep(tmp_path / "here")
    torch.save({"w": torch.zeros(1)}, tmp_path / "secret.bin")
    index = {"weight_map": {"w": "../secret.bin"}}
    (tmp_path / "here" / "net.bin.index.json").write_text(json.dumps(index))
    to = [
        "--set",
        "directions.kind=to",
        "--set",
        "directions.checkpoint=net.bin.index.json",
        "--set",
        "directions.normalize=none",
    ]
    assert "a path outside its folder" in refused(capfd, "plan", toml, *to)
