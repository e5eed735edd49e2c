"""What the pictures mean: identities that hold, and one invariance that is known to fail.

Promises: the curvature that filter-normalised slices show is Σ_f ‖w_f‖²/n_f · tr H_ff on average;
the non-convex fraction is that of closed forms; a filter-normalised slice does not change when
ReLU layers are rescaled against each other, and does change when single neurons are. The last is
no defect of the engine but of the method, and a caption may not claim otherwise.
"""

from __future__ import annotations

import copy

import numpy as np
import problems  # noqa: F401  (one thread)
import pytest
import torch
from problems import fixed, labels, numbers
from torch import nn

import lsweep
from lsweep.errors import LsweepError
from lsweep.measures.measures import measure, nonconvex_fraction
from lsweep.surfaces.surface import Surface

SEEDS = 40  # of three directions each


# -- the curvature identity ------------------------------------------------------------------------


class Exactly(nn.Module):
    """A loss that is its own second-order expansion: gᵀθ + ½ θᵀHθ over two weight matrices."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        theta = torch.cat([self.a.weight.flatten(), self.b.weight.flatten()])  # (21,)
        return theta.expand(len(x), -1)


def toy():
    model = fixed(Exactly().double(), seed=2)
    with torch.no_grad():  # filters of very different length: a rule per layer gives another number
        model.a.weight *= torch.tensor([0.2, 1.0, 4.0]).double()[:, None]
        model.b.weight *= torch.tensor([3.0, 0.3]).double()[:, None]
    root = numbers(21, 21, seed=5)
    steep = torch.ones(21).double()
    steep[10:15] = 15.0  # where the longest filter lies
    h = root + root.T + torch.diag(steep)  # of both signs
    g = numbers(21, seed=6)

    def loss(output, target):
        return output @ g + 0.5 * ((output @ h) * output).sum(1)

    data = (torch.zeros(1, 1).double(), torch.zeros(1).double())
    return lsweep.Problem(model, {"train": data}, loss=loss), h.numpy()


def predicted(model, h, rule):
    """Σ ‖w‖²/n · tr H over filters, or over layers."""
    total, start = 0.0, 0
    for w in (model.a.weight.detach().numpy(), model.b.weight.detach().numpy()):
        for part in w if rule == "filter" else [w]:
            block = np.diag(h)[start : start + part.size]
            total += (part**2).sum() / part.size * block.sum()
            start += part.size
    return total


@pytest.mark.parametrize(("rule", "other"), [("filter", "layer"), ("layer", "filter")])
def test_mean_curvature_of_slices_is_the_weighted_trace(rule, other):
    """E[dᵀHd] from second differences along the three axes of many seeds."""
    problem, h = toy()
    curvatures = []
    for seed in range(SEEDS):
        s = lsweep.sweep(
            problem,
            **dict.fromkeys("xyz", (-1, 1, 3)),
            directions={"seed": seed, "normalize": rule},
            precision="float64",
        )
        cube = s["train_loss"]
        for line in (cube[1, 1, :], cube[1, :, 1], cube[:, 1, 1]):
            curvatures.append(line[0] - 2 * line[1] + line[2])
    mean, error = np.mean(curvatures), np.std(curvatures, ddof=1) / len(curvatures) ** 0.5
    assert abs(mean - predicted(problem.model, h, rule)) < 4 * error
    assert abs(mean - predicted(problem.model, h, other)) > 6 * error  # so the line above can fail


def test_a_random_plane_is_an_average_and_may_hide_a_saddle():
    """Half of the eigenvalues of H may be negative while no slice bends down."""
    problem, h = toy()
    assert np.linalg.eigvalsh(h).min() < -1
    s = lsweep.sweep(problem, x=(-1, 1, 5), y=(-1, 1, 5), precision="float64")
    assert nonconvex_fraction(s) == 0.0


# -- non-convex fraction ---------------------------------------------------------------------------


def surface(f, nx=21, ny=11):
    x, y = np.linspace(-1, 1, nx), np.linspace(-0.5, 0.5, ny)
    return Surface({"x": x, "y": y}, {"train_loss": f(x[None, :], y[:, None])})


# f(x, y), share of interior cells with -λ_min/max|λ| > 0.1: and why the row is here
CLOSED = [
    (lambda x, y: x**2 + 3 * y**2, 0.0),  # a bowl
    (lambda x, y: -(x**2) - y**2, 1.0),  # a hill: both are negative
    (lambda x, y: -(x**2) + 0 * y, 1.0),  # a ridge: max |λ| is the negative one, the other is 0
    (lambda x, y: x**2 - y**2, 1.0),  # a saddle
    (lambda x, y: x**2 - 0.05 * y**2, 0.0),  # one below the threshold
    (lambda x, y: x**2 - 0.15 * y**2, 1.0),  # and one above
    (lambda x, y: x * y, 1.0),  # a saddle that no single axis shows
    (lambda x, y: (x + y) ** 2 + 0 * x, 0.0),  # a valley across: λ_min is 0, not negative
    (lambda x, y: 1e9 * x**2 - 1e9 * y**2, 1.0),  # a ratio, whatever the scale
    (lambda x, y: x**3 + y**2, 9 / 19),  # f_xx = 6x < -0.2 for x < -1/30: 9 of 19 columns
    (lambda x, y: y**3 + x**2, 4 / 9),  # the same along y: 4 of 9 rows
]


@pytest.mark.parametrize(("f", "share"), CLOSED)
def test_nonconvex_fraction_of_closed_forms(f, share):
    assert nonconvex_fraction(surface(f)) == pytest.approx(share, abs=1e-12)


def test_nonconvex_fraction_leaves_out_what_is_not_finite():
    s = surface(lambda x, y: x**3 + y**2)
    s["train_loss"][5, 16] = np.nan  # takes its 9 neighbours with it, all of them convex
    assert nonconvex_fraction(s) == pytest.approx(81 / (171 - 9))
    s["train_loss"][:] = np.inf
    assert np.isnan(nonconvex_fraction(s))
    with pytest.raises(LsweepError, match="needs a plane of 3 x 3 points"):
        nonconvex_fraction(Surface({"x": np.arange(3.0)}, {"train_loss": np.ones(3)}))


def test_measure_of_a_closed_form():
    found = measure(surface(lambda x, y: (x - 0.5) ** 2 + (y + 0.2) ** 2))
    assert found["minimum_at"] == pytest.approx({"x": 0.5, "y": -0.2})
    assert found["minimum"] == pytest.approx(0, abs=1e-15)
    assert found["center"] == pytest.approx(0.29)
    assert (found["points"], found["finite"], found["nonconvex_fraction"]) == (231, 1.0, 0.0)


# -- rescaling -------------------------------------------------------------------------------------


def relu_net():
    return fixed(
        nn.Sequential(
            nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        ).double()
    )


def rescaled(net, factors):
    """Multiply what enters the first layer's neurons and divide what leaves them."""
    other = copy.deepcopy(net)
    c = torch.as_tensor(factors).double() * torch.ones(8).double()
    with torch.no_grad():
        other[0].weight *= c[:, None]
        other[0].bias *= c
        other[2].weight /= c[None, :]
    return other


