"""The command line: what each command promises, from init to numbers, in answers and exit codes.

The network has one weight, 2, and one filter, so its direction is ±2 and the loss at offset x is
4x²; a file beside the factory stops it, spoils it, or slows it down.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
from cases import Command, committed, evaluated, fork, hurry, process, sweep_file, wait_for
from tiny import contents, write_sweep
from tiny import lsweep as command

import lsweep
from lsweep.commands.cli import main
from lsweep.errors import LsweepError
from lsweep.hosts.machine import host_identity, start_time
from lsweep.runs import display
from lsweep.runs.display import Display
from lsweep.storage.files import read_json, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.holding import held
from lsweep.surfaces.surface import Status, Surface
from lsweep.working.role import Role
from lsweep.working.worker import work

PARABOLA = """\
import pathlib
import time

import torch
from torch import nn

import lsweep

HERE = pathlib.Path(__file__).parent


def make(checkpoint="weight.pt"):
    net = nn.Linear(1, 1, bias=False)
    net.load_state_dict(lsweep.load_state(checkpoint))

    def loss(output, target):
        x = abs(float(output[0, 0]) - 2) / 2
        if (HERE / "stop").exists() and 0.4 < x < 0.6:
            raise KeyboardInterrupt
        if (HERE / "broken").exists() and 0.4 < x < 0.6:
            raise ValueError("half a step is too far")
        while (HERE / "slow").exists() and 0.4 < x < 0.6 and not (HERE / "seen").exists():
            time.sleep(0.01)
        return (output - target).square().flatten()

    data = (torch.ones(4, 1), torch.full((4, 1), 2.0))
    return lsweep.Problem(net, {"train": data}, loss=loss)
"""
SWEEP = """\
[problem]
factory = "problem.py:make"
[grid.x]
range = [-1.0, 1.0]
count = 5
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """However long a command takes, it tells of its progress only where a row asks for that."""
    monkeypatch.setattr(display, "ELSEWHERE", 1e6)


@pytest.fixture
def toml(tmp_path):
    """A sweep.toml beside its problem.py and checkpoint."""
    import torch

    toml = write_sweep(tmp_path / "here", SWEEP, PARABOLA)
    torch.save({"weight": torch.full((1, 1), 2.0)}, toml.with_name("weight.pt"))
    return toml


@pytest.fixture
def run(toml):
    """The run of ``toml``, not there yet."""
    return toml.with_suffix(".run")


@pytest.fixture
def half_done(toml, run, capfd):
    """The run with three of its five points: the ends and the centre."""
    toml.with_name("stop").touch()
    assert command("run", toml, "--on", "inline") == 130
    toml.with_name("stop").unlink()
    err = capfd.readouterr().err
    said = "lsweep: interrupted with 3 of 5 points committed; the same command goes on\n"
    assert err.startswith("pre-flight on ") and err.split("\n", 1)[1] == said
    return run


def rows(run: Path) -> int:
    """Return how many points were evaluated, each as often as that was done."""
    return len(evaluated(RunFolder(run)))


# -- the whole way ---------------------------------------------------------------------------------


def test_from_init_to_numbers(tmp_path, capfd):
    folder = tmp_path / "new"
    assert command("init", folder) == 0
    out = capfd.readouterr().out
    assert f"next: edit them, then 'lsweep run {folder / 'sweep.toml'}'" in out
    toml, run = folder / "sweep.toml", folder / "sweep.run"
    small = ["--set", "grid.x.count=3", "--set", "grid.y.count=5"]
    assert command("run", toml, "--on", "inline", *small) == 0
    out, err = capfd.readouterr()
    assert "15 of 15 points to evaluate" in out
    assert err.startswith("pre-flight on ") and err.count("\n") == 1  # however fast it is
    assert f"wrote {run / 'surface.h5'}" in out
    assert (run / "figures" / "train_loss.png").read_bytes().startswith(b"\x89PNG")
    surface = lsweep.open(run / "surface.h5")
    assert surface.shape == (5, 3) and surface.complete
    assert surface.center("train_loss") == surface.minimum("train_loss")[1] < 0.1  # it was trained

    assert command("status", run) == 0
    assert "15/15 points done (100%), grid 3 x 5, 1 round\n" in capfd.readouterr().out
    merged = (run / "surface.h5").read_bytes()
    (run / "surface.h5").unlink()
    assert command("merge", run) == 0
    assert (run / "surface.h5").read_bytes() == merged
    assert command("verify", run, "--data") == 0
    assert re.search(r"\d+ files checked, 0 problems\n", capfd.readouterr().out)
    for source, picture in ((run, "a.png"), (run / "surface.h5", "a.svg")):
        assert command("render", source, "-o", folder / picture) == 0
        assert (folder / picture).stat().st_size > 1000
        assert command("convert", source, folder / "a.csv") == 0
        lines = (folder / "a.csv").read_text().splitlines()
        assert len(lines) == 16 and lines[0].startswith("x,y,train_loss")
        capfd.readouterr()
        assert command("measure", source, "--json") == 0
        (row,) = json.loads(capfd.readouterr().out)
        assert (row["metric"], row["points"]) == ("train_loss", 15)
        assert row["minimum"] == surface.minimum("train_loss")[1]


