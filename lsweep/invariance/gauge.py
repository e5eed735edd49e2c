"""The gauge: one representative of all networks that differ by rescaling units only.

P. Stock, B. Graham, R. Gribonval, H. Jégou, *Equi-normalization of Neural Networks*, ICLR 2019:
each hidden unit is rescaled until what enters it is as long as what leaves it, ‖[w_in, b]‖ =
‖w_out‖, again and again until nothing changes; the fixed point is unique. Two networks that are
equal up to such a rescaling become the same weights, and so have the same filter-normalised slice.
An attention's heads are balanced alike: queries with keys, values with what reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsweep.axes.noise import dtype_of
from lsweep.axes.vectors import Origin
from lsweep.errors import LsweepError, PlanChanged
from lsweep.invariance.bench import bench, few, inputs_of, mean_metric
from lsweep.invariance.certificate import certify
from lsweep.invariance.equivalences import BATCH, CARRIED, GAUGEABLE, WHOLE, candidates
from lsweep.invariance.rescaling import Slab, Transform, acted
from lsweep.invariance.symmetries import discover
from lsweep.outcomes.certified import Trial
from lsweep.plans.settings import Settings
from lsweep.problems.problem import Problem
from lsweep.problems.weights import State

SAMPLES = 64  # on which it is found out what can be rescaled
SETTLED, MOST_SWEEPS = 1e-13, 10_000  # of a logarithm
UNCHANGED = 1e-9  # of rms f: one function in float64, after many rescalings
FREE = (CARRIED, BATCH, WHOLE)  # rows in front of a normalisation: their own length is no length
NEVER = ("broken", "untested")
CPU = torch.device("cpu")
Factors = Mapping[str, Mapping[int, Tensor]]
"""Name of a tensor -> dimension -> (length,) float64 factors along it."""


def rescalable(problem: Problem, metric: str) -> tuple[list[Transform], list[Transform]]:
    """Return the rescalings of units and heads that are exact, and the rows whose length is free.

    Raises:
        LsweepError: there is none; the message says what was tried.
    """
    found = discover(problem.model, inputs_of(problem, metric))
    wanted = (*GAUGEABLE, *FREE)
    tried = [t for t in candidates(found, {}) if t.kind in wanted and not t.untested]
    split = next(iter(problem.splits))
    rows, *_ = certify(few(problem, split, SAMPLES, CPU), tried, metric, CPU)
    exact, free = sorted_out(tried, rows)
    if not exact:
        what = ", ".join(f"{t.layer} ({r.verdict})" for t, r in zip(tried, rows, strict=True)
                         if t.kind in GAUGEABLE)  # fmt: skip
        why = f"tried {what}" if what else "; ".join(found.unknown) or "it has no hidden units"
        raise LsweepError(
            f'gauge = "equi": no hidden units of this {type(problem.model).__name__} can be '
            f"rescaled one by one: {why[:300]}; leave gauge out"
        )
    return exact, free


def sorted_out(
    tried: Sequence[Transform], rows: Sequence[Trial]
) -> tuple[list[Transform], list[Transform]]:
    """Return the rescalings of units and heads that are exact, and the rows of free length."""
    both = list(zip(tried, rows, strict=True))
    exact = [t for t, r in both if t.kind in GAUGEABLE and r.verdict == "exact"]
    # An approximate one is free too: what is a length may not hang on the size of an eps.
    return exact, [t for t, r in both if t.kind in FREE and r.verdict not in NEVER]


def gauge_of(tried: Sequence[Transform], rows: Sequence[Trial]) -> Callable[[Origin], Origin]:
    """Return what takes any origin to its representative, by what was certified."""
    exact, free = sorted_out(tried, rows)
    return lambda origin: gauged(origin, equi_factors(origin.everything, exact, free))


def equi_factors(
    state: Mapping[str, Tensor], exact: Sequence[Transform], free: Sequence[Transform]
) -> dict[str, dict[int, Tensor]]:
    """Return the factors that equi-normalise a network: ‖[w_in, b]‖ = ‖w_out‖ of every unit.

    A row in front of a normalisation has no length of its own, so it counts with length 1; else
    the fixed point would depend on it. A unit that nothing enters or leaves stays as it is.

    Args:
        state: name -> weights.
        exact: rescalings between what enters and what leaves.
        free: rescalings of rows alone.

    Raises:
        LsweepError: it does not settle.

    >>> two = torch.tensor([[0], [1]])
    >>> pair = Transform("", "", ((Slab("a", 0, two), Slab("b", 1, two, -1.0)),))
    >>> state = {"a": torch.tensor([[4.0], [1.0]]), "b": torch.tensor([[1.0, 1.0]])}
    >>> equi_factors(state, [pair], [])["a"][0].tolist()   # √(out / in)
    [0.5, 1.0]
    """
    names = {n for t in (*exact, *free) for n in t.tensors if n in state}
    now: State = {n: state[n].detach().double() for n in names}
    factors: dict[str, dict[int, Tensor]] = {}
    for _ in range(MOST_SWEEPS):
        largest = 0.0
        for t in exact:
            seen = _unit_rows(now, free, set(t.tensors))
            element = []
            for slabs in t.parts:
                enters = _squares(seen, [s for s in slabs if s.power > 0], t.whole)
                leaves = _squares(seen, [s for s in slabs if s.power < 0], t.whole)
                alive = (enters > 0) & (leaves > 0)
                c = torch.where(alive, (leaves / enters) ** 0.25, 1.0)
                element.append(c)
                largest = max(largest, float(c.log().abs().max()))
            now |= acted(now, t, tuple(element))
            for slabs, c in zip(t.parts, element, strict=True):
                for s in slabs:
                    length = now[s.name].shape[s.dim]
                    along = factors.setdefault(s.name, {}).setdefault(
                        s.dim, torch.ones(length, dtype=torch.float64)
                    )
                    each = c if s.power > 0 else 1 / c
                    along[s.index.flatten()] *= each.repeat_interleave(s.index.shape[1])
        if not math.isfinite(largest):
            raise LsweepError('gauge = "equi": a weight is not finite')
        if largest <= SETTLED:
            return factors
    raise LsweepError(f'gauge = "equi" does not settle in {MOST_SWEEPS} sweeps; leave gauge out')


def _squares(state: State, slabs: Sequence[Slab], whole: bool) -> Tensor:
    """Return ‖·‖² of each unit over several slabs; of all units together where ``whole``."""
    each = torch.stack([s.blocks(state[s.name]).square().sum((1, 2)) for s in slabs]).sum(0)
    return each.sum().expand_as(each) if whole else each


def _unit_rows(now: State, free: Sequence[Transform], wanted: set[str]) -> State:
    """Return the tensors with every free row of length 1."""
    seen = dict(now)
    for t in free:
        if not wanted & set(t.tensors):
            continue
        weights = tuple(
            tuple(s for s in slabs if s.name in now and now[s.name].dim() > 1) for slabs in t.parts
        )
        element = []
        for slabs in weights:
            square = _squares(seen, slabs, t.whole)
            element.append(torch.where(square > 0, square, 1.0) ** -0.5)
        seen |= acted(seen, replace(t, parts=weights), tuple(element))
    return seen


def gauged(origin: Origin, factors: Factors) -> Origin:
    """Return the origin with every tensor multiplied by its factors, in float64, rounded once.

    Products of float64 are the same bits everywhere, so that every worker has the same origin.
    """
    parameters = dict(origin.parameters)
    for name, along in factors.items():
        t = parameters[name].double()
        for dim in sorted(along):
            shape = [1] * t.dim()
            shape[dim] = -1
            t = t * along[dim].reshape(shape)
        parameters[name] = t.to(dtype_of(parameters[name]))  # half precision would round it away
    return replace(origin, parameters=parameters)


def find_factors(problem: Problem, metric: str) -> dict[str, dict[int, Tensor]]:
    """Return the factors of a problem's network, checked: the function stays as it was.

    Raises:
        LsweepError: nothing can be rescaled, or the function changes.
    """
    exact, free = rescalable(problem, metric)
    origin = Origin.of(problem.model)
    factors = equi_factors(origin.everything, exact, free)
    fixed = gauged(replace(origin, parameters={n: p.double() for n, p in
                                               origin.parameters.items()}), factors)  # fmt: skip
    split = next(iter(problem.splits))
    with bench(few(problem, split, SAMPLES, CPU), metric, CPU, torch.float64) as b:
        off, _ = b.difference({n: fixed.parameters[n] for n in factors})
    if not off <= UNCHANGED:
        raise LsweepError(
            f'gauge = "equi" changes what the network computes by {off:.1g} of its size; leave '
            "gauge out"
        )
    return factors


# -- in a plan -------------------------------------------------------------------------------------


def fixed_origin(
    settings: Settings, problem: Problem, known: Mapping[str, Any] | None = None
) -> tuple[Origin, Factors]:
    """Return where a sweep starts: the network's own weights, or its gauge's representative.

    Args:
        settings: the sweep.
        problem: at its trained weights.
        known: the factors of a plan made before, as from `as_lists`: iterated norms differ in
            their last bits between machines, so they are computed once.

    Raises:
        LsweepError: as `find_factors`; also where the network is not the one that was planned.
    """
    origin = Origin.of(problem.model)
    if settings.gauge == "none":
        return origin, {}
    factors: Factors
    if known is None:
        factors = find_factors(problem, mean_metric(problem, settings.evaluate.metrics))
    else:
        factors = {
            name: {int(d): torch.tensor(v, dtype=torch.float64) for d, v in along.items()}
            for name, along in known.items()
        }
    for name, along in factors.items():
        shape = tuple(origin.parameters[name].shape) if name in origin.parameters else ()
        if any(d >= len(shape) or shape[d] != len(v) for d, v in along.items()):
            raise PlanChanged(
                f"the plan's gauge rescales {name} along {sorted(along)}, which this network does "
                "not have: it is not the one that was planned",
                "origin",
            )
    return gauged(origin, factors), factors


def moved_by(origin: Origin, factors: Factors) -> State:
    """Return the tensors of a fixed origin that are not the network's own."""
    return {name: origin.parameters[name] for name in factors}


def as_lists(factors: Factors) -> dict[str, dict[str, list[float]]]:
    """Return factors as a plan holds them."""
    return {n: {str(d): v.tolist() for d, v in along.items()} for n, along in factors.items()}
