"""Comparing: which statistics several networks allow, from their measures to one frozen answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lsweep.comparison.regularizer import Response, key_of
from lsweep.comparison.regularizer import table as responses
from lsweep.comparison.relate import (
    FEWEST,
    PERMUTATIONS,
    Permuted,
    Relation,
    Tau,
    axis_pairs,
    matched,
    relate,
    relate_partially,
    strata_of,
)
from lsweep.comparison.siblings import GAPS, Network, RunMeasures, hyperparameters, networks, unlike
from lsweep.errors import LsweepError, nearest
from lsweep.outcomes.measured import Measured

FloatArray = npt.NDArray[np.float64]
JACOBIAN = "input_jacobian"
PROFILES = ("layer_sharpness",)  # a number for each layer: no measure of a network
PARTS = ("test_loss", "test_accuracy")  # of the gap itself
TOLERANCE = 0.1


@dataclass(frozen=True)
class Question:
    """What is asked of several runs.

    Attributes:
        gap: ``error``, ``loss``, or "" for the error where both splits have an accuracy.
        tolerance: losses are matched within this share of the lowest among them.
        regularizer: the hyper-parameter of the regulariser's table; "" for one of the usual names.
        permutations: of the gap, for each null.
        seed: of the permutations.
    """

    gap: str = ""
    tolerance: float = TOLERANCE
    regularizer: str = ""
    permutations: int = PERMUTATIONS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gap and self.gap not in GAPS:
            raise LsweepError(f"--gap {self.gap}{nearest(self.gap, GAPS)}")
        if not 0 <= self.tolerance <= 10:
            raise LsweepError(f"--match {self.tolerance:g}: a share from 0 to 10, such as 0.1")
        if not 100 <= self.permutations <= 10**6:
            raise LsweepError(f"--permutations {self.permutations}: from 100 to 1000000")


@dataclass(frozen=True)
class Related:
    """Relations to the gap over some of the networks.

    Attributes:
        members: names of the networks.
        relations: measure -> its relation.
        too_few: measure -> how many networks had it, below the least number.
    """

    members: tuple[str, ...]
    relations: Mapping[str, Relation] = field(default_factory=dict)
    too_few: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What several runs say together.

    Attributes:
        runs: as given.
        networks: planes averaged.
        question: what was asked.
        gap: ``error`` or ``loss``; "" where neither is known.
        axes: hyper-parameters.
        held: seeds of trainings.
        unlike: fields in which the plans differ though they are compared.
        all: over all networks that have the gap.
        matched: over those of about equal training loss.
        losses: (lowest, highest) training loss of the matched ones.
        partial: control -> measure -> partial τ with the control held.
        regularizer: the key of the table; "" where there is none.
        responses: the table.
        whole: people are told every measure, not one of each family.
    """

    runs: tuple[RunMeasures, ...]
    networks: tuple[Network, ...]
    question: Question
    gap: str
    axes: tuple[str, ...]
    held: tuple[str, ...]
    unlike: tuple[str, ...]
    all: Related
    matched: Related
    losses: tuple[float, float]
    partial: Mapping[str, Mapping[str, Tau]]
    regularizer: str
    responses: tuple[Response, ...]
    whole: bool = False

    def values(self, name: str) -> FloatArray:
        """Return a measure of every network, (n,), NaN where it has none."""
        return _values(self.networks, name)

    @property
    def shown(self) -> frozenset[str]:
        """Names that people are told: of each family, such as a curve in the radius, its middle."""
        names = dict.fromkeys(name for n in self.networks for name in n.measures)
        if self.whole:
            return frozenset(names)
        families: dict[str, list[str]] = {}
        for name in names:
            families.setdefault(name.partition("@")[0], []).append(name)
        return frozenset(members[len(members) // 2] for members in families.values())


def compare(
    runs: Sequence[RunMeasures],
    question: Question | None = None,
    only: Collection[str] | None = None,
) -> Comparison:
    """Return all that several runs say together.

    Args:
        runs: whole, for gap and training loss are among their rows.
        question: what is asked; None for the usual.
        only: names of measures that are compared; None for all.

    Raises:
        LsweepError: the regulariser that is asked for is no hyper-parameter that varies.
    """
    asked = question or Question()
    found = networks(runs)
    axes, held = hyperparameters(found)
    key = asked.regularizer or key_of(axes) or ""
    if key and key not in axes:
        raise LsweepError(
            f"--regularizer {key}: no such hyper-parameter varies here{nearest(key, axes)}"
        )
    strengths = [n.options.get(key) for n in found]
    if key and not all(isinstance(s, int | float) and s >= 0 for s in strengths):
        raise LsweepError(f"the regulariser {key} is not a number from 0 in every run")
    gap = asked.gap or _gap_of(found)
    if only is not None:
        found = [
            replace(n, measures={k: v for k, v in n.measures.items() if k in only}) for n in found
        ]
    names = list(dict.fromkeys(name for n in found for name in n.measures))
    known = [n for n in found if gap in n.gaps]
    asked_of = [n for n in names if n not in PARTS and n.partition("@")[0] not in PROFILES]
    same = [known[i] for i in matched(_losses(known), asked.tolerance)]
    losses = [n.train_loss for n in same]
    others = [a for a in (*axes, *held) if a != key]
    columns = {n: _values(found, n) for n in asked_of}
    shapes = {r.name for run in runs for r in run.rows if _along_filters(r)}
    options = [n.options for n in found]
    return Comparison(
        runs=tuple(runs),
        networks=tuple(found),
        question=asked,
        gap=gap,
        axes=tuple(axes),
        held=tuple(held),
        unlike=tuple(unlike(runs)),
        all=_related(known, gap, asked_of, axes, held, asked),
        matched=_related(same, gap, asked_of, axes, held, asked),
        losses=(min(losses), max(losses)) if losses else (math.nan, math.nan),
        partial=_partial(known, gap, asked_of, key, asked),
        regularizer=key,
        responses=tuple(responses(columns, options, key, others, shapes) if key else ()),
        whole=only is not None and set(only) < {r.name for run in runs for r in run.rows},
    )


def _along_filters(row: Measured) -> bool:
    """Return whether a number was measured along filter-normalised directions."""
    away = row.context.keys() & {"grid", "radius"}  # not a metric at the trained weights
    along = row.context.get("normalize") == "filter" and bool(away) and row.name != "minimum"
    return along or row.family.startswith("worst_filter")


def _values(found: Sequence[Network], name: str) -> FloatArray:
    return np.array([n.measures[name].mean if name in n.measures else math.nan for n in found])


def _losses(found: Sequence[Network]) -> FloatArray:
    return np.array([n.train_loss for n in found], dtype=np.float64)


def _gap_of(found: Sequence[Network]) -> str:
    """Return the gap that most networks have, the error before the loss."""
    counts = {gap: sum(gap in n.gaps for n in found) for gap in GAPS}
    best = max(counts, key=lambda gap: counts[gap])
    return best if counts[best] else ""


def _related(
    found: Sequence[Network],
    gap: str,
    names: Sequence[str],
    axes: Sequence[str],
    held: Sequence[str],
    asked: Question,
) -> Related:
    members = tuple(n.name for n in found)
    if len(found) < FEWEST:
        return Related(members)
    relations, too_few = {}, {}
    prepared: dict[tuple[int, ...], tuple[Permuted, dict[str, FloatArray]]] = {}
    for name in names:
        a = _values(found, name)
        have = np.flatnonzero(np.isfinite(a))
        if len(have) < FEWEST:
            too_few[name] = len(have)
            continue
        which = tuple(have.tolist())
        if which not in prepared:
            some = [found[i] for i in which]
            b = np.array([n.gaps[gap][0] for n in some])
            permuted = Permuted.of(b, asked.permutations, asked.seed)
            prepared[which] = permuted, axis_pairs([n.options for n in some], axes, held)
        relations[name] = relate(a[have], *prepared[which])
    return Related(members, relations, too_few)


def _partial(
    found: Sequence[Network], gap: str, names: Sequence[str], key: str, asked: Question
) -> dict[str, dict[str, Tau]]:
    controls: dict[str, FloatArray] = {}
    if key:
        controls[key] = np.array([float(n.options[key]) for n in found])
    controls |= {n: _values(found, n) for n in names if n.partition("@")[0].endswith(JACOBIAN)}
    out: dict[str, dict[str, Tau]] = {}
    gaps = np.array([n.gaps[gap][0] for n in found])
    for control, z in controls.items():
        prepared: dict[bytes, Permuted] = {}
        for name in names:
            a = _values(found, name)
            have = np.isfinite(a) & np.isfinite(z)
            if name == control or have.sum() < FEWEST:
                continue
            which, among = have.tobytes(), strata_of(z[have])
            if which not in prepared:
                prepared[which] = Permuted.of(gaps[have], asked.permutations, asked.seed, among)
            tau = relate_partially(a[have], z[have], prepared[which])
            out.setdefault(control, {})[name] = tau
    return out
