"""One run of a network written down as a graph: each operation below autograd is a node.

What is changed in place is written as if it were made anew: each tensor knows the node that says
what it holds, and a view the tensor that it looks into. So the graph is functional; composite
operations (a linear layer, a normalisation, an attention) stay one node.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lsweep.errors import LsweepError

aten = torch.ops.aten
SAME_NUMBERS = {  # views of all numbers in order
    "view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "detach",
    "alias", "contiguous", "view_as", "reshape_as",
}  # fmt: skip
PARTS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


COUNTING = (  # how much they return follows from numbers, but has no tag that says so
    aten.where.default, aten.nonzero_numpy.default, aten.repeat_interleave.self_Tensor,
)  # fmt: skip


class Unsupported(LsweepError):
    """A network that a backend cannot take; the message is one clause that says why."""


@dataclass
class _Held:
    """What a tensor holds: a node, as of so many changes of its storage.

    ``name`` says what was there before the run; a view has the tensor that it looks into, and the
    node that looks.
    """

    run: Recording
    node: fx.Node
    name: str = ""
    changes: int = 0
    base: Tensor | None = None
    view: fx.Node | None = None


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what runs under it.

    Args:
        model: whose modules are named in ``meta["module"]`` of nodes.
        state: the tensors that become placeholders, by the name in their ``meta["name"]``.
        inputs: become placeholders after them.
        end: when to give up, by the monotonic clock.

    Attributes:
        graph: of nodes with ``meta["val"]``, which has shape, dtype and device, but no numbers.
        constants: what else the network holds, by the attribute that stands for it.

    Raises:
        Unsupported: from within a run: it looks at its data, draws random numbers, changes what
            was there before, or goes on after the end.
    """

    def __init__(
        self, model: nn.Module, state: Mapping[str, Tensor], inputs: Sequence[Tensor], end: float
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph, self.constants = fx.Graph(), dict[str, Tensor]()
        self._model, self._end, self._path = model, end, list[str]()
        self._own: dict[int, tuple[Tensor, _Held]] = {}  # what was there before, by identity
        self._changes: dict[int, int] = {}  # by storage
        for name, t in state.items():
            node = self.graph.placeholder(f"state_{len(self._own)}")
            node.meta.update(val=_like(t), moves=True, name=name)
            self._own[id(t)] = (t, _Held(self, node, name))
        for i, t in enumerate(inputs):
            node = self.graph.placeholder(f"input_{i}")
            node.meta.update(val=_like(t), moves=True)
            self._own[id(t)] = (t, _Held(self, node, "its input"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would import it, and that takes 100 MiB

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write down what runs within."""
        names = {id(m): n for n, m in self._model.named_modules()}
        with ExitStack() as stack:
            for hook in (
                register_module_forward_pre_hook(
                    lambda m, _: self._path.append(names.get(id(m), ""))
                ),
                register_module_forward_hook(lambda *_: self._left(), always_call=True),
            ):
                stack.callback(hook.remove)
            # At the level of autograd composite operations would be taken apart.
            stack.enter_context(torch._C._AutoDispatchBelowAutograd())
            stack.enter_context(self)
            yield

    def _left(self) -> None:
        self._path.pop()

    def finish(self, output: Tensor) -> None:
        """Let the graph return a tensor."""
        self.graph.output(self._read(output))

    def require_constant(self, t: Tensor, how: str) -> None:
        """Raise where numbers are read that follow from weights or inputs."""
        if self._read(t).meta["moves"]:
            raise Unsupported(f"it does not trace: it looks at its data ({how})")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and write it down."""
        kwargs = kwargs or {}
        if time.monotonic() > self._end:
            raise Unsupported("tracing it takes minutes")
        if _draws(func, args, kwargs):
            raise Unsupported(f"it draws random numbers ({func})")
        if "as_strided" in str(func):
            raise Unsupported("it reads memory by strides of its own (as_strided)")
        if func is aten.batch_norm.default and args[5]:
            if isinstance(args[3], Tensor):
                raise Unsupported(f"it changes {self._held(args[3]).name} while it runs")
            with self:
                arguments = (*args[:3], *args[5:8])
                return aten._native_batch_norm_legit.no_stats(*arguments)[0]
        if func is aten.detach_.default:
            return args[0]  # nothing to be done below autograd
        if func._schema.is_mutable:
            return self._change(func, args, kwargs)
        # What is lifted is a constant, and may be changed in place: only what is made of it.
        out = args[0].clone() if func is aten.lift_fresh.default else func(*args, **kwargs)
        self._enter(func, args, kwargs, out)
        return out

    def _enter(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Write down an operation and what came of it."""
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if torch.Tag.dynamic_output_shape in func.tags or func in COUNTING:
            masks = [t for t in given[1:] if t.dtype in (torch.bool, torch.uint8)]
            for t in masks if func is aten.index.Tensor else given:
                self.require_constant(t, str(func))
        if not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            for t in given if out is not None else ():
                self.require_constant(t, str(func))
        elif not any(out is t for t in given):  # else nothing was to be done
            node = self._node(func, args, kwargs, out)
            bases = {_storage(t): t for t in reversed(given)}
            for i, t in enumerate([out] if isinstance(out, Tensor) else out):
                one = node if t is out else self._node(operator.getitem, (node, i), {}, t)
                base = bases.get(_storage(t))
                changes = self._changes.get(_storage(t), 0)
                t._held = _Held(self, one, "", changes, base, one if base is not None else None)

    def _node(self, func: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        args, kwargs = tree_map(
            lambda a: self._read(a) if isinstance(a, Tensor) else a, (tuple(args), dict(kwargs))
        )
        node = self.graph.call_function(func, args, kwargs)
        path = next((p for p in reversed(self._path) if p), "")
        moves = any(n.meta["moves"] for n in node.all_input_nodes)
        node.meta.update(val=tree_map(_like, value), moves=moves, module=path)
        return node

    # -- what tensors hold ------------------------------------------------------------------------

    def _held(self, t: Tensor) -> _Held:
        if id(t) in self._own:
            return self._own[id(t)][1]
        held: _Held | None = getattr(t, "_held", None)
        if held is not None and held.run is self:
            return held
        place = (t.data_ptr(), t.shape, t.stride())
        for other, known in self._own.values():  # a parameter's ``data``
            if (other.data_ptr(), other.shape, other.stride()) == place and t.numel():
                return known
        if isinstance(t, nn.Parameter):  # made of another one, maybe, past the dispatcher
            raise Unsupported("it does not trace: it has a parameter that is none of its module's")
        name = f"constant_{len(self.constants)}"
        self.constants[name] = t
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(name)
        node.meta.update(val=_like(t), moves=False)
        self._own[id(t)] = (t, _Held(self, node, "what it holds"))
        return self._own[id(t)][1]

    def _read(self, t: Tensor) -> fx.Node:
        """Return the node that says what a tensor holds now."""
        held = self._held(t)
        now = self._changes.get(_storage(t), 0)
        if held.changes != now and held.base is not None and held.view is not None:
            looks, base = held.view, self._read(held.base)
            several = looks.target is operator.getitem
            made = looks.args[0] if several else looks
            assert isinstance(made, fx.Node)
            func: Any = made.target
            again = self.graph.call_function(func, (base, *made.args[1:]), made.kwargs)
            again.meta.update(made.meta)
            if several:
                again = self.graph.call_function(operator.getitem, (again, looks.args[1]))
                again.meta.update(looks.meta)
            held.node, held.changes = again, now
        return held.node

    def _change(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Run an operation in place; write it down as one that makes its numbers anew."""
        name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
        target: Tensor = args[0]
        reshapes = torch.Tag.inplace_view in func.tags
        if not hasattr(packet, overload) or not isinstance(target, Tensor) or reshapes:
            raise Unsupported(f"it writes into a tensor that is there ({func})")
        root = target
        while (base := self._held(root).base) is not None:
            root = base
        if self._held(root).name:
            raise Unsupported(f"it changes {self._held(root).name} while it runs")
        source = args[1] if func is aten.copy_.default else None
        if source is not None and (source.shape, source.dtype) == (target.shape, target.dtype):
            node, made = self._read(source), source
        else:
            made = getattr(packet, overload)(*args, **kwargs)
            node = self._node(getattr(packet, overload), args, kwargs, made)
            if made.dtype != target.dtype:  # what is there keeps its own
                node = self._node(aten._to_copy.default, (node,), {"dtype": target.dtype}, target)
        self._write(target, node)
        return target.copy_(made)

    def _write(self, t: Tensor, node: fx.Node) -> None:
        """Enter what a tensor holds from now on; of a view, into what it looks as well."""
        held, storage = self._held(t), _storage(t)
        if held.base is None:
            self._changes[storage] = self._changes.get(storage, 0) + 1
        else:
            self._write(held.base, self._put(held, self._read(held.base), node))
        held.node, held.changes = node, self._changes[storage]

    def _put(self, held: _Held, whole: fx.Node, part: fx.Node) -> fx.Node:
        """Return what a tensor holds where one of its views is another."""
        looks, val = held.view, whole.meta["val"]
        assert looks is not None
        func: Any = looks.target
        name = func.__name__.partition(".")[0]
        if func in PARTS:
            new = self.graph.call_function(PARTS[func], (whole, part, *looks.args[1:]))
        elif name in SAME_NUMBERS:
            new = self.graph.call_function(aten.reshape.default, (part, list(val.shape)))
        elif name in ("transpose", "t"):
            new = self.graph.call_function(func, (part, *looks.args[1:]))
        else:
            raise Unsupported(f"it changes a part of a tensor in place ({name})")
        moves = whole.meta["moves"] or part.meta["moves"]
        new.meta.update(val=val, moves=moves, module=part.meta.get("module", ""))
        return new


def _like(t: Any) -> Any:
    """Return a tensor of the same shape, dtype and device that has no numbers of its own."""
    return t.detach().new_empty(()).expand(t.shape) if isinstance(t, Tensor) else t


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it draws random numbers; some do so only where they are given a probability."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in arguments], args, strict=False)) | kwargs
    chance = next((given[k] for k in ("p", "dropout_p", "dropout") if k in given), True)
    return bool(chance and given.get("train", given.get("training", True)))
