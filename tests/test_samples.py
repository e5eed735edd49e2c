"""Subsets, their standard errors and the control variate; data read as seldom as may be.

What is promised: a subset is drawn without bias, class by class, and is the same at every point;
its errors are the true ones; the control variate is exact where it can be; large data is read once
for a unit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import command, committed, finished, merged, planned, sweep_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import lsweep
from lsweep.backends.packed import Spot
from lsweep.errors import LsweepError
from lsweep.evaluating.anchor import anchored
from lsweep.evaluating.evaluate import Evaluator
from lsweep.outcomes import variates
from lsweep.plans.plan import LIVE, Plan
from lsweep.plans.rounds import Rounds
from lsweep.plans.settings import Settings
from lsweep.preparing.planning import plan_run
from lsweep.preparing.restoring import load_problem
from lsweep.problems.data import Split
from lsweep.problems.subsets import classes_of, draw, subsampled
from lsweep.runs.display import preflight_line
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.sums import standard_error

LABELS = np.repeat([0, 1, 2, 3], [500, 300, 190, 10])


# -- the draw --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 100, 333, 1000])
def test_each_class_has_its_share_rounded_up_or_down(count):
    for key in range(20):
        picked = draw(LABELS, count, str(key))
        assert len(np.unique(picked)) == count and (np.diff(picked) > 0).all()
        share = np.bincount(LABELS) * count / len(LABELS)
        drawn = np.bincount(LABELS[picked], minlength=4)
        assert (np.floor(share) <= drawn).all() and (drawn <= np.ceil(share)).all()


def test_each_sample_is_drawn_equally_often_and_pairs_are_not_tied():
    seeds, count = 4000, 30
    times = np.zeros(120)
    together = np.zeros((120, 120))
    labels = np.repeat(np.arange(4), [57, 41, 15, 7])
    for seed in range(seeds):
        picked = draw(labels, count, f"seed {seed}")
        times[picked] += 1
        together[np.ix_(picked, picked)] += 1
    wanted, spread = seeds * count / 120, np.sqrt(seeds * 0.25 * 0.75)
    assert np.abs(times - wanted).max() < 4.5 * spread
    assert (together > 0).all()  # or no standard error could be had from one draw


def test_many_small_classes_are_drawn_as_well_as_at_random():
    # The bad case of systematic sampling: shares of 1.5, and means that alternate in step.
    labels = np.repeat(np.arange(100), 6)
    v = (labels % 2).astype(float)
    found = [v[draw(labels, 150, str(seed))].mean() for seed in range(400)]
    plain = v.std(ddof=1) / np.sqrt(150) * np.sqrt(1 - 150 / 600)
    assert np.std(found) < plain and abs(np.mean(found) - 0.5) < 5 * plain / 20


def test_the_error_is_the_true_one_without_classes_and_a_bound_with_them():
    rng = np.random.default_rng(3)
    v = rng.exponential(1.0, 1000) + 2.0 * LABELS
    errors, hits = {}, {}
    for name, labels in (("plain", 0 * LABELS), ("classes", LABELS)):
        means, ses = [], []
        for seed in range(600):
            x = v[draw(labels, 200, str(seed))]
            ses.append(float(standard_error(200.0, 200.0, x.sum(), x.sum(), (x * x).sum())))
            means.append(x.mean())
        ses = np.array(ses) * variates.finite_population(200, 1000)
        errors[name] = np.std(means) / ses.mean()
        hits[name] = np.mean(np.abs(np.array(means) - v.mean()) < 1.96 * ses)
        assert abs(np.mean(means) - v.mean()) < 4 * np.std(means) / np.sqrt(600)
    assert abs(errors["plain"] - 1) < 0.1 and 0.92 < hits["plain"] < 0.975
    assert errors["classes"] < 0.8 and hits["classes"] > 0.975


# -- where classes are found -----------------------------------------------------------------------


class Items(Dataset):
    def __init__(self, n, targets=None):
        self.n, self.reads = n, []
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        self.reads.append(i)
        return torch.tensor([float(i)]), i % 3


X, Y = torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("data", "known"),
    [
        ((X, Y), True),
        ({"x": X, "labels": Y}, True),
        (TensorDataset(X, Y), True),
        (DataLoader(TensorDataset(X, Y), batch_size=4), True),
        (Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, 1 - Y])), range(6)), True),
        (Items(6, [0, 1, 2, 0, 1, 2]), True),
        (Items(6), False),
        ((X, X), False),
        ((X, Y.float()), False),
        (X, False),
        (Items(6, "a word"), False),
        (Items(6, [0, 1]), False),
    ],
)
def test_classes_are_those_of_whole_numbered_targets(data, known):
    found = classes_of(Split("train", data))
    assert found is None if not known else found.tolist() == Y.tolist()


# -- in a run --------------------------------------------------------------------------------------


def made(tmp_path: Path, text: str, **grid: int):
    (tmp_path / "problem.py").write_text(text)
    lines = ["[problem]", 'factory = "problem.py:make"', "[evaluate]", "samples = 24"]
    for axis, count in grid.items():
        lines += [f"[grid.{axis}]", "range = [-1, 1]", f"count = {count}"]
    (tmp_path / "sweep.toml").write_text("\n".join(lines))
    return tmp_path / "sweep.toml"


CLASSES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lsweep

def make():
    g = torch.Generator().manual_seed(2)
    y = torch.arange(240) % 4
    x = torch.randn(240, 5, generator=g) + y[:, None]
    net = nn.Linear(5, 4)
    for p in net.parameters():
        nn.init.normal_(p, generator=g)
    data = FORM
    return lsweep.Problem(net, {"train": data}, loss=nn.CrossEntropyLoss(),
                          metrics={"accuracy": lsweep.accuracy})
"""


