"""The networks: the demo's, with any width, depth and activation; and three that Li et al. lack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lsweep.digits import Network

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, change: nn.Module) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        """Return x + f(x)."""
        out: Tensor = x + self.change(x)
        return out


class Swapped(nn.Module):
    """A module applied along the other of the last two dimensions: over tokens, not channels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Return inner(xᵀ)ᵀ."""
        out: Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return out


class Patches(nn.Module):
    """8 x 8 images as 16 tokens, each a 2 x 2 patch with its learned position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.1 * torch.randn(16, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 16, width)."""
        tokens = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        out: Tensor = self.embed(tokens) + self.position
        return out


class MeanToken(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, width)."""
        return x.mean(1)


def perceptron(width: int, hidden: int) -> nn.Sequential:
    """Return Linear-GELU-Linear."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def vit(width: int, blocks: int) -> nn.Module:
    """Return a vision transformer of four heads: torch's own encoder layers, norm first."""
    layer = [
        nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(blocks)
    ]
    return nn.Sequential(
        Patches(width), *layer, nn.LayerNorm(width), MeanToken(), nn.Linear(width, 10)
    )


def mixer(width: int, blocks: int) -> nn.Module:
    """Return an MLP-Mixer: perceptrons over tokens and over channels, in turn."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        tokens = nn.Sequential(nn.LayerNorm(width), Swapped(perceptron(16, 32)))
        channels = nn.Sequential(nn.LayerNorm(width), perceptron(width, 2 * width))
        layers += [Residual(tokens), Residual(channels)]
    return nn.Sequential(
        Patches(width), *layers, nn.LayerNorm(width), MeanToken(), nn.Linear(width, 10)
    )


def conv(width: int, blocks: int) -> nn.Module:
    """Return a residual convolutional network with batch norm."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        change = [
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
        ]  # fmt: skip
        layers.append(Residual(nn.Sequential(*change)))
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, width, 3, padding=1), *layers,
        nn.BatchNorm2d(width), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def build(kind: str, depth: int, width: int, seed: int) -> nn.Module:
    """Return an untrained network whose weights depend on ``seed`` alone.

    Args:
        kind: ``plain`` or ``skip``, of ``depth`` linear layers with batch norm, followed by an
            activation other than ReLU (``skip-gelu``); ``conv``, ``vit`` or ``mixer`` of ``depth``
            blocks.
        depth: as above.
        width: units, channels or the tokens' dimension.
        seed: of the initial weights.
    """
    family, _, activation = kind.partition("-")
    if family in ("plain", "skip"):
        network: nn.Module = Network(family == "skip", seed, depth, width)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if activation and isinstance(child, nn.ReLU):
                    setattr(module, name, ACTIVATIONS[activation]())
        return network
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return {"conv": conv, "vit": vit, "mixer": mixer}[family](width, depth)
