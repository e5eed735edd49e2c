"""Scientific: the one place that imports scipy, which only `lsweep[measure]` brings."""

from __future__ import annotations

import importlib
from typing import Any

from lsweep.errors import LsweepError


def scipy(part: str, what: str = "") -> Any:
    """Return a module of scipy.

    Args:
        part: its name below ``scipy``, such as ``sparse.linalg``.
        what: needs it, to begin the message.

    Raises:
        LsweepError: scipy is not installed.

    >>> scipy("special").comb(4, 2, exact=True)
    6
    """
    try:
        return importlib.import_module(f"scipy.{part}")
    except ImportError:
        words = f"{what} needs scipy: pip install 'lsweep[measure]'".strip()
        raise LsweepError(words) from None