def test_the_same_subset_serves_every_point_however_it_comes(tmp_path):
    surfaces = []
    loader = "DataLoader(TensorDataset(x, y), batch_size=240)"
    for form in ("(x, y)", "TensorDataset(x, y)", loader):
        base = tmp_path / form[0]
        base.mkdir()
        folder = finished(made(base, CLASSES.replace("FORM", form), x=5))
        surfaces.append(merged(folder)[0])
        plan = Plan.read(folder)
        known = plan.data["train"]
        assert (known["samples"], known["of"], known["classes"]) == (24, 240, 4)
        problem, _ = load_problem(folder, plan)
        split = problem.splits["train"]
        assert np.bincount(next(split.batches(24))[1]).tolist() == [6, 6, 6, 6]
        assert split.indices.tolist() == draw(np.arange(240) % 4, 24, "train").tolist()
        weights = {r["sums"][0, 0] for part in committed(folder).parts for r in part.rows}
        assert weights == {24.0}
    a, *others = surfaces
    for b in others:
        assert all(a.values[n].tobytes() == b.values[n].tobytes() for n in a.values)


def test_a_surface_says_what_it_stands_on_and_the_errors_cover_the_truth(tmp_path):
    whole = finished(made(tmp_path, CLASSES.replace("FORM", "(x, y)"), x=9))
    surface = merged(whole)[0]
    problem = lsweep.Problem.from_factory(f"{tmp_path}/problem.py:make")
    truth = lsweep.sweep(problem, x=(-1, 1, 9), metrics=("loss",))
    fact = surface.provenance["sampling"]["train_loss"]
    z = np.abs(surface["train_loss"] - truth["train_loss"]) / np.where(
        surface.values["train_loss_se"] > 0, surface.values["train_loss_se"], 1e-6
    )
    assert z.max() < 3.5
    anchor = read_json(whole.all_devices()[0])["anchor"]["train_loss"]
    assert anchor["whole"] == pytest.approx(truth["train_loss"][4], rel=1e-6)
    assert fact["shift"] == anchor["whole"] - anchor["subset"] and fact["gain"] < 1
    assert surface["train_loss"][4] == pytest.approx(truth["train_loss"][4], rel=1e-6)
    assert surface.values["train_loss_se"][4] == 0
    assert "24 of 240 train samples" in surface.provenance["caption"]
    assert "control variate" in surface.provenance["caption"]
    toml = tmp_path / "sweep.toml"
    said = command("run", toml, "--no-picture").out
    assert "at the centre (anchored to all 240 samples), minimum" in said
    line = preflight_line(read_json(whole.all_devices()[0]), 9)
    assert f"({anchor['whole']:.6g} over all) at the centre (over 24 drawn samples)" in line
    said = command("plan", toml, "--set", "evaluate.samples=1000", "--run", tmp_path / "b.run").out
    assert "samples = 1000: train has 240, and all of them are taken" in said
    surface.save(tmp_path / "surface.h5")
    attributes = lsweep.open(tmp_path / "surface.h5").attributes
    assert "drawn class by class (4)" in attributes["train_loss"]["samples"]
    assert "control variate" in attributes["train_loss"]["estimator"]
    assert "24 of 240, finite-population" in attributes["train_loss_se"]["replicate"]
    for path in whole.all_devices():
        path.unlink()  # what a part says is enough
    assert merged(whole)[0]["train_loss"].tobytes() == surface["train_loss"].tobytes()


