"""Means: a loss must be a mean over samples, of which each is compared with its own target.

A sum is none. And of outputs (N, 1) and targets (N,) each is compared with all, without a word:
that is never meant, and the loss is another one than its author thinks. It shows in values (N, N);
in a mean over them by that it does not matter which target belongs to which output.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from lsweep.errors import LsweepError
from lsweep.problems.data import Batch, map_tensors
from lsweep.problems.losses import Values, element_loss

SAME = 1e-5  # relative: sums in another order


def refuse_broadcast(
    name: str, function: Callable[..., Any], found: Values, output: Any, target: Any
) -> None:
    """Refuse a metric that compares every output with every target.

    Args:
        name: of the metric.
        function: that computed it from output and target.
        found: what it gave.
        output: of the network on a batch.
        target: of the batch.

    Raises:
        LsweepError: it does so.

    >>> import torch
    >>> def square(a, b):
    ...     return ((a - b) ** 2).mean()
    >>> x, y = torch.zeros(3, 1), torch.zeros(3)
    >>> refuse_broadcast("loss", square, square(x, y), x, y)  # all alike: there is no difference
    >>> x, y = torch.arange(3.0)[:, None], torch.arange(3.0)
    >>> refuse_broadcast("loss", square, square(x, y), x, y)
    Traceback (most recent call last):
    lsweep.errors.LsweepError: loss: outputs (3, 1) and targets (3,) would be broadcast, each \
compared with all: give both one shape, as by output.squeeze(1) or target[:, None]
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return
    try:
        shape = np.broadcast_shapes(output.shape, target.shape)  # torch's imports all of SymPy
    except ValueError:
        return
    count = math.prod(shape)
    if count <= max(output.numel(), target.numel()):
        return
    if isinstance(function, functools.partial) and function.func is element_loss:
        broadcast = isinstance(found, tuple) and int(found[1].sum()) == count
    elif isinstance(found, Tensor) and found.numel() == 1:
        broadcast = _mixes(function, float(found.detach()), output, target)
    else:
        broadcast = isinstance(found, Tensor) and found.shape == shape
    if broadcast:
        raise LsweepError(
            f"{name}: outputs {tuple(output.shape)} and targets {tuple(target.shape)} would be "
            "broadcast, each compared with all: give both one shape, as by output.squeeze(1) or "
            "target[:, None]"
        )


def _mixes(function: Callable[..., Any], found: float, output: Tensor, target: Tensor) -> bool:
    """Whether a mean stays when targets change places, though it depends on targets and outputs."""

    def moves(o: Tensor, t: Tensor) -> bool:
        return abs(float(function(o, t).detach()) - found) > SAME * max(1.0, abs(found))

    one = output[:1].expand_as(output), target[:1].expand_as(target)
    with contextlib.suppress(Exception):  # a loss may take its own batches alone
        depends = moves(output, one[1]) and moves(one[0], target)
        return depends and not moves(output, target.roll(1, 0))
    return False


def refuse_sum(function: Callable[..., Any], found: Values, output: Any, target: Any) -> None:
    """Refuse a loss that is one number for a batch, and twice as much for the batch twice over.

    Raises:
        LsweepError: it is so: a sum, of which no mean over batches can be made.
    """
    if not isinstance(found, Tensor) or found.numel() != 1 or not float(found.detach()):
        return
    twice = [map_tensors(b, lambda t: t.repeat(2, *[1] * (t.dim() - 1))) for b in (output, target)]
    ratio = 1.0
    with contextlib.suppress(Exception):  # a loss may know how long its batches are
        ratio = float(function(*twice).detach() / found.detach())
    if abs(ratio - 2.0) < SAME:
        raise LsweepError(
            "loss: of a batch twice over it is twice as large, hence a sum and no mean over "
            "samples: use mean(), or return one value per sample"
        )


def refuse_squares(results: Any, again: Callable[[Batch], Any], batch: Batch, samples: int) -> None:
    """Refuse a forward whose values of N samples are (N, N), and of one sample less (N-1, N-1).

    Args:
        results: what it gave for the batch.
        again: the forward, of a batch.
        batch: the batch.
        samples: how many samples it has.

    Raises:
        LsweepError: it does so.
    """

    def squares(results: Any, n: int) -> set[str]:
        return {m for m, v in dict(results).items() if getattr(v, "shape", ()) == (n, n)}

    if samples < 3 or not squares(results, samples):
        return
    fewer = squares(again(map_tensors(batch, lambda t: t[:-1])), samples - 1)
    for name in sorted(fewer & squares(results, samples)):
        raise LsweepError(
            f"forward: {name} of {samples} samples has values {(samples, samples)}, each sample "
            "compared with all: give output and target one shape, as by output.squeeze(1) or "
            "target[:, None]"
        )
