"""Child runs: for each measure at the centre the sweep that computes it, beside its parent.

A child is a run like any other, in RUN/measures/NAME/: points at the parent's trained weights, on
the parent's data, with one of its axes counting replicates, so that more of them later are one more
round. What it asks follows from the parent's plan and this table alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from decimal import Decimal

from lsweep.errors import LsweepError, nearest
from lsweep.plans.pointwise import POINTWISE
from lsweep.plans.recipes import AXES, Axis, Recipe
from lsweep.plans.settings import Evaluation, Settings

REDUCED = ("tf32", "bfloat16", "float16")  # too coarse for derivatives
PARENT = "parent"  # the axis is the parent's own, with another count


@dataclass(frozen=True)
class Along:
    """One axis of a child: its kind, its range, its count; 0 counts the replicates."""

    kind: str
    low: str = "0"
    high: str = ""
    count: int = 0


@dataclass(frozen=True)
class Child:
    """What one measure at the centre asks.

    Attributes:
        name: of the measure and of its folder.
        about: what it computes, in a few words.
        metrics: computed at each point, on the parent's first split; none: all that the parent
            averages over samples, on all its splits.
        axes: x, then y, then z.
        replicates: how many, unless asked otherwise.
        replicate: what they are.
        cost: of a point, about, in passes over the data; a gradient counts 3, a Hessian product 7.
        usual: whether ``all`` means it too.
        split: taken instead of the first where the problem has it.
        beside: the measure that it is asked for with.
        needs: what else the command line must say.
    """

    name: str
    about: str
    metrics: tuple[str, ...]
    axes: tuple[Along, ...]
    replicates: int = 0
    replicate: str = ""
    cost: float = 1.0
    usual: bool = True
    split: str = ""
    beside: str = ""
    needs: str = ""

    def counts(self, replicates: int) -> tuple[int, ...]:
        """Return how many points each axis has; 0 where the network decides."""
        return tuple(0 if a.kind == "layer" else a.count or replicates for a in self.axes)


REPLICATE = Along("replicate")
BETWEEN = Along("to", "0", "1", 25)
CURVATURE = ("hessian_extremes", "filter_hessian_extremes")
TRACES = ("hessian_trace", "filter_hessian_trace", "relative_flatness")
CHILDREN: dict[str, Child] = {
    c.name: c
    for c in (
        Child("sharpness", "the average rise of the loss with the radius", ("loss",),
              (Along("random", "-1", "1", 21), REPLICATE), 10, "directions"),
        Child("curvature", "the rise so near that only curvature counts", ("loss",),
              (Along("random", "-0.005", "0.005", 3), REPLICATE), 20, "directions"),
        Child("layers", "the rise of the loss when one layer moves", ("loss",),
              (Along("random", "-0.5", "0.5", 3), REPLICATE, Along("layer")), 5, "directions"),
        Child("jacobian", "how far outputs follow inputs", ("input_jacobian",),
              (Along("replicate", count=2),),  # the fewest of a line; probes are averaged over both
              cost=30.0, split="test"),
        Child("trace", "the mean curvature, by random probes", TRACES, (REPLICATE,),
              30, "probes", 40.0),
        Child("hessian", "the largest and the least curvature", CURVATURE, (REPLICATE,),
              2, "start vectors", 1000.0),
        Child("worst", "the highest loss within a radius", ("worst_case",),
              (Along("radius", "0.005", "0.02", 4), REPLICATE), 2, "start vectors", 170.0),
        Child("spectrum", "the density of the Hessian's eigenvalues", ("spectrum",), (REPLICATE,),
              10, "start vectors", 700.0),
        Child("keskar", "the highest loss in Keskar's box", ("keskar",), (REPLICATE,),
              2, "start vectors", 200.0, usual=False),
        Child("convexity", "|λmin/λmax| over the parent's plane", ("hessian_extremes",),
              (Along(PARENT, count=11), Along(PARENT, count=11)), 0, "", 500.0, usual=False),
        Child("barrier", "the rise on the way to another network", (), (BETWEEN,),
              usual=False, needs="--to CHECKPOINT"),
        Child("barrier-aligned", "the same, its hidden units in this one's order", (), (BETWEEN,),
              usual=False, beside="barrier", needs="--to CHECKPOINT"),
    )
}  # fmt: skip


def chosen(names: str) -> list[Child]:
    """Return the children that ``--measures`` names, in the order of the table: the cheap first.

    Raises:
        LsweepError: there is no such measure.

    >>> [c.name for c in chosen("trace,sharpness")]
    ['sharpness', 'trace']
    >>> chosen("sharpnes")
    Traceback (most recent call last):
    lsweep.errors.LsweepError: --measures: no measure 'sharpnes'; did you mean 'sharpness'?
    """
    wanted = [n.strip() for n in names.split(",") if n.strip()]
    if not wanted:
        raise LsweepError(f"--measures: name at least one, or all; one of: {', '.join(CHILDREN)}")
    for name in wanted:
        if name != "all" and name not in CHILDREN:
            raise LsweepError(f"--measures: no measure {name!r}{nearest(name, ['all', *CHILDREN])}")
    every = "all" in wanted
    return [c for c in CHILDREN.values() if {c.name, c.beside} & set(wanted) or (every and c.usual)]


def settings_for(
    child: Child,
    parent: Settings,
    replicates: int = 0,
    samples: int | None = None,
    checkpoint: str = "",
    normalized: bool = False,
) -> Settings:
    """Return the sweep that a child is.

    Args:
        child: one of `CHILDREN`.
        parent: the parent's settings, from its plan.
        replicates: how many; 0 for the child's own number.
        samples: of each split; None for as many as the parent takes.
        checkpoint: of the other network, where there is one.
        normalized: whether the network has batch norm.

    Raises:
        LsweepError: one replicate, which would have no error.

    >>> from lsweep.plans.settings import ProblemSource
    >>> parent = Settings(ProblemSource("p.py:make"), {"x": Axis((Decimal(-1), Decimal(1)), 51)})
    >>> child = settings_for(CHILDREN["sharpness"], parent, replicates=4)
    >>> {n: (d.kind, child.grid[n].count) for n, d in child.directions.items()}
    {'x': ('random', 21), 'y': ('replicate', 4)}
    """
    grid: dict[str, Axis] = {}
    recipes: dict[str, Recipe] = {}
    like = random_recipe(parent)
    count = replicates or child.replicates
    if child.replicates and count < 2:
        raise LsweepError(f"--replicates {count}: at least 2, or there is no error to tell")
    for name, along in zip(AXES, child.axes, strict=False):
        if along.kind == PARENT and name not in parent.grid:
            continue
        if along.kind == PARENT:
            grid[name] = _coarser(parent.grid[name], along.count)
            recipes[name] = parent.directions[name]
        elif along.kind == "layer":
            grid[name] = Axis("auto", 2)
            recipes[name] = _still(like, "layer")
        elif along.kind == "replicate":
            points = along.count or count
            grid[name] = Axis((Decimal(0), Decimal(points - 1)), points)
            recipes[name] = _still(like, "replicate")
        else:
            grid[name] = Axis((Decimal(along.low), Decimal(along.high)), along.count)
            if along.kind == "to":
                recipes[name] = Recipe("to", checkpoint=checkpoint)
            else:
                recipes[name] = like if along.kind == "random" else _still(like, along.kind)
    evaluate = _evaluation(child, parent.evaluate, samples)
    if checkpoint and normalized:  # statistics halfway between two networks are of neither
        evaluate = dataclasses.replace(evaluate, batch_norm="recalibrate", slices=1)
    return Settings(parent.problem, grid, recipes, evaluate)


def _coarser(axis: Axis, count: int) -> Axis:
    return dataclasses.replace(axis, count=min(axis.count, count))


def random_recipe(parent: Settings) -> Recipe:
    """Return how the parent's random directions are made; by default where it has none."""
    found = [r for r in parent.directions.values() if r.kind == "random"]
    recipe = found[0] if found else Recipe(seed=parent.directions["x"].seed, gauge=parent.gauge)
    return dataclasses.replace(recipe, orthogonalize=False)


def _still(like: Recipe, kind: str) -> Recipe:
    """An axis that moves nothing, but holds the same parameters still."""
    return Recipe(kind, like.seed, ignore=like.ignore, parameters=like.parameters, gauge=like.gauge)


def _evaluation(child: Child, parent: Evaluation, samples: int | None) -> Evaluation:
    if not child.metrics:
        metrics = tuple(m for m in parent.metrics if m not in POINTWISE) or ("loss",)
        kept = parent.samples if samples is None else samples
        return dataclasses.replace(parent, metrics=metrics, samples=kept, expected={})
    derived = child.metrics != ("loss",)
    precision = "float32" if derived and parent.precision in REDUCED else parent.precision
    return dataclasses.replace(
        parent,
        metrics=child.metrics,
        splits=(child.split if child.split in parent.splits else parent.splits[0],),
        precision=precision,
        # Recalibrated statistics hide how they follow the weights; every row says its mode.
        batch_norm="eval" if derived and parent.batch_norm == "recalibrate" else parent.batch_norm,
        samples=parent.samples if samples is None else samples,
        slices=1 if derived else parent.slices,  # a curvature is not a mean over slices
        expected={},
        backend="auto" if derived else parent.backend,
    )
