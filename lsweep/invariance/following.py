"""Hidden units followed through a network's graph: what each operation does to labels.

Whatever works on each number by itself passes units on; a view moves labels as it moves numbers; a
norm's parameters belong to the units that it normalises. What is not known holds its units fixed
and is reported: nothing is claimed for it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from lsweep.invariance.labels import Value, collapsed, dims_of, valued
from lsweep.invariance.mixing import Mixing, name_of, shape_of, unlabelled, where_of

VIEWS = {
    "reshape", "permute", "transpose", "t", "numpy_T", "select", "slice", "split",
    "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "expand", "flatten",
    "unflatten", "narrow", "movedim", "view", "repeat", "tensor_split",
}  # fmt: skip
CASTS = {"_to_copy", "to", "type_as"}
ADDS = {"add", "sub", "rsub"}
PRODUCTS = {"mul", "div"}
POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample")
REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm"}


class Following(Mixing):
    """A graph on its way from parameters to the output, with a value for each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self._values: dict[fx.Node, Any] = {}
        for node in module.graph.nodes:
            self._values[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        found = node.meta.get("val")
        if node.op == "placeholder" and "name" in node.meta:
            return self.ties.parameter(node.meta["name"], shape_of(found))
        if node.op == "output":
            for label in self._values[cast(fx.Node, node.args[0])].labels:
                self.ties.fix(label, "the network's output")
            return None
        if node.op != "call_function" or not _holds_tensors(found):
            return Value(shape_of(found)) if isinstance(found, Tensor) else found
        args, kwargs = (
            cast(Any, fx.map_arg(a, self._values.__getitem__)) for a in (node.args, node.kwargs)
        )
        if node.target is operator.getitem:
            return args[0][args[1]]
        name, given = _bound(node, args, kwargs)
        for source in node.all_input_nodes:
            if source in self.scores and name not in ("matmul", "bmm"):
                self.scores.add(node)
        values = [v for v in _flat(list(given.values())) if isinstance(v, Value)]
        if not any(v.labels for v in values):
            return unlabelled(found)
        rule = getattr(self, f"_on_{name}", None)
        if rule is not None:
            return rule(node, given)
        if name in CASTS:
            return Value(shape_of(found), values[0].labels, values[0].name)
        if name in VIEWS:
            return _viewed(node, given, found)
        if any(word in name for word in POOLS):
            return self._pooled(node, given, shape_of(found))
        if name in REDUCTIONS:
            return self._reduced(node, given, shape_of(found))
        if isinstance(found, Tensor) and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self._pointwise(node, name, values)
        return self._refuse(node, values)

    # -- each number by itself -------------------------------------------------------------------

    def _pointwise(self, node: fx.Node, name: str, values: Sequence[Value]) -> Value:
        """Return what an elementwise operation makes of one or several operands."""
        if name == "where":  # which of the two it takes is no number that is passed on
            values = [*values[1:], values[0]]
        scalars = name in ADDS and len(values) == 1
        kind = "sum" if name in ADDS else "product" if name in PRODUCTS else "pointwise"
        out, *others = values
        for value in others:
            out = self._combined(node, out, value, kind, name)
        for label in out.labels:
            if kind == "pointwise" or scalars:
                self.ties.touch("shift" if scalars else "pointwise", name, label)
        whole = len(values) > 1 or scalars or kind == "product"
        return Value(out.shape, out.labels, out.name if whole else "")

    # -- normalisation ---------------------------------------------------------------------------

    def _on_batch_norm(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x = given["input"]
        mean = given["running_mean"].name if given["running_mean"] else ""
        name = mean.rpartition(".")[0] or where_of(node)
        for label in x.labels:
            if dims_of(label) != (1,):
                self.ties.fix(label, f"units along the samples of a batch norm ({name})")
            else:
                self.ties.touch("norm", f"batch_norm {name}", label)
        for key, role in (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"),
                          ("running_var", "variance")):  # fmt: skip
            self._per_channel(node, x, given[key], role)
        return Value(x.shape, x.labels)

    def _on_group_norm(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x, groups = given["input"], given["num_groups"]
        for label in x.labels:
            if dims_of(label) != (1,):
                self.ties.fix(label, f"units along the places of a group norm ({where_of(node)})")
            else:
                split = label.view(groups, -1)
                self.ties.touch("norm", f"group_norm {where_of(node)}", split, [0])
        for key, role in (("weight", "scale"), ("bias", "bias")):
            self._per_channel(node, x, given[key], role)
        return Value(x.shape, x.labels)

    def _on_layer_norm(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x, over = given["input"], len(given["normalized_shape"])
        for label in x.labels:
            outside = [d for d in dims_of(label) if d < len(x.shape) - over]
            if len(outside) < len(dims_of(label)):
                kind = name_of(node).removeprefix("fused_")
                self.ties.touch("norm", f"{kind} {where_of(node)}", label, outside)
        out = Value(x.shape, x.labels)
        for key, role in (("weight", "mul"), ("bias", "add")):
            if isinstance(given.get(key), Value):
                kind = "product" if role == "mul" else "sum"
                out = self._combined(node, out, given[key], kind, role)
        return out

    _on_rms_norm = _on_layer_norm

    def _on_softmax(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x = given["self"]
        dim = given["dim"] % len(x.shape)
        for label in x.labels:
            if dim in dims_of(label):
                self.ties.touch(
                    "reduced", name_of(node), label, [d for d in dims_of(label) if d != dim]
                )
            else:
                self.ties.touch("pointwise", name_of(node), label)
        return Value(x.shape, x.labels)

    _on__softmax = _on_log_softmax = _on__log_softmax = _on__safe_softmax = _on_softmax

    # -- fewer or more numbers -------------------------------------------------------------------

    def _pooled(self, node: fx.Node, given: dict[str, Any], shape: tuple[int, ...]) -> Any:
        x = given["input" if "input" in given else "self"]  # as in F.interpolate
        if len(x.shape) != len(shape):
            return self._refuse(node, [x])
        bad = [t for t in x.labels if any(shape[d] != x.shape[d] for d in dims_of(t))]
        if bad:
            return self._refuse(node, [x])
        found = Value(shape, x.labels)
        return [found, Value(shape)] if isinstance(node.meta["val"], tuple | list) else found

    def _reduced(self, node: fx.Node, given: dict[str, Any], shape: tuple[int, ...]) -> Any:
        x, dims = given["self"], given.get("dim")
        if dims is None or dims == []:
            dims = list(range(len(x.shape)))
        over = {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
        labels = []
        for label in x.labels:
            mine = set(dims_of(label))
            if mine & over:
                self.ties.touch("reduced", name_of(node), label, sorted(mine - over))
                continue
            if name_of(node) not in ("mean", "sum", "amax", "amin"):
                self.ties.touch("pointwise", name_of(node), label)
            if len(shape) != len(x.shape):
                kept = [n for d, n in enumerate(label.shape) if d not in over]
                label = label.reshape(kept)
            labels.append(label)
        return Value(shape, tuple(labels))

    def _on_constant_pad_nd(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x, pad = given["self"], given["pad"]
        rank, shape = len(x.shape), shape_of(node.meta["val"])
        padded = {rank - 1 - i // 2 for i, n in enumerate(pad) if n}
        if given.get("value"):
            for label in x.labels:
                self.ties.touch("shift", "pad", label)
        out = []
        for label in x.labels:
            if padded & set(dims_of(label)):
                whole = label.expand(x.shape)
                label = collapsed(torch.constant_pad_nd(whole, pad, 0))
            out.append(label)
        return valued(shape, out)

    def _on_pad(self, node: fx.Node, given: dict[str, Any]) -> Any:
        if given["mode"] == "constant":
            return self._on_constant_pad_nd(node, given)
        return self._refuse(node, [given["self"]])

    def _on_cat(self, node: fx.Node, given: dict[str, Any]) -> Value:
        parts, shape = given["tensors"], shape_of(node.meta["val"])
        dim = given["dim"] % len(shape)
        if any(len(p.shape) != len(shape) for p in parts):
            return cast(Value, self._refuse(node, parts))
        found: dict[tuple[int, ...], list[Tensor | None]] = {}
        for i, part in enumerate(parts):
            for label in part.labels:
                found.setdefault(dims_of(label), [None] * len(parts))[i] = label
        out = []
        for dims, labels in found.items():
            if dim in dims:  # other units beside them; numbers of no unit count as fixed
                pieces = [
                    torch.zeros([1] * len(shape), dtype=torch.long) if t is None else t
                    for t in labels
                ]
                lies = [[n if d in dims else 1 for d, n in enumerate(p.shape)] for p in parts]
                whole = [t.expand(n) for t, n in zip(pieces, lies, strict=True)]
                out.append(torch.cat(whole, dim))
                continue
            known = [(t, p) for t, p in zip(labels, parts, strict=True) if t is not None]
            for (label, part), (other, second) in itertools.pairwise(known):
                self.ties.tie(label, other)
                for t, p in ((label, part), (other, second)):
                    if p.name:
                        self.ties.role(t, "row")
            if len(known) < len(parts):
                self.ties.fix(
                    known[0][0], f"joined with numbers of fixed places ({where_of(node)})"
                )
            # What is followed from here on is the part that no parameter stands for.
            label = next((t for t, p in known if not p.name), known[0][0])
            out.append(label)
        return valued(shape, out)

    def _on_index(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """Follow ``x[index]`` where no unit is picked: tokens, places, samples."""
        x, picks = given["self"], given["indices"]
        touched = [i for i, p in enumerate(picks) if p is not None]
        if not touched or any(set(touched) & set(dims_of(t)) for t in x.labels):
            return self._refuse(node, [x])
        first, last = touched[0], touched[-1]
        if touched != list(range(first, last + 1)):
            return self._refuse(node, [x])
        shape = shape_of(node.meta["val"])
        more = len(shape) - (len(x.shape) - len(touched))
        labels = [
            t.reshape([*t.shape[:first], *[1] * more, *t.shape[last + 1 :]]) for t in x.labels
        ]
        return Value(shape, tuple(labels))


def _holds_tensors(found: Any) -> bool:
    if isinstance(found, list | tuple):
        return bool(found) and isinstance(found[0], Tensor)
    return isinstance(found, Tensor)


def _flat(values: Sequence[Any]) -> list[Any]:
    return [w for v in values for w in (_flat(v) if isinstance(v, list | tuple) else [v])]


def _viewed(node: fx.Node, given: dict[str, Any], found: Any) -> Any:
    """Return what a view makes of labels: it moves them as it moves numbers."""
    x: Value = next(v for v in given.values() if isinstance(v, Value))
    args = cast(Callable[..., Any], node.target)
    rest = {k: v for k, v in given.items() if v is not x}
    moved = [args(t.expand(x.shape), **rest) for t in x.labels]
    if isinstance(found, Tensor):
        return valued(shape_of(found), moved, x.name)
    return [valued(shape_of(f), [m[i] for m in moved], x.name) for i, f in enumerate(found)]


def _bound(
    node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and all its arguments by name."""
    schema = cast(Any, node.target)._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | dict(kwargs)
    return schema.name.removeprefix("aten::"), given
