"""A network as a graph of plain operations, for any batch length: recorded twice, then simplified.

It is run at two batch lengths. Numbers that differ between the two follow from the batch's length,
which is written into the graph in their place. It must then come out as the network's own, on the
whole example and on other samples at other weights. What every backend that generates code would do
by itself is done here once.
"""

from __future__ import annotations

import inspect
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lsweep.backends.recording import Recording
from lsweep.backends.recording import Unsupported as Unsupported
from lsweep.backends.simplifying import computed_constants, tidy
from lsweep.problems.calling import call
from lsweep.problems.takeover import generators_kept, model_kept

aten = torch.ops.aten
SECONDS = 120.0  # a trace that takes longer than this costs more than it can save
LENGTHS = (3, 5)  # of the batches on which it is recorded
OTHER = 8  # of the one on which the graph is compared at other weights: even, as those are odd
AGREES = 1e-3  # relative to a usual number: another computation, not another rounding
CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (  # of each weight, where the two are compared
    lambda p: p * torch.linspace(1.05, 1.2, p.numel()).view(p.shape).to(p),
    lambda p: -p.flip(list(range(p.dim()))),  # no sign and no order stays what it was
)
READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage)
MAKES = (torch.tensor, torch.as_tensor, torch.asarray)  # of lists of tensors, past the dispatcher


@dataclass(frozen=True)
class Length:
    """A number that follows from the batch's length: so much for each sample, and a rest."""

    each: int
    rest: int

    def at(self, length: int) -> int:
        """Return it for a batch of a length."""
        return self.each * length + self.rest


def plain_graph(
    model: nn.Module, inputs: Any, state: Mapping[str, Tensor], free: bool = True
) -> fx.GraphModule:
    """Return a network as functional aten operations, in eval mode, with a free batch length.

    Args:
        model: any network; it is left as it was.
        inputs: an example batch's inputs: a tensor, a tuple or a dict of tensors [B, …].
        state: the tensors that become placeholders, by the name in ``meta["name"]``; all others
            that the network holds are constants.
        free: False takes the example's batch length, as some networks need.

    Returns:
        a module called with the tensors of the state that it uses, then the inputs. ``meta["val"]``
        of a node is a tensor of its shape, dtype and device at the first of ``LENGTHS``;
        ``meta["shape"]`` has a `Length` where that follows from the batch.

    Raises:
        Unsupported: it does not trace, fixes its batch length, draws random numbers, changes its
            own buffers or its input, or takes minutes.
    """
    keys = tuple(inputs) if isinstance(inputs, Mapping) else None
    leaves = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    leaves = [leaves] if isinstance(leaves, Tensor) else list(leaves)
    if not leaves or not all(isinstance(t, Tensor) and t.dim() for t in leaves):
        raise Unsupported("its inputs are not plain tensors")
    if free and len({len(t) for t in leaves}) > 1:
        raise Unsupported("it does not trace: its inputs differ in length")

    def network(tensors: Sequence[Tensor]) -> Any:
        if keys is not None:
            return call(model, dict(zip(keys, tensors, strict=True)))
        return call(model, tensors[0] if isinstance(inputs, Tensor) else tuple(tensors))

    end = time.monotonic() + SECONDS
    with _left_alone(model), _told():
        model.eval()
        with model_kept(model):  # attributes, too: each run begins as the first one
            wanted = network([t.detach().clone() for t in leaves])  # fills what caches there are
        runs = []
        for length in LENGTHS if free else (None,):
            few = _samples(leaves, length, 1)
            run = Recording(model, state, few, end)
            with model_kept(model), _Watching(run), run.running():
                output = network(few)
            if not isinstance(output, Tensor):
                raise Unsupported("its output is not one tensor")
            run.finish(output)
            runs.append(run)
        for node in runs[0].graph.nodes:
            shape = getattr(node.meta.get("val"), "shape", None)
            node.meta["shape"] = None if shape is None else tuple(shape)
        if free:
            _Freed(*runs)
        root = nn.Module()
        for name, t in runs[0].constants.items():
            root.register_buffer(name, t.detach())
        module = fx.GraphModule(root, runs[0].graph)
        tidy(module)
        computed_constants(module)
        check = _Check(module)
        check.compare(state, leaves, wanted)
        other, compared = _samples(leaves, OTHER if free else None, -1), False
        for change in CHANGES:
            with model_kept(model):
                for p in (p for p in model.parameters() if p.is_floating_point()):
                    p.data = change(p)
                compared |= check.compare_with(network, state, other)
        if not compared:
            raise Unsupported("it fails at other weights, so that its graph cannot be checked")
        if free:  # a last batch may have one sample
            with model_kept(model):
                check.compare_with(network, state, _samples(leaves, 1, 1))
    return module


