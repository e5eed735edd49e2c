"""Studies: one sweep.toml is a run of each origin and seed; several runs are compared as one.

The networks are closed forms: two weights (3, 4), one filter of norm 5, and the loss
curvature/2·‖θ - θ₀‖² + shift, so that along a filter-normalised direction, of norm 5, it is
25/2·curvature·x² + shift, whatever the direction is. Test data lie a known gap higher.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from cases import committed
from tiny import contents
from tiny import lsweep as command

import lsweep
from lsweep.comparison.comparing import Question, compare
from lsweep.comparison.siblings import RunMeasures, networks
from lsweep.comparison.sidebyside import lines
from lsweep.errors import LsweepError
from lsweep.outcomes.measured import Measured
from lsweep.pictures.scatter import study_figure
from lsweep.plans.origins import Study, label
from lsweep.plans.plan import Plan
from lsweep.plans.study import members
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.penalty import with_l2
from lsweep.surfaces.surface import Surface

BOWL = """\
import pathlib
import torch
from torch import nn
import lsweep

START = torch.tensor([[3.0, 4.0]])


def make(wd=0.0, depth=1, scale=1.0, checkpoint=None):
    gap, curvature = 0.1 * depth + 0.1 * wd, depth + (wd if depth > 2 else -wd)
    if (pathlib.Path(__file__).parent / f"broken-{depth}").exists():
        raise ValueError(f"no network of depth {depth}")
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(scale * START)

    def forward(model, batch):
        (shift,) = batch
        away = (model.weight - scale * START).square().sum()
        return {"loss": curvature / 2 * away + shift}

    forward.metrics = ("loss",)
    data = {"train": (torch.full((2,), 0.5),), "test": (torch.full((2,), 0.5 + gap),)}
    return lsweep.Problem(net, data, forward=forward)
