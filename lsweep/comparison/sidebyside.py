"""Side by side: a comparison of several runs as text, as JSON, as CSV."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lsweep.comparison.comparing import Comparison, Related
from lsweep.comparison.regularizer import FILTER, Response
from lsweep.comparison.relate import FEWEST, INSIDE, Tau
from lsweep.comparison.siblings import GAPS, Network, Spread

WIDTH = 110  # characters of a line of a table
FEW_COLUMNS = 6  # networks that stand beside each other; more stand below each other
SCHEMA = 1


def lines(c: Comparison) -> Iterator[str]:
    """Yield a comparison for people."""
    yield from _networks(c)
    yield ""
    yield from _relations(c)
    if c.responses:
        yield ""
        yield from _responses(c)


def _networks(c: Comparison) -> Iterator[str]:
    planes = sorted({len(n.planes) for n in c.networks})
    many = f"{planes[0]}" if len(planes) == 1 else f"{planes[0]} to {planes[-1]}"
    own = "" if planes == [1] else "standard deviation over planes; of one plane, and of what does "
    own += "not depend on it, " if own else ""
    yield (f"{len(c.networks)} networks, {many} plane{'s' if planes != [1] else ''} each; ±: {own}"
           "its own standard error")  # fmt: skip
    if c.unlike:
        shown = ", ".join(c.unlike[:6]) + (", …" if len(c.unlike) > 6 else "")
        yield f"  not measured alike, so compare with care: they differ in {shown}"
    names = list(dict.fromkeys(name for n in c.networks for name in n.measures))
    alike, again = _alike(c, names), _again(c, names)
    names = [n for n in names if n not in (*alike, *again)]
    if len(c.networks) > FEW_COLUMNS:
        names = [n for n in names if n in c.shown]
    rows: list[tuple[str, list[str]]] = []
    for gap, title in GAPS.items():
        if any(gap in n.gaps for n in c.networks):
            rows.append((title, [_gap(n, gap) for n in c.networks]))
    rows += [(n, [_spread(net.measures.get(n)) for net in c.networks]) for n in names]
    if len(c.networks) <= FEW_COLUMNS:
        yield from table(["", *(n.name for n in c.networks)], [[r, *v] for r, v in rows])
    else:
        body = [[n.name, *(v[i] for _, v in rows)] for i, n in enumerate(c.networks)]
        yield from table(["", *(r for r, _ in rows)], body)
    if alike or again:
        yield ""
        told = [f"{n} {_number(c.networks[0].measures[n].mean)}" for n in alike]
        yield from _wrapped("the same in all networks: ", told)
        yield from _wrapped("equal in every network: ", [f"{n} = {m}" for n, m in again.items()])
    doubtful = sum(s.doubtful > 0 for n in c.networks for s in n.measures.values())
    if doubtful:
        yield ""
        yield (f"* {doubtful} of these did not converge or lie within their own error: "
               "'lsweep measure RUN' says which")  # fmt: skip


def _alike(c: Comparison, names: Sequence[str]) -> list[str]:
    """Return the measures that have one value in all of several networks, and no spread."""
    several = [n for n in names if len(c.networks) > 1 and bool(np.ptp(c.values(n)) == 0)]
    return [n for n in several if not any((x.measures[n].sd or 0.0) > 0 for x in c.networks)]


def _again(c: Comparison, names: Sequence[str]) -> dict[str, str]:
    """Return measure -> an earlier one that has its value in every network."""
    first: dict[bytes, str] = {}
    out = {}
    for name in names:
        values = c.values(name)
        if np.isfinite(values).all() and len(c.networks) > 1:
            before = first.setdefault(values.tobytes(), name)
            if before != name and np.ptp(values) > 0:
                out[name] = before
    return out


def _telling(c: Comparison, names: Sequence[str]) -> list[str]:
    """Return those of measures that are told and are not the same in all networks."""
    alike = _alike(c, names)
    return [n for n in names if n in c.shown and n not in alike]


def _wrapped(start: str, words: Sequence[str], indent: str = "") -> Iterator[str]:
    """Yield words behind a beginning, in lines; nothing without words."""
    if words:
        more = indent + "  "
        yield from textwrap.wrap(start + ", ".join(words), WIDTH, initial_indent=indent,
                                 subsequent_indent=more, break_on_hyphens=False)  # fmt: skip


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _gap(network: Network, gap: str) -> str:
    if gap not in network.gaps:
        return "-"
    value, se = network.gaps[gap]
    return f"{value:.3g} ± {se:.2g}" if math.isfinite(se) else f"{value:.3g}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    error = spread.error
    # "± 0" would read as certainty.
    more = f" ± {error:.2g}" if math.isfinite(error) and error > 0 else ""
    return _number(spread.mean) + more + "*" * (spread.doubtful > 0)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> Iterator[str]:
    """Yield the lines of a table, as many columns beside each other as the width takes.

    >>> print(*table(["", "a", "b"], [["x", "1", "2"]], width=8), sep="|")
    |   a  b|x  1  2
    >>> print(*table(["", "a", "b"], [["x", "1", "2"]], width=5), sep="|")
    |   a|x  1||   b|x  2
    """
    columns = [[head[i], *(r[i] for r in rows)] for i in range(len(head))]
    widths = [max(map(len, column)) for column in columns]
    begin = 1
    while begin < len(columns):
        end, used = begin, widths[0]
        while end < len(columns) and (end == begin or used + 2 + widths[end] <= width):
            used += 2 + widths[end]
            end += 1
        yield ""
        for i in range(len(rows) + 1):
            cells = [columns[0][i].ljust(widths[0])]
            cells += [columns[j][i].rjust(widths[j]) for j in range(begin, end)]
            yield "  ".join(cells).rstrip()
        begin = end


# -- relations -------------------------------------------------------------------------------------


def _relations(c: Comparison) -> Iterator[str]:
    if not c.gap:
        yield ("Relations: no generalisation gap is known; it needs the splits train and test, and "
               "a grid that contains the centre")  # fmt: skip
        return
    yield f"Relations to the generalisation gap ({GAPS[c.gap]})"
    have = len(c.all.members)
    if have < FEWEST:
        yield f"  too few: {have} network{'s' * (have != 1)} with a gap, at least {FEWEST}"
        return
    yield from (f"  {line}" for line in _legend(c))
    yield from _related(c, c.all, "all networks")
    low, high = c.losses
    within = f"training loss {low:.3g} to {high:.3g}, within {c.question.tolerance:.0%}"
    some = len(c.matched.members)
    yield ""
    if some < FEWEST:
        yield (f"  loss-matched: too few: {some} of {have} networks ({within}), at least {FEWEST}; "
               "differences in training loss are in the numbers above")  # fmt: skip
    elif some == have:
        yield f"  loss-matched: all of them ({within})"
    else:
        yield from _related(c, c.matched, f"loss-matched: {some} of {have} networks ({within})")
    for control, taus in c.partial.items():
        yield ""
        yield (f"  partial τ, {control} held: (τ_mg - τ_mc τ_gc) / √((1-τ_mc²)(1-τ_gc²)), m the "
               "measure, g the gap, c what is held; null: gaps permuted among networks "
               "of about the same c, p around its mean")  # fmt: skip
        again = _again(c, list(taus))
        told = [[_marked(c, n), t.text] for n, t in taus.items()
                if n in c.shown and n not in again and math.isfinite(t.value)]  # fmt: skip
        yield from _indented(table(["", "partial τ"], told))
        lost = _telling(c, [n for n, t in taus.items() if not math.isfinite(t.value)])
        yield from _wrapped("undefined: ", lost, "    ")


def _legend(c: Comparison) -> list[str]:
    tests = len(c.all.relations)
    hidden = tests - len(c.all.relations.keys() & c.shown)
    words = [
        "τ: Kendall's τ-b, -1 to 1: how much more often two networks stand in the same order by "
        "both numbers than not",
    ]
    if c.axes:
        held = f" (and in the same {', '.join(c.held)})" if c.held else ""
        words.append(
            f"ψ: the same between networks that differ in one hyper-parameter alone{held}"
            + ("; Ψ: the mean of the ψ; worst: the ψ that agrees least with Ψ" if len(c.axes) > 1
               else "; of one there is, Ψ is that ψ")
        )  # fmt: skip
    return [
        *words,
        f"[a, b]: null interval: the middle {INSIDE:.0%} when the gaps are permuted over the "
        f"networks {c.question.permutations} times (Philox, seed {c.question.seed})",
        f"p: share of permutations at least as far from 0; {tests} measure{'s' * (tests != 1)}, "
        "not corrected for their number"
        + (f"; of each family one, its middle, is shown, --only shows the {hidden} others, --json "
           "and --csv have all" if hidden else ""),
    ]  # fmt: skip


def _related(c: Comparison, related: Related, title: str) -> Iterator[str]:
    yield f"  {title}"
    axes = [a for a in c.axes if any(a in r.axes for r in related.relations.values())]
    several = len(axes) > 1  # of one, Ψ and the worst are its ψ
    head = ["", "networks", "τ", *(f"ψ {a}" for a in axes), *(["Ψ", "worst"] if several else [])]
    rows, lost, again = [], [], _again(c, list(related.relations))
    for name, r in related.relations.items():
        if name not in c.shown or name in again:
            continue
        if not any(math.isfinite(t.value) for t in (r.tau, *r.axes.values())):
            lost.append(name)
            continue
        cells = [_marked(c, name), str(r.networks), r.tau.text]
        cells += [r.axes[a].text if a in r.axes else "-" for a in axes]
        if several:
            cells += [r.psi.text if r.psi else "-", _worst(r.worst, r.axes)]
        rows.append(cells)
    yield from _indented(table(head, rows))
    yield from _wrapped("undefined: ", _telling(c, lost), "    ")
    few = ", ".join(f"{n} ({k})" for n, k in related.too_few.items() if n in c.shown)
    if few:
        yield f"    too few networks: {few}"


def _marked(c: Comparison, name: str) -> str:
    """Return a measure's name, with how many networks' values are in doubt."""
    count = sum(n.measures[name].doubtful > 0 for n in c.networks if name in n.measures)
    return f"{name} ({count} in doubt)" if count else name


def _worst(worst: str, axes: Any) -> str:
    if not worst or not math.isfinite(axes[worst].value):
        return "-"
    return f"{worst} {round(axes[worst].value, 2) + 0.0:+.2f}"


def _indented(text: Iterator[str]) -> Iterator[str]:
    return (f"    {line}".rstrip() for line in text)


# -- the regulariser -------------------------------------------------------------------------------


def _responses(c: Comparison) -> Iterator[str]:
    key = c.regularizer
    values = sorted({float(n.options[key]) for n in c.networks})
    yield f"The regulariser {key}: {', '.join(f'{v:g}' for v in values)}"
    zero = " 0 has no logarithm: it counts in the ratio only." if values[0] == 0 else ""
    yield (f"  slope: of ln measure on ln {key} with all other hyper-parameters equal, ± standard "
           f"error over networks.{zero}")  # fmt: skip
    yield (f"  ratio: at {values[-1]:g} over at {values[0]:g}, geometric mean (least to greatest) "
           "over the same groups")  # fmt: skip
    yield ("  scale and shape: ln raw = ln (raw / filter-normalised) + ln filter-normalised; the "
           "first follows the weights' norm, the second does not see it")  # fmt: skip
    rows = [
        [
            ("  " if " / " in r.name or FILTER in r.name else "") + r.name,
            r.channel,
            _slope(r),
            str(r.networks),
            _ratio(r),
        ]
        for r in c.responses
        if (r.networks or r.groups) and _first(r.name) in c.shown
    ]
    yield from _indented(table(["", "channel", "slope", "networks", "ratio"], rows))
    left = [f"{r.name} ({r.left_out})" for r in c.responses
            if r.left_out and _first(r.name) in c.shown]  # fmt: skip
    if left:
        yield f"    left out, not positive or not known (networks): {', '.join(left)}"


def _first(name: str) -> str:
    return name.partition(" / ")[0]


def _slope(r: Response) -> str:
    if not math.isfinite(r.slope):
        return "-"
    if r.networks < FEWEST:
        return "too few"
    return f"{r.slope:+.3g}" + (f" ± {r.slope_se:.2g}" if r.slope_se is not None else "")


def _ratio(r: Response) -> str:
    if not r.groups:
        return "-"
    spread = f" ({r.low:.3g} to {r.high:.3g})" if r.groups > 1 else ""
    return f"{r.ratio:.3g}{spread}"


# -- for programs ----------------------------------------------------------------------------------


def as_json(c: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values; what is not finite is null."""
    return {
        "schema": SCHEMA,
        "runs": [
            {"run": r.name, "options": r.options, "measures": [m.as_json() for m in r.rows]}
            for r in c.runs
        ],
        "networks": [
            {
                "name": n.name,
                "options": dict(n.options),
                "planes": list(n.planes),
                "train_loss": _finite(n.train_loss),
                "gaps": {k: {"value": v, "se": _finite(se)} for k, (v, se) in n.gaps.items()},
                "measures": {
                    k: {
                        "mean": _finite(s.mean),
                        "sd": _finite(s.sd),
                        "planes": s.planes,
                        "se": _finite(s.se),
                        "replicate": s.replicate,
                        "doubtful": s.doubtful,
                    }
                    for k, s in n.measures.items()
                },
            }
            for n in c.networks
        ],
        "unlike": list(c.unlike),
        "gap": c.gap,
        "axes": list(c.axes),
        "held": list(c.held),
        "permutations": c.question.permutations,
        "seed": c.question.seed,
        "fewest": FEWEST,
        "relations": _related_json(c.all),
        "loss_matched": {
            **_related_json(c.matched),
            "tolerance": c.question.tolerance,
            "losses": [_finite(v) for v in c.losses],
        },
        "partial": {
            control: {n: _tau_json(t) for n, t in taus.items()}
            for control, taus in c.partial.items()
        },
        "regularizer": c.regularizer,
        "responses": [
            {k: _finite(v) if isinstance(v, float) else v for k, v in vars(r).items()}
            for r in c.responses
        ],
    }


