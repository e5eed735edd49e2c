"""What the user asks for: sweep.toml and the keywords of sweep() as frozen, validated values."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError, nearest
from lsweep.plans.origins import Study
from lsweep.plans.pointwise import POINTWISE, expanded
from lsweep.plans.recipes import (
    AXES,
    EIGENVECTORS,
    LARGEST_GRID,
    Axis,
    Recipe,
    check_range,
    check_together,
)
from lsweep.storage.tables import build, one_of, override_key, parse_toml, plain

BATCH_NORMS = ("eval", "batch", "recalibrate")
DERIVED = ("se", "diff_se", "error", "abs_error")  # what the surface keeps beside a variable
PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
BACKENDS = (
    "auto", "eager", "channels_last", "fused", "native", "vmap", "cudagraph", "compiled"
)  # fmt: skip
LEAST_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ProblemSource:
    """Where the problem comes from: ``FILE.py:function`` or ``package.module:function``."""

    factory: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^:\x00-\x1f]+:[A-Za-z_]\w*", self.factory):
            raise LsweepError(
                f"factory = {self.factory!r}: write FILE.py:function or package.module:function"
            )
        for name, value in self.options.items():
            try:
                json.dumps(plain(value), allow_nan=False)
            except (TypeError, ValueError):
                raise LsweepError(
                    f"options.{name} = {value!r}: a plan holds finite numbers, strings, true and "
                    "false, lists and tables"
                ) from None


@dataclass(frozen=True)
class Evaluation:
    """What is computed at a point, and how.

    >>> Evaluation(("accuracy", "loss")).metrics
    ('loss', 'accuracy')
    """

    metrics: tuple[str, ...] = ("loss",)
    splits: tuple[str, ...] = ("train",)
    batch_norm: str = "eval"
    precision: str = "float32"
    samples: int | str | None = None
    slices: int = 1
    expected: dict[str, float] = field(default_factory=dict)
    backend: str = "auto"
    batch_size: int | str = "auto"

    def __post_init__(self) -> None:
        one_of("batch_norm", self.batch_norm, BATCH_NORMS)
        one_of("precision", self.precision, PRECISIONS)
        one_of("backend", self.backend, BACKENDS)
        for what in ("metrics", "splits"):
            names = getattr(self, what)
            if not names or len(set(names)) != len(names):
                raise LsweepError(f"{what} = {list(names)}: give at least one, each once")
            for name in names:
                if not re.fullmatch(r"[A-Za-z]\w*", name):
                    raise LsweepError(f"{what}: {name!r} must be letters, digits and _")
        variables = {f"{s}_{m}" for s in self.splits for m in self.metrics}
        derived = {f"{v}_{end}" for v in variables for end in DERIVED} | {"weight_sq", "status"}
        for name in sorted(variables & derived):
            raise LsweepError(
                f"metrics: {name} is what the surface calls something else: rename it"
            )
        # Whatever looks at one metric, be it check or picture, takes the first: the loss.
        loss_first = tuple(sorted(self.metrics, key=lambda name: name != "loss"))
        object.__setattr__(self, "metrics", loss_first)
        self._check_pointwise()
        for name, value in self.expected.items():
            if not math.isfinite(value):
                raise LsweepError(f"expected.{name} = {value}: must be finite")
        if self.samples is not None:
            if isinstance(self.samples, str):
                raise LsweepError(
                    f'samples = "{self.samples}": write a number. The same samples serve every '
                    "point; fresh ones at each point are refused, for their noise draws minima "
                    "that are not there (36-50 on a surface that has 1, with 64 samples)"
                )
            if self.samples < 2:
                raise LsweepError(
                    f"samples = {self.samples}: must be at least 2, or there is no standard error"
                )
        if not 1 <= self.slices <= 10**6:
            raise LsweepError(f"slices = {self.slices}: must be between 1 and 1000000")
        if self.slices > 1 and self.batch_norm != "eval":
            raise LsweepError(
                f'batch_norm = "{self.batch_norm}" cannot be sliced: its statistics need whole '
                "batches; use slices = 1"
            )
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise LsweepError(f'batch_size = {self.batch_size!r}: a number or "auto"')
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise LsweepError(f"batch_size = {self.batch_size}: must be at least 1")

    def _check_pointwise(self) -> None:
        """Refuse what derivatives cannot be taken with."""
        variables = expanded(self.metrics)
        if len(set(variables)) < len(variables):
            raise LsweepError(f"metrics = {list(self.metrics)}: two compute the same variable")
        for metric in self.metrics:
            if metric not in POINTWISE:
                continue
            what = f"metric {metric!r} takes derivatives over all the data"
            if self.precision not in ("float32", "float64"):
                raise LsweepError(
                    f'{what}: precision = "{self.precision}" is too coarse for them; use float32 '
                    "or float64"
                )
            if self.slices > 1:
                raise LsweepError(f"{what}: it cannot be put together from slices; use slices = 1")
            if self.batch_norm == "recalibrate":
                raise LsweepError(
                    f'{what}: batch_norm = "recalibrate" hides how statistics follow the weights; '
                    'use "eval" or "batch"'
                )


@dataclass(frozen=True)
class Refinement:
    """Adaptive resolution: points are asked where the picture needs them, the rest interpolated.

    ``tolerance`` bounds the estimated error, as a share of the range of the loss on its log scale.
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not LEAST_TOLERANCE <= self.tolerance < 1:
            raise LsweepError(
                f"tolerance = {self.tolerance:g}: a share of the loss's range on its log scale, "
                f"from {LEAST_TOLERANCE:g} to below 1, such as 0.01; for no error at all leave "
                "[refine] out"
            )