BY_LAYER, BY_NEURON = 3.0, [0.2, 0.5, 0.9, 1.0, 1.5, 3.0, 6.0, 9.0]
# rule, factors, whether the slice stays as it is: and why the row is here
SLICES = [
    ("none", BY_LAYER, False),  # why normalising is needed at all
    ("layer", BY_LAYER, True),
    ("filter", BY_LAYER, True),  # what the method promises
    ("weight", BY_LAYER, True),
    ("layer", BY_NEURON, False),
    ("filter", BY_NEURON, False),  # the designed failure: filters of the next layer mix neurons
    ("weight", BY_NEURON, True),  # element by element every rescaling drops out
]


@pytest.mark.parametrize(
    ("rule", "factors", "same"), SLICES, ids=[f"{r[0]}-{np.size(r[1])}" for r in SLICES]
)
def test_slices_of_equivalent_networks(rule, factors, same):
    net = relu_net()
    data = {"train": (numbers(40, 4, seed=1), labels(40, 3))}
    twin = rescaled(net, factors)
    torch.testing.assert_close(net(data["train"][0]), twin(data["train"][0]))  # one function
    a, b = (
        lsweep.sweep(
            lsweep.Problem(m, data, loss=nn.CrossEntropyLoss()),
            x=(-1, 1, 9),
            directions={"normalize": rule},
            precision="float64",
        )["train_loss"]
        for m in (net, twin)
    )
    assert a[4] == pytest.approx(b[4], rel=1e-12)
    defect = np.abs(a - b).max() / np.ptp(a)
    assert defect < 1e-9 if same else defect > 0.05


def test_a_power_of_two_changes_not_one_bit():
    net, data = relu_net(), {"train": (numbers(40, 4, seed=1), labels(40, 3))}
    surfaces = [
        lsweep.sweep(
            lsweep.Problem(m, data, loss=nn.CrossEntropyLoss()),
            x=(-1, 1, 5),
            y=(-1, 1, 3),
            precision="float64",
        )["train_loss"]
        for m in (net, rescaled(net, 4.0))
    ]
    assert surfaces[0].tobytes() == surfaces[1].tobytes()
