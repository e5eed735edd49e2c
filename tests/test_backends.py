"""packed, backends, summing, catalogue, choice: all ways to evaluate give eager's values.

Promises: each backend's sums are those of eager to rounding, for networks of every kind, along
directions that move batch norm too and at whole checkpoints; a point has the same bits alone, among
others, streamed or resident, and from whichever worker; what is not for a problem says why in one
line; one that disagrees is never taken; the first worker's choice is obeyed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import problems
import pytest
import torch
from cases import Raised, committed, planned, worked
from problems import fixed, labels, numbers
from test_any_network import Transformer
from torch import nn

import lsweep
from lsweep.axes.directions import Directions, Step
from lsweep.backends import catalogue
from lsweep.backends.packed import Spot
from lsweep.backends.summing import Reference, Samples
from lsweep.errors import LsweepError
from lsweep.evaluating import choice
from lsweep.evaluating.acceptance import centre_of, taken
from lsweep.evaluating.choice import Choice, Trial, choose
from lsweep.evaluating.disagreement import disagreement
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.picking import Picker
from lsweep.evaluating.pieces import piece_of
from lsweep.hosts import machine
from lsweep.hosts.device import device_class
from lsweep.hosts.stopping import Stop
from lsweep.measures.from_surface import context_of
from lsweep.merging.merge import merge
from lsweep.outcomes.audits import Audits, audit_lines, audited_variables, compared
from lsweep.outcomes.frozen import across_classes, audit_tolerances, coarsest
from lsweep.plans import settings
from lsweep.problems import supply
from lsweep.problems.data import Split
from lsweep.problems.problem import Sampled
from lsweep.problems.takeover import products
from lsweep.runs.display import Display, preflight_line
from lsweep.runs.status import lines, status
from lsweep.storage.files import read_json, replace, sealed
from lsweep.storage.rows import Kind, device_code, row_type
from lsweep.surfaces.surface import Status

SINGLE = torch.float32
DEVICE = torch.device(os.environ.get("LSWEEP_TEST_DEVICE", "cpu"))  # for who has a GPU
GRAPHS = ["cudagraph"] if DEVICE.type == "cuda" else []
COMPILES = pytest.mark.skipif(not machine.compiler(), reason="needs a C++ compiler")
SLOW = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # torch.compile warns of torch
SPOTS = [Spot((0.0, 0.0)), Spot((1.0, -0.5)), Spot((-0.25, 1.0))]


def mlp():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = (numbers(40, 4, dtype=SINGLE), labels(40, 3))
    test = (numbers(20, 4, seed=6, dtype=SINGLE), labels(20, 3, seed=7))
    return lsweep.Problem(
        fixed(net),
        {"train": data, "test": test},
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lsweep.accuracy},
    )


def ignoring():
    """A class that the loss ignores, and accuracy does not."""
    problem, loss = mlp(), nn.CrossEntropyLoss(ignore_index=2)
    return lsweep.Problem(problem.model, problem.data, loss=loss, metrics=problem.metrics)


def cnn():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    fixed(net)
    for i in (1, 4):
        net[i].running_mean.copy_(0.2 * numbers(4, seed=20 + i))
        net[i].running_var.copy_(1 + 0.3 * numbers(4, seed=30 + i).abs())
    data = {"train": (numbers(22, 2, 6, 6, dtype=SINGLE), labels(22, 3))}
    return lsweep.Problem(net, data, loss=nn.CrossEntropyLoss(label_smoothing=0.1))


def transformer():
    ids = labels(14, 11, 6)
    mask = (torch.arange(6) < (3 + labels(14, 4, seed=5))[:, None]).long()
    data = {"train": {"input_ids": ids, "attention_mask": mask}}
    return lsweep.Problem(fixed(Transformer()), data, forward=lsweep.causal_lm)


def random_axes(problem, norms=False):
    """Two directions through every weight; through batch norm's scales too where ``norms``."""
    state = {n: p for n, p in problem.model.named_parameters() if norms or p.dim() > 1}
    return Directions(
        {
            a: SimpleNamespace(
                tensors={
                    n: 0.3 * numbers(*p.shape, seed=s + i, dtype=SINGLE)
                    for i, (n, p) in enumerate(state.items())
                }
            )
            for a, s in (("x", 100), ("y", 200))
        },
        (),
        {},
    )


@contextlib.contextmanager
def evaluator(problem, backend="eager", directions=None, **options):
    asked = {
        "metrics": problem.metric_names,
        "splits": tuple(problem.splits),
        "slices": 1,
        "batch_size": 8,
        "precision": "float32",
        "batch_norm": "eval",
        "backend": backend,
        **options,
    }
    with Evaluator(problem, asked, directions or random_axes(problem), DEVICE) as ev:
        ev.use(backend, ev.batch_sizes)
        yield ev


