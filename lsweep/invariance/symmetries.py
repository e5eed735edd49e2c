"""Hidden units of a network, found in its graph: which may trade places, who makes and reads them.

Discovery follows labels through the traced graph (`lsweep.invariance.following`) and never looks
at what the weights are. What it cannot follow stays fixed and is named: unknown is never called
symmetric.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsweep.backends.tracing import Unsupported, plain_graph
from lsweep.invariance.following import Following
from lsweep.invariance.labels import BIT, Ties, roles_in
from lsweep.problems.data import map_tensors
from lsweep.problems.weights import State, buffers_of, parameters_of


@dataclass(frozen=True)
class Slot:
    """Where the units of a group lie along one dimension of one parameter or buffer.

    Attributes:
        name: the parameter's or buffer's canonical name.
        dim: the dimension.
        index: (size, repeat) whole numbers: the places of each unit, in the same order for each;
            a linear layer after a flattened convolution has repeat = height·width.
        roles: what they do there, of `lsweep.invariance.labels.ROLES`: "row" makes units, "column"
            reads them; "bias", "scale", "mean", "variance" belong to them; "query", "key",
            "value", "gate", "up" say which side of a product the rows are; none: not understood.
    """

    name: str
    dim: int
    index: Tensor
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Units:
    """A group of hidden units of a network that trade places without changing what it computes.

    Attributes:
        name: of the layer that makes them, with the head where it is a part.
        size: how many units.
        slots: everywhere that they lie.
        activations: elementwise operations that they go through, by name, in order; "shift" is a
            number added, "product" a product with other units, "dot" one of queries and keys.
        norms: kind and path of the normalisations that they go through.
        reduced: whether something sums or compares over them without weights, a softmax or a
            layer's norm, so that one unit cannot be rescaled by itself.
        stream: whether several layers write to the same units (a residual stream).
        permutable: False where fixed numbers that differ from unit to unit meet them.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    activations: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    reduced: bool = False
    stream: bool = False
    permutable: bool = True

    @property
    def activation(self) -> str:
        """The one activation, "none", or several joined by "+"."""
        return "+".join(self.activations) or "none"

    @property
    def norm(self) -> str | None:
        """The one normalisation, None, or several joined by "+"."""
        return "+".join(self.norms) or None

    @property
    def outgoing(self) -> tuple[Slot, ...]:
        """What reads the units: columns."""
        return tuple(s for s in self.slots if "column" in s.roles)


@dataclass(frozen=True)
class Discovered:
    """What discovery found: groups of units, and what it could not follow."""

    units: tuple[Units, ...]
    unknown: tuple[str, ...] = ()


def discover(model: nn.Module, inputs: Any) -> Discovered:
    """Return the groups of hidden units of a network.

    Args:
        model: any network; it is left as it was.
        inputs: an example batch's inputs: a tensor, a tuple or a dict of tensors [B, …].

    Returns:
        groups in the order of the graph; a network that cannot be traced has none, and a reason.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> (group,) = discover(net, torch.zeros(2, 2)).units
    >>> group.name, group.size, group.activation, [(s.name, s.dim) for s in group.slots]
    ('0', 3, 'relu', [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])
    """
    state = {**parameters_of(model), **buffers_of(model)}
    try:
        # Labels are as large as what the network computes: two samples will do.
        few = map_tensors(inputs, lambda t: t[:2] if t.dim() else t)
        module = plain_graph(model, few, state, free=False)
        return _grouped(Following(module))
    except Unsupported as e:
        return Discovered((), unknown=(f"the network is not followed: {e}",))
    except Exception as e:  # an operation in a form that no rule foresaw
        reason = " ".join(str(e).split())[:160]
        return Discovered(
            (), unknown=(f"the network is not followed: {type(e).__name__}: {reason}",)
        )


def permuted(state: Mapping[str, Tensor], units: Units, order: Tensor) -> State:
    """Return a state whose unit ``u`` of a group is what unit ``order[u]`` was; numbers only move.

    Args:
        state: parameters and buffers by canonical name.
        units: the group.
        order: (size,) a permutation.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> (group,) = discover(net, torch.zeros(2, 1)).units
    >>> there = permuted(net.state_dict(), group, torch.tensor([1, 0]))
    >>> torch.equal(there["0.weight"], net[0].weight.flip(0))
    True
    """
    out = dict(state)
    for slot in units.slots:
        t = out[slot.name]
        index = slot.index.to(t.device)
        source = t.index_select(slot.dim, index[order.to(t.device)].flatten())
        out[slot.name] = t.index_copy(slot.dim, index.flatten(), source)
    return out


# -- atoms into groups -----------------------------------------------------------------------------


