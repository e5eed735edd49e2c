"""Noise: random tensors by seed, purpose and name, the same wherever they are drawn."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def dtype_of(like: Tensor) -> torch.dtype:
    """Return the precision of a direction for a tensor: float64 for float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def random_stream(seed: int, axis: str, name: str) -> np.random.Generator:
    """Return numbers from Philox keyed by (seed, axis, name), one after the other.

    >>> a, b = random_stream(0, "x", "w"), random_stream(0, "x", "w")
    >>> [*a.standard_normal(1), *a.standard_normal(2)] == [*b.standard_normal(3)]
    True
    """
    key = hashlib.sha256(f"{seed}\0{axis}\0{name}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64)))


def random_tensor(seed: int, axis: str, name: str, like: Tensor) -> Tensor:
    """Return N(0,1) noise from Philox keyed by (seed, axis, name), never from global state.

    >>> a = random_tensor(0, "x", "w", torch.zeros(2))
    >>> bool((a == random_tensor(0, "x", "w", torch.zeros(2))).all())
    True
    """
    noise = random_stream(seed, axis, name).standard_normal(tuple(like.shape))
    return torch.from_numpy(np.asarray(noise)).to(dtype_of(like))


def random_signs(seed: int, axis: str, name: str, like: Tensor) -> Tensor:
    """Return ±1 with equal probability (Rademacher), keyed as `random_tensor`.

    >>> sorted(set(random_signs(0, "x", "w", torch.zeros(99)).tolist()))
    [-1.0, 1.0]
    """
    noise = random_tensor(seed, axis, name, like)
    return torch.where(noise < 0, -1.0, 1.0).to(noise.dtype)
