"""directions, filters, vectors, trajectory, weights: what a direction is, number by number.

Promises: a filter is what enters one output unit, and a filter-normalised direction has the norms
of the filters; random numbers depend on (seed, axis, name) alone; checkpoints are reached where
they should be and projected by least squares; a PCA is that of numpy, beside its null; checkpoints
of every usual format are read, and nothing in them is executed.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from problems import another, at, fixed, numbers, toward
from torch import nn

import lsweep
from lsweep.axes.directions import make_directions
from lsweep.axes.noise import random_tensor
from lsweep.axes.trajectory import project, random_walk_null
from lsweep.axes.vectors import Origin, dot
from lsweep.errors import DamagedFile, LsweepError
from lsweep.plans.settings import Settings
from lsweep.problems.weights import canonical_name
from lsweep.surfaces.reference import write_reference_directions


def made(model, base=".", axes="x", **recipe):
    """The directions of a recipe; ``x={...}`` gives an axis its own."""
    grid = {a: {"range": [-1, 1], "count": 3} for a in axes}
    table = {"problem": {"factory": "live:problem"}, "grid": grid, "directions": recipe}
    return make_directions(Settings.from_table(table, "test"), Origin.of(model), Path(base))


def direction(model, base=".", **recipe):
    return made(model, base, **recipe).axes["x"]


def flat(tensors):
    return torch.cat([t.double().flatten() for _, t in sorted(tensors.items())]).numpy()


# -- filters -------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Hugging Face's: a linear layer that stores [in, out]."""

    def __init__(self, out, inputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(inputs, out)),
            nn.Parameter(torch.ones(out)),
        )

    def forward(self, x):
        return x @ self.weight + self.bias


# layer, shape of an input, dimension of the output's units: and why the row is here
LAYERS = [
    (nn.Linear(4, 3), (1, 4), 1),
    (nn.Conv1d(3, 4, 2), (1, 3, 5), 1),
    (nn.Conv2d(3, 4, (2, 3)), (1, 3, 5, 5), 1),
    (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 1),  # a filter sees half of the channels
    (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 5), 1),  # depthwise
    (nn.ConvTranspose1d(3, 4, 2), (1, 3, 5), 1),  # stored [in, out]: dimension 1
    (nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 4, 4), 1),  # [in, out/groups]: 3 per group
    (nn.ConvTranspose2d(4, 4, 2, groups=4), (1, 4, 4, 4), 1),
    (nn.ConvTranspose3d(2, 4, 2, groups=2), (1, 2, 3, 3, 3), 1),
    (nn.Bilinear(3, 4, 5), None, 1),  # three dimensions, and no convolution
    (Conv1D(5, 3), (1, 3), 1),
]


@pytest.mark.parametrize(("layer", "shape", "dim"), LAYERS, ids=[str(r[0]) for r in LAYERS])
def test_filter_is_what_enters_one_output_unit(layer, shape, dim):
    """Which weights enter unit j is asked of autograd, not of the shape."""
    fixed(layer)
    inputs = (numbers(1, 3).float(), numbers(1, 4).float()) if shape is None else ()
    inputs = inputs or (numbers(*shape).float().abs() + 0.1,)
    d = direction(layer).tensors["weight"]
    assert list(direction(layer).tensors) == ["weight"]  # the bias stays
    out = layer(*inputs)
    claimed = torch.zeros_like(d)
    for j in range(out.shape[dim]):
        (g,) = torch.autograd.grad(out.select(dim, j).sum(), layer.weight, retain_graph=True)
        mine = g != 0
        claimed += mine
        assert float(d[mine].norm()) == pytest.approx(
            float(layer.weight[mine].norm().detach()), 1e-5
        )
    assert (claimed == 1).all()  # each weight in exactly one filter
    cosine = F.cosine_similarity(d.flatten(), layer.weight.detach().flatten(), dim=0)
    assert abs(cosine) < 0.9  # random, not the weights themselves


# module, parameter: its units are its rows
ROWS = [
    (nn.Embedding(7, 4), "weight"),  # one token
    (nn.LSTM(3, 4), "weight_ih_l0"),  # one gate of one cell
    (nn.GRU(3, 4), "weight_hh_l0"),
    (nn.MultiheadAttention(4, 2), "in_proj_weight"),  # one row of the fused q, k, v
]