def _grouped(found: Following) -> Discovered:
    ties = found.ties
    for gate, up in found.gates:
        silu = {t.what for t in ties.touches if t.kind == "pointwise" and _meets(t.atoms, gate)}
        first, second = (gate, up) if silu else (up, gate)
        ties.role(first, "gate")
        ties.role(second, "up")
    roots, bits = ties.roots(), ties.role_bits()
    atoms = np.flatnonzero(roots != 0)
    families = ties.families(np.arange(len(roots)))
    members: dict[int, list[int]] = defaultdict(list)
    for atom in atoms.tolist():
        members[int(roots[atom])].append(atom)
    touched: dict[int, list[int]] = defaultdict(list)
    keys: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i, touch in enumerate(ties.touches):
        marks = np.zeros_like(touch.atoms) if touch.keys is None else touch.keys
        for root, key in set(zip(roots[touch.atoms].tolist(), marks.tolist(), strict=True)):
            touched[root].append(i)
            keys[root].append((i, key))
    fine: dict[Any, list[int]] = defaultdict(list)
    for root, inside in members.items():
        places = tuple(sorted((int(families[a]), int(bits[a])) for a in inside))
        fine[places, tuple(sorted(set(touched[root]))), tuple(sorted(keys[root]))].append(root)
    coarse: dict[Any, list[list[int]]] = defaultdict(list)
    for (places, marks, _), group in fine.items():
        coarse[places, marks].append(group)
    out: list[Units] = []
    for (places, marks), groups in coarse.items():
        if not any(bits_ & (BIT["row"] | BIT["depthwise"]) for _, bits_ in places):
            continue  # of no weight: a lone bias of something fixed
        pinned = len(groups) > 1 and all(len(g) == 1 for g in groups)
        parts = [[r for g in groups for r in g]] if pinned else groups
        for i, group in enumerate(parts):
            part = _part(places, marks, ties) + (f" {i}" if len(parts) > 1 else "")
            units = _units(ties, group, members, bits, marks, part, not pinned)
            taken = sum(re.sub(r" \(\d+\)$", "", u.name) == units.name for u in out)
            if taken:  # another part of the same layer, which is used in another way
                units = replace(units, name=f"{units.name} ({taken + 1})")
            out.append(units)
    return Discovered(tuple(out), tuple(dict.fromkeys(ties.unknown)))


def _part(places: Any, marks: tuple[int, ...], ties: Ties) -> str:
    """Return what tells groups of one layer apart: which side of attention, which part of it."""
    if any(ties.touches[i].kind == "dot" for i in marks):
        return " query-key"
    return " value" if any(bits & BIT["value"] for _, bits in places) else ""


def _units(
    ties: Ties,
    group: list[int],
    members: Mapping[int, list[int]],
    bits: np.ndarray,
    marks: tuple[int, ...],
    part: str,
    permutable: bool,
) -> Units:
    lies: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    for root in group:
        places: dict[tuple[int, int], list[int]] = defaultdict(list)
        inside = np.array(members[root])
        for atom, family in zip(inside.tolist(), ties.families(inside).tolist(), strict=True):
            places[family, int(bits[atom])].append(atom - ties.starts[family])
        for place, index in places.items():
            lies[place].append(index)
    slots = tuple(
        Slot(*ties.names[family], torch.tensor(index), roles_in(bit))
        for (family, bit), index in sorted(lies.items())
    )
    slots = tuple(sorted(slots, key=_rank))
    touches = [ties.touches[i] for i in marks]
    made = [s.name for s in slots if "row" in s.roles or "depthwise" in s.roles]
    kinds = [t.what if t.kind == "pointwise" else t.kind for t in touches]
    shown = ("shift", "product", "dot")
    acts = [
        k for k, t in zip(kinds, touches, strict=True) if t.kind == "pointwise" or t.kind in shown
    ]
    return Units(
        re.sub(r"[._]?(in_proj_)?weight$", "", made[0]) + part,
        len(group),
        slots,
        tuple(dict.fromkeys(acts)),
        tuple(dict.fromkeys(t.what for t in touches if t.kind == "norm")),
        any(t.kind == "reduced" or (t.kind == "norm" and t.what[:5] != "batch") for t in touches),
        any(t.kind == "sum" for t in touches),
        permutable,
    )


def _rank(slot: Slot) -> tuple[bool, bool]:
    """Makers first, then what belongs to units, then readers."""
    makes = bool({"row", "depthwise"} & set(slot.roles))
    return "column" in slot.roles and not makes, not makes


def _meets(atoms: np.ndarray, label: Tensor) -> bool:
    return bool(np.isin(label.numpy(), atoms).any())
