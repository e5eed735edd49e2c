"""Following: what a network keeps of its weights must follow them, as all that it computes with.

Only parameters and buffers are moved. Of its other tensors most are masks and tables, which depend
on no weight; but a slice of a weight that ``__init__`` took, or what the first call makes of
weights and keeps for later ones (a tensor or number in an attribute, a dict or a list; a table that
it fills), would stay what it was, and a picture be flat that is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsweep.backends.packed import Spot
from lsweep.errors import LsweepError
from lsweep.evaluating.evaluate import Evaluator
from lsweep.problems.problem import Sampled
from lsweep.problems.takeover import kept_by, model_kept

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
        views = [
            n
            for n, (v, _) in after.items()
            if isinstance(v, Tensor) and id(v._base) in weights and before.get(n, (0,))[0] is v
        ]
        if views:
            raise _stays(views, "a view of a weight, taken once")
        made = [n for n, seen in after.items() if not _is_same(before.get(n), seen)]
        made.sort(key=lambda n: not isinstance(after[n][0], Tensor))
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


def _kept(model: nn.Module) -> dict[str, tuple[Any, int]]:
    """Return the values that a network keeps in plain attributes, by name, with their versions."""
    return {
        f"{path}.{name}".strip("."): (v, v._version if _is_counted(v) else 0)
        for path, module in model.named_modules()
        for name, v in kept_by(module).items()
        if not isinstance(v, dict | list | tuple)
    }


def _is_counted(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_inference()


def _is_same(before: tuple[Any, int] | None, after: tuple[Any, int]) -> bool:
    return before is not None and before[0] is after[0] and before[1] == after[1]


def _stays(names: list[str], what: str) -> LsweepError:
    return LsweepError(
        f"the network keeps {', '.join(names[:3])}: {what}. No point would move it: compute it in "
        "forward() at every call, or register it as a parameter of its own"
    )


def _same(a: Mapping[str, Sampled], b: Mapping[str, Sampled]) -> bool:
    return all(
        torch.allclose(a[m].values, b[m].values, rtol=SAME, atol=SAME, equal_nan=True) for m in a
    )
