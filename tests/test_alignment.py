"""Shuffled units are put back bit for bit; networks that were trained apart come nearer.

Exact answers: the permutation that was made is the one that is found, and the numbers are only
moved. For networks trained apart the objective and the barrier must not grow.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import numbers
from torch import Tensor, nn

from lsweep.digits import Network, digits
from lsweep.invariance.alignment import Alignment, align
from lsweep.invariance.symmetries import discover, permuted
from lsweep.problems.weights import State, buffers_of, parameters_of

pytest.importorskip("scipy")


def state_of(net: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in {**parameters_of(net), **buffers_of(net)}.items()}


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def residual(seed: int) -> nn.Module:
    net = Network(True, seed, depth=6, width=16)
    torch.manual_seed(seed)
    for name, b in net.named_buffers():
        if "num" not in name:
            b.uniform_(0.5, 1.5)
    return net


def shuffled(state: State, units: tuple, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    for group in units:
        state = permuted(state, group, torch.randperm(group.size, generator=generator))
    return state


@pytest.mark.parametrize("make", [perceptron, residual])
def test_shuffled_units_are_put_back_bit_for_bit(make):
    net = make(0)
    units = discover(net, torch.zeros(2, 64)).units
    a = state_of(net)
    b = shuffled(a, units, 5)
    assert not all(torch.equal(b[n], a[n]) for n in a)
    found = align(a, b, units, list(parameters_of(net)))
    assert all(torch.equal(found.state[n], a[n]) for n in a)  # float32 in, the same numbers out
    assert found.after == pytest.approx(1, abs=1e-15) and found.before < 0.9
    assert found.moved > 0 and found.held == ()


def test_only_places_change_and_the_seed_decides():
    a, b = perceptron(0), perceptron(1)
    units = discover(a, torch.zeros(2, 64)).units
    names = list(parameters_of(a))
    found = [align(state_of(a), state_of(b), units, names, seed=3) for _ in range(2)]
    assert all(torch.equal(found[0].state[n], found[1].state[n]) for n in names)
    before = state_of(b)
    for n in names:
        assert torch.equal(found[0].state[n].flatten().sort()[0], before[n].flatten().sort()[0])
    assert found[0].after > found[0].before
    one = align(state_of(a), state_of(b), units, names, seed=3, restarts=1)
    assert found[0].after >= one.after >= found[0].before  # more beginnings are never worse
    net = copy.deepcopy(b)
    net.load_state_dict(found[0].state)
    x = numbers(5, 64, seed=2)
    assert torch.allclose(net.double()(x), b.double()(x), rtol=1e-12, atol=1e-12)


def test_a_network_without_units_is_left_as_it_is():
    net = nn.Linear(3, 3)
    found = align(state_of(net), state_of(nn.Linear(3, 3)), (), ["weight", "bias"])
    assert isinstance(found, Alignment) and found.orders == {} and found.after == found.before


def loss_along(a: nn.Module, b: State, x: Tensor, y: Tensor) -> Tensor:
    start, net = state_of(a), copy.deepcopy(a)
    out = []
    for t in torch.linspace(0, 1, 11).tolist():
        net.load_state_dict({n: (1 - t) * start[n] + t * b[n] for n in start})
        out.append(F.cross_entropy(net(x), y).detach())
    return torch.stack(out)


def test_networks_trained_apart_come_nearer_and_their_barrier_falls():
    x, y = digits()["train"]
    x, y = x[:300], y[:300]
    nets = []
    for seed in (0, 1):
        net = perceptron(seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(60):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(x), y))
            optimizer.step()
        nets.append(net)
    a, b = nets
    units = discover(a, x).units
    found = align(state_of(a), state_of(b), units, list(parameters_of(a)))
    assert found.after > found.before + 0.05

    def barrier(state: State) -> float:
        values = loss_along(a, state, x, y)
        return float((values - (values[0] + values[-1]) / 2).max())

    assert barrier(found.state) < barrier(state_of(b)) - 0.05