def test_a_run_is_the_formula(toml, run, capfd):
    assert command("run", toml, "--on", "inline") == 0
    assert "train_loss: 0 at the centre, minimum 0 at x = 0" in capfd.readouterr().out
    assert not [p for p in (run / "leases").rglob("*") if p.is_file()]  # none is missing any more
    surface = Surface.load(run / "surface.h5")
    assert surface.x.tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    np.testing.assert_allclose(surface["train_loss"], 4 * surface.x**2, rtol=1e-6)


def test_a_plan_of_which_nothing_was_computed_is_replaced(toml, run, capfd):
    problem = toml.with_name("problem.py")
    problem.write_text(PARABOLA.replace(".square().flatten()", ".sqare()"))
    assert command("run", toml, "--on", "inline") == 1
    assert "no attribute 'sqare'" in capfd.readouterr().err
    problem.write_text(PARABOLA)
    with held(run / "plan.json"):  # as its workers do
        assert command("run", toml, "--on", "inline") == 1
    assert "problem.code" in capfd.readouterr().err
    assert command("plan", toml) == 0
    said = f"{run} held another plan (problem.code differs); nothing was computed there, so this"
    assert said in capfd.readouterr().out
    assert (run / "problem.py").read_text() == PARABOLA
    finer = ["--set", "directions.seed=1", "--set", "grid.x.count=9"]
    assert command("run", toml, "--on", "inline", *finer) == 0
    assert "(directions.x.seed differs); nothing was computed" in capfd.readouterr().out
    assert len(Surface.load(run / "surface.h5").x) == 9 == rows(run)
    assert "directions.seed=1" in (run / "sweep.toml").read_text()
    (run / "surface.h5").unlink()
    before = contents(run)
    assert command("run", toml, "--on", "inline") == 1 and contents(run) == before


def test_a_worker_whose_plan_was_replaced_computes_nothing_with_its_problem(toml, run):
    assert command("plan", toml) == 0
    with pytest.raises(LsweepError, match="another command replaced its plan"):
        work(RunFolder(run), Role(plan="another"))
    assert not (run / "parts").exists()


def test_plan_says_what_it_will_cost_and_evaluates_nothing(toml, run, capfd):
    assert command("plan", toml) == 0
    out = capfd.readouterr().out
    assert f"{run}: plan " in out and "grid 5, 5 points in 1 round" in out
    assert (
        "5 units of 1 point, 5 leases; 1 slice" in out and "4 samples in train; metrics loss" in out
    )
    assert "MiB of rows" in out and "files" in out and "kill -9" in out
    assert "about 5 passes over the data are missing, one a point; how long one" in out
    assert f"next: lsweep run {run}" in out
    assert not (run / "parts").exists()
    before = contents(run)
    assert command("plan", toml) == 0 and contents(run) == before


# -- half-finished runs ----------------------------------------------------------------------------


def test_status_of_a_half_finished_run(half_done, capfd):
    assert command("status", half_done) == 0
    out = capfd.readouterr().out
    assert "3/5 points done (60%), grid 5, 1 round" in out
    assert "1 stopped" in out
    assert command("plan", half_done) == 0
    said = capfd.readouterr().out
    assert "about 2 passes over the data are missing" in said
    told = re.search(r"  (.*) of one worker on .*, 1 thread, at ([\d.]+) ms a point\n", said)
    assert told and told[1] == display.duration(2 * float(told[2]) / 1000)
    assert f"nobody works on it: 'lsweep run {half_done}' computes what is missing" in out
    assert command("status", half_done, "--json") == 0
    state = json.loads(capfd.readouterr().out)
    assert (state["done"], state["missing"], state["points"]) == (3, 2, 5)
    assert state["grid"] == {"x": ["-1", "1", 5]} and state["merged"] is False
    assert [w["state"] for w in state["workers"]] == ["stopped"]


