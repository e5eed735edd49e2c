"""What this machine is and how its processes are told apart: CPUs, memory, host, liveness.

Two facts matter elsewhere: which device class computes (values are equal bit for bit within one),
and whether another process of the same host is alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
APART = 2**19  # bytes
GROWN = 2**25  # bytes: the most that glibc's own threshold becomes


def cpus() -> int:
    """Return how many CPUs this process may use, by affinity and cgroup quota.

    >>> cpus() >= 1
    True
    """
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    for quota in _cgroup_quotas():
        count = min(count, max(1, int(quota)))
    return max(1, count)


def _cgroup_quotas() -> list[float]:
    quotas = []
    with contextlib.suppress(OSError, ValueError):  # version 2
        own = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition(":")[2]
        for folder in (own, "/"):
            path = Path(f"/sys/fs/cgroup{folder}/cpu.max")
            if path.is_file():
                limit, period = path.read_text().split()
                if limit != "max":
                    quotas.append(int(limit) / int(period))
    with contextlib.suppress(OSError, ValueError):  # version 1
        folder1 = Path("/sys/fs/cgroup/cpu")
        limit1 = int((folder1 / "cpu.cfs_quota_us").read_text())
        if limit1 > 0:
            quotas.append(limit1 / int((folder1 / "cpu.cfs_period_us").read_text()))
    return quotas


def available_memory() -> int:
    """Return the bytes that this process may still allocate on the host, or 0 when unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(re.findall(r"MemAvailable:\s+(\d+)", text)[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            found.append(max(0, int(limit) - used))
    return min(found, default=0)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # getrusage begins with the parent's
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def trim_memory() -> None:
    """Give freed memory back to the system: glibc keeps what lies before a piece still in use.

    >>> trim_memory()
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def large_apart() -> Iterator[None]:
    """Keep what is large out of the heap meanwhile: let go of, it leaves no holes to be filled.

    glibc maps by themselves pieces above a threshold, which grows with those that are freed: so
    data would come to lie between leavings of loading, and later pieces touch all of them in turn.
    Afterwards the thresholds are those that glibc's would grow to, so that memory is used again.

    >>> with large_apart():
    ...     pass
    """
    if any(name.startswith("MALLOC_") for name in os.environ):  # somebody's own choice
        yield
        return
    _allot(M_MMAP_THRESHOLD, APART)
    try:
        yield
    finally:
        _allot(M_MMAP_THRESHOLD, GROWN)
        _allot(M_TRIM_THRESHOLD, 2 * GROWN)


def _allot(what: int, size: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(what, size)


def host_identity() -> str:
    """Return what processes on one host share: boot id and pid namespace.

    >>> host_identity() == host_identity()
    True
    """
    parts = [socket.gethostname()]
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        parts.append(f"{uuid.getnode():x}")
    return "/".join(parts)


def start_time(pid: int) -> str | None:
    """Return when a process of this host started, in the kernel's ticks, or None if it is gone.

    A zombie is gone; where there is no /proc, a living process answers "".

    >>> start_time(os.getpid()) is not None
    True
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return ""
        return ""
    return None if fields[0] in "ZX" else fields[19]


def cpu_model() -> str:
    """Return the CPU's name with the widest vector instructions it has."""
    name, wide = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        name = re.findall(r"model name\s*:\s*(.+)", text)[0]
        flags = re.findall(r"flags\s*:\s*(.+)", text)[0].split()
        wide = next((f for f in ("avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{name} {wide}".strip()


@functools.cache
def compiler() -> str:
    """Return what the C++ compiler says of itself, with its options, or "" where there is none.

    ``CXX`` names it, with options of its own, as for what is compiled here.
    """
    own = shlex.split(os.environ.get("CXX", ""))
    for command in [own] if own else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                done = subprocess.run(
                    [*command, "--version"], capture_output=True, text=True, timeout=20, check=True
                )
                return " ".join([done.stdout.partition("\n")[0].strip(), *command[1:]])
    return ""


def slug(text: str) -> str:
    """Return ``text`` as a file name of lower-case letters, digits and dashes.

    >>> slug("AMD EPYC (TM) avx2")
    'amd-epyc-tm-avx2'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def worker_name() -> str:
    """Return a name that no other worker has, ever: host, pid and 48 random bits."""
    host = slug(socket.gethostname())[:40] or "host"
    return f"{host}-{os.getpid()}-{uuid.uuid4().hex[:12]}"


def short_hash(text: str) -> str:
    """Return eight hexadecimal digits that tell ``text`` from others."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def refuse_foreign(path: Path, trust: bool) -> None:
    """Refuse to run code that another user put here.

    Raises:
        LsweepError: ``path`` belongs to another user and ``trust`` is False.
    """
    if trust or not hasattr(os, "geteuid"):
        return
    with contextlib.suppress(OSError):
        owner = path.stat().st_uid
        if owner != os.geteuid():
            raise LsweepError(
                f"{path} belongs to user {owner}, not to you: its code would run as you. Read it, "
                "then add --trust"
            )


def versions() -> dict[str, Any]:
    """Return the versions of what a value depends on, without importing torch."""
    from importlib import metadata

    names = ("lsweep", "torch", "numpy", "h5py")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "python": platform.python_version(), "platform": platform.platform()}
