"""Acceptance: a backend that was chosen on few samples must give eager's values on all.

The centre over all data is evaluated by both anyway. A graph may have been traced where a network
that looks at its data took another way, and later batches may have a shape that a graph refuses:
both show here, before anything is committed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from lsweep.backends import catalogue
from lsweep.backends.eager import Backend
from lsweep.backends.packed import Spot
from lsweep.backends.summing import Samples
from lsweep.errors import LsweepError
from lsweep.evaluating.choice import (
    DISAGREES,
    GRAPHS,
    REDUCED_TOLERANCE,
    TOLERANCE,
    Choice,
    reason_of,
)
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.runnable import runnable
from lsweep.hosts.device import Spent, is_out_of_memory, timed

USUAL_SAMPLES = 512  # tell how large a value usually is
FLOOR = 0.05  # of the usual value: below, float32 leaves no relative error of one sample to judge
ONE = 10.0  # times a mean's tolerance for one sample, whose rounding errors do not cancel


def centre_of(evaluator: Evaluator) -> tuple[list[Samples], Spent]:
    """Return each variable's samples at the centre over all slices, and the seconds that took."""
    slices: list[list[Samples]] = []
    seconds = timed(
        evaluator.device,
        lambda: slices.extend(evaluator.centre(s) for s in range(evaluator.slices)),
    )
    return [Samples.joined(parts) for parts in zip(*slices, strict=True)], seconds


def taken(
    evaluator: Evaluator,
    choice: Choice,
    spots: Sequence[Spot],
    centre: tuple[list[Samples], Spent],
) -> tuple[Choice, list[Samples], Spent]:
    """Take a choice into use, where its centre is eager's; otherwise eager stays.

    Args:
        evaluator: with eager in the plan's precision.
        choice: what was chosen; where it is not accepted, its trials get the reason.
        spots: the centre and far out: how large values usually are.
        centre: eager's, and the seconds that it took.

    Returns:
        the choice that stands, its centre and the seconds of a point.

    Raises:
        LsweepError: a backend that was asked for by name fails or disagrees.
    """
    asked = str(evaluator.settings["backend"])
    before = dict(evaluator.batch_sizes)
    eager = ("eager", evaluator.ground.precisions[0])
    if ((choice.backend, choice.precision), choice.batch_sizes) == (eager, before):
        return choice, *centre
    try:
        exact = _exact(evaluator, choice, spots, centre[0])
        evaluator.use(choice.backend, choice.batch_sizes, choice.precision)
        found, seconds = centre_of(evaluator)
        if exact is not None:
            exact.require(found)
        return choice, found, seconds
    except Exception as e:
        evaluator.use("eager", before)
        if is_out_of_memory(e):
            raise  # smaller batches are tried
        why_not = f"on all data {reason_of(e)}"
        if asked != "auto":
            raise LsweepError(f'evaluate.backend = "{asked}": {why_not}') from e
        for trial in choice.tried:
            if trial.backend == choice.backend and trial.precision == choice.precision:
                trial.why_not = why_not
        return Choice(*eager, before, choice.tried), *centre


class _Reference:
    """Eager's centre, which that of another backend in the same precision must repeat.

    Args:
        evaluator: with eager.
        precision: of both.
        samples: eager's, for each variable.
        spots: the centre and far out.
    """

    def __init__(
        self, evaluator: Evaluator, precision: str, samples: list[Samples], spots: Sequence[Spot]
    ) -> None:
        self._evaluator, self._samples, self._spots = evaluator, samples, spots
        self._most = ONE * TOLERANCE.get(precision, REDUCED_TOLERANCE / ONE)

    def require(self, found: list[Samples]) -> None:
        """Compare sample by sample; only losses, for one sample may well be a tie of a metric.

        Raises:
            LsweepError: they disagree.
        """
        ev = self._evaluator  # it uses the other by now, so that eager goes piece by piece
        spots = runnable(ev, self._spots)
        usual = ev.samples(spots, limit=USUAL_SAMPLES, backend=ev.plain)
        for v, (f, r) in enumerate(zip(found, self._samples, strict=True)):
            if self._evaluator.metrics[v % len(self._evaluator.metrics)] == "loss":
                error, at = apart(f, r, _usual([at[v] for at in usual]))
                if error > self._most:
                    raise LsweepError(f"it {DISAGREES} by {error:.2g} on sample {at}")


def _exact(
    evaluator: Evaluator, choice: Choice, spots: Sequence[Spot], eager: list[Samples]
) -> _Reference | None:
    """Return what the centre is to be compared with; None where it is eager or was compared.

    Rounding in reduced precision would hide a wrong graph: it is compared in float32.
    """
    precisions = evaluator.ground.precisions
    if choice.backend == "eager":
        return None
    if len(precisions) == 1:
        return _Reference(evaluator, precisions[0], eager, spots)
    if choice.precision != precisions[-1] and choice.backend not in GRAPHS:
        return None
    reference = _Reference(evaluator, precisions[-1], _all(evaluator, evaluator.plain), spots)
    if choice.precision == precisions[-1]:
        return reference
    same = catalogue.build(choice.backend, evaluator.builder(), precisions[-1])
    reference.require(_all(evaluator, same))
    return None


def _all(evaluator: Evaluator, backend: Backend) -> list[Samples]:
    slices = range(evaluator.slices)
    parts = [evaluator.samples([evaluator.origin], s, backend=backend)[0] for s in slices]
    return [Samples.joined(some) for some in zip(*parts, strict=True)]


def _usual(found: Sequence[Samples]) -> float:
    sizes = [float((s.weights * s.values).abs().sum() / s.weights.sum()) for s in found]
    finite = [s for s in sizes if math.isfinite(s)]
    return statistics.median(finite) if finite else 0.0


def apart(found: Samples, reference: Samples, usual: float) -> tuple[float, int]:
    """Return the largest relative difference of one sample, and which sample it is.

    Args:
        found: samples (n,).
        reference: the same samples.
        usual: size of a value; what is small beside it counts as `FLOOR` of it.

    >>> a = Samples(torch.tensor([1.0, 2.0, 0.0]), torch.ones(3), False)
    >>> b = Samples(torch.tensor([1.0, 2.5, 1e-9]), torch.ones(3), False)
    >>> apart(b, a, 1.0)
    (0.25, 1)
    """
    if found.values.shape != reference.values.shape:
        return math.inf, min(len(found.values), len(reference.values))
    v, r = found.values, reference.values
    error = (v - r).abs() / r.abs().clamp(min=FLOOR * usual or 1.0)
    finite = torch.isfinite(v), torch.isfinite(r)
    error = torch.where(finite[0] & finite[1], error, 0.0)
    error = torch.where(finite[0] != finite[1], math.inf, error)
    if not len(error):
        return 0.0, 0
    at = int(error.argmax())
    return float(error[at]), at
