"""What each command that only looks at a run does, from its options to its exit code.

Nothing here computes a value; arguments are those of `lsweep.commands.cli`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsweep.commands.making import INCOMPLETE
from lsweep.errors import LsweepError, nearest
from lsweep.storage.folder import RunFolder

if TYPE_CHECKING:
    from lsweep.comparison.comparing import Comparison, Question
    from lsweep.measures.measures import Report
    from lsweep.surfaces.surface import Surface

MOST_DPI = 1200
MOST_PLANES = 24


def do_status(options: Namespace) -> int:
    """Print what is done, once or until it is complete; of a study, run by run."""
    from lsweep.plans.study import runs
    from lsweep.runs.status import Overview, lines

    folders = [RunFolder(p) for p in runs(options.run)]
    overviews: dict[RunFolder, Overview] = {}
    while True:
        states, texts = [], []
        for folder in folders:
            if folder not in overviews and (folder.exists or len(folders) == 1):
                overviews[folder] = Overview(folder)
            state = overviews[folder].look() if folder in overviews else _unplanned(folder)
            states.append(state)
            text = lines(state) if folder in overviews else [f"{folder.root}: not planned yet"]
            texts.append(json.dumps(state) if options.json else "\n".join(text))
        if options.watch and sys.stdout.isatty() and not options.json:
            texts[0] = f"\033[2J\033[H{texts[0]}"
        print("\n".join(texts), flush=True)
        if not options.watch or all(s["complete"] for s in states):
            return 0
        time.sleep(options.interval)


def _unplanned(folder: RunFolder) -> dict[str, Any]:
    return {"run": str(folder.root), "planned": False, "complete": False}


def do_merge(options: Namespace) -> int:
    """Write surface.h5, unless points are missing."""
    from lsweep.merging.merge import merge
    from lsweep.runs.prune import forget_leases

    folder = RunFolder(options.run)
    surface, report = merge(folder)
    for line in report.lines():
        print(f"lsweep: {line}", file=sys.stderr)
    if report.missing and not options.partial:
        print(f"lsweep: nothing written; 'lsweep run {folder.root}' computes what is missing, "
              "--partial merges what is there", file=sys.stderr)  # fmt: skip
        return INCOMPLETE
    surface.save(folder.surface)
    print(f"wrote {folder.surface}")
    if not report.missing:
        forget_leases(folder)
    if options.picture and report.missing < report.points:
        from lsweep.pictures.cells import which_plane
        from lsweep.pictures.drawing import draw_run

        print(f"wrote {draw_run(surface, folder)}{which_plane(surface)}")
    return 0 if report.clean else INCOMPLETE


def do_verify(options: Namespace) -> int:
    """Check every file, those of child runs too."""
    from lsweep.runs.verify import verify

    folder = RunFolder(options.run)
    found = verify(folder, options.data, options.trust)
    each = [("", found)]
    for name in folder.all_children():  # of the parent's data, which need not be read again
        each.append((f"measure {name}: ", verify(folder.child(name), False, options.trust)))
    for who, what in each:
        for line in what.notes:
            print(f"{who}{line}")
        for line in what.problems:
            print(f"lsweep: {who}{line}", file=sys.stderr)
    checked, problems = (sum(n) for n in zip(*((f.checked, len(f.problems)) for _, f in each),
                                             strict=True))  # fmt: skip
    print(f"{checked} files checked, {problems} problems")
    return 1 if problems else 0


def do_prune(options: Namespace) -> int:
    """Rewrite a merged run into few parts."""
    from lsweep.runs.prune import prune

    done = prune(RunFolder(options.run))
    parts = f"{done.before} parts are now {done.after}" if done.after else "no part to rewrite"
    print(f"{options.run}: {parts}; {done.files} files and {done.bytes / 1e6:.1f} MB less")
    return 0


def do_render(options: Namespace) -> int:
    """Draw runs or surfaces, or what was measured of them, into one file."""
    from lsweep.merging.opening import open_surface
    from lsweep.pictures.cells import which_plane
    from lsweep.pictures.drawing import KINDS, render
    from lsweep.pictures.figures import FIGURES, Options, figure_of
    from lsweep.plans.study import runs
    from lsweep.surfaces.penalty import with_l2

    if options.dpi > MOST_DPI:
        raise LsweepError(f"--dpi {options.dpi}: at most {MOST_DPI}; for more, write .pdf or .svg")
    if options.kind == "study":
        return _render_study(options)
    sources = [p for given in options.source for p in runs(given)]
    if options.kind in FIGURES:
        _refuse_scale(options)
        figure_of(sources, options.kind, options.output, Options(options.metric, bool(options.log)),
                  options.dpi)  # fmt: skip
        print(f"wrote {options.output}")
        return 0
    if options.kind not in ("auto", *KINDS):
        known = ["auto", *KINDS, *FIGURES, "study"]
        raise LsweepError(f"kind = {options.kind!r}{nearest(options.kind, known)}")
    surfaces = [with_l2(open_surface(p), options.l2) for p in sources]
    labels = [p.stem for p in sources] if len(surfaces) > 1 else None
    render(surfaces, options.output, name=options.metric, kind=options.kind, log=options.log,
           vmin=options.vmin, vmax=options.vmax, labels=labels, dpi=options.dpi,
           points=options.points, z=_planes(surfaces, options.at))  # fmt: skip
    which = "" if options.at else which_plane(surfaces[0])
    print(f"wrote {options.output}{which}")
    return 0


def _planes(surfaces: Sequence[Surface], asked: Sequence[float | None]) -> list[float]:
    """Return the z of each plane that is asked for, in their order; None is every z."""
    each = [float(z) for s in surfaces if None in asked and "z" in s.axes for z in s.z]
    most = max((len(s.z) for s in surfaces if "z" in s.axes), default=0)
    if None in asked and not 0 < most <= MOST_PLANES:
        why = f"{most} planes, at most {MOST_PLANES}: name some" if most else "there is no axis z"
        raise LsweepError(f"--at z=all: {why}")
    return sorted({*each, *(z for z in asked if z is not None)})


def _refuse_scale(options: Namespace) -> None:
    """Refuse what a picture of a measure does not take, rather than ignore it."""
    given = {"--vmin": options.vmin, "--vmax": options.vmax, "--points": options.points or None,
             "--at": options.at or None}  # fmt: skip
    for name, value in {**given, "--l2": options.l2}.items():
        if value is not None:
            raise LsweepError(f"--kind {options.kind} takes no {name}: leave it out")


def _render_study(options: Namespace) -> int:
    from lsweep.comparison.comparing import Question
    from lsweep.measures.measures import measure_path
    from lsweep.pictures.drawing import save
    from lsweep.pictures.scatter import study_figure

    paths, absent = _there(options.source)
    reports = [measure_path(p, options.metric, options.l2) for p in paths]
    names = {row.name for report in reports for row in report.rows}
    figure = study_figure(_comparison(Question(), paths, reports, names))
    save(figure, options.output, dpi=options.dpi)
    print(f"wrote {options.output}")
    return INCOMPLETE if absent else 0


def _export_directions(options: Namespace) -> int:
    """Write a run's directions as a direction file of the reference implementation."""
    from lsweep.axes.directions import as_reference
    from lsweep.axes.vectors import Origin
    from lsweep.plans.plan import Plan
    from lsweep.preparing.restoring import load_problem
    from lsweep.surfaces.reference import write_reference_directions

    folder = RunFolder(options.source)
    problem, directions = load_problem(folder, Plan.read(folder), trust=options.trust)
    arrays = as_reference(directions, Origin.of(problem.model))
    write_reference_directions(options.target, arrays)
    print(f"wrote {options.target}: {', '.join(arrays)} in the reference implementation's format")
    return 0


