"""lsweep's side of a comparison: a planned run's evaluator, ready as a worker makes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lsweep
from lsweep.backends.catalogue import KINDS
from lsweep.backends.packed import Spot
from lsweep.evaluating.evaluate import Evaluator
from lsweep.evaluating.preflight import preflight
from lsweep.plans.settings import Settings
from lsweep.preparing.planning import plan_run
from lsweep.preparing.restoring import load_problem
from lsweep.storage.folder import RunFolder
from lsweep.storage.sums import means

COUNT = 1001  # so long a sweep that every backend is worth a trial
PATIENCE = 30.0  # seconds of building, beyond which a backend is not timed by name


@dataclass(frozen=True)
class Ours:
    """An evaluator that is ready to work.

    Args:
        evaluator: its backend chosen.
        backend: which one it is.
        precision: in which it computes: the one asked for, or float32 where that is faster.
        unit: how many points a worker evaluates at once.
    """

    evaluator: Evaluator
    backend: str
    precision: str
    unit: int

    @property
    def by_name(self) -> list[str]:
        """The backends that are quick to build and may be worth it for this problem."""
        ground = self.evaluator.ground
        return [
            name
            for name, kind in KINDS.items()
            if kind.set_up < PATIENCE
            and kind.worth(ground)
            and any(kind.why_not(ground.at(p)) is None for p in ground.precisions)
        ]

    @property
    def batch(self) -> int:
        """The batch size."""
        return self.evaluator.batch_sizes["train"]

    def losses(self, points: Sequence[tuple[float, float]], at_once: int) -> list[float]:
        """Return the mean loss at each point, from the sums that a worker commits."""
        out: list[float] = []
        for start in range(0, len(points), at_once):
            spots = [Spot(p) for p in points[start : start + at_once]]
            out += means(self.evaluator.evaluate(spots))[:, 0].tolist()
        return out


@contextlib.contextmanager
def ready(
    problem: lsweep.Problem, root: Path, device: torch.device, **evaluate: Any
) -> Iterator[Ours]:
    """Plan a run and make its evaluator ready as the first worker of a device class does.

    Raises:
        LsweepError: the backend asked for does not support the problem.
    """
    folder = RunFolder(root)
    axis = {"range": [-1, 1], "count": COUNT}
    table = {
        "problem": {"factory": "live:problem"},
        "grid": {"x": axis, "y": axis},
        "evaluate": evaluate,
    }
    planned = plan_run(Settings.from_table(table, "benchmarks"), problem, Path.cwd(), folder)
    problem, directions = load_problem(folder, planned.plan, problem)
    with Evaluator(problem, planned.plan.evaluate, directions, device) as evaluator:
        corners = [Spot((-1.0, -1.0)), Spot((1.0, 1.0))]
        known = preflight(
            folder, planned.plan, evaluator, {}, "benchmark", corners, planned.rounds.total
        )
        evaluator.use(known["backend"], known["batch_sizes"], known["precision"])
        yield Ours(evaluator, known["backend"], known["precision"], planned.rounds.last.unit_points)