"""
SWEEP = """\
[problem]
factory = "problem.py:make"
[grid.x]
range = [-1.0, 1.0]
count = 5
[evaluate]
splits = ["train", "test"]
precision = "float64"
[study]
"""
# Curvature orders the gap along depth; along wd in one half of the depths, against it in the other.
NETWORKS = [{"depth": d, "wd": w} for d in (1, 2, 3, 4) for w in (0.0, 0.25)]
GAPS = [0.1 * n["depth"] + 0.1 * n["wd"] for n in NETWORKS]
CURVATURES = [n["depth"] + (n["wd"] if n["depth"] > 2 else -n["wd"]) for n in NETWORKS]


def inline(table: dict) -> str:
    return "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in table.items()) + "}"


def write(folder: Path, study: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problem.py").write_text(BOWL)
    toml = folder / "nets.toml"
    toml.write_text(SWEEP + study + "\n")
    return toml


def origins(tables: list[dict], seeds: str = "") -> str:
    return f"origins = [{', '.join(map(inline, tables))}]\n{seeds}"


def run(toml: Path, *more: object) -> int:
    return command("run", toml, "--on", "inline", "--no-picture", *more)


# -- names -----------------------------------------------------------------------------------------


def test_what_a_sibling_is_called_depends_on_its_origin_alone():
    small = Study(("a.pt",), (0,))
    grown = Study(({"checkpoint": "b.pt", "wd": 0.1}, "a.pt", "nets/a.pt"), (1, 0))
    names = [s.name for s in grown.siblings()]
    assert [s.name for s in small.siblings()] == ["a-s0"]
    assert names == ["b,wd=0.1-s1", "b,wd=0.1-s0", "a-s1", "a-s0", "nets-a-s1", "nets-a-s0"]
    (first, *_) = grown.siblings()
    assert first.overrides == ('problem.options.checkpoint="b.pt"', "problem.options.wd=0.1",
                               "directions.seed=1")  # fmt: skip
    assert [s.name for s in Study((), (3,)).siblings()] == ["s3"]
    assert [s.name for s in small.siblings(7)] == ["a-s0"]
    assert [s.name for s in Study(("a.pt",)).siblings(7)] == ["a-s7"]  # the directions' own
    long = label({"note": "x" * 300})
    assert len(long) < 120 and long != label({"note": "x" * 301})


def test_options_of_an_origin_arrive_as_they_are(tmp_path):
    odd = {"checkpoint": "ä 'b\".pt", "wd": 1e-05, "list": [1, 2.5], "deep": {"k v": True}}
    toml = write(tmp_path, f"origins = [{inline({k: odd[k] for k in ('checkpoint', 'wd')})}]")
    text = toml.read_text().replace("}]", ', list = [1, 2.5], deep = {"k v" = true}}]')
    toml.write_text(text)
    (member,) = members(toml) or []
    from lsweep.plans.settings import Settings

    settings = Settings.from_file(toml, member.overrides)
    assert settings.problem.options == odd


@pytest.mark.parametrize(
    ("study", "words"),
    [
        ("origins = []", r"write origins = \[…\] or seeds"),
        ('origins = ["a.pt", "a.pt"]', r"origins\[0\] and origins\[1\] would both be called a"),
        ('origins = ["a.pt", "./a.pth"]', "would both be called a"),
        ("origins = [{}]", r"origins\[0\] is empty"),
        ('origins = [{"a.b" = 1}]', "'a.b' is no name of an option"),
        ("origins = [{wd = inf}]", r"origins\[0\].wd = inf: a plan holds finite"),
        ("origins = [1]", "origins = 1: expected a string"),
        ("seeds = [1, 1]", r"seeds = \[1, 1\]: give each once"),
        ("seeds = [-1]", "seeds: -1 must be between 0"),
        ("seed = [1]", "unknown key 'seed'; did you mean 'seeds'"),
        ("seeds = [1]\n[directions.x]\nseed = 3", "directions.x.seed: .*study.* leave it out"),
        ('seeds = [1]\n[directions]\nkind = "to"\ncheckpoint = "b.pt"', "no direction here is"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, capfd, study, words):
    toml = write(tmp_path, study)
    assert command("plan", toml) == 1
    err = capfd.readouterr().err
    with pytest.raises(LsweepError, match=words):
        raise LsweepError(err)
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "nets.study").exists()


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study of eight networks, its runs done; its TOML."""
    toml = write(tmp_path_factory.mktemp("study"), origins(NETWORKS, "seeds = [0]"))
    assert run(toml) == 0
    return toml


def test_a_study_grows_and_what_was_there_stays(tmp_path, capfd):
    toml = write(tmp_path, origins(NETWORKS[:1], "seeds = [0]"))
    assert run(toml) == 0
    study = tmp_path / "nets.study"
    (first,) = study.iterdir()
    before = contents(first)
    toml.write_text(SWEEP + origins([NETWORKS[0], {**NETWORKS[1], "scale": 2.0}], "seeds = [0, 1]"))
    (tmp_path / "broken-1").touch()
    assert run(toml) == 1  # all have depth 1
    err = capfd.readouterr().err
    assert err.count("no network of depth 1") == 4 and "4 of 4 runs did not end well" in err
    (tmp_path / "broken-1").unlink()
    assert run(toml) == 0
    after = contents(first)
    assert {k: after[k] for k in before if "figures" not in k} == before
    runs = [RunFolder(p) for p in sorted(study.iterdir())]
    assert len(runs) == 4 and all(committed(r).done.all() for r in runs)
    assert [len(committed(r).parts) for r in runs] == [1] * 4
    # One seed is one noise in every sibling: with weights twice as long, twice the direction.
    plans = [Plan.read(r) for r in runs]
    facts = {}
    for p in plans:
        key = p.problem["options"].get("scale", 1.0), p.directions["x"]["seed"]
        facts[key] = p.facts["axes"]["x"]["norm"], p.facts["weight_sq"]["linear"][0]
    for seed in (0, 1):
        (norm, along), (longer, further) = facts[1.0, seed], facts[2.0, seed]
        assert norm == pytest.approx(5.0) and longer == pytest.approx(10.0)
        assert further == pytest.approx(4 * along)  # <θ, d> of both twice as long
    assert facts[1.0, 0][1] != pytest.approx(facts[1.0, 1][1])
    capfd.readouterr()
    assert run(toml, "--measures", "curvature", "--replicates", 2) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("next: ")]
    assert said == [f"next: lsweep measure {toml}"]


