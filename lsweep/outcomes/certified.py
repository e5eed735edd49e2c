"""What a certificate says: its rows, its words, and its file in the run; without torch.

"Invariant" is never said of what was not tested: verdicts are exact, up to eps, approximate,
broken and untested.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lsweep.errors import DamagedFile, LsweepError
from lsweep.outcomes.measured import Measured
from lsweep.storage.files import read_json, sealed, write_whole
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there

SCHEMA = 1
HOLDS = ("exact", "up to eps")
GAUGED = ("neuron rescaling", "up/down rescaling", "query-key scale", "value-output scale")
PASS = 1e-3  # of a picture's range: a smaller plane invariance defect is none
WIDTH = 100  # characters of a line
LEGEND = (
    "c: factor with the largest error; error: max|Δf| / rms f; noise: the same of sums in "
    "another order;\ngradient: of f, its share along the rescaling, 0 where that changes nothing; "
    "float32: the error at c = 3"
)
COLUMNS = (
    "layer", "transform", "verdict", "factor", "error", "noise", "residual", "error32",
    "loss_error", "units", "precision", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One transform of one group of units, and whether the function survived it.

    Attributes:
        layer: between which modules.
        transform: what was done.
        units: how many units it may be done to.
        tensors: all that it changes.
        verdict: ``exact``, ``up to eps``, ``approximate``, ``broken`` or ``untested``.
        factor: the finite factor with the largest error; None for an order or signs.
        error: max|Δf| / rms f there; None where that is not finite.
        error32: the same in float32, at factor 3.
        loss_error: |ΔL| / max(L, 1e-3).
        noise: the floor: the same forward in another order and other pieces.
        residual: of T1, 0 where the gradient is orthogonal to the orbit; None where there is none.
        precision: of all but ``error32``.
        note: why it is untested; how the error falls with eps.
    """

    layer: str
    transform: str
    units: int
    tensors: tuple[str, ...]
    verdict: str
    factor: float | None = None
    error: float | None = None
    error32: float | None = None
    loss_error: float | None = None
    noise: float | None = None
    residual: float | None = None
    precision: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the function is the same, to rounding or to the eps of a normalisation."""
        return self.verdict in HOLDS


@dataclass(frozen=True)
class Defect:
    """How much a picture changes for an equivalent network: max|ΔL| / range over a coarse grid.

    Attributes:
        transform: done to all groups at once for which it is certified.
        groups: how many those are.
        values: one for each random element; None where the loss is not finite in one of the two.
    """

    transform: str
    groups: int
    values: tuple[float | None, ...]

    @property
    def largest(self) -> float:
        """The largest value.

        >>> Defect("neuron rescaling", 1, (0.5, None)).largest
        inf
        """
        return max(math.inf if v is None else v for v in self.values)


@dataclass(frozen=True)
class Certificate:
    """All that was tested of one network and its picture.

    Attributes:
        plan: the plan's digest.
        network: its class.
        context: ``samples``, ``split``, ``seed``, ``batch_norm``, ``train_loss``, ``normalize``,
            ``gauge``, ``range``, ``device``: what the numbers depend on.
        rows: the transforms.
        layers: name of each weight that the directions move -> ``followed``, ``not followed``,
            ``nothing to follow`` or ``untested``, with the transforms that it is about.
        defects: of the picture, one for each kind of transform.
    """

    plan: str
    network: str
    context: Mapping[str, Any]
    rows: tuple[Trial, ...]
    layers: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    defects: tuple[Defect, ...] = ()

    @property
    def defect(self) -> float | None:
        """The plane invariance defect: the largest over transforms, or None."""
        return max((d.largest for d in self.defects), default=None)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON-able tables."""
        table = dataclasses.asdict(self)
        shown = self.defect
        return {"schema": SCHEMA, **table, "summary": summary(self), "words": words(self),
                "defect": shown if shown is None or math.isfinite(shown) else None}  # fmt: skip

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Certificate:
        """Read what `as_json` gave."""
        rows = [Trial(**{**r, "tensors": tuple(r["tensors"])}) for r in table["rows"]]
        defects = [Defect(**{**d, "values": tuple(d["values"])}) for d in table["defects"]]
        layers = {n: (v, tuple(kinds)) for n, (v, kinds) in table["layers"].items()}
        return cls(table["plan"], table["network"], table["context"], tuple(rows), layers,
                   tuple(defects))  # fmt: skip


