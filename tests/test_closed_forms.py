"""evaluate, losses, merge: every value, error and sum against a formula or a second route.

Promises: a value is Σwv/Σw over all samples, whatever the batches, and equals the mean of the loss
as the user gave it over the data in one piece; its standard errors are the textbook's;
``weight_sq`` is ‖θ‖²; rows are y and columns are x; slices of the data add up; float64 is float64
throughout.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from problems import another, at, labels, mean, numbers, toward
from torch import nn

import lsweep
from lsweep.errors import LsweepError
from lsweep.evaluating import choice
from lsweep.problems import supply
from lsweep.storage.sums import standard_error
from lsweep.surfaces.reference import write_reference_directions

EXACT = {"rtol": 1e-12, "atol": 1e-13}
GRID = {"x": (-1, 1.5, 7), "y": (-0.5, 1, 5), "z": (-1, 0.5, 3)}


# -- the closed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["x", "xy", "xyz"])
def test_quadratic_in_one_two_and_three_axes(axes, tmp_path):
    problem = problems.quadratic()
    h, theta = problems.hessian_of(problem), problem.model.weight.detach().numpy()[0]
    recipes = {a: toward(problem.model, tmp_path / f"{a}.pt", ord(a)) for a in axes}
    d = {a: another(problem.model, ord(a))["weight"].numpy()[0] - theta for a in axes}
    s = lsweep.sweep(problem, **{a: GRID[a] for a in axes}, directions=recipes, precision="float64")
    wanted = np.empty(s.shape)
    for index in np.ndindex(s.shape):  # (z, y, x)
        t = theta.copy()
        for a, i in zip(reversed(axes), index, strict=True):
            t += np.linspace(*GRID[a][:2], GRID[a][2])[i] * d[a]
        wanted[index] = 0.5 * t @ h @ t
    assert s.shape == tuple(GRID[a][2] for a in reversed(axes))
    np.testing.assert_allclose(s["train_loss"], wanted, **EXACT)
    assert (wanted < 0).any() and (wanted > 0).any()  # negative losses are losses


def test_rows_are_y_and_columns_are_x(tmp_path):
    """Along y nothing happens when y moves only a weight that the data never touches."""
    model = problems.fixed(nn.Linear(2, 1, bias=False).double())
    data = (torch.tensor([[1.0, 0.0]]).double(), torch.ones(1).double())
    problem = lsweep.Problem(model, {"train": data}, loss=problems.signed_square)
    units = {"x": [np.array([[1.0, 0.0]])], "y": [np.array([[0.0, 1.0]])]}
    write_reference_directions(tmp_path / "d.h5", units)
    recipe = {"kind": "file", "file": str(tmp_path / "d.h5")}
    s = lsweep.sweep(problem, x=(-1, 1, 4), y=(-1, 1, 3), directions=recipe, precision="float64")
    assert (s["train_loss"] == s["train_loss"][:1]).all()
    assert np.ptp(s["train_loss"][0]) > 0.1


def test_weight_sq_is_the_squared_norm_of_the_parameters(tmp_path):
    """Statistics of batch norm move along, but they are not weights."""
    model = problems.normalized().model
    state = another(model)
    state["1.running_mean"] += 5.0
    torch.save(state, tmp_path / "b.pt")
    s = lsweep.sweep(
        problems.normalized(),
        x=(-1, 2, 4),
        directions={"kind": "to", "checkpoint": str(tmp_path / "b.pt")},
        precision="float64",
    )
    for x, found in zip(s.x, s["weight_sq"], strict=True):
        wanted = sum(float(p.detach().square().sum()) for p in at(model, (x, state)).parameters())
        assert found == pytest.approx(wanted, rel=1e-12)


# -- means over unequal batches ------------------------------------------------------------------


def test_unequal_batches_with_ignored_labels_give_the_mean_over_all_samples(tmp_path):
    x, y = numbers(9, 4, seed=8), labels(9, 3)
    y[[1, 2, 3, 8]] = -100  # 3 samples of 1 that count, none of 1, 5 of which 4 count
    pieces = [slice(0, 3), slice(3, 4), slice(4, 9)]
    model = problems.classifier().model
    problem = lsweep.Problem(
        model,
        {"train": [(x[p], y[p]) for p in pieces]},
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lsweep.accuracy},
    )
    s = lsweep.sweep(
        problem, x=(0, 1, 3), directions=toward(model, tmp_path / "b.pt"), precision="float64"
    )
    keep = y >= 0
    for i, offset in enumerate(s.x):
        net = at(model, (offset, another(model)))
        out = net(x).detach()
        each = F.cross_entropy(out[keep], y[keep], reduction="none").numpy()
        hits = 100.0 * (out[keep].argmax(1) == y[keep]).double().numpy()
        assert s["train_loss"][i] == pytest.approx(each.mean(), rel=1e-12)
        assert s["train_accuracy"][i] == pytest.approx(hits.mean(), rel=1e-12)
        # A sample that is ignored is no sample: neither in the error nor in its count.
        assert s["train_loss_se"][i] == pytest.approx(each.std(ddof=1) / 5**0.5, rel=1e-10)
        assert s["train_accuracy_se"][i] == pytest.approx(hits.std(ddof=1) / 5**0.5, rel=1e-10)


def per_class(weight):
    return lambda: nn.CrossEntropyLoss(weight=torch.tensor(weight))


def gaussian(output, target):
    """A mean of the user's own, one scalar."""
    return ((output - target) ** 2).mean()