@pytest.mark.parametrize(("module", "name"), ROWS, ids=[str(r[0]) for r in ROWS])
def test_rows_are_the_filters_of_embeddings_gates_and_fused_projections(module, name):
    fixed(module)
    d, w = direction(module).tensors[name], dict(module.named_parameters())[name]
    assert w.shape[0] > 1
    torch.testing.assert_close(d.norm(dim=1), w.detach().norm(dim=1))


def test_tied_weights_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    assert list(direction(fixed(Tied())).tensors) == ["embed.weight"]


def net():
    """Every kind of parameter that `ignore` tells apart."""

    class RMSNorm(nn.Module):
        """Somebody's own: known by its name."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 3))

    return fixed(
        nn.Sequential(
            OrderedDict(
                first=nn.Linear(4, 6),
                norm=nn.BatchNorm1d(6),
                plane=nn.LayerNorm([6, 2]),  # its weight has two dimensions
                group=nn.GroupNorm(2, 6),
                own=RMSNorm(),
                last=nn.Linear(6, 3),
                gate=nn.PReLU(),
            )
        ).double()
    )


def test_bias_and_norm_are_ignored_by_default_for_random_and_are_listed():
    d = direction(net())
    moved = {"first.weight", "last.weight"}
    assert set(d.tensors) == moved
    assert set(d.ignored) == {n for n, _ in net().named_parameters()} - moved
    assert len(d.ignored) == 10
    s = lsweep.sweep(problems.normalized(), x=(-1, 1, 3))
    listed = s.provenance["plan"]["facts"]["axes"]["x"]["ignored"]
    assert listed == ["0.bias", "1.weight", "1.bias", "3.bias", "4.weight", "4.bias"]
    assert "bias+norm ignored" in s.provenance["caption"]


def test_what_is_not_ignored_is_random_a_vector_as_one_filter():
    """The reference copies such a tensor into its direction; here it is random like the rest."""
    model = net()
    d = direction(model, ignore="none")
    assert not d.ignored
    for name, p in model.named_parameters():
        w, v = p.detach(), d.tensors[name]
        assert v.shape == w.shape
        if w.dim() <= 1:
            assert float(v.norm()) == pytest.approx(float(w.norm()), rel=1e-8), name
        if w.numel() > 5:  # three numbers may point anywhere
            assert abs(float(F.cosine_similarity(v.flatten(), w.flatten(), dim=0))) < 0.99, name


def test_a_scalar_parameter_keeps_its_shape():
    """It is one filter of one number; the arithmetic of projections must not stumble over it."""

    class Gain(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.gain = nn.Parameter(torch.tensor(2.0))

    model = fixed(Gain()).double()
    d = made(model, axes="xy", ignore="none", orthogonalize=True)
    assert d.axes["x"].tensors["gain"].shape == d.axes["y"].tensors["gain"].shape == ()
    found = project(Origin.of(model).everything, Origin.of(model), d.axes)
    assert found.offsets == (0.0, 0.0) and found.residual == 0.0


def test_layer_weight_and_none():
    model = net()
    w = {n: p.detach() for n, p in model.named_parameters()}
    noise = direction(model, normalize="none").tensors
    layer = direction(model, normalize="layer").tensors
    element = direction(model, normalize="weight").tensors
    for n, d in noise.items():
        assert torch.equal(d, random_tensor(0, "x", n, w[n]))
        assert float(layer[n].norm()) == pytest.approx(float(w[n].norm()), rel=1e-9)
        assert float(F.cosine_similarity(layer[n].flatten(), d.flatten(), 0)) == pytest.approx(1)
        assert torch.equal(element[n], d * w[n])


def test_patterns_choose_what_moves():
    assert set(direction(net(), parameters=["last.*"]).tensors) == {"last.weight"}
    both = direction(net(), parameters=["last.*", "first.*"], ignore="none")
    assert set(both.tensors) == {f"{a}.{b}" for a in ("first", "last") for b in ("weight", "bias")}
    with pytest.raises(
        LsweepError, match=r"layer9.*leaves nothing to move; names are like first\."
    ):
        direction(net(), parameters=["layer9.*"])


def test_filters_of_norm_zero_stay_and_are_counted():
    model = fixed(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[1:3] = 0
    d = direction(model)
    assert d.zero_filters == 2
    assert (d.tensors["0.weight"].norm(dim=1) == 0).tolist() == [False, True, True, False]
    data = {"train": (numbers(5, 3), torch.zeros(5, dtype=torch.long))}
    s = lsweep.sweep(lsweep.Problem(model, data, loss=nn.CrossEntropyLoss()), x=(-1, 1, 3))
    assert "filters of norm zero: 2" in s.provenance["caption"]
    with torch.no_grad():
        model[0].weight.zero_(), model[2].weight.zero_()
    with pytest.raises(LsweepError, match="the direction x is zero"):  # LoRA at its beginning
        direction(model)


# -- random numbers ------------------------------------------------------------------------------


def test_random_numbers_are_pinned():
    """Written down once: a run must mean the same next year, on any machine and any torch."""
    pinned = {
        (0, "x", "w"): [-0.346599226659735, -0.3729744048388331, -1.6209687641411366],
        (0, "y", "w"): [-0.7563207098896034, -1.0091932112033448, 0.22761251224661652],
        (1, "x", "layer1.0.conv.weight"): [
            0.1692240210647209,
            -0.4584120013710163,
            -0.376137248073846,
        ],
    }
    for key, wanted in pinned.items():
        assert random_tensor(*key, torch.zeros(3).double()).tolist() == wanted
        rounded = np.array(wanted, np.float32).tolist()
        assert random_tensor(*key, torch.zeros(3)).tolist() == rounded
        assert random_tensor(*key, torch.zeros(3, dtype=torch.bfloat16)).tolist() == rounded


def test_random_numbers_are_normal_and_independent_of_each_other():
    a, b = (random_tensor(0, axis, "w", torch.zeros(40000).double()) for axis in "xy")
    assert abs(float(a.mean())) < 0.02 and float(a.var()) == pytest.approx(1, abs=0.03)
    assert float((a**4).mean()) == pytest.approx(3, abs=0.15)
    assert abs(float((a * b).mean())) < 0.02


def test_a_direction_depends_on_seed_axis_and_name_alone():
    class Reordered(nn.Module):
        """The parameters of `Straight` in another order, made after other random numbers."""

        def __init__(self, order):
            super().__init__()
            torch.manual_seed(len(order) * 13 + (order[0] == "a"))
            layers = {}
            for name in order:
                layers[name] = nn.Linear(3, 4)
            for name in order:
                setattr(self, name, layers[name])

    def same_weights(model):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(numbers(*p.shape, seed=sum(name.replace("module.", "").encode())))
        return model

    straight, turned = same_weights(Reordered("abc")), same_weights(Reordered("cab"))
    wrapped = nn.DataParallel(same_weights(Reordered("bca")))
    part = same_weights(Reordered("abc"))
    part.a = nn.ModuleDict({"_orig_mod": part.a})  # as torch.compile names a part of a network
    wanted = direction(straight, ignore="none").tensors
    assert set(wanted) == {f"{n}.{p}" for n in "abc" for p in ("weight", "bias")}
    for model in (turned, wrapped, part):
        found = direction(model, ignore="none").tensors
        assert set(found) == set(wanted)
        for name in wanted:
            assert torch.equal(found[name], wanted[name]), name
    for recipe in ({"seed": 1}, {"axes": "xy"}):
        other = made(straight, ignore="none", **recipe).axes[recipe.get("axes", "x")[-1]]
        for name in wanted:
            assert not torch.equal(other.tensors[name], wanted[name]), name
    assert canonical_name("module.features.0.weight") == "features.0.weight"


def test_equal_layers_get_unequal_directions():
    """Two layers of one shape must not get one noise twice."""
    model = fixed(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    d = direction(model, normalize="none").tensors
    assert not torch.equal(d["0.weight"], d["1.weight"])


# -- checkpoints: to, plane, projections -----------------------------------------------------------


def truth(problem, state):
    """The train loss of a checkpoint, its buffers included, without lsweep."""
    model = at(problem.model)
    model.load_state_dict(state)
    x, y = problem.data["train"]
    return float(F.cross_entropy(model(x).detach(), y))


def other_network(model, seed):
    """Another state of a network with batch norm, its statistics moved too."""
    state = another(model, seed)
    for n in state:
        if "running" in n:
            state[n] = state[n] + 0.3 * numbers(*state[n].shape, seed=seed).abs()
    return state


def test_plane_goes_through_three_checkpoints_exactly(tmp_path):
    problem = problems.normalized()
    states = [problem.model.state_dict()]
    for name in "bc":
        states.append(other_network(problem.model, ord(name)))
        torch.save(states[-1], tmp_path / f"{name}.pt")
    paths = [str(tmp_path / f"{n}.pt") for n in "bc"]
    s = lsweep.sweep(
        problem,
        x=(0, 1, 3),
        y=(0, 1, 2),
        directions={"kind": "plane", "checkpoints": paths},
        precision="float64",
    )
    found = [s["train_loss"][i] for i in ((0, 0), (0, 2), (1, 0))]
    assert found == pytest.approx([truth(problem, state) for state in states], rel=1e-12)
    # Both checkpoints are shown on the plane, each with its true loss, and lie in it.
    t = s.trajectory
    assert t.labels == ("b.pt", "c.pt")
    np.testing.assert_allclose(t.offsets, [[1, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(t.residual, 0, atol=1e-12)
    np.testing.assert_allclose(t.values["train_loss"], found[1:], rtol=1e-12)


def test_to_reaches_a_float32_checkpoint_to_its_last_bits(tmp_path):
    """In float32, origin + 1·(other - origin) is the other to one rounding."""
    model = problems.normalized().model.float()
    state = other_network(model, 5)
    torch.save(state, tmp_path / "b.pt")
    d = direction(model, kind="to", checkpoint=str(tmp_path / "b.pt"))
    assert set(d.tensors) == {n for n in state if not n.endswith("tracked")}
    origin = Origin.of(model).everything
    for n, t in d.tensors.items():
        torch.testing.assert_close(origin[n] + t, state[n].float(), rtol=3e-7, atol=1e-7)
    assert d.ignored == ()  # biases and norms are part of the way


def test_another_checkpoint_is_reached_where_no_parameter_is_a_matrix(tmp_path):
    """There biases are all that curvature could be taken over."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x @ self.w

    torch.save({"w": torch.ones(3)}, tmp_path / "b.pt")
    x = torch.arange(12.0).view(4, 3)
    problem = lsweep.Problem(Line(), {"train": (x, x.sum(1))}, loss=nn.MSELoss())
    to = {"kind": "to", "checkpoint": str(tmp_path / "b.pt")}
    found = lsweep.sweep(problem, x=(0, 1, 3), directions=to, progress=False)["train_loss"]
    np.testing.assert_allclose(found, float((x.sum(1) ** 2).mean()) * np.array([1, 0.25, 0]))
    with pytest.raises(LsweepError, match="leaves nothing to move"):
        lsweep.sweep(problem, x=(0, 1, 3), progress=False)