def sums(make, backend, spots=SPOTS, **options):
    with evaluator(make(), backend, **options) as ev:
        return ev.evaluate(spots)


# -- agreement -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "backend"),
    [
        *((m, b) for m in (mlp, cnn, transformer) for b in ("fused", "vmap", *GRAPHS)),
        (cnn, "channels_last"),
        pytest.param(mlp, "native", marks=COMPILES),
        pytest.param(ignoring, "native", marks=COMPILES),
        pytest.param(cnn, "native", marks=COMPILES),
        pytest.param(mlp, "compiled", marks=SLOW),
        pytest.param(cnn, "compiled", marks=SLOW),
        pytest.param(transformer, "compiled", marks=SLOW),  # a module without a length
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_backend_has_the_sums_of_eager(make, backend):
    np.testing.assert_allclose(sums(make, backend), sums(make, "eager"), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["fused", "vmap", *GRAPHS])
def test_batch_norm_may_move_too(backend):
    directions = random_axes(cnn(), norms=True)
    expected = sums(cnn, "eager", directions=directions)
    found = sums(cnn, backend, directions=directions)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    assert abs(expected - sums(cnn, "eager")).max() > 0.01  # they do move


@pytest.mark.parametrize("backend", ["eager", "channels_last", "fused", "vmap", *GRAPHS])
def test_a_step_is_the_checkpoint_itself(backend, tmp_path):
    state = problems.another(cnn().model)
    torch.save(state, tmp_path / "a.pt")
    other = cnn()
    other.model.load_state_dict(state)
    with evaluator(other) as ev:
        expected = ev.centre()[0].mean
    directions = Directions(random_axes(cnn()).axes, (Step("a", tmp_path / "a.pt"),), {})
    with evaluator(cnn(), backend, directions) as ev:
        found = ev.evaluate([SPOTS[1], Spot((0.0, 0.0), 0), SPOTS[2]])[1, 0]
    assert found[2] / found[0] == pytest.approx(expected, rel=1e-5)


def test_audits_are_eager_in_full_precision():
    with evaluator(cnn(), "fused", precision="bfloat16") as ev:
        reduced, audit = ev.evaluate(SPOTS)[..., 2], ev.evaluate(SPOTS, audit=True)[..., 2]
    assert (audit == sums(cnn, "eager")[..., 2]).all()
    assert 0 < abs(reduced - audit).max() < 0.05 * abs(audit).max()


def test_audits_take_whole_batches_where_samples_see_each_other():
    """In pieces a batch norm that keeps no statistics would have others, and be contradicted."""
    auto = {"batch_size": "auto", "batch_norm": "eval"}
    assert piece_of(auto, cnn(), "train", 32) == 8
    assert piece_of({**auto, "batch_norm": "batch"}, cnn(), "train", 32) is None
    problem = cnn()
    problem.model[1].running_mean = problem.model[1].running_var = None
    assert piece_of(auto, problem, "train", 32) is None
    with evaluator(problem, "fused", batch_size="auto") as ev:
        found, audit = ev.evaluate(SPOTS), ev.evaluate(SPOTS, audit=True)
    np.testing.assert_allclose(found, audit, rtol=2e-5, atol=2e-5)


def test_picked_samples_carry_their_weights():
    """The mean over all that could be picked is the variable, though classes weigh unequally."""
    x, y = mlp().data["train"]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0]))
    problem = lsweep.Problem(mlp().model, {"train": (x, y)}, loss=loss)
    names = SimpleNamespace(variable_names=["train_loss"], variables=[("train", "loss")], slices=1)
    with evaluator(problem) as ev:
        offsets = np.array([s.offsets for s in SPOTS])
        found = Picker(ev, names, Stop()).losses("train_loss", np.arange(len(x)), offsets)
        values = ev.evaluate(SPOTS)[:, 0]
    np.testing.assert_allclose(found.mean(1), values[:, 2] / values[:, 0], rtol=1e-6)


# -- sums ----------------------------------------------------------------------------------------


def test_sums_are_those_of_their_definition():
    """With weights that differ between spots, no weight where a value is infinite, and all one."""
    values = numbers(3, 7, seed=1)
    weights = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (3, 7)).astype(float))
    values[1, 2] = torch.inf
    weights[1, 2] = 0.0
    for w in (weights, torch.ones(3, 7), weights[:1].expand(3, 7)):
        spots = [Sampled(v, u) for v, u in zip(values[: len(w)], w, strict=True)]
        centre = Samples.of(spots[0])
        found = Reference(centre).sums(spots).numpy()
        v = np.where(w == 0, 0.0, values)
        d, u = v - v[0], w.numpy()
        with np.errstate(invalid="ignore"):
            terms = [u, u**2, u * v, u**2 * v, u**2 * v**2, u * d, u**2 * d, u**2 * d**2]
        np.testing.assert_allclose(found, np.stack([t.sum(1) for t in terms], 1), rtol=1e-12)


