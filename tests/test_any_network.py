"""problem, data, batchnorm, takeover, preflight: any network, any data, and all given back.

Promises: whatever the layers, the data and the loss, a value is what torch gives by hand for the
network with its weights moved; batch norm does what its mode says; the network, its modes, flags,
gradients and buffers and all random generators are afterwards bit for bit as before, also when the
loss raises; what cannot be swept is refused with the reason.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict

import numpy as np
import problems
import pytest
import torch
import torch.nn.functional as F
from problems import another, at, fixed, labels, numbers, toward
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lsweep
from lsweep.errors import LsweepError
from lsweep.surfaces.surface import Status

SINGLE = torch.float32


# -- networks ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """A small decoder by hand: tied embedding, learned positions, one block."""

    def __init__(self, vocabulary=11, width=8, length=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        n = input_ids.shape[1]
        x = self.embed(input_ids) + self.position[:n]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        h = self.norm(x)
        x = x + self.attention(h, h, h, attn_mask=future, need_weights=False)[0]
        return self.head(x + self.mlp(x))


class Recurrent(nn.Module):
    """The last state of an LSTM or a GRU, two layers, both ways."""

    def __init__(self, kind):
        super().__init__()
        self.cells = kind(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.cells(x)[0][:, -1])


class Structured(nn.Module):
    """Containers, a module used twice, a scalar parameter, a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        shared = nn.Linear(4, 4)
        self.parts = nn.ModuleDict({"a": shared, "b": nn.ModuleList([nn.Tanh(), shared])})
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.lists = nn.ParameterList([nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 4))])
        self.register_buffer("shift", torch.full((4,), 0.25), persistent=False)

    def forward(self, x):
        h = self.parts["a"](x) + self.shift
        for module in self.parts["b"]:
            h = module(h)
        return (self.gain * h * self.lists[0]) @ self.lists[1].T


