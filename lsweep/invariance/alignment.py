"""Alignment: the hidden units of one network put in the order of another's.

Two networks that were trained apart may differ only in which unit stands where. Weight matching
(Ainsworth et al. 2022, arXiv:2209.04836, algorithm 1) looks for the permutations of B that
maximise Σ⟨W^A, P W^B Pᵀ⟩: with all groups of units but one held, that is a linear assignment,
solved exactly; group after group until nothing improves. The numbers of B are moved, never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsweep.axes.vectors import dot
from lsweep.derivatives.scientific import scipy
from lsweep.invariance.symmetries import Units, permuted
from lsweep.problems.weights import State

RESTARTS = 4
SWEEPS = 100  # over all groups; in practice fewer than ten find nothing more
GAIN = 1e-12  # of ‖A‖·‖B‖: what rounding alone may seem to gain


@dataclass(frozen=True)
class Alignment:
    """How a network was put in the order of another.

    Attributes:
        state: B's tensors, moved.
        orders: group -> which of B's units stands at each place.
        before: Σ⟨W^A, W^B⟩ / (‖W^A‖·‖W^B‖) over the parameters, as B was.
        after: the same with its units moved; never less.
        restarts: how many beginnings were tried.
        held: groups that stay as they are, because their units cannot trade places.
    """

    state: State
    orders: Mapping[str, Tensor]
    before: float
    after: float
    restarts: int
    held: tuple[str, ...] = ()

    @property
    def moved(self) -> int:
        """How many units stand somewhere else than before."""
        return sum(int((o != torch.arange(len(o))).sum()) for o in self.orders.values())


def align(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    units: Sequence[Units],
    names: Sequence[str],
    seed: int = 0,
    restarts: int = RESTARTS,
) -> Alignment:
    """Return B with its hidden units in the order that agrees best with A's.

    The first beginning is B as it is, the others are random; the best end is kept.

    Args:
        a: A's tensors by canonical name, parameters and buffers.
        b: B's.
        units: groups of `lsweep.invariance.symmetries.discover`.
        names: of the parameters that are compared; what else lies in ``b``, such as batch-norm
            statistics, only moves along.
        seed: of the orders and the random beginnings.
        restarts: how many beginnings.

    Raises:
        LsweepError: scipy is not installed.

    >>> from torch import nn
    >>> from lsweep.invariance.symmetries import discover
    >>> a = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    >>> groups = discover(a, torch.zeros(2, 2).double()).units
    >>> b = permuted(a.state_dict(), groups[0], torch.tensor([3, 1, 4, 0, 2]))
    >>> found = align(a.state_dict(), b, groups, list(b))
    >>> all(torch.equal(found.state[n], t) for n, t in a.state_dict().items()), found.moved
    (True, 4)
    """
    free = [u for u in units if u.permutable and u.size > 1]
    near = {n: a[n].detach().double().cpu() for n in names}
    far = {n: b[n].detach().double().cpu() for n in names}
    size = (dot(near, near) * dot(far, far)) ** 0.5 or 1.0
    before = dot(near, far) / size
    best, value = {u.name: torch.arange(u.size) for u in free}, before
    for start in range(restarts if free else 0):
        random = _generator(seed, start)
        orders = {
            u.name: torch.from_numpy(random.permutation(u.size)) if start else torch.arange(u.size)
            for u in free
        }
        orders = _descended(near, far, free, orders, random, GAIN * size)
        reached = dot(near, _moved(far, free, orders)) / size
        if reached > value + GAIN:
            best, value = orders, reached
    held = tuple(u.name for u in units if not u.permutable)
    return Alignment(_moved(b, free, best), best, before, value, restarts, held)


def _descended(
    a: State,
    b: State,
    units: Sequence[Units],
    orders: Mapping[str, Tensor],
    random: np.random.Generator,
    gain: float,
) -> dict[str, Tensor]:
    """Return orders at which no single group can be improved."""
    assignment = scipy("optimize", "an alignment").linear_sum_assignment
    orders, state = dict(orders), _moved(b, units, orders)
    waiting = set(range(len(units)))
    for _ in range(SWEEPS):
        for i in random.permutation(len(units)).tolist():
            if i not in waiting:
                continue
            waiting.discard(i)
            group = units[i]
            score = torch.zeros(group.size, group.size, dtype=torch.float64)
            for slot in (s for s in group.slots if s.name in a):
                rows = (_slab(t[slot.name], slot.dim, slot.index) for t in (a, state))
                score += next(rows) @ next(rows).T
            order = torch.from_numpy(assignment(score.numpy(), maximize=True)[1])
            mine = {s.name for s in group.slots} & set(a)
            there = permuted({n: state[n] for n in mine}, _within(group, mine), order)
            # Where both dimensions of a weight belong to the group, the assignment is a guess.
            better = dot({n: a[n] for n in mine}, there) - dot({n: a[n] for n in mine}, state)
            if better > gain:
                state |= there
                orders[group.name] = orders[group.name][order]
                waiting |= {
                    k for k, u in enumerate(units) if k != i and mine & {s.name for s in u.slots}
                }
                if len(mine) < len([s for s in group.slots if s.name in mine]):
                    waiting.add(i)
        if not waiting:
            break
    return orders


def _slab(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Return the numbers of each unit in a tensor as rows, float64 (size, …)."""
    picked = tensor.index_select(dim, index.flatten()).movedim(dim, 0)
    return picked.reshape(len(index), -1)


def _within(group: Units, names: set[str]) -> Units:
    slots = tuple(s for s in group.slots if s.name in names)
    return Units(group.name, group.size, slots)


def _moved(
    state: Mapping[str, Tensor], units: Sequence[Units], orders: Mapping[str, Tensor]
) -> State:
    out = dict(state)
    for group in units:
        out = permuted(out, _within(group, set(out)), orders[group.name])
    return out


def _generator(seed: int, start: int) -> np.random.Generator:
    """Return random numbers that depend on the seed and the beginning alone."""
    key = hashlib.sha256(f"{seed}\0align\0{start}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key, "<u8").astype(np.uint64)))
