"""Bad input: each mistake of a user is answered in one line, and nothing is lost by it.

The line begins with ``lsweep: ``, says what is wrong and, where a name is nearly right, which one
was meant. The exit code is 1, or 2 where the command line itself is wrong; a traceback is shown
with ``-v`` only; every file is afterwards what it was before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import h5py
import pytest
import torch
from tiny import PROBLEM, SWEEP, contents, lsweep, write_sweep
from torch import nn

from lsweep import Problem, causal_lm, sweep
from lsweep.errors import LsweepError
from lsweep.storage.files import sealed


@pytest.fixture
def refusal(capfd, tmp_path):
    """Run a command that must be refused; return what it says, without the ``lsweep: ``."""

    def refused(*arguments, code=1):
        before = contents(tmp_path)
        capfd.readouterr()
        assert lsweep(*arguments) == code
        out, err = capfd.readouterr()
        assert err.startswith("lsweep: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        assert out == ""
        assert contents(tmp_path) == before
        return err.removeprefix("lsweep: ").rstrip()

    return refused


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete run beside its sweep.toml; copy it before changing it."""
    folder = tmp_path_factory.mktemp("complete")
    assert lsweep("run", write_sweep(folder), "--on", "inline", "--no-picture") == 0
    return folder


@pytest.fixture
def run(complete, tmp_path):
    """A copy of the complete run."""
    shutil.copytree(complete, tmp_path, dirs_exist_ok=True)
    return tmp_path / "sweep.run"


# -- sweep.toml ------------------------------------------------------------------------------------

