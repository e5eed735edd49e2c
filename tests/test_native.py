"""Native code computes what the network computes: any layer it takes, any batch length, NaN too."""

from __future__ import annotations

import math
import platform
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsweep.backends import simplifying
from lsweep.backends.graph import Graph, traced
from lsweep.backends.packed import Packed
from lsweep.backends.tracing import Unsupported
from lsweep.errors import LsweepError
from lsweep.native import compiling
from lsweep.native.lowering import Lowering
from lsweep.native.network import NativeNetwork

builds = pytest.mark.skipif(
    shutil.which("c++") is None or platform.machine() != "x86_64", reason="nothing to build with"
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home / "lsweep" / "native"


class Residual(nn.Module):
    """Blocks with both kinds of shortcuts, of odd sizes; Winograd's algorithm at their 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 9, 3, 1, 1), nn.BatchNorm2d(9)
        self.inner, self.outer = nn.Conv2d(9, 11, 3, 1, 1), nn.Conv2d(11, 9, 3, 1, (1, 1))
        self.smaller, self.way = nn.Conv2d(9, 10, 3, 2, 1, bias=False), nn.Conv2d(9, 10, 1, 2)
        self.last, self.head = nn.Conv2d(20, 21, 3, 1, 1), nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.outer(F.relu(self.inner(x))) + x)
        x = F.relu(self.smaller(x) + self.way(x))
        y = F.pad(x[:, ::2, ::2, ::2], (0, 0, 0, 0, 2, 3))
        x = F.relu(F.avg_pool2d(F.pad(x, (0, 0, 0, 1)), 2) - 0.5 * y)
        return self.head(self.last(torch.cat([x, y], 1)).mean((2, 3)))


class Windows(nn.Module):
    """Convolutions and pools that Winograd's algorithm does not take, and batch norm by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 10, 3, (2, 1), (2, 0)), nn.SiLU(),
            nn.Conv2d(10, 10, 3, padding=2, dilation=2, groups=10), nn.Hardswish(),
            nn.MaxPool2d(3, 2, 1, (1, 2)), nn.Conv2d(10, 14, (1, 3), groups=2), nn.ELU(0.7),
            nn.AvgPool2d(2, 1, 1), nn.Tanh(), nn.AdaptiveAvgPool2d((5, 1)), nn.Flatten(),
            nn.Linear(70, 7), nn.LeakyReLU(0.1),
        )  # fmt: skip
        del self.layers[0].weight  # a shift without a factor
        self.layers[0].weight = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x * torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1))


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(13, 21), nn.Tanh(), nn.Linear(21, 17), nn.Sigmoid(),
                         nn.Linear(17, 5, bias=False), nn.ReLU6())  # fmt: skip


class Planes(nn.Module):
    """Pools of images without channels: torch takes the samples for these."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(13, 36), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(-1, 6, 6)
        both = F.avg_pool2d(y, (2, 1)), F.max_pool2d(y, (6, 1))
        return self.head(torch.cat([p.flatten(1) for p in both], 1))


class Squeezed(nn.Module):
    """Ends in a squeeze of all dimensions of length 1, of which the batch may be one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.head(x), 1).squeeze()


def graph_of(model: nn.Module, x: Tensor) -> tuple[Graph, Packed]:
    """Return a network as a graph and its packed rows, with one direction."""
    named = (*model.named_parameters(), *model.named_buffers())
    state = {n: t.detach() for n, t in named}
    graph = traced(model, x[:3])
    packed = graph.pack(state)
    direction = {n: t.sin() for n, t in packed.items()}
    return graph, Packed(packed, [direction], torch.device("cpu"), torch.float32)


@builds
@pytest.mark.parametrize("make", [Residual, Windows, flat, Planes, Squeezed])
def test_it_computes_what_the_network_computes(make):
    torch.manual_seed(1)
    model = make().eval()
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    x = torch.randn(70, 13) if make in (flat, Planes) else torch.randn(70, 3, 13, 15)
    graph, packed = graph_of(model, x)
    network, both = NativeNetwork(graph, packed, 1), NativeNetwork(graph, packed, 2)
    assert (network._prepared.numel() > 0) == (make is Residual)  # Winograd's algorithm
    with torch.no_grad():
        for move in (0.0, 0.3):  # the weights are read at each call
            packed.move([move])
            weights = [packed.views[n] for n in graph.names]
            eager = graph.module(*weights, x)
            truth = graph.module.double()(*(t.double() for t in (*weights, x)))
            graph.module.float()
            allowed = 1e-6 * truth.abs().max() + 4 * (eager - truth).abs().max()
            for n in (1, 7, 16, 33, 70):
                found = network(x[:n])
                assert found.shape == truth[:n].shape
                assert (found - truth[:n]).abs().max() <= allowed
                assert torch.equal(found, both(x[:n])) and torch.equal(found, network(x[:n]))