# -- in words --------------------------------------------------------------------------------------


def summary(certificate: Certificate) -> str:
    """Return in one line for how many layers the directions' normalisation is justified.

    >>> rows = (Trial("0 -> 2", "neuron rescaling", 4, ("0.weight", "2.weight"), "exact"),)
    >>> layers = {"0.weight": ("followed", ()), "2.weight": ("not followed", ("neuron rescaling",))}
    >>> print(summary(Certificate("", "", {"normalize": "filter"}, rows, layers)))
    filter normalisation is justified for 1 of 2 layers: there it follows every rescaling that was \
found to leave the network unchanged; in 1 it does not follow neuron rescaling; gauge = "equi" would
    """
    rule = certificate.context.get("normalize", "filter")
    name = "unnormalised directions are" if rule == "none" else f"{rule} normalisation is"
    kinds = [v for v, _ in certificate.layers.values()]
    of = f"{len(kinds)} layer{'s' * (len(kinds) != 1)}"
    good = kinds.count("followed")
    text = f"{name} justified for {good} of {of}"
    if good:
        text += ": there it follows every rescaling that was found to leave the network unchanged"
    parts = []
    missed = dict.fromkeys(
        w for v, some in certificate.layers.values() if v == "not followed" for w in some
    )
    if missed:
        part = f"in {kinds.count('not followed')} it does not follow {_listed(missed)}"
        fixable = [w for w in missed if w in GAUGED]
        if fixable and certificate.context.get("gauge", "none") == "none":
            more = "" if len(fixable) == len(missed) else f" follow {_listed(fixable)}"
            part += f'; gauge = "equi" would{more}'
        parts.append(part)
    if "nothing to follow" in kinds:
        parts.append(
            f"in {kinds.count('nothing to follow')} no rescaling leaves the network unchanged, so "
            "there it is a choice of units and no invariance"
        )
    if "untested" in kinds:
        parts.append(f"{kinds.count('untested')} could not be tested")
    return "; ".join([text, *parts])


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def words(certificate: Certificate) -> str:
    """Return what a caption says: one clause; "" where no equivalent network was compared.

    >>> some = (Defect("neuron rescaling", 2, (2e-1, 3e-1)),)
    >>> words(Certificate("", "", {}, (), {}, some))
    'plane invariance defect 0.3 (neuron rescaling): an equivalent network gives another picture'
    """
    if not certificate.defects:
        return ""
    worst = max(certificate.defects, key=lambda d: d.largest)
    text = f"plane invariance defect {worst.largest:.2g} ({worst.transform})"
    if worst.largest > PASS:
        return f"{text}: an equivalent network gives another picture"
    return f"{text}: equivalent networks give this picture"


def conclusion(certificate: Certificate) -> list[str]:
    """Return what follows from the rows: for how many layers, and what the picture does."""
    c = certificate.context
    out = [LEGEND, "", *textwrap.wrap(summary(certificate), WIDTH, break_on_hyphens=False)]
    if not certificate.defects:
        why = c.get("not_compared") or "no rescaling was certified"
        return [*out, f"{why}, so no equivalent network was compared"]
    out += [
        "",
        *textwrap.wrap(
            f"plane invariance defect: max|ΔL| / range over {c['points']} points for "
            f"{c['elements']} random equivalent networks each ({c['samples']} {c['split']} "
            f"samples, {c['precision']}, batch norm {c['batch_norm']}; {PASS:g} passes)", WIDTH),
    ]  # fmt: skip
    kinds = max(len(d.transform) for d in certificate.defects)
    for d in certificate.defects:
        values = "  ".join("  not finite" if v is None else f"{v:.1e}" for v in d.values)
        passes = "passes" if d.largest <= PASS else "FAILS"
        out.append(f"  {d.transform:{kinds}}  in {d.groups} group{'s' * (d.groups > 1)}: "
                   f"{values}  {passes}")  # fmt: skip
    return out


