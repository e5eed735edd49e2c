"""Networks as backends: whatever computes a network's output at packed weights stands in for it.

One that computes the losses of classes as well is given many points at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lsweep.backends.eager import Ground, Moving
from lsweep.backends.packed import Rows, Spot
from lsweep.problems.calling import split_batch
from lsweep.problems.data import Batch
from lsweep.problems.problem import Sampled, causal_lm, classifier

CALLS_ONLY = (None, classifier, causal_lm)  # as ``forward``, use nothing of a model but its output


class Networked:
    """A callable network in place of the problem's own: moved as packed rows, one spot at a time.

    Args:
        name: of the backend.
        ground: what to evaluate.
        packed: the rows whose views the network reads.
        network: inputs (a tensor, a tuple or a dict of tensors) -> output.
    """

    together = False

    def __init__(
        self,
        name: str,
        ground: Ground,
        packed: Rows,
        network: Callable[[Any], Tensor],
    ) -> None:
        self.name, self._ground, self._network = name, ground, network
        self._moving = Moving(ground, packed)

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


class Classifying(Protocol):
    """A network that computes cross-entropy and accuracy itself, at up to so many points at once.

    Where something that comes out is not finite it says so, and then the problem's loss is used.
    """

    points: int
    classes: int

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output at the present weights."""

    def losses(self, rows: Tensor, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and hits [2, points, samples], and where all was finite [points]."""


class NetworkOfClasses(Networked):
    """A network whose losses it computes itself where they are those of classes.

    Args:
        name: of the backend.
        ground: what to evaluate.
        packed: the rows whose views the network reads.
        network: computes.
    """

    def __init__(
        self,
        name: str,
        ground: Ground,
        packed: Rows,
        network: Classifying,
    ) -> None:
        super().__init__(name, ground, packed, network)
        self._classifying, self._theta = network, packed.theta
        self._rows = packed.theta.new_empty(network.points, len(packed.theta))
        self.together = network.points > 1
        self._ignored = ground.problem.ignored_label(ground.metrics)
        # target -> each metric's weights; None where they are not known
        self._known: MutableMapping[Tensor, Mapping[str, Tensor] | None] = WeakTensorKeyDictionary()

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield the metrics at each spot; see `Backend`."""
        inputs: Any = None
        labels: Any = None
        if self._ignored is not None:
            inputs, labels = split_batch(batch)
        weights = self._weights(labels)
        if weights is None or any(s.step >= 0 for s in spots):
            yield from super().values(spots, batch, stay)
            return
        for start in range(0, len(spots), len(self._rows)):
            group = spots[start : start + len(self._rows)]
            rows = self._rows[: len(group)]
            if len(group) == 1:  # what moved last is true, whoever used it since
                rows = self._theta[None]
            for spot, row in zip(group if not stay else (), rows, strict=False):
                self._moving.move(spot)
                if len(group) > 1:
                    row.copy_(self._theta)
            found, finite = self._classifying.losses(rows, inputs, labels)
            for spot, fine, loss, hits in zip(group, finite.tolist(), *found, strict=True):
                if fine:
                    yield {m: Sampled(loss if m == "loss" else hits, w) for m, w in weights.items()}
                else:
                    yield from super().values([spot], batch)

    def _weights(self, target: Any) -> Mapping[str, Tensor] | None:
        """Return each metric's weights; None where targets are not classes that it knows."""
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() != 1:
            return None
        if target not in self._known:
            kept = torch.ne(target, self._ignored or 0)
            known = (target >= 0) & (target < self._classifying.classes)
            weights = {m: kept if m == "loss" else known for m in self._ground.metrics}
            fine = target.is_contiguous() and not bool((kept & ~known).any())
            self._known[target] = {m: w.float() for m, w in weights.items()} if fine else None
        return self._known[target]


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
