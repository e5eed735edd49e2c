"""For which layers a normalisation of directions follows what leaves the network unchanged.

A random direction is followed through a rescaling where its normalisation scales it alike: a row
of filter lengths follows a factor for each row, no factor for each column and no matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lsweep.invariance.equivalences import GAUGEABLE
from lsweep.invariance.rescaling import Slab, Transform
from lsweep.outcomes.certified import Trial
from lsweep.problems.filters import filter_dim

Layers = dict[str, tuple[str, tuple[str, ...]]]


def justified(
    transforms: Sequence[Transform],
    rows: Sequence[Trial],
    moved: Mapping[str, Tensor],
    owners: Mapping[str, nn.Module],
    normalize: str,
    gauge: str,
) -> Layers:
    """Return for each weight whether its directions follow the rescalings that hold.

    Args:
        transforms: what was tested.
        rows: their verdicts.
        moved: name -> weight, all that the directions move.
        owners: name -> module.
        normalize: the rule: filter, layer, weight or none.
        gauge: ``equi`` fixes the factors of units and heads before directions are made.

    Returns:
        name -> (``followed``, ``not followed``, ``nothing to follow`` or ``untested``, kinds of
        transform that it is about).
    """
    out: Layers = {}
    for name, weight in moved.items():
        if weight.dim() < 2:
            continue
        touching = [(t, r) for t, r in zip(transforms, rows, strict=True) if name in t.tensors]
        if not touching or any(r.verdict == "untested" for _, r in touching):
            out[name] = ("untested", ())
            continue
        held = [t for t, r in touching if r.holds and t.rescales]
        missed = [
            t.kind
            for t in held
            if not (gauge == "equi" and t.kind in GAUGEABLE)
            and not all(
                _follows(normalize, t, slab, weight, owners.get(name))
                for slabs in t.parts
                for slab in slabs
                if slab.name == name
            )
        ]
        if missed:
            out[name] = ("not followed", tuple(dict.fromkeys(missed)))
        elif held:
            out[name] = ("followed", tuple(dict.fromkeys(t.kind for t in held)))
        else:
            out[name] = ("nothing to follow", ())
    return out


def _follows(
    normalize: str, t: Transform, slab: Slab, weight: Tensor, module: nn.Module | None
) -> bool:
    if t.act != "scale" or normalize == "none":
        return False
    everything = t.whole and slab.index.numel() == weight.shape[slab.dim]
    if normalize == "filter":
        return everything or slab.dim == filter_dim(weight, module)
    return everything or normalize == "weight"