class Tied(nn.Module):
    """Encoder and decoder share one matrix, the decoder transposed."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(4, 3, bias=False)
        self.again = nn.Linear(4, 3, bias=False)
        self.again.weight = self.encode.weight

    def forward(self, x):
        return torch.tanh(self.encode(x)) + self.again(x**2)


def stack(*layers):
    return nn.Sequential(*layers)


IMAGE, ROW, SEQUENCE = (2, 6, 6), (4,), (5, 3)
# name, network, shape of one sample's input: and why the row is here
NETWORKS = [
    ("mlp", lambda: stack(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), ROW),
    (  # batch norm with statistics, in two dimensions
        "conv batch norm",
        lambda: stack(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        ),
        IMAGE,
    ),
    (  # norms without statistics; depthwise convolution
        "group norm",
        lambda: stack(
            nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
        ),
        IMAGE,
    ),
    (  # output units along dimension 1, per group
        "transposed convolution",
        lambda: stack(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(196, 3)),
        IMAGE,
    ),
    ("layer norm", lambda: stack(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), ROW),
    # torch keeps a second list of an LSTM's weights
    ("lstm", lambda: Recurrent(nn.LSTM), SEQUENCE),
    ("gru", lambda: Recurrent(nn.GRU), SEQUENCE),
    (  # a fused projection, and torch's fast path in eval mode, which reads weights on its own
        "transformer encoder",
        lambda: stack(
            nn.Linear(3, 8),
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
            nn.Flatten(),
            nn.Linear(40, 3),
        ),
        SEQUENCE,
    ),
    ("structured", Structured, ROW),
    ("tied", Tied, ROW),
    # the names in it begin with "module."
    ("data parallel", lambda: nn.DataParallel(stack(nn.Linear(4, 3), nn.Tanh())), ROW),
    ("weight norm", lambda: stack(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), ROW),
    ("spectral norm", lambda: stack(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))), ROW),
    ("dropout", lambda: stack(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 3)), ROW),
    # half of the formats that checkpoints come in
    ("half precision", lambda: stack(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).half(), ROW),
    ("bfloat16", lambda: stack(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16(), ROW),
]


def classes_problem(make, shape, samples=11):
    torch.manual_seed(3)
    model = make()
    for p in model.parameters():
        if p.dim() > 1:
            with torch.no_grad():
                p.mul_(2)
    data = {"train": (numbers(samples, *shape, dtype=SINGLE), labels(samples, 3))}
    return lsweep.Problem(model, data, loss=nn.CrossEntropyLoss(), metrics={"acc": lsweep.accuracy})


@pytest.mark.parametrize(("name", "make", "shape"), NETWORKS, ids=[r[0] for r in NETWORKS])
def test_every_network_is_moved_as_by_hand_and_given_back(name, make, shape, tmp_path):
    problem = classes_problem(make, shape)
    if "half" not in name and "bfloat" not in name:
        problem.model.double()
    problem.model.train()
    directions = {
        "x": toward(problem.model, tmp_path / "b.pt"),
        "y": {"kind": "random", "ignore": "none"},  # normalises filters of every kind of layer
    }
    before = everything(problem.model)
    s = lsweep.sweep(
        problem, x=(-0.5, 1, 4), y=(-0.7, 0.7, 3), directions=directions, precision="float64"
    )
    assert_same(before, everything(problem.model))
    x, y = problem.data["train"]
    for i, offset in enumerate(s.x):
        out = at(problem.model, (offset, another(problem.model)))(x.double()).detach()
        assert s["train_loss"][1, i] == pytest.approx(float(F.cross_entropy(out, y)), rel=1e-10)
    assert np.isfinite(s["train_loss"]).all()
    assert (s["train_loss"][0] != s["train_loss"][1]).all()


def test_regression_with_frozen_parameters_moves_all_of_them(tmp_path):
    """Whether a parameter was trained does not matter: `parameters` says what moves."""
    model = fixed(stack(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double())
    model[0].requires_grad_(False)
    x, y = numbers(9, 4), numbers(9, 2, seed=1)
    problem = lsweep.Problem(model, {"train": (x, y)}, loss=nn.MSELoss())
    before = everything(model)
    recipe = toward(model, tmp_path / "b.pt")
    s = lsweep.sweep(problem, x=(0, 1, 2), directions=recipe, precision="float64")
    out = at(model, (1.0, another(model)))(x).detach()
    assert s["train_loss"][1] == pytest.approx(float(F.mse_loss(out, y)), rel=1e-12)
    assert_same(before, everything(model))


def test_language_model_is_weighted_by_tokens(tmp_path):
    """Batches of 2 give the mean over the tokens of all 5 sequences, masked and ignored apart."""
    model = fixed(Transformer().double())
    ids = labels(5, 11, 6)
    mask = torch.ones(5, 6, dtype=torch.long)
    mask[0, 3:] = mask[3, 1:] = 0  # one sequence is so short that it predicts nothing
    targets = torch.where(mask.bool(), ids, -100)
    targets[4, :4] = -100  # a prompt
    cases = {
        "ids": (ids, ids),
        "mask": ({"input_ids": ids, "attention_mask": mask}, torch.where(mask.bool(), ids, -100)),
        "labels": ({"input_ids": ids, "attention_mask": mask, "labels": targets}, targets),
    }
    for name, (data, wanted) in cases.items():
        problem = lsweep.Problem(model, {"train": data}, forward=lsweep.causal_lm)
        s = lsweep.sweep(
            problem,
            x=(-1, 1, 3),
            directions=toward(model, tmp_path / "b.pt"),
            precision="float64",
            batch_size=2,
        )
        for i, offset in enumerate(s.x):
            logits = at(model, (offset, another(model)))(ids).detach()[:, :-1]
            tokens = wanted[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            kept = tokens != -100
            hits = 100 * (logits.argmax(-1) == tokens)[kept].double().mean()
            assert s["train_loss"][i] == pytest.approx(float(loss), rel=1e-12), name
            assert s["train_accuracy"][i] == pytest.approx(float(hits), rel=1e-12), name


def residual(model, batch):
    """u'' + u = 0 at x and u(0) = 1: a loss that needs derivatives of the network."""
    x = batch.clone().requires_grad_()
    u = model(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    boundary = (model(torch.zeros_like(x)) - 1) ** 2
    return {"loss": ((second + u) ** 2 + boundary).squeeze(1), "boundary": boundary.squeeze(1)}


def test_physics_informed_loss_takes_derivatives_inside():
    """The exact solution as a network, cos(ωx): along ω the loss has a closed form."""

    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.omega = nn.Parameter(torch.ones(1, 1).double())

        def forward(self, x):
            return torch.cos(x @ self.omega)

    x = numbers(12, 1)
    problem = lsweep.Problem(Cosine(), {"train": x}, forward=residual, grad=True)
    before = everything(problem.model)
    s = lsweep.sweep(problem, x=(-0.5, 0.5, 5), precision="float64")
    assert_same(before, everything(problem.model))
    step = float(np.sign(s["weight_sq"][-1] - 1))  # the direction is ±1, as long as the filter
    for offset, found in zip(s.x, s["train_loss"], strict=True):
        omega = 1 + step * offset
        wanted = ((1 - omega**2) * torch.cos(omega * x)).square().mean()
        assert found == pytest.approx(float(wanted), rel=1e-8, abs=1e-25)
    assert (s["train_boundary"] == 0).all()
    with pytest.raises(LsweepError, match=r"does not require grad.*grad=True"):
        lsweep.sweep(lsweep.Problem(Cosine(), {"train": x}, forward=residual), x=(-1, 1, 3))


def test_gradients_do_not_accumulate_in_the_network():
    """A loss may call backward(); what the optimiser left in .grad stays."""
    model = fixed(nn.Linear(3, 1))
    model(numbers(2, 3, dtype=SINGLE)).sum().backward()

    def forward(net, batch):
        loss = net(batch).square().squeeze(1)
        loss.mean().backward()
        return {"loss": loss}

    before = everything(model)
    problem = lsweep.Problem(model, {"train": numbers(5, 3)}, forward=forward, grad=True)
    lsweep.sweep(problem, x=(-1, 1, 3), precision="float64")
    assert_same(before, everything(model))


def test_what_a_network_caches_during_a_sweep_does_not_stay():
    """A mask cached in float64 would break the next step of training in float32."""

    class Caching(nn.Linear):
        cache = None

        def forward(self, x):
            if self.cache is None:
                self.cache = torch.ones(4, 4, dtype=x.dtype)
            return super().forward(x @ self.cache)

    model = fixed(Caching(4, 3))
    x, y = numbers(6, 4, dtype=SINGLE), labels(6, 3)
    problem = lsweep.Problem(model, {"train": (x, y)}, loss=nn.CrossEntropyLoss())
    lsweep.sweep(problem, x=(-1, 1, 3), precision="float64")
    assert model.cache is None
    assert model(x).dtype == SINGLE


def test_hugging_face_output_and_batches(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=8, attn_pdrop=0.5
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    ids = labels(5, 13, 7)
    batches = DataLoader([{"input_ids": i, "labels": i} for i in ids], batch_size=2)
    model.save_pretrained(tmp_path / "b")
    problem = lsweep.Problem(model, {"train": batches}, forward=lsweep.causal_lm)
    before = everything(model)
    s = lsweep.sweep(problem, x=(-1, 1, 3))
    assert_same(before, everything(model))
    model.eval()
    assert s["train_loss"][1] == pytest.approx(
        float(model(ids, labels=ids).loss.detach()), rel=1e-5
    )
    assert s["train_loss"][0] != s["train_loss"][1]


# -- data ----------------------------------------------------------------------------------------


class Pairs(Dataset):
    """A map-style dataset; the classes as Python integers, as torchvision gives them."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class Stream(IterableDataset):
    """A dataset of samples whose length nobody knows."""

    def __init__(self, x, y):
        self.pairs = list(zip(x, y, strict=True))

    def __iter__(self):
        return iter(self.pairs)