def gaussian_column(output, target):
    """The same in a shape that looks like one sample."""
    return gaussian(output, target)[None]


CLASSES, PROBABILITIES = labels(13, 3), numbers(13, 3, seed=2).softmax(1)
SOME = CLASSES.clone()
SOME[[0, 5, 11]] = 1
POSITIONS = labels(13, 3, 6)
POSITIONS[:, 4:] = -100
POSITIONS[3] = -100  # a sample in which nothing counts
# name, output shape per sample, loss, target: and why the row is here
LOSSES = [
    ("plain", (3,), nn.CrossEntropyLoss, CLASSES),  # the common case
    ("functional", (3,), lambda: F.cross_entropy, CLASSES),  # the same, as most people write it
    # class weights in float32, output in float64; torch divides by the sum of weights, not by 13
    ("class weights", (3,), per_class([1.0, 2.0, 0.5]), CLASSES),
    ("class of weight 0", (3,), per_class([1.0, 0.0, 0.5]), CLASSES),  # 0/0 must not appear
    ("smoothing", (3,), lambda: nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES),
    (  # the smooth term has the weights of all classes, the divisor those of the target
        "smoothing and weights",
        (3,),
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.2),
        CLASSES,
    ),
    ("ignore_index", (3,), lambda: nn.CrossEntropyLoss(ignore_index=1), SOME),
    (  # options hidden in a partial are options all the same
        "partial",
        (3,),
        lambda: functools.partial(F.cross_entropy, ignore_index=1, label_smoothing=0.1),
        SOME,
    ),
    ("probabilities", (3,), nn.CrossEntropyLoss, PROBABILITIES),  # torch divides by the batch
    ("probabilities, weights", (3,), per_class([1.0, 2.0, 0.5]), PROBABILITIES),
    ("positions", (3, 6), nn.CrossEntropyLoss, POSITIONS),  # per token, some sequences shorter
    ("nll on [B,C,T]", (3, 6), nn.NLLLoss, POSITIONS),
    ("nll weights [B,C,T]", (3, 6), lambda: nn.NLLLoss(torch.tensor([1.0, 3.0, 0.2])), POSITIONS),
    ("nll functional", (3, 6), lambda: F.nll_loss, POSITIONS),
    ("bce", (2,), nn.BCEWithLogitsLoss, (numbers(13, 2, seed=3) > 0).double()),
    (  # weights that torch does not divide by; float32 on purpose
        "bce pos_weight",
        (2,),
        lambda: nn.BCEWithLogitsLoss(torch.tensor([0.5, 2.0]), pos_weight=torch.tensor([3.0, 1])),
        (numbers(13, 2, seed=3) > 0).double(),
    ),
    ("mse", (4,), nn.MSELoss, numbers(13, 4, seed=4)),  # several outputs: a mean over them too
    ("mse functional", (4,), lambda: F.mse_loss, numbers(13, 4, seed=4)),
    ("huber", (2, 3), lambda: nn.HuberLoss(delta=0.3), numbers(13, 2, 3, seed=5)),  # an image
    ("l1", (1,), nn.L1Loss, numbers(13, 1, seed=6)),  # one output that keeps its dimension
    ("kl batchmean", (3,), lambda: nn.KLDivLoss(reduction="batchmean"), PROBABILITIES),
    ("kl mean", (3,), nn.KLDivLoss, PROBABILITIES.log().exp()),
    ("margin", (3,), nn.MultiMarginLoss, CLASSES),  # class labels, but not of a class loss
    ("own scalar", (2,), lambda: gaussian, numbers(13, 2, seed=7)),  # weighted by batch size
    ("own scalar [1]", (2,), lambda: gaussian_column, numbers(13, 2, seed=7)),
]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")  # what kl mean is
@pytest.mark.parametrize(("name", "shape", "make", "target"), LOSSES, ids=[r[0] for r in LOSSES])
def test_weighted_mean_is_the_mean_of_the_loss_over_all_the_data_at_once(
    name, shape, make, target, tmp_path
):
    loss, x = make(), numbers(13, 5, seed=12)
    width = int(np.prod(shape))
    last = nn.LogSoftmax(1) if name.startswith(("nll", "kl")) else nn.Identity()
    model = nn.Sequential(nn.Linear(5, width), nn.Unflatten(1, shape), last).double()
    problems.fixed(model)
    recipe = toward(model, tmp_path / "b.pt")
    values = []
    for size in (1, 4, 13):
        if name.startswith("own") and size < 13:  # its batches keep their sizes: 13 = 3·4 + 1
            data = [(x[a : a + size], target[a : a + size]) for a in range(0, 13, size)]
        else:
            data = (x, target)
        s = lsweep.sweep(
            lsweep.Problem(model, {"train": data}, loss=loss),
            x=(-1, 1, 3),
            directions=recipe,
            precision="float64",
            batch_size=size,
        )
        values.append(s["train_loss"])
        single = name == "own scalar" or (name == "own scalar [1]" and size > 1)
        assert ("train_loss_se" in s.values) != single
    for v in values[1:]:
        np.testing.assert_allclose(v, values[0], **EXACT)
    for i, offset in enumerate((-1, 0, 1)):
        out = at(model, (offset, another(model)))(x).detach()
        whole = make()
        if isinstance(whole, nn.Module):
            whole = whole.double()
        assert values[0][i] == pytest.approx(float(whole(out, target)), rel=1e-12)


