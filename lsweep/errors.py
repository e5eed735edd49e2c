"""The errors that lsweep raises on purpose: one line with what, where, the limit, the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LsweepError(Exception):
    """A mistake that the user can mend; the command line prints it as one line and exits 1.

    >>> raise LsweepError("grid.x.count = 1: needs at least 2")
    Traceback (most recent call last):
    lsweep.errors.LsweepError: grid.x.count = 1: needs at least 2
    """

    exit_code = 1


class DamagedFile(LsweepError):
    """A file of a run or a surface that is truncated, altered or not what its name says."""


class PlanChanged(LsweepError):
    """A run whose frozen plan is another one; ``field`` names the first difference."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class SickDevice(LsweepError):
    """A device that no longer gives its own value at the centre; its worker stops with exit 3."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` or the list of valid names, to end an error message.

    >>> nearest("cuont", ["count", "range"])
    "; did you mean 'count'?"
    >>> nearest("zzz", ["count", "range"])
    '; one of: count, range'
    """
    names = list(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of: {', '.join(names)}" if names else ""
