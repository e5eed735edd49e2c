"""Taking over a live network and giving it back: tensors, modes, generators, numerics."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OWN = ("_parameters", "_buffers", "_modules")  # of a module's attributes: no plain ones


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Give back every tensor, gradient, flag and attribute of the model, whatever happens.

    Attributes too: many networks cache a mask or a table, in the precision of their last call. So
    do dicts and lists that hold such, and tables that a call fills.
    """
    tensors = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    modules = [(m, dict(m._buffers), dict(m.__dict__)) for m in model.modules()]
    filled = [v for m in model.modules() for v in _filled(m)]
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
        for held, content in filled:
            if isinstance(held, dict):
                held.clear()
                held.update(content)
            elif isinstance(held, list):
                held[:] = content
            elif held.shape == content.shape and not torch.equal(held, content):
                held.detach().copy_(content)


def _filled(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield what a call may fill, dicts, lists and tensors of plain attributes, with a copy."""
    for value in kept_by(module).values():
        if isinstance(value, dict):
            yield value, dict(value)
        elif isinstance(value, list):
            yield value, list(value)
        elif isinstance(value, Tensor) and not value.is_meta:
            yield value, value.detach().clone()


def kept_by(module: nn.Module) -> dict[str, Any]:
    """Return the values of a module's plain attributes by name, what dicts and lists hold, too.

    >>> module = nn.Identity()
    >>> module.cache = {"a": [1]}
    >>> {name: v for name, v in kept_by(module).items() if name.startswith("cache")}
    {'cache': {'a': [1]}, 'cache.a': [1], 'cache.a.0': 1}
    """
    out: dict[str, Any] = {}
    waiting = [(k, v) for k, v in module.__dict__.items() if k not in OWN]
    containers: set[int] = set()  # one may hold itself
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, nn.Parameter) or id(value) in containers:
            continue
        out[name] = value
        if isinstance(value, dict | list | tuple):
            containers.add(id(value))
            held = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{k}", v) for k, v in held]
    return out


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