class Again:
    """Batches of its own making, as often as one asks."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return ((self.x[a : a + 4], self.y[a : a + 4]) for a in range(0, len(self.x), 4))


def read_only(x, y):
    x, y = x.numpy().copy(), y.numpy().copy()
    x.flags.writeable = y.flags.writeable = False
    return x, y


# name, what is given from tensors (x, y): and why the row is here
DATA = [
    ("tensors", lambda x, y: (x, y)),
    ("numpy", lambda x, y: (x.numpy(), y.numpy())),
    ("read-only numpy", read_only),  # what np.load(..., mmap_mode="r") gives; torch warns of it
    ("dict of tensors", lambda x, y: {"input": x, "labels": y}),
    ("dict of numpy", lambda x, y: {"input": x.numpy(), "labels": y.numpy()}),
    ("inputs in a tuple", lambda x, y: ((x,), y)),
    ("inputs in a dict", lambda x, y: ({"input": x}, y)),
    ("dataset", Pairs),
    ("torch dataset", TensorDataset),
    ("data loader", lambda x, y: DataLoader(Pairs(x, y), batch_size=3)),
    ("loader of a stream", lambda x, y: DataLoader(Stream(x, y), batch_size=3)),
    ("stream", Stream),  # yields samples, not batches
    ("list of batches", lambda x, y: [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]),
    ("list of lists of numpy", lambda x, y: [[x[:3].numpy(), y[:3].numpy()], [x[3:], y[3:]]]),
    ("list of dicts", lambda x, y: [{"input": x[:3], "y": y[:3]}, {"input": x[3:], "y": y[3:]}]),
    ("re-iterable", Again),
]


@pytest.mark.parametrize(("name", "give"), DATA, ids=[r[0] for r in DATA])
def test_the_same_samples_give_the_same_surface_however_they_come(name, give):
    class Net(nn.Linear):
        """Takes its input by position and by name."""

        def forward(self, input):
            return super().forward(input)

    x, y = numbers(11, 4, dtype=SINGLE), labels(11, 3)
    model = fixed(Net(4, 3))
    data = give(x, y)
    problem = lsweep.Problem(model, {"train": data}, loss=nn.CrossEntropyLoss())
    before = everything(model)
    s = lsweep.sweep(problem, x=(-1, 1, 3), precision="float64")
    assert_same(before, everything(model))
    wanted = lsweep.sweep(
        lsweep.Problem(model, {"train": (x, y)}, loss=nn.CrossEntropyLoss()),
        x=(-1, 1, 3),
        precision="float64",
    )
    for variable in wanted:
        np.testing.assert_allclose(s[variable], wanted[variable], rtol=1e-12, atol=1e-14)
    assert next(iter(s.provenance["devices"].values()))["samples"] == {"train": 11}


class Packed(nn.Module):
    """A network that returns a plain dict."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, ids):
        return {"logits": self.network(ids), "loss": None}


