"""The certificate: which transforms of weights leave this network's function unchanged, measured.

First (T1) one backward pass for all: the gradient of <f(x), u> must be orthogonal to the orbit.
Then (T2) finite factors 1/2, 2 and 3: e = max|Δf| / rms f against the noise floor e0 of the same
forward with its batch in another order and in other pieces. In float64 where memory allows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsweep import batchnorm, weights
from lsweep.certified import Tested
from lsweep.data import Batch, map_tensors, moved, samples_in, tensors_of
from lsweep.device import free_memory
from lsweep.directions import Directions
from lsweep.errors import LsweepError
from lsweep.evaluate import Evaluator
from lsweep.factory import describe
from lsweep.filters import is_norm
from lsweep.problem import Problem
from lsweep.rescaling import FACTORS, Element, Transform, acted, finite_element, residual
from lsweep.subsets import subsampled
from lsweep.supply import default_batch_size
from lsweep.takeover import generators_kept, model_kept
from lsweep.tracing import Unsupported
from lsweep.weights import State

EXACT = {torch.float64: 1e-12, torch.float32: 2e-6}
NOISE_MARGIN = 10.0  # times the noise floor is still exact
UP_TO_EPS, FALL, LESS_EPS = 1e-3, 100.0, 1e-3
APPROXIMATE = 0.02
CLEARLY_BROKEN = 1e-3  # a gradient so far from the orbit's normal: one finite factor will do
SHUFFLES, PROBES = 5, 4
LOSS_FLOOR = 1e-3
SAME = 1e-9  # of rms f: the same function in float64, after many rescalings
COPIES = 4  # of the weights in float64, that must fit in half of the free memory
EPSILONS = ("eps", "variance_epsilon", "epsilon")


def verdict(errors: Mapping[float, float], noise: float, exact: float, falls: bool) -> str:
    """Return exact, up to eps, approximate or broken (science: e against e0, e falling with eps).

    Args:
        errors: factor -> max|Δf| / rms f.
        noise: the floor e0.
        exact: the largest error of rounding alone.
        falls: whether the error falls at least 100 times with the norm's eps a thousandth.

    >>> verdict({2.0: 1e-15}, 0.0, 1e-12, False), verdict({2.0: 1e-4}, 0.0, 1e-12, True)
    ('exact', 'up to eps')
    >>> verdict({2.0: 0.01, 3.0: 0.03}, 0.0, 1e-12, False), verdict({2.0: 0.3}, 0.0, 1e-12, False)
    ('approximate', 'broken')
    """
    worst = max(errors.values())
    if worst <= max(NOISE_MARGIN * noise, exact):
        return "exact"
    if worst <= UP_TO_EPS and falls:
        return "up to eps"
    return "approximate" if errors.get(2.0, worst) <= APPROXIMATE else "broken"


class Bench:
    """A network on a few samples: moved at will, given back as it was.

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

    # -- looking -----------------------------------------------------------------------------------

    def _outputs(self, batch: Batch) -> tuple[list[Tensor], float, float]:
        """Return what the network returns, or losses where it is not called; Σw and Σwv of those.

        A hook sees every call, whatever the user's forward does with its model.
        """
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, out: Any) -> None:
            found = tensors_of(getattr(out, "logits", out))
            seen.extend(t for t in found if t.is_floating_point())

        metric = self._evaluator.metrics[0]
        handle = self._problem.model.register_forward_hook(note)
        try:
            sampled = self._problem.evaluate(batch, (metric,))[metric]
        finally:
            handle.remove()
        w, v = sampled.weights.double(), sampled.values.double()
        return seen or [sampled.values], float(w.sum()), float((w * v).sum())

    @contextlib.contextmanager
    def _mode(self, batch_norm: str, grad: bool = False) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad or self._problem.grad))
            if batch_norm == "batch":
                stack.enter_context(batchnorm.batch_statistics(self._problem.model))
            yield

    def look(self, batch_norm: str = "eval") -> tuple[Tensor, float]:
        """Return all outputs as one vector and the mean loss, at the present weights."""
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


