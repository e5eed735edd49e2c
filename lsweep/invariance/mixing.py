"""Units met by units: what sums, products and contractions do to labels.

A contraction (linear, convolution, matrix product, attention) ties the units that it sums over to
the columns that read them and begins new ones, the rows; a sum or a product number by number ties
the units of both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from lsweep.invariance.labels import Ties, Value, at_rank, dims_of, shapes_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Mixing:
    """Rules for operations in which numbers of different units meet.

    Attributes:
        ties: what is found out.
        gates: per product of two streams of units, both labels.
        scores: what is computed from queries and keys alone.
    """

    def __init__(self) -> None:
        self.ties = Ties()
        self.gates: list[tuple[Tensor, Tensor]] = []
        self.scores: set[fx.Node] = set()

    def _refuse(self, node: fx.Node, values: Sequence[Value], why: str = "") -> Any:
        reason = f"{why or name_of(node) + ' is not followed'} ({where_of(node)})"
        self.ties.unknown.append(reason)
        for label in (t for v in values for t in v.labels):
            self.ties.fix(label, reason)
        return unlabelled(node.meta["val"])

    # -- number by number ------------------------------------------------------------------------

    def _combined(self, node: fx.Node, a: Value, b: Value, kind: str, role: str) -> Value:
        """Return a sum, product or the like of two values; ``role`` is what a parameter does."""
        ties, shape = self.ties, shapes_of([a, b])
        a, b = at_rank(a, len(shape)), at_rank(b, len(shape))
        role = {"add": "bias", "sub": "bias", "mul": "scale"}.get(role, "")
        labels, met = [], set()
        for label in a.labels:
            others = [i for i, t in enumerate(b.labels) if dims_of(t) == dims_of(label)]
            if not others:
                labels += self._alone(label, b, kind)
                continue
            other = b.labels[others[0]]
            met.add(others[0])
            if b.name and not a.name:
                ties.alias(other, label)
                if role:
                    ties.role(other, role)
            elif a.name and not b.name:
                ties.alias(label, other)
                if role:
                    ties.role(label, role)
                label = other
            else:
                same = torch.equal(label, other)
                ties.tie(label, other)
                if kind == "product" and not same:
                    self.gates.append((label, other))
                if a.name and b.name:
                    ties.alike(label, other)
                elif not (same and kind == "sum"):
                    ties.touch(kind, name_of(node), label)
            labels.append(label)
        for i, other in enumerate(b.labels):
            if i not in met:
                labels += self._alone(other, a, kind)
        return Value(shape, tuple(labels), a.name and b.name)

    def _alone(self, label: Tensor, other: Value, kind: str) -> list[Tensor]:
        """Return the label of units that meet numbers which belong to no unit."""
        across = [d for d in dims_of(label) if other.shape[d] > 1]
        if across and kind == "sum" and len(across) == len(dims_of(label)):
            self.ties.fix(label, "numbers of fixed places are added")
            return []
        if across:
            self.ties.touch("scope", kind, label, across)
        if kind != "product":
            self.ties.touch("shift", kind, label)
        return [label]

    def _per_channel(self, node: fx.Node, x: Value, parameter: Any, role: str) -> Value:
        """Let a bias, a scale or a statistic belong to the units along dimension 1."""
        if not isinstance(parameter, Value) or not parameter.labels:
            return x
        label = next((t for t in x.labels if dims_of(t) == (1,)), None)
        if label is None:
            self.ties.fix(parameter.labels[0], f"no units to belong to ({where_of(node)})")
            return x
        self.ties.alias(parameter.labels[0], label.flatten())
        self.ties.role(parameter.labels[0], role)
        return x

    # -- sums over units -------------------------------------------------------------------------

    def _contract(self, node: fx.Node, a: Value, b: Value, terms: tuple[str, str, str]) -> Value:
        """Return einsum(a, b), its terms one letter per dimension; parameters get their roles."""
        ties = self.ties
        letters = "".join(dict.fromkeys(terms[0] + terms[1]))
        size = {
            c: n for v, t in ((a, terms[0]), (b, terms[1])) for c, n in zip(t, v.shape, strict=True)
        }
        size |= {c: max(a.shape[terms[0].index(c)], b.shape[terms[1].index(c)])
                 for c in letters if c in terms[0] and c in terms[1]}  # fmt: skip
        summed = {i for i, c in enumerate(letters) if c not in terms[2]}
        left = [_spread(t, terms[0], letters) for t in a.labels]
        right = [_spread(t, terms[1], letters) for t in b.labels]
        open_right = [t for t in right if summed & set(dims_of(t))]
        one = bool(a.name) != bool(b.name)  # of two parameters, neither is read by the other
        passed: list[tuple[Tensor, Value, str]] = []
        for label in left:
            over = summed & set(dims_of(label))
            if not over:
                passed.append((label, a, "row" if a.name and one else ""))
                continue
            partners = [t for t in open_right if summed & set(dims_of(t)) == over]
            if not partners:
                ties.fix(label, f"summed with numbers of fixed places ({where_of(node)})")
                continue
            other = partners[0]
            open_right = [t for t in open_right if t is not other]
            self._summed(node, (a, label), (b, other), summed)
        for label in open_right:
            ties.fix(label, f"summed with numbers of fixed places ({where_of(node)})")
        passed += [
            (t, b, "row" if b.name and one else "") for t in right if not summed & set(dims_of(t))
        ]
        out: list[Tensor] = []
        for label, source, role in passed:
            if role:
                ties.role(label, role)
            twin = next((t for t in out if dims_of(t) == dims_of(label)), None)
            if twin is not None:
                ties.tie(label, twin)
                ties.touch("product", name_of(node), label)
                continue
            beside, term = (b, terms[1]) if source is a else (a, terms[0])
            extent = dict(zip(term, beside.shape, strict=True))
            across = [d for d in dims_of(label) if extent.get(letters[d], 1) > 1]
            matched = any(dims_of(t) == dims_of(label) for t in (right if source is a else left))
            if across and not matched:
                ties.touch("scope", name_of(node), label, across)
            out.append(label)
        labels = [t.permute([letters.index(c) for c in terms[2]] + sorted(summed)) for t in out]
        shape = [size[c] for c in terms[2]]
        found = tuple(t.reshape(t.shape[: len(shape)]) for t in labels)
        return Value(tuple(shape), found, a.name and b.name)

    def _summed(
        self, node: fx.Node, one: tuple[Value, Tensor], two: tuple[Value, Tensor], summed: set[int]
    ) -> None:
        (a, left), (b, right) = one, two
        ties = self.ties
        ties.tie(left, right)
        for label in (left, right):
            ties.touch(
                "scope", name_of(node), label, [d for d in dims_of(label) if d not in summed]
            )
        if a.name and b.name:
            ties.role(left, "column")
            ties.role(right, "row")
        elif a.name or b.name:
            ties.role(left if a.name else right, "column")
        else:
            for label, role in ((left, "query"), (right, "key")):
                ties.role(label, role)
                ties.touch("dot", node.name, label)
            self.scores.add(node)

    def _on_linear(self, node: fx.Node, given: dict[str, Any]) -> Value:
        x, weight, bias = given["input"], given["weight"], given["bias"]
        batch = LETTERS[: len(x.shape) - 1]
        out = self._contract(node, x, weight, (batch + "z", "yz", batch + "y"))
        return out if bias is None else self._combined(node, out, bias, "sum", "add")

    def _on_matmul(self, node: fx.Node, given: dict[str, Any]) -> Any:
        a, b = given["self"], given["other" if "other" in given else "mat2"]
        if min(len(a.shape), len(b.shape)) < 2:
            return self._refuse(node, [a, b])
        rank = max(len(a.shape), len(b.shape))
        batch = LETTERS[: rank - 2]
        terms = (batch[rank - len(a.shape) :] + "xz", batch[rank - len(b.shape) :] + "zy")
        out = self._contract(node, a, b, (*terms, batch + "xy"))
        if node.args[0] in self.scores and not b.name:
            for label in b.labels:
                self.ties.role(label, "value")
        return out

    _on_mm = _on_bmm = _on_matmul

    def _on_addmm(self, node: fx.Node, given: dict[str, Any]) -> Any:
        if given["alpha"] != 1 or given["beta"] != 1:
            return self._refuse(node, [given["self"], given["mat1"], given["mat2"]])
        out = self._contract(node, given["mat1"], given["mat2"], ("xz", "zy", "xy"))
        return self._combined(node, out, given["self"], "sum", "add")

    def _on_einsum(self, node: fx.Node, given: dict[str, Any]) -> Any:
        equation, tensors = given["equation"].replace(" ", ""), given["tensors"]
        sides, _, result = equation.partition("->")
        terms = sides.split(",")
        if "." in equation or len(terms) != 2 or any(len(set(t)) < len(t) for t in terms):
            return self._refuse(node, tensors)
        return self._contract(node, tensors[0], tensors[1], (terms[0], terms[1], result))

    def _on_scaled_dot_product_attention(self, node: fx.Node, given: dict[str, Any]) -> Any:
        q, k, v = given["query"], given["key"], given["value"]
        if given.get("enable_gqa"):
            return self._refuse(node, [q, k, v])
        batch = LETTERS[: len(q.shape) - 2]
        scores = self._contract(node, q, k, (batch + "xz", batch + "yz", batch + "xy"))
        out = self._contract(node, scores, v, (batch + "xz", batch + "zy", batch + "xy"))
        for label in v.labels:
            self.ties.role(label, "value")
        return out

    def _on_convolution(self, node: fx.Node, given: dict[str, Any]) -> Any:
        x, weight, bias = given["input"], given["weight"], given["bias"]
        groups, channels = given["groups"], x.shape[1]
        turned = "transpose" in name_of(node) or given.get("transposed", False)
        shape = shape_of(node.meta["val"])
        bad = [t for t in x.labels if dims_of(t) != (1,)]
        for label in bad:
            self.ties.fix(label, f"units along the places of a convolution ({where_of(node)})")
        read = next((t for t in x.labels if dims_of(t) == (1,)), None)
        for label in (t for t in weight.labels if dims_of(t)[0] > 1 or len(dims_of(t)) > 1):
            self.ties.fix(label, "places in a kernel")
        rows = along(weight, 1 if turned else 0)
        columns = along(weight, 0 if turned else 1)
        lies = [1, shape[1], *[1] * (len(shape) - 2)]
        if groups == 1:
            if columns is not None and read is not None:
                self.ties.tie(columns, read.flatten())
                self.ties.role(columns, "column")
            else:
                for label in [t for t in (columns, read) if t is not None]:
                    self.ties.fix(label, f"read with numbers of fixed places ({where_of(node)})")
            if rows is None:
                return Value(shape)
            self.ties.role(rows, "row")
            out = Value(shape, (rows.view(lies),))
        elif groups == channels and not turned and read is not None and rows is not None:
            label = read.flatten().repeat_interleave(shape[1] // channels)
            self.ties.role(rows, "depthwise")
            self.ties.alias(rows, label)
            self.ties.touch("depthwise", where_of(node), label)
            out = Value(shape, (label.view(lies),))
        else:
            held = [*x.labels, *([columns] if columns is not None else [])]
            for label in held:
                self.ties.fix(label, f"a grouped convolution reads them ({where_of(node)})")
            if held:
                self.ties.unknown.append(
                    f"what a convolution of {groups} groups reads is held fixed ({where_of(node)})"
                )
            if rows is None or turned:
                if rows is not None:
                    self.ties.fix(rows, "a grouped transposed convolution")
                return Value(shape)
            self.ties.role(rows, "row")
            self.ties.touch("scope", "groups", rows.view(groups, -1), [0])
            out = Value(shape, (rows.view(lies),))
        return out if bias is None else self._per_channel(node, out, bias, "bias")

    _on_conv1d = _on_conv2d = _on_conv3d = _on_convolution
    _on_conv_transpose1d = _on_conv_transpose2d = _on_conv_transpose3d = _on_convolution

    def _on_embedding(self, node: fx.Node, given: dict[str, Any]) -> Value:
        weight, shape = given["weight"], shape_of(node.meta["val"])
        words, units = along(weight, 0), along(weight, 1)
        if words is not None:
            self.ties.fix(words, "the network's input")
        if units is None:
            return Value(shape)
        self.ties.role(units, "row")
        return Value(shape, (units.view([1] * (len(shape) - 1) + [-1]),))


def shape_of(found: Any) -> tuple[int, ...]:
    """Return the shape of a traced tensor, or of the first of several."""
    if isinstance(found, list | tuple):
        found = found[0]
    return tuple(int(n) for n in found.shape)


def unlabelled(found: Any) -> Any:
    """Return the value, or the values, of tensors in which no unit lies."""
    if isinstance(found, list | tuple):
        return [Value(shape_of(t)) for t in found]
    return Value(shape_of(found))


def along(value: Value, dim: int) -> Tensor | None:
    """Return the label along one dimension alone, flat."""
    return next((t.flatten() for t in value.labels if dims_of(t) == (dim,)), None)


def _spread(label: Tensor, term: str, letters: str) -> Tensor:
    """Return a label with one dimension per letter, of size 1 where its term has none."""
    order = sorted(range(len(term)), key=lambda i: letters.index(term[i]))
    turned = label.permute(order)
    sizes = {term[i]: label.size(i) for i in range(len(term))}
    return turned.reshape([sizes.get(c, 1) for c in letters])


def name_of(node: fx.Node) -> str:
    """Return the name of a node's operation."""
    return str(cast(Any, node.target)._schema.name).removeprefix("aten::")


def where_of(node: fx.Node) -> str:
    """Return the path of the module that computes a node, or the node's name."""
    return node.meta.get("module") or node.name