def test_lengths_do_not_hang_on_the_number_of_threads():
    """They are part of the plan, whose digest draws the points that refinement holds out."""
    v = {"w": torch.randn(300_001, generator=torch.Generator().manual_seed(1))}
    before, found = torch.get_num_threads(), set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(dot(v, v))
    torch.set_num_threads(before)
    assert len(found) == 1
    assert found.pop() == pytest.approx(math.fsum((v["w"].double() ** 2).tolist()), rel=1e-14)


def test_trajectory_is_projected_by_least_squares_with_its_true_losses(tmp_path):
    """Random directions are neither unit nor orthogonal; numpy's lstsq over all weights is."""
    problem = problems.normalized()
    origin = Origin.of(problem.model)
    for i in range(3):
        torch.save(other_network(problem.model, 40 + i), tmp_path / f"epoch{i + 9}.pt")
    recipe = {"x": {"kind": "random"}, "y": toward(problem.model, tmp_path / "y.pt")}
    s = lsweep.sweep(
        problem,
        x=(-1, 1, 3),
        y=(-1, 1, 2),
        directions=recipe,
        trajectory=[str(tmp_path / "epoch*.pt")],
        precision="float64",
    )
    assert s.trajectory.labels == ("epoch9", "epoch10", "epoch11")  # not 10, 11, 9
    d = made(problem.model, tmp_path, axes="xy", **recipe)
    zeros = {n: torch.zeros_like(t) for n, t in origin.parameters.items()}
    a = np.stack([flat({**zeros, **v.weights}) for v in d.axes.values()], axis=1)
    for i in range(3):
        state = torch.load(tmp_path / f"epoch{i + 9}.pt")
        moved = {n: state[n] - t for n, t in origin.parameters.items()}
        b = flat(moved)
        offsets = np.linalg.lstsq(a, b, rcond=None)[0]
        t = s.trajectory
        np.testing.assert_allclose(t.offsets[i], offsets, rtol=1e-9)
        assert t.residual[i] == pytest.approx(np.linalg.norm(b - a @ offsets), rel=1e-9)
        assert t.in_plane[i] == pytest.approx(np.linalg.norm(a @ offsets), rel=1e-9)
        square = t.residual[i] ** 2 + t.in_plane[i] ** 2  # Pythagoras
        assert square == pytest.approx(float(b @ b), rel=1e-10)
        # The loss is that of the checkpoint itself, its own statistics included.
        assert t.values["train_loss"][i] == pytest.approx(truth(problem, state), rel=1e-12)
    mine = float(np.cos(0) * (a[:, 0] @ a[:, 1]) / np.prod(np.linalg.norm(a, axis=0)))
    assert s.provenance["plan"]["facts"]["cosines"][0][1] == pytest.approx(mine, rel=1e-9)
    assert f"cos(x, y) = {mine:+.3f}" in s.provenance["caption"]