def test_a_number_of_samples_that_changes_is_refused():
    reference = Reference(Samples.of(Sampled(torch.ones(3), torch.ones(3))))
    with pytest.raises(LsweepError, match="gave 2 samples here and 3 at the centre"):
        reference.sums([Sampled(torch.ones(2), torch.ones(2))])


@pytest.fixture
def kinds():
    """Where torch keeps how float32 is multiplied, on a GPU and on a CPU."""
    b = torch.backends
    kinds = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv]
    before = [k.fp32_precision for k in kinds]
    yield kinds
    torch.set_float32_matmul_precision("highest")
    b.fp32_precision = "none"
    for kind, was in zip(kinds, before, strict=True):
        kind.fp32_precision = was


@pytest.mark.parametrize("newer", [False, True], ids=["in the older way", "in the newer way"])
def test_products_are_full_float32_whatever_the_process_has_chosen(kinds, newer):
    """In either of torch's two ways of asking for less; after the sweep that is asked for again."""
    net = nn.Sequential(nn.Linear(512, 256), nn.Linear(256, 4))
    data = {"train": (numbers(256, 512, dtype=SINGLE), labels(256, 4))}
    problem = lsweep.Problem(fixed(net), data, loss=nn.CrossEntropyLoss())

    def chosen():
        return [k.fp32_precision for k in kinds]

    def sums():
        with evaluator(problem, batch_size=256) as ev:
            return ev.evaluate(SPOTS).tobytes(), chosen()

    calm = sums()
    assert calm[1] == ["ieee"] * 5
    if newer:  # which the older cannot even read
        torch.backends.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    else:
        torch.set_float32_matmul_precision("medium")
    before = chosen()
    assert before != calm[1]
    assert sums() == calm
    assert chosen() == before
    with products(tf32=True):
        assert chosen() == ["tf32"] * 3 + ["ieee"] * 2


@COMPILES
def test_native_code_takes_soft_targets_and_labels_in_turn():
    """The first split's loss is the problem's own, the second's is that of native code."""

    def soft_then_hard():
        soft = nn.functional.one_hot(labels(40, 3)).float()
        train, test = ((numbers(n, 4, dtype=SINGLE), y) for n, y in ((40, soft), (9, labels(9, 3))))
        return lsweep.Problem(
            mlp().model, {"train": train, "test": test}, loss=nn.CrossEntropyLoss()
        )

    for spot in SPOTS:
        found, truth = (sums(soft_then_hard, b, [spot])[..., 2] for b in ("native", "eager"))
        np.testing.assert_allclose(found, truth, rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "backend", ["eager", "fused", "vmap", *GRAPHS, pytest.param("native", marks=COMPILES)]
)
def test_a_point_has_its_bits_alone_and_among_others(backend, threads, monkeypatch):
    torch.set_num_threads(threads)
    try:
        spots = [Spot((x / 4, y / 4)) for x in range(-2, 3) for y in range(-2, 2)]
        with evaluator(mlp(), backend) as ev:
            streamed = ev.evaluate(spots)  # the first pass; then the data is resident
            resident = ev.evaluate(spots)
            alone = np.concatenate([ev.evaluate([s]) for s in spots])
        monkeypatch.setattr(supply, "RESIDENT_SHARE", 0.0)
        never = sums(mlp, backend, spots)
    finally:
        torch.set_num_threads(1)
    for other in (resident, alone, never):
        assert other.tobytes() == streamed.tobytes()


@COMPILES
def test_what_overflows_only_in_native_code_is_computed_as_by_eager():
    """Inputs of 1e38: Winograd's transforms overflow, the convolution itself does not."""

    def large():
        net = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.Flatten(), nn.Linear(512, 3, bias=False))
        fixed(net, scale=1e-3)[2].weight.data.mul_(1e-33)
        data = (1e38 * numbers(9, 8, 8, 8).sign().float(), labels(9, 3))
        return lsweep.Problem(net, {"train": data}, loss=nn.CrossEntropyLoss())

    spots, still = [Spot((0.0, 0.0)), Spot((0.1, 0.0))], {}
    for name, p in large().model.named_parameters():
        still[name] = 0.1 * p.detach()
    axes = {a: SimpleNamespace(tensors=still) for a in "xy"}
    found, truth = (
        sums(large, b, spots, directions=Directions(axes, (), {}))[..., 2]
        for b in ("native", "eager")
    )
    assert np.isfinite(truth).all()
    np.testing.assert_allclose(found, truth, rtol=1e-5)


