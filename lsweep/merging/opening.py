"""Opening a surface: from a run, complete or not, or from a file, without torch."""

from __future__ import annotations

import os
from pathlib import Path

from lsweep.errors import LsweepError
from lsweep.merging.merge import merge
from lsweep.storage.folder import RunFolder
from lsweep.surfaces.surface import Surface


def open_surface(path: str | os.PathLike[str]) -> Surface:
    """Open a run, complete or not, or a surface file.

    Raises:
        LsweepError: there is neither.

    >>> open_surface("nowhere.run")
    Traceback (most recent call last):
    lsweep.errors.LsweepError: no run and no surface at nowhere.run
    """
    p = Path(path)
    folder = RunFolder(p)
    if folder.exists:
        return merge(folder)[0]
    if not p.exists():
        raise LsweepError(f"no run and no surface at {p}")
    if p.is_dir():
        raise LsweepError(f"{p} is a folder without a plan.json: not a run")
    return Surface.load(p)
