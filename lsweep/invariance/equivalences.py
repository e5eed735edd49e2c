"""Which transforms could leave a network unchanged: every candidate that its hidden units offer.

A candidate is no claim: `lsweep.invariance.certificate` measures which of them hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lsweep.invariance.rescaling import Slab, Transform
from lsweep.invariance.symmetries import Discovered, Slot, Units

NEURONS, LAYER = "neuron rescaling", "layer rescaling"
FLIP, ORDER = "sign flip", "unit permutation"
STALE, CARRIED, BATCH = (
    "filter scale, statistics left",
    "filter scale, statistics carried",
    "filter scale, batch statistics",
)
FILTER, WHOLE = "filter scale before the norm", "layer scale before the norm"
QK, QK_MAP, QUERY = "query-key scale", "query-key map", "query scale alone"
VO, VO_MAP = "value-output scale", "value-output map"
UP, GATE = "up/down rescaling", "gate/down rescaling"
GAUGEABLE = (NEURONS, UP, QK, VO)  # factors between what enters and what leaves: a gauge fixes them
MAKERS = {"row", "depthwise", "bias", "scale", "mean", "variance"}
Slots = Sequence[Slot]


def candidates(found: Discovered, parameters: Mapping[str, Tensor]) -> list[Transform]:
    """Return every transform that is worth testing, in the order of the network.

    Args:
        found: hidden units of the network.
        parameters: name -> weights; those of two or more dimensions that no unit touches, and
            what discovery could not follow, become candidates that are untested, with the reason.
    """
    out: list[Transform] = []
    for heads in _attended(found.units):
        out += _of_units(heads)
    for reason in found.unknown:
        out.append(Transform("-", "not followed", untested=reason))
    touched = {s.name for u in found.units for s in u.slots}
    for name, p in parameters.items():
        if p.dim() > 1 and name not in touched:
            why = "no hidden units were followed through it"
            out.append(Transform(_module(name), "not followed", untested=why))
    return out


def _attended(units: Iterable[Units]) -> list[list[Units]]:
    """Return groups of units, the heads of one attention together."""
    out: dict[tuple[str, ...], list[Units]] = {}
    for u in units:
        name = re.sub(r" \d+$", "", u.name)
        marks = [f"{s.name} {s.dim} {s.roles}" for s in u.slots]
        out.setdefault((name, *marks), []).append(u)
    return list(out.values())


def _of_units(heads: list[Units]) -> list[Transform]:
    u = heads[0]
    roles = {r for s in u.slots for r in s.roles}
    strange = [s.name for s in u.slots if not s.roles]
    if strange:
        why = f"{strange[0]} uses these units in a way that is not understood"
        return [Transform(_label(u), NEURONS, untested=why)]
    if {"query", "key"} <= roles:
        return _of_queries(heads)
    if {"gate", "up"} <= roles:
        return _of_gated(heads)
    if "value" in roles:
        out = [
            _made(heads, VO, whole=True),
            _made(heads, VO_MAP, act="map"),
        ]
        return out + _order(heads)
    return _of_neurons(heads)


def _of_neurons(heads: list[Units]) -> list[Transform]:
    """Return what units offer between the layers that produce them and those that read them."""
    u = heads[0]
    norms = {s.name.rpartition(".")[0] for s in u.slots if {"scale", "mean"} & set(s.roles)}
    front = {
        s.name
        for s in u.slots
        if {"row", "depthwise", "bias"} & set(s.roles) and s.name.rpartition(".")[0] not in norms
    }
    statistics = {s.name for s in u.slots if {"mean", "variance"} & set(s.roles)}
    affine = {s.name for s in u.slots if s.name.rpartition(".")[0] in norms} - statistics
    readers = {s.name for s in u.outgoing}
    batch = any(n.startswith("batch") for n in u.norms)
    other = any(not n.startswith("batch") for n in u.norms)
    out = []
    if batch:
        if statistics:
            out.append(_made(heads, STALE, front - readers))
            out.append(_made(heads, CARRIED, (front - readers) | statistics))
        out.append(replace(_made(heads, BATCH, front - readers), batch_norm="batch"))
    if other:
        if not u.stream:  # a stream has no filters of its own
            out.append(_made(heads, FILTER, front - readers))
        out.append(_made(heads, WHOLE, front - readers, whole=True))
    rescaled = (affine if u.norms else front - _depthwise(u)) | readers
    if readers and (affine or not u.norms):
        out += [
            _made(heads, NEURONS, rescaled),
            _made(heads, LAYER, rescaled, whole=True),
            _made(heads, FLIP, rescaled, act="flip"),
        ]
    return [t for t in out if t.parts] + (_order(heads) if readers else [])


def _depthwise(u: Units) -> set[str]:
    return {s.name for s in u.slots if "depthwise" in s.roles}


def _of_queries(heads: list[Units]) -> list[Transform]:
    """Return what the queries and keys of an attention offer: q·k stays for (A q, A⁻ᵀ k)."""
    out = [
        _made(heads, QK, whole=True, down="key"),
        _made(heads, QK_MAP, act="map", down="key"),
        _made(heads, QUERY, whole=True, only="query"),
    ]
    return out + _order(heads)


def _of_gated(heads: list[Units]) -> list[Transform]:
    """Return what a product down·(act(gate·x) * up·x) offers, such as SwiGLU."""
    out = [
        _made(heads, UP, only="up"),
        _made(heads, GATE, only="gate"),
        _made(heads, FLIP, act="flip", only="up"),
    ]
    return out + _order(heads)


def _order(heads: list[Units]) -> list[Transform]:
    return [_made(heads, ORDER, act="permute")] if all(u.permutable for u in heads) else []


def _made(
    heads: list[Units],
    kind: str,
    names: set[str] | None = None,
    *,
    act: str = "scale",
    whole: bool = False,
    down: str = "column",
    only: str = "",
) -> Transform:
    """Return a transform of the slots with these names, or of all.

    Args:
        heads: the groups.
        kind: what it is called.
        names: of tensors; None for all.
        act: as in `Transform`.
        whole: as in `Transform`.
        down: the role of what is divided.
        only: a role: of what makes units, only that is multiplied.
    """
    parts = []
    for u in heads:
        slabs = []
        for s in u.slots:
            reads = down in s.roles
            makes = bool(MAKERS & set(s.roles)) and (not only or only in s.roles)
            power = (2.0 if "variance" in s.roles else 1.0) * makes * (down != "key" or not reads)
            power -= reads
            if (names is None or s.name in names) and (power or act == "permute"):
                slabs.append(Slab(s.name, s.dim, s.index, power))
        if slabs:
            parts.append(tuple(slabs))
    return Transform(_label(heads[0]), kind, tuple(parts), act, whole)


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _label(u: Units) -> str:
    makers = dict.fromkeys(_module(s.name) for s in u.slots if {"row", "depthwise"} & set(s.roles))
    readers = dict.fromkeys(_module(s.name) for s in u.outgoing)
    if u.stream:
        return f"stream {next(iter(makers))} ({len(makers)} in, {len(readers)} out)"
    if not readers:
        return ", ".join(makers)
    more = f" and {len(readers) - 1} more" if len(readers) > 1 else ""
    return f"{', '.join(makers)} -> {_short(next(iter(readers)), next(iter(makers)))}{more}"


def _short(name: str, beside: str) -> str:
    """Return a module's name without the folder that it shares with another, where that reads.

    >>> _short("blocks.0.fc2", "blocks.0.fc1"), _short("1.5", "1.2")
    ('fc2', '1.5')
    """
    own, other = name.split("."), beside.split(".")
    shared = 0
    while shared < min(len(own) - 1, len(other)) and own[shared] == other[shared]:
        shared += 1
    rest = own[shared:]
    return name if rest[0].isdigit() else ".".join(rest)
