"""Residence: data that a node's workers keep in memory is there once, in a file they all map.

The first worker of a node writes each split, as it is evaluated, to a file in the node's temporary
folder; the others map it, privately, and let go of their own. Read by a `Dataset` with transforms,
the data is so read once for a node. The last worker out removes the file, by a lock that death
frees too; what a killed one left is used by the next worker of its plan, or removed by that of
another. Whatever goes wrong, a worker keeps its own copy, as it does of small data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lsweep.hosts import machine
from lsweep.hosts.startup import node_local, turn
from lsweep.plans.plan import Plan
from lsweep.problems.data import Batch, Split, map_tensors, moved, tensors_of
from lsweep.problems.problem import Problem
from lsweep.problems.takeover import generators_kept

try:
    import fcntl
except ImportError:  # not a Unix: nobody shares
    fcntl = None  # type: ignore[assignment]

SMALLEST = 2**23  # bytes: less is not worth a file
SHARE = 0.5  # of the free memory, and of the free disk, that a file may take
HEADER = 4096  # bytes; every tensor begins on as many
PIECE = 2**24  # bytes written at once
PATIENCE = 1800.0  # seconds; who waits would otherwise read as long
HOST = torch.device("cpu")


@contextlib.contextmanager
def resident(problem: Problem, plan: Plan, workers: int) -> Iterator[Problem]:
    """Yield the problem with its data in files that this node's workers share, where that pays.

    Args:
        problem: this process's own, that nobody else holds: its own copy of the data is let go of.
        plan: the run's; files are told apart by its digest.
        workers: how many work on the run; one alone shares nothing.
    """
    with contextlib.ExitStack() as stack:
        if workers > 1 and fcntl is not None:
            problem = _moved_out(problem, plan, stack)
        yield problem


def _moved_out(problem: Problem, plan: Plan, stack: contextlib.ExitStack) -> Problem:
    dtype = torch.float64 if plan.evaluate["precision"] == "float64" else torch.float32
    data = dict(problem.data)
    for name in plan.evaluate["splits"]:
        with contextlib.suppress(Exception), generators_kept():  # then it keeps its own copy
            if _is_worth_it(problem.splits[name]):
                file = _File(problem.splits[name], plan, dtype)
                stack.callback(_leave, file.fd, file.path)
                data[name] = file.split()
    return dataclasses.replace(problem, data=data)


def _is_worth_it(split: Split) -> bool:
    if split.samples is None or not _is_all_tensors(next(split.batches(1))):
        return False  # batches of its own may have any shape
    free = machine.available_memory() or 2**62
    return SMALLEST <= split.bytes <= SHARE * free


def _is_all_tensors(batch: Batch) -> bool:
    if isinstance(batch, Tensor):
        return batch.device == HOST and batch.is_contiguous() and batch.numel() > 0
    if isinstance(batch, Mapping):
        return all(_is_all_tensors(b) for b in batch.values())
    return isinstance(batch, list | tuple) and all(_is_all_tensors(b) for b in batch)


class _Unfit(Exception):
    """The file is not there, is going, or holds something else."""


def _leave(fd: int, path: Path) -> None:
    """Let go of a file; the last one removes it."""
    if fd < 0:
        return
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no other holds it
        if _is_same(fd, path):
            path.unlink()
    os.close(fd)


class _File:
    """One split's file, held by a shared lock on ``fd``.

    Raises:
        OSError: there is no room, or the folder takes no file.
        _Unfit: another worker has not written it in time.
    """

    def __init__(self, split: Split, plan: Plan, dtype: torch.dtype) -> None:
        self._own, self._dtype = split, dtype
        words = (plan.digest, split.name, str(dtype), machine.host_identity())
        self._key = hashlib.sha256("\0".join(words).encode()).hexdigest()
        self.path = node_local(self._key, "data")
        self.fd = -1
        with turn(f"data {self._key}", PATIENCE) as alone:
            try:
                self._open()
            except (_Unfit, OSError, ValueError, KeyError):
                _leave(self.fd, self.path)
                if not alone:
                    raise
                self._write()

    def split(self) -> Split:
        """Return the split whose samples are in the file."""
        return self._own.residing(self._mapped(), self._header["digest"])

    # -- reading ----------------------------------------------------------------------------------

    def _open(self) -> None:
        # Another user's file of that name, or a link, is not followed.
        self.fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        found = os.fstat(self.fd)
        mine = found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077
        if not mine or not _is_same(self.fd, self.path):
            raise _Unfit
        self._header: dict[str, Any] = json.loads(os.pread(self.fd, HEADER, 0))
        if self._header["key"] != self._key:
            raise _Unfit
        if found.st_size != self._header["size"] or not self._holds_own_data():
            self.path.unlink()
            raise _Unfit

    def _mapped(self) -> Batch:
        """Return the data as one batch of all samples, in the structure of the split's own."""
        memory = mmap.mmap(self.fd, self._header["size"], access=mmap.ACCESS_COPY)
        leaves = iter(self._header["leaves"])

        def leaf(own: Tensor) -> Tensor:
            fact = next(leaves)
            dtype = moved(own, HOST, self._dtype).dtype
            shape = (self._header["samples"], *own.shape[1:])
            if fact["shape"] != list(shape) or fact["dtype"] != str(dtype):
                raise _Unfit
            count = own[0].numel() * shape[0]
            return torch.frombuffer(memory, dtype=dtype, count=count, offset=fact["at"]).view(shape)

        return map_tensors(next(self._own.batches(1)), leaf)

    def _holds_own_data(self) -> bool:
        there = tensors_of(self._mapped())
        return all(
            _equal(a[i : i + 1], moved(b, HOST, self._dtype))
            for i, sample in self._own.probes()
            for a, b in zip(there, tensors_of(sample), strict=True)
        )

    # -- writing ----------------------------------------------------------------------------------

    def _write(self) -> None:
        """Write the file under another name, then link it: it is whole from its first moment."""
        _sweep(self.path.parent)
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(scratch, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            self._fill(fd)
            os.link(scratch, self.path)
            self._open()
        finally:
            scratch.unlink(missing_ok=True)
            os.close(fd)

    def _fill(self, fd: int) -> None:
        own, samples = self._own, self._own.samples
        assert samples is not None
        first = [moved(t, HOST, self._dtype) for t in tensors_of(next(own.batches(1)))]
        leaves, at = [], HEADER
        for t in first:
            fact = {"dtype": str(t.dtype), "shape": [samples, *t.shape[1:]], "at": at}
            leaves.append(fact)
            at += -(-samples * t.numel() * t.element_size() // HEADER) * HEADER
        free = os.fstatvfs(fd)
        if at > SHARE * free.f_bavail * free.f_frsize:
            raise _Unfit
        os.posix_fallocate(fd, 0, at)
        size = max(1, PIECE // max(1, int(own.bytes / samples)))
        done = 0
        for batch in own.batches(size):
            tensors = [moved(t, HOST, self._dtype) for t in tensors_of(batch)]
            for t, like, fact in zip(tensors, first, leaves, strict=True):
                if t.shape[1:] != like.shape[1:] or t.dtype != like.dtype:
                    raise _Unfit
                one = like.numel() * like.element_size()
                _write_all(fd, t, int(str(fact["at"])) + done * one)
            done += len(tensors[0])
        header = {"key": self._key, "samples": samples, "size": at, "leaves": leaves}
        header["digest"] = "" if isinstance(own.data, Dataset) else own.full_digest(size)
        text = json.dumps(header).encode()
        if len(text) > HEADER or done != samples:
            raise _Unfit
        os.pwrite(fd, text.ljust(HEADER), 0)


def _write_all(fd: int, t: Tensor, at: int) -> None:
    array: npt.NDArray[np.uint8] = t.detach().contiguous().flatten().view(torch.uint8).numpy()
    view = array.data
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _is_same(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), path.stat(follow_symlinks=False))


def _sweep(folder: Path) -> None:
    """Remove files that nobody holds: their workers were killed."""
    for path in folder.glob(f"lsweep-{os.getuid()}-*.data*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
