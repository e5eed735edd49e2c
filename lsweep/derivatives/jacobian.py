"""The sensitivity of the network to its input: ‖∂f/∂x‖ at every sample.

R. Novak et al., *Sensitivity and Generalization in Neural Networks*, ICLR 2018. A property of the
function alone: no rescaling of weights that leaves the function alone changes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lsweep.axes.noise import random_stream
from lsweep.derivatives.curvature import keyed
from lsweep.derivatives.objective import Objective
from lsweep.errors import LsweepError
from lsweep.problems.batchnorm import BatchNorm
from lsweep.problems.calling import call, full, split_batch
from lsweep.problems.data import Batch, map_tensors, samples_in, tensors_of
from lsweep.problems.problem import Problem, Sampled, classifier

EXACT = 64  # outputs: up to so many, one backward pass for each
PROBES = 16  # for more


def input_jacobian(objective: Objective, *, seed: int = 0, replicate: int = 0) -> Sampled:
    """Return the Frobenius norm of ∂f/∂x at each sample, f the logits (or whatever comes out).

    Exact for up to 64 outputs, one backward pass each. For more, ‖J‖² is the mean of ‖Jᵀu‖² over 16
    random sign vectors u per sample, and the objective's ``note`` says so. A sample's signs are
    keyed by its place in the split, whatever the batches are.

    Args:
        objective: its network and data; ``context`` and precision are used, ``names`` are not.
        seed: of the probes.
        replicate: which probes.

    Returns:
        Values [n] and weights [n] (1 each) over all samples, in units of output per input.

    Raises:
        LsweepError: inputs are whole numbers, samples depend on each other through batch norm, or
            the problem has a ``forward`` of its own, so that its output is not known.
    """
    problem = objective.problem
    parts = []
    with objective.opened():
        _require_independent(problem.model)
        key = keyed("jacobian", replicate)
        streams = [random_stream(seed, key, f"probe {k}") for k in range(PROBES)]
        for batch in objective.batches():
            require_inputs(problem, batch)
            square, outputs = _square(problem, batch, streams)
            parts.append(square)
    if outputs > EXACT:
        objective.note = (
            f"Jacobian of {outputs} outputs by {PROBES} random probes per sample, whose root is "
            "too low by up to 2 %"  # E√χ²₁₆/√16 = 0.985, where J has rank one
        )
    values = torch.cat(parts).sqrt()
    return Sampled(values, torch.ones_like(values))


def require_output(problem: Problem) -> None:
    """Refuse a problem whose network's output is not known.

    Raises:
        LsweepError: it has a ``forward`` of its own.
    """
    if problem.forward is not None and problem.forward is not classifier:
        raise LsweepError(
            "input_jacobian needs the network's output: give the Problem loss=… instead of a "
            "forward=… of its own"
        )


def _square(
    problem: Problem, batch: Batch, streams: Sequence[np.random.Generator]
) -> tuple[Tensor, int]:
    """Return ‖J‖² of each sample of a batch, [B], and how many outputs there are.

    Each stream gives one probe of each sample, going on from batch to batch.
    """
    inputs = map_tensors(
        split_batch(batch)[0],
        lambda t: t.detach().requires_grad_() if t.is_floating_point() else t,
    )
    given = [t for t in tensors_of(inputs) if t.requires_grad]
    output = full(call(problem.model, inputs))
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise LsweepError(f"input_jacobian: the network returned a {type(output).__name__}")
    n = samples_in(batch)
    flat = output.reshape(n, -1)
    count = flat.shape[1]
    square = flat.new_zeros(n, dtype=torch.float64 if flat.device.type != "mps" else None)
    if not flat.requires_grad:
        return square, count
    exact = count <= EXACT
    for k in range(count if exact else len(streams)):
        seen = (flat[:, k] if exact else flat * _signs(streams[k], flat)).sum()
        for g in torch.autograd.grad(seen, given, retain_graph=True, allow_unused=True):
            if g is not None:
                square += g.reshape(n, -1).to(square.dtype).square().sum(1)
    return square if exact else square / len(streams), count


def _signs(stream: np.random.Generator, like: Tensor) -> Tensor:
    """Return ±1, row by row from a stream."""
    noise = torch.from_numpy(stream.standard_normal(tuple(like.shape)))
    return torch.where(noise < 0, -1.0, 1.0).to(like)


def require_inputs(problem: Problem, batch: Batch) -> None:
    """Refuse a problem whose inputs have no derivative, or whose network's output is not known.

    Raises:
        LsweepError: all inputs are whole numbers, or it has a ``forward`` of its own.
    """
    known = problem.forward is None or problem.forward is classifier
    tensors = tensors_of(split_batch(batch)[0] if known else batch)
    if not any(t.is_floating_point() for t in tensors):
        raise LsweepError(
            "input_jacobian: the inputs are whole numbers (such as token ids), which have no "
            "derivative"
        )
    require_output(problem)


def _require_independent(model: nn.Module) -> None:
    for name, m in model.named_modules():
        if isinstance(m, BatchNorm) and (m.training or m.running_mean is None):
            raise LsweepError(
                f"input_jacobian: {name} normalises by the statistics of each batch, so that an "
                'output depends on all its samples: use batch_norm = "eval"'
            )