def test_statistics_are_no_weights_where_no_direction_moves_them(tmp_path):
    problem = problems.normalized()
    state = problem.model.state_dict()
    state["1.running_mean"] = state["1.running_mean"] + 10
    origin, d = Origin.of(problem.model), made(problem.model)
    found = project({n: state[n] for n in origin.everything}, origin, d.axes)
    assert found.residual == 0


def test_a_point_in_the_plane_of_skew_directions_is_found_again(tmp_path):
    model = problems.classifier().model
    torch.save(another(model, 1), tmp_path / "b.pt")
    nearly = {n: 0.7 * another(model, 1)[n] + 0.3 * another(model, 2)[n] for n in another(model)}
    torch.save(nearly, tmp_path / "c.pt")
    d = made(model, tmp_path, axes="xy", kind="plane", checkpoints=["b.pt", "c.pt"])
    assert 0.8 < d.cosines()[0, 1] < 0.99
    origin = Origin.of(model)
    x, y = (v.tensors for v in d.axes.values())
    state = {n: t + 0.7 * x[n] - 1.3 * y[n] for n, t in origin.parameters.items()}
    found = project(state, origin, d.axes)
    assert found.offsets == pytest.approx((0.7, -1.3), rel=1e-9)
    assert found.residual == pytest.approx(0, abs=1e-12)


