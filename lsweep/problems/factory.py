"""Factories: the one place where the user's code is imported and called."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lsweep.errors import LsweepError, nearest
from lsweep.hosts.machine import refuse_foreign
from lsweep.plans.settings import ProblemSource
from lsweep.storage.insist import insist, read


def factory_file(source: ProblemSource, base: Path) -> Path | None:
    """Return the file of a ``FILE.py:function`` factory, or None for an importable module."""
    where = source.factory.rpartition(":")[0]
    return base / where if where.endswith(".py") else None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file.

    Raises:
        LsweepError: it cannot be read.
    """
    try:
        return hashlib.sha256(read(path)).hexdigest()
    except OSError as e:
        raise LsweepError(f"cannot read {path}: {e.strerror}") from None


def call_factory(
    source: ProblemSource, base: Path | None = None, code: Path | None = None, trust: bool = False
) -> Any:
    """Call a factory, in the folder that its relative paths refer to, and return what it returns.

    Args:
        source: factory and options.
        base: the TOML's folder; the present one when None.
        code: a copy to import instead of the factory's own file.
        trust: import also what belongs to another user.

    Raises:
        LsweepError: the factory is missing or raises.
    """
    base = (base or Path()).absolute()
    where, _, name = source.factory.rpartition(":")
    file = code.absolute() if code else factory_file(source, base)
    if not insist(base.is_dir):
        raise LsweepError(f"the folder {base}, where this run was planned, is gone")
    with _inside(base):
        if file is None:
            _refuse_foreign_module(where, base, trust)
            module = _import(where)
        else:
            if not insist(file.is_file):
                raise LsweepError(f"no factory file at {file}")
            refuse_foreign(file, trust)
            module = _import_file(file, shown_as=base / Path(where))
        function = getattr(module, name, None)
        if not callable(function):
            own = {n: v for n, v in vars(module).items() if n[0] != "_" and callable(v)}
            functions = [
                n for n, v in own.items() if getattr(v, "__module__", "") == module.__name__
            ]
            raise LsweepError(f"{where} has no function {name!r}{nearest(name, functions)}")
        _check_options(source, function)
        try:
            return function(**source.options)
        except LsweepError:
            raise
        except (Exception, SystemExit) as e:  # a training script may call sys.exit
            raise LsweepError(f"the factory {source.factory} raised {describe(e)}") from e


def _check_options(source: ProblemSource, function: Callable[..., Any]) -> None:
    """Refuse options that the factory does not take, and the lack of those that it needs."""
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of what is written in C there is none
        return
    named = [p for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    valid = [p.name for p in named]
    for key in source.options:
        if key not in valid and all(p.kind is not p.VAR_KEYWORD for p in known):
            raise LsweepError(
                f"problem.options: {source.factory} takes no {key!r}{nearest(key, valid)}"
            )
    lacking = [p.name for p in named if p.default is p.empty and p.name not in source.options]
    if lacking:
        raise LsweepError(
            f"problem.options: {source.factory} needs {', '.join(lacking)}: write options = "
            f"{{ {lacking[0]} = … }}"
        )


def describe(error: BaseException) -> str:
    """Return ``Type: message (file:line)`` of an exception, in one line.

    >>> describe(ValueError("no"))
    'ValueError: no'
    """
    text = " ".join(str(error).split())[:300]
    if isinstance(error, RuntimeError) and "does not require grad" in text:
        text += ": where loss or forward takes derivatives, give lsweep.Problem(…, grad=True)"
    stack = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent.parent)
    frames = [f for f in stack if not f.filename.startswith(("<", own))]
    users = [f for f in frames if "site-packages" not in f.filename]
    at = f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{at}"


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Relative paths and sibling modules of the factory are those of the TOML's folder."""
    before, path = Path.cwd(), list(sys.path)
    insist(lambda: os.chdir(folder))
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        insist(lambda: os.chdir(before))
        # The folder stays importable: a network may import its siblings when it is first called.
        sys.path[:] = [*path, str(folder)] if str(folder) not in path else path


def _refuse_foreign_module(name: str, base: Path, trust: bool) -> None:
    # What lies beside the TOML; installed packages belong to whoever installed torch, too.
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = base.joinpath(*parts[:n])
        for file in (path / "__init__.py", Path(f"{path}.py")):
            refuse_foreign(file, trust)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        raise LsweepError(f"cannot import the factory's module {name}: {describe(e)}") from e


def _import_file(file: Path, shown_as: Path) -> ModuleType:
    # The module has the original's __file__, so that paths beside it are found from a copy too.
    name = f"lsweep_factory_{shown_as.stem}"
    module = ModuleType(name)
    module.__file__ = str(shown_as)
    sys.modules[name] = module
    try:
        code: Any = compile(read(file), str(shown_as), "exec")
        exec(code, module.__dict__)
    except (Exception, SystemExit) as e:
        raise LsweepError(f"cannot import the factory {shown_as.name}: {describe(e)}") from e
    return module