# -- what is not for a problem -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "backend", "options", "why"),
    [
        (mlp, "channels_last", {}, "no two-dimensional convolution"),
        (mlp, "cudagraph", {}, "CUDA graphs need a CUDA device, not cpu"),
        (cnn, "fused", {"batch_norm": "batch"}, "needs the network itself"),
        (cnn, "compiled", {"batch_norm": "recalibrate"}, "changes the network as it runs"),
        (mlp, "native", {"precision": "bfloat16"}, "float32 on a CPU, not bfloat16"),
        (mlp, "fused", {"precision": "float16"}, "float16 is not among its precisions"),
        (mlp, "eagre", {}, "no backend 'eagre'.*eager"),
    ],
)
def test_why_not(make, backend, options, why):
    with pytest.raises(LsweepError, match=why), evaluator(make(), backend, **options):
        pass


def test_a_forward_of_the_users_own_is_the_networks_business():
    def forward(model, batch):
        return {"loss": (model(batch[0]) ** 2).mean(1) + float(model[0].weight.sum())}

    problem = lsweep.Problem(mlp().model, {"train": mlp().data["train"]}, forward=forward)
    with pytest.raises(LsweepError, match="forward= may use anything"), evaluator(problem, "fused"):
        pass


def test_the_settings_know_the_catalogue():
    assert set(settings.BACKENDS) == {"auto", *catalogue.KINDS}
    with pytest.raises(LsweepError, match=r"backend = 'fusd'.*fused"):
        settings.Evaluation(backend="fusd")


# -- the choice ----------------------------------------------------------------------------------


class Lying:
    """Gives every value a thousandth too much."""

    name, together = "channels_last", False

    def __init__(self, builder, ground):
        self._eager = builder.eager

    def values(self, spots, batch, stay=False):
        for found in self._eager.values(spots, batch, stay):
            yield {m: Sampled(1.001 * s.values, s.weights, s.opaque) for m, s in found.items()}


def chosen(problem, points, **options):
    with evaluator(problem, **options) as ev:
        ev.settings["backend"] = options.get("asked", "auto")
        return choose(ev, SPOTS, seconds=1.0, points=points)


def test_a_short_sweep_is_eager_untried():
    assert chosen(cnn(), points=1).record()["tried"] == []
    one_batch = mlp()
    one_batch.splits["train"] = Split("train", [one_batch.data["train"]])
    assert chosen(one_batch, points=50).record()["tried"] == []  # trials would cost a quarter


def test_a_short_sweep_takes_less_than_float32_only_where_that_is_faster(monkeypatch):
    for asked in ("auto", "eager"):
        for near, precision in ((math.inf, "float32"), (0.0, "bfloat16")):  # whatever it takes
            monkeypatch.setattr(choice, "NEAR", near)
            found = chosen(cnn(), points=1, precision="bfloat16", asked=asked)
            assert (found.backend, found.precision) == ("eager", precision)


def test_what_agrees_is_timed_and_what_does_not_says_why(monkeypatch):
    liar = catalogue.Kind(Lying, lambda ground: None)
    monkeypatch.setitem(catalogue.KINDS, "channels_last", liar)
    monkeypatch.setattr(choice, "ENOUGH", math.inf)
    found = chosen(cnn(), points=400)
    tried = {t.backend: t for t in found.tried}
    assert "disagrees with eager by 0.001" in tried["channels_last"].why_not
    assert tried["eager"].seconds > 0 and tried["eager"].error == 0
    assert tried["fused"].seconds > 0 and tried["fused"].error < 2e-5
    assert tried["cudagraph"].why_not and found.backend not in ("channels_last", "cudagraph")
    assert "not tried" in tried["compiled"].why_not
    assert json.loads(json.dumps(found.record()))["backend"] == found.backend
    with pytest.raises(LsweepError, match='backend = "channels_last": disagrees'):
        chosen(cnn(), points=1, asked="channels_last")


@COMPILES
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_beside_native_code_that_is_fast_enough_nothing_is_tried(monkeypatch, precision):
    """What is not tried takes neither time nor memory; eager, the reference, is there anyway."""
    monkeypatch.setattr(choice, "ENOUGH", 0.0)
    found = chosen(cnn(), points=400, precision=precision, batch_size="auto")
    timed_ = {t.kind for t in found.tried if t.seconds}
    assert timed_ == {("native", "float32"), ("eager", precision)}
    kinds = [(t.kind, t.batch_sizes == found.tried[0].batch_sizes) for t in found.tried]
    other = kinds.index((("native", "float32"), False))  # at its best batch size it may be enough
    assert other < kinds.index((("fused", "float32"), True))
    why_not = {t.kind: t.why_not for t in found.tried}
    for kind in (("fused", "float32"), ("fused", precision), ("channels_last", precision)):
        assert "not tried: native is " in why_not[kind]
        assert f"times as fast as eager in {precision}" in why_not[kind]