def test_an_opaque_scalar_says_that_it_has_no_standard_error():
    problem = problems.classifier()
    mine = lsweep.Problem(problem.model, problem.data, loss=lambda o, t: F.cross_entropy(o, t))
    s = lsweep.sweep(mine, x=(-1, 1, 3))
    assert "no standard error" in s.attributes["train_loss"]["long_name"]
    assert [n for n in s.values if n.endswith("_se")] == []


def test_a_loss_that_is_not_the_mean_of_its_parts_is_refused():
    class Odd(nn.MSELoss):
        """Says "mean", and then doubles it."""

        def forward(self, output, target):
            mean = super().forward(output, target)
            return mean if self.reduction == "none" else 2 * mean

    x = numbers(6, 2)
    with pytest.raises(LsweepError, match=r"per-sample values is .* but the loss itself gives"):
        lsweep.sweep(
            lsweep.Problem(nn.Linear(2, 2).double(), {"train": (x, x)}, loss=Odd()), x=(-1, 1, 3)
        )


# -- standard errors -------------------------------------------------------------------------------


def test_standard_errors_are_the_textbooks(tmp_path):
    problem = problems.quadratic(samples=17)
    a, s = (t.numpy() for t in problem.data["train"])
    state = another(problem.model)
    found = lsweep.sweep(
        problem,
        x=(-1, 1, 5),
        directions=toward(problem.model, tmp_path / "b.pt"),
        precision="float64",
        batch_size=4,
    )
    origin = problem.model.weight.detach().numpy()[0]
    each = [
        0.5 * s * (a @ (origin + x * (state["weight"].numpy()[0] - origin))) ** 2 for x in found.x
    ]
    for i, v in enumerate(each):
        assert found["train_loss_se"][i] == pytest.approx(v.std(ddof=1) / 17**0.5, rel=1e-9)
        # Paired, on the same samples: not the sum of two errors.
        d = (v - each[2]).std(ddof=1) / 17**0.5
        assert found["train_loss_diff_se"][i] == pytest.approx(d, rel=1e-9, abs=1e-15)
    assert found["train_loss_diff_se"][2] == 0


def test_error_of_a_weighted_mean_covers_the_truth_as_often_as_it_says():
    """1.96 standard errors hold the true mean in 95 % of worlds, values dependent on weights."""
    rng = np.random.default_rng(0)
    w = rng.uniform(0.0, 2.0, size=(4000, 200))
    v = 2.0 + w + rng.standard_normal(w.shape)
    truth = 2.0 + 4 / 3  # E[wv] / E[w]
    m = (w * v).sum(1) / w.sum(1)
    e = standard_error(
        w.sum(1), (w**2).sum(1), (w * v).sum(1), (w**2 * v).sum(1), (w**2 * v**2).sum(1)
    )
    assert 0.94 < (abs(m - truth) < 1.96 * e).mean() < 0.96
    assert e.mean() == pytest.approx(m.std(), rel=0.03)