def test_what_fails_in_one_run_stops_no_other(tmp_path, capfd):
    toml = write(tmp_path, origins([NETWORKS[0], NETWORKS[2], NETWORKS[4]]))
    (tmp_path / "broken-2").touch()
    assert run(toml) == 1
    out, err = capfd.readouterr()
    assert "no network of depth 2" in err and "1 of 3 runs did not end well: depth=2,wd=0.0" in err
    assert len(list((tmp_path / "nets.study").glob("*/surface.h5"))) == 2
    assert command("status", toml) == 0
    out = capfd.readouterr().out
    assert out.count("complete, merged") == 2 and out.count("not planned yet") == 1
    assert command("status", toml, "--json") == 0
    states = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [s["complete"] for s in states] == [True, False, True]
    assert command("measure", toml, "--only", "train_loss") == 3
    out, err = capfd.readouterr()
    assert "2 networks" in out and "not planned yet" in err
    # The folder stands for the runs that are there.
    assert command("verify", tmp_path / "nets.study") == 0
    assert capfd.readouterr().out.count("0 problems") == 2


def test_the_table_of_a_study_is_the_closed_form(finished, capfd):
    assert command("measure", finished, "--gap", "loss", "--json", "--permutations", 500) == 0
    table = json.loads(capfd.readouterr().out)
    assert [n["options"]["depth"] for n in table["networks"]] == [n["depth"] for n in NETWORKS]
    assert table["axes"] == ["depth", "wd"]
    for network, gap, curvature in zip(table["networks"], GAPS, CURVATURES, strict=True):
        assert network["gaps"]["loss"]["value"] == pytest.approx(gap)
        found = network["measures"]["plane_curvature_max"]["mean"]
        assert found == pytest.approx(25 * curvature)
        assert network["measures"]["weight_norm"]["mean"] == pytest.approx(5.0)
    assert [len(r["measures"]) > 5 for r in table["runs"]] == [True] * 8
    found = table["relations"]["measures"]["plane_curvature_max"]
    assert found["tau"]["value"] == pytest.approx(26 / 28 - 2 / 28)
    values = {axis: tau["value"] for axis, tau in found["axes"].items()}
    assert values == pytest.approx({"depth": 1.0, "wd": 0.0})
    assert found["psi"]["value"] == pytest.approx(0.5) and found["worst"] == "wd"
    assert table["relations"]["measures"]["weight_norm"]["tau"]["value"] is None
    assert "test_loss" not in table["relations"]["measures"]  # a part of the gap itself
    assert command("measure", finished, "--csv", "--only", "weight_norm") == 0
    rows = list(csv.DictReader(io.StringIO(capfd.readouterr().out)))
    assert len(rows) == 8 and {r["measure"] for r in rows} == {"weight_norm"}
    assert [float(r["gap_loss"]) for r in rows] == pytest.approx(GAPS)