def test_slices_and_more_samples_than_there_are(tmp_path):
    a = merged(finished(sweep_file(tmp_path / "a", evaluate="samples = 16")))[0]
    b = merged(finished(sweep_file(tmp_path / "b", evaluate="samples = 16\nslices = 4")))[0]
    np.testing.assert_allclose(a["train_loss"], b["train_loss"], rtol=1e-6)
    np.testing.assert_allclose(a.values["train_loss_se"], b.values["train_loss_se"], atol=1e-9)
    c = merged(finished(sweep_file(tmp_path / "c", evaluate="samples = 64")))[0]
    d = merged(finished(sweep_file(tmp_path / "d")))[0]
    assert all(c.values[n].tobytes() == d.values[n].tobytes() for n in d.values)
    assert c.provenance["sampling"] == {} and "of 64" not in c.provenance["caption"]


# -- the control variate ---------------------------------------------------------------------------


PLAN = Plan(
    *({}, {}, {}, []),
    data={"train": {"samples": 25, "of": 100, "classes": 0}},
    evaluate={"splits": ["train"], "metrics": ["loss"]},
    facts={},
)


def corrected(v: np.ndarray, centre: int, picked: np.ndarray):
    """Return value, se and what was done, of (points, samples) losses seen on ``picked``."""
    x, d = v[:, picked], v[:, picked] - v[centre, picked]
    n = float(len(picked))
    sums = [standard_error(n, n, s.sum(1), s.sum(1), (s * s).sum(1)) for s in (x, d)]
    values = {"train_loss": x.mean(1), "train_loss_se": sums[0], "train_loss_diff_se": sums[1]}
    anchor = {"train_loss": {"whole": v[centre].mean(), "subset": x[centre].mean()}}
    return values, variates.correct(values, PLAN, [{}, anchor])["train_loss"]


def test_it_is_exact_where_every_sample_rises_alike():
    rng = np.random.default_rng(0)
    v = rng.exponential(1.0, 100) + np.linspace(-1, 1, 5)[:, None] ** 2
    values, fact = corrected(v, 2, draw(np.zeros(100), 25, "a"))
    np.testing.assert_allclose(values["train_loss"], v.mean(1), rtol=1e-12)
    assert (values["train_loss_se"] < 1e-8).all() and fact["gain"] < 1e-8


def test_its_error_is_the_true_one_and_it_is_left_out_where_it_does_not_help():
    rng = np.random.default_rng(1)
    shape = np.linspace(-1, 1, 9)[:, None]
    alike = rng.exponential(1.0, 100) * (1 + 0.3 * shape**2)
    apart = np.abs(rng.normal(0, 1, (9, 100))) + 0.3
    for v, helps in ((alike, True), (apart, False)):
        errors = []
        for seed in range(300):
            values, fact = corrected(v, 4, draw(np.zeros(100), 25, str(seed)))
            assert (fact["shift"] is not None) == helps
            errors.append((values["train_loss"] - v.mean(1), values["train_loss_se"]))
        off, se = np.array(errors).transpose(1, 2, 0)
        away = se.mean(1) > 1e-12  # at the centre itself both are 0
        ratio = off[away].std(1) / se[away].mean(1)
        assert away.sum() == (8 if helps else 9) and (np.abs(ratio - 1) < 0.2).all()
        assert (np.abs(off.mean(1)) < 4.5 * off.std(1) / np.sqrt(300) + 1e-12).all()


def test_the_error_of_a_weighted_mean_is_its_own_and_has_no_unit_of_weight():
    """To first order the ratio Σwv/Σw is off by Σw(v - m)/Σw; n is (Σw)²/Σw², 2.8 here."""
    v, w = np.array([1.0, 2.0, 4.0, 3.0]), np.array([4.0, 1.0, 2.0, 1.0])
    m, n = (w * v).sum() / w.sum(), w.sum() ** 2 / (w * w).sum()
    truth = np.sqrt((w**2 * (v - m) ** 2).sum() * n / (n - 1)) / w.sum()
    for unit in (0.01, 1.0, 100.0):
        u = unit * w
        sums = [u, u * u, u * v, u * u * v, u * u * v * v]
        assert standard_error(*(s.sum() for s in sums)) == pytest.approx(truth, rel=1e-12)


def test_an_accuracy_is_not_moved_beyond_its_bounds():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 2, generator=generator)
    y = (x @ torch.tensor([1.0, 0.3]) > 0).long()
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-3.0, -0.9], [3.0, 0.6]]))
    problem = lsweep.Problem(net, {"train": (x, y)}, loss=nn.CrossEntropyLoss(),
                             metrics={"accuracy": lsweep.accuracy})  # fmt: skip
    for samples in (200, 400):
        found = lsweep.sweep(problem, x=(-0.4, 0.4, 9), y=(-0.4, 0.4, 9), samples=samples,
                             progress=False)  # fmt: skip
        sampling = found.provenance["sampling"]
        assert sampling["train_loss"]["shift"] is not None
        assert sampling["train_accuracy"]["shift"] is None
        assert found["train_accuracy"].max() <= 100


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_anchor_is_the_whole_centre_in_float32_whatever_is_asked_for(precision):
    net, x, y = nn.Linear(2, 3), torch.randn(40, 2), torch.arange(40) % 3
    problem = lsweep.Problem(net, {"train": (x, y)}, loss=nn.CrossEntropyLoss())
    asked = {"splits": ["train"], "metrics": ["loss"], "slices": 1, "batch_size": "auto",
             "batch_norm": "eval", "precision": precision, "samples": 16}  # fmt: skip
    found = anchored(subsampled(problem, asked), asked, torch.device("cpu"))
    truth = float(nn.functional.cross_entropy(net(x).detach(), y))
    assert found == {"train_loss": pytest.approx(truth, rel=1e-6)}


