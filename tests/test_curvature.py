"""Every curvature number is that of the dense float64 Hessian, by two routes where two exist.

Eigenvalues: ARPACK, the largest Ritz value, an independent library. Traces: probes, the first
moment of the spectrum, the sum of the diagonal. And what rescaling a network does to them.
"""

from __future__ import annotations

import copy
import functools
import math
import sys

import numpy as np
import pytest
import torch
from exact import (
    Case,
    convolution,
    opaque_forward,
    squared_error,
    tied,
    transformer,
    weighted_classes,
)
from hessian_eigenthings import HessianOperator, lanczos_tridiagonal
from hessian_eigenthings import lanczos as another_lanczos
from problems import fixed, hessian_of, labels, numbers, quadratic
from torch import Tensor, nn

import lsweep
from lsweep.axes.noise import random_tensor
from lsweep.derivatives import curvature, spectrum
from lsweep.derivatives.computing import compute
from lsweep.derivatives.lanczos import lanczos
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError
from lsweep.plans.pointwise import POINTWISE
from lsweep.problems.filters import filter_normalize

SOME = [weighted_classes, transformer]


def metrics(case: Case) -> list[tuple[Tensor, Tensor | None, str]]:
    """Return (dense matrix, D or None, prefix), raw and in the filter metric."""
    H, D = case.hessian(), case.scales()
    return [(H, None, ""), (D[:, None] * H * D, D, "filter_")]


def at_once(case: Case) -> Case:
    """The same with all data in one batch, which is faster."""
    return Case(case.problem, case.whole, batch_size=99)


def within(sample: list[float], exact: float, errors: float = 4.0) -> bool:
    se = float(np.std(sample, ddof=1)) / math.sqrt(len(sample))
    assert se > 0
    return abs(float(np.mean(sample)) - exact) < errors * se


# -- eigenvalues -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", SOME)
def test_extremes_are_those_of_the_dense_hessian(make):
    case = at_once(make())
    objective = case.objective()
    assert torch.allclose(objective.filter_scales(), case.scales())
    for matrix, _, prefix in metrics(case):
        exact = torch.linalg.eigvalsh(matrix)
        found = compute(f"{prefix}hessian_extremes", objective, case.scales())
        largest = float(exact.abs().max())
        assert found[f"{prefix}hessian_max"] == pytest.approx(float(exact[-1]), abs=1e-4 * largest)
        assert found[f"{prefix}hessian_min"] == pytest.approx(float(exact[0]), abs=1e-4 * largest)
        ratio = max(-float(exact[0]), 0) / largest
        assert found[f"{prefix}hessian_ratio"] == pytest.approx(ratio, abs=1e-4)
        assert found[f"{prefix}hessian_max_residual"] < curvature.CONVERGED
        assert found[f"{prefix}hessian_min_residual"] < curvature.CONVERGED


def test_eigenpairs_count_from_either_end():
    case = at_once(weighted_classes())
    objective, H = case.objective(), case.hessian()
    exact, vectors = torch.linalg.eigh(H)
    for which in (1, -2):
        place = -which if which > 0 else -which - 1
        pair = curvature.eigenpair(objective, which)
        assert pair.value == pytest.approx(float(exact[place]), rel=1e-3)
        assert abs(float(pair.vector @ vectors[:, place])) == pytest.approx(1, abs=1e-2)
        assert float(pair.vector.norm()) == pytest.approx(1)
        assert pair.vector[pair.vector.abs().argmax()] > 0
        away = (H @ pair.vector - pair.value * pair.vector).norm()
        assert pair.residual <= 1.001 * float(away / exact.abs().max()) + 1e-12 and pair.converged
        assert torch.equal(curvature.eigenpair(case.objective(), which).vector, pair.vector)
    with pytest.raises(LsweepError, match="1 is the largest"):
        curvature.eigenpair(objective, 0)


