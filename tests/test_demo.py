"""The demo: its two networks differ in nothing but the skips, and its table says only what it saw.

The demo itself, with its pictures and its numbers, is run by .ci/run.
"""

import torch

from lsweep.axes.noise import random_tensor
from lsweep.demo import Trained, table
from lsweep.digits import Network, digits, train


def trained(skip, seed, nonconvex, loss=0.02):
    return Trained(skip, seed, loss, 2.5, nonconvex, 30, 5.0)


def test_the_networks_differ_in_nothing_but_the_skips():
    plain, skip = Network(False, seed=3).state_dict(), Network(True, seed=3).state_dict()
    assert list(plain) == list(skip)
    assert all(torch.equal(plain[n], skip[n]) for n in plain)
    # and so they meet the same noise, which is keyed by seed, axis and name
    for name in ("0.weight", "3.2.weight"):
        noise = [random_tensor(0, "x", name, state[name]) for state in (plain, skip)]
        assert torch.equal(*noise)
    x = torch.ones(2, 64)
    outputs = [Network(s, seed=3).eval()(x) for s in (False, True)]
    assert not torch.allclose(*outputs)


def test_initial_weights_and_training_come_from_the_seed_alone():
    data = digits(200)["train"]
    states = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        network = Network(True, seed=5, depth=4, width=8)
        train(network, *data, seed=5)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(network.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    other = Network(True, seed=6, depth=4, width=8).state_dict()
    assert not torch.equal(other["0.weight"], Network(True, 5, 4, 8).state_dict()["0.weight"])


def test_the_digits_are_real_and_split_once():
    data = digits()
    assert [len(x) for x, _ in data.values()] == [1000, 797]
    assert all(set(y.tolist()) == set(range(10)) for _, y in data.values())
    x, _ = data["train"]
    assert abs(float(x.mean())) < 1e-5
    assert abs(float(x.std()) - 1) < 1e-5


def test_the_table_claims_roughness_only_where_every_seed_shows_it():
    rough = [trained(False, s, 0.25) for s in range(3)]
    smooth = [trained(True, s, 0.01) for s in range(3)]
    assert "rougher, in every seed" in table([*rough, *smooth])
    # one smooth network above the threshold is enough to weaken the claim
    assert "by less than usual" in table([*rough, *smooth, trained(True, 3, 0.06)])
    # one plain network as smooth as the others, and nothing is claimed
    text = table([*rough, *smooth, trained(False, 3, 0.005)])
    assert "do not differ clearly" in text
    assert "rougher" not in text


def test_the_table_says_when_training_losses_are_not_matched():
    pair = [trained(False, 0, 0.25, loss=0.02), trained(True, 0, 0.0, loss=0.015)]
    assert "they are matched" in table(pair)
    apart = [trained(False, 0, 0.25, loss=0.9), trained(True, 0, 0.0, loss=0.015)]
    assert "NOT matched (0.0150 to 0.9000)" in table(apart)
