"""A measured number: its value, its standard error, and all that one must know to read it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lsweep.storage.tables import plain

SCHEMA = 1
REPLICATES = ("samples", "directions", "probes", "start vectors", "training seeds")


@dataclass(frozen=True)
class Measured:
    """One number of a run.

    Attributes:
        name: unique within a run; what it is a member of stands before an ``@``:
            ``sharpness@0.5`` is the sharpness at radius 0.5.
        value: the number.
        se: one standard error, or None where nothing was repeated.
        replicate: of what ``se`` is the error: one of `REPLICATES`, or "".
        context: ``samples``, ``seed``, ``radius``, ``normalize``, ``batch_norm``, ``train_loss``,
            ``replicates`` (how many), ``doubtful`` (only where it is, see the note), ….
        note: what did not converge, what it was computed from.

    >>> m = Measured("sharpness@0.5", 0.25, 0.0125, "directions", {"radius": 0.5})
    >>> m.family, m.text
    ('sharpness', '0.25 ± 0.013')
    >>> Measured.of(m.as_json()) == m
    True
    """

    name: str
    value: float
    se: float | None = None
    replicate: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if self.replicate not in ("", *REPLICATES):
            raise ValueError(f"replicate = {self.replicate!r}: one of {', '.join(REPLICATES)}")
        if self.se is not None and not self.replicate:
            raise ValueError(f"{self.name}: a standard error names its replicate")

    @property
    def family(self) -> str:
        """The name without what follows ``@``."""
        return self.name.partition("@")[0]

    @property
    def doubtful(self) -> bool:
        """Whether it did not converge, or lies within its own error; the note says which."""
        return bool(self.context.get("doubtful", False))

    @property
    def text(self) -> str:
        """Value and standard error for people, the error with two digits."""
        if self.se is None or not math.isfinite(self.se) or not math.isfinite(self.value):
            return f"{self.value:.6g}"
        digits = 6
        if self.se > 0 and self.value:
            gap = math.floor(math.log10(abs(self.value))) - math.floor(math.log10(self.se))
            digits = min(12, max(2, gap + 2))
        return f"{self.value:.{digits}g} ± {self.se:.2g}"

    def as_json(self) -> dict[str, Any]:
        """Return plain values; what is not finite becomes "nan", "inf" or "-inf"."""
        return {
            "name": self.name,
            "value": jsonable(float(self.value)),
            "se": None if self.se is None else jsonable(float(self.se)),
            "replicate": self.replicate,
            "context": jsonable(plain(dict(self.context))),
            "note": self.note,
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Measured:
        """Return what `as_json` was made from.

        Raises:
            KeyError: or TypeError, ValueError: it was not.
        """
        se = table["se"]
        return cls(
            str(table["name"]),
            float(table["value"]),
            None if se is None else float(se),
            str(table["replicate"]),
            dict(table["context"]),
            str(table["note"]),
        )


def jsonable(value: Any) -> Any:
    """Return plain values as JSON takes them: what is not finite as text.

    >>> jsonable({"a": [1.0, math.inf]})
    {'a': [1.0, 'inf']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


def mean_of(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of independent values and its standard error, s/√n; None for n = 1.

    >>> mean_of([1.0, 3.0])
    (2.0, 1.0)
    >>> mean_of([2.0])
    (2.0, None)
    """
    n = len(values)
    if not n:
        return math.nan, None
    mean = math.fsum(values) / n
    if n == 1:
        return mean, None
    if not math.isfinite(mean):
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def as_table(run: str, plan: str, rows: Iterable[Measured]) -> dict[str, Any]:
    """Return what ``measures.json`` holds.

    Args:
        run: the path of the run.
        plan: the digest of its plan.
        rows: the numbers.
    """
    return {
        "schema": SCHEMA,
        "run": run,
        "plan": plan,
        "measures": [row.as_json() for row in rows],
    }
