"""A harder set made from scikit-learn's real digits: each image moved by up to a pixel, with noise.

The demo's digits are learned to 2 % error, where nothing separates one network from another. The
test images are drawn four times, each time moved and disturbed anew, for a finer error.
"""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAIN = 1000  # of 1797 images
NOISE = 0.3  # standard deviation of the noise, in standard deviations of the images' pixels
COPIES = 4  # of each test image


def disturbed(images: Tensor, random: torch.Generator) -> Tensor:
    """Return (n, 8, 8) images moved by -1, 0 or 1 pixels along both sides, with noise, flat."""
    wide = torch.nn.functional.pad(images, (1, 1, 1, 1))
    moves = torch.randint(0, 3, (len(images), 2), generator=random)
    pixel = torch.arange(8)
    rows = (moves[:, 0, None] + pixel)[:, :, None]
    columns = (moves[:, 1, None] + pixel)[:, None, :]
    moved = wide[torch.arange(len(images))[:, None, None], rows, columns]
    return (moved + NOISE * torch.randn(moved.shape, generator=random)).flatten(1)


@functools.cache
def hard_digits(train: int = TRAIN) -> dict[str, tuple[Tensor, Tensor]]:
    """Return split -> (images (n, 64) float32, labels (n,) int64), the same on every call."""
    pixels, labels = load_digits(return_X_y=True)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=random)
    x = torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 8, 8)
    y = torch.tensor(labels, dtype=torch.int64)[order]
    x = x / x[:TRAIN].std()  # zero stays zero: it is the paper that images are moved over
    tests = torch.cat([disturbed(x[TRAIN:], random) for _ in range(COPIES)])
    inputs = disturbed(x[:TRAIN], random)
    mean, std = inputs.mean(), inputs.std()
    return {
        "train": (((inputs - mean) / std)[:train], y[:train]),
        "test": ((tests - mean) / std, y[TRAIN:].repeat(COPIES)),
    }
