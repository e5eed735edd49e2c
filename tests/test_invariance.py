"""The certificate says of each rescaling whether the network survives it, and of the picture too.

Promises: what is exact in theory is exact, what is broken in theory is broken, and the gradient's
test agrees with the finite one; a gauge-free picture of a ReLU network is not invariant and is said
not to be; attention's GL(d) maps are followed by no normalisation; what could not be followed is
untested and never called invariant; a run keeps its certificate, and its caption tells of it.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import fixed, labels, numbers
from tiny import PROBLEM, lsweep, write_sweep
from torch import nn

from lsweep import Problem
from lsweep.invariance.bench import bench, few, inputs_of
from lsweep.invariance.certificate import certify
from lsweep.invariance.defect import Picture, certified_kinds, defects
from lsweep.invariance.equivalences import candidates
from lsweep.invariance.gauge import gauge_of
from lsweep.invariance.rescaling import RESCALES, Slab, Transform, acted, random_element
from lsweep.invariance.symmetries import discover
from lsweep.merging.opening import open_surface
from lsweep.outcomes.certified import Certificate, invariance_measures, notes, read, words
from lsweep.plans.plan import Plan
from lsweep.plans.settings import Settings
from lsweep.problems.weights import parameters_of
from lsweep.storage.folder import RunFolder

CPU = torch.device("cpu")
SAMPLES = 32


class Attention(nn.Module):
    """Two heads of width 3 and a gated MLP, in a stream that begins with a layer of its own."""

    def __init__(self, normed: bool = False) -> None:
        super().__init__()
        self.into, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)
        self.norm = nn.RMSNorm(3, eps=1e-12) if normed else nn.Identity()

    def forward(self, x):
        steps = torch.linspace(0.5, 1.5, 4, dtype=x.dtype)[:, None]
        y = self.into(x[:, None] * steps)
        q, k, v = (m(y).unflatten(2, (2, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = F.softmax(self.norm(q) @ k.transpose(-1, -2), -1)
        y = y + self.o((weights @ v).transpose(1, 2).flatten(2))
        y = y + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(y.mean(1))


def mlp(activation, norm=None):
    layers = [nn.Linear(4, 6), activation(), nn.Linear(6, 3)]
    if norm is not None:
        layers.insert(1, norm(6))
    model = fixed(nn.Sequential(*layers).double())
    if norm is nn.BatchNorm1d:
        model.train()
        for _ in range(100):  # statistics that fit the data, as after training
            model(data()["train"][0])
    return model.eval()


def data():
    return {"train": (numbers(SAMPLES, 4, seed=1), labels(SAMPLES, 3))}


def problem(model):
    return Problem(model, data(), loss=nn.CrossEntropyLoss())


@functools.cache  # a network is traced once
def attention(normed=False):
    model = fixed(Attention(normed).double())
    return model, *certified(model)


def certified(model):
    """All candidates of a network, and what was found of each."""
    given = problem(model)
    found = discover(model, inputs_of(given, "loss"))
    transforms = candidates(found, parameters_of(model))
    rows, *_ = certify(few(given, "train", SAMPLES, CPU), transforms, "loss", CPU)
    return transforms, rows


# -- what holds ------------------------------------------------------------------------------------

PAIR = {"neuron rescaling": "exact", "layer rescaling": "exact", "sign flip": "broken"}
NONE = dict.fromkeys(PAIR, "broken")
ORDER = {"unit permutation": "exact"}
BEHIND = PAIR | ORDER  # a norm's own weights, against the columns that read them
HOLDS = {
    "ReLU": (lambda: mlp(nn.ReLU), PAIR | ORDER),
    "LeakyReLU": (lambda: mlp(nn.LeakyReLU), PAIR | ORDER),
    "no activation": (lambda: mlp(nn.Identity), PAIR | ORDER | {"sign flip": "exact"}),
    "Tanh": (lambda: mlp(nn.Tanh), NONE | ORDER | {"sign flip": "exact"}),
    "GELU": (lambda: mlp(nn.GELU), NONE | ORDER),
    "SiLU": (lambda: mlp(nn.SiLU), NONE | ORDER),
    "Softplus": (lambda: mlp(nn.Softplus), NONE | ORDER),
    "ELU": (lambda: mlp(nn.ELU), NONE | ORDER),
    "batch norm": (
        lambda: mlp(nn.ReLU, nn.BatchNorm1d),
        BEHIND
        | {
            "filter scale, statistics left": "broken",
            "filter scale, statistics carried": "up to eps",
            "filter scale, batch statistics": "up to eps",
        },
    ),
    "layer norm": (
        lambda: mlp(nn.ReLU, nn.LayerNorm),
        BEHIND
        | {"filter scale before the norm": "broken", "layer scale before the norm": "up to eps"},
    ),
}
VALUES = {"value-output scale": "exact", "value-output map": "exact"}
GATED = {"up/down rescaling": "exact", "gate/down rescaling": "broken"}
HEADS = {
    "attention": (
        lambda: attention(),
        {"query-key scale": "exact", "query-key map": "exact", "query scale alone": "broken"},
    ),
    "QK-norm": (
        lambda: attention(normed=True),
        {"query-key scale": "broken", "query-key map": "broken", "query scale alone": "exact"},
    ),
}


def verdicts(rows, skipped=()):
    return {r.transform: r.verdict for r in rows if r.transform not in skipped}


@pytest.mark.parametrize("name", HOLDS)
def test_what_holds_for_hidden_units(name):
    make, wanted = HOLDS[name]
    transforms, rows = certified(make())
    assert verdicts(rows) == wanted
    by_gradient_as_by_factors(transforms, rows)


@pytest.mark.parametrize("name", HEADS)
def test_what_holds_for_attention_and_gated_units(name):
    make, wanted = HEADS[name]
    _, transforms, rows = make()
    found = {(r.transform, r.layer[:1]): r.verdict for r in rows}
    for kind, verdict in {**wanted, **VALUES, **GATED}.items():
        assert [v for (k, _), v in found.items() if k == kind] == [verdict], kind
    assert found["sign flip", "g"] == "exact"  # of the linear branch
    by_gradient_as_by_factors(transforms, rows)


def by_gradient_as_by_factors(transforms, rows):
    """Two routes: the gradient is orthogonal to the orbit exactly where finite factors hold."""
    for t, r in zip(transforms, rows, strict=True):
        if t.act not in RESCALES or r.verdict == "untested":
            assert r.residual is None
        elif r.verdict == "exact":
            assert r.residual < 1e-12 and r.error < 1e-12 and r.error32 < 1e-5
        elif r.verdict == "up to eps":
            assert r.residual < 1e-3 and r.error < 1e-2
        else:
            assert r.residual > 1e-2 and r.error > 1e-2


def test_a_certificate_leaves_the_network_as_it_was():
    model = mlp(nn.ReLU, nn.BatchNorm1d)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    certified(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_elements_do_to_weights_what_the_books_say():
    model, transforms, _ = attention()
    state = {n: p.detach() for n, p in model.named_parameters()}
    qk, vo = (
        next(t for t in transforms if t.kind == kind)
        for kind in ("query-key map", "value-output map")
    )
    chance = np.random.Generator(np.random.Philox(5))
    for t in (qk, vo):
        element = random_element(t, chance)
        there = acted(state, t, element)
        for h, a in enumerate(element):
            head = slice(3 * h, 3 * h + 3)
            size = torch.linalg.svdvals(a)
            assert size.min() >= 1 / 3 - 1e-9 and size.max() <= 3 + 1e-9
            if t is qk:
                torch.testing.assert_close(there["q.weight"][head], a @ state["q.weight"][head])
                inverse = torch.linalg.inv(a).T
                torch.testing.assert_close(there["k.bias"][head], inverse @ state["k.bias"][head])
            else:
                torch.testing.assert_close(there["v.bias"][head], a @ state["v.bias"][head])
                o = state["o.weight"][:, head] @ torch.linalg.inv(a)
                torch.testing.assert_close(there["o.weight"][:, head], o)
        assert set(there) == ({"q.weight", "q.bias", "k.weight", "k.bias"} if t is qk else
                              {"v.weight", "v.bias", "o.weight"})  # fmt: skip


def test_gradients_of_batch_norm_statistics_are_those_of_finite_differences():
    given = few(problem(mlp(nn.ReLU, nn.BatchNorm1d)), "train", SAMPLES, CPU)
    with bench(given, "loss", CPU, torch.float64) as b:
        probe = torch.Generator().manual_seed(1)  # the first of those that the bench draws
        u = torch.randn(SAMPLES, 3, generator=probe, dtype=torch.float64)
        gradient = b.gradients("eval")[0]
        for name in ("1.running_mean", "1.running_var"):
            for i in range(2):
                ends = []
                for step in (1e-5, -1e-5):
                    b.tensors[name][i] += step
                    ends.append(float((b.look()[0] * u.flatten()).sum()))
                    b.tensors[name][i] -= step
                slope = (ends[0] - ends[1]) / 2e-5
                assert float(gradient[name][i]) == pytest.approx(slope, rel=1e-6)


def test_the_noise_floor_is_that_of_another_order_and_other_pieces():
    """Sums in another order differ in float32 and stay below what counts as exact."""
    model = fixed(nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3)).double())
    with bench(few(problem(model), "train", SAMPLES, CPU), "loss", CPU, torch.float32) as b:
        assert b.noise() < 2e-6
        leaky = model[1]
        model[1] = nn.Dropout(0.5).train()  # something that depends on more than a sample
        assert b.noise() > 0.1
        model[1] = leaky


def test_where_samples_depend_on_each_other_nothing_is_called_exact():
    """The noise floor of such a network is as large as a broken transform's error."""

    class Shared(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            if self.finite:
                return y / (1 + y.std(0, correction=0))
            return y * (1 if len(x) == SAMPLES else nan)

    nan = float("nan")
    for finite, why in ((True, "output changes by"), (False, "is not always finite")):
        model = Shared(*mlp(nn.Tanh))
        model.finite = finite
        _, rows = certified(model)
        assert {r.verdict for r in rows} == {"untested"} and all(why in r.note for r in rows)


@pytest.mark.parametrize(("size", "why"), [(0.0, "no gradient reaches"), (1e-14, "too small")])
def test_weights_that_the_output_hardly_sees_are_untested(size, why):
    """In front of zeros, or nearly, whatever is done to a tanh leaves the output as it is."""
    model = mlp(nn.Tanh)
    with torch.no_grad():
        model[2].weight.mul_(size)
    _, rows = certified(model)
    found = {r.transform: (r.verdict, r.note) for r in rows}
    for kind in ("neuron rescaling", "layer rescaling"):
        assert found[kind][0] == "untested" and why in found[kind][1], found
    assert (found["sign flip"][0] == "untested") == (size == 0)  # else it is exact indeed


def test_what_survives_one_factor_is_tried_with_the_others():
    """x (1 + sin(2π log₂|x|) / 2) doubles exactly where x does, and is no ray."""

    class Octaves(nn.Module):
        def forward(self, x):
            return x * (1 + torch.sin(2 * torch.pi * torch.log2(x.abs())) / 2)

    there = torch.arange(6)[:, None]
    slabs = (Slab("0.weight", 0, there), Slab("0.bias", 0, there), Slab("2.weight", 1, there, -1.0))
    pair = Transform("0 -> 2", "neuron rescaling", (slabs,))
    given = few(problem(mlp(Octaves)), "train", SAMPLES, CPU)
    ((row,), *_) = certify(given, [pair], "loss", CPU)
    assert (row.verdict, row.factor) == ("approximate", 3.0) and row.residual > 1e-2


def test_of_large_outputs_the_same_numbers_of_each_sample_are_kept(monkeypatch):
    given = few(problem(mlp(nn.ReLU)), "train", SAMPLES, CPU)
    with bench(given, "loss", CPU, torch.float64) as b:
        whole = b.look()[0].reshape(SAMPLES, 3)
    monkeypatch.setattr("lsweep.invariance.bench.MOST_KEPT", 2 * SAMPLES + 5)
    with bench(given, "loss", CPU, torch.float64) as b:
        kept = b.look()[0].reshape(SAMPLES, 2)
        assert sum(torch.equal(kept, whole[:, pair]) for pair in ([0, 1], [0, 2], [1, 2])) == 1
        assert b.noise() < 1e-12  # samples in another order lose the same numbers
    _, rows = certified(mlp(nn.ReLU))
    assert verdicts(rows) == PAIR | ORDER


# -- what cannot be followed -----------------------------------------------------------------------


class Opaque(nn.Module):
    """A network that looks at its numbers, so that no graph can be made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y) if float(y.sum()) >= 0 else self.b(-y)


def test_what_is_not_followed_is_untested_and_never_invariant():
    transforms, rows = certified(fixed(Opaque().double()))
    assert {r.verdict for r in rows} == {"untested"} and all(r.note for r in rows)
    assert [t.layer for t in transforms] == ["-", "a", "b"]
    assert "does not trace" in rows[0].note
    assert certified_kinds(transforms, rows, "eval") == {}


# -- the picture -----------------------------------------------------------------------------------


def defect_of(model, transforms, rows, normalize="filter", gauge="none", batch_norm="eval"):
    table = {
        "problem": {"factory": "live:problem"},
        "grid": {a: {"range": [-1, 1], "count": 5} for a in ("x", "y")},
        "directions": {"normalize": normalize, "gauge": gauge},
        "evaluate": {"batch_norm": batch_norm},
    }
    settings = Settings.from_table(table)
    evaluate = {"batch_norm": batch_norm, "metrics": ["loss"], "batch_size": 128}
    picture = Picture(
        few(problem(model), "train", SAMPLES, CPU),
        settings,
        evaluate,
        Path(),
        CPU,
        torch.float64,
        gauge_of(transforms, rows) if gauge == "equi" else None,
    )
    found = defects(picture, certified_kinds(transforms, rows, batch_norm))
    return {d.transform: d.largest for d in found}


# normalisation, gauge -> what follows neurons, what follows layers
PICTURES = [
    ("none", "none", False, False),
    ("layer", "none", False, True),
    ("filter", "none", False, True),
    ("weight", "none", True, True),
    ("filter", "equi", True, True),
]


@pytest.mark.parametrize(("normalize", "gauge", "neurons", "layers"), PICTURES)
def test_pictures_of_equivalent_relu_networks(normalize, gauge, neurons, layers):
    model = mlp(nn.ReLU)
    found = defect_of(model, *certified(model), normalize, gauge)
    for kind, same in (("neuron rescaling", neurons), ("layer rescaling", layers)):
        assert found[kind] < 1e-9 if same else found[kind] > 0.05, kind


def test_pictures_of_a_network_with_batch_norm():
    model = mlp(nn.ReLU, nn.BatchNorm1d)
    tested = certified(model)
    for mode in ("eval", "batch", "recalibrate"):
        plain, fixed_ = (
            defect_of(model, *tested, gauge=g, batch_norm=mode) for g in ("none", "equi")
        )
        (kind,) = [k for k in plain if k.startswith("filter scale")]
        assert kind.endswith("carried" if mode == "eval" else "batch statistics")
        assert plain[kind] < 1e-3 and fixed_[kind] < 1e-3  # up to eps
        assert plain["neuron rescaling"] > 0.05 and fixed_["neuron rescaling"] < 1e-9


SCALES = ("query-key scale", "value-output scale", "up/down rescaling")


def test_no_normalisation_follows_the_maps_of_attention():
    model, transforms, rows = attention()
    wanted = ("query-key map", "value-output map", *SCALES)
    both = [(t, r) for t, r in zip(transforms, rows, strict=True) if t.kind in wanted]
    for normalize, gauge in (
        ("filter", "none"), ("layer", "none"), ("weight", "none"), ("filter", "equi")
    ):  # fmt: skip
        found = defect_of(model, *zip(*both, strict=True), normalize, gauge)
        assert min(found["query-key map"], found["value-output map"]) > 1e-2
        if gauge == "equi":  # its scales it does follow
            assert max(found[k] for k in SCALES) < 1e-9


# -- the command -----------------------------------------------------------------------------------

RELU = PROBLEM.replace("nn.Tanh()", "nn.ReLU()")


def test_a_run_keeps_its_certificate_and_its_caption_tells(tmp_path, capsys):
    toml = write_sweep(tmp_path, problem=RELU)
    folder = RunFolder(tmp_path / "sweep.run")
    assert lsweep("invariance", toml, "--samples", 8) == 0  # before there is a run
    out, err = capsys.readouterr()
    assert "wrote" not in out and not folder.root.exists()
    row = next(s for s in out.splitlines() if "neuron rescaling" in s)
    assert row.split()[:6] == ["0", "->", "2", "neuron", "rescaling", "exact"]
    assert "justified for 1 of 2 layers" in out and 'gauge = "equi" would' in out
    assert "c: factor with" in out and max(map(len, out.splitlines())) <= 110
    assert err.startswith("lsweep: plane invariance defect") and err.count("\n") == 1
    assert lsweep("run", toml, "--on", "inline", "--no-picture") == 0
    plan = Plan.read(folder).digest
    assert notes(folder, plan) == [] and invariance_measures(folder, plan) == []
    assert "invariance" not in open_surface(folder.root).provenance["caption"]
    for source in (toml, folder.root):
        assert lsweep("invariance", source) == 0
        assert f"wrote {folder.invariance}" in capsys.readouterr().out
        found = read(folder, plan)
        assert found is not None and found.defect > 0.05
        folder.invariance.unlink() if source == toml else None
    caption = open_surface(folder.root).provenance["caption"]
    assert words(found) in caption and words(found).endswith("gives another picture")
    whole, *parts, share = invariance_measures(folder, plan)
    assert (whole.name, whole.value) == ("plane_invariance_defect", found.defect)
    assert {p.name for p in parts} == {
        "plane_invariance_defect@neuron_rescaling",
        "plane_invariance_defect@layer_rescaling",
    }
    assert (share.name, share.value) == ("layers_followed", 0.5)
    assert share.note == "1 of 2 layers; see 'lsweep invariance'"
    assert {"samples", "seed", "normalize", "batch_norm", "train_loss"} <= set(whole.context)
    assert read(folder, "another plan") is None
    damaged = folder.invariance.read_bytes().replace(b"neuron", b"neutron")
    folder.invariance.write_bytes(damaged)
    assert notes(folder, plan) == []  # a picture can do without it
    capsys.readouterr()
    assert lsweep("verify", folder.root) == 1
    assert "invariance.json is damaged" in capsys.readouterr().err


def test_a_certificate_for_programs(tmp_path, capsys):
    toml = write_sweep(tmp_path, problem=RELU)
    assert lsweep("invariance", toml, "--json", "--set", "directions.gauge=equi") == 0
    out, err = capsys.readouterr()
    table = json.loads(out)
    assert err == "" and table["defect"] < 1e-3 and table["context"]["gauge"] == "equi"
    assert Certificate.from_json(table).rows[0].verdict == "exact"
    assert lsweep("invariance", toml, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r["verdict"] for r in rows] == ["exact", "exact", "broken", "exact"]


def test_a_wrong_question_is_one_line(tmp_path, capsys):
    toml = write_sweep(tmp_path, problem=RELU)
    for arguments, code, text in (
        ((tmp_path / "no.toml",), 1, "cannot read"),
        ((toml, "--samples", 1), 2, "1 is less than 2"),
        ((toml, "--json", "--csv"), 2, "not allowed with"),
        ((toml, "--device", "abacus"), 1, "no device 'abacus'"),
        ((toml, "--set", "evaluate.splits=[]"), 1, "splits = []"),
    ):
        assert lsweep("invariance", *arguments) == code
        err = capsys.readouterr().err
        assert text in err and err.count("\n") == 1, err


def test_a_network_without_rescalings_is_told_so(tmp_path, capsys):
    assert lsweep("invariance", write_sweep(tmp_path)) == 0  # tanh
    out, err = capsys.readouterr()
    words = " ".join(out.split())
    assert (
        "in 2 no rescaling leaves the network unchanged, so there it is a choice of units" in words
    )
    assert "no equivalent network was compared" in out and "invariant" not in out and err == ""


def test_a_forward_that_never_calls_its_network_is_untested(tmp_path, capsys):
    code = """\
import torch
from torch import nn
import lsweep


def make(width=3):
    def forward(model, batch):
        return {"loss": (batch @ model.weight.T).square().sum(1), "accuracy": batch[:, 0]}

    model = nn.Linear(2, 3)
    nn.init.ones_(model.weight), nn.init.ones_(model.bias)
    data = {"train": torch.ones(4, 2), "test": torch.ones(4, 2)}
    return lsweep.Problem(model, data, forward=forward)
"""
    assert lsweep("invariance", write_sweep(tmp_path, problem=code)) == 0
    out = capsys.readouterr().out
    assert "forward= never calls the network itself" in out and "1 could not be tested" in out