def test_logits_in_a_plain_dict_are_found():
    plain = fixed(Transformer())
    found = [
        lsweep.sweep(lsweep.Problem(m, {"train": labels(4, 11, 6)}, forward=lsweep.causal_lm),
                     x=(-1, 1, 3))["train_loss"][1]
        for m in (plain, Packed(plain))
    ]  # fmt: skip
    assert found[0] == found[1]


def test_a_list_of_token_batches_is_no_pair_of_input_and_target():
    """Two batches of equal length, tensors both: all four sequences count."""
    model = fixed(Transformer().double())
    ids = labels(4, 11, 6)
    surfaces = [
        lsweep.sweep(
            lsweep.Problem(model, {"train": data}, forward=lsweep.causal_lm),
            x=(-1, 1, 3),
            precision="float64",
        )
        for data in (ids, [ids[:2], ids[2:]])
    ]
    np.testing.assert_allclose(surfaces[1]["train_loss"], surfaces[0]["train_loss"], rtol=1e-12)


def test_problem_from_a_factory_file_is_the_live_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = lsweep.Problem.from_factory(problems.factory_file(tmp_path, "classifier"), samples=16)
    a = lsweep.sweep(made, x=(-1, 1, 3), precision="float64")
    b = lsweep.sweep(problems.classifier(16), x=(-1, 1, 3), precision="float64")
    assert a["train_loss"].tobytes() == b["train_loss"].tobytes()
    assert made.source.options == {"samples": 16}


# -- eval mode, and all given back ---------------------------------------------------------------


def everything(model):
    """What must not change, down to the bits and to where they lie."""
    return {
        "parameters": [
            (n, p.dtype, p.data_ptr(), p.requires_grad, bits(p), p.grad is None or bits(p.grad))
            for n, p in model.named_parameters()
        ],
        "buffers": [
            (n, b.dtype, b.data_ptr(), bits(b))
            for m in model.modules()
            for n, b in m._buffers.items()
            if b is not None
        ],
        "modes": [m.training for m in model.modules()],
        "torch": bits(torch.get_rng_state()),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
    }


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(before, after):
    for what in before:
        assert before[what] == after[what], what


def test_dropout_is_off_and_batch_norm_uses_its_statistics():
    """A model left in train mode gives the surface of eval mode, and stays in train mode."""
    torch.manual_seed(0)
    net = stack(nn.Linear(4, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 3))
    data = {"train": (numbers(8, 4, dtype=SINGLE), labels(8, 3))}
    surfaces = []
    for mode in (True, False):
        net.train(mode)
        net[2].eval()  # a part in another mode than the rest
        before = everything(net)
        problem = lsweep.Problem(net, data, loss=nn.CrossEntropyLoss())
        surfaces.append(lsweep.sweep(problem, x=(-1, 1, 3))["train_loss"])
        assert_same(before, everything(net))
    assert surfaces[0].tobytes() == surfaces[1].tobytes()


