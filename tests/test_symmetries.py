"""Hidden units are found where they are: whatever is found trades places and changes nothing.

The network itself is the oracle: each group is permuted at random, and the output must stay, in
float64 to 1e-12; ReLU groups are rescaled too, to the same accuracy; and where nothing can be
found, that is said.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsweep.digits import Network
from lsweep.invariance.bench import inputs_of
from lsweep.invariance.symmetries import Discovered, Slot, Units, discover, permuted
from lsweep.problems.calling import call
from lsweep.problems.problem import Problem
from lsweep.problems.weights import State, buffers_of, parameters_of

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from networks import ResNet, ViT


class SwiGLU(nn.Module):
    """A gated MLP in a residual stream that is normalised by RMS."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        self.gate, self.up = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(x)
        return self.last(x + self.down(F.silu(self.gate(y)) * self.up(y)))


class Attention(nn.Module):
    """Attention by hand, with rotated queries and keys where that is asked."""

    def __init__(self, rotated: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        angle = (
            torch.arange(6)[:, None] * torch.tensor([1.0, 0.1]) if rotated else torch.zeros(1, 2)
        )
        self.register_buffer("angle", angle.repeat(1, 2).double(), persistent=False)
        self.rotated = rotated

    def turned(self, x: Tensor) -> Tensor:
        if not self.rotated:
            return x
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * self.angle.cos() + half * self.angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        x = self.first(x)
        q, k, v = (m(x).view(n, tokens, 2, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        weights = torch.softmax(self.turned(q) @ self.turned(k).transpose(-1, -2) / 2, -1)
        return self.last(x + self.o((weights @ v).transpose(1, 2).reshape(n, tokens, 8)))


class Classed(nn.Module):
    """A transformer with a class token, positions and torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8))
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        return self.head(self.block(x)[:, 0])


class Mixer(nn.Module):
    """One layer of an MLP-Mixer: units over tokens, and units over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norms = nn.Conv2d(1, 8, 2, 2), nn.ModuleList([nn.LayerNorm(8)] * 2)
        self.tokens = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.channels = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.norms[1](x))).mean(1))


class Dense(nn.Module):
    """Layers that read all layers before them, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.c = nn.BatchNorm2d(7), nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.cat([x, F.relu(self.b(x))], 1)
        return self.head(F.relu(self.c(self.norm(x))).amax((2, 3)))


class Tied(nn.Module):
    """A language model whose last layer is its first, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.low = nn.ParameterList([torch.randn(6, 2), torch.randn(2, 6)])
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weight = self.mlp.weight + self.low[0] @ self.low[1]
        return self.head(x + torch.tanh(F.linear(x, weight, self.mlp.bias)))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.LeakyReLU(), nn.Dropout(),
        nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


