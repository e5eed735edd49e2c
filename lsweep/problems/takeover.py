"""Taking over a live network and giving it back: tensors, modes, generators, numerics."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

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
def numerics(device: torch.device, tf32: bool) -> Iterator[None]:
    """Fix what decides the last bits on a GPU: no silent tf32, no algorithm chosen by timing."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = (torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark)
    deterministic = cudnn.deterministic
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = tf32, False, True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.benchmark = before[1:]
        cudnn.deterministic = deterministic
