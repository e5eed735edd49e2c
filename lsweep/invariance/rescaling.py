"""Transforms of weights that could leave a network's function unchanged, as linear maps of tensors.

The units of a group (neurons, channels, the dimensions of a head) lie in slabs: rows that produce
them and columns that read them. An element of the group's symmetry is a factor for each unit, a
matrix over them, or an order. D. Kunin et al., *Neural Mechanics*, ICLR 2021, for the gradient's
side: where f(g·θ) = f(θ) for all g near 1, the gradient is orthogonal to the orbit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsweep.problems.weights import State

SPREAD = 3.0  # random factors lie between 1/SPREAD and SPREAD
FACTORS = (0.5, 2.0, 3.0)  # the finite factors that are tested
RESCALES = ("scale", "map")  # acts that change lengths; signs and orders are another draw instead
Element = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Slab:
    """Where the numbers of each unit lie in one tensor.

    Attributes:
        name: of a parameter or a buffer.
        dim: along which the units lie.
        index: (size, repeat) int64 places of each unit along ``dim``.
        power: a factor c multiplies the slab by c**power: 1 what produces a unit, -1 what reads
            it, 2 a variance. A matrix A acts as A for 1, as its inverse transpose for -1.
    """

    name: str
    dim: int
    index: Tensor = field(repr=False)
    power: float = 1.0

    def blocks(self, tensor: Tensor) -> Tensor:
        """Return (size, repeat, rest) float64 numbers of each unit, a copy."""
        there = self.index.flatten().to(tensor.device)
        part = tensor.detach().index_select(self.dim, there).movedim(self.dim, 0)
        return part.reshape(*self.index.shape, -1).double()

    def put(self, tensor: Tensor, blocks: Tensor) -> None:
        """Write (size, repeat, rest) numbers back into ``tensor``."""
        there = tensor.movedim(self.dim, 0)  # a view
        index = self.index.flatten().to(tensor.device)
        there[index] = blocks.reshape(len(index), *there.shape[1:]).to(tensor.dtype)


@dataclass(frozen=True)
class Transform:
    """One way to change groups of units that could leave the function as it is.

    Attributes:
        layer: the modules between which it acts, for people.
        kind: what is done, such as ``neuron rescaling``.
        parts: the slabs of each group that it acts on at once; an attention's heads, else one.
        act: ``scale`` (a positive factor for each unit), ``map`` (an invertible matrix over the
            units of each part), ``flip`` (signs), ``permute`` (their order).
        whole: one factor for all units of a part.
        batch_norm: with which statistics it is tested: ``eval`` or ``batch``.
        untested: why it cannot be tested; "" where it can.
    """

    layer: str
    kind: str
    parts: tuple[tuple[Slab, ...], ...] = field(default=(), repr=False)
    act: str = "scale"
    whole: bool = False
    batch_norm: str = "eval"
    untested: str = ""

    @property
    def rescales(self) -> bool:
        """Whether it changes lengths, so that a picture could depend on it."""
        return self.act in RESCALES

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many units each part has."""
        return tuple(len(slabs[0].index) for slabs in self.parts)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all that it changes."""
        return tuple(dict.fromkeys(s.name for slabs in self.parts for s in slabs))


def acted(tensors: Mapping[str, Tensor], transform: Transform, element: Element) -> State:
    """Return g·θ: the tensors that the transform changes, as copies.

    Args:
        tensors: name -> tensor, all that the slabs name.
        transform: which.
        element: for each part (size,) float64 factors or signs, a (size, size) float64 matrix, or
            (size,) int64, the unit that comes to each place.

    >>> two = torch.tensor([[0], [1]])
    >>> pair = Transform("a -> b", "pair", ((Slab("a", 0, two), Slab("b", 1, two, -1.0)),))
    >>> state = {"a": torch.ones(2, 1), "b": torch.ones(1, 2)}
    >>> there = acted(state, pair, (torch.tensor([1, 2]),))
    >>> {n: t.flatten().tolist() for n, t in there.items()}
    {'a': [1.0, 2.0], 'b': [1.0, 0.5]}
    """
    out: State = {}
    for slabs, g in zip(transform.parts, element, strict=True):
        for slab in slabs:
            if slab.name not in out:
                out[slab.name] = tensors[slab.name].detach().clone()
            tensor = out[slab.name]
            g = g.to(tensor.device)
            blocks = slab.blocks(tensor)
            if transform.act == "permute":
                blocks = blocks[g]
            elif transform.act == "map":
                matrix = g if slab.power > 0 else torch.linalg.inv(g).mT
                blocks = torch.einsum("ij,jcr->icr", matrix, blocks)
            else:
                blocks = blocks * (g.double() ** slab.power)[:, None, None]
            slab.put(tensor, blocks)
    return out


def finite_element(transform: Transform, c: float) -> Element:
    """Return the element that is tested with factor ``c``: every second unit, or all of them.

    >>> slabs = (Slab("a", 0, torch.arange(3)[:, None]),)
    >>> finite_element(Transform("a", "neuron rescaling", (slabs,)), 2.0)[0].tolist()
    [2.0, 1.0, 2.0]
    """
    chance = np.random.Generator(np.random.Philox(0))
    out = []
    for size in transform.sizes:
        if transform.act == "permute":
            out.append(torch.roll(torch.arange(size), 1))
            continue
        factors = torch.ones(size, dtype=torch.float64)
        factors[:: 1 if transform.whole else 2] = -1.0 if transform.act == "flip" else c
        out.append(_turned(factors, chance) if transform.act == "map" else factors)
    return tuple(out)


def random_element(transform: Transform, chance: np.random.Generator) -> Element:
    """Return a random element: factors log-uniform in [1/3, 3], singular values of a map too."""
    out = []
    for size in transform.sizes:
        if transform.act == "permute":
            out.append(torch.from_numpy(chance.permutation(size)))
        elif transform.act == "flip":
            out.append(torch.from_numpy(chance.choice([-1.0, 1.0], size)))
        else:
            drawn = chance.uniform(-1, 1, 1 if transform.whole else size)
            factors = torch.from_numpy(SPREAD**drawn).expand(size).contiguous()
            out.append(_turned(factors, chance) if transform.act == "map" else factors)
    return tuple(out)


def _turned(stretch: Tensor, chance: np.random.Generator) -> Tensor:
    """Return a (d, d) matrix with these singular values between two random rotations."""
    d = len(stretch)
    left, right = (np.linalg.qr(chance.standard_normal((d, d)))[0] for _ in range(2))
    return torch.from_numpy(left) @ (stretch[:, None] * torch.from_numpy(right))


def residual(
    transform: Transform, tensors: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> float | None:
    """Return how far a gradient is from orthogonal to the orbit: 0 of an exact symmetry.

    With G the gradient, A = Σ <w, G> over what is multiplied and B over what is divided: the
    pair residual ‖A - B‖ / (‖A‖ + ‖B‖) over units; for one side alone ‖A‖ / ‖‖w‖·‖G‖‖. For maps
    A and B are the matrices G·wᵀ and w·Gᵀ.

    Args:
        transform: which.
        tensors: name -> weights.
        gradient: name -> gradient of one number that depends on the network's output.

    Returns:
        None where there is no infinitesimal transform, or a gradient is not known; NaN where
        neither side has any, so that nothing was tested.
    """
    if not transform.rescales or any(n not in gradient for n in transform.tensors):
        return None
    gaps, sizes = 0.0, 0.0
    for slabs in transform.parts:
        up = down = bound = torch.zeros(1, dtype=torch.float64)
        for slab in slabs:
            w, g = slab.blocks(tensors[slab.name]), slab.blocks(gradient[slab.name])
            if transform.act == "map":
                first, second = (g, w) if slab.power > 0 else (w, g)
                along = torch.einsum("icr,jcr->ij", first, second).cpu()
            else:
                along = abs(slab.power) * (w * g).sum((1, 2)).cpu()
            if transform.whole:
                along = along.sum(0, keepdim=True)
            up, down = (up + along, down) if slab.power > 0 else (up, down + along)
            lengths = w.flatten(1).norm(dim=1) * g.flatten(1).norm(dim=1)
            bound = bound + abs(slab.power) * lengths.cpu()
        alone = all(s.power > 0 for s in slabs)
        gaps += float((up - down).norm()) ** 2
        sizes += float(bound.norm() if alone else up.norm() + down.norm()) ** 2
    return float((gaps / sizes) ** 0.5) if sizes else math.nan


def reached(
    transform: Transform, tensors: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> bool:
    """Return whether the output depends on the numbers that a transform changes, to first order.

    Where Σ |w·G| = 0, as behind a closed gate or in front of a layer of zeros, the output would
    stay whatever was done.

    Args:
        transform: which.
        tensors: name -> weights.
        gradient: name -> gradient of one number that depends on the network's output.

    >>> slabs = (Slab("a", 0, torch.arange(2)[:, None]), Slab("b", 1, torch.arange(2)[:, None]))
    >>> two = Transform("a -> b", "sign flip", (slabs,), "flip")
    >>> state = {"a": torch.ones(2, 1), "b": torch.zeros(1, 2)}
    >>> reached(two, state, {"a": torch.zeros(2, 1), "b": torch.ones(1, 2)})
    False
    """
    return any(
        bool((slab.blocks(tensors[slab.name]) * slab.blocks(gradient[slab.name])).any())
        for slabs in transform.parts
        for slab in slabs
        if slab.name in gradient
    )
