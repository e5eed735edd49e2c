"""Siblings: the measures of several runs, brought together network by network, over their planes.

Runs of one network that differ in the seed of their directions are its planes: measures are
averaged over them and the spread is told of those that depend on the plane; the others keep their
own standard error. What else differs between runs is said.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsweep.outcomes.measured import Measured
from lsweep.plans.origins import label

SEEDS = ("seed", "training_seed", "train_seed")
"""Options that repeat a training: held equal in a comparison, never a hyper-parameter."""
ROW_KEYS = ("samples", "batch_norm", "precision")
"""What a child may take otherwise than its parent, so that no parent's plan tells."""
GAPS = {"error": "test error - train error, per cent", "loss": "test loss - train loss"}


@dataclass(frozen=True)
class RunMeasures:
    """One run as a study sees it.

    Attributes:
        name: as given on the command line.
        plan: of the run; empty for a surface that no run made.
        rows: its measures, and its metrics at the trained weights, such as ``test_loss``.
    """

    name: str
    plan: Mapping[str, Any]
    rows: Sequence[Measured]

    @property
    def center(self) -> dict[str, tuple[float, float]]:
        """Name -> (value, standard error over samples or NaN)."""
        return {r.name: (r.value, math.nan if r.se is None else r.se) for r in self.rows}

    @property
    def options(self) -> dict[str, Any]:
        """What the problem was made with."""
        return dict(self.plan.get("problem", {}).get("options", {}))

    @property
    def network(self) -> str:
        """What is equal for all planes of one network."""
        if not self.plan:
            return self.name
        return json.dumps([self.plan["origin"]["sha256"], self.options], sort_keys=True)


@dataclass(frozen=True)
class Spread:
    """A measure of a network, over its planes.

    Attributes:
        mean: over planes.
        sd: standard deviation over planes; None with one, or where it does not depend on the plane.
        planes: how many had it.
        se: its own standard error where ``sd`` is None, the largest of them; or None.
        replicate: of what ``se`` is the error.
        doubtful: on how many planes it did not converge, or lies within its own error.
    """

    mean: float
    sd: float | None
    planes: int
    se: float | None = None
    replicate: str = ""
    doubtful: int = 0

    @property
    def error(self) -> float:
        """What an error bar shows: over planes where it depends on them, else its own; or NaN."""
        if self.sd is not None:
            return self.sd
        return math.nan if self.se is None else self.se


@dataclass(frozen=True)
class Network:
    """One trained network of a study.

    Attributes:
        name: what tells it apart.
        options: what its problem was made with.
        planes: names of its runs.
        train_loss: at the trained weights, NaN where unknown.
        gaps: ``error`` and ``loss`` -> (value, standard error over samples or NaN), where both
            splits are there.
        measures: name -> its value over planes.
    """

    name: str
    options: Mapping[str, Any]
    planes: tuple[str, ...]
    train_loss: float
    gaps: Mapping[str, tuple[float, float]]
    measures: Mapping[str, Spread]


def networks(runs: Sequence[RunMeasures]) -> list[Network]:
    """Return the networks of several runs, in their order.

    >>> rows = [[Measured("a", value)] for value in (1.0, 3.0)]
    >>> planes = [RunMeasures("net.run", {}, r) for r in rows]
    >>> (net,) = networks(planes)
    >>> net.measures["a"].mean, net.measures["a"].planes
    (2.0, 2)
    """
    groups: dict[str, list[RunMeasures]] = {}
    for run in runs:
        groups.setdefault(run.network, []).append(run)
    every = [g[0].options for g in groups.values()]
    varying = varying_options(every)
    axes, held = sort_options(every)
    if len({json.dumps([o.get(k) for k in (*axes, *held)]) for o in every}) == len(every):
        varying = [*axes, *held]  # which checkpoint that is says no more
    each = [{k: o[k] for k in varying if k in o} for o in every]
    names = [label(shown) if shown else "" for shown in each]
    if not all(names) or len(set(names)) < len(names):  # one rule for all: else what was given
        names = [planes[0].name for planes in groups.values()]
    out = []
    for name, planes in zip(names, groups.values(), strict=True):
        first = planes[0]
        out.append(
            Network(
                name,
                first.options,
                tuple(p.name for p in planes),
                first.center.get("train_loss", (math.nan, math.nan))[0],
                dict(_gaps(first.center)),
                {n: _spread(n, planes) for n in _names(planes)},
            )
        )
    return out


def _names(planes: Sequence[RunMeasures]) -> list[str]:
    return list(dict.fromkeys(r.name for p in planes for r in p.rows))