def test_a_study_is_text_and_a_picture(finished, capfd, tmp_path):
    assert command("measure", finished.with_suffix(".study"), "--permutations", 200) == 0
    out = capfd.readouterr().out
    assert "8 networks, 1 plane each" in out and "200 times (Philox, seed 0)" in out
    assert "loss-matched: all of them (training loss 0.5 to 0.5, within 10%)" in out
    assert "partial τ, wd held" in out and "The regulariser wd: 0, 0.25" in out
    assert "flat" not in out
    assert command("render", finished, "--kind", "study", "-o", tmp_path / "f.png") == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    some = sorted(finished.with_suffix(".study").glob("*.run"))[:3]
    assert command("measure", *some[:2], "--figures") == 0
    assert (some[0].parent / "study.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()
    assert command("measure", *some, some[0]) == 0
    out = capfd.readouterr().out
    assert "3 networks" in out and "too few: 3 networks with a gap, at least 8" in out
    assert "p=" not in out


# -- a comparison ----------------------------------------------------------------------------------


def test_networks_are_all_named_by_their_options_or_all_by_their_runs():
    some = [sibling({"checkpoint": "net.pt"}, {"a": 1.0}), sibling({}, {"a": 1.0})]
    assert [n.name for n in networks(some)] == [r.name for r in some]
    more = [sibling({"checkpoint": f"{n}.pt"}, {"a": 1.0}) for n in "ab"]
    assert [n.name for n in networks(more)] == ["a", "b"]


def sibling(
    options: dict, rows: dict[str, float], seed: int = 0, **evaluate: object
) -> RunMeasures:
    plan = {
        "origin": {"sha256": json.dumps(options)},
        "problem": {"options": options},
        "directions": {"x": {"kind": "random", "seed": seed, "sha256": str(seed)}},
        "data": {},
        "evaluate": evaluate,
    }
    along = [Measured(k, v, context={"grid": "5"}) for k, v in rows.items()]
    return RunMeasures(f"{options} {seed}", plan, along)


def test_planes_are_averaged_and_their_spread_is_told():
    runs = [sibling({"wd": 0.0}, {"a": v, "train_loss": 0.1}, s) for s, v in enumerate((1.0, 3.0))]
    runs.append(sibling({"wd": 0.1}, {"a": 5.0, "train_loss": 0.1}))
    both = compare(runs)
    first, second = both.networks
    assert (first.name, first.measures["a"].mean, first.measures["a"].planes) == ("wd=0.0", 2.0, 2)
    assert first.measures["a"].sd == pytest.approx(np.std([1.0, 3.0], ddof=1))
    assert second.measures["a"].sd is None
    assert both.unlike == () and both.gap == ""
    other = sibling({"wd": 0.2}, {"a": 1.0}, samples=64)
    assert compare([*runs, other]).unlike == ("evaluate.samples",)
    wider = [
        RunMeasures(str(i), r.plan, [Measured("basins", 1.0, context={"range": [[-i, i]]})])
        for i, r in enumerate(runs[:2], 1)
    ]
    assert compare(wider).unlike == ("range",)
    text = "\n".join(lines(compare([*runs, other])))
    assert "not measured alike" in text and "evaluate.samples" in text
    assert "no generalisation gap is known" in text


def test_what_no_plane_changes_keeps_its_own_error():
    def plane(seed: int, a: float, se: float) -> RunMeasures:
        rows = [Measured("a", a, se, "samples"), Measured("norm", 2.0),
                Measured("basins", 1.0, context={"grid": "5"})]  # fmt: skip
        return RunMeasures(str(seed), sibling({"wd": 0.0}, {}, seed).plan, rows)

    found = compare([plane(0, 1.0, 0.25), plane(1, 1.5, 0.5)])
    (network,) = found.networks
    a, norm, basins = (network.measures[n] for n in ("a", "norm", "basins"))
    assert (a.mean, a.sd, a.error, a.replicate) == (1.25, None, 0.5, "samples")
    assert norm.sd is None and norm.se is None and basins.sd == 0.0
    told = "\n".join(lines(found))
    assert "1.25 ± 0.5" in told and "± 0\n" not in told


def test_what_did_not_converge_is_marked_also_among_others():
    runs = [sibling({"wd": 0.1 * i}, {"hessian_max": 1.0 + i, "test_loss": 2.0 + i * i,
                                      "train_loss": 0.1}) for i in range(9)]  # fmt: skip
    loose = Measured("hessian_max", 3.0, context={"doubtful": True}, note="did not converge: …")
    runs[2] = RunMeasures("loose", runs[2].plan, [*runs[2].rows[1:], loose])
    found = compare(runs)
    assert [n.measures["hessian_max"].doubtful for n in found.networks] == [0, 0, 1] + [0] * 6
    text = "\n".join(lines(found))
    assert text.count("3*") == 1 and "* 1 of these did not converge" in text
    assert "hessian_max (1 in doubt)" in text  # where its τ stands
    assert "*" not in "\n".join(lines(compare([r for r in runs if r.name != "loose"])))


def test_children_of_other_samples_are_not_compared_without_a_word():
    """A child's samples and batch norm need not be its parent's: no parent's plan tells."""
    where = [{"samples": 64, "batch_norm": "eval"}, {"samples": 256, "batch_norm": "recalibrate"}]
    runs = [
        RunMeasures(str(i), sibling({"wd": 0.1 * i}, {}).plan, [
            *(Measured(n, 1.0, context=context) for n in ("trace", "sharpness@0.5", "sharpness@1")),
            Measured("basins", 1.0, context={**where[0], "seed": i})])
        for i, context in enumerate(where)
    ]  # fmt: skip
    assert compare(runs).unlike == ("samples of trace and 1 more", "batch norm of trace and 1 more")
    assert compare(runs[:1] * 2).unlike == ()


def test_one_hyper_parameter_is_told_once():
    runs = [sibling({"depth": d}, {"train_loss": 0.1 + d, "minimum": 0.1 + d, "basins": 2.0,
                                   "test_loss": 0.2 + 3.0 * d}) for d in range(8)]  # fmt: skip
    found = compare(runs)
    told = "\n".join(lines(found))
    assert "the same in all networks: basins 2" in told
    assert "equal in every network: minimum = train_loss" in told
    assert "ψ depth" in told and "worst" not in told and "undefined" not in told
    labels = [ax.get_xlabel() for ax in study_figure(found).subfigs[0].axes]
    assert "train loss" in labels and "basins" not in labels


def test_the_gap_is_named_and_is_the_error_where_there_is_one():
    rows = {"train_loss": 0.1, "test_loss": 0.5, "train_accuracy": 99.0, "test_accuracy": 95.0}
    runs = [sibling({"wd": w}, rows) for w in (0.0, 0.1)]
    found = compare(runs)
    assert found.gap == "error" and found.networks[0].gaps["error"][0] == pytest.approx(4.0)
    assert compare(runs, Question(gap="loss")).networks[0].gaps["loss"][0] == pytest.approx(0.4)
    assert "test error - train error, per cent" in "\n".join(lines(found))


def test_only_networks_of_about_equal_loss_are_matched():
    runs = [
        sibling(
            {"depth": d},
            {"a": float(d), "test_loss": 0.5 + d, "train_loss": 0.02 if d < 8 else 1.0 + d},
        )
        for d in range(17)
    ]
    found = compare(runs)
    assert len(found.all.relations) == 2 and len(found.matched.members) == 8
    assert found.losses == (0.02, 0.02)
    assert found.matched.relations["a"].tau.value == pytest.approx(1.0)
    few = compare(runs[1:])
    assert len(few.matched.members) == 7 and not few.matched.relations
    assert "loss-matched: too few: 7 of 16 networks" in "\n".join(lines(few))


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"gap": "eror"}, "--gap eror; did you mean 'error'"),
        ({"tolerance": -1.0}, "--match -1"),
        ({"permutations": 5}, "--permutations 5: from 100"),
    ],
)
def test_a_question_that_cannot_be_is_refused(question, words):
    with pytest.raises(LsweepError, match=words):
        Question(**question)