@builds
def test_winograd_of_wide_layers_takes_several_tiles_at_once_and_loses_few_digits():
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 65, 3, 1, 1), nn.ReLU(), nn.Conv2d(65, 70, 3, 1, 1), nn.ReLU()
    x = torch.randn(20, 3, 9, 10)
    graph, packed = graph_of(nn.Sequential(*layers), x)
    found = NativeNetwork(graph, packed, 2)(x)
    with torch.no_grad():
        truth = graph.module.double()(*(packed.views[n].double() for n in graph.names), x.double())
    assert (found - truth).abs().max() < 2e-5 * truth.abs().max()


@builds
def test_what_is_not_finite_comes_through_as_from_the_network():
    torch.manual_seed(2)
    layers = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Conv2d(8, 1, 1)
    model = nn.Sequential(*layers).eval()
    x = torch.randn(40, 8, 8, 8)
    graph, packed = graph_of(model, x)
    network, views = NativeNetwork(graph, packed, 1), packed.views
    assert network._prepared.numel()  # Winograd's algorithm is in use
    x[3, 0, 2, 2], x[5, 0, 3, 3], x[7, 1, 4, 4] = torch.nan, torch.inf, 3e38
    views["0.weight"].mul_(30)
    with torch.no_grad():
        eager = graph.module(*(views[n] for n in graph.names), x)
    found = network(x)
    finite = eager.isfinite()
    assert 0 < (~finite).sum() < finite.numel() / 10
    assert torch.equal(finite, found.isfinite()) and torch.equal(eager.isnan(), found.isnan())
    assert torch.equal(eager[eager.isinf()], found[eager.isinf()])
    assert torch.allclose(eager[finite], found[finite], rtol=1e-4, atol=1e-4)
    alone = torch.randn(2, 8, 8, 8)  # no infinity beside it that would have all done again
    alone[1, 0, 4, 4] = torch.nan
    assert network(alone).isnan().any()


@builds
@pytest.mark.parametrize("threads", [1, 2])
def test_losses_of_classes_are_those_of_torch_at_any_number_of_points(threads):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 7)).eval()
    x, labels = torch.randn(50, 30), torch.randint(0, 7, (50,))
    labels[4], labels[6] = -100, 7  # neither is a class
    graph, packed = graph_of(model, x)
    network = NativeNetwork(graph, packed, threads)
    assert network.points > 2
    offsets = [[0.0], [1.5], [-40.0]]
    rows = packed.stack(offsets)["0.weight"].new_empty(3, len(packed.theta))
    for row, at in zip(rows, offsets, strict=True):
        packed.move(at)
        row.copy_(packed.theta)
    (losses, hits), finite = network.losses(rows, x, labels)
    assert finite.all()
    for k, at in enumerate(offsets):
        packed.move(at)
        output = network(x).double()
        known = torch.where(labels < 7, labels, -100)
        truth = F.cross_entropy(output, known, reduction="none")
        assert torch.allclose(losses[k].double(), truth, rtol=1e-5, atol=1e-6 * output.abs().max())
        assert torch.equal(hits[k], 100.0 * (output.argmax(1) == labels))
        alone = network.losses(rows[k : k + 1], x, labels)[0]
        assert torch.equal(alone[:, 0], torch.stack([losses[k], hits[k]]))
    x[9, 3] = torch.inf
    assert not network.losses(rows, x, labels)[1].any()


@builds
def test_a_small_loss_beside_large_logits_keeps_its_digits():
    """Logits 107, 100, 100 of the label and two others: the loss is log(1 + 2/e^7)."""
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(7 * torch.eye(3))
        model.bias.fill_(100)
    graph, packed = graph_of(model, torch.eye(3))
    network = NativeNetwork(graph, packed, 1)
    (losses, _), _ = network.losses(packed.theta[None], torch.eye(3), torch.arange(3))
    assert losses.flatten().tolist() == pytest.approx([math.log1p(2 * math.exp(-7))] * 3, rel=2e-4)


