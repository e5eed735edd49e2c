"""Recipes: the axes of a sweep, each with a range, a count and how its direction is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from lsweep.errors import LsweepError
from lsweep.storage.tables import one_of

INDEXES = ("replicate", "layer")  # kinds of axes whose offsets count: 0, 1, 2, …
STILL = (*INDEXES, "radius")  # kinds of axes that move nothing themselves
KINDS = ("random", "to", "plane", "pca", "hessian", "gradient", "file", *STILL)
DERIVED = ("hessian", "gradient")  # computed once, when a run is planned
WEIGHTS_ONLY = ("random", *DERIVED, *STILL)  # ignore biases and norms by default
NORMALIZATIONS = ("filter", "layer", "weight", "none")
GAUGES = ("none", "equi")
CHECKPOINT_KINDS = ("to", "plane", "pca", "file")
AXES = ("x", "y", "z")
EIGENVECTORS = {"x": 1, "y": -1, "z": 2}  # unless asked otherwise
LARGEST_GRID = 10**8  # points; beyond it the index arrays alone outgrow a node
LARGEST_OFFSET = 10**6


@dataclass(frozen=True)
class Axis:
    """A range and a count; bounds are exact decimals, or ``auto`` until a trajectory is read."""

    range: tuple[Decimal, Decimal] | str
    count: int

    def __post_init__(self) -> None:
        if not 2 <= self.count <= LARGEST_GRID:
            raise LsweepError(f"count = {self.count}: must be between 2 and {LARGEST_GRID}")
        if isinstance(self.range, str):
            if self.range != "auto":
                raise LsweepError(f'range = {self.range!r}: write [low, high] or "auto"')
            return
        for bound in self.range:
            size = bound.copy_abs()  # abs() would round, and overflow
            if not bound.is_finite() or size > LARGEST_OFFSET:
                raise LsweepError(f"range bound {bound}: must be within ±{LARGEST_OFFSET:g}")
            if bound and size < Decimal("1e-12"):
                raise LsweepError(f"range bound {bound}: must be 0 or at least 1e-12 in size")
        shown = f"range = [{self.range[0]}, {self.range[1]}]"
        low, high = self.bounds
        if low >= high:
            raise LsweepError(f"{shown}: the low end must be below the high end")
        if (high - low) / (self.count - 1) < max(-low, high) / 2**50:
            raise LsweepError(
                f"{shown}, count = {self.count}: so close together, offsets are the same float64"
            )

    @property
    def bounds(self) -> tuple[Fraction, Fraction]:
        """Low and high end as exact rationals."""
        assert not isinstance(self.range, str), "an auto range is resolved when the plan is made"
        return Fraction(self.range[0]), Fraction(self.range[1])


@dataclass(frozen=True)
class Recipe:
    """How a direction is made.

    Attributes:
        kind: ``random``; ``to``, ``plane``, ``pca``, ``file``, from checkpoints and files;
            ``hessian``, ``gradient``, from derivatives at the trained weights; or one that moves
            nothing itself: ``replicate`` and ``layer``, whose offsets 0, 1, 2, … say which random
            vector the other axes have and which layer alone moves along them, and ``radius``,
            which is handed to the metrics that need one.
        seed: of all that is random.
        normalize: ``filter``, ``layer``, ``weight``, ``none``; filter for ``random``, else none.
        ignore: ``bias+norm`` or ``none``: what is held still; none for what is read from files.
        orthogonalize: take from the direction what lies along those before it.
        parameters: patterns of the names that may move.
        gauge: ``equi`` rescales the trained weights to the representative that all equivalent
            networks share.
        checkpoint: that ``to`` reaches at offset 1.
        checkpoints: of ``plane`` (two) and ``pca``.
        file: of directions.
        eigenvector: of ``hessian``: 1 the largest, 2 the second, …, -1 the smallest.
    """

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


def check_range(name: str, axis: Axis, kind: str) -> None:
    """Refuse a range that an axis of a kind cannot have.

    Raises:
        LsweepError: with the range that it can have.
    """
    if isinstance(axis.range, str):
        if kind not in ("pca", "layer"):
            raise LsweepError(
                f'grid.{name}.range = "auto" needs directions of kind "pca" or "layer"'
            )
        return
    low, high = axis.bounds
    if kind in INDEXES and (low != 0 or high != axis.count - 1):
        raise LsweepError(
            f"grid.{name}: an axis of kind {kind} counts 0, 1, …: with count = {axis.count} write "
            f"range = [0, {axis.count - 1}]"
        )
    if kind == "radius" and low < 0:
        raise LsweepError(f"grid.{name}.range = [{low}, {high}]: a radius is at least 0")


def check_together(recipes: Mapping[str, Recipe], refined: bool) -> None:
    """Refuse axes that do not go together.

    Args:
        recipes: axis -> recipe.
        refined: whether points are left out to be interpolated.

    Raises:
        LsweepError: naming the axis.
    """
    kinds = [r.kind for r in recipes.values()]
    uphill = [(r.ignore, r.parameters) for r in recipes.values() if r.kind == "gradient"]
    if len(set(uphill)) < len(uphill):
        raise LsweepError(
            'directions: kind = "gradient" for several axes, but there is one gradient: sweep a '
            "line, or give [directions.y] another kind"
        )
    for name, recipe in recipes.items():
        if recipe.kind in STILL and kinds.count(recipe.kind) > 1:
            raise LsweepError(f'directions: kind = "{recipe.kind}" serves one axis, not several')
        if recipe.kind in STILL and refined:
            raise LsweepError(
                f"[refine] interpolates along every axis, but {name} is an axis of kind "
                f"{recipe.kind}: leave [refine] out"
            )
        if recipe.orthogonalize and "replicate" in kinds and recipe.kind == "random":
            raise LsweepError(
                f"directions.{name}: orthogonalize = true does not go with an axis of kind "
                "replicate: random directions are nearly orthogonal anyway; leave it out"
            )
