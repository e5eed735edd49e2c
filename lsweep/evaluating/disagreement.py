"""The disagreement of two ways to compute a metric: how far apart their means are.

What is small beside the usual mean counts as `BELOW` of it, as in audits: pictures are of
logarithms, so a minimum is to be right beside itself and not beside the rim.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from lsweep.backends.summing import Samples
from lsweep.outcomes.audits import BELOW

TIES = 200  # of so many samples one may fall on the other side of a metric that has steps


def disagreement(pairs: Sequence[tuple[Samples, Samples]], steps: bool) -> tuple[float, float]:
    """Return a metric's largest relative difference to the reference, and how large it is there.

    Args:
        pairs: for each spot the samples found and those of the reference.
        steps: some samples may fall on the other side of a step, as accuracy does at a tie.

    >>> a = Samples(torch.tensor([1.0, 2.0]), torch.ones(2), False)
    >>> b = Samples(torch.tensor([1.0, 2.3]), torch.ones(2), False)
    >>> disagreement([(b, a)], steps=False)[1]
    1.5
    """
    errors, sizes = [], []
    for found, reference in pairs:
        n = min(len(found.values), len(reference.values))
        v, r, w = found.values[:n], reference.values[:n], reference.weights[:n]
        difference = w * (v - r)
        if steps:
            ties = max(1, n // TIES)
            keep = difference.abs().argsort()[: n - ties] if n > ties else slice(0, 0)
            difference = difference[keep]
        total = w.sum()
        # Of absolute values: where signs cancel in a mean their rounding does not.
        size, error = float((w * r.abs()).sum() / total), float(difference.sum() / total)
        if math.isfinite(size):
            sizes.append(size)
            errors.append(abs(error) if math.isfinite(error) else math.inf)
        elif bool(torch.isfinite((w * v).sum())):
            return math.inf, size  # a number where eager has none
    if not sizes:
        return 0.0, 0.0
    floor = BELOW * statistics.median(sizes) or 1.0
    return max((e / max(s, floor), s) for e, s in zip(errors, sizes, strict=True))