def test_an_error_at_a_minimum_near_zero_is_not_measured_by_the_rim():
    def at(*means):
        return [Samples(torch.full((4,), m), torch.ones(4), False) for m in means]

    found = list(zip(at(1.02e-5, 8.0, 10.0), at(1e-5, 8.0, 10.0), strict=True))
    error, size = disagreement(found, steps=False)
    assert error == pytest.approx(2e-7 / 8e-3, rel=0.01) and size == pytest.approx(1e-5)
    signs = [Samples(torch.tensor([4.0, -4.0]) + d, torch.ones(2), False) for d in (0.0, 1e-6)]
    assert disagreement([(signs[1], signs[0])], steps=False)[0] < 1e-6
    for a, b in ((1.0, torch.inf), (torch.nan, 1.0)):  # a number in only one of the two
        assert disagreement(list(zip(at(2.0, a), at(2.0, b), strict=True)), steps=False)[0] > 1e9


def test_where_less_is_allowed_float32_competes(monkeypatch):
    """By name, too; and it is float32 to the last bit, not something between."""
    monkeypatch.setattr(choice, "ENOUGH", math.inf)
    for asked in ("auto", "fused"):
        found = chosen(cnn(), points=400, precision="bfloat16", asked=asked)
        fused = {t.precision: t for t in found.tried if t.backend == "fused" and not t.why_not}
        assert fused["float32"].error < 2e-5 < 1e-4 < fused["bfloat16"].error
        fastest = min((t for t in found.tried if t.seconds and not t.why_not
                       and asked in ("auto", t.backend)), key=lambda t: t.seconds)  # fmt: skip
        assert (found.backend, found.precision) == fastest.kind
        assert found.record()["error"] == fastest.error
    assert {t.precision for t in chosen(cnn(), points=400).tried} == {"float32"}
    with evaluator(cnn(), "eager", precision="bfloat16") as ev:
        for backend in ("eager", "channels_last", "fused"):
            ev.use(backend, ev.batch_sizes, "float32")
            assert ev.evaluate(SPOTS).tobytes() == sums(cnn, backend).tobytes()
        with pytest.raises(LsweepError, match="not what the plan permits"):
            ev.use("fused", ev.batch_sizes, "float16")


class LyingLate(Lying):
    """Is right but for samples with a large number: as a graph of a network that branches."""

    lie = 0.1

    def values(self, spots, batch, stay=False):
        late = self.lie * (batch[0].amax(1) > 50)
        for found in self._eager.values(spots, batch, stay):
            yield {m: Sampled(s.values * (1 + late), s.weights, s.opaque) for m, s in found.items()}


def one_late_sample():
    problem = mlp()
    x, y = problem.data["train"]
    x[-1, 0] = 60.0
    return lsweep.Problem(problem.model, {"train": (x, y)}, loss=nn.CrossEntropyLoss())


def narrower_later():
    net = nn.Sequential(nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(3, 3))
    x, y = numbers(24, 1, 12, dtype=SINGLE), labels(24, 3)
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:, :, :9], y[16:])]
    return lsweep.Problem(fixed(net), {"train": batches}, loss=nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("make", "precision", "why"),
    [
        (one_late_sample, "float32", "disagrees with eager by 0.1 on sample 39"),
        (one_late_sample, "float32", "disagrees with eager by 0.002 on sample 39"),
        (one_late_sample, "bfloat16", "disagrees with eager by 0.1 on sample 39"),
        (narrower_later, "float32", "batches differ in more than length"),
        (mlp, "bfloat16", ""),
    ],
)
def test_what_is_wrong_on_later_data_only_is_not_taken(make, precision, why, monkeypatch):
    """On data that the trials have not seen: eager serves, and the device file says why."""
    if make is one_late_sample:
        monkeypatch.setattr(LyingLate, "lie", float(why.split()[4]))
        monkeypatch.setitem(
            catalogue.KINDS, "fused", catalogue.Kind(LyingLate, lambda ground: None)
        )
    with evaluator(make(), precision=precision) as ev:
        ev.settings["backend"] = "auto"
        sizes = dict(ev.batch_sizes)
        trial = Trial("fused", precision, sizes, seconds=1.0, error=0.0)
        picked = Choice(*trial.kind, sizes, (trial,))
        expected = centre_of(ev)
        stands, centre, _ = taken(ev, picked, SPOTS, expected)
        assert stands.backend == ev.backend.name == ("eager" if why else "fused")
        assert why in trial.why_not and bool(why) == bool(trial.why_not)
        assert ev.evaluate(SPOTS).shape == (3, len(ev.names), 8)
        if why:
            assert (centre[0].values == expected[0][0].values).all()
            ev.settings["backend"] = "fused"
            with pytest.raises(LsweepError, match=f'backend = "fused": on all data .*{why}'):
                taken(ev, picked, SPOTS, centre_of(ev))