def test_a_regulariser_must_vary_and_be_a_number():
    runs = [sibling({"wd": w, "decay": d}, {"a": 1.0}) for w, d in ((0.0, "no"), (0.1, "yes"))]
    with pytest.raises(LsweepError, match="no such hyper-parameter varies here; did you mean 'wd'"):
        compare(runs, Question(regularizer="w"))
    runs = [sibling({"wd": w}, {"a": 1.0}) for w in (0.0, True)]
    assert compare(runs).regularizer == "wd"
    runs = [sibling({"wd": w, "n": n}, {"a": 1.0}) for n, w in enumerate(("no", "yes", "no"))]
    with pytest.raises(LsweepError, match="wd is not a number"):
        compare(runs)


def test_the_figure_shows_key_measures_and_the_null_beside():
    rows = {"train_loss": 0.1, "weight_norm": 3.0, "basins": 2.0}
    runs = [
        sibling({"wd": 0.1 * (i % 4), "depth": i // 4}, {
            **rows, "test_loss": 0.1 + i, "sharpness@0.1": 0.1 * i, "sharpness@0.5": 1.0 + i * i,
            "sharpness@1": 2.0 + i, "layer_sharpness@a": 1.0 * i})
        for i in range(12)
    ]  # fmt: skip
    figure = study_figure(compare(runs))
    panels = [ax for sub in figure.subfigs for ax in sub.axes]
    labels = [ax.get_xlabel() for ax in panels]
    assert labels[0] == "sharpness@0.5" and "layer sharpness@a" not in labels
    assert labels[-1].startswith("same order as the gap")
    assert panels[0].get_xscale() == "log" and len(panels[0].containers) == 12
    assert next(t.get_text() for t in panels[-1].get_yticklabels()) == "sharpness@0.5"
    told = "\n".join(lines(compare(runs))).partition("Relations")[2]
    assert "sharpness@0.5" in told and "sharpness@1" not in told  # of a curve its middle
    assert "6 measures, not corrected" in told and "--only shows the 2 others" in told
    told = "\n".join(lines(compare(runs, only={"sharpness@0.1", "sharpness@1"})))
    told = told.partition("Relations")[2]
    assert "sharpness@0.1" in told and "sharpness@1" in told and "shows the" not in told
    few = study_figure(compare(runs[:3]))
    assert "too few" in few.subfigs[1].axes[0].texts[0].get_text()
    with pytest.raises(LsweepError, match="at least two networks"):
        study_figure(compare(runs[:1]))


