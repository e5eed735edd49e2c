"""Taking over a live network and giving it back: tensors, modes, generators, numerics."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Give back every tensor, gradient, flag and attribute of the model, whatever happens.

    Attributes too: many networks cache a mask or a table, in the precision of their last call.
    """
    tensors = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    modules = [(m, dict(m._buffers), dict(m.__dict__)) for m in model.modules()]
    for p, *_ in tensors:
        p.grad = None  # a loss that calls backward() must not add to it
    try:
        yield
    finally:
        for p, data, grad, requires_grad in tensors:
            p.grad = None
            p.data = data
            p.grad = grad
            p.requires_grad_(requires_grad)
        for m, buffers, attributes in modules:
            m._buffers.update(buffers)
            m.__dict__.clear()
            m.__dict__.update(attributes)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Give back the state of every global random generator."""
    python, state, numpy_state = random.getstate(), torch.get_rng_state(), np.random.get_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = torch.cuda.get_rng_state_all() if started else []
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(state)
        np.random.set_state(numpy_state)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


@contextlib.contextmanager
def numerics(device: torch.device) -> Iterator[None]:
    """Fix what decides the last bits on a GPU: no algorithm chosen by timing, sums in one order.

    What torch cannot compute in one order it says in a warning. The GPU is the current one, too:
    streams, graphs and kernels made while running ask for that instead of looking at tensors.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    ordered = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.cuda.device(device):
        cudnn.benchmark, cudnn.deterministic = False, True
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
            torch.use_deterministic_algorithms(ordered, warn_only=warns)
            cudnn.benchmark, cudnn.deterministic = before


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Let products of float32 be float32 in every library, or tf32 on a GPU; give it back after.

    A user's code may have chosen less in either of torch's two ways. The older cannot be read
    where the newer (torch 2.9) has spoken, and does not overrule it; so both are set.

    >>> torch.set_float32_matmul_precision("medium")
    >>> with products(tf32=False):
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'medium'
    >>> torch.set_float32_matmul_precision("highest")
    """
    backends: Any = torch.backends
    newer: list[Any] = []
    if hasattr(backends.cudnn, "conv"):
        gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        newer = [*gpu, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
    linear: str | None = None
    convolution: bool | None = None
    with contextlib.suppress(RuntimeError):
        linear = torch.get_float32_matmul_precision()
    with contextlib.suppress(RuntimeError):
        convolution = backends.cudnn.allow_tf32
    before = [n.fp32_precision for n in newer]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    backends.cudnn.allow_tf32 = tf32
    for k, n in enumerate(newer):
        n.fp32_precision = "tf32" if tf32 and k < 3 else "ieee"
    try:
        yield
    finally:
        if linear is not None:
            torch.set_float32_matmul_precision(linear)
        if convolution is not None:
            backends.cudnn.allow_tf32 = convolution
        for n, was in zip(newer, before, strict=True):
            n.fp32_precision = was