def test_merge_of_an_incomplete_run_writes_nothing_unless_asked(half_done, capfd):
    before = contents(half_done)
    assert command("merge", half_done) == 3
    out, err = capfd.readouterr()
    assert out == "" and "lsweep: 2 of 5 points are missing\n" in err and "--partial" in err
    assert contents(half_done) == before
    assert command("merge", half_done, "--partial") == 3
    surface = Surface.load(half_done / "surface.h5")
    pending, ok = Status.PENDING, Status.OK
    assert surface.status.tolist() == [ok, pending, ok, pending, ok]
    assert np.isnan(surface["train_loss"][[1, 3]]).all()


def test_an_incomplete_run_can_be_looked_at(half_done, tmp_path, capfd):
    assert command("render", half_done, "-o", tmp_path / "a.png") == 0
    assert command("convert", half_done, tmp_path / "a.csv") == 0
    assert (tmp_path / "a.csv").read_text().count("pending") == 2
    capfd.readouterr()
    assert command("measure", half_done, "--json") == 0
    assert json.loads(capfd.readouterr().out)[0]["finite"] == 0.6


@pytest.mark.parametrize("again", ["toml", "run"])
def test_the_same_command_goes_on_and_then_does_nothing(half_done, toml, again, capfd):
    sweep = {"toml": toml, "run": half_done}[again]
    assert command("run", sweep, "--on", "inline") == 0
    assert "2 of 5 points to evaluate" in capfd.readouterr().out
    assert rows(half_done) == 5
    parts = contents(half_done / "parts")
    assert command("run", sweep, "--on", "inline") == 0
    assert "to evaluate" not in capfd.readouterr().out
    assert contents(half_done / "parts") == parts
    surface = Surface.load(half_done / "surface.h5")
    np.testing.assert_allclose(surface["train_loss"], 4 * surface.x**2, rtol=1e-6)


def test_failed_points_exit_3_and_are_asked_again(toml, run, capfd):
    toml.with_name("broken").touch()
    assert command("run", toml, "--on", "inline") == 3
    err = capfd.readouterr().err
    line = r"lsweep: 2 points failed: ValueError: half a step is too far \(problem.py:\d+\)\n"
    assert re.fullmatch(f"pre-flight on .*\n{line}", err)
    assert Surface.load(run / "surface.h5").status.tolist() == [1, 3, 1, 3, 1]
    toml.with_name("broken").unlink()
    assert command("run", toml, "--on", "inline") == 3  # they count as done
    assert command("run", toml, "--on", "inline", "--retry-failed") == 0
    assert rows(run) == 7
    assert Surface.load(run / "surface.h5").status.tolist() == [1, 1, 1, 1, 1]


# -- more of the same plan -------------------------------------------------------------------------


def test_a_finer_grid_is_one_more_round_and_reuses_common_points(toml, run, capfd):
    assert command("run", toml, "--on", "inline") == 0
    coarse = Surface.load(run / "surface.h5")
    assert command("run", toml, "--on", "inline", "--set", "grid.x.count=9") == 0
    assert "4 of 9 points to evaluate" in capfd.readouterr().out
    assert sorted(p.name for p in (run / "rounds").iterdir()) == ["0000.json", "0001.json"]
    assert rows(run) == 9
    fine = Surface.load(run / "surface.h5")
    assert fine["train_loss"][::2].tobytes() == coarse["train_loss"].tobytes()
    assert command("run", toml, "--on", "inline") == 0  # and back: nothing is computed
    assert rows(run) == 9
    assert (
        Surface.load(run / "surface.h5")["train_loss"].tobytes() == coarse["train_loss"].tobytes()
    )


# -- where things are ------------------------------------------------------------------------------