def test_orthogonalize_removes_the_earlier_directions_and_nothing_else(tmp_path):
    model = problems.classifier().model
    base = {a: toward(model, tmp_path / f"{a}.pt", ord(a)) for a in "xyz"}
    free = made(model, axes="xyz", **base)
    bound = made(model, axes="xyz", **{a: {**r, "orthogonalize": True} for a, r in base.items()})
    np.testing.assert_allclose(bound.cosines(), np.eye(3), atol=1e-12)
    assert abs(free.cosines() - np.eye(3)).max() > 1e-3
    q = np.stack([flat(d.tensors) for d in free.axes.values()], axis=1)
    p = np.stack([flat(d.tensors) for d in bound.axes.values()], axis=1)
    both = np.linalg.qr(q)
    np.testing.assert_allclose(p, both.Q * np.diag(both.R), atol=1e-12)  # Gram-Schmidt of numpy


def test_parallel_directions_are_refused(tmp_path):
    model = problems.classifier().model
    b = {"x": toward(model, tmp_path / "b.pt")}
    for factor in (1.0, -2.0):  # along, and against
        far = {n: t + factor * (another(model)[n] - t) for n, t in model.state_dict().items()}
        torch.save(far, tmp_path / "c.pt")
        y = {"kind": "to", "checkpoint": str(tmp_path / "c.pt")}
        with pytest.raises(
            LsweepError, match=r"directions x and y are parallel \(cosine -?1\.0000"
        ):
            made(model, axes="xy", **b, y=y)
    torch.save(model.state_dict(), tmp_path / "same.pt")
    with pytest.raises(LsweepError, match="the direction x is zero"):
        made(model, tmp_path, kind="to", checkpoint="same.pt")


