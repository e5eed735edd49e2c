"""The sheet: measured numbers as a table for people, as CSV and as JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lsweep.errors import LsweepError, nearest
from lsweep.measures.measures import Report
from lsweep.outcomes.measured import Measured, as_table
from lsweep.plans.children import CHILDREN
from lsweep.storage.files import sealed, write_whole
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import read

SHARED = (
    "split",
    "samples",
    "of",
    "l2",
    "batch_norm",
    "precision",
    "seed",
    "normalize",
    "ignore",
    "gauge",
    "parameters",
)
OWN = ("residual", "ci95", "step", "units")
COLUMNS = ("replicates", "radius", "samples", "seed", "normalize", "batch_norm")
NARROWEST = 40  # characters of a note in a line


def only(reports: Sequence[Report], names: str) -> list[Report]:
    """Return reports with the rows that ``--only`` names.

    By name, by what stands before ``@``, by what ``--measures`` computes them with, or, where none
    of these is one, by the words that names begin with.

    Raises:
        LsweepError: no report has such a row.

    >>> rows = [Measured(n, 1.0) for n in ("basins", "basin_area@0.5", "basin_share@0.5")]
    >>> [row.name for row in only([Report("a.run", "", rows, [])], "basin")[0].rows]
    ['basin_area@0.5', 'basin_share@0.5']
    """
    every = [row for r in reports for row in r.rows]
    kept: set[str] = set()
    for name in [n.strip() for n in names.split(",") if n.strip()] or [""]:
        found = {row.name for row in every if name in _names(row)}
        found = found or {row.name for row in every if name and row.name.startswith(f"{name}_")}
        if not found:
            close = nearest(name, dict.fromkeys(n for row in every for n in _names(row)))
            if "did you mean" not in close:
                groups = (row.context.get("measure", row.family) for row in every)
                close = nearest(name, dict.fromkeys(groups))
            raise LsweepError(f"--only: no measure {name!r} here{close}")
        kept |= found
    return [
        dataclasses.replace(r, rows=[row for row in r.rows if row.name in kept], missing=[])
        for r in reports
    ]


def _names(row: Measured) -> list[str]:
    """What a row may be asked for by; a child that is computed with another goes by both."""
    child = str(row.context.get("measure", ""))
    beside = CHILDREN[child].beside if child in CHILDREN else ""
    return [name for name in (row.family, child, beside, row.name) if name]


def text(report: Report, width: int | None = None) -> str:
    """Return a report as an aligned table: name, value ± standard error, replicate, note.

    What is the same for all numbers stands once, above them.

    Args:
        report: of one run.
        width: of a line; None does not wrap.

    >>> rows = [Measured("sharpness@0.5", 2.0, 0.5, "directions", {"samples": 64, "replicates": 9})]
    >>> print(text(Report("net.run", "", rows, [])))
    net.run: 64 samples
      sharpness@0.5  2 ± 0.5  9 directions
    """
    shared = _shared(report.rows)
    head = report.source or "surface"
    lines = [f"{head}: {', '.join(_words(shared))}" if shared else f"{head}:"]
    rests = dict.fromkeys(str(r.context["values"]) for r in report.rows if "values" in r.context)
    for words in (f"the surface's numbers are {rest}" for rest in rests):
        lines += [f"  {part}" for part in (textwrap.wrap(words, width - 2) if width else [words])]
    told = [_note(r, shared) for r in report.rows]
    for i in range(len(told) - 1, 0, -1):  # a curve in the radius says it at its first point
        row = report.rows[i]
        if row.family == report.rows[i - 1].family and not row.doubtful:
            before = told[i - 1].split("; ")
            told[i] = "; ".join(part for part in told[i].split("; ") if part not in before)
    cells = [(r.name, r.text, _replicates(r), n) for r, n in zip(report.rows, told, strict=True)]
    widths = [max((len(c[i]) for c in cells), default=0) for i in range(3)]
    for *columns, note in cells:
        start = "  " + "  ".join(f"{c:<{w}}" for c, w in zip(columns, widths, strict=True))
        room = None if width is None else max(NARROWEST, width - len(start) - 2)
        parts = textwrap.wrap(note, room) if room else [note] if note else []
        lines.append(f"{start}  {parts[0]}" if parts else start.rstrip())
        lines += [f"{'':{len(start) + 2}}{part}" for part in parts[1:]]
    if report.missing:
        lines += ["not measured:", *(f"  {line}" for line in report.missing)]
    return "\n".join(lines)


def _shared(rows: Sequence[Measured]) -> dict[str, Any]:
    """What the rows agree on, or most of them begin with: the first value of each."""
    out: dict[str, Any] = {}
    for key in SHARED:
        # What is said of the samples is of one row: another's may be fewer of as many.
        known = [r for r in rows if ("samples" if key == "of" else key) in r.context]
        if known and key in known[0].context:
            out[key] = known[0].context[key]
    return out


def _words(context: Mapping[str, Any]) -> list[str]:
    out = []
    for key, value in context.items():
        if key == "samples":
            of = f" of {context['of']}" if "of" in context else ""
            split = f"{context['split']} " if "split" in context else ""
            out.append(f"{value or 'all'}{of} {split}samples")
        elif key == "split":
            out += [] if "samples" in context else [str(value)]
        elif key == "l2":
            out.append(f"loss + {value:g}/2·‖θ‖²")
        elif key == "ignore":
            out.append(f"{value} held still" if value != "none" else "nothing held still")
        elif key == "normalize":
            out.append(f"normalised by {value}" if value != "none" else "not normalised")
        elif key == "gauge":
            out += ["equi-normalised first"] if value == "equi" else []
        elif key == "parameters":
            out.append(f"only {', '.join(value)}")
        elif key in ("precision", "units"):
            out.append(str(value))
        elif key == "residual":
            out.append(f"residual {value:.1e}")
        elif key == "ci95":
            out.append(f"95 %: {value[0]:.4g} to {value[1]:.4g}")
        elif key == "step":
            out.append(f"h = {value:.3g}")
        elif key != "of":
            out.append(f"{key.replace('_', ' ')} {value}")
    return out


def _replicates(row: Measured) -> str:
    count = row.context.get("replicates")
    what = row.replicate
    if what == "samples":
        count = row.context.get("samples", count)
    if not what:
        return f"best of {count} start vectors" if count else ""
    return f"{count} {what}" if count else what


def _note(row: Measured, shared: Mapping[str, Any]) -> str:
    """What is said of a row, with what of its context is not that of the others."""
    differs = {
        k: row.context[k] for k in SHARED if k in row.context and row.context[k] != shared.get(k)
    }
    own = {k: row.context[k] for k in OWN if k in row.context}
    if row.replicate == "samples":
        differs.pop("samples", None)  # it stands beside the error
    return "; ".join(filter(None, [row.note, *_words({**differs, **own})]))


def as_csv(reports: Sequence[Report]) -> str:
    """Return reports as CSV, one row a number; the last column is the rest of its context in JSON.

    >>> print(as_csv([Report("a.run", "", [Measured("basins", 3.0)], [])]).splitlines()[1])
    a.run,basins,3.0,,,,,,,,,,{}
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "name", "value", "se", "replicate", *COLUMNS, "note", "context"])
    for report in reports:
        for row in report.rows:
            table = row.as_json()
            context = table["context"]
            named = [context.pop(key, "") for key in COLUMNS]
            writer.writerow(
                [report.source, row.name, table["value"], table["se"], row.replicate, *named,
                 row.note, json.dumps(context, sort_keys=True)]
            )  # fmt: skip
    return out.getvalue()


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as ``measures.json`` holds it, with what was not measured."""
    return as_table(report.source, report.plan, report.rows) | {"missing": report.missing}


def keep(folder: RunFolder, report: Report) -> str:
    """Write a run's ``measures.json``, unless it holds just that.

    Returns:
        Why it could not be written, as in a read-only folder; "" where it was.
    """
    data = sealed(as_json(report))
    try:
        if folder.measured.is_file() and read(folder.measured) == data:
            return ""
        write_whole(folder.measured, data)
    except (LsweepError, OSError) as e:
        return str(e)
    return ""
