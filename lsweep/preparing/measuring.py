"""Measuring: the child runs of a run, planned beside it from what its own plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError, PlanChanged
from lsweep.plans.children import PARENT, Child, settings_for
from lsweep.plans.plan import LIVE, Plan
from lsweep.plans.pointwise import POINTWISE
from lsweep.plans.settings import Settings
from lsweep.preparing.derived import read_derived
from lsweep.preparing.planning import Planned, plan_run
from lsweep.preparing.restoring import base_of, load_problem, settings_of
from lsweep.problems import batchnorm
from lsweep.problems.factory import factory_file
from lsweep.problems.problem import Problem
from lsweep.problems.weights import State
from lsweep.refinement.asking import published
from lsweep.storage.folder import RunFolder

LIVE_PARENT = (
    "was made from a live model, which no command can load: make its problem with "
    "lsweep.Problem.from_factory, and its measures can be computed"
)


@dataclass(frozen=True)
class Parent:
    """A planned run with its problem, from which children are planned.

    Attributes:
        folder: the run.
        settings: that make its plan again.
        problem: with all its data.
        base: the folder that relative paths refer to.
        code: the run's copy of its factory's file; None for an importable module.
        plan: what it holds.
    """

    folder: RunFolder
    settings: Settings
    problem: Problem
    base: Path
    code: Path | None
    plan: Plan

    @classmethod
    def of(cls, folder: RunFolder, problem: Problem | None = None, trust: bool = False) -> Parent:
        """Make the problem of a run from its own copy of the factory, and check that it is.

        Args:
            folder: a planned run.
            problem: with which it was just planned, so that it need not be made twice.
            trust: import a factory that belongs to another user.

        Raises:
            LsweepError: the run was made from a live model, or its factory fails.
            PlanChanged: weights, data or code are not those that were planned.
        """
        plan = Plan.read(folder)
        if plan.problem["factory"] == LIVE:
            raise LsweepError(f"{folder.root} {LIVE_PARENT}")
        settings = settings_of(folder, plan)
        source = factory_file(settings.problem, folder.root)
        code = folder.factory(source.name) if source else None
        if problem is None:
            problem, _ = load_problem(folder, plan, trust=trust)
            whole = {name: split.whole or split for name, split in problem.splits.items()}
            problem = dataclasses.replace(problem, data=whole)  # a child may take other samples
        return cls(folder, settings, problem, base_of(folder), code, plan)

    def plan_child(
        self,
        child: Child,
        replicates: int = 0,
        samples: int | None = None,
        to: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> Planned:
        """Freeze a child's plan and ask for its points; more replicates are one more round.

        Args:
            child: which.
            replicates: how many; 0 for as many as it has, or its usual number.
            samples: of the split; None for as many as it has, or as the parent takes.
            to: the checkpoint of another network; None for the one that it has.
            say: what is told of an alignment goes here.

        Raises:
            LsweepError: the parent has not the axes for it, or the child exists with another plan.
        """
        folder = self.folder.child(child.name)
        had = _asked(folder)
        if had is not None:
            replicates = replicates or had.replicates
            samples = had.samples if samples is None else samples
        checkpoint = ""
        if child.needs:
            checkpoint = had.checkpoint if had and to is None else self._other(child, to, say)
        normalized = bool(batchnorm.layers(self.problem.model))
        settings = settings_for(child, self.settings, replicates, samples, checkpoint, normalized)
        try:
            known, stored = self._shared(child, settings)
            return plan_run(
                settings, self.problem, self.base, folder,
                code=self.code, known=known, stored=stored,
            )  # fmt: skip
        except PlanChanged as e:
            what = "other data or samples" if e.field[:4] == "data" else f"another {e.field}"
            raise PlanChanged(
                f"{folder.root} was made with {what}: remove that folder to measure "
                "anew, or leave the option out",
                e.field,
            ) from None

    def _shared(
        self, child: Child, settings: Settings
    ) -> tuple[dict[str, Any], dict[str, State] | None]:
        """Return the facts and the derived directions that a child takes over from this run.

        On the parent's own axes a child moves along the parent's own vectors: an eigenvector of
        other samples would be another plane.
        """
        facts = self.plan.facts
        gauge = {"gauge": facts.get("gauge")}
        if all(along.kind != PARENT for along in child.axes):
            return gauge, None
        axes = {a: facts["axes"][a] for a in settings.directions}
        derived = read_derived(self.folder, self.plan)
        return {**gauge, "axes": axes}, {a: t for a, t in derived.items() if a in axes}

    def _other(self, child: Child, to: Path | None, say: Callable[[str], None]) -> str:
        """Return the checkpoint at the other end, aligned where the child wants it so."""
        if to is None:
            raise LsweepError(f"--measures {child.name} needs {child.needs}, the other network's")
        if not child.beside:
            return self._from_base(to)
        from lsweep.invariance.aligning import aligned_checkpoint

        metrics = [m for m in self.settings.evaluate.metrics if m not in POINTWISE] or ["loss"]
        found = aligned_checkpoint(self.folder, self.problem, to, metrics[0])
        for line in found.said:
            say(f"{child.name}: {line}")
        return self._from_base(found.path)

    def _from_base(self, path: Path) -> str:
        """Return a path as the run's own checkpoints are written: below its base, or absolute."""
        whole, base = path.absolute(), self.base.absolute()
        return str(whole.relative_to(base) if whole.is_relative_to(base) else whole)


@dataclass(frozen=True)
class _Asked:
    """What an earlier command asked of a child."""

    replicates: int
    samples: int | None
    checkpoint: str


def _asked(folder: RunFolder) -> _Asked | None:
    if not folder.exists:
        return None
    plan = Plan.read(folder)
    rounds = published(folder, plan)
    grid = rounds.last.grid if rounds else {}
    counts = [grid[a][2] for a in grid if plan.directions[a]["kind"] == "replicate"]
    checkpoint = str(next(iter(plan.directions.values())).get("checkpoint") or "")
    return _Asked(counts[0] if counts else 0, plan.evaluate["samples"], checkpoint)


def passes(child: Child, planned: Planned) -> float:
    """Return what a child costs, about, in passes over the data.

    A pass is what one evaluation of the loss takes; a gradient counts as three, a Hessian-vector
    product as seven.
    """
    return planned.rounds.total * child.cost


def cost_lines(found: Sequence[tuple[Child, Planned]]) -> list[str]:
    """Return for each planned child what it costs, and their sum."""
    out = [
        f"{child.name:<10} {planned.rounds.total:5} points, about {passes(child, planned):6.0f} "
        f"passes over the data: {child.about}"
        for child, planned in found
    ]
    total = sum(passes(*pair) for pair in found)
    return [*out, f"{'together':<10} {'':5}         about {total:6.0f}"] if len(out) > 1 else out