def test_a_graph_that_is_wrong_in_float32_is_not_taken_in_less(monkeypatch):
    monkeypatch.setitem(catalogue.KINDS, "fused", catalogue.Kind(Lying, lambda ground: None))
    monkeypatch.setattr(choice, "ENOUGH", math.inf)
    found = chosen(cnn(), points=400, precision="bfloat16")
    reasons = [t.why_not for t in found.tried if t.backend == "fused"]
    assert len(reasons) == 2 and all("disagrees with eager by 0.001" in r for r in reasons)


def test_a_precision_in_which_eager_overflows_is_not_taken():
    problem = mlp()
    problem.data["train"][0].mul_(1e5)
    net = problem.model
    large = lsweep.Problem(net, {"train": problem.data["train"]}, loss=nn.CrossEntropyLoss())
    found = chosen(large, points=400, precision="float16")
    assert found.tried[0].kind == ("eager", "float16") and found.tried[0].error is None
    assert found.precision == "float32"
    facts = {
        "device": "cpu",
        "precision": "float16",
        "centre": {},
        "samples": {"train": 40},
        "seconds_per_point": 1.0,
        "memory": 0,
    }
    shown = preflight_line({**facts, "backend": "channels_last", "speed": 1.0, "error": None}, 9)
    assert "(1 times eager's speed, not comparable)" in shown


def test_where_less_precision_is_allowed_the_speed_says_of_which_eager():
    facts = {"device": "cpu", "precision": "float32", "centre": {}, "samples": {"train": 40}}
    facts |= {"seconds_per_point": 1.0, "memory": 0, "backend": "fused", "speed": 3, "error": 1e-7}
    in_both = [
        {"backend": "eager", "precision": "bfloat16", "seconds": 3.0},
        {"backend": "fused", **facts},
    ]
    assert "times eager's speed in bfloat16, off" in preflight_line({**facts, "tried": in_both}, 9)
    alone = [{**in_both[0], "precision": "float32"}, in_both[1]]
    assert "(3 times eager's speed, off by" in preflight_line({**facts, "tried": alone}, 9)


def test_batch_sizes_are_tried_where_they_are_free():
    free = chosen(mlp(), points=400, batch_size="auto")
    assert {t.batch_sizes["train"] for t in free.tried} >= {2048, 20}
    given = chosen(mlp(), points=400)
    assert {t.batch_sizes["train"] for t in given.tried} == {8}


def test_what_was_used_is_told(tmp_path, monkeypatch):
    """A plan that allows bfloat16, computed in float32: obeyed, and said wherever one looks."""
    monkeypatch.setattr(choice, "NEAR", 0.0)  # bfloat16 is faster
    folder = planned(sweep_of_classifier(tmp_path, 'precision = "bfloat16"'), unit_points=2)
    assert worked(folder) == 9
    told = "\n".join(lines(status(folder)))
    surface, report = merge(folder)
    assert "eager in bfloat16, batches of" in told and report.audit["tolerance"] == 0.5
    off = report.audit["largest_relative"]
    assert 1e-6 < off < 0.1 and status(folder)["audit"]["largest_relative"] == off
    said = f"64 weights, backend check: train loss off by up to {off:.1e} (relative) at 3 points"
    assert surface.provenance["caption"].endswith(f"{said} evaluated again by eager in float32.")
    path = folder.all_devices()[0]
    known = {k: v for k, v in read_json(path).items() if k != "sha256"}
    for part in folder.all_parts():
        part.unlink()
    path.unlink()
    with evaluator(problems.classifier(), precision="float32") as ev:
        exact = ev.centre()[0].mean
    centre = known["centre"] | {"train_loss": exact}
    replace(path, sealed(known | {"precision": "float32", "centre": centre}))
    assert worked(folder) == 9
    surface, report = merge(folder)
    assert report.audit["largest_relative"] == 0 and report.audit["tolerance"] == 1e-4
    assert "; float32 (bfloat16 was allowed)" in surface.provenance["caption"]
    assert surface.provenance["numerics"]["precision"] == "float32"
    assert context_of(surface, "train")["precision"] == "float32"
    assert "eager in float32, batches of" in "\n".join(lines(status(folder)))


