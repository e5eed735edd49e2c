"""C++ source as a loaded library, through a cache that nobody but its owner can write."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from lsweep.backends.tracing import Unsupported
from lsweep.wording import HERE

SECONDS = 60.0  # a compilation that takes longer is given up
FLAGS = (  # never -ffast-math: NaN and infinity must come through
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
    "-shared", "-fPIC", "-w",
)  # fmt: skip


def compiled(source: str) -> ctypes.CDLL:
    """Return C++ source as a loaded library, from the cache where it was compiled before.

    A library is code, so only one that nobody else could have written is loaded.

    Raises:
        Unsupported: there is no compiler, it fails, or the cache is not private.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise Unsupported(f"{HERE}there is no C++ compiler {compiler[0]!r}; CXX may name another")
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (home if home.is_absolute() else Path.home() / ".cache") / "lsweep" / "native"
    try:
        for folder in (cache.parent, cache):  # who may write the outer one may replace the inner
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_private(folder)
        # The macros that it defines tell its version, and what the processor can; not all flags.
        key = source + "".join(FLAGS) + _run([*compiler, *FLAGS, "-dM", "-E"], "")
        library = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if library.exists():
            _require_private(library)
            with contextlib.suppress(OSError):  # a damaged one is compiled again
                return ctypes.CDLL(str(library))
        with tempfile.TemporaryDirectory(dir=cache) as name:
            built = Path(name, "network.so")
            _run([*compiler, *FLAGS, "-o", str(built)], source)
            built.chmod(0o600)
            with built.open("rb") as f:
                os.fsync(f.fileno())
            built.replace(library)  # in one moment: another process may compile it, too
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise Unsupported(
            f"{HERE}the cache of native code in {cache} cannot be used ({e.strerror or e}): set "
            "XDG_CACHE_HOME to a folder of your own"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unsupported(f"{HERE}compiling it takes more than {SECONDS:.0f} s") from None


def _run(command: list[str], source: str) -> str:
    command = [*command, "-x", "c++", "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        told = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        error = next((line for line in told if "error" in line), told[-1])
        raise Unsupported(f"{command[0]} failed: {error[:160]}")
    return done.stdout


def _require_private(path: Path) -> None:
    found = path.lstat()  # of a link itself, which counts as what others may write
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Unsupported(f"{HERE}others could have written {path}: remove it")