# -- principal components --------------------------------------------------------------------------


def walk(model, folder, steps, seed=0):
    """Save a random walk that ends at the model's weights; return its (steps, P) matrix."""
    origin = {n: p.detach().clone() for n, p in model.named_parameters()}
    position = {n: torch.zeros_like(t) for n, t in origin.items()}
    rows = []
    for i in reversed(range(steps)):
        torch.save({n: origin[n] + position[n] for n in origin}, folder / f"epoch{i}.pt")
        rows.append(flat(position))
        for j, n in enumerate(origin):
            position[n] = position[n] + numbers(*origin[n].shape, seed=seed + 1000 * i + j)
    return np.array(rows[::-1])


@pytest.mark.parametrize("ends", [True, False])  # the last checkpoint is θ; θ comes after the last
def test_pca_is_that_of_numpy(tmp_path, ends):
    model = problems.classifier().model
    rows = walk(model, tmp_path, 7)
    if not ends:
        (tmp_path / "epoch6.pt").unlink()  # θ itself still ends the trajectory
    recipe = {"kind": "pca", "checkpoints": ["epoch*.pt"]}
    found = made(model, tmp_path, axes="xy", **recipe)
    _, singular, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    share = singular**2 / (singular**2).sum()
    for k, axis in enumerate("xy"):
        mine = flat(found.axes[axis].tensors)
        assert abs(mine @ right[k]) == pytest.approx(1, rel=1e-9)
        assert np.linalg.norm(mine) == pytest.approx(1, rel=1e-9)
        facts = found.facts[axis]
        assert facts["explained"] == pytest.approx(share[k], rel=1e-9)
        null = random_walk_null(7, k + 1) - (random_walk_null(7, k) if k else 0)
        assert facts["random_walk_null"] == pytest.approx(null, rel=1e-12)
    assert [s.label for s in found.steps] == [f"epoch{i}" for i in range(6 + ends)]


def test_pca_of_a_random_walk_explains_what_its_null_says(tmp_path):
    """3/4 of the variation in two dimensions is what no structure at all looks like."""
    model = fixed(nn.Linear(4000, 1, bias=False).double())
    walk(model, tmp_path, 40)
    found = made(model, tmp_path, axes="xy", kind="pca", checkpoints=["epoch*.pt"])
    shares = [found.facts[a]["explained"] for a in "xy"]
    nulls = [found.facts[a]["random_walk_null"] for a in "xy"]
    assert shares == pytest.approx(nulls, abs=0.02)
    assert sum(nulls) == pytest.approx(0.76, abs=0.02)


def test_null_of_a_long_walk_is_that_of_antognini_and_sohl_dickstein():
    shares = np.diff([0.0, *(random_walk_null(100, k) for k in (1, 2, 3))])
    wanted = [6 / (math.pi * k) ** 2 for k in (1, 2, 3)]  # 60.8 %, 15.2 %, 6.8 %
    assert shares == pytest.approx(wanted, abs=0.003)
    assert sum(shares[:2]) == pytest.approx(0.76, abs=0.02)


def test_automatic_range_spans_the_trajectory_with_a_margin(tmp_path):
    problem = problems.classifier()
    walk(problem.model, tmp_path, 6)
    s = lsweep.sweep(
        problem,
        x=("auto", 5),
        y=("auto", 4),
        directions={"kind": "pca", "checkpoints": [str(tmp_path / "epoch*.pt")]},
    )
    t = s.trajectory.offsets
    for k, axis in enumerate((s.x, s.y)):
        extent = np.ptp(np.append(t[:, k], 0))
        for end, reached in ((axis[0], min(t[:, k].min(), 0)), (axis[-1], max(t[:, k].max(), 0))):
            room = (reached - end) * (1 if end < reached else -1)
            assert abs(room) / extent == pytest.approx(0.1, abs=0.01)
        assert axis[0] < t[:, k].min() and t[:, k].max() < axis[-1]
    np.testing.assert_allclose(t[-1], 0, atol=1e-9)  # the last checkpoint is the centre
    assert "explains" in s.provenance["caption"] and "a random walk:" in s.provenance["caption"]