def test_start_vectors_differ_and_eigenvalues_do_not():
    objective = at_once(weighted_classes()).objective()
    first, second = (curvature.extremes(objective, replicate=k)[0] for k in (0, 1))
    assert not torch.equal(first.vector, second.vector)
    assert first.value == pytest.approx(second.value, rel=1e-5)


def test_quadratics_have_the_eigenvalues_of_their_matrix():
    problem = quadratic(samples=60, parameters=40)
    objective = Objective(problem, lambda: problem.splits["train"].batches(32), ["weight"])
    exact = np.linalg.eigvalsh(hessian_of(problem))
    high, low = curvature.extremes(objective)
    assert (low.value, high.value) == pytest.approx((exact[0], exact[-1]), rel=1e-6)


def of_matrix(matrix: Tensor) -> Objective:
    """Half wᵀ M w, as the mean of one opaque batch."""
    model = fixed(nn.Linear(len(matrix), 1, bias=False).double())

    def forward(net: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": 0.5 * net.weight[0] @ matrix @ net.weight[0]}

    problem = lsweep.Problem(model, {"train": torch.zeros(1, 1)}, forward=forward)
    return Objective(problem, lambda: iter([torch.zeros(1, 1)]), ["weight"])


@pytest.mark.parametrize("size", [1, 2, 40])
def test_spectra_of_few_points_are_exact(size):
    identity = 3.0 * torch.eye(size).double()
    for matrix in (identity, 0 * identity):
        high, low = curvature.extremes(of_matrix(matrix))
        assert [low.value, high.value] == pytest.approx([float(matrix[0, 0])] * 2, abs=1e-12)
    x = numbers(size)
    high, low = curvature.extremes(of_matrix(torch.outer(x, x)))
    assert high.value == pytest.approx(float(x @ x))
    assert size == 1 or low.value == pytest.approx(0, abs=1e-10)
    found = compute("hessian_extremes", of_matrix(0 * identity), torch.ones(size).double())
    assert found["hessian_ratio"] == 0


def test_many_equal_eigenvalues_do_not_hide_the_ends():
    values = torch.zeros(200).double()
    values[:12] = torch.tensor([50.0, 9, 8, 7, 6, 5, 4, 3, 2, 1, -1e-3, -2e-3]).double()
    q = torch.linalg.qr(numbers(200, 200))[0]
    high, low = curvature.extremes(of_matrix(q @ torch.diag(values) @ q.T))
    assert high.value == pytest.approx(50) and low.value == pytest.approx(-2e-3, abs=2e-4)
    # Relative to itself the smallest would not have been found in any number of steps.
    assert low.converged and high.converged


def test_what_does_not_converge_says_so(monkeypatch):
    values = torch.linspace(-1, 1, 300).double()
    monkeypatch.setattr(curvature, "RESTARTS", 1)
    monkeypatch.setattr(curvature, "TOLERANCE", 1e-12)
    monkeypatch.setattr(curvature, "CONVERGED", 1e-6)
    high, low = curvature.extremes(of_matrix(torch.diag(values)))
    assert 0.9 < high.value < 1 and -1 < low.value < -0.9  # the best of the space all the same
    assert high.residual > curvature.CONVERGED and not high.converged
    away = (values * high.vector - high.value * high.vector).norm()
    assert high.residual == pytest.approx(float(away) / max(high.value, -low.value))


def test_where_the_loss_is_not_finite_there_is_no_number():
    objective = of_matrix(torch.full((40, 40), math.inf).double())
    scales = torch.ones(40).double()
    for name in ("hessian_extremes", "hessian_trace", "spectrum", "worst_case", "keskar"):
        found = compute(name, objective, scales, radius=0.1)
        assert all(math.isnan(v) or v == 0 for v in found.values()), name
        assert any(math.isnan(v) for v in found.values()), name
    with pytest.raises(LsweepError, match="not finite"):
        curvature.eigenpair(objective)


def test_an_independent_library_finds_the_same():
    case = at_once(opaque_forward())
    model, batch = case.problem.model.eval(), case.problem.splits["train"].data
    other = HessianOperator(
        model,
        [batch],
        lambda net, b: case.problem.forward(net, b)["loss"],
        param_filter=lambda name, p: name in case.names,
    )
    objective, v = case.objective(), numbers(len(case.here), seed=8)
    assert other.size == objective.size
    assert torch.allclose(objective.hessian_product(v), other.matvec(v), rtol=1e-9, atol=1e-11)
    theirs = another_lanczos(other, k=1, max_iter=objective.size, which="LA", seed=0)
    high, _ = curvature.extremes(objective)
    assert high.value == pytest.approx(float(theirs.eigenvalues[0]), rel=1e-6)
    start = curvature.random_probe(objective, 0, "start", 0)
    ours = lanczos(objective.hessian_product, start, 12)
    tri = lanczos_tridiagonal(other, start, 12)
    matrix = torch.diag(tri.alphas) + torch.diag(tri.betas, 1) + torch.diag(tri.betas, -1)
    values, vectors = torch.linalg.eigh(matrix)
    assert np.allclose(ours.values, values.numpy(), rtol=1e-8)
    assert np.allclose(ours.weights, vectors[0].numpy() ** 2, rtol=1e-6, atol=1e-12)


# -- traces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [squared_error, tied, convolution])
def test_probes_scatter_around_the_trace(make):
    case = at_once(make())
    objective = case.objective()
    for matrix, _, prefix in metrics(case):
        name = f"{prefix}hessian_trace"
        probes = [curvature.random_probe(objective, 0, "probe", k) for k in range(200)]
        sample = [float(v @ matrix @ v) for v in probes]
        assert within(sample, float(matrix.trace()))
        for k in (0, 7):
            found = compute(name, objective, case.scales(), replicate=k)
            assert found[name] == pytest.approx(sample[k], rel=1e-9)
        # The variance of a Rademacher probe, too, is known.
        off = matrix - torch.diag(matrix.diag())
        assert np.std(sample) == pytest.approx(float((2 * (off**2).sum()).sqrt()), rel=0.3)


def test_one_probe_is_exact_where_the_hessian_is_diagonal():
    objective = of_matrix(torch.diag(torch.arange(40.0).double()))
    assert curvature.trace_probe(objective, replicate=5) == pytest.approx(780)


def test_mean_curvature_of_random_directions_is_the_trace_in_the_filter_metric():
    """E[dᵀHd] = Σ_f ‖w_f‖²/n_f tr H_ff for filter-normalised d."""
    case = at_once(squared_error())
    H, own = case.hessian(), dict(case.problem.model.named_parameters())
    exact, at = 0.0, 0
    for n in case.names:
        for row in own[n].detach():
            block = slice(at, at + row.numel())
            exact += float(row.norm() ** 2 / row.numel() * H[block, block].trace())
            at += row.numel()
    assert float(metrics(case)[1][0].trace()) == pytest.approx(exact)
    owners = case.objective().owners
    sample = []
    for k in range(400):
        d = torch.cat(
            [
                filter_normalize(random_tensor(k, "x", n, own[n]), own[n], owners[n]).flatten()
                for n in case.names
            ]
        ).detach()
        sample.append(float(d @ H @ d))
    assert within(sample, exact)


def test_relative_flatness_is_its_double_sum():
    case = at_once(squared_error())
    H, W = case.hessian(), case.problem.model[2].weight.detach()
    rows, columns = W.shape
    last = H[-W.numel() :, -W.numel() :].view(rows, columns, rows, columns)
    exact = sum(
        float(W[s] @ W[t]) * float(last[s, :, t, :].trace())
        for s in range(rows)
        for t in range(rows)
    )
    objective = case.objective()
    sample = [curvature.relative_flatness(objective, replicate=k) for k in range(60)]
    assert within(sample, exact)


def test_relative_flatness_of_a_wide_layer_needs_no_more_than_its_weights():
    n = 2**18  # a matrix of n x n signs would have 550 GB
    data = (numbers(2, n), numbers(2, 1))
    problem = lsweep.Problem(
        nn.Linear(n, 1, bias=False).double(), {"train": data}, loss=nn.MSELoss()
    )
    objective = Objective(problem, lambda: iter([data]), ["weight"])
    w = problem.model.weight.detach()
    exact = float((w**2).sum() * (data[0] ** 2).sum())  # ‖w‖² tr H, H = 2 mean of x xᵀ
    found = [curvature.relative_flatness(objective, replicate=k) for k in range(20)]
    assert within(found, exact)


# -- the spectrum ----------------------------------------------------------------------------------


def test_a_basis_beyond_all_memory_is_one_line_before_any_product():
    start = torch.ones(1).expand(2**46)  # one number in memory
    with pytest.raises(LsweepError, match=r"^64 steps of Lanczos .* need 1.8e\+07 GB on cpu.*$"):
        lanczos(lambda v: pytest.fail("a product"), start, 64)


def starts(case: Case, matrix: Tensor, name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ritz values and weights of many start vectors; of the first two by the network itself."""
    objective, rows = case.objective(), []
    for k in range(count):
        start = curvature.random_probe(objective, 0, "start", k)
        found = lanczos(lambda v: matrix @ v, start, 64)
        row = np.zeros((2, 64))
        row[:, : len(found.values)] = found.values, found.weights
        rows.append(row)
        if k < 2:
            here = list(compute(name, objective, case.scales(), replicate=k).values())
            assert np.allclose(row, np.reshape(here, (2, 64)), rtol=1e-6, atol=1e-9)
    table = np.array(rows)
    return table[:, 0], table[:, 1]


def test_quadrature_gives_moments_ends_and_mass_of_the_dense_spectrum():
    case = at_once(squared_error())
    for matrix, _, prefix in metrics(case):
        exact = np.linalg.eigvalsh(matrix.numpy())
        ritz, weights = starts(case, matrix, f"{prefix}spectrum", 40)
        assert ritz.shape == (40, 64) and np.allclose(weights.sum(1), 1)
        assert ritz[weights > 0].max() == pytest.approx(exact[-1], rel=1e-6)
        for order in (1, 2, 3):
            found = spectrum.moment(ritz, weights, order)
            assert abs(found.value - np.mean(exact**order)) < 4 * found.se
        trace = spectrum.moment(ritz, weights)
        assert abs(trace.value * len(exact) - exact.sum()) < 4 * trace.se * len(exact)
        mass = spectrum.negative_mass(ritz, weights)
        limit = spectrum.threshold(ritz, weights)
        assert abs(mass.value - np.mean(exact < -limit)) < 4 * mass.se + 1e-12
        assert mass.value > 0.05


def test_density_integrates_to_one_and_to_the_number_of_eigenvalues():
    case = at_once(squared_error())
    matrix = case.hessian()
    exact = np.linalg.eigvalsh(matrix.numpy())
    ritz, weights = starts(case, matrix, "spectrum", 30)
    sigma = spectrum.width(ritz, weights)
    at = spectrum.grid(ritz, weights, sigma)
    phi = spectrum.density(ritz, weights, at, sigma)
    assert np.trapezoid(phi.value, at) == pytest.approx(1, abs=1e-3)
    dense = np.exp(-0.5 * ((at[:, None] - exact) / sigma) ** 2).mean(1)
    dense /= sigma * math.sqrt(2 * math.pi)
    # P = 25 < 64 steps: every Ritz value is an eigenvalue, and only the weights scatter.
    assert np.all(np.abs(phi.value - dense) <= 5 * phi.se + 1e-6 * dense.max())
    one = spectrum.density(ritz[:1], weights[:1], at, sigma)
    assert np.isnan(one.se).all() and np.isfinite(one.value).all()


def test_ghosts_do_not_come_back():
    """Without reorthogonalisation the largest eigenvalue returns again and again."""
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([100.0])]).double()
    found = lanczos(lambda v: values * v, torch.ones(200).double(), 150)
    assert (found.values > 50).sum() == 1
    gram = found.basis @ found.basis.T
    assert torch.allclose(gram, torch.eye(len(gram)).double(), atol=1e-12)


# -- what rescaling does ---------------------------------------------------------------------------


def relu_network() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x, y = numbers(20, 4, seed=1), labels(20, 2)
    problem = lsweep.Problem(fixed(model), {"train": (x, y)}, loss=nn.CrossEntropyLoss())
    return Case(problem, lambda net: nn.functional.cross_entropy(net(x), y), batch_size=20)


def rescaled(case: Case, factors: Tensor) -> Case:
    """The same function with each hidden unit scaled up, and down again behind its ReLU."""
    model = copy.deepcopy(case.problem.model)
    with torch.no_grad():
        model[0].weight *= factors[:, None]
        model[0].bias *= factors
        model[2].weight /= factors
    data = case.problem.data
    problem = lsweep.Problem(model, data, loss=nn.CrossEntropyLoss())
    return Case(problem, case.whole, batch_size=20)


def numbers_of(case: Case) -> dict[str, float]:
    objective, scales = case.objective(), case.objective().filter_scales()
    out: dict[str, float] = {"value": objective.value()}
    for name in POINTWISE:
        found = compute(name, objective, scales, radius=0.25)
        out |= {
            n: float(v.values.sum()) if name == "input_jacobian" else v for n, v in found.items()
        }
    return out


@functools.cache
def of_relu_network() -> dict[str, float]:
    return numbers_of(relu_network())


def test_what_a_rescaling_of_layers_leaves_alone():
    case = relu_network()
    after = numbers_of(rescaled(case, torch.full((6,), 4.0).double()))
    before = of_relu_network()
    same = {n for n in before if after[n] == pytest.approx(before[n], rel=1e-9, abs=1e-13)}
    for name in (
        "value",
        "filter_hessian_max",
        "filter_hessian_min",
        "filter_hessian_trace",
        "filter_ritz_00",
        "worst_filter_1",
        "worst_filter_20",
        "worst_adaptive_1",
        "worst_adaptive_20",
        "input_jacobian",
        "relative_flatness",
    ):
        assert name in same, name
    for name in ("hessian_max", "hessian_min", "hessian_trace", "ritz_00", "keskar_sharpness"):
        assert after[name] != pytest.approx(before[name], rel=0.1), name


def test_what_a_rescaling_of_single_units_leaves_alone():
    case = relu_network()
    factors = torch.tensor([0.25, 8, 1, 2, 0.5, 4]).double()
    before, after = of_relu_network(), numbers_of(rescaled(case, factors))
    for name in ("value", "worst_adaptive_1", "worst_adaptive_20", "input_jacobian"):
        assert after[name] == pytest.approx(before[name], rel=1e-9), name
    # A filter of the second layer mixes units that went different ways: no longer the same.
    for name in ("filter_hessian_max", "filter_hessian_trace", "worst_filter_1"):
        assert after[name] != pytest.approx(before[name], rel=0.02), name


# -- what is missing -------------------------------------------------------------------------------


def test_without_scipy_there_is_one_line(monkeypatch):
    case = transformer()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for name, metric in POINTWISE.items():
        if metric.scipy:
            with pytest.raises(LsweepError, match=r"needs scipy: pip install 'lsweep\[measure\]'"):
                compute(name, case.objective(), case.scales())
    compute("hessian_trace", case.objective(), case.scales())


def test_a_worst_case_needs_a_radius():
    case = at_once(squared_error())
    with pytest.raises(LsweepError, match='a direction of kind = "radius"'):
        compute("worst_case", case.objective(), case.scales())
