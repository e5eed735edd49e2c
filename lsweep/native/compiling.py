"""C++ source as a loaded library, through a cache that nobody but its owner can write."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from importlib import resources
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
    source = source.replace(
        '#include "native.h"', (resources.files("lsweep.native") / "native.h").read_text()
    )
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [source.encode(), version, _processor(), *map(str.encode, FLAGS)]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsweep" / "native"
    library = cache / f"{key}.so"
    try:
        for folder in (cache.parent, cache):  # who may write the outer one may replace the inner
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _private(folder, stat.S_IFDIR)
        if not library.exists():
            _compile(compiler, source, library)
        _private(library, stat.S_IFREG)
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise Unsupported(
            f"{HERE}the cache of native code in {cache} cannot be used ({e.strerror or e}): set "
            "XDG_CACHE_HOME to a folder of your own"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unsupported(f"{HERE}compiling it takes more than {SECONDS:.0f} s") from None


def _compile(compiler: str, source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        built = Path(name, "network.so")
        command = [compiler, *FLAGS, "-o", str(built), "-x", "c++", "-"]
        done = subprocess.run(
            command, input=source, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise Unsupported(f"{compiler} failed: {(errors or ['?'])[0][:160]}")
        built.chmod(0o600)
        built.replace(library)


def _private(path: Path, kind: int) -> None:
    found = path.lstat()
    ours = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    if not ours or stat.S_IFMT(found.st_mode) != kind:
        raise Unsupported(f"{HERE}others could have written {path}: remove it")


def _processor() -> bytes:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))})).encode()
