"""Summing: from values per sample to the sums over samples that are kept, on the device.

Rows of a point never mix with those of another: its bits are the same alone and among many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsweep.errors import LsweepError
from lsweep.problems.problem import Sampled
from lsweep.storage.sums import SUMS, WD, WV, WW, WWD, WWDD, WWV, WWVV, W


@dataclass(frozen=True)
class Samples:
    """One variable at one spot: float64 values (n,) and weights (n,)."""

    values: Tensor
    weights: Tensor
    opaque: bool

    @classmethod
    def of(cls, found: Sampled) -> Samples:
        """Return a batch's values in the precision of sums; what has no weight counts as 0."""
        dtype = sum_dtype(found.values)
        weights = found.weights.to(dtype)
        values = torch.where(weights == 0, 0.0, found.values.to(dtype))
        return cls(values, weights, found.opaque)

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of several batches as one."""
        return cls(
            torch.cat([p.values for p in parts]),
            torch.cat([p.weights for p in parts]),
            any(p.opaque for p in parts),
        )

    @property
    def mean(self) -> float:
        """Σwv/Σw."""
        return float((self.weights * self.values).sum() / self.weights.sum())


def sum_dtype(like: Tensor) -> torch.dtype:
    """Return the precision of sums: float64, where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64


class Reference:
    """A variable on one batch at the centre: what the same batch elsewhere is compared with.

    Where all weights are 1 and the same as at the centre, half of the sums need no product.

    Args:
        centre: the samples there.

    >>> one = Sampled(torch.tensor([1.0, 2.0]), torch.ones(2))
    >>> Reference(Samples.of(one)).sums([Sampled(torch.tensor([2.0, 4.0]), torch.ones(2))])
    tensor([[ 2.,  2.,  6.,  6., 20.,  3.,  3.,  5.]], dtype=torch.float64)
    """

    def __init__(self, centre: Samples) -> None:
        self.centre = centre
        self._ones = bool((centre.weights == 1).all())
        self._last: Tensor | None = None  # that were seen to be the same
        self._like: Tensor | None = None  # the weights as they come, before they are float64

    def sums(self, found: Sequence[Sampled]) -> Tensor:
        """Return (K, 8) sums of `sums.SUMS`, for the same batch at K spots.

        Raises:
            LsweepError: the batch gave another number of samples than at the centre.
        """
        for f in found:
            if f.values.shape != self.centre.values.shape:
                raise LsweepError(
                    f"a batch gave {len(f.values)} samples here and {len(self.centre.values)} at "
                    "the centre: it must be the same at every point"
                )
        if len(found) > 1 and self.centre.values.device.type != "cpu":
            # A GPU divides a sum among threads by how many rows there are, and so its order.
            return torch.cat([self.sums([f]) for f in found])
        values = torch.stack([f.values for f in found]).to(self.centre.values.dtype)
        n = values.shape[1]
        out = values.new_empty((len(found), len(SUMS)))
        if self._ones and all(self._has_same_weights(f) for f in found):
            terms = values.new_empty((4, *values.shape))
            terms[0] = values
            torch.sub(values, self.centre.values, out=terms[1])
            torch.mul(terms[:2], terms[:2], out=terms[2:])
            v, d, vv, dd = terms.sum(-1)
            for at, s in ((WV, v), (WWV, v), (WWVV, vv), (WD, d), (WWD, d), (WWDD, dd)):
                out[:, at] = s
            out[:, W], out[:, WW] = n, n
            return out
        w = torch.stack([f.weights for f in found]).to(values.dtype)
        values = torch.where(w == 0, 0.0, values)
        d, ww = values - self.centre.values, w * w
        terms = values.new_empty((len(SUMS), *values.shape))
        terms[W], terms[WW] = w, ww
        terms[WV], terms[WWV], terms[WD], terms[WWD] = w * values, ww * values, w * d, ww * d
        terms[WWVV], terms[WWDD] = terms[WWV] * values, terms[WWD] * d
        return terms.sum(-1).T

    def _has_same_weights(self, found: Sampled) -> bool:
        if found.weights is self._last:
            return True
        if found.weights.device.type != "cpu":
            return False  # to look at them would wait for the device at every point
        if self._like is None or self._like.dtype != found.weights.dtype:
            self._like = self.centre.weights.to(found.weights.dtype)
        same = torch.equal(found.weights, self._like)
        self._last = found.weights if same else None
        return same


def stacked(
    references: Sequence[Reference], metrics: Sequence[str], found: Sequence[Mapping[str, Sampled]]
) -> Tensor:
    """Return (K, metrics, 8) sums of a batch at K spots, in the order of ``metrics``."""
    return torch.stack(
        [r.sums([f[m] for f in found]) for r, m in zip(references, metrics, strict=True)], dim=1
    )
