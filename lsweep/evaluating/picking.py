"""Picking: a few samples of a split, evaluated at many spots by the worker's own backend."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lsweep.backends.packed import Spot
from lsweep.backends.summing import Samples
from lsweep.errors import LsweepError
from lsweep.evaluating.evaluate import Evaluator
from lsweep.hosts.stopping import Stop
from lsweep.plans.plan import Plan
from lsweep.problems.data import Batch, Split, map_tensors, moved
from lsweep.problems.factory import describe

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TOGETHER = 16  # spots between two looks at whether to stop


class Picker:
    """Evaluates picked samples: a `lsweep.refinement.audit.Sampler`.

    Args:
        evaluator: whose network and backend are used; every evaluation moves the network anew, so
            that it is left as any other leaves it.
        plan: whose variables they are.
        stop: asked between spots.
    """

    def __init__(self, evaluator: Evaluator, plan: Plan, stop: Stop) -> None:
        self._evaluator, self._plan, self._stop = evaluator, plan, stop
        # A compiled network would be compiled again for a batch of another length.
        compiled = evaluator.backend.name == "compiled"
        self._backend = evaluator.eager if compiled else evaluator.backend

    def count(self, name: str) -> int:
        """Return how many samples a variable is a mean over.

        Raises:
            LsweepError: why a few of them cannot stand for all.
        """
        ev = self._evaluator
        mode = ev.settings["batch_norm"]
        if mode != "eval":
            raise LsweepError(f'batch_norm = "{mode}": a value depends on the rest of its batch')
        split = self._split(name)
        if split.pickable is None:
            raise LsweepError(f"data[{split.name!r}] is batches of its own, which cannot be cut")
        found = self._centre(name)
        if any(s.opaque for s in found):
            raise LsweepError(f"{name} is one number for each batch")
        if sum(len(s.values) for s in found) != split.pickable:
            raise LsweepError(f"{name} has not one value for each sample")
        return split.pickable

    def losses(self, name: str, samples: IntArray, offsets: FloatArray) -> FloatArray:
        """Return (K, m) values, so weighted that their mean over all samples is the variable's.

        Args:
            name: of the variable.
            samples: (m,) which, sorted.
            offsets: (K, axes) where.

        Raises:
            LsweepError: it cannot be evaluated.
        """
        total = sum(float(s.weights.sum()) for s in self._centre(name))
        usual = total / self.count(name)
        spots = [Spot(tuple(row)) for row in offsets.tolist()]
        try:
            batches = self._batches(name, samples)
            found = np.concatenate([self._on(name, spots, b) for b in batches], axis=1)
        except LsweepError:
            raise
        except Exception as e:
            raise LsweepError(f"it fails: {describe(e)}") from e
        if found.shape != (len(spots), len(samples)):
            raise LsweepError(f"{name} has not one value for each sample")
        return np.asarray(found / usual)

    def _variable(self, name: str) -> tuple[str, str]:
        return self._plan.variables[self._plan.variable_names.index(name)]

    def _split(self, name: str) -> Split:
        return self._evaluator.problem.splits[self._variable(name)[0]]

    def _centre(self, name: str) -> list[Samples]:
        """Return the variable at the centre, slice by slice: evaluated before any unit was."""
        at = self._plan.variable_names.index(name)
        return [self._evaluator.centre(s)[at] for s in range(self._plan.slices)]

    def _batches(self, name: str, samples: IntArray) -> list[Batch]:
        ev, split = self._evaluator, self._split(name)
        size = min(len(samples), ev.batch_sizes[split.name])
        picked = split.cut(samples).batches(size)
        return [map_tensors(b, lambda t: moved(t, ev.device, ev.dtype)) for b in picked]

    def _on(self, name: str, spots: list[Spot], batch: Batch) -> FloatArray:
        """Return (K, n) weighted values of one batch."""
        metric, rows = self._variable(name)[1], []
        for first in range(0, len(spots), TOGETHER):
            self._stop.check()
            for found in self._backend.values(spots[first : first + TOGETHER], batch):
                s = Samples.of(found[metric])
                rows.append((s.weights * s.values).cpu().numpy().astype(np.float64))
        return np.stack(rows)
