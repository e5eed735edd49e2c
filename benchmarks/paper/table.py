"""The tables: claims with what was measured for them, and each network's numbers."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from statistics import mean, stdev

from lsweep.hosts.machine import cpu_model

from .claims import DECAY, LEGEND, Claim
from .data import TRAIN
from .evidence import Found, Measured, each
from .studies import ERROR_RADIUS

ANSWERS = {True: "**yes**", False: "**no**", None: "cannot tell"}
COLUMNS = {
    "train_loss": "training loss",
    "test_error": "test error, %",
    "nc10": "nc10",
    "rise": "rise at 0.2",
    "rise_cv": "its variation over planes",
    "error_rise": f"training error's rise at {ERROR_RADIUS:g}, points",
    "hessian_max": "λmax",
    "hessian_ratio": "λmin/λmax",
    "filter_hessian_max": "λmax, filter metric",
    "filter_hessian_ratio": "λmin/λmax, filter metric",
}
STUDIED = {
    "depth": "Depth and skip connections, stopped at training loss 0.02",
    "smooth": "GELU in place of ReLU, stopped at training loss 0.02",
    "batch": "Batch size, plain depth 6, no decay, stopped at training loss 0.02",
    "decay": f"Batch size and weight decay (0 or {DECAY:g}), plain depth 6, 100 epochs",
    "width": "Width, plain depth 14, stopped at training loss 0.02",
    "unmatched": "Deliberately not matched: depth 24 after 10 epochs",
    "beyond": "Architectures, losses and optimisers that the paper does not have",
}


def heading(command: str, seconds: float, workers: int) -> str:
    """Return when, where, with what and how long."""
    names = ("lsweep", "torch", "numpy", "scipy", "scikit-learn")
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names)
    return (
        f"{datetime.date.today()}; {cpu_model()}, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}; {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, {versions}; `{command}`: {seconds / 60:.1f} minutes with "
        f"{workers} processes."
    )


def row(cells: Sequence[str]) -> str:
    """Return one line of a table in Markdown."""
    return "| " + " | ".join(cells) + " |"


def claims_table(claims: Sequence[Claim], found: Sequence[Found]) -> str:
    """Return one row for each claim."""
    head = ("claim", "paper", "statistic", "threshold, fixed before", "measured", "seeds", "agrees")
    lines = [row(head), row(["---"] * len(head))]
    for c, f in zip(claims, found, strict=True):
        cells = (c.text, c.paper, c.statistic, c.threshold, f.text, str(f.seeds), ANSWERS[f.agrees])
        lines.append(row(cells))
    return "\n".join(lines)


def verdict(found: Sequence[Found]) -> str:
    """Return how many claims reproduce."""
    counts = {answer: sum(f.agrees is answer for f in found) for answer in ANSWERS}
    return (
        f"{counts[True]} of {len(found)} rows agree, {counts[False]} do not, of {counts[None]} "
        "nothing can be said."
    )


def number(values: Sequence[float], spread: bool) -> str:
    """Return mean and standard deviation over seeds.

    >>> number([1.0, 2.0], True)
    '1.5 ± 0.71'
    """
    if not spread or len(values) < 2:
        return f"{mean(values):.3g}"
    return f"{mean(values):.3g} ± {stdev(values):.2g}"


def networks_table(measured: Measured, study: str) -> str:
    """Return one row for each network: mean and standard deviation over training seeds."""
    records = measured[study]
    rows = {n: r for n, r in records[0].items() if "train_loss" in r}
    shown = [
        c for c in COLUMNS if any(c in r or c.replace("_ratio", "_max") in r for r in rows.values())
    ]
    lines = [row(["network", *(COLUMNS[c] for c in shown)]), row(["---"] * (len(shown) + 1))]
    for name, record in rows.items():
        cells = [name]
        for column in shown:
            if column.endswith("_ratio") and column.replace("_ratio", "_max") in record:
                stem = column.removesuffix("_ratio")
                low, high = (each(measured, study, name, f"{stem}_{e}") for e in ("min", "max"))
                values = [a / b for a, b in zip(low, high, strict=True)]
            elif column in record:
                values = each(measured, study, name, column)
            else:
                cells.append("")
                continue
            text = number(values, spread=True)
            if column == "rise":  # the error that a single network's number has
                text += f" (SE over directions {mean(each(measured, study, name, 'rise_se')):.1g})"
            cells.append(text)
        lines.append(row(cells))
    return "\n".join(lines)


def certificates(measured: Measured, study: str) -> list[str]:
    """Return what `lsweep invariance` says of the first seed's networks, where it was asked."""
    lines = [
        f"* **{name}**: {record['certificate']['summary']}. {record['certificate']['words']}"
        for name, record in measured[study][0].items()
        if "certificate" in record
    ]
    text = "What leaves each network unchanged, and does the picture know (`lsweep invariance`):"
    return [text, "\n".join(lines)] if lines else []


def report(
    title: str, head: str, claims: Sequence[Claim], found: Sequence[Found], measured: Measured
) -> str:
    """Return the whole page."""
    parts = [f"# {title}", head, LEGEND, claims_table(claims, found), verdict(found)]
    for study in STUDIED:
        if study in measured:
            parts += [f"## {STUDIED[study]}", networks_table(measured, study)]
            parts += certificates(measured, study)
    seeds = max(f.seeds for f in found)
    parts += [
        f"Numbers are means ± standard deviations over {seeds} training seeds. Batch norm in "
        f"evaluation mode, {TRAIN} training samples, all of them at every point."
    ]
    return "\n\n".join(parts) + "\n"
