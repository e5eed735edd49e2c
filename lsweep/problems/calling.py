"""Calling: how a batch becomes a call of the network and of the loss, and what to say if it fails.

The last of a tuple is the target, or the first of `TARGETS` in a dict; the network takes the rest,
by position or by name. Of an output that has logits the loss takes those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsweep.errors import LsweepError
from lsweep.problems.data import Batch, tensors_of

TARGETS = ("labels", "label", "targets", "target", "y")


def split_batch(batch: Batch) -> tuple[Any, Any]:
    """Return inputs and target of a batch: the last of a tuple, or ``labels`` of a dict.

    >>> split_batch({"x": 1, "labels": 2})
    ({'x': 1}, 2)
    """
    if isinstance(batch, Mapping):
        for key in TARGETS:
            if key in batch:
                return {k: v for k, v in batch.items() if k != key}, batch[key]
        raise LsweepError(
            f"a dict batch with keys {', '.join(batch)} has no target: the loss compares with "
            f"{', '.join(TARGETS[:-1])} or {TARGETS[-1]}, the network takes the other keys as its "
            "arguments; name one so, or give forward=…"
        )
    if isinstance(batch, list | tuple) and len(batch) >= 2:
        return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]
    raise LsweepError(
        f"a batch of type {type(batch).__name__} is neither (input, target) nor a dict with a "
        "target, which the loss compares the network's output with: give (x, y), (x, x) for an "
        "autoencoder (a list is a list of batches), or forward=…"
    )


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Run a network on a tensor, a tuple or a dict of inputs; return its logits or output."""
    return logits_of(_run(model, inputs))


def _run(model: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def logits_of(output: Any) -> Any:
    """Return what a network that returns several things has to say: its logits, or all of it.

    >>> logits_of({"logits": 1, "hidden": 2}), logits_of(3)
    (1, 3)
    """
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    return getattr(output, "logits", output)


def full(output: Any) -> Any:
    """Return a network's output in float32 or better, as a loss needs it.

    >>> full(torch.zeros(1, dtype=torch.bfloat16)).dtype, full(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)
    """
    if type(output) in (tuple, list):
        return type(output)(full(o) for o in output)
    if isinstance(output, Tensor) and output.dtype in (torch.float16, torch.bfloat16):
        return output.float()
    return output


def account(model: nn.Module, batch: Batch, calls: bool) -> str:
    """Return what a batch is and how it is given to network and loss, to end an error's message.

    Args:
        model: whose call or whose loss failed on the batch.
        batch: on its device.
        calls: False where a forward of the user's own is what calls.

    >>> account(nn.Linear(4, 3), {"x": torch.zeros(2, 4), "labels": torch.zeros(2)}, True)
    "the batch is x (2, 4) float32, labels (2,) float32, the call loss(model(x=…), labels): give \
the arguments of the network's forward(input) under their names, or forward=…"
    """
    if isinstance(batch, Mapping):
        shown = ", ".join(f"{k} {_shapes(v)}" for k, v in batch.items())
    else:
        shown = _shapes(batch)
    if not calls:
        return f"the batch is {shown}"
    inputs, _ = split_batch(batch)
    if isinstance(batch, Mapping):
        target, given = next(t for t in TARGETS if t in batch), ", ".join(f"{k}=…" for k in inputs)
    else:
        last = len(batch) - 1
        target, given = f"batch[{last}]", ", ".join(f"batch[{i}]" for i in range(last))
        if last == 1:
            given = "**" * isinstance(inputs, Mapping) + "*" * isinstance(inputs, tuple) + given
    said = f"the batch is {shown}, the call loss(model({given}), {target})"
    if not _takes(model, inputs):
        names = ", ".join(inspect.signature(model.forward).parameters)
        named = " under their names" * isinstance(inputs, Mapping)
        return f"{said}: give the arguments of the network's forward({names}){named}, or forward=…"
    try:
        with torch.no_grad():
            output = _run(model, inputs)
    except Exception:
        return said
    logits = logits_of(output)
    if logits is not output:
        return (
            f"{said}, where the loss takes the logits {_shapes(logits)} alone: for more of the "
            "output give forward=…, such as lsweep.causal_lm"
        )
    if isinstance(output, Tensor):
        return f"{said}, of output {_shapes(output)}"
    keys = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return (
        f"{said}, where the network returns a {type(output).__name__}{keys}: a loss of torch takes "
        "a tensor; return one, or give a loss or forward=… that takes what it needs"
    )


def _takes(model: nn.Module, inputs: Any) -> bool:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return True
    try:
        if isinstance(inputs, Mapping):
            signature.bind(**inputs)
        else:
            signature.bind(*(inputs if type(inputs) is tuple else (inputs,)))
    except TypeError:
        return False
    return True


def _shapes(value: Any) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in tensors_of(value))
