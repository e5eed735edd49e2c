"""`sweep()`: the whole flow from a problem to a surface, in a notebook or a script."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError, nearest
from lsweep.hosts.stopping import Stop
from lsweep.merging.merge import merge
from lsweep.plans.plan import LIVE
from lsweep.plans.recipes import AXES, Recipe
from lsweep.plans.settings import Evaluation, Settings
from lsweep.preparing.planning import plan_run
from lsweep.problems.problem import Problem
from lsweep.runs.display import Display
from lsweep.runs.status import is_complete, share_done
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface
from lsweep.working.launch import run_workers
from lsweep.working.role import Role
from lsweep.working.worker import work

Range = Sequence[Any]


def sweep(
    problem: Problem,
    x: Range,
    y: Range | None = None,
    z: Range | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    workers: int = 1,
    device: str = "auto",
    directions: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    trajectory: Sequence[str] = (),
    refine: float | Mapping[str, Any] | None = None,
    **evaluate: Any,
) -> Surface:
    """Evaluate a problem on a line, a plane or a volume around its trained weights.

    L(x, y) = loss at θ + x·δ + y·η, with δ, η random and filter-normalised unless asked otherwise
    (Li et al., NeurIPS 2018). The model, its mode and all random generators are afterwards as
    they were.

    Args:
        problem: network, data and loss.
        x: ``(low, high, count)``; ``("auto", count)`` spans a PCA trajectory.
        y: the same for the second axis; leave it out for a line.
        z: the same for the third.
        run: a folder that keeps everything, so that the next call resumes; None keeps nothing.
        workers: processes; more than one needs `Problem.from_factory`.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        directions: the ``[directions]`` table, such as ``{"kind": "to", "checkpoint": "b.pt"}``.
        progress: show progress; by default on a terminal only.
        trajectory: checkpoints, or patterns of them, to project on the plane.
        refine: tolerance of adaptive resolution, such as 0.01, or the ``[refine]`` table: points
            are evaluated where the picture needs them, the rest is interpolated. By default every
            point is evaluated.
        evaluate: keys of the ``[evaluate]`` table: ``metrics``, ``splits``, ``batch_norm``, ….
            By default all metrics and all splits.

    Returns:
        The surface; ``surface["train_loss"]`` is float64 of shape (ny, nx).

    Raises:
        LsweepError: something asked for is wrong; with ``run``, nothing computed is lost.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(net.weight, 2.0)
    >>> data = (torch.ones(4, 1), torch.full((4, 1), 2.0))
    >>> s = sweep(Problem(net, {"train": data}, loss=nn.MSELoss()), x=(-1, 1, 3))
    >>> s["train_loss"].round(5)   # one filter of norm 2: θ + x·(±2), the target being 2
    array([4., 0., 4.])
    """
    if not isinstance(problem, Problem):
        raise LsweepError(
            f"problem is {_shown(problem)}: make an lsweep.Problem of network, data and loss, or "
            'lsweep.Problem.from_factory("problem.py:function")'
        )
    for key in evaluate.keys() - {f.name for f in dataclasses.fields(Evaluation)}:
        raise LsweepError(f"sweep() has no argument {key!r}{_where(key)}")
    live = problem.source is None
    if workers > 1 and live:
        raise LsweepError(
            f"workers = {workers} needs a problem that other processes can make: use "
            'lsweep.Problem.from_factory("problem.py:function")'
        )
    evaluate.setdefault("metrics", problem.metric_names)
    evaluate.setdefault("splits", tuple(problem.splits))
    given = {n: r for n, r in zip(AXES, (x, y, z), strict=True) if r is not None}
    table: dict[str, Any] = {
        "problem": {"factory": problem.source.factory if problem.source else LIVE},
        "grid": {name: _axis(name, r) for name, r in given.items()},
        "directions": dict(directions or {}),
        "evaluate": evaluate,
    }
    if trajectory:
        table["trajectory"] = {"checkpoints": list(trajectory)}
    if refine is not None:
        table["refine"] = refine if isinstance(refine, Mapping) else {"tolerance": refine}
    settings = Settings.from_table(table, "sweep()")
    shown = sys.stderr.isatty() if progress is None else progress
    with contextlib.ExitStack() as stack:
        root = Path(run) if run else Path(stack.enter_context(tempfile.TemporaryDirectory()), "run")
        folder = RunFolder(root)
        plan = plan_run(settings, problem, Path.cwd(), folder, anew=True).plan.digest
        done, total = share_done(folder)
        with Display(folder, total, done, sys.stderr if shown else None) as display:
            if workers > 1:
                with Stop() as stop:
                    role = Role(device=device, beat=1.0)
                    outcome = run_workers(folder, role, workers, stop, on_event=display.say)
                if outcome.interrupted:
                    raise KeyboardInterrupt
                if outcome.code and not is_complete(folder):
                    raise LsweepError(outcome.events[-1])
            else:
                role = Role(device=device, threads=0, beat=1.0, plan=plan)
                work(folder, role, problem, as_it_is=True)
        surface, _ = merge(folder)
        if run:
            surface.save(folder.surface)
        return surface


def _axis(name: str, given: Range) -> dict[str, Any]:
    spans = isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], str)
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or len(given) != (2 if spans else 3)
    ):
        raise LsweepError(f"{name} = {given!r}: {name} is (low, high, count), such as (-1, 1, 51)")
    if spans:
        return {"range": given[0], "count": given[1]}
    low, high = (b if isinstance(b, Decimal) else _number(b) for b in given[:2])
    return {"range": [low, high], "count": _number(given[2])}


def _where(key: str) -> str:
    """Return, as the end of a message, which argument of `sweep` holds what was asked for."""
    if key in {f.name for f in dataclasses.fields(Recipe)}:
        return f': it belongs into directions={{"{key}": …}}'
    if key == "tolerance":
        return ": that is refine=…"
    own = [p for p in inspect.signature(sweep).parameters if p != "evaluate"]
    return nearest(key, [*own, *(f.name for f in dataclasses.fields(Evaluation))])


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else f"an object of type {type(value).__name__}"


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