def _spread(name: str, planes: Sequence[RunMeasures]) -> Spread:
    rows = [r for p in planes for r in p.rows if r.name == name]
    values = [r.value for r in rows]
    known = all(map(math.isfinite, values))
    mean = math.fsum(values) / len(values) if known else math.nan
    doubtful = sum(r.doubtful for r in rows)
    if len(rows) > 1 and any(map(depends_on_plane, rows)):
        sd = statistics.stdev(values) if known else None
        return Spread(mean, sd, len(rows), doubtful=doubtful)
    own = max((r for r in rows if r.se is not None), key=lambda r: r.se or 0.0, default=None)
    se, replicate = (own.se, own.replicate) if own else (None, "")
    return Spread(mean, None, len(rows), se, replicate, doubtful)


def depends_on_plane(row: Measured) -> bool:
    """Return whether a number is another one along other random directions.

    >>> depends_on_plane(Measured("basins", 1.0, context={"grid": "51 x 51"}))
    True
    >>> depends_on_plane(Measured("input_jacobian", 1.0, 0.1, "samples"))
    False
    """
    return bool({"grid", "range"} & row.context.keys()) or row.replicate == "directions"


def _gaps(
    center: Mapping[str, tuple[float, float]],
) -> Iterator[tuple[str, tuple[float, float]]]:
    for gap, metric, sign in (("error", "accuracy", -1.0), ("loss", "loss", 1.0)):
        pair = [center.get(f"{split}_{metric}") for split in ("test", "train")]
        if pair[0] is not None and pair[1] is not None:
            (test, a), (train, b) = pair[0], pair[1]
            if math.isfinite(test) and math.isfinite(train):
                yield gap, (sign * (test - train) + 0.0, math.hypot(a, b))  # no -0


def varying_options(options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options that are not the same in all networks, in alphabetical order.

    >>> varying_options([{"a": 1, "b": 2}, {"a": 1, "b": 3}])
    ['b']
    """
    keys = sorted({k for o in options for k in o})
    return [k for k in keys if len({json.dumps(o.get(k)) for o in options}) > 1]


def hyperparameters(found: Sequence[Network]) -> tuple[list[str], list[str]]:
    """Return (hyper-parameters, seeds of trainings) among the options that vary.

    A word that is another one for every network, such as its checkpoint, names it and is neither.

    >>> nets = [Network("", {"checkpoint": c, "wd": w, "seed": s}, (), 0.0, {}, {})
    ...         for c, w, s in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0), ("d", 1, 1))]
    >>> hyperparameters(nets)
    (['wd'], ['seed'])
    """
    return sort_options([n.options for n in found])


def sort_options(options: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return what `hyperparameters` does, of options alone."""
    axes, held = [], []
    for key in varying_options(options):
        values = [o.get(key) for o in options]
        names = all(isinstance(v, str) for v in values) and len(set(values)) == len(values)
        if key in SEEDS:
            held.append(key)
        elif key != "checkpoint" and not names:
            axes.append(key)
    return axes, held


def unlike(runs: Sequence[RunMeasures]) -> list[str]:
    """Return what differs in how runs and their children were measured, though they are compared.

    Expected to differ: the network, its options, the seed of its directions.

    >>> rows = ([Measured("trace", 1.0, context={"samples": n})] for n in (64, 256))
    >>> unlike([RunMeasures(name, {}, r) for name, r in zip("ab", rows, strict=True)])
    ['samples of trace']
    """
    tables = []
    for run in runs:
        if run.plan:
            recipes = {
                f"directions.{axis}.{k}": v
                for axis, recipe in run.plan["directions"].items()
                for k, v in recipe.items()
                if k not in ("seed", "sha256")
            }
            data = {
                f"data.{split}.{k}": v
                for split, d in run.plan["data"].items()
                for k, v in d.items()
            }
            asked = {f"evaluate.{k}": v for k, v in run.plan["evaluate"].items()}
            plane = next((r.context for r in run.rows if "range" in r.context), {})
            grid = {k: plane[k] for k in ("grid", "range") if k in plane}
            tables.append({**recipes, **data, **asked, **grid})
    if len(tables) < len(runs) and tables:
        return ["some have no plan"]
    fields = varying_options(tables)
    return [*fields, *_unlike_rows(runs, {f.rpartition(".")[2] for f in fields})]


def _unlike_rows(runs: Sequence[RunMeasures], known: Collection[str]) -> list[str]:
    """Return what differs in the context of one measure, but for the keys that plans differ in."""
    seen: dict[tuple[str, str], set[Any]] = {}
    for row in (r for run in runs for r in run.rows):
        for key in ROW_KEYS:
            if key in row.context and key not in known:
                seen.setdefault((key, row.family), set()).add(row.context[key])
    out = []
    for key in ROW_KEYS:
        names = [name for (k, name), values in seen.items() if k == key and len(values) > 1]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        out += [f"{key.replace('_', ' ')} of {names[0]}{more}"] if names else []
    return out