def test_pca_over_too_little_is_refused(tmp_path):
    model = problems.classifier().model
    walk(model, tmp_path, 2)
    recipe = {"kind": "pca", "checkpoints": ["epoch*.pt"]}
    with pytest.raises(LsweepError, match="span fewer than 2 directions"):
        made(model, tmp_path, axes="xy", **recipe)
    with pytest.raises(LsweepError, match=r"no checkpoint matches 'step\*\.pt'"):
        made(model, tmp_path, axes="xy", kind="pca", checkpoints=["step*.pt"])


# -- direction files -------------------------------------------------------------------------------


def test_directions_of_a_file_are_used_as_stored(tmp_path):
    """By parameter, or by entry of the state dict; nothing is normalised or ignored anew."""
    model = problems.normalized().model
    parameters = [numbers(*p.shape, seed=i).numpy() for i, p in enumerate(model.parameters())]
    states = [numbers(*t.shape, seed=i).numpy() for i, t in enumerate(model.state_dict().values())]
    for arrays, names in (
        (parameters, [n for n, _ in model.named_parameters()]),
        (states, list(model.state_dict())),
    ):
        write_reference_directions(tmp_path / "d.h5", {"x": arrays})
        d = direction(model, tmp_path, kind="file", file="d.h5")
        wanted = {n: a for n, a in zip(names, arrays, strict=True) if "tracked" not in n}
        assert set(d.tensors) == set(wanted)
        for n, a in wanted.items():
            assert np.array_equal(d.tensors[n].numpy(), a), n
    with pytest.raises(LsweepError, match="has no ydirection; it has x"):
        made(model, tmp_path, axes="xy", kind="file", file="d.h5")
    write_reference_directions(tmp_path / "d.h5", {"x": parameters[:3]})
    with pytest.raises(
        LsweepError, match="holds 3 tensors for x; the network has 8 parameters and 14"
    ):
        direction(model, tmp_path, kind="file", file="d.h5")
    parameters[0] = parameters[0].T
    write_reference_directions(tmp_path / "d.h5", {"x": parameters})
    with pytest.raises(LsweepError, match=r"x tensor for 0\.weight has shape \(4, 6\).*\(6, 4\)"):
        direction(model, tmp_path, kind="file", file="d.h5")


# -- checkpoints in every format -------------------------------------------------------------------


def plain_state():
    return {n: t.clone() for n, t in another(problems.normalized().model).items()}


