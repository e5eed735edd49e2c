"""What batch normalisation does away from the checkpoint: eval, batch, or recalibrate.

eval: the statistics of the checkpoint (as in Li et al.). batch: those of each batch. recalibrate:
reset and averaged anew over the training samples at every point, as after a step of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def layers(model: nn.Module) -> list[BatchNorm]:
    """Return the batch-norm layers that keep statistics.

    >>> len(layers(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))))
    1
    """
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


def takes_batches(model: nn.Module) -> bool:
    """Whether a layer keeps no statistics, and so takes those of a batch in eval mode, too.

    >>> takes_batches(nn.BatchNorm1d(2, track_running_stats=False))
    True
    """
    return any(isinstance(m, BatchNorm) and m.running_mean is None for m in model.modules())


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the statistics of each batch; the running ones are neither used nor touched."""
    kept = [(m, m.running_mean, m.running_var) for m in layers(model)]
    for m, _, _ in kept:
        m.running_mean = m.running_var = None
    try:
        yield
    finally:
        for m, mean, variance in kept:
            m.running_mean, m.running_var = mean, variance


def recalibrate(model: nn.Module, run_batches: Callable[[], None]) -> None:
    """Replace running statistics by their cumulative mean over the batches that are run.

    Args:
        model: in eval mode; only its batch-norm layers go to train mode meanwhile.
        run_batches: runs the network over the fixed training samples.
    """
    normalized = layers(model)
    momenta = [m.momentum for m in normalized]
    for m in normalized:
        m.reset_running_stats()
        m.momentum = None  # cumulative mean
        m.train()
    try:
        with torch.no_grad():
            run_batches()
    finally:
        for m, momentum in zip(normalized, momenta, strict=True):
            m.momentum = momentum
            m.eval()