def _related_json(related: Related) -> dict[str, Any]:
    return {
        "networks": list(related.members),
        "too_few": len(related.members) < FEWEST,
        "measures": {
            name: {
                "networks": r.networks,
                "tau": _tau_json(r.tau),
                "axes": {a: _tau_json(t) for a, t in r.axes.items()},
                "psi": _tau_json(r.psi) if r.psi else None,
                "worst": r.worst,
            }
            for name, r in related.relations.items()
        },
    }


def _tau_json(t: Tau) -> dict[str, Any]:
    return {"value": _finite(t.value), "null": [_finite(t.low), _finite(t.high)],
            "p": _finite(t.p), "pairs": t.pairs}  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def as_csv(c: Comparison) -> str:
    """Return one line for each measure of each run, with its network's gaps beside it."""
    out = io.StringIO()
    gaps = [g for g in GAPS if any(g in n.gaps for n in c.networks)]
    axes = [*c.axes, *c.held]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["network", "run", *axes, "train_loss", *(f"gap_{g}" for g in gaps),
                     "measure", "value", "se", "replicate"])  # fmt: skip
    by_run = {plane: n for n in c.networks for plane in n.planes}
    for run in c.runs:
        n = by_run[run.name]
        known = [n.gaps[g][0] if g in n.gaps else "" for g in gaps]
        for m in (row for row in run.rows if row.name in n.measures):
            writer.writerow([n.name, run.name, *(n.options.get(a, "") for a in axes), n.train_loss,
                             *known, m.name, m.value, "" if m.se is None else m.se,
                             m.replicate])  # fmt: skip
    return out.getvalue()
