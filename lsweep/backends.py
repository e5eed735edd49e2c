"""Backends: ways to compute a problem's metrics at spots, all of which must agree with eager."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from lsweep.data import Batch
from lsweep.packed import Spot
from lsweep.problem import Sampled


class Backend(Protocol):
    """Computes a problem's metrics at spots on one batch of data.

    Attributes:
        name: as ``evaluate.backend`` has it.
    """

    name: str

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield each metric's values and weights on a batch, one mapping per spot, in order.

        Args:
            spots: where.
            batch: on the device, in the precision of the plan.
            stay: there is one spot, and the weights have not been moved since they came there.
        """
        ...
