"""Recipes: how each direction of a sweep is made, as frozen, validated values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lsweep.errors import LsweepError, nearest

INDEXES = ("replicate", "layer")  # kinds of axes whose offsets count: 0, 1, 2, …
STILL = (*INDEXES, "radius")  # kinds of axes that move nothing themselves
KINDS = ("random", "to", "plane", "pca", "hessian", "gradient", "file", *STILL)
DERIVED = ("hessian", "gradient")  # computed once, when a run is planned
WEIGHTS_ONLY = ("random", *DERIVED, *STILL)  # ignore biases and norms by default
NORMALIZATIONS = ("filter", "layer", "weight", "none")
GAUGES = ("none", "equi")
CHECKPOINT_KINDS = ("to", "plane", "pca", "file")
EIGENVECTORS = {"x": 1, "y": -1, "z": 2}  # unless asked otherwise


@dataclass(frozen=True)
class Recipe:
    """How a direction is made; see ``directions.py`` for what each kind means."""

    kind: str = "random"
    seed: int = 0
    normalize: str | None = None
    ignore: str | None = None
    orthogonalize: bool = False
    parameters: tuple[str, ...] = ("*",)
    gauge: str = "none"
    checkpoint: str | None = None
    checkpoints: tuple[str, ...] = ()
    file: str | None = None
    eigenvector: int | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        one_of("gauge", self.gauge, GAUGES)
        if self.gauge != "none" and self.kind in CHECKPOINT_KINDS:
            raise LsweepError(
                f'gauge = "{self.gauge}" with kind = "{self.kind}": it rescales the origin and not '
                "what directions are read from files; leave it out"
            )
        usual = "filter" if self.kind == "random" else "none"
        rule = "none" if self.kind in STILL else self.normalize or usual
        object.__setattr__(self, "normalize", rule)
        still = "bias+norm" if self.kind in WEIGHTS_ONLY else "none"
        object.__setattr__(self, "ignore", self.ignore or still)
        one_of("normalize", self.normalize, NORMALIZATIONS)
        one_of("ignore", self.ignore, ("bias+norm", "none"))
        if not 0 <= self.seed < 2**63:
            raise LsweepError(f"seed = {self.seed}: must be between 0 and 2**63 - 1")
        needs = {"to": "checkpoint", "plane": "checkpoints", "pca": "checkpoints", "file": "file"}
        if self.kind in needs and not getattr(self, needs[self.kind]):
            raise LsweepError(f'kind = "{self.kind}" needs {needs[self.kind]} = …')
        for key in ("checkpoint", "checkpoints", "file"):
            if getattr(self, key) and needs.get(self.kind) != key:
                kinds = [k for k, needed in needs.items() if needed == key]
                raise LsweepError(f'{key} goes with kind = {" or ".join(kinds)}, not "{self.kind}"')
        if self.kind in ("to", "plane") and self.normalize != "none":
            raise LsweepError(
                f'normalize = "{self.normalize}" with kind = "{self.kind}": x = 1 would not be the '
                "checkpoint any more; leave it out"
            )
        if self.kind in DERIVED and self.normalize != "none":
            raise LsweepError(
                f'normalize = "{self.normalize}" with kind = "{self.kind}": it would be another '
                "vector; it has the norm of a filter-normalised random direction as it is: leave "
                "it out"
            )
        if self.eigenvector is not None and self.kind != "hessian":
            raise LsweepError(f'eigenvector goes with kind = "hessian", not "{self.kind}"')
        if self.eigenvector == 0:
            raise LsweepError("eigenvector = 0: 1 is the largest, 2 the second, -1 the smallest")
        if self.kind == "plane" and len(self.checkpoints) != 2:
            raise LsweepError('kind = "plane" needs two checkpoints: the plane through them and θ')
        if not self.parameters:
            raise LsweepError('parameters = []: give at least one pattern, such as ["layer3.*"]')


def one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    """Refuse a value that is none of those a key can have."""
    if value not in valid:
        raise LsweepError(f"{name} = {value!r}{nearest(str(value), valid)}")
