"""Runnable spots: far out a problem may raise, which is a failed point and not the end of a run."""

from __future__ import annotations

from collections.abc import Sequence

from lsweep.backends.packed import Spot
from lsweep.evaluating.evaluate import Evaluator
from lsweep.hosts.device import is_out_of_memory


def runnable(evaluator: Evaluator, spots: Sequence[Spot]) -> list[Spot]:
    """Return the spots where the first batch of each split can be evaluated."""
    sound = []
    for spot in spots:
        try:
            evaluator.samples([spot], limit=1, backend=evaluator.plain)
            sound.append(spot)
        except Exception as e:
            if is_out_of_memory(e):
                raise  # smaller batches are tried
    return sound
