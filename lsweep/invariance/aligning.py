"""Aligning: another network's checkpoint written anew, its hidden units in this network's order.

Written once, whole, and named by what it was made of, so that a run that reads it is an ordinary
run from one checkpoint to another.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lsweep.errors import LsweepError
from lsweep.invariance.alignment import Alignment, align
from lsweep.invariance.bench import inputs_of
from lsweep.invariance.symmetries import Discovered, discover
from lsweep.problems.calling import call, full
from lsweep.problems.problem import Problem
from lsweep.problems.takeover import generators_kept, model_kept
from lsweep.problems.weights import (
    State,
    buffers_of,
    fingerprint,
    load_matching,
    parameters_of,
)
from lsweep.storage.files import publish
from lsweep.storage.folder import RunFolder
from lsweep.storage.insist import there

UNCHANGED = 1e-3  # of the outputs' size; beyond it moving units was no mere change of places


@dataclass(frozen=True)
class Aligned:
    """A checkpoint with its units moved.

    Attributes:
        path: of the file.
        said: what was found, one line each; empty where the file was there already.
    """

    path: Path
    said: tuple[str, ...] = ()


def aligned_checkpoint(
    folder: RunFolder, problem: Problem, other: Path, metric: str, seed: int = 0
) -> Aligned:
    """Return the checkpoint of another network in the order of a problem's own, made if need be.

    Args:
        folder: the run that is measured; the file lies among its measures.
        problem: at its trained weights.
        other: the checkpoint of the other network.
        metric: with which the problem calls its network.
        seed: of the search.

    Raises:
        LsweepError: scipy is missing, no hidden units were found, the checkpoint does not fit, or
            it is the same network.
    """
    model = problem.model
    parameters = {n: p.detach().cpu() for n, p in parameters_of(model).items()}
    mine = {**parameters, **{n: b.detach().cpu() for n, b in buffers_of(model).items()}}
    theirs = load_matching(other, mine)
    key = hashlib.sha256(f"{fingerprint(mine)}\0{fingerprint(theirs)}\0{seed}".encode())
    for kind in ("safetensors", "pt"):
        path = folder.aligned(other.stem, key.hexdigest(), kind)
        if there(path):
            return Aligned(path)
    found = discover(model, inputs_of(problem, metric))
    if not any(u.permutable for u in found.units):
        reason = "; ".join(found.unknown) or "it has none"
        raise LsweepError(f"no hidden units that could trade places are known: {reason}")
    done = align(mine, theirs, found.units, list(parameters), seed)
    error = _difference(problem, metric, theirs, done.state)
    if not error <= UNCHANGED:
        raise LsweepError(
            f"moving its units changes what {other} computes by {error:.1e} of its outputs: units "
            "were followed wrongly, and no alignment is made"
        )
    if all(torch.equal(done.state[n].to(t), t) for n, t in mine.items()):
        raise LsweepError(
            f"with its units in order {other} is this very network, bit for bit: nothing lies "
            "between them, and the barrier is 0"
        )
    kind, data = _written(done.state)
    path = folder.aligned(other.stem, key.hexdigest(), kind)
    publish(path, data)
    return Aligned(path, _said(found, done, error))


def _said(found: Discovered, done: Alignment, error: float) -> tuple[str, ...]:
    count = sum(u.size for u in found.units if u.permutable)
    lines = [
        f"{done.moved} of {count} hidden units in {len(done.orders)} groups moved: agreement of "
        f"the weights (cosine) {done.before:.3f} -> {done.after:.3f}, outputs the same to "
        f"{error:.0e}"
    ]
    if done.held:
        lines.append(f"held, for fixed numbers meet them: {', '.join(done.held)}")
    return (*lines, *found.unknown)


def _difference(problem: Problem, metric: str, one: State, two: State) -> float:
    """Return how much the outputs at two states differ, relative to their size."""
    model, inputs = problem.model, inputs_of(problem, metric)
    outputs = []
    with generators_kept(), model_kept(model), torch.no_grad():
        model.eval()
        for p in model.parameters():
            p.data = p.data.clone()
        for module in model.modules():
            module._buffers.update(
                {n: b.clone() for n, b in module._buffers.items() if b is not None}
            )
        for state in (one, two):
            for name, tensor in {**parameters_of(model), **buffers_of(model)}.items():
                tensor.copy_(state[name])
            found = full(call(model, inputs))
            tensors = found if isinstance(found, tuple | list) else [found]
            outputs.append([t.double() for t in tensors if isinstance(t, Tensor)])
    gap = max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))
    size = max(float(a.abs().max()) for a in outputs[0])
    return gap / size if size else gap


def _written(state: State) -> tuple[str, bytes]:
    """Return the kind of file and its content: safetensors where that is installed."""
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in state.items()}
    if importlib.util.find_spec("safetensors") is not None:
        from safetensors.torch import save

        return "safetensors", save(plain)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return "pt", buffer.getvalue()
