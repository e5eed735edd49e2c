"""A network on a few samples, on a bench: moved at will, looked at, given back as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsweep.axes.directions import Directions
from lsweep.backends.tracing import Unsupported
from lsweep.errors import LsweepError
from lsweep.evaluating.evaluate import Evaluator
from lsweep.hosts.device import room
from lsweep.invariance.rescaling import Element, Transform, acted
from lsweep.plans.pointwise import POINTWISE
from lsweep.problems import batchnorm, weights
from lsweep.problems.calling import logits_of
from lsweep.problems.data import Batch, map_tensors, moved, samples_in, tensors_of
from lsweep.problems.factory import describe
from lsweep.problems.filters import is_norm
from lsweep.problems.problem import Problem
from lsweep.problems.subsets import subsampled
from lsweep.problems.supply import default_batch_size
from lsweep.problems.takeover import generators_kept, model_kept
from lsweep.problems.weights import State

LESS_EPS = 1e-3  # times the eps of every normalisation
SHUFFLES, PROBES = 5, 4
LOSS_FLOOR = 1e-3
MOST_KEPT = 2**20  # numbers of an output that are compared; a language model has billions
COPIES = 4  # of the weights in float64, that must fit in half of the free memory
EPSILONS = ("eps", "variance_epsilon", "epsilon")


class Bench:
    """A network on a few samples: moved at will, given back as it was.

    Of a large output a random `MOST_KEPT` of its numbers stand for all, the same of each sample.

    Args:
        evaluator: has taken the network over.
        split: whose samples they are.
    """

    def __init__(self, evaluator: Evaluator, split: str) -> None:
        self._evaluator, self._problem = evaluator, evaluator.problem
        self.dtype = evaluator.dtype
        self._batches = list(evaluator.fresh(split, evaluator.batch_sizes[split]))
        model = self._problem.model
        self.tensors: State = {**weights.parameters_of(model), **weights.buffers_of(model)}
        self._start: State = {n: t.detach().clone() for n, t in self.tensors.items()}
        self._base: dict[tuple[str, bool], tuple[Tensor, float]] = {}
        self.samples = sum(samples_in(b) for b in self._batches)
        self._places: dict[int, Tensor] = {}

    # -- looking -----------------------------------------------------------------------------------

    def _outputs(self, batch: Batch) -> tuple[list[Tensor], float, float]:
        """Return what the network returns, or losses where it is not called; Σw and Σwv of those.

        A hook sees every call, whatever the user's forward does with its model.
        """
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            found = tensors_of(logits_of(out))
            seen.extend(t for t in found if t.is_floating_point())

        metric = self._evaluator.metrics[0]
        handle = self._problem.model.register_forward_hook(note)
        try:
            sampled = self._problem.evaluate(batch, (metric,))[metric]
        finally:
            handle.remove()
        w, v = sampled.weights.double(), sampled.values.double()
        kept = [self._cut(t, samples_in(batch)) for t in seen]
        return kept or [sampled.values], float(w.sum()), float((w * v).sum())

    def _cut(self, output: Tensor, samples: int) -> Tensor:
        """Return a batch's share of the numbers that are kept, by rows where they are samples."""
        rows = samples if output.dim() and len(output) == samples else 1
        size, room = output.numel() // rows, max(1, MOST_KEPT * samples // self.samples // rows)
        if size <= room:
            return output
        if size not in self._places:
            chance = np.random.Generator(np.random.Philox(size))
            places = chance.choice(size, room, replace=False, shuffle=False)
            self._places[size] = torch.from_numpy(np.sort(places))
        return output.reshape(rows, size)[:, self._places[size].to(output.device)]

    @contextlib.contextmanager
    def _mode(self, batch_norm: str, grad: bool = False) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad or self._problem.grad))
            if batch_norm == "batch":
                stack.enter_context(batchnorm.batch_statistics(self._problem.model))
            yield

    def look(self, batch_norm: str = "eval") -> tuple[Tensor, float]:
        """Return the outputs as one vector and the mean loss, at the present weights."""
        outputs, weight, total = [], 0.0, 0.0
        with self._mode(batch_norm):
            for batch in self._batches:
                found, w, wv = self._outputs(batch)
                outputs += [t.detach().flatten() for t in found]
                weight, total = weight + w, total + wv
        return torch.cat(outputs), total / weight if weight else math.nan

    def base(self, batch_norm: str, less_eps: bool = False) -> tuple[Tensor, float]:
        """Return what `look` sees at the trained weights, looked at once."""
        key = (batch_norm, less_eps)
        if key not in self._base:
            self._base[key] = self.look(batch_norm)
        return self._base[key]

    def noise(self, batch_norm: str = "eval") -> float:
        """Return e0: the largest of five changes by another order and other pieces of the batch."""
        worst, chance = 0.0, torch.Generator().manual_seed(0)
        with self._mode(batch_norm):
            for batch in self._batches:
                straight = [t.detach() for t in self._outputs(batch)[0]]
                n = samples_in(batch)
                for _ in range(SHUFFLES):
                    order = torch.randperm(n, generator=chance)
                    cut = int(torch.randint(1, max(2, n), (1,), generator=chance))
                    # Batch statistics are those of whole batches.
                    pieces = (
                        [order] if batch_norm == "batch" or n < 2 else order.tensor_split([cut])
                    )
                    try:
                        found = [self._outputs(_picked(batch, p, n))[0] for p in pieces]
                    except Exception:  # a batch that is more than rows has no other order
                        return worst
                    for k, there in enumerate(straight):
                        if there.dim() and len(there) == n:
                            again = torch.cat([f[k].detach() for f in found])
                            worst = max(worst, _relative(again, there[order.to(there.device)]))
        return worst

    # -- T1 and T2 ---------------------------------------------------------------------------------

    def gradients(self, batch_norm: str) -> list[State]:
        """Return the gradients of <f(x), u> for a few random u, by one backward pass each.

        Those of a batch norm's statistics follow from its weight's and bias's:
        ∂/∂m = -γ/s ∂/∂β and ∂/∂v = -γ/(2s²) ∂/∂γ with s² = v + eps.
        """
        chance = torch.Generator().manual_seed(1)
        parameters = {n: t for n, t in self.tensors.items() if isinstance(t, nn.Parameter)}
        flags = {n: p.requires_grad for n, p in parameters.items()}
        totals: list[dict[str, Tensor]] = [{} for _ in range(PROBES)]
        try:
            for p in parameters.values():
                p.requires_grad_(True)
            with self._mode(batch_norm, grad=True):
                for batch in self._batches:
                    outputs = [t for t in self._outputs(batch)[0] if t.requires_grad]
                    if not outputs:
                        return []
                    for k, total in enumerate(totals):
                        probes = [
                            torch.randn(t.shape, generator=chance, dtype=torch.float64).to(t)
                            for t in outputs
                        ]
                        found = torch.autograd.grad(
                            outputs, list(parameters.values()), probes,
                            retain_graph=k + 1 < PROBES, allow_unused=True,
                        )  # fmt: skip
                        for name, g in zip(parameters, found, strict=True):
                            if g is not None:
                                total[name] = total[name] + g if name in total else g
        except RuntimeError:  # something in the network has no backward: T1 is left out
            return []
        finally:
            for name, p in parameters.items():
                p.requires_grad_(flags[name])
        for total in totals:
            for name, p in parameters.items():
                total.setdefault(name, torch.zeros_like(p))
            total.update(_of_statistics(self._problem.model, self.tensors, total))
        return totals

    def error(
        self, transform: Transform, element: Element, less_eps: bool = False
    ) -> tuple[float, float]:
        """Return max|Δf| / rms f and |ΔL| / max(L, 1e-3) of one element of a transform.

        Args:
            transform: which.
            element: how far.
            less_eps: with the eps of every normalisation a thousandth of what it is.
        """
        with _eps(self._problem.model, LESS_EPS if less_eps else 1.0):
            changed = acted(self._start, transform, element)
            return self.difference(changed, transform.batch_norm, less_eps)

    def difference(
        self, changed: State, batch_norm: str = "eval", less_eps: bool = False
    ) -> tuple[float, float]:
        """Return what `error` does, of some tensors changed."""
        f, loss = self.base(batch_norm, less_eps)
        try:
            for name, t in changed.items():
                self.tensors[name].detach().copy_(t)
            there, moved_loss = self.look(batch_norm)
        finally:
            for name in changed:
                self.tensors[name].detach().copy_(self._start[name])
        if there.shape != f.shape:
            return math.inf, math.inf
        return _relative(there, f), abs(moved_loss - loss) / max(abs(loss), LOSS_FLOOR)