@dataclass(frozen=True)
class Track:
    """Checkpoints to draw on the plane, with their true values."""

    checkpoints: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise LsweepError('checkpoints = []: give at least one, such as ["epoch*.pt"]')


@dataclass(frozen=True)
class Settings:
    """One sweep as asked for.

    >>> s = Settings.from_text('''
    ... [problem]
    ... factory = "problem.py:make"
    ... [grid.x]
    ... range = [-1.0, 1.0]
    ... count = 51
    ... ''')
    >>> s.grid["x"].count, s.directions["x"].normalize
    (51, 'filter')
    """

    problem: ProblemSource
    grid: dict[str, Axis]
    directions: dict[str, Recipe] = field(default_factory=dict)
    evaluate: Evaluation = field(default_factory=Evaluation)
    refine: Refinement | None = None
    trajectory: Track | None = None
    study: Study | None = None

    def __post_init__(self) -> None:
        if list(self.grid) not in (["x"], ["x", "y"], ["x", "y", "z"]):
            raise LsweepError(f"grid has axes {sorted(self.grid)}: write [grid.x], then y, then z")
        points = 1
        for axis in self.grid.values():
            points *= axis.count
        if points > LARGEST_GRID:
            raise LsweepError(f"the grid has {points} points: at most {LARGEST_GRID}")
        for name in self.directions:
            if name not in self.grid:
                raise LsweepError(
                    f"[directions.{name}] has no [grid.{name}]{nearest(name, self.grid)}"
                )
        recipes = {n: self.directions.get(n, Recipe()) for n in self.grid}
        for name, recipe in recipes.items():
            if recipe.kind == "hessian" and recipe.eigenvector is None:
                recipes[name] = dataclasses.replace(recipe, eigenvector=EIGENVECTORS[name])
        object.__setattr__(self, "directions", recipes)
        gauges = list(dict.fromkeys(r.gauge for r in recipes.values()))
        if len(gauges) > 1:
            raise LsweepError(
                f"gauge is {' and '.join(gauges)}: all axes start from one origin, so write it "
                "once under [directions]"
            )
        if gauges != ["none"] and self.trajectory is not None:
            raise LsweepError(
                f'gauge = "{gauges[0]}" with [trajectory]: it rescales the origin and not the '
                "checkpoints, which would be drawn elsewhere; leave one of them out"
            )
        for name, axis in self.grid.items():
            check_range(name, axis, recipes[name].kind)
        check_together(recipes, self.refine is not None)
        _check_metrics(self.evaluate.metrics, recipes, self.refine)
        seeded = self.study is not None and self.study.seeds
        if seeded and all(r.kind != "random" for r in recipes.values()):
            raise LsweepError("[study] seeds = …: no direction here is random; leave them out")

    @property
    def gauge(self) -> str:
        """What is done to the origin before directions are made: ``none`` or ``equi``."""
        return next(iter(self.directions.values())).gauge

    @classmethod
    def from_text(cls, text: str, where: str = "sweep.toml") -> Settings:
        """Read TOML.

        Raises:
            LsweepError: it is not TOML, or a key or a value is wrong; the message names it.
        """
        return cls.from_table(parse_toml(text, where), where)

    @classmethod
    def from_file(cls, path: Path, overrides: tuple[str, ...] = ()) -> Settings:
        """Read a `sweep.toml`, with ``KEY=VALUE`` overrides such as ``grid.x.count=11``."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
            raise LsweepError(f"cannot read {path}: {reason}") from None
        table = parse_toml(text, path.name)
        for override in overrides:
            override_key(table, override)
        return cls.from_table(table, path.name)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str = "sweep.toml") -> Settings:
        """Validate nested tables, where ``[directions]`` may hold ``[directions.x]``."""
        top = dict(table)
        directions = top.pop("directions", {})
        if not isinstance(directions, Mapping):
            raise LsweepError(f"{where}: directions must be a table")
        shared = {k: v for k, v in directions.items() if k not in AXES}
        for key in shared:
            valid = [f.name for f in dataclasses.fields(Recipe)]
            if key not in valid:
                raise LsweepError(f"{where}: directions: unknown key {key!r}{nearest(key, valid)}")
        grid = top.get("grid", {})
        if not isinstance(grid, Mapping) or not grid:
            raise LsweepError(
                f"{where}: [grid.x] is missing; write range = [-1.0, 1.0], count = 51"
            )
        special = {k: directions[k] for k in AXES if k in directions}
        for name, value in special.items():
            if not isinstance(value, Mapping):
                raise LsweepError(f"{where}: directions.{name} must be a table")
            study = top.get("study")
            if "seed" in value and isinstance(study, Mapping) and study.get("seeds"):
                raise LsweepError(
                    f"{where}: directions.{name}.seed: [study] seeds = … are those of all "
                    "directions; leave it out"
                )
        top["directions"] = {
            n: {**shared, **special.get(n, {})}
            for n in [*grid, *(k for k in special if k not in grid)]
        }
        top["grid"] = {n: grid[n] for n in sorted(grid, key=str)}
        return build(cls, top, where)


def _check_metrics(
    metrics: tuple[str, ...], recipes: Mapping[str, Recipe], refine: Refinement | None
) -> None:
    """Refuse pointwise metrics that the axes do not serve."""
    for metric in metrics:
        if metric in POINTWISE and refine is not None:
            raise LsweepError(
                f"[refine] interpolates means over samples, not metric {metric!r}: leave one out"
            )
        needs_radius = metric in POINTWISE and POINTWISE[metric].radius
        if needs_radius and all(r.kind != "radius" for r in recipes.values()):
            raise LsweepError(
                f'metric {metric!r} needs an axis of radii: [directions.y] kind = "radius"'
            )
