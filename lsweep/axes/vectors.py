"""Vectors in weight space: the origin, a direction, and the arithmetic between them.

A vector is one tensor per parameter name; what it does not name does not move.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lsweep.axes.noise import dtype_of
from lsweep.errors import LsweepError
from lsweep.plans.recipes import Recipe
from lsweep.problems import weights
from lsweep.problems.filters import count_zero_filters, is_norm, normalize
from lsweep.problems.weights import State

BLOCK = 2**22  # numbers that are held in float64 at once


@dataclass(frozen=True)
class Origin:
    """The trained weights as the directions see them, on the CPU.

    Attributes:
        parameters: name -> tensor; tied weights once.
        buffers: name -> floating-point tensor (batch-norm statistics).
        owners: parameter name -> the module that holds it.
        states: names in the order of ``model.state_dict()``.
    """

    parameters: State
    buffers: State
    owners: Mapping[str, nn.Module]
    states: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """Read a model; its tensors are shared, not copied.

        Raises:
            LsweepError: a weight is not finite.
        """
        parameters = {n: p.detach().cpu() for n, p in weights.parameters_of(model).items()}
        buffers = {n: b.detach().cpu() for n, b in weights.buffers_of(model).items()}
        spoiled = {n: b for n, b in buffers.items() if bool(b.isnan().any())}  # a mask may be Inf
        broken = weights.not_finite({**parameters, **spoiled})
        if broken:
            raise LsweepError(f"the network's {broken}: its checkpoint is broken")
        return cls(
            parameters,
            buffers,
            weights.owners_of(model),
            tuple(weights.canonical_name(n) for n in model.state_dict()),
        )

    @property
    def everything(self) -> State:
        """Parameters and buffers."""
        return {**self.parameters, **self.buffers}


@dataclass(frozen=True)
class Direction:
    """One vector in weight space; what is not in ``tensors`` does not move.

    Attributes:
        tensors: name -> float32 or float64 tensor, the shape of the parameter or buffer.
        ignored: names that ``ignore`` or ``parameters`` set to zero.
        zero_filters: how many filters have norm zero and so cannot move.
        statistics: names in ``tensors`` that are buffers, such as running means.
    """

    tensors: State
    ignored: tuple[str, ...] = ()
    zero_filters: int = 0
    statistics: frozenset[str] = frozenset()

    @property
    def weights(self) -> State:
        """The tensors of parameters: what distances and angles in weight space are taken over."""
        return {n: t for n, t in self.tensors.items() if n not in self.statistics}

    @property
    def norm(self) -> float:
        """L2 norm in weight space."""
        return math.sqrt(dot(self.weights, self.weights))


def dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product over common names in float64, the same on any number of threads.

    >>> dot({"w": torch.ones(3)}, {"w": torch.ones(3), "b": torch.ones(1)})
    3.0
    """
    return math.fsum(
        # Numpy's sum is one thread's: a plan's digest hangs on the last bit.
        float(np.sum((x.double() * y.double()).cpu().numpy()))
        for n in a if n in b
        for x, y in zip(*(torch.split(t[n].flatten(), BLOCK) for t in (a, b)), strict=True)
    )  # fmt: skip


def difference(state: State, origin: State) -> State:
    """Return ``state - origin`` for each tensor of ``origin``."""
    # In float64 first: two nearby float32 checkpoints differ in their last bits.
    return {n: (state[n].double() - t.double()).to(dtype_of(t)) for n, t in origin.items()}


def is_weight(name: str, parameter: Tensor, origin: Origin) -> bool:
    """Whether ``ignore = "bias+norm"`` lets a parameter move."""
    return parameter.dim() > 1 and not is_norm(origin.owners[name])


def ignored_names(recipe: Recipe, origin: Origin) -> tuple[str, ...]:
    """Return the parameters that the recipe's ``ignore`` and ``parameters`` hold still."""
    out = []
    for name, p in origin.parameters.items():
        still = not any(fnmatch.fnmatchcase(name, pattern) for pattern in recipe.parameters)
        if recipe.ignore == "bias+norm":
            still |= not is_weight(name, p, origin)
        if still:
            out.append(name)
    if len(out) == len(origin.parameters):
        raise LsweepError(
            f"parameters = {list(recipe.parameters)} with ignore = {recipe.ignore!r} leaves "
            f"nothing to move; names are like {', '.join(list(origin.parameters)[:3])}"
        )
    return tuple(out)


def finish(tensors: State, recipe: Recipe, origin: Origin) -> Direction:
    """Hold still what is to be ignored, then normalise, tensor by tensor."""
    ignored = set(ignored_names(recipe, origin))
    whole = recipe.parameters == ("*",)
    out, zeros = {}, 0
    for name, d in tensors.items():
        if name in ignored or (name in origin.buffers and not whole):
            continue
        if name in origin.parameters:
            module = origin.owners[name]
            out[name] = normalize(recipe.normalize or "none", d, origin.parameters[name], module)
            if recipe.normalize == "filter":
                zeros += count_zero_filters(origin.parameters[name], module)
        else:
            out[name] = d
    still = tuple(n for n in origin.parameters if n in ignored)
    return Direction(out, still, zeros, frozenset(out) & frozenset(origin.buffers))


def weighted_sum(factors: list[float], terms: list[State]) -> State:
    """Return Σ factor·term over the union of names, added in order in float64."""
    out: State = {}
    for name, like in {n: t for term in terms for n, t in term.items()}.items():
        total = torch.zeros_like(like, dtype=torch.float64)
        for factor, term in zip(factors, terms, strict=True):
            if name in term:
                total += factor * term[name].double()
        out[name] = total.to(like.dtype)
    return out