def _picked(batch: Batch, rows: Tensor, n: int) -> Batch:
    return map_tensors(batch, lambda t: t[rows.to(t.device)] if t.dim() and len(t) == n else t)


def _relative(there: Tensor, here: Tensor) -> float:
    size = float(here.double().square().mean().sqrt())
    gap = float((there.double() - here.double()).abs().max()) if here.numel() else 0.0
    if not math.isfinite(gap):
        return math.inf
    return gap / size if size else (math.inf if gap else 0.0)


def _of_statistics(model: nn.Module, tensors: State, gradient: State) -> State:
    names = {id(t): n for n, t in tensors.items()}
    out: State = {}
    for m in batchnorm.layers(model):
        weight, bias = names.get(id(m.weight)), names.get(id(m.bias))
        mean, variance = names.get(id(m.running_mean)), names.get(id(m.running_var))
        if not (weight and bias and mean and variance):
            continue
        square = tensors[variance] + m.eps
        gamma = tensors[weight].detach()
        out[mean] = -gamma / square.sqrt() * gradient[bias]
        out[variance] = -gamma / (2 * square) * gradient[weight]
    return out


@contextlib.contextmanager
def _eps(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the eps of every normalisation module."""
    kept = [
        (m, name, value)
        for m in model.modules()
        if is_norm(m)
        for name in EPSILONS
        if isinstance(value := getattr(m, name, None), float)
    ]
    try:
        for m, name, value in kept:
            setattr(m, name, value * factor)
        yield
    finally:
        for m, name, value in kept:
            setattr(m, name, value)


def mean_metric(problem: Problem, asked: Sequence[str]) -> str:
    """Return the first metric that is a mean over samples: what stands for the loss."""
    means = [m for m in asked if m not in POINTWISE]
    return means[0] if means else problem.metric_names[0]


def inputs_of(problem: Problem, metric: str) -> Any:
    """Return what the problem gives to its network for two samples: a tensor, a tuple or a dict.

    Raises:
        Unsupported: it does not call its network.
        LsweepError: it fails.
    """
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(_inputs(module, args, kwargs))

    split = next(iter(problem.splits.values()))
    model = problem.model
    with generators_kept(), model_kept(model), torch.set_grad_enabled(problem.grad):
        model.eval()
        like = next(model.parameters(), torch.empty(0))
        batch = map_tensors(
            next(iter(split.batches(2))), lambda t: moved(t, like.device, like.dtype)
        )
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            problem.evaluate(batch, (metric,))
        except LsweepError:
            raise
        except Exception as e:
            raise LsweepError(f"the problem fails at its own weights: {describe(e)}") from e
        finally:
            handle.remove()
    if not seen:
        raise Unsupported("forward= never calls the network itself, so no layer can be followed")
    return seen[0]


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what a network was called with: by name, where any of it was."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    bound = inspect.signature(module.forward).bind_partial(*args)
    return {**bound.arguments, **kwargs}


def few(problem: Problem, split: str, samples: int, device: torch.device) -> Problem:
    """Return the problem with about ``samples`` samples of one split, drawn once, as batches."""
    whole = problem.splits[split]
    if whole.samples is None:
        batches, seen = [], 0
        for batch in whole.batches(samples):
            batches.append(batch)
            seen += samples_in(batch)
            if seen >= samples:
                break
    else:
        table = {"samples": samples, "splits": [split], "batch_norm": "eval"}
        part = subsampled(problem, table).splits[split]
        batches = list(part.batches(min(samples, default_batch_size(part, device))))
    return dataclasses.replace(problem, data={split: batches})


@contextlib.contextmanager
def bench(
    problem: Problem, metric: str, device: torch.device, dtype: torch.dtype
) -> Iterator[Bench]:
    """Take over a problem with one split of a few samples, as from `few`."""
    (split,) = problem.splits
    precision = "float64" if dtype == torch.float64 else "float32"
    table = {
        "splits": [split], "metrics": [metric], "slices": 1, "precision": precision,
        "batch_norm": "eval", "batch_size": "auto",
    }  # fmt: skip
    with Evaluator(problem, table, Directions({}, (), {}), device) as evaluator:
        yield Bench(evaluator, split)


def precisions(problem: Problem, device: torch.device) -> tuple[torch.dtype, ...]:
    """Return float32, and float64 where it is there and fits."""
    numbers = sum(p.numel() for p in problem.model.parameters())
    if device.type == "mps" or COPIES * 8 * numbers > room(device) / 2:
        return (torch.float32,)
    return torch.float32, torch.float64