X = "range = [-1.0, 1.0]\ncount = 3"
WRONG_TOML = [
    # a key that does not exist, at each level
    ("[evaluate]", "[evalute]", "unknown key 'evalute'; did you mean 'evaluate'?"),
    ("factory =", "factroy =", "problem: unknown key 'factroy'; did you mean 'factory'?"),
    ("count = 3", "cuont = 3", "grid.x: unknown key 'cuont'; did you mean 'count'?"),
    ("kind =", "knid =", "directions: unknown key 'knid'; did you mean 'kind'?"),
    ("[evaluate]", "[directions.x]\nsed = 1\n[evaluate]", "unknown key 'sed'; did you mean 'seed'"),
    ("metrics =", "metricks =", "evaluate: unknown key 'metricks'; did you mean 'metrics'?"),
    ("[evaluate]", "[trajectory]\ncheckpoint = []\n[evaluate]", "did you mean 'checkpoints'?"),
    ("[evaluate]", "[directions.y]\nseed = 1\n[evaluate]", "[directions.y] has no [grid.y]"),
    ("[grid.x]", "[grid.w]", "grid has axes ['w']: write [grid.x], then y, then z"),
    ("[grid.x]", "[grid.y]", "grid has axes ['y']: write [grid.x], then y, then z"),
    ("[grid.x]", '[grid."a\\nb"]\n[grid.x]', "grid.a b: range is missing"),
    # something that must be there
    ('factory = "problem.py:make"', "", "problem: factory is missing"),
    ("count = 3", "", "grid.x: count is missing"),
    ("range = [-1.0, 1.0]", "", "grid.x: range is missing"),
    ("[grid.x]\n" + X, "", "[grid.x] is missing; write range = [-1.0, 1.0], count = 51"),
    (SWEEP, "", "[grid.x] is missing"),
    # a value of another type
    ('"problem.py:make"', "3", "factory = 3: expected a string"),
    ("{ width = 3 }", "3", "options: expected a table, got a number"),
    ("count = 3", 'count = "3"', "count = '3': expected a whole number"),
    ("count = 3", "count = 1e999999999", "expected a whole number"),
    ("count = 3", "count = 3.5", "count = 3.5: expected a whole number"),
    ("count = 3", "count = true", "count = True: expected a whole number"),
    ("range = [-1.0, 1.0]", "range = 3", "range = 3: expected a list"),
    ("range = [-1.0, 1.0]", "range = [1]", "range = [1]: expected 2 values"),
    ("range = [-1.0, 1.0]", 'range = ["a", 1]', "range = 'a': expected a number"),
    ("[grid.x]\n" + X, "[grid]\nx = 3", "grid.x: expected a table, got a number"),
    ('["loss", "accuracy"]', '"loss"', "metrics = 'loss': expected a list"),
    ('["loss", "accuracy"]', "[1]", "metrics = 1: expected a string"),
    ("seed = 0", "seed = 0.5", "seed = 0.5: expected a whole number"),
    ("width = 3", "width = nan", "options.width = nan: a plan holds finite numbers"),
    ("width = 3", "width = 2001-01-01", "options.width = datetime.date(2001, 1, 1): a plan holds"),
    # ranges and counts
    ("[-1.0, 1.0]", "[0.5, 0.5]", "range = [0.5, 0.5]: the low end must be below the high end"),
    ("[-1.0, 1.0]", "[1.0, -1.0]", "range = [1.0, -1.0]: the low end must be below the high end"),
    ("[-1.0, 1.0]", "[nan, 1.0]", "range bound NaN: must be within"),
    ("[-1.0, 1.0]", "[-inf, inf]", "range bound -Infinity: must be within"),
    ("[-1.0, 1.0]", "[-1e999999999, 1]", "must be within"),
    ("[-1.0, 1.0]", "[1e-300, 1]", "must be 0 or at least 1e-12 in size"),
    ("[-1.0, 1.0]", "[1.0, 1.0000000000000001]", "offsets are the same float64"),
    ("[-1.0, 1.0]", '"otto"', "range = 'otto': write [low, high] or \"auto\""),
    ("[-1.0, 1.0]", '"auto"', 'grid.x.range = "auto" needs directions of kind "pca"'),
    ("count = 3", "count = 1", "count = 1: must be between 2 and"),
    ("count = 3", "count = 0", "count = 0: must be between 2 and"),
    ("count = 3", "count = -3", "count = -3: must be between 2 and"),
    ("count = 3", "count = 1000000000000", "count = 1000000000000: must be between 2 and"),
    (
        X,
        "range=[0,1]\ncount=20000\n[grid.y]\nrange=[0,1]\ncount=20000",
        "400000000 points: at most",
    ),
    # names of things
    ('"random"', '"randon"', "kind = 'randon'; did you mean 'random'?"),
    ('"filter"', '"filters"', "normalize = 'filters'; did you mean 'filter'?"),
    ('"eval"', '"evla"', "batch_norm = 'evla'; did you mean 'eval'?"),
    ('"float32"', '"float23"', "precision = 'float23'; did you mean 'float32'?"),
    ('["train", "test"]', '["tset"]', "no data split 'tset'; did you mean 'test'?"),
    ('["train", "test"]', "[]", "splits = []: give at least one, each once"),
    ('["loss", "accuracy"]', '["acuracy"]', "no metric 'acuracy'; did you mean 'accuracy'?"),
    ('["loss", "accuracy"]', '["loss", "loss"]', "give at least one, each once"),
    (
        "slices = 1",
        "expected = { train_los = 1 }",
        "expected.train_los; did you mean 'train_loss'?",
    ),
    ("slices = 1", "expected = { train_loss = nan }", "expected.train_loss = nan: must be finite"),
    ("slices = 1", "slices = 5", "slices = 5: the data split 'test' has 4 samples"),
    ("slices = 1", 'samples = "fresh"', "fresh ones at each point are refused, for their noise"),
    ("slices = 1", "samples = 1", "samples = 1: must be at least 2, or there is no standard error"),
    ("slices = 1", "samples = 2.5", "samples = 2.5: expected a whole number"),
    (
        "slices = 1",
        "samples = 3\nslices = 4",
        "slices = 4: the data split 'train' has 3 samples",
    ),
    ("slices = 1", "slices = 0", "slices = 0: must be between 1 and"),
    ("slices = 1", "batch_size = 0", "batch_size = 0: must be at least 1"),
    ("seed = 0", "seed = -1", "seed = -1: must be between 0 and"),
    ("seed = 0", 'parameters = ["3.*"]', "leaves nothing to move; names are like 0.weight"),
    ("seed = 0", "parameters = []", "parameters = []: give at least one pattern"),
    # files that are not there
    ('"random"', '"to"', 'kind = "to" needs checkpoint'),
    (
        '"random"\nseed = 0\nnormalize = "filter"',
        '"to"\ncheckpoint = "no.pt"',
        "no checkpoint at ",
    ),
    ('"random"', '"pca"\ncheckpoints = ["no*.pt"]', "no checkpoint matches 'no*.pt' in "),
    ('"random"', '"file"\nfile = "no.h5"', "no file "),
    ("[evaluate]", '[trajectory]\ncheckpoints = ["no.pt"]\n[evaluate]', "no checkpoint matches"),
    ("[evaluate]", "[trajectory]\ncheckpoints = []\n[evaluate]", "checkpoints = []: give at least"),
    ("[evaluate]", "[refine]\ntolerance = 0\n[evaluate]", "tolerance = 0: a share of the loss's"),
    ("[evaluate]", "[refine]\ntolerance = 1\n[evaluate]", "from 1e-06 to below 1, such as 0.01"),
    ("[evaluate]", "[refine]\ntolerance = nan\n[evaluate]", "tolerance = nan: a share of the"),
    ("[evaluate]", "[refine]\n[evaluate]", "refine: tolerance is missing"),
    ("[evaluate]", "[refine]\ntolerances = 1\n[evaluate]", "did you mean 'tolerance'?"),
    # what is not there to be rescaled
    ("seed = 0", 'gauge = "equi"', "no hidden units of this Sequential can be rescaled one by"),
    # no TOML at all
    ("[problem]", "[problem", "is not valid TOML: "),
    ("count = 3", "count = 3\ncount = 3", "is not valid TOML: "),
]