class Mixes(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x)


@builds
def test_exponentials_have_their_digits_wherever_float32_has():
    layer, x = nn.Linear(1, 1), torch.linspace(-87, 88.7, 700)[:, None]
    nn.init.ones_(layer.weight), nn.init.zeros_(layer.bias)
    found = NativeNetwork(*graph_of(nn.Sequential(layer, Mixes(torch.exp)), x), 1)(x)
    torch.testing.assert_close(found.double(), x.double().exp(), rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("model", "why"),
    [(nn.Sequential(nn.Linear(4, 4), nn.GELU()), "aten.gelu"),
     (Mixes(lambda x: x - x.mean(0)), "mixes"),
     (Mixes(lambda x: x.t().relu().t()), "mixes"),
     (nn.Sequential(nn.Linear(4, 4), Mixes(lambda x: x * len(x))), "length of a batch"),
     (Mixes(lambda x: torch.cat([x, x]).reshape(x.size(0), 8).relu()), "mixes"),
     (nn.Sequential(Mixes(lambda x: x.reshape(-1, 2)), nn.Linear(2, 2)), "mixes"),
     (nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 3, padding="same")), "by name"),
     (Mixes(lambda x: F.pad(x, (2, -1)).relu()), "cuts where it pads"),
     (Mixes(lambda x: x.double().relu()), "not float32"),
     (nn.Sequential(nn.Linear(4, 4), nn.Softmax(0)), "aten.softmax")],
)  # fmt: skip
def test_what_it_cannot_take_is_named(model, why):
    graph, _ = graph_of(model.eval(), torch.randn(3, 4))
    with pytest.raises(Unsupported, match=why):
        Lowering(graph, dict.fromkeys(graph.names, 0))


def test_a_view_that_takes_the_samples_for_a_dimension_of_one_is_refused(monkeypatch):
    monkeypatch.setattr(simplifying, "RESHAPES", ())  # else a squeeze is one
    graph, _ = graph_of(Squeezed().eval(), torch.randn(3, 3, 5, 5))
    with pytest.raises(Unsupported, match="drops the samples"):
        Lowering(graph, dict.fromkeys(graph.names, 0))


@builds
def test_samples_of_another_shape_are_refused_before_memory_is_touched():
    x = torch.randn(3, 13)
    network = NativeNetwork(*graph_of(flat().eval(), x), 1)
    for wrong in (torch.randn(3, 12), torch.randn(3, 13).double()):
        with pytest.raises(LsweepError, match=r"more than length|not float32"):
            network(wrong)


SOURCE = 'extern "C" int seven() { return 7; }\n'


@builds
def test_a_library_is_compiled_once_and_only_a_private_one_is_loaded(cache, monkeypatch, tmp_path):
    before = set(cache.iterdir()) if cache.exists() else set()
    assert compiling.compiled(SOURCE).seven() == 7
    (library,) = set(cache.iterdir()) - before
    written = library.stat().st_mtime_ns
    assert compiling.compiled(SOURCE).seven() == 7 and library.stat().st_mtime_ns == written
    for path in (library, cache):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(Unsupported, match=r"others could have written .*: remove it"):
            compiling.compiled(SOURCE)
        path.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # does not count
    monkeypatch.setenv("HOME", str(tmp_path))
    damaged = tmp_path / ".cache" / "lsweep" / "native" / library.name
    damaged.parent.mkdir(parents=True, mode=0o700)
    damaged.parent.parent.chmod(0o700)
    damaged.write_bytes(b"half of it")
    damaged.chmod(0o600)
    assert compiling.compiled(SOURCE).seven() == 7
    either = SOURCE.replace("return 7", "return NUMBER")
    for number in (8, 9):  # the same source, compiled otherwise
        monkeypatch.setenv("CXX", f"c++ -DNUMBER={number}")
        assert compiling.compiled(either).seven() == number


def test_without_a_compiler_or_with_a_failing_one_it_says_so(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, why in (
        ("no-such-compiler", "no C\\+\\+ compiler"),
        ("false", "failed: exit code 1"),
    ):
        monkeypatch.setenv("CXX", compiler)
        with pytest.raises(Unsupported, match=why):
            compiling.compiled(SOURCE)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Unsupported, match="set XDG_CACHE_HOME to a folder"):
        compiling.compiled(SOURCE)