class Trap:
    """A loss that fails at the n-th call; it also uses every generator, as a user's might."""

    def __init__(self, at, error):
        self.calls, self.at, self.error = 0, at, error

    def __call__(self, output, target):
        torch.rand(3), np.random.rand(2), random.random()
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return F.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("batch_norm", ["eval", "batch", "recalibrate"])
@pytest.mark.parametrize("when", [1, 4])  # in the pre-flight; after weights and statistics moved
def test_all_is_given_back_when_the_loss_raises(when, batch_norm):
    problem = problems.normalized()
    problem.model.train()
    before = everything(problem.model)
    trap = Trap(when, KeyboardInterrupt("stop"))
    broken = lsweep.Problem(problem.model, problem.data, loss=trap)
    with pytest.raises(KeyboardInterrupt):
        lsweep.sweep(broken, x=(-1, 1, 5), batch_norm=batch_norm, batch_size=16)
    assert trap.calls == when
    assert_same(before, everything(problem.model))


def test_a_point_that_raises_has_failed_with_text_and_the_others_stand():
    problem = problems.quadratic()
    theta = problem.model.weight.detach().clone()

    def loss(output, target):
        if (problem.model.weight - theta).norm() > 0.9 * theta.norm():
            raise ValueError("too far out")
        return problems.signed_square(output, target)

    s = lsweep.sweep(
        lsweep.Problem(problem.model, problem.data, loss=loss), x=(-1, 1, 5), precision="float64"
    )
    assert [Status(v).name for v in s.status] == ["FAILED", "OK", "OK", "OK", "FAILED"]
    assert np.isnan(s["train_loss"][[0, 4]]).all() and np.isfinite(s["train_loss"][1:4]).all()
    assert "ValueError: too far out" in str(s.provenance["failures"])


def test_a_custom_forward_is_asked_for_its_metrics_without_a_trace():
    """Finding out the names of metrics runs the network once, before the sweep takes it over."""
    model = problems.normalized().model.train()
    model.append(nn.Dropout(0.5))
    x, y = numbers(8, 4), labels(8, 3)

    def forward(net, batch):
        return {"loss": F.cross_entropy(net(batch[0]), batch[1], reduction="none")}

    before = everything(model)
    problem = lsweep.Problem(model, {"train": (x, y)}, forward=forward)
    assert problem.metric_names == ("loss",)
    assert_same(before, everything(model))


# -- batch norm ----------------------------------------------------------------------------------