@pytest.mark.parametrize(("right", "wrong", "words"), WRONG_TOML, ids=[w for *_, w in WRONG_TOML])
def test_a_wrong_sweep_file_is_refused(refusal, tmp_path, right, wrong, words):
    assert SWEEP.count(right) == 1
    toml = write_sweep(tmp_path, SWEEP.replace(right, wrong))
    assert words in refusal("plan", toml)


def test_the_sweep_file_that_those_were_made_from_is_right(tmp_path):
    assert lsweep("plan", write_sweep(tmp_path)) == 0


def test_a_sweep_file_that_cannot_be_read_is_refused(refusal, tmp_path):
    assert "no.toml: No such file" in refusal("plan", tmp_path / "no.toml")
    (tmp_path / "latin.toml").write_bytes("# \xe4\n".encode("latin-1"))
    assert "latin.toml: it is not UTF-8 text" in refusal("plan", tmp_path / "latin.toml")


OVERRIDES = [
    ("nonsense", "--set 'nonsense': write KEY=VALUE, such as grid.x.count=11"),
    ("=3", "--set '=3': write KEY=VALUE"),
    ("", "--set '': write KEY=VALUE"),
    ("grid.x.count=", "count = '': expected a whole number"),
    ("grid.x.count=eleven", "count = 'eleven': expected a whole number"),
    ("grid.x.cuont=3", "grid.x: unknown key 'cuont'; did you mean 'count'?"),
    ("grid.x=3", "grid.x: expected a table, got a number"),
    ("grid.x.count.more=3", "count is not a table"),
    ("evaluate.metrics=loss", "metrics = 'loss': expected a list"),
    ("directions.kind=randon", "kind = 'randon'; did you mean 'random'?"),
]


@pytest.mark.parametrize(("override", "words"), OVERRIDES)
def test_a_wrong_override_is_refused(refusal, tmp_path, override, words):
    assert words in refusal("plan", write_sweep(tmp_path), "--set", override)


# -- the factory -----------------------------------------------------------------------------------

FACTORIES = [
    ("problem.py:mkae", "problem.py has no function 'mkae'; did you mean 'make'?"),
    ("problem.py:WIDTH", "problem.py has no function 'WIDTH'"),
    ("problem.py", "factory = 'problem.py': write FILE.py:function or package.module:function"),
    ("problem.py:", "factory = 'problem.py:': write FILE.py:function"),
    ("nowhere.py:make", "no factory file at "),
    ("nowhere.net:make", "cannot import the factory's module nowhere.net: ModuleNotFoundError"),
    ("problem.py:raises", "raises raised RuntimeError: no network (problem.py:"),
    ("problem.py:stops", "stops raised SystemExit: 2 (problem.py:"),
    ("problem.py:network", "returned an object of type Linear, not an lsweep.Problem"),
    ("problem.py:nothing", "returned an object of type NoneType, not an lsweep.Problem"),
    ("problem.py:narrow", "problem.options: problem.py:narrow takes no 'width'"),
    ("problem.py:wide", "problem.py:wide takes no 'width'; did you mean 'widths'?"),
    ("problem.py:deep", "problem.py:deep needs depth: write options = { depth = … }"),
    ("problem.py:empty", "data['train'] is empty"),
    ("problem.py:no_batches", "data['train'] yields no batch"),
    ("problem.py:no_splits", "data must be a dict of splits"),
    ("problem.py:used_up", "data['train'] is an iterator, which can be read once"),
    ("problem.py:no_loss", "give a Problem either loss=… (and metrics=…) or forward=…"),
    ("broken.py:make", "cannot import the factory broken.py: SyntaxError: "),
    ("unready.py:make", "cannot import the factory unready.py: ModuleNotFoundError: No module "),
    ("script.py:make", "cannot import the factory script.py: SystemExit: 1"),
]
MORE = """
WIDTH = 3
X = torch.zeros(4, 2)


def raises(width):
    raise RuntimeError("no\\nnetwork")


def stops(width):
    raise SystemExit(2)


def network(width):
    return nn.Linear(2, 2)


def nothing(width):
    pass


def narrow():
    pass


def wide(widths=3):
    pass


def deep(depth, **more):
    pass


def empty(width):
    return lsweep.Problem(nn.Linear(2, 2), {"train": (X[:0], X[:0])}, loss=nn.MSELoss())


def no_batches(width):
    return lsweep.Problem(nn.Linear(2, 2), {"train": []}, loss=nn.MSELoss())


def no_splits(width):
    return lsweep.Problem(nn.Linear(2, 2), (X, X), loss=nn.MSELoss())


def used_up(width):
    return lsweep.Problem(nn.Linear(2, 2), {"train": iter([(X, X)])}, loss=nn.MSELoss())


def no_loss(width):
    return lsweep.Problem(nn.Linear(2, 2), {"train": (X, X)})
"""