def test_an_audit_is_judged_by_the_precision_of_its_device_class():
    """The float32 class is wrong by 5e-4; that of bfloat16 beside it is as good as it can be."""
    devices = {"a": {"precision": "float32"}, "b": {"precision": "bfloat16"}}
    plan = SimpleNamespace(evaluate={"precision": "bfloat16"})
    values, audits = np.zeros((2, 3), row_type(1))
    values["device"] = [device_code(name) for name in "abb"]
    values["point"] = [1, 2, 2]
    values["sums"][..., 0], audits["sums"][..., 0] = 1.0, 1.0
    values["sums"][:, 0, 2], audits["sums"][:, 0, 2] = (1.0005, 1.02, 1.01), 1.0
    audits["status"] = Status.OK
    allowed = functools.partial(audit_tolerances, plan, devices)
    found = compared(values, audits, [0], allowed)
    assert (found["points"], found["distinct"]) == (3, 2)
    assert found["largest_relative"] == pytest.approx(0.02) and found["tolerance"] == 1e-4
    assert "a value differs by 5.0e-04 (relative), more than 1e-04" in audit_lines(found)[0]
    assert not audit_lines(compared(values[1:], audits[1:], [0], allowed))
    assert coarsest(plan, {"a": {"precision": "float32"}}) == "float32"
    assert across_classes(coarsest(plan, {**devices, "c": {"precision": "int4"}})) == 0.05


def test_an_audit_compares_the_losses_of_all_splits():
    splits = [("train", "loss"), ("train", "accuracy"), ("test", "loss")]
    names = [f"{split}_{metric}" for split, metric in splits]
    plan = SimpleNamespace(variables=splits, variable_names=names, pointwise={})
    assert audited_variables(plan) == [0, 2]
    values, audits = np.zeros((2, 4), row_type(3))
    audits["status"] = Status.OK
    values["sums"][..., 0], audits["sums"][..., 0] = 1.0, 1.0
    values["sums"][..., 2], audits["sums"][..., 2] = 2.0, 2.0
    values["sums"][:, 1, 2] = 3.0  # an accuracy may jump
    values["sums"][3, 2, 2] = 2.02
    values["sums"][1, 0, 2] = np.nan
    found = compared(values, audits, [0, 2], lambda rows: np.full(len(rows), 1e-4))
    assert (found["points"], found["one_finite"], found["tolerance"]) == (4, 1, 1e-4)
    assert found["largest_relative"] == found["worst_relative"] == pytest.approx(0.01)
    assert found["median_relative"] == 0


def test_an_audit_finds_its_value_however_a_part_is_read():
    rows = np.zeros(30, row_type(1))
    kinds = np.tile([Kind.VALUE] * 4 + [Kind.AUDIT], 6)  # of 4 the second is audited
    units = np.repeat(np.arange(6), 5)
    rows["kind"], rows["status"] = kinds, Status.OK
    rows["point"] = 4 * units + np.tile([0, 1, 2, 3, 1], 6)
    rows["sums"][:, 0, 0], rows["sums"][:, 0, 2] = 1.0, 10.0
    audited = kinds == Kind.AUDIT
    rows["sums"][audited, 0, 2] -= units[audited]
    for size in range(1, 31):
        audits = Audits(1)
        audits.unit = 4  # of a later round
        for start in range(0, 30, size):
            audits.add("a", rows[start : start + size])
            audits.add("b", rows[:0])
        found = audits.compared([0])
        assert (found["points"], found["largest_relative"]) == (6, 1.0)  # 10 and 5


def sweep_of_classifier(folder, evaluate):
    factory = problems.factory_file(folder, "classifier")
    toml = folder / "sweep.toml"
    toml.write_text(
        f'[problem]\nfactory = "{factory}"\n[grid.x]\nrange = [-1.0, 1.0]\ncount = 9\n'
        f"[evaluate]\n{evaluate}\n"
    )
    return toml


def test_a_class_file_that_was_removed_is_made_again_as_its_parts_say(tmp_path):
    toml = sweep_of_classifier(tmp_path, 'precision = "bfloat16"')
    folder = planned(toml, unit_points=2)
    assert worked(folder) == 9
    path = folder.all_devices()[0]
    own = {"backend": "fused", "precision": "bfloat16", "batch_sizes": {"train": 7}}
    own |= {"error": 0.002, "speed": 3.5}
    known = {k: v for k, v in read_json(path).items() if k != "sha256"}
    older = [h5py.File(part, "r+") for part in folder.all_parts()]
    for part in older:  # what older versions wrote tells nothing
        del part.attrs["chosen"]
        part.close()
    replace(path, sealed({**known, **own, "centre": {}}))
    toml.write_text(toml.read_text().replace("count = 9", "count = 17"))
    assert worked(planned(toml)) == 8
    path.unlink()
    toml.write_text(toml.read_text().replace("count = 17", "count = 33"))
    assert worked(planned(toml)) == 16
    assert own.items() <= read_json(path).items()


