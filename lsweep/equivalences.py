"""Which transforms could leave a network unchanged: every candidate that a group of units offers.

A candidate is no claim: `lsweep.certificate` measures which of them hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lsweep.rescaling import Slab, Transform

NEURONS, LAYER = "neuron rescaling", "layer rescaling"
FLIP, ORDER, HEADS = "sign flip", "unit permutation", "head permutation"
STALE, CARRIED, BATCH = (
    "filter scale, statistics left",
    "filter scale, statistics carried",
    "filter scale, batch statistics",
)
FILTER, WHOLE = "filter scale before the norm", "layer scale before the norm"
QK, QK_MAP, VO, VO_MAP, QUERY = (
    "query-key scale",
    "query-key map",
    "value-output scale",
    "value-output map",
    "query scale alone",
)
UP, GATE = "up/down rescaling", "gate/down rescaling"
Slabs = Sequence[Slab]


def of_units(
    layer: str,
    size: int,
    before: Slabs,
    outgoing: Slabs,
    *,
    norm: str = "",
    affine: Slabs = (),
    statistics: Slabs = (),
) -> list[Transform]:
    """Return what hidden units offer between the layer that produces them and those that read them.

    Args:
        layer: for people.
        size: how many units.
        before: rows of weight and bias that produce them, in front of a normalisation if any.
        outgoing: what reads them.
        norm: ``batch`` or ``layer`` (or any other that is no batch norm), "" for none.
        affine: its weight and bias.
        statistics: its running mean and variance.

    >>> [t.kind for t in of_units("0 -> 2", 4, [Slab("0.weight")], [Slab("2.weight", 1)])]
    ['neuron rescaling', 'layer rescaling', 'sign flip', 'unit permutation']
    """
    up = [replace(s, power=1.0) for s in (affine if norm else before)]
    down = [replace(s, power=-1.0) for s in outgoing]
    front = [replace(s, power=1.0) for s in before]
    carried = [replace(s, power=2.0 if s.name.endswith("var") else 1.0) for s in statistics]

    def one(kind: str, *slabs: Slabs, act: str = "scale", whole: bool = False) -> Transform:
        return Transform(layer, kind, size, tuple(s for some in slabs for s in some), act, whole)

    out = []
    if norm == "batch":
        if carried:
            out += [one(STALE, front), one(CARRIED, front, carried)]
        out.append(replace(one(BATCH, front), batch_norm="batch"))
    elif norm:
        out += [one(FILTER, front), one(WHOLE, front, whole=True)]
    if up and down:  # a norm without weights leaves nothing to rescale behind it
        out += [one(NEURONS, up, down), one(LAYER, up, down, whole=True)]
        out.append(one(FLIP, up, down, act="flip"))
    if down:
        out.append(one(ORDER, front, affine, carried, down, act="permute"))
    return out


def of_attention(
    layer: str, heads: int, query: Slabs, key: Slabs, value: Slabs, output: Slabs
) -> list[Transform]:
    """Return what attention offers: scales and GL(d) maps of each head, and their order.

    The slabs' ``width`` is the head's; heads that share a key have ``copies`` of the query.
    """

    def one(kind: str, up: Slabs, down: Slabs, act: str = "scale") -> Transform:
        slabs = [replace(s, power=1.0) for s in up] + [replace(s, power=-1.0) for s in down]
        return Transform(layer, kind, heads, tuple(slabs), act)

    out = [
        one(QK, query, key),
        one(QK_MAP, query, key, "map"),
        replace(one(QUERY, query, ()), whole=True),
        one(VO, value, output),
        one(VO_MAP, value, output, "map"),
    ]
    if heads > 1:
        out.append(one(HEADS, [*query, *key, *value], output, "permute"))
    return out


def of_gated(layer: str, size: int, gate: Slabs, up: Slabs, down: Slabs) -> list[Transform]:
    """Return what a gated unit down·(act(gate·x) * up·x) offers, such as SwiGLU."""

    def one(kind: str, first: Slabs, act: str = "scale") -> Transform:
        slabs = [replace(s, power=1.0) for s in first] + [replace(s, power=-1.0) for s in down]
        return Transform(layer, kind, size, tuple(slabs), act)

    return [
        one(UP, up),
        one(GATE, gate),
        one(FLIP, up, "flip"),
        one(ORDER, [*gate, *up], "permute"),
    ]