@pytest.mark.parametrize(("factory", "words"), FACTORIES)
def test_a_wrong_factory_is_refused(refusal, tmp_path, factory, words):
    sweep = SWEEP.replace("problem.py:make", factory).replace('["train", "test"]', '["train"]')
    toml = write_sweep(tmp_path, sweep.replace('["loss", "accuracy"]', '["loss"]'), PROBLEM + MORE)
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "unready.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(1)\n")
    assert words in refusal("plan", toml)


def test_the_line_named_is_the_users_even_in_a_folder_called_lsweep(refusal, tmp_path):
    toml = write_sweep(tmp_path / "lsweep-runs", problem="def make(width):\n    1 / 0\n")
    assert refusal("plan", toml).endswith("ZeroDivisionError: division by zero (problem.py:2)")


# -- checkpoints -----------------------------------------------------------------------------------


def _other_width(path):
    torch.save(nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).state_dict(), path)


def _no_tensors(path):
    torch.save({"epoch": 3}, path)


def _a_list(path):
    torch.save([torch.zeros(2)], path)


def _whole_model(path):
    torch.save(nn.Linear(2, 2), path)


def _text(path):
    path.write_text("these are not weights")


def _nothing(path):
    path.write_bytes(b"")


def _truncated(path):
    _other_width(path)
    path.write_bytes(path.read_bytes()[:-100])


def _absent(path):
    pass


CHECKPOINTS = [
    (_other_width, "0.weight", "0.weight has shape (5, 2), the network's is (3, 2)"),
    (_no_tensors, "holds no tensors; its keys: epoch", "holds no tensors; its keys: epoch"),
    (_a_list, "holds a list, not a state dict", "holds a list, not a state dict"),
    (_whole_model, "it is damaged, or holds more than tensors", "alone are read; save model.st"),
    (_text, "cannot read checkpoint", "cannot read checkpoint"),
    (_nothing, "cannot read checkpoint", "cannot read checkpoint"),
    (_truncated, "cannot read checkpoint", "cannot read checkpoint"),
    (_absent, "no checkpoint at", "no checkpoint at"),
]