def test_a_run_whose_name_looks_like_an_option_is_run(toml, tmp_path):
    odd = tmp_path / "-odd"
    odd.mkdir()
    for file in toml.parent.iterdir():
        if file.is_file():
            shutil.copy(file, odd)
    done = subprocess.run(
        [sys.executable, "-m", "lsweep", "run", f"./-odd/{toml.name}", "--workers", "2",
         "--no-picture"], cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nobody_need_listen_and_a_full_listener_is_named(half_done):
    def say(redirection: str) -> tuple[int, str]:
        words = f"exec {sys.executable} -m lsweep status '{half_done}' {redirection}"
        done = subprocess.run(["sh", "-c", words], stderr=subprocess.PIPE, text=True, check=False)
        return done.returncode, done.stderr

    assert say(">&-") == (0, "")
    full = "lsweep: cannot print to standard output: No space left on device\n"
    assert say("> /dev/full") == (1, full)


def test_who_is_overtaken_by_another_grid_is_told(tmp_path):
    file = sweep_file(tmp_path, x=9, pause=1000.0)
    running = Command("run", file, "--no-picture", "--workers", 1, "--unit-points", 1)
    folder = RunFolder(file.with_suffix(".run"))
    wait_for(folder.all_workers)
    asked = Command("plan", file, "--set", "grid.x.count=3").wait()
    assert asked.code == 0, asked
    hurry(folder)
    done = running.wait()
    assert (done.code, "meanwhile another command asked for another" in done.err) == (3, True), done
    again = Command("run", file, "--no-picture", "--workers", 1).wait()
    assert again.code == 0 and lsweep.open(folder.root).shape == (9,)


def test_relative_paths_are_those_of_the_sweep_file(toml, run, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command("run", "../here/sweep.toml", "--on", "inline") == 0
    assert Surface.load(run / "surface.h5").complete
    assert not list((tmp_path / "elsewhere").iterdir())
    assert command("work", "../here/sweep.run") == 0
    assert command("run", "../here/sweep.toml", "--on", "inline", "--run", "mine") == 0
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["mine"]


@pytest.mark.parametrize("what", ["run", "toml"])
def test_a_run_that_moved_with_everything_beside_it_goes_on(half_done, tmp_path, what):
    shutil.move(half_done.parent, tmp_path / "there")
    moved = tmp_path / "there" / "sweep.run"
    sweep = {"run": moved, "toml": moved.with_suffix(".toml")}[what]
    assert command("run", sweep, "--on", "inline", "--no-picture") == 0
    assert rows(moved) == 5
    assert command("verify", moved, "--data") == 0


def test_a_copy_of_a_run_uses_what_lies_beside_the_copy(half_done, tmp_path, capfd):
    copy = tmp_path / "copy" / "sweep.run"
    shutil.copytree(half_done.parent, copy.parent)
    assert command("plan", copy.with_suffix(".toml")) == 0
    half_done.with_name("weight.pt").unlink()
    assert command("run", copy, "--on", "inline", "--no-picture") == 0
    capfd.readouterr()
    assert command("run", half_done, "--on", "inline") == 1
    assert "no checkpoint at" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (-0.5, ""),
        (0, ""),  # one-sided, and meant so
        (-0.05, "x from -0.05 to 1 has at its edge the network's own weights, x = 0: a symmetric"),
        (0.25, "x from 0.25 to 1 leaves out the network's own weights, x = 0: a symmetric range"),
    ],
)
def test_a_range_that_has_the_centre_at_its_edge_or_outside_is_remarked_on(toml, capfd, low, said):
    text = re.sub(r"(\[grid.x\]\nrange = ).*", rf"\1[{low}, 1.0]", toml.read_text())
    toml.write_text(text)
    assert command("plan", toml) == 0
    out = capfd.readouterr().out
    assert said in out and ("own weights" in out) == bool(said)


def test_command_line_over_toml_over_defaults(toml, tmp_path):
    def seed(*more: str) -> int:
        run = tmp_path / f"{len(list(tmp_path.iterdir()))}.run"
        assert command("plan", toml, "--run", run, *more) == 0
        recipe = read_json(run / "plan.json")["directions"]["x"]
        assert isinstance(recipe["seed"], int)
        return recipe["seed"]

    assert seed() == 0
    toml.write_text(f"{SWEEP}[directions]\nseed = 5\n")
    assert seed() == 5
    assert seed("--set", "directions.seed=7") == 7
    assert seed("--set", "directions.x.seed=9") == 9