def loader(**options):
    return DataLoader(TensorDataset(X, Y), **options)


def test_what_is_cut_out_of_a_loader_is_collated_as_the_loader_would():
    def collated(samples):
        return {
            "x": torch.stack([x for x, _ in samples]),
            "labels": torch.ones(len(samples)).long(),
        }

    data = {"train": loader(batch_size=3, collate_fn=collated)}
    problem = lsweep.Problem(nn.Linear(2, 3), data, loss=nn.CrossEntropyLoss())
    settings = {"samples": 2, "splits": ["train"], "batch_norm": "eval"}
    split = subsampled(problem, settings).splits["train"]
    (batch,) = split.batches(8)
    assert batch["labels"].tolist() == [1, 1] and (split.samples, split.whole.pickable) == (2, 6)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "data", "said"),
    [
        ("fresh", (X, Y), "fresh ones at each point are refused.*36-50 on a surface that has 1"),
        (1, (X, Y), "samples = 1: must be at least 2"),
        (3, [(X, Y)], "samples = 3: the data split 'train' is batches of its own.*leave samples"),
        (3, loader(shuffle=True, batch_size=4), "is batches of its own.*takes one in its order"),
        (3, loader(drop_last=True, batch_size=4), "is batches of its own.*drop_last=False"),
        (3, loader(batch_size=None), "is batches of its own"),
    ],
)
def test_refused_with_the_reason(samples, data, said):
    problem = lsweep.Problem(nn.Linear(2, 3), {"train": data}, loss=nn.CrossEntropyLoss())
    with pytest.raises(LsweepError, match=said):
        lsweep.sweep(problem, x=(-1, 1, 3), samples=samples)


def test_a_subset_that_others_draw_otherwise_is_another_plan(tmp_path, monkeypatch):
    folder = planned(sweep_file(tmp_path, evaluate="samples = 16"))
    plan = Plan.read(folder)
    monkeypatch.setattr(
        "lsweep.problems.subsets.draw", lambda classes, count, key: np.arange(count)
    )
    with pytest.raises(LsweepError, match=r"data\.train\.fingerprint is"):
        load_problem(folder, plan)


# -- data that is read -----------------------------------------------------------------------------


class Stream(IterableDataset):
    passes = 0

    def __iter__(self):
        type(self).passes += 1
        yield from ((torch.tensor([float(i)]), torch.tensor([0.0])) for i in range(10))


@pytest.mark.parametrize(("count", "unit"), [(15, 1), (81, 5), (300, 16)])
def test_streamed_data_is_read_once_for_all_points_of_a_unit(tmp_path, monkeypatch, count, unit):
    monkeypatch.setattr("lsweep.problems.supply.RESIDENT_SHARE", 0.0)
    problem = lsweep.Problem(nn.Linear(1, 1), {"train": Stream()}, loss=nn.MSELoss())
    settings = Settings.from_table(
        {"problem": {"factory": LIVE}, "grid": {"x": {"range": [-1, 1], "count": count}}}
    )
    ready = plan_run(settings, problem, tmp_path, RunFolder(tmp_path / "a.run"))
    round_ = ready.rounds.last
    assert round_.unit_points == unit
    problem, directions = load_problem(ready.folder, ready.plan, problem)
    with Evaluator(problem, ready.plan.evaluate, directions, torch.device("cpu")) as evaluator:
        evaluator.centre()
        before = Stream.passes
        for number in range(3):
            points, slice_ = round_.unit(number, 1)
            spots = [Spot((float(ready.rounds.offsets[p, 0]),)) for p in points]
            assert evaluator.evaluate(spots, slice_).shape == (unit, 1, 8)
        assert Stream.passes - before == 3


def test_what_is_small_is_cut_into_units_for_many_workers(tmp_path):
    rounds = [
        Rounds.read(f, Plan.read(f)).last.unit_points
        for f in (planned(sweep_file(tmp_path / str(n), x=n)) for n in (300, 2100))
    ]
    assert rounds == [1, 2]
