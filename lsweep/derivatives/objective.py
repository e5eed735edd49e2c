"""Objective: the mean loss of one split as a function of some of the weights, with derivatives.

Value, gradient and Hessian-vector product stream the data batch by batch: each batch adds its
Σ w·v, and the sum is divided by the total weight Σ w, which makes the value that of the evaluator.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsweep.errors import LsweepError
from lsweep.hosts.device import is_out_of_memory
from lsweep.problems import weights
from lsweep.problems.data import Batch
from lsweep.problems.filters import filter_rows, scale_rows
from lsweep.problems.problem import Problem

LARGE = 2**24  # parameters: beyond, vectors are kept in float32
DETACHED = 0.1  # by which a derivative may differ from what differences say, as a share of it

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Objective:
    """L(θ) = Σ w v / Σ w over one split, as a function of the weights ``names``, all others fixed.

    Vectors are flat, [P], on the network's device, the tensors one after another in the order of
    ``names``; float64 up to `LARGE` parameters, so that sums over batches and inner products lose
    nothing. The network computes in its own precision, in eval mode, and is left as it was found.

    The second derivative is reverse over reverse. Attention is computed by torch's plain kernel
    meanwhile, as the fused ones have no second derivative. Where an operation has none, or an
    autograd function of the user's own has a wrong one, central differences of the gradient take
    its place, and ``note`` says so.

    Args:
        problem: its network in eval mode, at the point, on the device.
        batches: yields the same batches at every call, on the device, in the network's precision.
        names: canonical names of the parameters that move.
        context: entered around every pass, for what the plan asks of batch norm and numerics.

    Attributes:
        names: the parameters, in order.
        shapes: of each.
        owners: for each the module that holds it.
        size: P.
        eps: machine epsilon of the network's precision.
        note: how derivatives were computed, where that is not plain autograd.
        passes: how many gradients or Hessian-vector products were computed.

    Raises:
        LsweepError: a name is no parameter of the network, or nothing moves.

    >>> from lsweep.problems.problem import Problem
    >>> net = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.constant_(net.weight, 3.0)
    >>> data = (torch.ones(2, 1).double(), torch.zeros(2, 1).double())
    >>> problem = Problem(net, {"train": data}, loss=nn.MSELoss())
    >>> L = Objective(problem, lambda: iter([data]), ["weight"])
    >>> L.value(), L.gradient().item(), L.hessian_product(torch.ones(1)).item()
    (9.0, 6.0, 2.0)
    """

    def __init__(
        self,
        problem: Problem,
        batches: Callable[[], Iterator[Batch]],
        names: Iterable[str],
        context: Context = contextlib.nullcontext,
    ) -> None:
        self.problem, self.batches, self._context = problem, batches, context
        own: dict[str, Tensor] = weights.parameters_of(problem.model)
        self.names = tuple(names)
        unknown = [n for n in self.names if n not in own]
        if unknown or not self.names:
            raise LsweepError(f"no parameter {unknown[0]!r} to move" if unknown else "no weights")
        self._parameters = [own[n] for n in self.names]
        owners = weights.owners_of(problem.model)
        self.owners = {n: owners[n] for n in self.names}
        self.shapes = tuple(p.shape for p in self._parameters)
        self.size = sum(p.numel() for p in self._parameters)
        first = self._parameters[0]
        self.device, self.precision = first.device, first.dtype
        wide = self.size <= LARGE and self.device.type != "mps"
        self.dtype = torch.float64 if wide else torch.float32
        self.eps = torch.finfo(self.precision).eps
        self.note, self.passes = "", 0
        self._examined = self._compared = self._own_functions = self._differences = False

    # -- vectors --------------------------------------------------------------------------------

    @property
    def here(self) -> Tensor:
        """The present weights as a vector [P]; a copy."""
        return self.flat(self._parameters)

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return tensors, in the order of ``names``, as one vector [P]."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector as name -> tensor, views that share its memory."""
        pieces = torch.split(vector, [s.numel() for s in self.shapes])
        return {n: t.view(s) for n, t, s in zip(self.names, pieces, self.shapes, strict=True)}

    def filter_scales(self) -> Tensor:
        """Return D of the filter metric at the present weights: ‖w_f‖/√n_f for each weight, [P].

        A random filter-normalised direction d has E[d dᵀ] = D² within each filter, so that
        E[dᵀHd] is the trace of D H D = Σ_f ‖w_f‖²/n_f · tr H_ff.
        """
        return self.flat(
            filter_scales(p, self.owners[n])
            for n, p in zip(self.names, self._parameters, strict=True)
        )

    # -- passes over the data -------------------------------------------------------------------

    def value(self, at: Tensor | None = None) -> float:
        """Return L, at the present weights or at the vector ``at``."""
        return self._value(at, self.batches())

    def _value(self, at: Tensor | None, batches: Iterable[Batch]) -> float:
        total = weight = 0.0
        with self.opened(at, self.problem.grad):
            for batch in batches:
                summed, w = self._summed(batch)
                total, weight = total + float(summed.detach()), weight + w
        return total / weight if weight else math.nan

    def gradient(self, at: Tensor | None = None) -> Tensor:
        """Return ∇L, [P]."""
        return self.with_gradient(at)[1]

    def with_gradient(self, at: Tensor | None = None) -> tuple[float, Tensor]:
        """Return L and ∇L, [P], from one pass."""
        found = self._accumulated(at, self._slope, self.batches())
        if not self._examined:
            self._examine_gradient(at)
        return found

    def hessian_product(self, vector: Tensor, at: Tensor | None = None) -> Tensor:
        """Return H v for the Hessian H of L, [P].

        Args:
            vector: v, [P].
            at: where; the present weights by default.
        """
        if self._differences:
            return self._difference(vector, at, self.batches)
        try:
            out = self._product(vector, at, self.batches())
        except (RuntimeError, NotImplementedError) as e:
            if is_out_of_memory(e):
                raise
            self._use_differences((str(e) or type(e).__name__).splitlines()[0][:120])
            return self.hessian_product(vector, at)
        if not self._examined:
            self._examine_gradient(at)
        if not self._compared:
            self._compared = True
            if self._own_functions and self._is_wrong(vector, at):
                self._use_differences("an autograd function of its own has a wrong one")
                return self.hessian_product(vector, at)
        return out

    def _product(self, vector: Tensor, at: Tensor | None, batches: Iterable[Batch]) -> Tensor:
        pieces = [t.to(self.precision) for t in self.split(vector.to(self.dtype)).values()]

        def along(loss: Tensor) -> list[Tensor | None]:
            first = self._gradients(loss, True)
            pairs = [(g, v) for g, v in zip(first, pieces, strict=True) if g is not None]
            slope = sum((torch.sum(g * v) for g, v in pairs), loss.new_zeros(()))
            if not slope.requires_grad:
                raise NotImplementedError("the gradient does not depend on the weights")
            return list(torch.autograd.grad(slope, self._parameters, allow_unused=True))

        return self._accumulated(at, along, batches)[1]

    def _difference(
        self, vector: Tensor, at: Tensor | None, batches: Callable[[], Iterable[Batch]]
    ) -> Tensor:
        norm = float(vector.norm())
        if not norm:
            return torch.zeros_like(vector)
        here = self.here if at is None else at
        step = self._step(here) / norm
        ahead, behind = (
            self._accumulated(here + s * step * vector, self._slope, batches())[1] for s in (1, -1)
        )
        return (ahead - behind) / (2 * step)

    def _step(self, here: Tensor) -> float:
        return float(self.eps ** (1 / 3) * max(1.0, float(here.norm())))

    # -- inside a pass --------------------------------------------------------------------------

    def _summed(self, batch: Batch) -> tuple[Tensor, float]:
        """Return Σ w v, attached to the weights, and Σ w on a batch."""
        s = self.problem.evaluate(batch, ("loss",), graph=True)["loss"]
        w = s.weights.to(self.dtype)
        v = torch.where(w == 0, 0.0, s.values.to(self.dtype))
        return (w * v).sum(), float(w.sum())

    def _gradients(self, loss: Tensor, create_graph: bool) -> list[Tensor | None]:
        if not loss.requires_grad:
            raise LsweepError(
                "the loss is detached from the weights: its curvature needs a loss that autograd "
                "can follow (no torch.no_grad, .item(), .numpy() or .detach() on the way)"
            )
        return list(
            torch.autograd.grad(
                loss, self._parameters, create_graph=create_graph, allow_unused=True
            )
        )

    def _slope(self, loss: Tensor) -> list[Tensor | None]:
        return self._gradients(loss, False)

    def _accumulated(
        self,
        at: Tensor | None,
        derivative: Callable[[Tensor], list[Tensor | None]],
        batches: Iterable[Batch],
    ) -> tuple[float, Tensor]:
        out = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        views, total, weight = list(self.split(out).values()), 0.0, 0.0
        self.passes += 1
        with self.opened(at):
            for batch in batches:
                summed, w = self._summed(batch)
                if not self._examined:
                    self._own_functions |= has_own_functions(summed)
                total, weight = total + float(summed.detach()), weight + w
                for view, d in zip(views, derivative(summed), strict=True):
                    if d is not None:
                        view += d.detach()
        return total / weight if weight else math.nan, out / weight

    @contextlib.contextmanager
    def opened(self, at: Tensor | None = None, grad: bool = True) -> Iterator[None]:
        """Let autograd see the weights that move, at ``at``; afterwards all is as before."""
        model = self.problem.model
        flags = [(q, q.requires_grad) for q in model.parameters()]
        places = [(p, p.data) for p in self._parameters]
        recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._context())
            stack.enter_context(deterministic())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if recurrent:  # cuDNN's have no second derivative, in eval mode not even a first
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.set_grad_enabled(grad))
            try:
                for q, _ in flags:
                    q.requires_grad_(False)
                for p in self._parameters:
                    p.requires_grad_(grad)
                if at is not None:
                    for p, t in zip(self._parameters, self.split(at).values(), strict=True):
                        p.data = t.to(self.precision)
                yield
            finally:
                for p, data in places:
                    p.data = data
                for q, flag in flags:
                    q.requires_grad_(flag)

    # -- where autograd is not enough -----------------------------------------------------------

    def _use_differences(self, reason: str) -> None:
        self._differences = True
        step = self._step(self.here)
        self.note = f"Hessian by central differences of the gradient, step {step:.1e} ({reason})"

    def _is_wrong(self, vector: Tensor, at: Tensor | None) -> bool:
        """Compare a Hessian-vector product on one batch with differences of the gradient."""
        one = self._first()
        product = self._product(vector, at, one)
        other = self._difference(vector, at, lambda: one)
        return float((product - other).norm()) > DETACHED * float(other.norm())

    def _first(self) -> list[Batch]:
        return [next(iter(self.batches()))]

    def _examine_gradient(self, at: Tensor | None) -> None:
        """After the first pass, check the gradient where autograd could be wrong in silence."""
        self._examined = True
        if self._own_functions or self.problem.grad:
            self._check_gradient(at, self._first())

    def _check_gradient(self, at: Tensor | None, one: list[Batch]) -> None:
        """Compare the gradient on one batch with the loss's rise along it.

        Raises:
            LsweepError: they differ: a part of the loss is detached from the weights.
        """
        value, g = self._accumulated(at, self._slope, one)
        here, norm = self.here if at is None else at, float(g.norm())
        step = self._step(here)
        noise = self.eps**0.5 * (1 + abs(value))
        if not step * norm > noise:
            return  # flat, or not finite: nothing to compare
        ahead, behind = (self._value(here + s * step / norm * g, one) for s in (1, -1))
        found = (ahead - behind) / (2 * step)
        if abs(found - norm) > DETACHED * max(abs(found), norm):
            raise LsweepError(
                f"the loss rises by {found:.3g} per unit along its gradient, whose norm is "
                f"{norm:.3g}: a part of it is detached from the weights (create_graph=True in "
                "torch.autograd.grad keeps it)"
            )


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let backward passes add up in a fixed order, wherever torch has an algorithm that does.

    A value is the same bit for bit whoever computes it; sums by atomic addition are not.
    """
    before = torch.get_deterministic_debug_mode()
    flags: Any = torch.utils.deterministic
    filled = flags.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*deterministic", UserWarning)
        try:
            torch.set_deterministic_debug_mode("warn")
            flags.fill_uninitialized_memory = False
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            flags.fill_uninitialized_memory = filled


def has_own_functions(loss: Tensor) -> bool:
    """True where the graph of a value has autograd functions that are not torch's own.

    >>> has_own_functions(torch.ones(1, requires_grad=True) * 2)
    False
    """
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        waiting += [n for n, _ in node.next_functions]
    return False


def filter_scales(weight: Tensor, module: nn.Module | None) -> Tensor:
    """Return ‖w_f‖/√n_f at each weight of a tensor, float64, in its shape.

    >>> filter_scales(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), nn.Linear(2, 2)).tolist()
    [[3.5355..., 3.5355...], [0.0, 0.0]]
    """
    rows = filter_rows(weight.detach().double(), module)
    spread = rows.norm(dim=1) / math.sqrt(rows.shape[1])
    return scale_rows(torch.ones_like(weight, dtype=torch.float64), spread, module)