def heading(width: int, kinds: int) -> str:
    """Return the heading of the table."""
    return (f"{'layer':{width}}  {'transform':{kinds}}  {'verdict':11}  {'c':>4}  {'error':>8}  "
            f"{'noise':>8}  {'gradient':>8}  {'float32':>8}")  # fmt: skip


def line(row: Trial, width: int, kinds: int) -> str:
    """Return one row of the table."""

    def number(value: float | None) -> str:
        return f"{'-':>8}" if value is None else f"{value:8.1e}"

    front = f"{row.layer:{width}}  {row.transform:{kinds}}  {row.verdict:11}"
    if row.verdict == "untested":
        return f"{front}  {row.note}"
    factor = "-" if row.factor is None else f"{row.factor:g}"
    return (f"{front}  {factor:>4}  {number(row.error)}  {number(row.noise)}  "
            f"{number(row.residual)}  {number(row.error32)}"
            + (f"  {row.note}" if row.note else ""))  # fmt: skip


# -- in the run ------------------------------------------------------------------------------------


def write(folder: RunFolder, certificate: Certificate) -> None:
    """Write the certificate of a run, over an older one."""
    folder.measures.mkdir(parents=True, exist_ok=True)
    write_whole(folder.invariance, sealed(certificate.as_json()))


def read(folder: RunFolder, plan: str) -> Certificate | None:
    """Return the certificate of a run, or None: there is none, or it is of another plan.

    Args:
        folder: the run.
        plan: its plan's digest.

    Raises:
        DamagedFile: it was altered.
    """
    if not there(folder.invariance):
        return None
    table = read_json(folder.invariance)
    if table.get("plan") != plan or table.get("schema") != SCHEMA:
        return None
    try:
        return Certificate.from_json(table)
    except (KeyError, TypeError, ValueError):
        raise DamagedFile(f"{folder.invariance} is not a certificate; make it again") from None


def notes(folder: RunFolder, plan: str) -> list[str]:
    """Return what a caption says of a run's certificate: nothing without one, or a damaged one.

    Args:
        folder: the run.
        plan: its plan's digest.
    """
    try:
        found = read(folder, plan)
    except LsweepError:  # `verify` names it; a picture can do without
        return []
    return [t for t in [words(found)] if t] if found else []


def invariance_measures(folder: RunFolder, plan: str) -> list[Measured]:
    """Return a run's certificate as numbers: nothing without one.

    ``plane_invariance_defect`` is max|ΔL| / range over random equivalent networks, in whole and for
    each kind of rescaling; ``layers_followed`` the share of weights whose directions follow every
    rescaling that was found.

    Args:
        folder: the run.
        plan: its plan's digest.
    """
    found = read(folder, plan)
    if found is None:
        return []
    context = dict(found.context)
    out = []
    if found.defect is not None:
        name = "plane_invariance_defect"
        worst = max(found.defects, key=lambda d: d.largest).transform
        out.append(Measured(name, found.defect, context=context, note=f"largest: {worst}"))
        out += [
            Measured(
                f"{name}@{slug(d.transform)}", d.largest, context={**context, "groups": d.groups}
            )
            for d in found.defects
        ]
    kinds = [v for v, _ in found.layers.values()]
    if kinds:
        share = kinds.count("followed") / len(kinds)
        few = f"{kinds.count('followed')} of {len(kinds)} layers; see 'lsweep invariance'"
        out.append(Measured("layers_followed", share, context=context, note=few))
    return out


def slug(words: str) -> str:
    """Return words as a part of a name, which holds no space and no comma.

    >>> slug("filter scale, statistics carried")
    'filter_scale_statistics_carried'
    """
    return re.sub(r"\W+", "_", words)
