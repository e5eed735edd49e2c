"""lsweep: a distributed sweep engine for neural-network loss landscapes.

Public names load when they are first used, so that looking at a result never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsweep.inprocess import sweep as sweep
    from lsweep.losses import accuracy as accuracy
    from lsweep.measures import measure as measure
    from lsweep.opening import open_surface as open
    from lsweep.pictures import render as render
    from lsweep.problem import Problem as Problem
    from lsweep.problem import causal_lm as causal_lm
    from lsweep.problem import classifier as classifier
    from lsweep.weights import load_state as load_state

_HOMES = {
    "Problem": ("lsweep.problem", "Problem"),
    "sweep": ("lsweep.inprocess", "sweep"),
    "open": ("lsweep.opening", "open_surface"),
    "measure": ("lsweep.measures", "measure"),
    "render": ("lsweep.pictures", "render"),
    "accuracy": ("lsweep.losses", "accuracy"),
    "classifier": ("lsweep.problem", "classifier"),
    "causal_lm": ("lsweep.problem", "causal_lm"),
    "load_state": ("lsweep.weights", "load_state"),
}
__all__ = [
    "Problem",
    "accuracy",
    "causal_lm",
    "classifier",
    "load_state",
    "measure",
    "open",
    "render",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lsweep' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
