"""C++ source as a loaded library, through a cache that nobody but its owner can write."""

from __future__ import annotations

import ctypes
import hashlib
import os
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
    named = os.environ.get("CXX", "c++")
    compiler = shutil.which(named)
    if compiler is None:
        told = f"CXX is {named!r}" if "CXX" in os.environ else "c++; CXX may name another"
        raise Unsupported(f"{HERE}there is no C++ compiler ({told})")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsweep" / "native"
    try:
        for folder in (cache.parent, cache):  # who may write the outer one may replace the inner
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The macros that it defines tell its version, and what the processor can.
        key = source + _run(compiler, "", "-dM", "-E")
        library = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=cache) as name:
                built = Path(name, "network.so")
                _run(compiler, source, "-o", str(built))
                built.chmod(0o600)
                built.replace(library)  # at once, if another process compiles it, too
        for path in (cache.parent, cache, library):
            found = path.lstat()  # of a link, which counts as one that others may write
            if found.st_uid != os.geteuid() or found.st_mode & 0o022:
                raise Unsupported(f"{HERE}others could have written {path}: remove it")
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise Unsupported(
            f"{HERE}the cache of native code in {cache} cannot be used ({e.strerror or e}): set "
            "XDG_CACHE_HOME to a folder of your own"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unsupported(f"{HERE}compiling it takes more than {SECONDS:.0f} s") from None


def _run(compiler: str, source: str, *more: str) -> str:
    command = [compiler, *FLAGS, *more, "-x", "c++", "-"]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Unsupported(f"{compiler} failed: {(errors or ['?'])[0][:160]}")
    return done.stdout