def inputs_of(problem: Problem, metric: str) -> Any:
    """Return what the problem gives to its network for two samples: a tensor, a tuple or a dict.

    Raises:
        Unsupported: it does not call its network.
        LsweepError: it fails.
    """
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(kwargs or (args[0] if len(args) == 1 else args))

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


# -- benches and rows ------------------------------------------------------------------------------


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
    if device.type == "mps" or COPIES * 8 * numbers > free_memory(device) / 2:
        return (torch.float32,)
    return torch.float32, torch.float64


def certify(
    problem: Problem,
    transforms: Sequence[Transform],
    metric: str,
    device: torch.device,
    say: Callable[[Tested], None] = lambda tested: None,
) -> tuple[list[Tested], float, int]:
    """Measure which transforms leave the network unchanged.

    Args:
        problem: with one split of a few samples, as from `few`.
        transforms: candidates.
        metric: whose mean stands for the loss.
        device: where to evaluate.
        say: is told of each as soon as it is known.

    Returns:
        One `Tested` for each transform, in order; the mean loss, and the number of samples.

    Raises:
        LsweepError: the network fails on these samples, or its output is not finite.
    """
    *_, dtype = kinds = precisions(problem, device)
    try:
        in_float32: list[float | None] = [None] * len(transforms)
        if len(kinds) > 1:
            with bench(problem, metric, device, torch.float32) as b:
                in_float32 = [_largest(b, t) for t in transforms]
        with bench(problem, metric, device, dtype) as b:
            modes = dict.fromkeys(t.batch_norm for t in transforms if not t.untested)
            for m in modes:
                if not bool(torch.isfinite(b.base(m)[0]).all()):
                    raise LsweepError("the network's output is not finite at its own weights")
            gradients = {m: b.gradients(m) for m in modes}
            noise = {m: b.noise(m) for m in modes}
            found = []
            for t, error32 in zip(transforms, in_float32, strict=True):
                row = dataclasses.replace(_tested(b, t, gradients, noise), error32=error32)
                say(row)
                found.append(row)
            loss, samples = b.base("eval")[1], b.samples
    except LsweepError:
        raise
    except Exception as e:
        raise LsweepError(f"the problem fails at its own weights: {describe(e)}") from e
    return found, loss, samples


def _largest(b: Bench, t: Transform) -> float | None:
    return None if t.untested else _finite(b.error(t, finite_element(t, FACTORS[-1]))[0])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tested(
    b: Bench,
    t: Transform,
    gradients: Mapping[str, list[State]],
    noise: Mapping[str, float],
) -> Tested:
    units = sum(t.sizes)
    if t.untested:
        return Tested(t.layer, t.kind, units, t.tensors, "untested", note=t.untested)
    found = [residual(t, b.tensors, g) for g in gradients[t.batch_norm]]
    known = [r for r in found if r is not None]
    first = sum(known) / len(known) if known else None
    factors: tuple[float, ...] = FACTORS if t.rescales else (1.0,)
    if first is not None and first > CLEARLY_BROKEN:
        factors = (2.0,)
    errors = {c: b.error(t, finite_element(t, c)) for c in factors}
    worst = max(factors, key=lambda c: errors[c][0])
    e, floor, exact = errors[worst][0], noise[t.batch_norm], EXACT[b.dtype]
    falls, note = False, ""
    if t.rescales and max(NOISE_MARGIN * floor, exact) < e < math.inf:
        less, _ = b.error(t, finite_element(t, worst), less_eps=True)
        falls = less <= e / FALL
        note = f"with a thousandth of eps {less:.1e}" if falls else ""
    if e == math.inf:
        note = "the output is not finite there"
    return Tested(
        t.layer, t.kind, units, t.tensors,
        verdict({c: v for c, (v, _) in errors.items()}, floor, exact, falls),
        factor=worst if t.rescales else None, error=_finite(e),
        loss_error=_finite(errors[worst][1]), noise=floor,
        residual=first, precision=str(b.dtype).removeprefix("torch."), note=note,
    )  # fmt: skip
