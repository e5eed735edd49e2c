"""The choice of a backend by measurement: what supports the problem, agrees with eager, is fast.

Candidates are timed on the first samples, at the centre and far out, interleaved with each other;
all trials together may take a small share of what the sweep would cost with eager. A plan that
asks for bfloat16 or float16 permits less than float32 and does not demand it: backends are tried in
both, and what is frozen says in which precision it computes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsweep.backends import catalogue
from lsweep.backends.eager import Backend
from lsweep.backends.packed import Spot
from lsweep.backends.summing import Reference, Samples, stacked
from lsweep.errors import LsweepError
from lsweep.evaluating.disagreement import disagreement
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.runnable import runnable
from lsweep.hosts.device import is_out_of_memory, timed
from lsweep.hosts.machine import trim_memory
from lsweep.outcomes.frozen import AUDIT_TOLERANCE
from lsweep.problems.data import Batch, samples_in
from lsweep.problems.factory import describe

WORTH = 2.0  # seconds of a sweep with eager, below which nothing is tried
SHARE = 0.2  # of them may be spent on trials: the best are three to four times faster than eager
LONG = 30.0  # seconds of set-up, which are spent only where there is none of these,
GRAPHS = ("fused", "native")  # made from a trace of the network
LARGE = 2**21  # weights of a network whose rows are not made once more for a slower backend
SHORTER = GRAPHS  # and so is time on the others in a better precision than asked for
LEAST = 4  # passes over one batch at each spot: below, nothing can be told
PASSES = 32  # over the samples of a trial: two a backend and batch size, and more rounds
ROUNDS = 3  # passes of those that were near the fastest in the first
NEAR = 1.3  # times the fastest
ENOUGH = 1.5  # times eager in the precision asked for: other backends gain less over it
FAR = 2.0  # times the fastest: it is let go of, for it takes memory
LARGER = (2.0, 4.0, 8.0)  # times the default batch size, as long as that is faster
SMALLER = 0.5
DISAGREES = "disagrees with eager"
# As audits have it: near a minimum few samples make the mean, and nothing averages their rounding.
TOLERANCE = {precision: AUDIT_TOLERANCE[precision] for precision in ("float64", "float32")}
REDUCED_TOLERANCE = 0.1  # nonsense; the error that was measured stands in the record
TIMES = 10.0  # the error of eager in the same reduced precision: more is no rounding
Kind = tuple[str, str]  # name and precision of a backend


@dataclass
class Trial:
    """What came of one candidate.

    Attributes:
        backend: its name.
        precision: in which it computes.
        batch_sizes: split -> samples.
        seconds: of one point, busy, extrapolated; None when it was not timed.
        set_up: seconds to build it and run it the first time.
        error: largest relative difference of a mean to float32 (or float64) eager.
        why_not: why it was not taken; "" for those that could have been.
    """

    backend: str
    precision: str
    batch_sizes: dict[str, int]
    seconds: float | None = None
    set_up: float = 0.0
    error: float | None = None
    why_not: str = ""

    @property
    def kind(self) -> Kind:
        """What is built."""
        return self.backend, self.precision


@dataclass(frozen=True)
class Choice:
    """Which backend in which precision, with which batch sizes, and what else was tried."""

    backend: str
    precision: str
    batch_sizes: dict[str, int]
    tried: tuple[Trial, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        wanted = ((self.backend, self.precision), self.batch_sizes)
        taken = [t for t in self.tried if (t.kind, t.batch_sizes) == wanted]
        eager = [t.seconds for t in self.tried if t.backend == "eager" and t.seconds]
        return {
            "backend": self.backend,
            "precision": self.precision,
            "batch_sizes": self.batch_sizes,
            "error": taken[0].error if taken else None,
            "speed": eager[0] / taken[0].seconds if taken and taken[0].seconds and eager else None,
            "tried": [dataclasses.asdict(t) for t in self.tried],
        }


def choose(evaluator: Evaluator, spots: Sequence[Spot], seconds: float, points: float) -> Choice:
    """Choose a backend and batch sizes.

    Args:
        evaluator: at its default batch sizes, with eager.
        spots: where to time and compare: the centre and far out.
        seconds: of one point with eager, as `timed` has them busy.
        points: how many this worker would evaluate, about.

    Returns:
        The choice: eager where the sweep is short.

    Raises:
        LsweepError: a backend that was asked for by name is not for this problem, or disagrees.
    """
    asked = str(evaluator.settings["backend"])
    total = seconds * points
    precisions = evaluator.ground.precisions
    if asked == "eager" or (asked == "auto" and total < WORTH):
        return _untried(evaluator)
    split = evaluator.splits[0]
    batch = samples_in(next(evaluator.fresh(split, evaluator.batch_sizes[split])))
    least = LEAST * len(spots) * seconds * batch / max(1, len(evaluator.centre()[0].values))
    if asked == "auto" and least > SHARE * total:
        return _untried(evaluator)
    trials = _Trials(evaluator, runnable(evaluator, spots), seconds, SHARE * total)
    if asked != "auto":
        named = [trials.first((asked, p)) for p in reversed(precisions)]
        if all(t.why_not for t in named):
            raise LsweepError(
                f'evaluate.backend = "{asked}": {named[0].why_not}; backend = "auto" takes the '
                "fastest that works"
            )
    else:
        worth = [name for name, k in catalogue.KINDS.items() if k.worth(evaluator.ground)]
        # The more exact comes first: rounding hides a wrong graph.
        kinds = [(name, precision) for name in worth for precision in reversed(precisions)]
        for kind in sorted(kinds, key=trials.is_spare):
            if kind != ("eager", precisions[0]):
                trials.first(kind, catalogue.KINDS[kind[0]].set_up)
            if kind[0] == "native":  # which may be enough at a larger batch size
                trials.sizes(kind)
    trials.sizes(trials.fastest(1)[0])
    for kind in trials.fastest(2, NEAR)[1:]:  # no batch size makes up for more than that
        trials.sizes(kind)
    return trials.decision(asked)


def _untried(evaluator: Evaluator) -> Choice:
    """Eager; in reduced precision, which is allowed and not asked for, where that is faster."""
    sizes, precisions = dict(evaluator.batch_sizes), evaluator.ground.precisions
    if len(precisions) == 1:
        return Choice("eager", precisions[0], sizes)
    low, better = precisions
    split = evaluator.splits[0]
    batch = next(evaluator.fresh(split, sizes[split]))
    seconds = {low: math.inf, better: math.inf}
    for _ in range(ROUNDS):
        for precision, backend in ((low, evaluator.eager), (better, evaluator.plain)):
            with contextlib.suppress(Exception):  # one of them may not have the memory
                once = functools.partial(_all, backend, [evaluator.origin], batch)
                seconds[precision] = min(seconds[precision], timed(evaluator.device, once).busy)
    faster = NEAR * seconds[low] < seconds[better]
    return Choice("eager", low if faster else better, sizes)


def _all(backend: Backend, spots: Sequence[Spot], batch: Batch) -> None:
    for _ in backend.values(spots, batch):
        pass


class _Trials:
    """Candidates on trial, on the same samples at the same spots."""

    def __init__(
        self, evaluator: Evaluator, spots: Sequence[Spot], seconds: float, budget: float
    ) -> None:
        self._evaluator, self._spots, self._budget = evaluator, list(spots), budget
        self._start = time.perf_counter()
        self._split = evaluator.splits[0]
        counts = [len(s.values) for s in evaluator.centre()[:: len(evaluator.metrics)]]
        self._all = sum(counts) * evaluator.slices  # about: of all splits
        self._numbers = sum(t.numel() for t in evaluator.ground.state.values())
        self._opaque = any(s.opaque for s in evaluator.centre())
        self._default = dict(evaluator.batch_sizes)
        # Four default batches, but so few samples that the budget has room for all the passes.
        most = budget / PASSES / (seconds / max(1, self._all) * len(spots))
        size = self._default[self._split]
        self._samples = int(min(counts[0], max(size, min(4 * size, most))))
        self._built: dict[Kind, Backend] = {}
        self._cut: dict[int, list[Batch]] = {}
        self._done: list[Trial] = []
        self._times: dict[int, list[float]] = {}
        self._builder = evaluator.builder()
        self._reference = self._found(evaluator.plain, self._batches(self._default))
        self.first(("eager", evaluator.ground.precisions[0]))

    @property
    def _left(self) -> float:
        return self._budget - (time.perf_counter() - self._start)

    def _batches(self, sizes: dict[str, int]) -> list[Batch]:
        """Return the first batches of the first split, on the device."""
        size, seen = sizes[self._split], 0
        if size not in self._cut:
            self._cut[size] = []
            for batch in self._evaluator.fresh(self._split, size):
                self._cut[size].append(batch)
                seen += samples_in(batch)
                if seen >= self._samples:
                    break
        return self._cut[size]

    def _found(self, backend: Backend, batches: list[Batch]) -> list[list[Samples]]:
        """Return for each spot the samples of each metric."""
        parts = [[[] for _ in self._evaluator.metrics] for _ in self._spots]  # type: ignore[var-annotated]
        for batch in batches:
            for k, found in enumerate(backend.values(self._spots, batch)):
                for m, metric in enumerate(self._evaluator.metrics):
                    parts[k][m].append(Samples.of(found[metric]))
        return [[Samples.joined(p) for p in variables] for variables in parts]

    # -- one candidate --------------------------------------------------------------------------

    def first(self, kind: Kind, set_up: float = -math.inf) -> Trial:
        """Build a backend, compare it, time it once; where there is time for its set-up."""
        trial = Trial(*kind, self._default)
        self._done.append(trial)
        name, precision = kind
        reason = catalogue.KINDS[name].why_not(self._evaluator.ground.at(precision))
        if reason is None and set_up > self._left:
            reason = f"not tried: {max(0.0, self._left):.1f} s are left for trials"
        if reason is None and self.is_spare(kind):
            there = next((t.backend for t in self._sound() if t.backend in SHORTER), None)
            if there is not None:
                reason = f"not tried: there is {there}"
        if reason is None:
            reason = self._why_enough()
        wrong = [t for t in self._done if t.backend == name and t.why_not.startswith(DISAGREES)]
        if reason is None and name in GRAPHS and wrong:
            reason = f"{wrong[0].why_not} in {wrong[0].precision}"
        if reason is not None:
            trial.why_not = reason
            return trial
        start = time.perf_counter()
        try:
            self._built[kind] = catalogue.build(name, self._builder, precision)
            self._compare(trial)
            trial.set_up = time.perf_counter() - start
            if not trial.why_not:
                self._time(trial)
        except Exception as e:
            trial.set_up = time.perf_counter() - start
            trial.why_not = reason_of(e)
        self._keep([self._done[0].kind, *self.fastest(len(self._built))])
        return trial

    def _why_enough(self) -> str | None:
        """Return why nothing beside native code need be tried, or None.

        What is not tried takes neither time nor memory: activations, rows, kernels made for it.
        """
        eager = self._done[0].seconds or 0.0
        native = [t.seconds for t in self._sound() if t.backend == "native" and t.seconds]
        if not native or eager < ENOUGH * min(native):
            return None
        times, low = eager / min(native), self._done[0].precision
        return f"not tried: native is {times:.1f} times as fast as eager in {low}"

    def _keep(self, kinds: Sequence[Kind]) -> None:
        """Let go of all other backends: they hold rows and buffers."""
        for far in self._built.keys() - set(kinds):
            del self._built[far]
            self._builder.built.pop(far, None)
        self._builder.seat.take(self._builder.packed)  # it would hold the rows of the last
        trim_memory()

    def is_spare(self, kind: Kind) -> bool:
        """Whether a kind is tried last, and only where none of `SHORTER` can be had."""
        name, precision = kind
        better = precision != self._evaluator.ground.precisions[0]
        if name == "channels_last" and self._numbers > LARGE:  # it has rows of its own
            return True
        return catalogue.KINDS[name].set_up >= LONG or (better and name not in SHORTER)

    def sizes(self, kind: Kind) -> None:
        """Try other batch sizes for a backend, once it was timed at the default ones."""
        ev, timed_ = self._evaluator, [t for t in self._timed() if t.kind == kind]
        if not timed_ or any(t.kind == kind and t.batch_sizes != self._default for t in self._done):
            return
        free = ev.settings["batch_size"] == "auto" and ev.settings["batch_norm"] == "eval"
        long = max(t.set_up for t in self._done if t.kind == kind) > self._left
        if long or not free or self._opaque or not ev.problem.splits[self._split].sizable:
            return
        for factor in LARGER:
            if not self._is_faster(kind, factor):
                break
        if self._best(kind).batch_sizes == self._default:
            self._is_faster(kind, SMALLER)

    def _best(self, kind: Kind) -> Trial:
        return next(t for t in self._timed() if t.kind == kind)

    def _is_faster(self, kind: Kind, factor: float) -> bool:
        """Try some times the default batch sizes; True when they are the fastest of a backend."""
        splits = self._evaluator.problem.splits
        counts = {s: splits[s].samples or math.inf for s in self._default}
        sizes = {
            s: max(1, int(min(counts[s], min(n, counts[s]) * factor)))
            for s, n in self._default.items()
        }
        before = self._best(kind)
        most = {s: min(n, counts[s]) for s, n in before.batch_sizes.items()}
        if most == sizes or sizes[self._split] > 2 * self._samples or self._left <= 0:
            return False
        trial = Trial(*kind, sizes)
        self._done.append(trial)
        try:
            self._compare(trial)
            if not trial.why_not:
                self._time(trial)
        except Exception as e:
            trial.why_not = reason_of(e)
        trim_memory()  # larger batches take more, which would add up
        return self._best(kind) is trial

    def _compare(self, trial: Trial) -> None:
        found = self._found(self._built[trial.kind], self._batches(trial.batch_sizes))
        trial.error, where = 0.0, ""
        for m, metric in enumerate(self._evaluator.metrics):
            pairs = [(f[m], r[m]) for f, r in zip(found, self._reference, strict=True)]
            error, size = disagreement(pairs, steps=metric != "loss")
            if error > trial.error:
                trial.error, where = error, f"where {metric} is {size:.2g}"
        if trial.error > self._tolerance(trial) and trial.backend != "eager":
            trial.why_not = f"{DISAGREES} by {trial.error:.2g} {where}"
        if math.isinf(trial.error):
            trial.error = None  # a number where eager has none, or none where it has

    def _tolerance(self, trial: Trial) -> float:
        """How far off a trial may be; in reduced precision not much further than eager is."""
        if trial.precision in TOLERANCE:
            return TOLERANCE[trial.precision]
        eager = self._done[0].error
        if trial.backend == "eager" or eager is None:
            return REDUCED_TOLERANCE
        return min(REDUCED_TOLERANCE, max(TOLERANCE["float32"], TIMES * eager))

    def _time(self, trial: Trial) -> None:
        """Time one pass over the samples; a trial's seconds are the median of its passes."""
        ev, backend = self._evaluator, self._built[trial.kind]
        batches = self._batches(trial.batch_sizes)
        samples = sum(map(samples_in, batches))
        like = next(iter(backend.values(self._spots[:1], batches[0])))
        references = [Reference(Samples.of(like[m])) for m in ev.metrics]
        n = samples_in(batches[0])

        def once() -> None:
            together = backend.together or len(batches) == 1
            groups = [self._spots] if together else [[s] for s in self._spots]
            for group in groups:
                for b, batch in enumerate(batches):
                    found = list(backend.values(group, batch, stay=len(group) == 1 and b > 0))
                    if samples_in(batch) == n:
                        stacked(references, ev.metrics, found)

        times = self._times.setdefault(id(trial), [])
        times.append(timed(ev.device, once).busy / len(self._spots) / samples * self._all)
        trial.seconds = statistics.median(times)

    # -- which ----------------------------------------------------------------------------------

    def _timed(self) -> list[Trial]:
        timed_ = [t for t in self._done if not t.why_not and t.seconds is not None]
        return sorted(timed_, key=lambda t: t.seconds or 0.0)

    def _sound(self) -> list[Trial]:
        """Those that agree; eager in a precision that is too coarse stands where nothing does."""
        found = self._timed()
        agree = [t for t in found if t.error is not None and t.error <= self._tolerance(t)]
        return agree or found

    def fastest(self, number: int, far: float = FAR) -> list[Kind]:
        """Return the fastest backends so far, without those that take ``far`` times as long."""
        sound = self._sound()
        near = [t.kind for t in sound if (t.seconds or 0.0) <= far * (sound[0].seconds or 0.0)]
        return list(dict.fromkeys(near))[:number]

    def decision(self, asked: str) -> Choice:
        """Time those near the fastest a few times more, in turns, and take the fastest."""
        best = self._sound()[0].seconds or 0.0
        near = [t for t in self._sound() if (t.seconds or 0.0) <= NEAR * best]
        for _ in range(ROUNDS - 1):
            for trial in near:
                if self._left > 0:
                    self._time(trial)
        sound = [t for t in self._sound() if asked in ("auto", t.backend)]
        self._keep([sound[0].kind])
        return Choice(*sound[0].kind, dict(sound[0].batch_sizes), tuple(self._done))


def reason_of(error: Exception) -> str:
    """Return what came in the way of a backend, as a clause."""
    if isinstance(error, LsweepError):
        return str(error)
    return "out of memory" if is_out_of_memory(error) else f"it fails: {describe(error)}"