# -- slices and precision --------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [2, 3, 20])  # even; unequal parts; a test sample each
def test_slices_sum_to_the_whole(slices, tmp_path):
    problem = problems.classifier()  # 40 and 20 samples
    recipe = toward(problem.model, tmp_path / "b.pt")
    whole, cut = (
        lsweep.sweep(problem, x=(-1, 1, 3), directions=recipe, precision="float64", slices=n)
        for n in (1, slices)
    )
    assert list(whole) == list(cut)
    for name in whole:
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-11, atol=1e-14, err_msg=name)


def test_more_slices_than_samples_are_refused():
    with pytest.raises(LsweepError, match=r"slices = 25: .*'test' has 20 samples"):
        lsweep.sweep(problems.classifier(), x=(-1, 1, 3), slices=25)


def test_precision_is_what_it_says(monkeypatch):
    monkeypatch.setattr(choice, "NEAR", 0.0)  # bfloat16 is faster, for once
    base = problems.classifier()
    seen = []

    def loss(output, target):
        seen.append(output.dtype)
        return F.cross_entropy(output, target, reduction="none")

    found, dtypes = {}, {}
    for precision in ("float64", "float32", "bfloat16"):
        problem = lsweep.Problem(base.model, {"train": base.data["train"]}, loss=loss)
        found[precision] = lsweep.sweep(problem, x=(-1, 1, 3), precision=precision)["train_loss"]
        dtypes[precision] = set(seen)
        seen.clear()
    # bfloat16 is autocast over float32: the loss sees float32, never bfloat16
    assert dtypes == {
        "float64": {torch.float64},
        "float32": {torch.float32},
        "bfloat16": {torch.float32},
    }
    off = {p: np.abs(v / found["float64"] - 1).max() for p, v in found.items()}
    assert 0 < off["float32"] < 1e-6
    assert 1e-5 < off["bfloat16"] < 3e-2


def test_shipped_forwards_keep_float64():
    problem = problems.classifier()
    shipped = lsweep.Problem(problem.model, problem.data, forward=lsweep.classifier)
    a, b = (lsweep.sweep(p, x=(-1, 1, 3), precision="float64") for p in (problem, shipped))
    for name in a:
        np.testing.assert_allclose(b[name], a[name], **EXACT, err_msg=name)


def test_a_torch_loss_is_a_metric_too():
    """The same rule for metrics: a mean over samples is run per sample."""
    base = problems.classifier()
    x, y = base.data["train"]
    problem = lsweep.Problem(
        base.model,
        {"train": (x, y)},
        loss=nn.CrossEntropyLoss(),
        metrics={
            "smooth": nn.CrossEntropyLoss(label_smoothing=0.1),
            "margin": nn.MultiMarginLoss(),
        },
    )
    s = lsweep.sweep(problem, x=(0, 1, 2), precision="float64")
    for name, loss in problem.metrics.items():
        wanted = mean(loss, base.model(x).detach(), y)
        assert s[f"train_{name}"][0] == pytest.approx(wanted, rel=1e-12)
        assert np.isfinite(s[f"train_{name}_se"]).all()


def test_offsets_are_exact_and_shared_between_grids():
    problem = problems.quadratic()
    coarse, fine = (lsweep.sweep(problem, x=(-0.3, 0.3, n), precision="float64") for n in (4, 7))
    assert (coarse.x == fine.x[::2]).all()
    assert coarse["train_loss"].tobytes() == fine["train_loss"][::2].copy().tobytes()
    pairs = itertools.pairwise(fine.x)
    assert fine.x[3] == 0 and all(b > a for a, b in pairs)


@pytest.mark.parametrize("batch_norm", ["eval", "batch", "recalibrate"])
def test_data_kept_in_memory_and_data_read_anew_give_the_same_bits(batch_norm, monkeypatch):
    """One pass over the data per point, or one pass for many points: two routes to the samples."""
    surfaces = []
    for share in (0.25, 0.0):  # of the free memory
        monkeypatch.setattr(supply, "RESIDENT_SHARE", share)
        surfaces.append(
            lsweep.sweep(problems.normalized(), x=(-1, 1, 9), batch_norm=batch_norm, batch_size=8)
        )
    for name in surfaces[0]:
        assert surfaces[0][name].tobytes() == surfaces[1][name].tobytes(), name
