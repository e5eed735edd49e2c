"""`lsweep invariance`: the certificate of a sweep's network, and the defect of its picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lsweep.commands.making import chosen_code, run_of
from lsweep.errors import LsweepError
from lsweep.hosts.machine import refuse_foreign
from lsweep.outcomes import certified
from lsweep.outcomes.certified import Certificate, Defect, Trial
from lsweep.plans.plan import Plan
from lsweep.plans.settings import Settings
from lsweep.storage.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from lsweep.axes.directions import Directions
    from lsweep.problems.problem import Problem


@dataclass(frozen=True)
class Given:
    """A sweep to look at: of a run, or of a sweep.toml that need not have one."""

    settings: Settings
    plan: Plan
    problem: Problem
    directions: Directions
    base: Path
    folder: RunFolder | None


def given(options: Namespace) -> Given:
    """Return the sweep that a command line means, its factory called.

    The run of a TOML is where the certificate is kept, if it holds the same plan.
    """
    from lsweep.preparing.planning import make_plan
    from lsweep.preparing.restoring import base_of, load_problem, settings_of
    from lsweep.problems.problem import make_problem

    folder = run_of(options)
    if folder.exists:
        refuse_foreign(folder.plan, options.trust)
    if options.sweep.is_dir() or (folder.exists and not options.sweep.exists()):
        if options.overrides:
            raise LsweepError(f"--set changes a sweep.toml; {options.sweep} is a run, frozen")
        plan = Plan.read(folder)
        problem, directions = load_problem(folder, plan, trust=options.trust)
        settings = settings_of(folder, plan)
        return Given(settings, plan, problem, directions, base_of(folder), folder)
    settings = Settings.from_file(options.sweep, tuple(options.overrides))
    refuse_foreign(options.sweep, options.trust)
    base = options.sweep.absolute().parent
    code = chosen_code(options, folder)
    problem = make_problem(settings.problem, base, code, options.trust)
    there = Plan.read(folder) if folder.exists else None
    plan, directions = make_plan(settings, problem, base, there.facts if there else None,
                                 code)  # fmt: skip
    if there is not None:
        there.require_same(plan, folder)
    plan = there or plan
    return Given(settings, plan, problem, directions, base, folder if there else None)


def do_invariance(options: Namespace) -> int:
    """Test every rescaling, print what holds, keep it beside the run."""
    from lsweep.hosts.device import choose_device

    sweep = given(options)
    device = choose_device(options.device)
    plain = not (options.json or options.csv)
    found = _certificate(sweep, device, options.samples, plain)
    if options.json:
        print(json.dumps(found.as_json()))
    elif options.csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(certified.COLUMNS)
        rows = (dataclasses.asdict(r) for r in found.rows)
        writer.writerows([r[c] for c in certified.COLUMNS] for r in rows)
    else:
        print("\n".join(certified.conclusion(found)))
    if sweep.folder is not None:
        certified.write(sweep.folder, found)
        if plain:
            print(f"wrote {sweep.folder.invariance}")
    worst = found.defect
    if worst is not None and worst > certified.PASS:
        print(f"lsweep: {certified.words(found)}", file=sys.stderr)
    return 0


def _certificate(sweep: Given, device: torch.device, samples: int, plain: bool) -> Certificate:
    """Discover, test, compare pictures; rows are printed as they come where ``plain``."""
    from lsweep.axes.vectors import Origin
    from lsweep.backends.tracing import Unsupported
    from lsweep.invariance.bench import few, inputs_of, mean_metric, precisions
    from lsweep.invariance.certificate import certify
    from lsweep.invariance.defect import (
        ELEMENTS,
        Picture,
        certified_kinds,
        coarse,
        defects,
        not_compared,
    )
    from lsweep.invariance.equivalences import candidates
    from lsweep.invariance.gauge import gauge_of
    from lsweep.invariance.justified import justified
    from lsweep.invariance.symmetries import Discovered, discover

    plan, problem = sweep.plan, sweep.problem
    split, metric = plan.evaluate["splits"][0], mean_metric(problem, plan.evaluate["metrics"])
    origin = Origin.of(problem.model)
    try:
        found = discover(problem.model, inputs_of(problem, metric))
    except Unsupported as e:
        found = Discovered((), unknown=(str(e),))
    transforms = candidates(found, origin.parameters)
    width = max([5, *(len(t.layer) for t in transforms)])
    kinds = max([9, *(len(t.kind) for t in transforms)])
    if plain:
        print(certified.heading(width, kinds), flush=True)

    def say(row: Trial) -> None:
        if plain:
            print(certified.line(row, width, kinds), flush=True)

    small = few(problem, split, samples, device)
    rows, loss, count = certify(small, transforms, metric, device, say)
    first = next(iter(sweep.settings.directions.values()))
    dtype = precisions(problem, device)[-1]
    settings = dataclasses.replace(sweep.settings, grid=dict(sweep.directions.grid))
    mode, why = plan.evaluate["batch_norm"], not_compared(settings)
    changes: tuple[Defect, ...] = ()
    if not why:
        picture = Picture(
            small, settings, {**plan.evaluate, "metrics": [metric]}, sweep.base, device, dtype,
            gauge_of(transforms, rows) if first.gauge == "equi" else None,
        )  # fmt: skip
        changes = defects(picture, certified_kinds(transforms, rows, mode))
    moved = {n for axis in sweep.directions.axes.values() for n in axis.weights}
    return Certificate(
        plan.digest,
        plan.facts["network"],
        {
            "samples": count, "split": split, "seed": 0, f"{split}_{metric}": loss,
            "batch_norm": mode, "normalize": first.normalize, "gauge": first.gauge,
            "precision": str(dtype).removeprefix("torch."), "device": str(device),
            "points": 0 if why else len(coarse(settings.grid)), "elements": ELEMENTS,
            "not_compared": why,
        },
        tuple(rows),
        justified(transforms, rows, {n: p for n, p in origin.parameters.items() if n in moved},
                  origin.owners, first.normalize or "none", first.gauge),
        changes,
    )  # fmt: skip