def sharded(folder, save, index, suffix):
    state, names = plain_state(), list(plain_state())
    files = {n: f"model-0000{1 + i % 2}-of-00002.{suffix}" for i, n in enumerate(names)}
    for file in set(files.values()):
        save({n: state[n] for n in names if files[n] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / index


def prefixed(prefix):
    return {prefix + n: t for n, t in plain_state().items()}


def saved(value):
    def write(folder):
        torch.save(value, folder / "a.pt")
        return folder / "a.pt"

    return write


def safe(folder, name="a.safetensors"):
    from safetensors.torch import save_file

    save_file(plain_state(), folder / name)
    return folder / name


def safe_shards(folder):
    from safetensors.torch import save_file

    return sharded(folder, save_file, "model.safetensors.index.json", "safetensors")


def bin_shards(folder):
    return sharded(folder, torch.save, "pytorch_model.bin.index.json", "bin")


# what wrote the file, how: and why the row is here
FORMATS = {
    "plain": saved(plain_state()),
    "nested": saved({"state_dict": plain_state(), "epoch": 3}),
    "model_state_dict": saved({"model_state_dict": plain_state(), "optimizer": {"state": {}}}),
    # Lightning: the network is an attribute of its module; beside it lie hyperparameters
    "lightning": saved(
        {
            "state_dict": prefixed("model."),
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"EarlyStopping": {"best": torch.tensor(0.1)}},
            "pytorch-lightning_version": "2.4",
        }
    ),
    "timm": saved({"arch": "x", "state_dict": plain_state(), "args": argparse.Namespace(lr=1.0)}),
    "swin": saved({"model": plain_state(), "max_accuracy": 0.1}),
    "data parallel": saved(prefixed("module.")),
    "compiled": saved({"model": prefixed("_orig_mod.")}),
    "both": saved({"state_dict": prefixed("module._orig_mod.")}),
    "old zip-less format": lambda folder: (
        torch.save(plain_state(), folder / "a.pt", _use_new_zipfile_serialization=False),
        folder / "a.pt",
    )[1],
    "safetensors": safe,
    "safetensors shards": safe_shards,
    "bin shards": bin_shards,
    "folder": lambda folder: safe(folder, "model.safetensors").parent,  # Hugging Face
    "folder of shards": lambda folder: safe_shards(folder).parent,
    "folder of bin": lambda folder: bin_shards(folder).parent,
}


@pytest.mark.parametrize("name", FORMATS)
def test_checkpoints_of_every_format_give_one_direction(name, tmp_path):
    model = problems.normalized().model
    path = FORMATS[name](tmp_path)
    d = direction(model, kind="to", checkpoint=str(path))
    state = plain_state()
    origin = Origin.of(model).everything
    assert set(d.tensors) == set(origin)
    for n, t in origin.items():
        assert torch.equal(d.tensors[n], state[n] - t), n
    loaded = lsweep.load_state(path)
    assert all(isinstance(t, torch.Tensor) for t in loaded.values())
    model.load_state_dict(lsweep.load_state(path, model))  # strictly: every name is the network's
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_hugging_face_folder_of_a_tied_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=8)
    torch.manual_seed(0)
    model, there = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    there.save_pretrained(tmp_path)
    d = direction(model, kind="to", checkpoint=str(tmp_path))
    wanted = dict(there.named_parameters())
    assert set(d.tensors) == set(wanted)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.detach() + d.tensors[n], wanted[n].detach())
    # Its Conv1D stores [in, out]: a filter is a column.
    w = model.transformer.h[0].mlp.c_fc.weight.detach()
    v = direction(model).tensors["transformer.h.0.mlp.c_fc.weight"]
    torch.testing.assert_close(v.norm(dim=0), w.norm(dim=0))


class Bomb:
    """What a pickle may do to who opens it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    mark = tmp_path / "executed"
    for value in ({"state_dict": plain_state(), "extra": Bomb(mark)}, Bomb(mark)):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(
            LsweepError, match=r"cannot read checkpoint .*save model\.state_dict\(\)"
        ):
            lsweep.load_state(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(LsweepError, match="cannot read checkpoint"):
        lsweep.load_state(tmp_path / "b.pt")
    assert not mark.exists()
    index = {"weight_map": {"w": "../../secret.bin"}}
    (tmp_path / "x.index.json").write_text(json.dumps(index))
    with pytest.raises(LsweepError, match="a path outside its folder"):
        lsweep.load_state(tmp_path / "x.index.json")


def test_what_is_no_checkpoint_or_does_not_fit_is_named(tmp_path):
    model = problems.normalized().model

    def refused(value, reason, error=LsweepError):
        torch.save(value, tmp_path / "a.pt")
        with pytest.raises(error, match=reason):
            direction(model, tmp_path, kind="to", checkpoint="a.pt")

    state = plain_state()
    refused({n: t for n, t in state.items() if n != "3.weight"}, r"no tensor for '3\.weight'")
    refused({**state, "3.weight": torch.zeros(3, 7)}, r"3\.weight has shape \(3, 7\).*\(3, 6\)")
    refused(
        {n: t for n, t in state.items() if "running" not in n}, r"no tensor for '1\.running_mean'"
    )
    refused([1, 2], "holds a list, not a state dict")
    refused({"epoch": 3}, "holds no tensors; its keys: epoch")
    with pytest.raises(LsweepError, match=r"no checkpoint at .*none"):
        lsweep.load_state(tmp_path / "none.pt")
    with pytest.raises(LsweepError, match=r"holds no model\.safetensors"):
        lsweep.load_state(tmp_path)
    whole = safe(tmp_path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match="damaged or not a safetensors file"):
        lsweep.load_state(tmp_path / "cut.safetensors")
    torch.save(state, tmp_path / "a.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:500])
    with pytest.raises(LsweepError, match="cannot read checkpoint"):
        lsweep.load_state(tmp_path / "cut.pt")