def test_a_factory_may_be_a_module_beside_the_sweep_file(toml, run):
    toml.with_name("problem.py").rename(toml.with_name("parabola_of_two.py"))
    assert command("run", toml, "--on", "inline", "--set",
                   "problem.factory=parabola_of_two:make") == 0  # fmt: skip
    assert Surface.load(run / "surface.h5").complete


# -- the program -----------------------------------------------------------------------------------

WITHOUT_TORCH = """
import contextlib, io, sys
from pathlib import Path
from lsweep.commands.cli import main

run, out = Path(sys.argv[1]), Path(sys.argv[2])
for words in (
    "--help", "--version", "demo --help", "init --help", "plan --help", "run --help", "work --help",
    "status --help", "merge --help", "verify --help", "measure --help", "render --help",
    "convert --help", f"status {run}", f"status {run} --json", f"merge {run}", f"verify {run}",
    f"measure {run}", f"convert {run} {out}/a.csv", f"convert {run} {out}/a.npz",
    f"render {run} -o {out}/a.png", f"render {run}/surface.h5 -o {out}/a.pdf", f"init {out}/new",
    f"status {out}/nothing", f"plan {out}/nothing", "statsu",
):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words.split())
        except SystemExit as e:
            code = e.code
    expected = {"nothing": 1, "statsu": 2}.get(words.split("/")[-1], 0)
    assert code == expected, (words, code)
    assert "torch" not in sys.modules, words
"""


