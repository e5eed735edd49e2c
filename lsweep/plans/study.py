"""Studies: a SWEEP that stands for several runs becomes a list of ordinary ones.

A sweep.toml with ``[study]`` is a run for each origin and seed, in one folder ``<stem>.study``. A
study may grow: siblings that are there already are resumed like any run. A folder that holds runs
stands for those. Commands go through them one by one; what is wrong with one stops no other.
"""

from __future__ import annotations

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsweep.errors import LsweepError
from lsweep.hosts.ranks import own_rank
from lsweep.plans.settings import Settings
from lsweep.storage.folder import RunFolder

INTERRUPTED = 130


@dataclass(frozen=True)
class Member:
    """One run of a study, planned or not.

    Attributes:
        name: of the run within the study.
        sweep: what to give to a command: the study's TOML, or the run.
        folder: the run.
        overrides: what it sets in the TOML.
    """

    name: str
    sweep: Path
    folder: Path
    overrides: tuple[str, ...] = ()


def members(
    sweep: Path, folder: Path | None = None, overrides: Sequence[str] = ()
) -> list[Member] | None:
    """Return the runs that a SWEEP stands for, or None where it is an ordinary one.

    Args:
        sweep: a sweep.toml, a run, or a folder of runs.
        folder: where the study of a TOML lies; by default ``<stem>.study`` beside it.
        overrides: ``KEY=VALUE`` for all of them; a sibling's own come after.

    Raises:
        LsweepError: the TOML is wrong.

    >>> members(Path("nowhere.toml"))
    """
    if sweep.is_dir():
        if RunFolder(sweep).exists:
            return None
        found = [p for p in sorted(sweep.glob("*.run")) if RunFolder(p).exists]
        return [Member(p.stem, p, p, tuple(overrides)) for p in found] or None
    if sweep.suffix != ".toml" or not sweep.is_file():
        return None
    settings = Settings.from_file(sweep, tuple(overrides))
    if settings.study is None:
        return None
    root = folder or sweep.with_name(f"{sweep.stem}.study")
    if RunFolder(root).exists:
        raise LsweepError(f"{root} is a run: a study is a folder of runs; give another --run")
    return [
        Member(s.name, sweep, root / f"{s.name}.run", (*overrides, *s.overrides))
        for s in settings.study.siblings(settings.directions["x"].seed)
    ]


def runs(path: Path) -> list[Path]:
    """Return the runs that are meant by a run, a surface file, a folder of runs or a study's TOML.

    >>> runs(Path("net.run"))
    [PosixPath('net.run')]
    """
    found = members(path)
    return [path] if found is None else [m.folder for m in found]


def through(command: Callable[[Namespace], int]) -> Callable[[Namespace], int]:
    """Return a command that takes a study too, and goes through its runs.

    The exit code is 0 if all ended with 0; else 1 if a run was refused, or the highest. Ctrl-C and
    a run that was interrupted end it at once.
    """

    def each(options: Namespace) -> int:
        if "sweep" in options and not _is_readable(options.sweep, options.overrides):
            return command(options)  # it refuses that itself, and once for all ranks
        if "sweep" in options:
            several = members(options.sweep, options.run, options.overrides)
        else:
            several = members(options.run)
        if several is None:
            return command(options)
        codes, whole = {}, options.run or options.sweep
        for i, member in enumerate(several):
            if getattr(options, "on", "") != "mpi" or own_rank().index == 0:
                data = getattr(options, "json", False) or getattr(options, "csv", False)
                print(f"[{i + 1}/{len(several)}] {member.name}", flush=True,
                      file=sys.stderr if data else sys.stdout)  # fmt: skip
            own = {"sweep": member.sweep, "run": member.folder, "overrides": [*member.overrides],
                   "then": whole if i + 1 == len(several) else None}  # fmt: skip
            code = _one(command, Namespace(**{**vars(options), **own}), member)
            if code == INTERRUPTED:
                return code
            if code:
                codes[member.name] = code
        if codes:
            print(f"lsweep: {len(codes)} of {len(several)} runs did not end well: "
                  f"{', '.join(codes)}", file=sys.stderr)  # fmt: skip
        return 0 if not codes else 1 if 1 in codes.values() else max(codes.values())

    return each


def _is_readable(sweep: Path, overrides: Sequence[str]) -> bool:
    try:
        return not sweep.is_file() or bool(Settings.from_file(sweep, tuple(overrides)))
    except LsweepError:
        return False


def _one(command: Callable[[Namespace], int], options: Namespace, member: Member) -> int:
    try:
        return command(options)
    except (LsweepError, OSError) as e:
        if options.verbose:
            traceback.print_exc()
        print(f"lsweep: {member.name}:", " ".join(str(e).splitlines()), file=sys.stderr)
        return e.exit_code if isinstance(e, LsweepError) else LsweepError.exit_code
