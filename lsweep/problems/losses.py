"""From a loss to per-sample values with true weights, so that Σwv/Σw is the mean it stands for."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lsweep.errors import LsweepError

Values = Tensor | tuple[Tensor, Tensor]
"""Per-sample values, or (values, weights), or one scalar: the mean of an opaque loss."""

NARROW = 32  # classes

_MODULES: dict[Any, type[nn.Module]] = {
    nn.functional.cross_entropy: nn.CrossEntropyLoss,
    nn.functional.nll_loss: nn.NLLLoss,
}


def per_sample(loss: Callable[..., Any]) -> Callable[[Any, Any], Values]:
    """Return ``f(output, target) -> values | (values, weights)`` for a loss.

    A torch loss with ``reduction="mean"`` is run as ``"none"``; class weights and ignored labels
    become weights, so that Σwv/Σw over all samples equals the mean over one large batch. Any other
    callable is used as it is.

    Raises:
        LsweepError: the loss has ``reduction="sum"``, which is no mean.

    >>> f = per_sample(nn.CrossEntropyLoss(ignore_index=0))
    >>> f(torch.zeros(2, 4), torch.tensor([0, 3]))[1]
    tensor([0., 1.])
    """
    loss = _as_module(loss)
    reduction = _reduction(loss)
    if reduction == "sum":
        name = getattr(loss, "__name__", type(loss).__name__)
        raise LsweepError(f'{name}(reduction="sum") is not a mean over samples: use "mean"')
    smooth = isinstance(loss, nn.CrossEntropyLoss) and loss.label_smoothing > 0
    if smooth and loss.weight is not None and not loss.weight.all():  # type: ignore[attr-defined]
        raise LsweepError(
            "label smoothing with a class of weight 0 is no mean over samples: samples of that "
            "class have a loss but no weight"
        )
    if isinstance(loss, nn.Module) and reduction is not None:
        single = copy.deepcopy(loss)
        single.reduction = "none"  # type: ignore[assignment]
        if isinstance(single, nn.CrossEntropyLoss | nn.NLLLoss):
            return functools.partial(_class_loss, single)
        return functools.partial(element_loss, single, reduction == "batchmean")
    if reduction == "mean":
        return functools.partial(element_loss, functools.partial(loss, reduction="none"), False)
    return loss


def ignored_label(function: Callable[..., Any]) -> int | None:
    """Return which label a per-sample loss ignores; None unless it is classes' cross-entropy.

    >>> ignored_label(per_sample(nn.CrossEntropyLoss())), ignored_label(per_sample(nn.MSELoss()))
    (-100, None)
    """
    if not isinstance(function, functools.partial) or function.func is not _class_loss:
        return None
    (loss,) = function.args
    plain = type(loss) is nn.CrossEntropyLoss and loss.weight is None and not loss.label_smoothing
    return int(loss.ignore_index) if plain else None


def whole(loss: Callable[..., Any], output: Any, target: Any) -> Any:
    """Return the loss as it was given; its class weights take the output's device and precision.

    >>> float(whole(nn.MSELoss(), torch.ones(2), torch.zeros(2)))
    1.0
    """
    loss = _as_module(loss)
    if not isinstance(loss, nn.Module) or not isinstance(output, Tensor):
        return loss(output, target)
    state = {n: t.to(output) for n, t in loss.state_dict().items() if t.is_floating_point()}
    if not state:
        return loss(output, target)
    return functional_call(loss, state, (output, target), tie_weights=False)


def _as_module(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class loss in its functional form as the module: that shows its weights."""
    function, options = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, options = loss.func, loss.keywords
    known = isinstance(function, FunctionType) and function in _MODULES
    return _MODULES[function](**options) if known else loss


def _reduction(loss: Callable[..., Any]) -> str | None:
    if isinstance(loss, nn.Module):
        return getattr(loss, "reduction", None)
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):
        return None
    return parameter.default if parameter and isinstance(parameter.default, str) else None


def _class_loss(loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor) -> Values:
    if isinstance(output, Tensor):
        loss.to(output.device)  # its class weights; our own copy, and only once
    if _is_narrow(output, target):
        values = whole(loss, output.T[None], target[None])[0]
    else:
        values = whole(loss, output, target)
    # [B] or [B, positions...], already times the class weight
    if target.is_floating_point():  # class probabilities: torch divides by the batch size
        weights = torch.ones_like(values)
    else:
        kept = target != loss.ignore_index
        weights = kept.to(values.dtype)
        if loss.weight is not None:
            weights = weights * loss.weight.to(values)[torch.where(kept, target, 0)]
            values = torch.where(weights > 0, values / weights.clamp_min(1e-45), 0.0)
    return flatten(values, weights)


def _is_narrow(output: Any, target: Tensor) -> bool:
    """True for few classes on a CPU: torch is many times faster with samples in the last dimension.

    There it takes them as positions of one sample; along a short row it uses no vector.
    """
    return (
        isinstance(output, Tensor)
        and output.device.type == "cpu"
        and output.dim() == 2
        and output.shape[1] <= NARROW
        and target.dim() == 1
    )


def element_loss(loss: Callable[..., Tensor], batchmean: bool, output: Any, target: Any) -> Values:
    """Return a loss that has a value for each element as one for each sample."""
    values: Tensor = whole(loss, output, target)
    if batchmean:
        return values.flatten(1).sum(1)
    return flatten(values, None)


def flatten(values: Tensor, weights: Tensor | None) -> Values:
    """Reduce [B, ...] to one weighted mean per sample, [B], its weight the sum of the weights.

    >>> flatten(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 3.0]]))
    (tensor([2.5000]), tensor([4.]))
    """
    if values.dim() <= 1:
        return values if weights is None else (values, weights)
    v = values.flatten(1)
    w = torch.ones_like(v) if weights is None else weights.expand_as(values).flatten(1)
    total = w.sum(1)
    mean = torch.where(w != 0, w * v, 0.0).sum(1) / torch.where(total == 0, 1.0, total)
    return mean, total


def accuracy(output: Tensor, target: Tensor) -> Values:
    """Return 0 or 100 per sample: per cent correct; labels that are no class have no weight.

    Such are -100 and, of C classes, 255 where it stands for "ignore".

    Args:
        output: logits [B, C] or [B, C, positions...].
        target: classes [B] or [B, positions...], integer; or probabilities shaped as ``output``.

    Returns:
        values [B] and weights [B].

    Raises:
        LsweepError: the shapes are others, or there is a single score per sample.

    >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))[0]
    tensor([100.,   0.])
    """
    scores, classes = list(output.shape), list(target.shape)
    if len(scores) < 2 or scores[1] < 2 or classes not in (scores, [scores[0], *scores[2:]]):
        raise LsweepError(
            f"accuracy compares scores [B, C, …] of at least two classes with classes [B, …]; here "
            f"they are {scores} and {classes}: give a metric of your own, such as "
            "lambda output, target: 100.0 * ((output > 0) == target)"
        )
    if classes == scores:
        target = target.argmax(1)
    hit = (output.argmax(1) == target).to(torch.float32) * 100
    known = (target >= 0) & (target < scores[1])
    return flatten(hit, known.to(torch.float32))
