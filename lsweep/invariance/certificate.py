"""The certificate: which transforms of weights leave this network's function unchanged, measured.

First (T1) one backward pass for all: the gradient of <f(x), u> must be orthogonal to the orbit.
Then (T2) finite factors 1/2, 2 and 3: e = max|Δf| / rms f against the noise floor e0 of the same
forward with its batch in another order and in other pieces. In float64 where memory allows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lsweep.errors import LsweepError
from lsweep.invariance.bench import Bench, bench, precisions
from lsweep.invariance.rescaling import FACTORS, Transform, finite_element, reached, residual
from lsweep.outcomes.certified import Trial
from lsweep.problems.factory import describe
from lsweep.problems.problem import Problem
from lsweep.problems.weights import State

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}
NOISE_MARGIN = 10.0  # times the noise floor is still exact
NOISIEST = 100.0  # times rounding: beyond it samples depend on each other, and all would be exact
UP_TO_EPS, FALL = 1e-3, 100.0
APPROXIMATE = 0.02
CLEARLY_BROKEN = 1e-3  # a gradient so far from the orbit's normal: one finite factor will do


def verdict(errors: Mapping[float, float], noise: float, exact: float, falls: bool) -> str:
    """Return exact, up to eps, approximate or broken.

    Exact: no error above rounding, at any factor. Up to eps: at most 1e-3 at factor 2, and it
    falls with the eps of a normalisation. Approximate: at most 0.02 at factor 2.

    Args:
        errors: factor -> max|Δf| / rms f.
        noise: the floor e0.
        exact: the largest error of rounding alone.
        falls: whether the error falls at least 100 times with the norm's eps a thousandth.

    >>> verdict({2.0: 1e-15}, 0.0, 1e-12, False), verdict({2.0: 1e-4}, 0.0, 1e-12, True)
    ('exact', 'up to eps')
    >>> verdict({2.0: 0.01, 3.0: 0.03}, 0.0, 1e-12, False), verdict({2.0: 0.3}, 0.0, 1e-12, False)
    ('approximate', 'broken')
    """
    worst = max(errors.values())
    if worst <= max(NOISE_MARGIN * noise, exact):
        return "exact"
    usual = errors.get(2.0, worst)
    if usual <= UP_TO_EPS and falls:
        return "up to eps"
    return "approximate" if usual <= APPROXIMATE else "broken"


def certify(
    problem: Problem,
    transforms: Sequence[Transform],
    metric: str,
    device: torch.device,
    say: Callable[[Trial], None] = lambda trial: None,
) -> tuple[list[Trial], float, int]:
    """Measure which transforms leave the network unchanged.

    Args:
        problem: with one split of a few samples, as from `few`.
        transforms: candidates.
        metric: whose mean stands for the loss.
        device: where to evaluate.
        say: is told of each as soon as it is known.

    Returns:
        One `Trial` for each transform, in order; the mean loss, and the number of samples.

    Raises:
        LsweepError: the network fails on these samples, or its output is not finite.
    """
    *_, dtype = kinds = precisions(problem, device)
    try:
        in_float32: list[float | None] = [None] * len(transforms)
        if len(kinds) > 1:
            with bench(problem, metric, device, torch.float32) as b:
                in_float32 = [_largest(b, t) for t in transforms]
        with bench(problem, metric, device, dtype) as b:
            modes = dict.fromkeys(t.batch_norm for t in transforms if not t.untested)
            for m in modes:
                if not bool(torch.isfinite(b.base(m)[0]).all()):
                    raise LsweepError("the network's output is not finite at its own weights")
            gradients = {m: b.gradients(m) for m in modes}
            noise = {m: b.noise(m) for m in modes}
            found = []
            for t, error32 in zip(transforms, in_float32, strict=True):
                row = _tested(b, t, gradients, noise, error32)
                say(row)
                found.append(row)
            loss, samples = b.base("eval")[1], b.samples
    except LsweepError:
        raise
    except Exception as e:
        raise LsweepError(f"the problem fails at its own weights: {describe(e)}") from e
    return found, loss, samples


def _largest(b: Bench, t: Transform) -> float | None:
    return None if t.untested else _finite(b.error(t, finite_element(t, FACTORS[-1]))[0])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tested(
    b: Bench,
    t: Transform,
    gradients: Mapping[str, list[State]],
    noise: Mapping[str, float],
    error32: float | None,
) -> Trial:
    row = Trial(t.layer, t.kind, sum(t.sizes), t.tensors, "untested", note=t.untested)
    if t.untested:
        return row
    gradient, floor, exact = gradients[t.batch_norm], noise[t.batch_norm], EXACT[b.dtype]
    if not floor <= NOISIEST * exact:
        size = f"changes by {floor:.1e}" if floor < math.inf else "is not always finite"
        why = f"the output {size} with the order or the pieces of the batch, so nothing can be told"
        return dataclasses.replace(row, noise=_finite(floor), note=why)
    found = [residual(t, b.tensors, g) for g in gradient]
    known = [r for r in found if r is not None and not math.isnan(r)]
    first = sum(known) / len(known) if known else None
    off = first is not None and first > CLEARLY_BROKEN
    factors: tuple[float, ...] = FACTORS if t.rescales else (1.0,)
    errors: dict[float, tuple[float, float]] = {}
    # One factor shows what is broken; only what survives it needs the others.
    for c in (2.0, *(c for c in factors if c != 2.0)) if off else factors:
        errors[c] = b.error(t, finite_element(t, c))
        if off and errors[c][0] > UP_TO_EPS:
            break
    worst = max(errors, key=lambda c: errors[c][0])
    e = errors[worst][0]
    falls, note = False, ""
    if t.rescales and max(NOISE_MARGIN * floor, exact) < e < math.inf:
        less, _ = b.error(t, finite_element(t, worst), less_eps=True)
        falls = less <= e / FALL
        note = f"with a thousandth of eps {less:.1e}" if falls else ""
    if e == math.inf:
        note = "the output is not finite there"
    word = verdict({c: v for c, (v, _) in errors.items()}, floor, exact, falls)
    if word == "exact":
        if gradient and not any(reached(t, b.tensors, g) for g in gradient):
            why = "no gradient reaches these weights on these samples: whatever is done is exact"
            return dataclasses.replace(row, noise=floor, note=why)
        if off:
            why = f"the gradient says broken ({first:.1e}), and is too small to change the output"
            return dataclasses.replace(row, noise=floor, note=why)
    return dataclasses.replace(
        row, verdict=word, factor=worst if t.rescales else None, error=_finite(e),
        error32=error32, loss_error=_finite(errors[worst][1]), noise=floor,
        residual=first, precision=str(b.dtype).removeprefix("torch."), note=note,
    )  # fmt: skip
