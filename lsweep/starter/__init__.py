"""The starter: a sweep.toml and a problem.py that run as they are and are meant to be edited."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from lsweep.errors import LsweepError

FILES = ("sweep.toml", "problem.py")


def write_starter(folder: Path) -> list[Path]:
    """Write the starter's files; nothing that exists is overwritten.

    Raises:
        LsweepError: one of them exists already, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     [p.name for p in write_starter(Path(d))]
    ['sweep.toml', 'problem.py']
    """
    targets = [folder / name for name in FILES]
    for target in targets:
        if target.exists():
            raise LsweepError(f"{target} exists: give another folder, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets:
            text = (resources.files("lsweep.starter") / target.name).read_text(encoding="utf-8")
            target.write_text(text, encoding="utf-8")
    except OSError as e:
        raise LsweepError(f"cannot write in {folder}: {e.strerror}") from None
    return targets
