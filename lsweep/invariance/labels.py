"""Labels: with which hidden unit each number of a network moves.

Every index of every dimension of every parameter is an *atom*. A tensor inside a network carries
labels: whole-number tensors, of size 1 along the dimensions where they do not vary, that say with
which atom each of its numbers moves when hidden units trade places. A weight (out, in) has two
labels, a stream of tokens one or two. Operations tie atoms to each other; what is tied moves
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

FIXED = 0  # the atom that moves nowhere: inputs, outputs, positions

# What an atom does, as bits: an atom may do several things where weights are tied.
ROLES = (
    "row", "column", "bias", "scale", "mean", "variance", "depthwise", "query", "key", "value",
    "gate", "up",
)  # fmt: skip
_broadcast: Callable[..., tuple[Tensor, ...]] = torch.broadcast_tensors
BIT = {name: 1 << i for i, name in enumerate(ROLES)}


@dataclass(frozen=True)
class Value:
    """A tensor of the network: its shape and its labels; ``name`` where it is a parameter."""

    shape: tuple[int, ...]
    labels: tuple[Tensor, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class Touch:
    """Something that happens to hidden units: an activation, a norm, a sum over them.

    Attributes:
        kind: "pointwise", "shift", "sum", "product", "norm", "reduced", "dot", "scope", "fixed".
        what: the operation's or the module's name.
        atoms: which; unique.
        keys: units with different keys cannot trade places; None: no such limit.
    """

    kind: str
    what: str
    atoms: np.ndarray
    keys: np.ndarray | None = None


def collapsed(label: Tensor) -> Tensor:
    """Return a label with size 1 along each dimension where it does not vary.

    >>> collapsed(torch.tensor([[1, 2], [1, 2]]))
    tensor([[1, 2]])
    """
    for d in range(label.dim()):
        first = label.narrow(d, 0, 1)
        if label.size(d) > 1 and (label.stride(d) == 0 or bool((label == first).all())):
            label = first
    return label


def dims_of(label: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a label varies."""
    return tuple(d for d in range(label.dim()) if label.size(d) > 1)


def valued(shape: Sequence[int], labels: Iterable[Tensor], name: str = "") -> Value:
    """Return a value whose labels are collapsed; those that vary nowhere are left out."""
    kept = (collapsed(label) for label in labels)
    return Value(tuple(shape), tuple(t for t in kept if t.numel() > 1), name)


def at_rank(value: Value, rank: int) -> Value:
    """Return a value with dimensions of size 1 in front, as broadcasting sees it."""
    more = (1,) * (rank - len(value.shape))
    labels = tuple(t.reshape(more + tuple(t.shape)) for t in value.labels)
    return Value(more + value.shape, labels, value.name)


@dataclass
class Ties:
    """The atoms of a network and everything that is found out about them."""

    names: list[tuple[str, int]] = field(default_factory=list)  # family -> parameter, dimension
    starts: list[int] = field(default_factory=lambda: [1])  # its first atom; the end of the last
    touches: list[Touch] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    _pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _aliases: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _alike: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _roles: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def parameter(self, name: str, shape: Sequence[int]) -> Value:
        """Return the value of a parameter or buffer, one new atom per index of each dimension."""
        labels = []
        for d, size in enumerate(shape):
            first = self.starts[-1]
            self.names.append((name, d))
            self.starts.append(first + size)
            lies = [size if i == d else 1 for i in range(len(shape))]
            labels.append(torch.arange(first, first + size).view(lies))
        return valued(shape, labels, name)

    def families(self, atoms: np.ndarray) -> np.ndarray:
        """Return for each atom the index of its (parameter, dimension), -1 for `FIXED`."""
        return np.searchsorted(np.array(self.starts), atoms, side="right") - 1

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Let the atoms of two labels that broadcast move together."""
        a, b = _broadcast(a, b)
        self._pairs.append((a.flatten().numpy(), b.flatten().numpy()))

    def alias(self, parameter: Tensor, activation: Tensor) -> None:
        """Say that a bias or a scale belongs to the units of an activation, and tie them."""
        self.tie(parameter, activation)
        a, b = _broadcast(parameter, activation)
        self._aliases.append((a.flatten().numpy(), b.flatten().numpy()))

    def alike(self, a: Tensor, b: Tensor) -> None:
        """Say that parameters which are added before they are used have the same roles."""
        a, b = _broadcast(a, b)
        self._alike.append((a.flatten().numpy(), b.flatten().numpy()))

    def fix(self, label: Tensor, why: str) -> None:
        """Let nothing in a label trade places or be rescaled, and say why."""
        atoms = np.unique(label.numpy())
        self._pairs.append((atoms, np.zeros_like(atoms)))
        self.touches.append(Touch("fixed", why, atoms))

    def role(self, label: Tensor, name: str) -> None:
        """Say what atoms do: one of `ROLES`."""
        self._roles.append((BIT[name], np.unique(label.numpy())))

    def touch(self, kind: str, what: str, label: Tensor, keyed: Sequence[int] = ()) -> None:
        """Note what happens to the units of a label, apart by its index along ``keyed`` dims."""
        keyed = [d for d in keyed if label.size(d) > 1]
        if not keyed:
            self.touches.append(Touch(kind, what, np.unique(label.numpy())))
            return
        key = torch.zeros([1] * label.dim(), dtype=torch.long)
        for d in keyed:
            lies = [label.size(d) if i == d else 1 for i in range(label.dim())]
            key = key * label.size(d) + torch.arange(label.size(d)).view(lies)
        atoms, keys = (t.flatten().numpy() for t in _broadcast(label, key))
        pairs = np.unique(np.stack([atoms, keys]), axis=1)
        self.touches.append(Touch(kind, what, pairs[0], pairs[1]))

    def roots(self) -> np.ndarray:
        """Return for each atom the smallest one that it is tied to, 0 where it is `FIXED`."""
        parent = list(range(self.starts[-1]))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        for a, b in self._pairs:
            for i, j in np.unique(np.stack([a, b]), axis=1).T.tolist():
                i, j = find(i), find(j)
                if i != j:
                    parent[max(i, j)] = min(i, j)
        return np.array([find(i) for i in range(len(parent))])

    def role_bits(self) -> np.ndarray:
        """Return for each atom its roles; a bias has also the query's or gate's that it is of."""
        bits = np.zeros(self.starts[-1], dtype=np.int64)
        for bit, atoms in self._roles:
            bits[atoms] |= bit
        for a, b in self._alike:
            bits[a] = bits[b] = bits[a] | bits[b]
        above = np.int64(BIT["query"] | BIT["key"] | BIT["value"] | BIT["gate"] | BIT["up"])
        for a, b in self._aliases:
            np.bitwise_or.at(bits, a, bits[b] & above)
        bits[FIXED] = 0
        return bits


def roles_in(bits: int) -> tuple[str, ...]:
    """Return the names of roles.

    >>> roles_in(5)
    ('row', 'bias')
    """
    return tuple(name for name in ROLES if bits & BIT[name])


def shapes_of(values: Iterable[Value]) -> tuple[int, ...]:
    """Return the shape that values broadcast to."""
    return np.broadcast_shapes(*(v.shape for v in values))
