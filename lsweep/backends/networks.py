"""Networks as backends: whatever computes a network's output at packed weights stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsweep.backends.eager import Ground, Moving
from lsweep.backends.packed import Packed, Spot
from lsweep.problems.data import Batch
from lsweep.problems.problem import Sampled, causal_lm, classifier
from lsweep.problems.weights import State

CALLS_ONLY = (None, classifier, causal_lm)  # as ``forward``, use nothing of a model but its output


class Networked:
    """A callable network in place of the problem's own: moved as packed rows, one spot at a time.

    Args:
        name: of the backend.
        ground: what to evaluate.
        packed: the rows whose views the network reads.
        network: inputs (a tensor, a tuple or a dict of tensors) -> output.
        pack: a whole state -> what the rows hold.
    """

    together = False

    def __init__(
        self,
        name: str,
        ground: Ground,
        packed: Packed,
        network: Callable[[Any], Tensor],
        pack: Callable[[State], State],
    ) -> None:
        self.name, self._ground, self._network = name, ground, network
        self._moving = Moving(ground, packed, pack)

    def _stand_in(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._network(kwargs or (args[0] if len(args) == 1 else args))

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield the metrics at each spot; see `Backend`."""
        for spot in spots:
            if not stay:
                self._moving.move(spot)
            with torch.no_grad():
                found = self._ground.problem.evaluate(batch, self._ground.metrics, self._stand_in)
            yield found


def inputs_of(ground: Ground, batch: Batch) -> Any:
    """Return what the problem gives to its network for a batch: a tensor, a tuple or a dict."""
    model, seen = ground.problem.model, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs or (args[0] if len(args) == 1 else args))
        return model(*args, **kwargs)

    with ground.context():
        ground.problem.evaluate(batch, ground.metrics, recorded)
    return seen[0]


def why_no_stand_in(ground: Ground) -> str | None:
    """Return why another network cannot stand in for the problem's own, or None."""
    problem = ground.problem
    if ground.settings["batch_norm"] != "eval":
        return f'batch_norm = "{ground.settings["batch_norm"]}" needs the network itself'
    if problem.grad:
        return "the loss needs gradients of the network itself"
    if problem.forward not in CALLS_ONLY:
        return "forward= may use anything of the network itself"
    return None
