"""Subsets: a fixed part of a split, drawn once, class by class, and the same at every point.

Of N samples n are drawn so that each has the same chance n/N: then Σv/n over the subset is unbiased
as it is, no sample needs a weight, and an opaque loss is served like any other. The samples are
laid out class after class, the classes and the samples within each in random order, and every
(N/n)-th is taken from a random start: so a class of N_h has n·N_h/N samples, rounded up or down,
and one of at least N/n samples is never left out (systematic sampling: Cochran, Sampling
Techniques, 1977, section 8.5). Without classes this is a plain draw without replacement.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lsweep.errors import LsweepError
from lsweep.problems.calling import split_batch
from lsweep.problems.data import Split
from lsweep.problems.problem import Problem

IntArray = npt.NDArray[np.int64]
TARGET_ATTRIBUTES = ("targets", "labels", "y")  # where datasets keep them, as torchvision does


def draw(classes: IntArray, count: int, key: str) -> IntArray:
    """Return which ``count`` samples form the subset, from Philox keyed by ``key``.

    Args:
        classes: (N,) the class of each sample; all equal for a plain draw.
        count: how many to draw, at most N.
        key: the same key draws the same samples, on every machine.

    Returns:
        (count,) sorted indices; each sample is among them with probability count/N.

    >>> labels = np.repeat([0, 1], [60, 40])
    >>> np.bincount(labels[draw(labels, 10, "train")])
    array([6, 4])
    """
    total = len(classes)
    digest = hashlib.sha256(f"subset\0{key}".encode()).digest()[:16]
    chance = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))
    names, place = np.unique(classes, return_inverse=True)
    rank = np.argsort(chance.random(len(names)), kind="stable")
    laid_out = np.lexsort((chance.random(total), rank[place]))
    taken = np.floor((chance.random() + np.arange(count)) * (total / count)).astype(np.int64)
    return np.sort(laid_out[np.minimum(taken, total - 1)])


def classes_of(split: Split) -> IntArray | None:
    """Return the class of each sample, or None where it is not known without reading them all.

    Tensors say it by their target, a `Dataset` by an attribute ``targets``, ``labels`` or ``y``, as
    those of torchvision do.

    >>> classes_of(Split("train", (torch.zeros(3, 2), torch.tensor([1, 0, 1]))))
    array([1, 0, 1])
    """
    return _whole_numbers(_targets(split.data), split.pickable)


def _targets(data: Any) -> Any:
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Subset):
        inner = _targets(data.dataset)
        return None if inner is None else torch.as_tensor(inner)[list(data.indices)]
    if isinstance(data, TensorDataset):
        return data.tensors[-1]
    try:
        return split_batch(data)[1]
    except LsweepError:
        held = (getattr(data, name, None) for name in TARGET_ATTRIBUTES)
        return next((t for t in held if t is not None), None)


def _whole_numbers(targets: Any, samples: int | None) -> IntArray | None:
    try:
        found = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        return None
    if found.shape != (samples,) or found.is_floating_point() or found.is_complex():
        return None
    return found.cpu().numpy().astype(np.int64)


def subsampled(problem: Problem, evaluate: dict[str, Any]) -> Problem:
    """Return the problem with the splits that are evaluated cut to the plan's ``samples``.

    A split of no more samples stays as it is; so does everything when ``samples`` is not set.

    Args:
        problem: the network with all its data.
        evaluate: the plan's ``evaluate`` table.

    Raises:
        LsweepError: a split is batches of its own, of which no sample can be picked.
    """
    count = evaluate["samples"]
    if count is None:
        return problem
    wanted = list(evaluate["splits"])
    if evaluate["batch_norm"] == "recalibrate" and "train" in problem.splits:
        wanted.append("train")
    data = {**problem.data}
    for name in dict.fromkeys(wanted):
        split = problem.splits[name]
        if split.pickable is None:
            raise LsweepError(
                f"samples = {count}: the data split {name!r} is batches of its own, of which no "
                "sample can be picked: give tensors, a Dataset or a DataLoader that takes one in "
                "its order (shuffle=False, drop_last=False), or leave samples out"
            )
        if split.pickable > count:
            found = classes_of(split)
            classes = np.zeros(split.pickable, dtype=np.int64) if found is None else found
            known = 0 if found is None else len(np.unique(found))
            data[name] = split.cut(draw(classes, count, name), known)
    return dataclasses.replace(problem, data=data)


def described(split: Split) -> dict[str, Any]:
    """Return what the plan says of a split: its samples and what gives them away when they change.

    >>> sorted(described(Split("train", torch.zeros(3, 2))))
    ['fingerprint', 'samples']
    """
    out = {"samples": split.samples, "fingerprint": split.fingerprint()}
    if split.indices is None:
        return out
    assert split.whole is not None
    picked = hashlib.sha256(split.indices.astype("<i8").tobytes()).hexdigest()
    whole = split.whole.fingerprint()
    of, classes = split.whole.pickable, split.classes
    return {**out, "of": of, "classes": classes, "indices": picked, "whole": whole}