@pytest.mark.parametrize(("write", "at_the_origin", "at_the_other"), CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(refusal, tmp_path, write, at_the_origin, at_the_other):
    write(tmp_path / "net.pt")
    toml = write_sweep(tmp_path)
    assert at_the_origin in refusal("plan", toml, "--set", "problem.options.checkpoint=net.pt")
    to = [
        "--set",
        "directions.kind=to",
        "--set",
        "directions.checkpoint=net.pt",
        "--set",
        "directions.normalize=none",
    ]
    assert at_the_other in refusal("plan", toml, *to)


# -- the command line ------------------------------------------------------------------------------

USAGE = [
    (["statsu", "RUN"], "no command 'statsu'; did you mean 'status'?"),
    (["zzz"], "no command 'zzz'; one of: demo, init, plan, run"),
    (["run"], "the following arguments are required: SWEEP; see 'lsweep run --help'"),
    (["status"], "the following arguments are required: RUN"),
    (["render", "RUN"], "the following arguments are required: -o/--output"),
    (["render", "-o", "a.png"], "the following arguments are required: RUN|FILE"),
    (["convert", "RUN"], "the following arguments are required: OUT"),
    (["run", "TOML", "--wrokers", "2"], "unrecognized arguments: --wrokers 2; see"),
    (["run", "TOML", "--set", "a=1", "b=2"], "b=2 (each KEY=VALUE takes a --set of its own)"),
    (["run", "TOML", "--set", "a.b=1", "--set", "a.b = 2"], "--set a.b=1 and --set a.b = 2: give"),
    (["run", "TOML", "--on", "cloud"], "argument --on: invalid choice: 'cloud'"),
    (["run", "TOML", "--workers", "two"], "argument --workers: invalid number value: 'two'"),
    (["run", "TOML", "--workers", "0"], "argument --workers: 0 is less than 1"),
    (["run", "TOML", "--threads", "-1"], "argument --threads: -1 is less than 0"),
    (["plan", "TOML", "--unit-points", "0"], "argument --unit-points: 0 is less than 1"),
    (["work", "RUN", "--of", "0"], "argument --of: 0 is less than 1"),
    (["work", "RUN", "--beat", "0"], "argument --beat: 0 is not between"),
    (["status", "RUN", "--watch", "--interval", "nan"], "argument --interval: nan is not between"),
    (["render", "RUN", "-o", "a.png", "--dpi", "0"], "argument --dpi: 0 is less than 1"),
    (["render", "RUN", "-o", "a.png", "--vmin", "low"], "argument --vmin: invalid float value"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=[" ".join(a) for a, _ in USAGE])
def test_a_wrong_command_line_is_refused_with_exit_2(refusal, tmp_path, arguments, words):
    names = {"TOML": write_sweep(tmp_path), "RUN": tmp_path / "sweep.run"}
    assert words in refusal(*(names.get(a, a) for a in arguments), code=2)


def test_no_command_at_all_shows_the_commands_and_exits_2(capsys):
    assert lsweep() == 2
    out, err = capsys.readouterr()
    assert "plan if needed, evaluate what is missing, merge, draw" in out and err == ""


ANYWHERE = [
    ["plan", "FOLDER"],
    ["run", "FOLDER"],
    ["work", "FOLDER"],
    ["status", "FOLDER"],
    ["merge", "FOLDER"],
    ["merge", "FOLDER", "--partial"],
    ["verify", "FOLDER"],
    ["measure", "FOLDER"],
    ["render", "FOLDER", "-o", "OUT"],
    ["convert", "FOLDER", "OUT"],
]


@pytest.mark.parametrize("arguments", ANYWHERE, ids=lambda a: " ".join(a))
def test_a_folder_that_is_no_run_is_refused(refusal, tmp_path, arguments):
    write_sweep(tmp_path / "folder")
    names = {"FOLDER": tmp_path / "folder", "OUT": tmp_path / "out.png"}
    if arguments[0] == "convert":
        names["OUT"] = tmp_path / "out.csv"
    message = refusal(*(names.get(a, a) for a in arguments))
    assert "not a run" in message and str(tmp_path / "folder") in message
    missing = [str(names.get(a, a)).replace("folder", "nowhere") for a in arguments]
    assert "nowhere" in refusal(*missing)


# -- runs and surfaces -----------------------------------------------------------------------------


def test_another_plan_on_the_same_run_is_refused_with_the_field_named(refusal, run):
    toml = run.with_name("sweep.toml")
    for override, field in [
        ("problem.options.width=4", "problem.options.width is 3 there and 4 now"),
        ("directions.seed=1", "directions.x.seed is 0 there and 1 now"),
        ('evaluate.metrics=["loss"]', "evaluate.metrics is "),
        ('evaluate.precision="float64"', "evaluate.precision is 'float32' there and 'float64' now"),
        ("evaluate.batch_size=4", "evaluate.batch_size is 'auto' there and 4 now"),
    ]:
        for command in ("plan", "run"):
            message = refusal(command, toml, "--set", override)
            assert f"holds another plan: {field}" in message and "--run" in message
    text = run.with_name("problem.py").read_text()
    run.with_name("problem.py").write_text(text.replace("nn.Tanh", "nn.ReLU"))
    message = refusal("run", toml)
    assert "problem.code, problem.py was edited since" in message and "--kept-code" in message


def test_an_edited_factory_file_leaves_the_run_its_own_copy(refusal, capfd, run):
    toml, problem = run.with_name("sweep.toml"), run.with_name("problem.py")
    text = problem.read_text()
    problem.write_text(text.replace("randn(8, 2", "randn(8, 2) + torch.randn(8, 2"))
    finer = ["run", toml, "--set", "grid.x.count=5", "--on", "inline", "--no-picture"]
    assert "problem.code" in refusal(*finer)
    assert lsweep(*finer, "--kept-code") == 0
    assert "2 of 5 points to evaluate" in capfd.readouterr().out  # three are reused
    assert lsweep("run", toml, *finer[4:], "--kept-code") == 0
    assert "3 of 5 computed points are on this grid" in capfd.readouterr().out
    own = run / "problem.py"
    own.write_text(text + "# edited, too\n")
    assert f"{own} is not the factory file that was planned" in refusal(*finer, "--kept-code")
    elsewhere = run.with_name("new.run")
    assert "is not planned yet" in refusal(*finer, "--kept-code", "--run", elsewhere)


def test_a_run_cannot_be_changed_by_set(refusal, run):
    assert "is a run, frozen" in refusal("run", run, "--set", "grid.x.count=5")


def test_a_factory_that_was_edited_in_the_run_is_refused(refusal, run):
    factory = run / "problem.py"
    factory.write_text(factory.read_text() + "# edited\n")
    shutil.rmtree(run / "parts")
    assert "is not the factory file that was planned" in refusal("work", run)


def test_what_a_newer_lsweep_wrote_is_refused(refusal, run):
    plan = json.loads((run / "plan.json").read_text())
    del plan["sha256"]
    (run / "plan.json").write_bytes(sealed({**plan, "version": 2}))
    with h5py.File(run / "surface.h5", "r+") as f:
        f.attrs["lsweep_schema"] = 2
    for command in ("plan", "run", "work", "status", "merge", "measure"):
        message = refusal(command, run)
        assert "version 2" in message and "update lsweep" in message
    surface = run / "surface.h5"
    for arguments in (["measure", surface], ["render", surface, "-o", run / "a.png"]):
        message = refusal(*arguments)
        assert "schema 2" in message and "update lsweep" in message


@pytest.mark.parametrize("size", [0, 1, 100, 2000, -1])
def test_a_truncated_surface_is_refused(refusal, run, size):
    surface = run / "surface.h5"
    surface.write_bytes(surface.read_bytes()[:size])
    for arguments in (
        ["measure", surface],
        ["render", surface, "-o", run / "a.png"],
        ["convert", surface, run / "a.csv"],
    ):
        assert "damaged" in refusal(*arguments)


def test_a_truncated_plan_or_round_is_refused(refusal, run):
    for file in (run / "plan.json", run / "rounds" / "0000.json"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        for command in ("status", "merge", "work", "measure"):
            assert f"{file} is damaged" in refusal(command, run)
        file.write_bytes(whole)


PICTURES = [
    (["-o", "a.gif"], "cannot draw a.gif: the suffix is one of .png, .pdf, .svg"),
    (["-o", "a"], "the suffix is one of .png, .pdf, .svg"),
    (["-o", "a.png", "--kind", "contuor"], "kind = 'contuor'; did you mean 'contour'?"),
    (["-o", "a.png", "--kind", "contour"], "kind = 'contour' needs a surface with two axes"),
    (["-o", "a.png", "--metric", "train_los"], "did you mean 'train_loss'?"),
    (["-o", "a.png", "--vmin", "3", "--vmax", "1"], "vmin = 3 is not below vmax = 1"),
    (["-o", "a.png", "--vmin", "nan"], "vmin = nan: needs to be finite"),
    (["-o", "no/where/a.png"], "cannot write"),
]


@pytest.mark.parametrize(("arguments", "words"), PICTURES, ids=[w for _, w in PICTURES])
def test_a_wrong_picture_is_refused(refusal, run, monkeypatch, arguments, words):
    monkeypatch.chdir(run)
    assert words in refusal("render", run, *arguments)


def test_a_wrong_conversion_or_measure_is_refused(refusal, run):
    surface = run / "surface.h5"
    assert "suffix must be one of .h5" in refusal("convert", surface, run / "a.xyz")
    assert "is the source" in refusal("convert", surface, surface)
    assert "are for .vts and .vtp" in refusal("convert", surface, run / "a.csv", "--log")
    assert "damaged or not HDF5" in refusal("convert", run / "sweep.toml", run / "a.csv")
    assert "did you mean 'train_loss'?" in refusal("measure", run, "--metric", "train_los")


def test_a_device_that_is_not_there_is_refused(refusal, capfd, tmp_path):
    toml = write_sweep(tmp_path)
    assert lsweep("plan", toml) == 0
    run = tmp_path / "sweep.run"
    assert "no device 'gpu': use cpu, cuda" in refusal("work", run, "--device", "gpu")
    assert "no device 'gpu'" in refusal("run", toml, "--device", "gpu", "--run", tmp_path / "a.run")
    assert "no device 'cuda:99': torch sees" in refusal("work", run, "--device", "cuda:99")
    assert "must be from 0 to 1 (--of)" in refusal("work", run, "--index", "2", "--of", "2")
    assert "starts no processes: leave out --workers" in refusal(
        "run", run, "--on", "mpi", "--workers", 4
    )


# -- folders that cannot be written ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["file/below", "/proc/nowhere", "file"])
def test_a_folder_that_cannot_be_written_is_refused(refusal, run, tmp_path, where):
    (tmp_path / "file").write_text("")
    target = tmp_path / where  # an absolute one stays as it is
    refused = {
        "plan": refusal("plan", tmp_path / "sweep.toml", "--run", target),
        "init": refusal("init", target),
        "render": refusal("render", run, "-o", target / "a.png"),
        "convert": refusal("convert", run, target / "a.csv"),
        "demo": refusal("demo", target),
    }
    for message in refused.values():
        assert message.startswith("cannot write") and str(target) in message


def test_a_picture_folder_that_is_a_file_is_refused(refusal, capfd, run):
    (run / "figures").write_text("")
    assert lsweep("run", run, "--on", "inline") == 1
    err = capfd.readouterr().err
    assert err.startswith("lsweep: ") and err.count("\n") == 1 and "figures" in err


@pytest.mark.parametrize("there", ["sweep.toml", "problem.py"])
def test_init_overwrites_nothing(refusal, tmp_path, there):
    (tmp_path / there).write_text("mine")
    assert f"{there} exists" in refusal("init", tmp_path)
    assert (tmp_path / there).read_text() == "mine"


# -- in Python -------------------------------------------------------------------------------------


def test_wrong_keywords_of_sweep_are_refused(tmp_path):
    x = torch.zeros(4, 2)
    problem = Problem(nn.Linear(2, 2), {"train": (x, x)}, loss=nn.MSELoss())
    for given, grid, words in (
        ("p", {"x": (-1, 1, 5)}, "problem is 'p': make an lsweep.Problem of"),
        (nn.Linear(2, 2), {"x": (-1, 1, 5)}, "problem is an object of type Linear: make an"),
        (problem, {"x": (-1, 1)}, "x = (-1, 1): x is (low, high, count), such as"),
        (problem, {"x": (0, 1, 3), "y": 5}, "y = 5: y is (low, high, count)"),
        (
            problem,
            {"x": (0, 1, 3), "tolerance": 0.1},
            "sweep() has no argument 'tolerance': that is",
        ),
        (
            problem,
            {"x": (0, 1, 3), "kind": "to"},
            "sweep() has no argument 'kind': it belongs into d",
        ),
        (
            problem,
            {
                "x": (0, 1, 3),
                "directions": {"kind": "to", "checkpoint": nn.Sequential(nn.Tanh())},
            },
            "sweep(): directions.x: checkpoint = (an object of type Sequential): expected a string",
        ),
        (
            problem,
            {"x": (0, 1, 3), "direction": 1},
            "sweep() has no argument 'direction'; did you me",
        ),
    ):
        with pytest.raises(LsweepError) as refused:
            sweep(given, **grid)
        assert str(refused.value).startswith(words)
    sweep(problem, x=(0, 1, 2), y=(0, 1, 2), run=tmp_path / "a.run")
    with pytest.raises(LsweepError, match=r"it is a plane \(x, y\), now a line \(x\) is asked"):
        sweep(problem, x=(0, 1, 2), run=tmp_path / "a.run")


ONES = torch.ones(4, 2)


def regression(output, loss=None, forward=None, **metrics):
    x = torch.arange(8.0).reshape(4, 2)
    loss = loss or (None if forward else nn.MSELoss())
    given = {"loss": loss, "forward": forward, "metrics": metrics}
    return Problem(nn.Linear(2, output), {"train": (x, x[:, 0])}, **given)


def named(forward=None, **data):
    loss = None if forward else nn.MSELoss()
    return Problem(nn.Linear(2, 2), {"train": data}, loss=loss, forward=forward)


class Speaking(nn.Linear):
    """Logits beside other things, as Hugging Face returns them."""

    def __init__(self):
        super().__init__(2, 2)

    def forward(self, x):
        return {"logits": super().forward(x), "loss": x.mean()}


def spoiled():
    problem = regression(1)
    problem.model.weight.data[0, 1] = torch.nan
    return problem


def derived(model, batch):
    slope = torch.autograd.grad(model(batch[0]).sum(), model.weight)[0]
    return {"loss": slope.expand(4, 2).sum(1)}


def narrower():
    return Problem(nn.Linear(3, 2), regression(1).data, loss=nn.MSELoss())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (spoiled, "the network's weight has 1 NaN (of 2 numbers): its checkpoint is broken"),
        (lambda: regression(1, "ce"), "loss = 'ce' cannot be called: give a function or a module"),
        (lambda: regression(1), "loss: outputs (4, 1) and targets (4,) would be broadcast"),
        (lambda: regression(1, lambda o, t: (o - t) ** 2), "would be broadcast, each compared"),
        (
            lambda: regression(1, lambda o, t: ((o - t) ** 2).mean()),  # a mean shows no shape
            "loss: outputs (4, 1) and targets (4,) would be broadcast",
        ),
        (
            lambda: regression(1, lambda o, t: ((o[:, 0] - t) ** 2).sum()),
            "twice as large, hence a sum and no mean over samples: use mean(), or return",
        ),
        (
            lambda: regression(1, nn.MSELoss),
            "loss = MSELoss is a class: give what it makes, MSELoss(…)",
        ),
        (
            lambda: regression(2, forward=lambda m, b: m(b[0]).mean()),
            "forward returned a Tensor, not {metric: values}, such as",
        ),
        (
            lambda: Problem(nn.Linear(1, 1), {"train": [[1.0, 2.0], [3.0]]}, loss=nn.MSELoss()),
            "data['train']: a batch of type list holds no tensor: give tensors (x, y), a Dataset,",
        ),
        (
            lambda: Problem(nn.Linear(2, 2), {"train": ONES}, loss=nn.MSELoss()),
            "a batch of type Tensor is neither (input, target) nor a dict with a target, which the "
            "loss compares the network's output with: give (x, y), (x, x) for an autoencoder",
        ),
        (
            lambda: regression(1, lambda o, t: (o[:, 0] - t) ** 2, mae=lambda o, t: (o - t).abs()),
            "mae: outputs (4, 1) and targets (4,) would be broadcast",
        ),
        (
            lambda: regression(1, forward=lambda m, b: {"loss": (m(b[0]) - b[1]) ** 2}),
            "forward: loss of 4 samples has values (4, 4), each sample compared with all",
        ),
        (
            lambda: named(x=ONES, labels=ONES),
            "batch is x (4, 2) float32, labels (4, 2) float32, the call loss(model(x=…), labels): "
            "give the arguments of the network's forward(input) under their names, or forward=…",
        ),
        (
            lambda: named(input=ONES, answer=ONES),
            "keys input, answer has no target: the loss compares with labels, label, targets, "
            "target or y, the network takes the other keys as its arguments; name one so, or give",
        ),
        (
            lambda: Problem(nn.Linear(2, 2), {"train": (ONES, ONES, ONES)}, loss=nn.MSELoss()),
            "the call loss(model(batch[0], batch[1]), batch[2]): give the arguments of the "
            "network's forward(input), or forward=…",
        ),
        (
            lambda: Problem(Speaking(), {"train": (ONES, ONES)}, loss=lambda o, t: o.loss),
            "where the loss takes the logits (4, 2) float32 alone: for more of the output give fo",
        ),
        (
            lambda: Problem(nn.LSTM(2, 2), {"train": (ONES, ONES)}, loss=nn.MSELoss()),
            "where the network returns a tuple: a loss of torch takes a tensor; return one, or",
        ),
        (
            lambda: named(forward=causal_lm, labels=ONES),
            "with keys labels has no input_ids, which causal_lm predicts",
        ),
        (
            lambda: Problem(nn.LazyLinear(1), regression(1).data, nn.MSELoss()),
            "weight has no shape ye",
        ),
        (
            lambda: Problem(
                nn.Sequential(nn.Tanh(), torch.jit.ScriptModule()), {"a": 1}, nn.MSELoss()
            ),
            "1 is compiled TorchScript",
        ),
        (
            lambda: Problem(
                torch.export.export(nn.Tanh(), (torch.ones(2, 1),)).module(),
                {"a": 1},
                nn.MSELoss(),
            ),
            "model comes from torch.export, which fixes its mode",
        ),
        (
            lambda: regression(1, loss_se=lambda o, t: t[:, None] * 1.0),
            "train_loss_se is what the surface calls something else: rename it",
        ),
        (
            lambda: Problem(torch.jit.ScriptModule(), {"a": 1}, nn.MSELoss()),
            "compiled TorchScript",
        ),
        (
            lambda: Problem(nn.Tanh(), {"a": 1}, nn.MSELoss(), [len]),
            "metrics must be a dict, such as",
        ),
        (
            lambda: Problem(nn.Linear(2, 1), regression(1).data, forward=derived),
            "Problem(…, grad=True)",
        ),
        (
            narrower,
            "shapes cannot be multiplied (4x2 and 3x2); in train, the batch is (4, 2) float32,",
        ),
    ],
)
def test_a_wrong_problem_is_refused_in_one_line(make, words):
    with pytest.raises(LsweepError) as refused:
        sweep(make(), x=(-1, 1, 3))
    assert words in str(refused.value) and "\n" not in str(refused.value)


# -- tracebacks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
def test_verbose_shows_the_traceback_and_the_line(capsys, tmp_path, place):
    words = ["status", tmp_path / "no.run"]
    code = lsweep("-v", *words) if place == "before" else lsweep(*words, "-v")
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("Traceback (most recent call last):")
    assert (
        err.splitlines()[-1] == f"lsweep: {tmp_path / 'no.run'} is not a run: it has no plan.json"
    )


def test_verbose_shows_where_a_factory_raised(capsys, tmp_path):
    toml = write_sweep(tmp_path, problem="def make(width):\n    1 / 0\n")
    assert lsweep("plan", toml, "-v") == 1
    err = capsys.readouterr().err
    assert 'problem.py", line 2, in make' in err and "ZeroDivisionError" in err


def test_the_program_itself_answers_so(tmp_path):
    words = [sys.executable, "-m", "lsweep", "status", str(tmp_path / "no.run")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"lsweep: {tmp_path / 'no.run'} is not a run: it has no plan.json\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    toml = write_sweep(tmp_path)
    for words in ("--help", "status --help", f"plan {toml}"):
        reading, writing = os.pipe()
        os.close(reading)  # nobody reads, from the first letter on
        run = [sys.executable, "-m", "lsweep", *words.split()]
        pipes = {"stdout": writing, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run(run, **pipes, env={**os.environ, "PYTHONUNBUFFERED": ""})
        os.close(writing)
        assert (done.returncode, done.stderr) == (0, "")