def test_workers_of_a_class_obey_its_first(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "WORTH", 0.0)
    monkeypatch.setattr(choice, "SHARE", 1e3)
    folder = planned(sweep_of_classifier(tmp_path, ""), unit_points=2)
    assert worked(folder) == 9
    path = folder.all_devices()[0]
    known = read_json(path)
    assert {t["backend"] for t in known["tried"]} >= {"eager", "fused"}
    assert all(t["why_not"] for t in known["tried"] if t["seconds"] is None)
    values = {int(r["point"]): r["sums"].tobytes() for p in committed(folder).parts for r in p.rows}
    for part in folder.all_parts():
        part.unlink()
    assert worked(folder) == 9
    again = {int(r["point"]): r["sums"].tobytes() for p in committed(folder).parts for r in p.rows}
    assert again == values
    for part in folder.all_parts():
        part.unlink()
    older = {k: v for k, v in known.items() if k not in ("sha256", "precision")}
    replace(path, sealed(older))
    assert worked(folder) == 9  # in the plan's precision, as it was computed then
    assert "in float32, batches of" in "\n".join(lines(status(folder)))
    assert merge(folder)[0].provenance["numerics"]["precision"] == "float32"
    shown = io.StringIO()
    Display(folder, 9, 0, shown)._say_preflight()
    assert f"{known['backend']} in float32" in shown.getvalue()
    for part in folder.all_parts():
        part.unlink()
    changed = older | {"backend": "cudagraph"}
    replace(path, sealed(changed))
    refused = worked(folder)
    assert isinstance(refused, Raised) and refused.kind == "LsweepError"
    assert "cannot build the backend 'cudagraph'" in refused.text


@COMPILES
def test_what_decides_bits_on_a_cpu_tells_device_classes_apart(monkeypatch):
    """The compiler that native code is made with, its options, and what libraries are told."""
    monkeypatch.setattr(machine, "compiler", machine.compiler.__wrapped__)  # asked each time
    names = [device_class(torch.device("cpu"))]
    for key, value in (("CXX", "c++"), ("CXX", "c++ -O1"), ("ATEN_CPU_CAPABILITY", "default")):
        monkeypatch.setenv(key, value)
        names.append(device_class(torch.device("cpu")))
    assert names[0] == names[1] and len(set(names)) == 3


# -- memory --------------------------------------------------------------------------------------

MEMORY = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
import lsweep
from lsweep.axes.directions import Directions
from lsweep.backends.packed import Spot
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.picking import Picker
from lsweep.evaluating.pieces import piece_of

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

layers = [nn.Linear(4096, 4096, bias=False), nn.BatchNorm1d(4096), nn.ReLU(), nn.Linear(4096, 3)]
net = nn.Sequential(*layers)  # 64 MiB of weights
data = {"train": (torch.randn(32, 4096), torch.arange(32) % 3)}
problem = lsweep.Problem(net.eval(), data, loss=nn.CrossEntropyLoss())
asked = {"metrics": ["loss"], "splits": ["train"], "slices": 1, "batch_size": 32,
         "precision": "float32", "batch_norm": "eval", "backend": "fused"}
axes = {a: {n: torch.randn_like(p) for n, p in net.named_parameters() if p.dim() > 1} for a in "xy"}
made = Directions({a: SimpleNamespace(tensors=t) for a, t in axes.items()}, (), {})
del axes
problem.check_mean(data["train"])
assert "sympy" not in sys.modules  # 36 MiB, of which torch imports all where shapes are broadcast
before, weights = peak(), sum(p.numel() for p in net.parameters()) * 4 / 1024
with Evaluator(problem, asked, made, torch.device("cpu"), own=True) as ev:
    ev.use("fused", ev.batch_sizes)
    spots = [Spot((1.0, -0.5)), Spot((0.0, 0.0))]
    first, audit = ev.evaluate(spots), ev.evaluate(spots, audit=True)
    assert (ev.evaluate(spots) == first).all()
    assert abs(first[..., 2] / audit[..., 2] - 1).max() < 1e-5
print((peak() - before) / weights)
"""


def test_a_folded_network_takes_no_rows_of_its_own():
    """Origin, two directions and a point lie beside what they are made from: 7 times its weights.

    Three of them are there before, and let go of before the weights of a point are folded.
    """
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert 3.5 < float(found.stdout) < 4.3


HOLES = """
import contextlib
import sys
from pathlib import Path
from lsweep.hosts.machine import large_apart

def held():
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024

large = b"x" * 2**23
del large  # from now on glibc's own threshold is as large
for apart in (large_apart(), contextlib.nullcontext()):
    with apart:
        loaded = [b"x" * (2**20 + i) for i in range(32)]
        before = held()
        del loaded[::2]
        print(before - held())
        del loaded
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_what_loading_lets_go_of_leaves_no_holes():
    """Every other piece of a few is let go of: the heap keeps their memory, mapped ones do not."""
    script = [sys.executable, "-c", HOLES]
    found = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    apart, kept = map(float, found)
    assert kept < 0.2 * apart
