"""Transforms of weights that could leave a network's function unchanged, as linear maps of tensors.

A group of ``size`` units (neurons, channels, heads) has its numbers in slabs: rows that produce it
and columns that read it. An element of the group's symmetry is one factor for each unit, one matrix
for each head, or an order of the units. D. Kunin et al., *Neural Mechanics*, ICLR 2021, for the
gradient's side: where f(g·θ) = f(θ) for all g near 1, the gradient is orthogonal to the orbit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lsweep.weights import State

SPREAD = 3.0  # random factors lie between 1/SPREAD and SPREAD
FACTORS = (0.5, 2.0, 3.0)  # the finite factors that are tested
RESCALES = ("scale", "map")  # acts that change lengths; a flip or an order is another draw instead


@dataclass(frozen=True)
class Slab:
    """Where the numbers of each unit lie in one tensor.

    Unit u has ``copies * width`` indices along ``dim`` from ``start + u * stride``; a matrix acts
    on each ``width`` of them.

    Attributes:
        name: of a parameter or a buffer.
        dim: along which the units lie.
        power: a factor c multiplies the slab by c**power: 1 what produces a unit, -1 what reads
            it, 2 a variance. A matrix A acts as A for 1, as its inverse transpose for -1.
        start: of the first unit.
        copies: how many times the unit is there, as query heads that share a key.
        width: numbers in a row, as a head's, or the pixels of a channel after flattening.
        stride: from one unit to the next; 0 for ``copies * width``.
    """

    name: str
    dim: int = 0
    power: float = 1.0
    start: int = 0
    copies: int = 1
    width: int = 1
    stride: int = 0

    def rows(self, size: int) -> Tensor:
        """Return the (size * copies * width) int64 indices along ``dim``, unit after unit.

        >>> Slab("w", start=4, width=2).rows(2).tolist()
        [4, 5, 6, 7]
        """
        each = self.copies * self.width
        first = self.start + (self.stride or each) * torch.arange(size)
        return (first[:, None] + torch.arange(each)).flatten()

    def blocks(self, tensor: Tensor, size: int) -> Tensor:
        """Return (size, copies, width, rest) numbers of each unit, a copy."""
        part = tensor.index_select(self.dim, self.rows(size).to(tensor.device))
        return part.movedim(self.dim, 0).reshape(size, self.copies, self.width, -1)

    def put(self, tensor: Tensor, blocks: Tensor) -> None:
        """Write (size, copies, width, rest) numbers back into ``tensor``."""
        there = tensor.movedim(self.dim, 0)  # a view
        rows = self.rows(len(blocks)).to(tensor.device)
        there[rows] = blocks.reshape(len(rows), *there.shape[1:])


@dataclass(frozen=True)
class Transform:
    """One way to change a group of units that could leave the function as it is.

    Attributes:
        layer: the modules between which it acts, for people.
        kind: what is done, such as ``neuron rescaling``.
        size: how many units.
        slabs: all numbers that change.
        act: ``scale`` (a positive factor for each unit), ``map`` (an invertible matrix for each),
            ``flip`` (signs), ``permute`` (their order).
        whole: one factor for all units.
        batch_norm: with which statistics it is tested: ``eval`` or ``batch``.
        untested: why it cannot be tested; "" where it can.
    """

    layer: str
    kind: str
    size: int
    slabs: tuple[Slab, ...] = field(repr=False)
    act: str = "scale"
    whole: bool = False
    batch_norm: str = "eval"
    untested: str = ""

    @property
    def rescales(self) -> bool:
        """Whether it changes lengths, so that a picture could depend on it."""
        return self.act in RESCALES


def acted(tensors: Mapping[str, Tensor], transform: Transform, element: Tensor) -> State:
    """Return g·θ: the tensors that the transform changes, as copies.

    Args:
        tensors: name -> tensor, all that the slabs name.
        transform: which.
        element: (size,) float64 factors or signs, (size, width, width) float64 matrices, or
            (size,) int64, the unit that comes to each place.

    >>> units = Transform("a -> b", "neuron rescaling", 2, (Slab("a"), Slab("b", 1, -1.0)))
    >>> state = {"a": torch.ones(2, 1), "b": torch.ones(1, 2)}
    >>> {n: t.flatten().tolist() for n, t in acted(state, units, torch.tensor([1.0, 2.0])).items()}
    {'a': [1.0, 2.0], 'b': [1.0, 0.5]}
    """
    out: State = {}
    for slab in transform.slabs:
        tensor = out.setdefault(slab.name, tensors[slab.name].detach().clone())
        blocks = slab.blocks(tensor, transform.size)
        element = element.to(tensor.device)
        if transform.act == "permute":
            blocks = blocks[element]
        elif element.dim() == 3:
            matrix = element if slab.power > 0 else torch.linalg.inv(element).mT
            blocks = torch.einsum("uij,ucjr->ucir", matrix, blocks.double())
        else:
            # The factor is rounded last: c and 1/c of a power of two change not one bit.
            blocks = blocks.double() * (element.double() ** slab.power)[:, None, None, None]
        slab.put(tensor, blocks.to(tensor.dtype))
    return out


def finite_element(transform: Transform, c: float) -> Tensor:
    """Return the element that is tested with factor ``c``: every second unit, or all of them.

    >>> finite_element(Transform("a", "neuron rescaling", 3, ()), 2.0).tolist()
    [2.0, 1.0, 2.0]
    """
    if transform.act == "permute":
        return torch.roll(torch.arange(transform.size), 1)
    if transform.act == "map":
        width = transform.slabs[0].width
        stretch = torch.ones(transform.size, width, dtype=torch.float64)
        stretch[:, ::2] = c
        return _turned(stretch, np.random.Generator(np.random.Philox(0)))
    factors = torch.ones(transform.size, dtype=torch.float64)
    factors[:: 1 if transform.whole else 2] = -1.0 if transform.act == "flip" else c
    return factors


def random_element(transform: Transform, random: np.random.Generator) -> Tensor:
    """Return a random element: factors log-uniform in [1/3, 3], singular values of a map too."""
    if transform.act == "permute":
        return torch.from_numpy(random.permutation(transform.size))
    if transform.act == "flip":
        return torch.from_numpy(random.choice([-1.0, 1.0], transform.size))
    shape: tuple[int, ...] = (transform.size,)
    if transform.act == "map":
        shape = (transform.size, transform.slabs[0].width)
    size = (1,) if transform.whole else shape
    factors = torch.from_numpy(np.exp(np.log(SPREAD) * random.uniform(-1, 1, size))).expand(shape)
    return _turned(factors, random) if transform.act == "map" else factors.contiguous()


def _turned(stretch: Tensor, random: np.random.Generator) -> Tensor:
    """Return (units, d, d) matrices with these singular values between two random rotations."""
    units, d = stretch.shape
    left, right = (
        torch.linalg.qr(torch.from_numpy(random.standard_normal((units, d, d))))[0]
        for _ in range(2)
    )
    return torch.as_tensor(left @ (stretch[:, :, None] * right))


def residual(
    transform: Transform, tensors: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> float | None:
    """Return how far a gradient is from orthogonal to the orbit: 0 of an exact symmetry.

    With G the gradient, A = Σ <w, G> over what is multiplied and B over what is divided: the
    pair residual ‖A - B‖ / (‖A‖ + ‖B‖) over units; for one side alone ‖A‖ / ‖‖w‖·‖G‖‖. For maps
    A and B are the matrices G·wᵀ and w·Gᵀ of each head.

    Args:
        transform: which.
        tensors: name -> weights.
        gradient: name -> gradient of one number that depends on the network's output.

    Returns:
        None where there is no infinitesimal transform, or a gradient is not known.
    """
    if not transform.rescales or any(s.name not in gradient for s in transform.slabs):
        return None
    up, down, bound = [torch.zeros(1, dtype=torch.float64)], [torch.zeros(1)], torch.zeros(1)
    for slab in transform.slabs:
        w = slab.blocks(tensors[slab.name], transform.size).double()
        g = slab.blocks(gradient[slab.name], transform.size).double()
        if transform.act == "map":
            first, second = (g, w) if slab.power > 0 else (w, g)
            along = torch.einsum("ucir,ucjr->uij", first, second)
        else:
            along = (w * g).sum((1, 2, 3))
        if transform.whole:
            along = along.sum(0, keepdim=True)
        (up if slab.power > 0 else down).append(abs(slab.power) * along.cpu())
        lengths = w.flatten(1).norm(dim=1) * g.flatten(1).norm(dim=1)
        bound = bound + abs(slab.power) * lengths.cpu()
    a, b = sum(up), sum(down)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    scale = bound.norm() if len(down) == 1 else a.norm() + b.norm()
    return float((a - b).norm() / scale) if float(scale) else 0.0