def do_convert(options: Namespace) -> int:
    """Write another format."""
    if options.directions:
        return _export_directions(options)
    from lsweep.merging.opening import open_surface
    from lsweep.surfaces.convert import convert

    source = open_surface(options.source) if options.source.is_dir() else options.source
    print(convert(source, options.target, name=options.metric, log=options.log))
    return 0


def do_measure(options: Namespace) -> int:
    """Print the numbers of runs: a table each, CSV, or JSON; keep them in the runs."""
    from lsweep.measures import sheet
    from lsweep.measures.measures import measure_path
    from lsweep.outcomes.measured import jsonable

    if options.json and options.csv:
        raise LsweepError("--json and --csv are two forms of one answer: give one of them")
    paths, absent = _there(options.runs)
    reports = [measure_path(path, options.metric, options.l2) for path in paths]
    for path, report in zip(paths, reports, strict=True):
        folder = RunFolder(path)
        if folder.exists and options.metric is None and options.l2 is None:
            trouble = sheet.keep(folder, report)
            if trouble:
                print(f"lsweep: {trouble}; the numbers are not kept", file=sys.stderr)
    whole = reports
    if options.only is not None:
        reports = sheet.only(reports, options.only)
    study = None
    if len(paths) > 1:
        study = _print_comparison(options, paths, whole, reports)
    elif options.json:
        rows = [{**jsonable(r.summary), **sheet.as_json(r)} for r in reports]
        print(json.dumps(rows, allow_nan=False))
    elif options.csv:
        print(sheet.as_csv(reports), end="")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n\n".join(sheet.text(r, width) for r in reports))
    if options.figures:
        _draw_measures(paths, study)
    return INCOMPLETE if absent else 0