def standardized(h, layer, mean, variance):
    return (h - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def by_hand(net, statistics, x):
    """The network of `problems.normalized` with the given (mean, variance) in its two norms."""
    first, norm1, _, second, norm2 = net
    h = torch.relu(standardized(first(x), norm1, *statistics(0, first(x))))
    h = second(h)
    return standardized(h, norm2, *statistics(1, h))


def batches(x, size):
    return [x[a : a + size] for a in range(0, len(x), size)]


@pytest.mark.parametrize("mode", ["eval", "batch", "recalibrate"])
def test_batch_norm_modes_by_hand(mode, tmp_path):
    problem = problems.normalized()
    recipe = toward(problem.model, tmp_path / "b.pt")
    s = lsweep.sweep(
        problem,
        x=(-1, 1, 3),
        directions=recipe,
        precision="float64",
        batch_norm=mode,
        batch_size=8,  # 30 train samples: 8, 8, 8, 6
    )
    x, y = problem.data["test"]
    for i, offset in enumerate(s.x):
        net = at(problem.model, (offset, another(problem.model)))
        with torch.no_grad():
            if mode == "eval":
                kept = [(m.running_mean, m.running_var) for m in (net[1], net[4])]
                out = by_hand(net, lambda k, _, kept=kept: kept[k], x)
            elif mode == "batch":  # of that split, biased variance
                parts = [
                    by_hand(net, lambda _, h: (h.mean(0), h.var(0, unbiased=False)), b)
                    for b in batches(x, 8)
                ]
                out = torch.cat(parts)
            else:  # the mean over train batches of mean and unbiased variance, for every split
                seen = [[], []]

                def note(k, h, seen=seen):
                    seen[k].append((h.mean(0), h.var(0, unbiased=True)))
                    return h.mean(0), h.var(0, unbiased=False)

                for b in batches(problem.data["train"][0], 8):
                    by_hand(net, note, b)
                anew = [
                    tuple(torch.stack(t).mean(0) for t in zip(*part, strict=True)) for part in seen
                ]
                out = by_hand(net, lambda k, _, anew=anew: anew[k], x)
            wanted = float(F.cross_entropy(out, y))
        assert s["test_loss"][i] == pytest.approx(wanted, rel=1e-11)


def test_recalibrate_is_what_train_mode_with_cumulative_averaging_gives():
    problem = problems.normalized()
    s = lsweep.sweep(
        problem, x=(0, 1, 2), precision="float64", batch_norm="recalibrate", batch_size=7
    )
    net = copy.deepcopy(problem.model)
    for m in (net[1], net[4]):
        m.reset_running_stats()
        m.momentum = None
    net.train()
    for b in batches(problem.data["train"][0], 7):
        net(b)
    net.eval()
    for split, (x, y) in problem.data.items():
        wanted = float(F.cross_entropy(net(x).detach(), y))
        assert s[f"{split}_loss"][0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("precision", "said"), [("float32", True), ("float64", False)])
def test_float64_weights_are_not_rounded_without_a_word(precision, said):
    x = torch.zeros(4, 2, dtype=torch.float64)
    problem = lsweep.Problem(nn.Linear(2, 2).double(), {"train": (x, x)}, loss=nn.MSELoss())
    found = lsweep.sweep(problem, x=(-1, 1, 3), precision=precision).provenance["caption"]
    assert found.endswith(precision + ", of float64 weights." * said + "." * (not said))


def test_the_difference_that_recalibration_makes_is_measured_and_in_the_caption():
    """Two routes: what eval mode notes down is what a sweep in recalibrate mode finds."""
    problem = problems.normalized()
    grid = {"x": (-1, 1, 3), "y": (-1, 1, 3)}
    kept = lsweep.sweep(problem, **grid, precision="float64", batch_size=8)
    anew = lsweep.sweep(
        problem, **grid, precision="float64", batch_size=8, batch_norm="recalibrate"
    )
    check = next(iter(kept.provenance["devices"].values()))["batch_norm"]
    assert check["offsets"] == [[1, 0], [-1, 0], [0, 1], [0, -1]]
    at = [(1, 2), (1, 0), (2, 1), (0, 1)]  # (y, x) of those offsets
    for name, surface in (("eval", kept), ("recalibrate", anew)):
        values = [surface["train_loss"][i] for i in at]
        np.testing.assert_allclose(check[name], values, rtol=1e-12)
    largest = max(abs(anew["train_loss"][i] / kept["train_loss"][i] - 1) for i in at)
    assert check["largest_relative"] == pytest.approx(largest, rel=1e-9)
    assert f"up to {largest:.0%} at |offset| = 1" in kept.provenance["caption"]
    assert next(iter(anew.provenance["devices"].values()))["batch_norm"] is None
    assert "batch norm recalibrate" in anew.provenance["caption"]


# -- refused, with the reason --------------------------------------------------------------------


class Noisy(Pairs):
    """An augmentation that nobody switched off."""

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(4), int(self.y[i])


class OwnNoise(Pairs):
    """The same with a generator of its own, as torchvision v2 and albumentations have."""

    generator = np.random.default_rng(0)

    def __getitem__(self, i):
        return self.x[i] + float(self.generator.normal()), int(self.y[i])


class Drops(nn.Linear):
    """Dropout that eval mode does not reach."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class Keeps(nn.Linear):
    """Computes with a tensor that does not move: from its first call, or a view from its making."""

    def __init__(self, kept):
        super().__init__(4, 3)
        self.kept = self.weight[:, :] if kept == "view" else None

    def forward(self, x):
        if self.kept is None:
            self.kept = 2 * self.weight.detach()
        return F.linear(x, self.kept)


class Holds(nn.Linear):
    """The same in a place of any kind, which is empty at first: a function says how it is used."""

    def __init__(self, place, use):
        super().__init__(4, 3)
        self.place, self.use = place, use

    def forward(self, x):
        return F.linear(x, self.use(self.place, lambda: 2 * self.weight.detach()))


def filled(table, make):
    return table if bool(table.any()) else table.copy_(make())


# where, and what is there at first
PLACES = {
    "place.a": (dict, lambda d, make: d["a"] if d else d.setdefault("a", make())),
    "place.0": (list, lambda a, make: a[0] if a else (a.append(make()), a[0])[1]),
    "place.a.0": (
        lambda: {"a": []},
        lambda d, make: d["a"][0] if d["a"] else (d["a"].append(make()), d["a"][0])[1],
    ),
    "place": (lambda: torch.zeros(3, 4), filled),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_a_network_keeps_of_its_weights_is_found_and_taken_away(name):
    place, use = PLACES[name]
    model = fixed(Holds(place(), use))
    before = copy.deepcopy(model.place)
    reason = rf"the network keeps {name}: made of weights in one call and used in the next"
    with pytest.raises(LsweepError, match=reason):
        ask(model=model)
    assert torch.equal(model.place, before) if name == "place" else model.place == before


def test_a_table_that_depends_on_no_weight_may_be_kept_anywhere():
    class Masked(Holds):
        def forward(self, x):
            mask = self.place.setdefault(len(x), torch.ones(3, 4))
            return F.linear(x, self.weight * mask)

    model = fixed(Masked({}, None))
    assert np.ptp(ask(model=model)["train_loss"]) > 0 and model.place == {}


class Whole(nn.Module):
    """A quantised weight beside a real one."""

    def __init__(self, dtype):
        super().__init__()
        self.real = nn.Linear(4, 3)
        self.other = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)

    def forward(self, x):
        return self.real(x)


def f1(output, target):
    hit = (output.argmax(1) == target).float()
    return 2 * hit.mean() / (1 + hit.mean())


X, Y = numbers(64, 4, dtype=SINGLE), labels(64, 3)


def ask(data=None, model=None, loss=None, **settings):
    metrics = settings.pop("given", {})
    problem = lsweep.Problem(
        model or fixed(nn.Linear(4, 3)),
        {"train": (X, Y) if data is None else data()},
        loss=loss or nn.CrossEntropyLoss(),
        metrics=metrics,
    )
    before = everything(problem.model)
    try:
        return lsweep.sweep(problem, x=(-1, 1, 3), **settings)
    finally:
        assert_same(before, everything(problem.model))


def shuffled(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, **options)


# what is asked, the reason that is given: and why the row is here
REFUSED = OrderedDict(
    {
        "shuffling": (
            lambda: ask(lambda: shuffled()),
            r"train data differs between two passes: a loader that shuffles.*shuffle=False",
        ),
        "shuffling, own generator": (  # not the global one: what keeps that does not help here
            lambda: ask(lambda: shuffled(generator=torch.Generator().manual_seed(0))),
            r"differs between two passes: a loader that shuffles",
        ),
        "augmentation": (
            lambda: ask(lambda: Noisy(X, Y)),
            r"train data differs between two passes: .*augmentation.*transforms of evaluation",
        ),
        "augmentation, own generator": (
            lambda: ask(lambda: OwnNoise(X, Y)),
            r"differs between two passes: .*augmentation",
        ),
        "functional dropout": (
            lambda: ask(model=Drops(4, 3)),
            r"same sample gives another value the second time.*F\.dropout\(x\), whose default",
        ),
        "a generator": (  # read once, then empty
            lambda: ask(lambda: ((X[i : i + 8], Y[i : i + 8]) for i in (0, 8))),
            r"data\['train'\] is an iterator, which can be read once: give a list",
        ),
        "samples that are no tensors": (
            lambda: ask(lambda: Pairs([object()] * 16, Y)),
            r"samples 0 to 0 make no batch \(TypeError.*: give a transform that makes tensors, or",
        ),
        "samples of unequal length": (
            lambda: ask(lambda: Pairs([X[0], X[1, :2]], Y)),
            r"data\['train'\]: samples 0 to 1 make no batch \(RuntimeError.*collate_fn, which pads",
        ),
        "empty tensors": (lambda: ask(lambda: (X[:0], Y[:0])), r"data\['train'\] is empty"),
        "empty dataset": (lambda: ask(lambda: Pairs(X[:0], Y[:0])), r"data\['train'\] is empty"),
        "empty list": (lambda: ask(list), r"data\['train'\] yields no batch"),
        "empty stream": (lambda: ask(lambda: Stream([], [])), r"data\['train'\] yields no batch"),
        "text": (lambda: ask(lambda: "train.csv"), r"data\['train'\] is a str: give tensors"),
        "no target": (
            lambda: ask(lambda: X),
            r"neither \(input, target\) nor a dict with a target.*, .x, x. for an autoencoder",
        ),
        "dict without target": (
            lambda: ask(lambda: {"input": X, "klass": Y}),
            r"keys input, klass has no target",
        ),
        "a non-mean": (  # F1 of batches cannot be merged into F1 of the whole
            lambda: ask(given={"f1": f1}),
            r"metric 'f1' returned one number.*F1, AUC and other non-means cannot be merged",
        ),
        "sum": (
            lambda: ask(loss=nn.CrossEntropyLoss(reduction="sum")),
            r"CrossEntropyLoss\(reduction=\"sum\"\) is not a mean over samples",
        ),
        "sum, functional": (  # a partial hides it
            lambda: ask(loss=__import__("functools").partial(F.cross_entropy, reduction="sum")),
            r"\(reduction=\"sum\"\) is not a mean over samples",
        ),
        "smoothing over a class that does not count": (
            lambda: ask(loss=nn.CrossEntropyLoss(torch.tensor([1.0, 0, 1]), label_smoothing=0.1)),
            r"label smoothing with a class of weight 0 is no mean",
        ),
        "accuracy of one logit": (  # its argmax is always 0: 100 % of class 0, silently
            lambda: ask(
                lambda: (X, (Y > 0).double()[:, None]),
                fixed(nn.Linear(4, 1)),
                nn.BCEWithLogitsLoss(),
                given={"accuracy": lsweep.accuracy},
            ),
            r"accuracy compares scores .* here they are \[64, 1\] and \[64, 1\]",
        ),
        "accuracy of a column": (  # [B] == [B, 1] is [B, B]
            lambda: ask(
                lambda: (X, Y[:, None]),
                loss=lambda o, t: F.cross_entropy(o, t[:, 0], reduction="none"),
                given={"accuracy": lsweep.accuracy},
            ),
            r"accuracy compares scores .* here they are \[64, 3\] and \[64, 1\]",
        ),
        "unknown metric": (
            lambda: ask(given={"accuracy": lsweep.accuracy}, metrics=["acuracy"]),
            r"no metric 'acuracy'; did you mean 'accuracy'",
        ),
        "unknown split": (lambda: ask(splits=["trian"]), r"no data split 'trian'.*'train'"),
        "expected": (  # other weights or other preprocessing than in training
            lambda: ask(expected={"train_loss": 99.0}),
            r"train_loss at the centre is [\d.]+, expected 99 \(within 2%\)",
        ),
        "expected of nothing": (
            lambda: ask(expected={"test_loss": 1.0}),
            r"expected\.test_loss; did you mean 'train_loss'",
        ),
        "complex weights": (  # they would stay where they are, silently
            lambda: ask(model=Whole(torch.complex64)),
            r"parameter other is complex64: only floating-point weights can move",
        ),
        "a view of a weight": (  # and here, and a picture would be flat
            lambda: ask(model=Keeps("view")),
            r"the network keeps kept: a view of a weight, taken once",
        ),
        "a product of weights": (
            lambda: ask(model=Keeps("product")),
            r"the network keeps kept: made of weights in one call and used in the next",
        ),
        "quantised weights": (lambda: ask(model=Whole(torch.int8)), r"parameter other is int8"),
        "complex values": (
            lambda: ask(loss=lambda o, t: o[:, 0] + 1j),
            r"metric 'loss' is complex",
        ),
        "slices of batches": (
            lambda: ask(lambda: [(X, Y)], slices=2),
            r"slices = 2: the data split 'train' has batches of its own",
        ),
        "sliced batch statistics": (
            lambda: ask(slices=2, batch_norm="batch"),
            r'batch_norm = "batch" cannot be sliced',
        ),
        "more workers of a live model": (lambda: ask(workers=2), r"Problem\.from_factory"),
    }
)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    asked, reason = REFUSED[name]
    with pytest.raises(LsweepError, match=reason):
        asked()


def test_a_mean_over_batches_is_over_all_their_samples():
    data = {"train": [(X[:40], Y[:40]), (X[40:], Y[40:])]}
    model = fixed(nn.Linear(4, 3))
    problem = lsweep.Problem(model, data, loss=lambda o, t: F.cross_entropy(o, t))
    found = lsweep.sweep(problem, x=(-1, 1, 3))
    assert "; 64 train samples, the same" in found.provenance["caption"]
    assert found["train_loss"][1] == pytest.approx(float(F.cross_entropy(model(X).detach(), Y)))


def test_expected_that_is_right_passes():
    known = float(F.cross_entropy(fixed(nn.Linear(4, 3))(X).detach(), Y))
    ask(expected={"train_loss": round(known, 3)})


@pytest.mark.parametrize(
    "build",
    [
        lambda: lsweep.Problem(lambda x: x, {"train": (X, Y)}, loss=nn.MSELoss()),  # a function
        lambda: lsweep.Problem(nn.Linear(4, 3), (X, Y), loss=nn.MSELoss()),  # no splits
        lambda: lsweep.Problem(nn.Linear(4, 3), {"train": (X, Y)}),  # no loss
        lambda: lsweep.Problem(  # two of them
            nn.Linear(4, 3), {"train": (X, Y)}, loss=nn.MSELoss(), forward=lsweep.classifier
        ),
        lambda: lsweep.Problem(  # the loss under its own name
            nn.Linear(4, 3), {"train": (X, Y)}, loss=nn.MSELoss(), metrics={"loss": nn.MSELoss()}
        ),
    ],
)
def test_a_problem_that_is_none_is_refused_when_it_is_made(build):
    with pytest.raises(LsweepError):
        build()
