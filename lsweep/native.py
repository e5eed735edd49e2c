"""A network compiled for this machine: one C++ function, built once and kept in a private cache.

Optional: where there is no compiler, or an operator is not known, it says so and others serve.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsweep.graph import Graph
from lsweep.lowering import Lowering
from lsweep.tracing import Unsupported

SECONDS = 60.0  # a compilation that takes longer is given up
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
         "-shared", "-fPIC", "-pthread", "-w")  # fmt: skip  # never -ffast-math: NaN must come through
LANES = 16  # at most


class NativeNetwork:
    """A network at the present weights, by native code.

    3 x 3 convolutions use Winograd's algorithm, which makes NaN of what overflows. So where
    anything that comes out is not finite, the batch is done again without it.

    Args:
        graph: the network.
        views: packed name -> float32 tensor; it is read at each call.
        example_inputs: a batch's inputs.
        device: must be a CPU.
        dtype: must be float32.
        threads: how many to use.

    Raises:
        Unsupported: no compiler, another machine or precision, an operator that is not known.
    """

    def __init__(
        self,
        graph: Graph,
        views: Mapping[str, Tensor],
        example_inputs: Any,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        if device.type != "cpu" or dtype != torch.float32:
            raise Unsupported(f"native code is for float32 on a CPU, not {dtype} on {device}")
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise Unsupported(f"native code is not made for {platform.machine()}")
        self._graph, self._views, self._threads = graph, views, threads
        values = [n.meta.get("val") for n in graph.module.graph.nodes if n.op == "call_function"]
        flat = all(not isinstance(v, Tensor) or v.dim() <= 2 for v in values)
        self._groups = 4 if flat else 1
        self._fast = _Function(Lowering(graph, self._groups, winograd=True), threads)
        self._careful: _Function | None = None if self._fast.packed.numel() else self._fast
        with torch.no_grad():
            self._width = tuple(
                graph.module(*views.values(), *graph.leaves(example_inputs)).shape[1:]
            )

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output at the present weights for a batch of any length."""
        weights = [self._views[n].detach().contiguous() for n in self._graph.names]
        leaves = [t.detach().contiguous() for t in self._graph.leaves(inputs)]
        out = torch.empty(len(leaves[0]) * self._fast.shape[0] // self._groups, *self._fast.shape[1:])
        if not self._fast(weights, leaves, out) and self._careful is not self._fast:
            if self._careful is None:
                self._careful = _Function(Lowering(self._graph, self._groups, False), self._threads)
            self._careful(weights, leaves, out)
        return out


class _Function:
    """Compiled source with the memory that it works in."""

    def __init__(self, lowered: Lowering, threads: int) -> None:
        self.threads, self.shape = threads, lowered.shape
        self.packed = torch.empty(lowered.packed)
        self.memory = torch.empty(lowered.memory * threads * LANES)
        self.constants = [t.contiguous() for t in lowered.constants]
        self.forward = compiled(lowered.text).forward

    def __call__(self, weights: list[Tensor], leaves: list[Tensor], out: Tensor) -> bool:
        """Write ``out``; return whether all of it is finite."""
        tensors = [*weights, *self.constants, *leaves]
        addresses = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
        scratch = (ctypes.c_void_p(t.data_ptr()) for t in (self.packed, self.memory))
        n = ctypes.c_long(len(out))
        pointer = ctypes.c_void_p(out.data_ptr())
        return bool(self.forward(addresses, pointer, n, *scratch, ctypes.c_int(self.threads)))


def compiled(source: str) -> ctypes.CDLL:
    """Return C++ source as a loaded library, from the cache where it was compiled before.

    A library is code, so only one that nobody else could have written is loaded.

    Raises:
        Unsupported: there is no compiler, it fails, or the cache is not private.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise Unsupported("there is no C++ compiler (c++, or what CXX names)")
    header = resources.files("lsweep") / "native.h"
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [source.encode(), header.read_bytes(), version, _processor(), *map(str.encode, FLAGS)]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsweep" / "native"
    library = cache / f"{key}.so"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _private(cache, stat.S_ISDIR)
        if not library.exists():
            _compile(compiler, source, header.read_text(), library)
        _private(library, stat.S_ISREG)
        return ctypes.CDLL(str(library))
    except OSError as e:
        raise Unsupported(f"the cache of native code cannot be used: {e}") from None


def _compile(compiler: str, source: str, header: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        (folder / "native.h").write_text(header)
        (folder / "network.cpp").write_text(source)
        command = [compiler, *FLAGS, "-o", "network.so", "network.cpp"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise Unsupported(f"compiling it takes more than {SECONDS:.0f} s") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise Unsupported(f"{compiler} failed: {(errors or ['?'])[0][:160]}")
        (folder / "network.so").chmod(0o600)
        (folder / "network.so").replace(library)


def _private(path: Path, kind: Any) -> None:
    found = path.lstat()
    if not kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise Unsupported(f"others could have written {path}: remove it")


def _processor() -> bytes:
    """Return what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({x for x in lines if x.startswith(("model name", "flags"))})).encode()