def _samples(leaves: Sequence[Tensor], length: int | None, step: int) -> list[Tensor]:
    """Return the first samples (or the last, backwards), again and again where there are few."""
    count = len(leaves[0])
    at = torch.arange(length or count, device=leaves[0].device) % max(1, count)
    return [t.detach()[at if step > 0 else count - 1 - at] for t in leaves]


class _Check(fx.Interpreter):
    """Compares a graph with the network: what it computes, and the shapes that it tells."""

    def compare_with(
        self,
        network: Callable[[Sequence[Tensor]], Any],
        state: Mapping[str, Tensor],
        leaves: Sequence[Tensor],
    ) -> bool:
        """Raise where they differ on a batch; False where the network itself fails on it."""
        try:
            wanted = network([t.clone() for t in leaves])
        except Exception:
            return False
        self.compare(state, leaves, wanted)
        return True

    def compare(self, state: Mapping[str, Tensor], leaves: Sequence[Tensor], wanted: Any) -> None:
        """Raise where they differ."""
        self._length, self.extra_traceback = len(leaves[0]), False
        names = [n.meta["name"] for n in self.graph.nodes if "name" in n.meta]
        found = self.run(*(state[n].detach() for n in names), *leaves)
        if self._length == 1 and found.numel() == wanted.numel():
            wanted = wanted.reshape(found.shape)  # a lone sample is easily squeezed away
        if found.shape != wanted.shape or not _agree(found, wanted):
            raise Unsupported("it does not trace: it computes otherwise on other samples")

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node, whose shape must follow from the batch's length as it was found to."""
        found, shape = super().run_node(n), n.meta.get("shape")
        told = [s.at(self._length) if isinstance(s, Length) else s for s in shape or ()]
        if shape is not None and self._length > 1 and told != list(found.shape):
            raise _fixed(f"{n.name} is {list(found.shape)} for {self._length} samples, not {told}")
        return found


def _agree(found: Tensor, wanted: Tensor) -> bool:
    a, b = found.double(), wanted.double()
    usual = b[b.isfinite() & (b != 0)].abs()  # its median: a few may be as large as a mask's -1e9
    scale = float(usual.median()) if len(usual) else 1.0
    return bool(torch.isclose(a, b, AGREES, AGREES * scale, equal_nan=True).all())


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    with generators_kept(), model_kept(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)  # it is one opaque operation per layer
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _told() -> Iterator[None]:
    """Say in one clause why there is no graph, whatever the user's code raises."""
    try:
        yield
    except Unsupported:
        raise
    except Exception as e:
        text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
        reason = f"{type(e).__name__}: {text[:160]}"
        raise Unsupported(f"it does not trace, or its batch length is fixed: {reason}") from None


# -- a free batch length ---------------------------------------------------------------------------


