"""From a loss to per-sample values with true weights, so that Σwv/Σw is the mean it stands for."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lsweep.errors import LsweepError

Values = Tensor | tuple[Tensor, Tensor]
"""Per-sample values, or (values, weights), or one scalar: the mean of an opaque loss."""

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
    if loss in _MODULES:
        loss = _MODULES[loss]()
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        if loss.reduction == "sum":
            raise LsweepError(
                f'{type(loss).__name__}(reduction="sum") is not a mean over samples: use "mean"'
            )
        single = copy.deepcopy(loss)
        single.reduction = "none"  # type: ignore[assignment]
        if isinstance(single, nn.CrossEntropyLoss | nn.NLLLoss):
            return functools.partial(_class_loss, single)
        batchmean = loss.reduction == "batchmean"
        return functools.partial(_element_loss, single, batchmean)
    if not isinstance(loss, nn.Module) and _takes_reduction(loss):
        return functools.partial(_element_loss, functools.partial(loss, reduction="none"), False)
    return loss


def _takes_reduction(loss: Callable[..., Any]) -> bool:
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default == "mean"


def _class_loss(loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor) -> Values:
    values = loss(output, target)  # [B] or [B, positions...], already times the class weight
    if target.is_floating_point():  # class probabilities: torch divides by the batch size
        weights = torch.ones_like(values)
    else:
        kept = target != loss.ignore_index
        weights = kept.to(values.dtype)
        if loss.weight is not None:
            weights = weights * loss.weight[torch.where(kept, target, 0)]
        values = torch.where(weights > 0, values / weights.clamp_min(1e-45), 0.0)
    return flatten(values, weights)


def _element_loss(loss: Callable[..., Tensor], batchmean: bool, output: Any, target: Any) -> Values:
    values = loss(output, target)
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
    """Return 0 or 100 per sample: per cent correct; labels below 0 (ignored) have no weight.

    Args:
        output: logits [B, C] or [B, C, positions...].
        target: classes [B] or [B, positions...], integer; or probabilities shaped as ``output``.

    Returns:
        values [B] and weights [B].

    >>> accuracy(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))[0]
    tensor([100.,   0.])
    """
    if target.is_floating_point() and target.shape == output.shape:
        target = target.argmax(1)
    hit = (output.argmax(1) == target).to(torch.float32) * 100
    return flatten(hit, (target >= 0).to(torch.float32))