class Parted(nn.Module):
    """One layer whose halves go two ways, and a stream that is cast on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(3, 8)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).split(4, -1)
        return self.one(F.relu(a).float().double()) + self.two(torch.tanh(b))


def images(n: int, channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size).double()


# name -> network, inputs, {group: (size, activation)} as it must be found
FOUND = {
    "perceptron": (
        lambda: nn.Sequential(
            nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.GELU(),
            nn.Linear(4, 2),
        ),
        lambda: torch.randn(3, 3).double(),
        {"0": (5, "relu"), "2": (6, "tanh"), "4": (4, "gelu")},
    ),
    "convolutional": (
        convolutional, lambda: images(3),
        {"0": (4, "relu"), "4": (6, "relu+leaky_relu"), "10": (7, "relu")},
    ),
    "upsampled": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 5, 3),
            nn.GELU(), nn.Upsample(size=(9, 9), mode="bilinear"), nn.Conv2d(5, 2, 1),
        ),
        lambda: images(2, size=5),
        {"0": (4, "relu"), "3": (5, "gelu")},
    ),
    "residual": (
        lambda: Network(True, depth=6, width=8), lambda: torch.randn(3, 64).double(),
        {"0": (8, "relu"), "1.2": (8, "relu"), "2.2": (8, "relu")},
    ),
    "resnet": (
        lambda: ResNet(1), lambda: images(2, 3, 16),
        {"conv": (16, "relu"), "layers.1.conv2": (32, "relu"), "layers.2.conv2": (64, "relu")}
        | {f"layers.{i}.conv1": (16 << i, "relu") for i in range(3)},
    ),
    "vit": (
        lambda: ViT(16, 1), lambda: images(2, 3, 32),
        {"patches": (16, "none"), "layers.0.mlp.0": (64, "gelu")}
        | {f"layers.0.attention.qkv query-key {i}": (4, "dot") for i in range(4)}
        | {f"layers.0.attention.qkv value {i}": (4, "none") for i in range(4)},
    ),
    "classed": (
        Classed, lambda: images(3, 1, 4),
        {"token": (8, "none"), "block.linear1": (12, "relu")}
        | {f"block.self_attn query-key {i}": (4, "dot") for i in range(2)}
        | {f"block.self_attn value {i}": (4, "none") for i in range(2)},
    ),
    "attention": (
        Attention, lambda: torch.randn(3, 6, 5).double(),
        {"first": (8, "none")} | {f"q query-key {i}": (4, "dot") for i in range(2)}
        | {f"v value {i}": (4, "none") for i in range(2)},
    ),
    "swiglu": (
        SwiGLU, lambda: torch.randn(3, 5).double(),
        {"first": (8, "none"), "gate": (12, "silu+product")},
    ),
    "mixer": (
        Mixer, lambda: images(3, 1, 4),
        {"patch": (8, "shift+gelu"), "tokens.0": (6, "gelu"), "channels.0": (12, "gelu")},
    ),
    "dense": (
        Dense, lambda: images(3),
        {"a": (3, "relu"), "b": (4, "relu"), "c": (5, "relu")},
    ),
    "parted": (
        Parted, lambda: torch.randn(3, 3).double(),
        {"both": (4, "relu"), "both (2)": (4, "tanh")},
    ),
    "tied": (
        Tied, lambda: torch.randint(0, 7, (3, 5)),
        {"embed": (6, "tanh"), "low.1": (2, "none")},
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, object, Discovered]:
    """Return a float64 network whose norms are all different, inputs, and what was found."""
    torch.manual_seed(3)
    make, inputs, _ = FOUND[name]
    net, x = make().double().eval(), inputs()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for p in net.parameters():  # what begins as zeros or ones would hide a wrong move
            p.add_(0.1 * torch.randn_like(p))
    return net, x, discover(net, x)


def state_of(net: nn.Module) -> State:
    return {**parameters_of(net), **buffers_of(net)}


@torch.no_grad()
def output(net: nn.Module, x: object, state: State) -> Tensor:
    for name, tensor in state_of(net).items():
        tensor.copy_(state[name])
    return call(net, x)


def turned(size: int) -> Tensor:
    """A permutation that moves everything."""
    return torch.arange(size).roll(1)


@pytest.mark.parametrize("name", FOUND)
def test_groups_are_those_expected_and_each_trades_places(name):
    net, x, found = made(name)
    assert {u.name: (u.size, u.activation) for u in found.units} == FOUND[name][2]
    assert found.unknown == ()
    state = {n: t.detach().clone() for n, t in state_of(net).items()}
    want = output(net, x, state)
    for group in found.units:
        assert group.permutable
        there = permuted(state, group, turned(group.size))
        assert not all(torch.equal(there[n], state[n]) for n in state)
        assert (output(net, x, there) - want).abs().max() < 1e-12 * want.abs().max() + 1e-14
        # A group that leaves out one of its slots does change the output: none is there in vain.
        # But a key's bias: it adds the same to all scores of a query, which a softmax ignores.
        for slot in (s for s in group.slots if not {"bias", "key"} <= set(s.roles)):
            rest = tuple(s for s in group.slots if s is not slot)
            part = permuted(state, Units(group.name, group.size, rest), turned(group.size))
            assert (output(net, x, part) - want).abs().max() > 1e-9, (group.name, slot.name)


def scaled(state: State, slot: Slot, factors: Tensor) -> None:
    lies = [-1 if d == slot.dim else 1 for d in range(state[slot.name].dim())]
    whole = torch.ones(state[slot.name].shape[slot.dim]).double()
    whole[slot.index.flatten()] = factors.repeat_interleave(slot.index.shape[1])
    state[slot.name] = state[slot.name] * whole.view(lies)


@pytest.mark.parametrize(("name", "groups"), [
    ("perceptron", {"0": True, "2": False, "4": False}),
    ("convolutional", {"4": True, "10": True}),
    ("dense", {"a": True, "c": True}),
])  # fmt: skip
def test_relu_units_can_be_rescaled_where_roles_say_so_and_others_cannot(name, groups):
    net, x, found = made(name)
    state = {n: t.detach().clone() for n, t in state_of(net).items()}
    want = output(net, x, state)
    for group in (u for u in found.units if u.name in groups):
        there = dict(state)
        factors = torch.linspace(0.5, 3, group.size).double()
        for slot in group.slots:
            if {"row", "bias"} & set(slot.roles):
                scaled(there, slot, factors)
            elif "column" in slot.roles:
                scaled(there, slot, 1 / factors)
        if name == "dense" and group.name == "a":  # its norm reads it: the mean goes along
            scaled(there, next(s for s in group.slots if "mean" in s.roles), factors)
            scaled(there, next(s for s in group.slots if "scale" in s.roles), 1 / factors)
            for slot in [s for s in group.slots if "bias" in s.roles and s.name == "norm.bias"]:
                scaled(there, slot, 1 / factors)
            for slot in [s for s in group.slots if s.name == "c.weight"]:
                scaled(there, slot, factors)
        error = (output(net, x, there) - want).abs().max() / want.abs().max()
        assert (error < 1e-12) == groups[group.name], (group.name, float(error))


def test_roles_of_a_residual_stream_and_of_attention():
    _, _, found = made("residual")
    stream = found.units[0]
    assert stream.stream and not found.units[1].stream
    assert [s.name for s in stream.slots if "row" in s.roles] == [
        "0.weight",
        "1.5.weight",
        "2.5.weight",
    ]
    assert [s.name for s in stream.outgoing] == ["1.2.weight", "2.2.weight", "5.weight"]
    assert found.units[1].norm == "batch_norm 1.3"
    _, _, found = made("vit")
    group = next(u for u in found.units if u.name == "layers.0.attention.qkv query-key 2")
    rows = {s.roles: s.index.flatten().tolist() for s in group.slots}
    assert rows["row", "query"] == [8, 9, 10, 11] and rows["row", "key"] == [24, 25, 26, 27]
    _, _, found = made("swiglu")
    group = next(u for u in found.units if "product" in u.activations)
    assert {r: s.name for s in group.slots for r in s.roles if r in ("gate", "up")} == {
        "gate": "gate.weight", "up": "up.weight"
    }  # fmt: skip
    _, _, found = made("convolutional")
    assert found.units[1].slots[-1].index.tolist()[1] == [4, 5, 6, 7]  # 2 x 2 places of channel 1


def test_rotated_queries_and_keys_are_known_but_hold_their_places():
    torch.manual_seed(0)
    found = discover(Attention(rotated=True).double(), torch.randn(2, 6, 5).double())
    held = [u for u in found.units if not u.permutable]
    assert [u.name for u in held] == ["q query-key"] and held[0].size == 4
    assert {s.index.shape[1] for s in held[0].slots} == {2}  # what is rotated into each other


class Control(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.hidden, self.head = (
            nn.LSTM(4, 6, batch_first=True),
            nn.Linear(6, 5),
            nn.Linear(5, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.cells(x)[0][:, -1])))


def test_what_cannot_be_followed_is_said_and_never_claimed():
    found = discover(Control(), torch.randn(3, 4))
    assert found.units == () and "does not trace" in found.unknown[0]
    found = discover(Recurrent(), torch.randn(3, 5, 4))
    assert [u.name for u in found.units] == ["hidden"]
    assert found.unknown == ("lstm is not followed (cells)",)
    grouped = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2))
    found = discover(
        nn.Sequential(grouped, nn.Flatten(), nn.Linear(96, 2)), torch.randn(2, 1, 8, 8)
    )
    assert {u.name: u.size for u in found.units} == {"0.2 0": 3, "0.2 1": 3}
    assert "convolution of 2 groups" in found.unknown[0]


class Named(nn.Module):
    """Takes more than tensors, in places and by names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None, loud: bool = False) -> Tensor:
        x = F.relu(self.a(x if mask is None else x * mask))
        return self.b(2 * x if loud else x)


class Two(tuple):
    """Inputs that cannot be made anew from a list."""

    def __new__(cls, a: Tensor, b: Tensor) -> Two:
        return super().__new__(cls, (a, b))


def test_any_inputs_end_in_a_reason():
    x = torch.randn(3, 4)
    for inputs in ((x, None, True), {"x": x, "loud": True}, (x, torch.tensor(1.0))):
        found = discover(Named(), inputs)
        assert found.units == () and "its inputs are not plain tensors" in found.unknown[0]
    found = discover(Named(), Two(x, x))
    assert found.units == () and "the network is not followed: TypeError" in found.unknown[0]


def test_inputs_in_places_and_by_names_are_all_kept():
    def forward(model, batch):
        return {"loss": model(batch, mask=torch.ones_like(batch)).square().sum(1)}

    problem = Problem(Named(), {"train": torch.randn(3, 4)}, forward=forward)
    inputs = inputs_of(problem, "loss")
    assert list(inputs) == ["x", "mask"] and inputs["x"].shape == (2, 4)
    (units,) = discover(problem.model, inputs).units
    assert (units.name, units.size, units.activation) == ("a", 5, "relu")
