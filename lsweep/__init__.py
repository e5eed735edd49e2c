"""lsweep: a distributed sweep engine for neural-network loss landscapes.

Public names load when they are first used, so that looking at a result never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsweep.errors import LsweepError as LsweepError
    from lsweep.measures.measures import measure as measure
    from lsweep.merging.opening import open_surface as open
    from lsweep.pictures.drawing import render as render
    from lsweep.problems.losses import accuracy as accuracy
    from lsweep.problems.problem import Problem as Problem
    from lsweep.problems.problem import causal_lm as causal_lm
    from lsweep.problems.problem import classifier as classifier
    from lsweep.problems.weights import load_state as load_state
    from lsweep.working.inprocess import sweep as sweep

_HOMES = {
    "LsweepError": ("lsweep.errors", "LsweepError"),
    "Problem": ("lsweep.problems.problem", "Problem"),
    "sweep": ("lsweep.working.inprocess", "sweep"),
    "open": ("lsweep.merging.opening", "open_surface"),
    "measure": ("lsweep.measures.measures", "measure"),
    "render": ("lsweep.pictures.drawing", "render"),
    "accuracy": ("lsweep.problems.losses", "accuracy"),
    "classifier": ("lsweep.problems.problem", "classifier"),
    "causal_lm": ("lsweep.problems.problem", "causal_lm"),
    "load_state": ("lsweep.problems.weights", "load_state"),
}
__all__ = [
    "LsweepError",
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