class _Freed:
    """Writes into one recording what follows from the batch's length, as another shows it."""

    def __init__(self, run: Recording, other: Recording) -> None:
        self._graph, self._known = run.graph, dict[Length, fx.Node]()
        pairs = list(zip(run.graph.nodes, other.graph.nodes, strict=False))
        if len(run.graph.nodes) != len(other.graph.nodes):
            raise _fixed("another number of operations")
        self._place = {b: a for a, b in pairs}
        self._input = next(n for n, _ in reversed(pairs) if n.op == "placeholder")
        self._last = self._input
        for a, b in pairs:
            if (a.op, str(a.target)) != (b.op, str(b.target)):
                raise _fixed(f"{a.target} here, {b.target} there")
            if a.op == "get_attr" and not _equal(
                run.constants[str(a.target)], other.constants[str(b.target)]
            ):
                raise _fixed("it holds other numbers")
            if a.meta["shape"] is not None:
                there = b.meta["val"].shape
                if len(there) != len(a.meta["shape"]):
                    raise _fixed(f"{a.target} has another rank")
                a.meta["shape"] = tuple(map(_length, a.meta["shape"], there))
            if a.op == "call_function":
                a.args, a.kwargs = self._both(a.args, b.args), self._both(a.kwargs, b.kwargs)

    def _both(self, a: Any, b: Any) -> Any:
        """Return an argument for any batch length."""
        if isinstance(a, fx.Node):
            if a is not self._place.get(b):
                raise _fixed("operations on others")
            return a
        if isinstance(a, Mapping):
            return {k: self._both(v, b[k]) for k, v in a.items()}
        if isinstance(a, list | tuple):
            if len(a) != len(b):
                raise _fixed("another number of arguments")
            return type(a)(self._both(x, y) for x, y in zip(a, b, strict=True))
        if type(a) is int and type(b) is int:
            length = _length(a, b)
            return length if isinstance(length, int) else self._node(length)
        if repr(a) != repr(b):
            raise _fixed(f"{a!r} here, {b!r} there")
        return a

    def _node(self, length: Length) -> fx.Node:
        """Return the node that computes a length."""
        if length not in self._known:
            if length == Length(1, 0):
                made: tuple[Any, tuple[Any, ...]] = (aten.sym_size.int, (self._input, 0))
            elif length.rest:
                made = (operator.add, (self._node(Length(length.each, 0)), length.rest))
            else:
                made = (operator.mul, (self._node(Length(1, 0)), length.each))
            with self._graph.inserting_after(self._last):
                self._last = self._known[length] = self._graph.call_function(*made)
            self._last.meta.update(val=length.at(LENGTHS[0]), shape=None, moves=False)
        return self._known[length]


def _length(a: int, b: int) -> int | Length:
    """Return a number that was found at both lengths."""
    if a == b:
        return a
    each, odd = divmod(b - a, LENGTHS[1] - LENGTHS[0])
    if odd:
        raise _fixed(f"{a} for {LENGTHS[0]} samples, {b} for {LENGTHS[1]}")
    return Length(each, a - each * LENGTHS[0])


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    return bool(((a == b) | ((a != a) & (b != b))).all())  # bit for bit, and NaN is NaN


def _fixed(why: str) -> Unsupported:
    return Unsupported(f"its batch length is fixed: it does otherwise at another ({why})")


# -- attention -------------------------------------------------------------------------------------


class _Watching(TorchFunctionMode):
    """Keeps attention's batch dimension first, and sees data that is read past torch."""

    def __init__(self, run: Recording) -> None:
        super().__init__()
        self._run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, or attention as plain operations."""
        if func in READS:
            self._run.require_constant(args[0], func.__name__)
        if func in MAKES:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self._run.require_constant(t, func.__name__)
        if func is F.multi_head_attention_forward:
            return _attention(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
    """Return what `F.multi_head_attention_forward` does, batch first, for the plain cases.

    Torch's own moves the batch dimension to the second place and merges it with the heads.
    """
    names = inspect.signature(F.multi_head_attention_forward).parameters
    given = dict(zip(list(names)[3:], args, strict=False)) | kw
    weight, heads = given["in_proj_weight"], given["num_heads"]
    plain = all(
        given.get(n) is None
        for n in ("bias_k", "bias_v", "key_padding_mask", "static_k", "static_v")
    ) and not (given["add_zero_attn"] or given.get("use_separate_proj_weight") or given["training"])
    mask = given.get("attn_mask")
    if not plain or query.dim() != 3 or (mask is not None and mask.dim() != 2):
        return func(query, key, value, *args, **kw)
    bias = given["in_proj_bias"]
    width = query.shape[-1]

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], heads, width // heads).transpose(1, 2)

    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    if query is key is value:
        q, k, v = F.linear(q, weight, bias).chunk(3, -1)
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b) for x, w, b in zip((q, k, v), weight.chunk(3), biases, strict=True)
        )
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.logical_not()  # there True is "may not", here "may"
    causal = bool(given.get("is_causal")) and not given.get("need_weights", True)
    found = F.scaled_dot_product_attention(
        split(q), split(k), split(v), None if causal else mask, is_causal=causal
    )
    out = F.linear(
        found.transpose(1, 2).flatten(2), given["out_proj_weight"], given["out_proj_bias"]
    )
    # Where the attention weights are not looked at, this second computation is dead code.
    weights = func(query, key, value, *args, **kw)[1] if given.get("need_weights", True) else None
    return out.transpose(0, 1), weights
