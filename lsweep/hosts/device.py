"""Devices: which one a worker takes, what class of equal bits it belongs to, its memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from lsweep.errors import LsweepError
from lsweep.hosts import machine
from lsweep.wording import counted

# Environment variables by which libraries compute otherwise.
DECIDES = (
    "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip
# What they say where memory is too small for them.
EXHAUSTED = ("out of memory", "can't allocate memory", "_alloc_failed")


def choose_device(name: str, local: int = 0) -> torch.device:
    """Return the device called ``name``; ``auto`` is the GPU of this local rank, else the CPU.

    Raises:
        LsweepError: there is no such device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LsweepError(f"no device {name!r}: use cpu, cuda, cuda:N, mps or auto") from None
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local % max(1, gpus))
        if device.index >= gpus:
            raise LsweepError(f"no device {name!r}: torch sees {gpus} CUDA devices here")
    if device.type not in ("cpu", "cuda", "mps"):
        raise LsweepError(f"device {name!r} is not supported: use cpu, cuda, cuda:N, mps or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise LsweepError("no device 'mps' here")
    return device


def device_class(device: torch.device) -> str:
    """Return the name of the device class: equal names compute equal bits."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        # Libraries choose by the number of processors, a slice of a GPU has fewer.
        what = f"{p.name} sm{p.major}{p.minor} x{p.multi_processor_count} cuda {torch.version.cuda}"
        what += f" cudnn {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    else:
        # A backend may be compiled on the node: the compiler decides bits, too.
        compiler = machine.compiler() or "none"
        what = f"{machine.cpu_model()} threads {torch.get_num_threads()} compiler {compiler}"
    what += "".join(f" {v}={os.environ[v]}" for v in DECIDES if v in os.environ)
    text = f"{device.type} {what} torch {torch.__version__}"
    return f"{machine.slug(text)[:80]}-{machine.short_hash(text)}"


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        LsweepError: naming what to use instead.
    """
    if precision == "tf32" and device.type != "cuda":
        raise LsweepError(f'precision = "tf32" needs a CUDA device, not {device}: use float32')
    if precision == "float64" and device.type == "mps":
        raise LsweepError('precision = "float64" is not there on mps: use float32, or device cpu')


def human(device: torch.device) -> str:
    """Return a device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine.cpu_model()}, {counted(torch.get_num_threads(), 'thread')}"


def memory_used(device: torch.device) -> int:
    """Return the most memory that was in use so far, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return machine.peak_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """True for torch's out-of-memory errors on a GPU and on the host.

    >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."))
    True
    """
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in EXHAUSTED)
    )


def room(device: torch.device) -> float:
    """Return the bytes that tensors may take: free memory, and what torch keeps for reuse."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return float(machine.available_memory() or 2**30)


def synchronize(device: torch.device) -> None:
    """Wait until all that was started on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Spent(NamedTuple):
    """Seconds that work took.

    Attributes:
        wall: by the clock on the wall: what people wait for.
        busy: on one thread the processor's, so that a crowded node does not count: by these ways
            to compute the same are compared.
    """

    wall: float
    busy: float


def timed(device: torch.device, work: Callable[[], object]) -> Spent:
    """Return the seconds that ``work`` takes, the device synchronised on both sides.

    >>> slept = timed(torch.device("cpu"), lambda: time.sleep(0.01))
    >>> slept.wall >= 0.01, slept.wall >= slept.busy
    (True, True)
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    synchronize(device)
    start = time.perf_counter(), clock()
    work()
    synchronize(device)
    busy = clock() - start[1]
    return Spent(time.perf_counter() - start[0], busy)
