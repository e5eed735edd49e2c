"""Following: what a network keeps of its weights must follow them, as all that it computes with.

Only parameters and buffers are moved. Of its other tensors most are masks and tables, which depend
on no weight; but a slice of a weight that ``__init__`` took, or a product of weights that the first
call keeps for later ones, would stay what it was, and a picture be flat that is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsweep.backends.packed import Spot
from lsweep.errors import LsweepError
from lsweep.evaluating.evaluate import Evaluator
from lsweep.problems.data import tensors_of
from lsweep.problems.problem import Sampled
from lsweep.problems.takeover import model_kept

SAME = 1e-5  # relative and absolute: a GPU may round otherwise the second time


def require_following(evaluator: Evaluator, split: str, far: Spot) -> None:
    """Check on one batch that a network computes at a spot with the weights of that spot alone.

    Args:
        evaluator: on this worker's device, with eager.
        split: of the data.
        far: a spot where the weights are others than at the centre.

    Raises:
        LsweepError: it keeps something that is made of weights.
    """
    eager, model = evaluator.eager, evaluator.problem.model
    batch = next(iter(evaluator.batches(split)))
    before = _kept(model)
    with model_kept(model):
        eager.move(evaluator.origin)
        eager.here(batch)
        after = _kept(model)
        weights = {id(p) for p in model.parameters()}
        views = [n for n, t in after.items() if before.get(n) is t and id(t._base) in weights]
        if views:
            raise _stays(views, "a view of a weight, taken once")
        made = [n for n, t in after.items() if before.get(n) is not t]
        if not made:
            return
        try:
            eager.move(far)
            late = eager.here(batch)
        except Exception:  # the sweep tells which point fails, and why
            return
    with model_kept(model):  # which has forgotten what it kept
        eager.move(far)
        anew = eager.here(batch)
    if not _same(late, anew):
        raise _stays(made, "made of weights in one call and used in the next")


def _kept(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors among a network's plain attributes, by name."""
    return {
        f"{path}.{key}.{k}".strip(".") if k else f"{path}.{key}".strip("."): t
        for path, module in model.named_modules()
        for key, value in module.__dict__.items()
        if key not in ("_parameters", "_buffers", "_modules")
        for k, t in enumerate(tensors_of(value))
        if not isinstance(t, nn.Parameter)
    }


def _stays(names: list[str], what: str) -> LsweepError:
    return LsweepError(
        f"the network keeps {', '.join(names[:3])}: {what}. No point would move it: compute it in "
        "forward() at every call, or register it as a parameter of its own"
    )


def _same(a: Mapping[str, Sampled], b: Mapping[str, Sampled]) -> bool:
    return all(
        torch.allclose(a[m].values, b[m].values, rtol=SAME, atol=SAME, equal_nan=True) for m in a
    )