def _draw_measures(paths: Sequence[Path], study: Comparison | None) -> None:
    from lsweep.pictures.drawing import save
    from lsweep.pictures.figures import draw_measures
    from lsweep.pictures.scatter import study_figure

    if study is not None and study.gap:
        try:
            figure = study_figure(study)
        except LsweepError as e:
            print(f"lsweep: {e}", file=sys.stderr)
        else:
            picture = paths[0].parent / "study.png"
            save(figure, picture)
            print(f"wrote {picture}", file=sys.stderr)
    for path in paths:
        folder = RunFolder(path)
        if not folder.exists:
            raise LsweepError(f"--figures: {path} is no run and has no folder for them")
        for picture in draw_measures(folder):
            print(f"wrote {picture}", file=sys.stderr)  # stdout may be a program's


def _there(given: Sequence[Path]) -> tuple[list[Path], int]:
    """Return the runs that are meant, each once, and how many of a study are not planned yet."""
    from lsweep.plans.study import runs

    paths: dict[Path, Path] = {}
    absent = 0
    for path in given:
        found = runs(path)
        there = [p for p in found if p.exists()] if len(found) > 1 else found
        for p in found:
            if p not in there:
                print(f"lsweep: {p}: not planned yet", file=sys.stderr)
        absent += len(found) - len(there)
        paths |= {p.resolve(): p for p in there if p.resolve() not in paths}
    if not paths:
        raise LsweepError(f"nothing of {given[0]} is planned yet: 'lsweep run {given[0]}'")
    return list(paths.values()), absent


def _print_comparison(
    options: Namespace, paths: Sequence[Path], whole: Sequence[Report], shown: Sequence[Report]
) -> Comparison:
    from lsweep.comparison import sidebyside
    from lsweep.comparison.comparing import Question
    from lsweep.measures import sheet
    from lsweep.outcomes.measured import jsonable

    names = {row.name for report in shown for row in report.rows}
    asked = Question(options.gap, options.match, options.regularizer, options.permutations)
    found = _comparison(asked, paths, whole, names)
    if options.json:
        runs = [{**jsonable(r.summary), **sheet.as_json(r)} for r in shown]
        print(json.dumps({**sidebyside.as_json(found), "runs": runs}, allow_nan=False))
    elif options.csv:
        print(sidebyside.as_csv(found), end="")
    else:
        print("\n".join(sidebyside.lines(found)))
        lacking = [r for r in shown if r.missing]
        if lacking:
            print(f"\nnot all is measured in {len(lacking)} of {len(shown)} runs: 'lsweep measure "
                  f"{lacking[0].source}' says what, and how it is")  # fmt: skip
    return found


def _comparison(
    asked: Question, paths: Sequence[Path], reports: Sequence[Report], only: Collection[str]
) -> Comparison:
    import dataclasses

    from lsweep.comparison.comparing import compare
    from lsweep.comparison.siblings import RunMeasures
    from lsweep.merging.opening import open_surface
    from lsweep.plans.plan import Plan

    runs = []
    for path, report in zip(paths, reports, strict=True):
        folder = RunFolder(path)
        if folder.exists:
            plan = dataclasses.asdict(Plan.read(folder))
        else:
            plan = open_surface(path).provenance.get("plan") or {}
        runs.append(RunMeasures(str(path), plan, report.rows))
    return compare(runs, asked, only)


def do_doctor(options: Namespace) -> int:
    """Probe a file system, with the same command on another node if it runs there."""
    from dataclasses import replace

    from lsweep.runs.doctor import diagnose
    from lsweep.runs.meeting import meet

    found = diagnose(options.folder)
    if options.wait:
        said = meet(options.folder, options.wait, lambda text: print(f"lsweep: {text}",
                                                                     file=sys.stderr))  # fmt: skip
        found = replace(found, findings=[*found.findings, *said])
    print(json.dumps(found.as_json()) if options.json else "\n".join(found.lines()))
    return found.exit_code