def test_looking_needs_no_torch(toml, run, tmp_path):
    assert command("run", toml, "--on", "inline", "--no-picture") == 0
    script = [sys.executable, "-c", WITHOUT_TORCH, str(run), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_program_does_the_same(toml, run, tmp_path):
    assert command("run", toml, "--on", "inline") == 0
    words = [sys.executable, "-m", "lsweep", "run", str(toml), "--run", str(tmp_path / "its.run")]
    done = subprocess.run([*words, "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 0
    # No more: no terminal; and progress only where it takes long.
    said = re.sub(r"\d/5 points.*\n", "", done.stderr)
    assert re.fullmatch("pre-flight on .*\n", said)
    ours, its = (Surface.load(r / "surface.h5") for r in (run, tmp_path / "its.run"))
    assert ours["train_loss"].tobytes() == its["train_loss"].tobytes()


def test_the_version(capfd):
    assert command("--version") == 0
    assert re.fullmatch(r"lsweep \d+\.\d+\.\d+\n", capfd.readouterr().out)


def test_workers_that_refuse_say_so_once(toml, capfd):
    words = ["run", toml, "--workers", "2", "--device", "cuda:99"]
    assert command(*words) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if "points, " not in line]
    assert len(said) == 1 and said[0].startswith("lsweep: no device 'cuda:99': ")


# -- progress --------------------------------------------------------------------------------------


LIVE = r"[1-4]/5 points \(\d0%\), [\d.]+/s, 1 worker, (\d+ min )?\d+ s left, minimum [\d.]+"


@pytest.fixture
def looked_at(toml, monkeypatch):
    """The display shows a run before it begins, and again between its points."""
    line, started, said = Display.line, Display.started, []
    toml.with_name("slow").touch()

    def shown(self):
        said.append(line(self))
        if re.fullmatch(LIVE, said[-1]):
            toml.with_name("seen").touch()
        return said[-1]

    def begun(self, workers):
        started(self, workers)
        wait_for(lambda: said)

    monkeypatch.setattr(Display, "line", shown)
    monkeypatch.setattr(Display, "started", begun)


@pytest.mark.usefixtures("looked_at")
def test_progress_is_lines_where_there_is_no_terminal(toml, capfd, monkeypatch):
    monkeypatch.setattr(display, "ELSEWHERE", 0.05)
    assert command("run", toml, "--on", "inline", "--no-picture") == 0
    err = capfd.readouterr().err
    assert "\r" not in err and "\033" not in err and err.endswith("\n")
    assert "0/5 points, 1 worker starting: network, data, pre-flight\n" in err
    assert re.search(r"^pre-flight on .*: train_loss 0 at the centre", err, re.MULTILINE)
    assert re.search(f"^{LIVE}$", err, re.MULTILINE)


def on_terminal(columns: int, *arguments: object) -> tuple[int, str]:
    """Run a command in a child whose stderr is a terminal; return its exit code and that stderr."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pid = fork()
    if pid == 0:
        os.close(master)
        os.dup2(slave, 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        display.ON_TERMINAL = 0.1
        os._exit(main([str(a) for a in arguments]))
    os.close(slave)
    text = b""
    while True:
        try:
            text += os.read(master, 4096)
        except OSError:  # the child has closed its end
            break
    os.close(master)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text.decode()


@pytest.mark.usefixtures("looked_at")
def test_progress_is_one_live_line_on_a_terminal(toml):
    code, text = on_terminal(200, "run", toml, "--on", "inline", "--no-picture")
    assert code == 0
    shown = [line for line in text.split("\r\033[K") if line]
    assert "0/5 points, 1 worker starting: network, data, pre-flight" in shown
    assert any(re.fullmatch(LIVE, line) for line in shown)
    assert [line for line in shown if "\n" in line] == [
        line for line in shown if line.startswith("pre-flight")
    ]
    assert text.endswith("\r\033[K")  # nothing of it stays


@pytest.mark.usefixtures("looked_at")
def test_a_live_line_never_wraps(toml):
    code, text = on_terminal(30, "run", toml, "--on", "inline", "--no-picture")
    assert code == 0
    live = [line for line in text.split("\r\033[K") if re.match(r"\d/5 points", line)]
    assert live and all(len(line) < 30 for line in live)


def tell(folder: RunFolder, name: str, **facts: object) -> None:
    """Write a heartbeat of a worker of this process."""
    usual = {
        "worker": name,
        "host": "here",
        "identity": host_identity(),
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "state": "working",
        "beat": 1,
        "since": time.time(),
        "now": time.time(),
        "points": 0,
        "busy": 0.0,
        "longest": 0.0,
        "minimum": None,
        "message": "",
    }
    folder.workers.mkdir(parents=True, exist_ok=True)
    folder.worker(name).write_bytes(sealed({**usual, **facts}))


def test_the_line_adds_up_what_the_workers_tell(tmp_path):
    folder = RunFolder(tmp_path)
    tell(folder, "earlier", state="done", points=100, busy=1.0, minimum=0.5)
    tell(folder, "helping", points=50, busy=10.0)  # of another launcher: since then 10 more
    shown = Display(folder, total=1000, done=150, stream=None)
    assert shown.line() == "150/1000 points, 1 worker starting: network, data, pre-flight"
    tell(folder, "helping", points=60, busy=12.0, minimum=0.25)
    tell(folder, "a", points=80, busy=4.0, minimum=0.0123456)
    tell(folder, "b", points=20, busy=4.0, minimum=3.0)
    tell(folder, "stopped", state="stopped", points=10, busy=1.0)
    tell(folder, "killed", pid=2**22 + 1, points=30, busy=1.0)  # no such process
    # 150 + 10 + 80 + 20 + 10 + 30; 5/s, 20/s and 5/s by those that are alive
    assert shown.line() == ("300/1000 points (30%), 30/s, 3 workers, 23 s left, minimum 0.01235")
    tell(folder, "a", points=900, busy=4.0)
    assert shown.line().startswith("1000/1000 points (100%), ")  # twice done is not more than all


def test_a_silent_display_writes_nothing(tmp_path, capfd):
    with Display(RunFolder(tmp_path), 10, 0, None) as shown:
        shown.say("something")
    assert capfd.readouterr() == ("", "")


def test_status_says_the_rate_and_the_time_left(half_done, capfd):
    tell(RunFolder(half_done), "alive", points=3, busy=6.0)
    assert command("status", half_done) == 0
    out = capfd.readouterr().out
    assert "workers: 1 stopped, 1 working" in out
    assert "0.5/s, 4 s left" in out and "nobody works" not in out


def test_status_watches_until_it_is_complete(half_done):
    watching = process("status", half_done, "--watch", "--interval", "0.05")
    before = 0
    while before < 2:
        line = watching.stdout.readline()
        assert line, watching.stderr.read()
        before += "3/5 points done" in line
    assert command("run", half_done, "--on", "inline", "--no-picture") == 0
    out, err = watching.communicate()
    assert (watching.returncode, err) == (0, "") and "5/5 points done (100%)" in out
    assert len(committed(RunFolder(half_done)).parts) == 2
