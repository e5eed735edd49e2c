"""The networks and images that the benchmarks use: scikit-learn's digits, small and as 32 x 32 x 3.

`problem` is a factory, so that runs of the product find the same networks. Images are kept as the
bytes that a data set on disk holds; what is evaluated is made from them as torchvision's ToTensor
and Normalize do, to the last bit. Networks are trained for a few epochs, once: their checkpoints
lie in the folder for temporary files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import lsweep

VERSION = 1  # of the checkpoints: raise it when networks, images or training change
MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)  # CIFAR-10's, as everybody types them
STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)
GREY = ((0.3,), (0.38,))  # the digits' own, about


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to what goes in."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + f(x))."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR-10 ResNet of 6·blocks + 2 layers (He et al., 2016): 20 for three blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        layers, width_in = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(blocks):
                layers.append(Block(width_in, width, stride if i == 0 else 1))
                width_in = width
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 3, 32, 32)."""
        x = self.layers(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Attention(nn.Module):
    """Self-attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, tokens, width) of the same."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(n, tokens, width))
        return out


class Layer(nn.Module):
    """A transformer's layer, normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, tokens, width) of the same."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """A vision transformer: 64 patches of 4 x 4, mean-pooled."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers = nn.Sequential(*(Layer(width) for _ in range(depth)))
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 10) of images (n, 3, 32, 32)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.linear(self.norm(self.layers(x)).mean(1))
        return logits


def mlp(hidden: int) -> nn.Sequential:
    """Return a perceptron 64-64-…-10 of 8 x 8 images with so many hidden layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(hidden):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def tiny() -> nn.Sequential:
    """Return one convolution with batch norm and a linear layer, of 32 x 32 x 3 images."""
    convolution = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    pooled = (nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), *pooled)


def wide() -> nn.Sequential:
    """Return a network of 12.7 million weights and few products, of 32 x 32 x 3 images."""
    patches = (nn.Conv2d(3, 512, 8, 8, bias=False), nn.BatchNorm2d(512), nn.ReLU(), nn.Flatten())
    layers: list[nn.Module] = [*patches]
    for width_in, width in ((8192, 1024), (1024, 2048), (2048, 1024)):
        layers += [nn.Linear(width_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


@dataclass(frozen=True)
class Network:
    """A network by name, and how it is trained.

    Args:
        make: makes it at its initial weights.
        large: whether it sees 32 x 32 x 3 or 8 x 8.
        epochs: over the 1797 digits, in batches of 64.
        rate: the largest learning rate, reached after 30 % of the steps.
        adam: AdamW, otherwise SGD with Nesterov momentum.
    """

    make: Callable[[], nn.Module]
    large: bool
    epochs: int
    rate: float
    adam: bool = False


NETWORKS = {
    "tiny": Network(tiny, True, 1, 0.1),
    "wide": Network(wide, True, 1, 0.1),
    "resnet20": Network(lambda: ResNet(3), True, 6, 0.1),
    "resnet56": Network(lambda: ResNet(9), True, 4, 0.1),
    "mlp": Network(lambda: mlp(2), False, 30, 3e-3, adam=True),
    "mlp12": Network(lambda: mlp(11), False, 60, 2e-3, adam=True),
    "vit": Network(ViT, True, 5, 1e-3, adam=True),
}


def images(large: bool, samples: int) -> tuple[Tensor, Tensor]:
    """Return so many digits as bytes (n, 8, 8), or enlarged, tinted and noisy (n, 32, 32, 3).

    Beyond 1797 the digits come again, with another tint and other noise.

    Returns:
        bytes (n, height, width[, 3]) uint8, labels (n,) int64.
    """
    grey, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    index = order[np.arange(samples) % len(order)]
    small = (15 * grey[index]).astype(np.uint8).reshape(-1, 8, 8)
    target = torch.tensor(labels[index], dtype=torch.int64)
    if not large:
        return torch.tensor(small), target
    out = torch.empty(samples, 32, 32, 3, dtype=torch.uint8)
    for a in range(0, samples, 1024):  # in blocks, each with a generator of its own
        chance = torch.Generator().manual_seed(a)
        ink = torch.tensor(small[a : a + 1024], dtype=torch.float32)[:, None] / 240
        ink = F.interpolate(ink, size=(32, 32), mode="bilinear", align_corners=False)
        n = len(ink)
        paper, pen = torch.rand(2, n, 3, 1, 1, generator=chance)
        picture = (160 * paper * (1 - ink)).add_((95 + 160 * pen) * ink)
        picture.add_(torch.randn(n, 3, 32, 32, generator=chance).mul_(12)).clamp_(0, 255)
        out[a : a + n] = picture.to(torch.uint8).permute(0, 2, 3, 1)
    return out, target


def standard(raw: Tensor) -> Tensor:
    """Return bytes (n, h, w[, c]) as ToTensor and Normalize make them: float32 (n, c, h, w)."""
    x = raw[:, None] if raw.dim() == 3 else raw.permute(0, 3, 1, 2).contiguous()
    mean, std = GREY if raw.dim() == 3 else (MEAN, STD)
    return (
        x.float()
        .div_(255)
        .sub_(torch.tensor(mean).view(-1, 1, 1))
        .div_(torch.tensor(std).view(-1, 1, 1))
    )


def trained(name: str) -> Path:
    """Return the checkpoint of a network, trained now unless it was before."""
    path = Path(tempfile.gettempdir(), "lsweep-benchmarks", f"{name}-{VERSION}.pt")
    if path.exists():
        return path
    recipe = NETWORKS[name]
    raw, y = images(recipe.large, 1797)
    x = standard(raw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = recipe.make()
        steps = recipe.epochs * -(-len(y) // 64)
        parameters = network.parameters()
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=recipe.rate)
            if recipe.adam
            else torch.optim.SGD(
                parameters, lr=recipe.rate, momentum=0.9, nesterov=True, weight_decay=5e-4
            )
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps)
        for _ in range(recipe.epochs):
            for batch in torch.split(torch.randperm(len(y)), 64):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(network(x[batch]), y[batch]))
                optimizer.step()
                schedule.step()
    path.parent.mkdir(exist_ok=True)
    torch.save(network.state_dict(), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return path


def problem(name: str, samples: int, checkpoint: str = "") -> lsweep.Problem:
    """Return the problem of one network on so many digits; without a checkpoint, untrained."""
    recipe = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = recipe.make()
    if checkpoint:
        network.load_state_dict(lsweep.load_state(checkpoint))
    raw, y = images(recipe.large, samples)
    return lsweep.Problem(network.eval(), {"train": (standard(raw), y)}, loss=nn.CrossEntropyLoss())