# -- the penalty -----------------------------------------------------------------------------------


def test_l2_adds_half_lambda_times_the_squared_norm(finished, capfd, tmp_path):
    folder = sorted(finished.with_suffix(".study").iterdir())[0]
    plain = lsweep.open(folder)
    penal = with_l2(plain, 0.25)
    assert "weight_sq" in plain.values
    for name in ("train_loss", "test_loss"):
        assert penal[name] == pytest.approx(plain[name] + 0.125 * plain["weight_sq"], abs=1e-12)
        assert "0.25/2·‖θ‖²" in penal.attributes[name]["long_name"]
    assert penal["train_loss_se"] == pytest.approx(plain["train_loss_se"])
    assert "loss + 0.25/2·‖θ‖²" in penal.title and "0.25/2·‖θ‖²" in penal.provenance["caption"]
    assert with_l2(plain, None) is plain
    assert command("measure", folder, "--l2", 0.25, "--only", "train_loss", "--json") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["measures"][0]["value"] == pytest.approx(0.5 + 0.125 * 25)
    assert row["measures"][0]["context"]["l2"] == 0.25
    assert command("measure", folder, "--l2", 0.25) == 0
    assert "loss + 0.25/2·‖θ‖²" in capfd.readouterr().out.splitlines()[0]
    assert command("render", folder, "--l2", 0.25, "-o", tmp_path / "l2.png") == 0
    capfd.readouterr()
    for arguments, words in (
        (("--l2", "-1"), "--l2 -1: a finite number from 0"),
        (("--l2", "nan"), "--l2 nan: a finite number from 0"),
    ):
        assert command("measure", folder, *arguments) == 1
        assert words in capfd.readouterr().err


def test_l2_needs_the_squared_norm():
    bare = Surface({"x": np.arange(2.0)}, {"train_loss": np.ones(2)})
    with pytest.raises(LsweepError, match="needs ‖θ‖² at every point"):
        with_l2(bare, 0.1)
    with pytest.raises(LsweepError, match="adds to a loss"):
        with_l2(Surface({"x": np.arange(2.0)}, {"weight_sq": np.ones(2), "a": np.ones(2)}), 0.1)
