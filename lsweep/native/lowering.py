"""A network as C++ source whose vectors hold one number of sixteen (or eight) samples.

A graph is followed with tensors on the meta device, where dimension 0 counts such vectors: it has
length 1. Torch itself says how each view lies in memory, so views cost nothing. Every other
operator is a step: a call of a function on ``native.h``, written once however often it is used.
Activations share the memory of a thread; what a convolution pads has a rim of zeros in it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lsweep.backends.graph import Graph
from lsweep.backends.tracing import Length, Unsupported
from lsweep.native.expressions import (
    POINTWISE,
    Array,
    Buffer,
    Given,
    bound,
    expression,
    listed,
    literal,
    loops,
    pair,
    place,
)

COPY, ZERO = "all(0) + {0}", "all(0)"
LARGE = 0.25  # of the weights: a first layer that has so many is mixed


class Lowering:
    """A network as C++ source.

    Args:
        graph: the network.
        places: packed name -> where it begins among the weights of a point.
        fast: with what is not for infinite numbers: convolutions by Winograd's algorithm, and a
            large first layer as f(x; w + a·d) = f(x; w) + a·f(x; d), each computed once.

    Attributes:
        text: the source; ``Call`` in ``native.h`` says what its functions read and write.
        constants: tensors that are part of the network.
        packed: floats that weights in Winograd's domain take.
        memory: vectors that each thread needs.
        mixed: vectors that the first layer makes; 0 where it is not mixed.
        shape: of a sample's output.

    Raises:
        Unsupported: it has an operator that is not known, or mixes samples.
    """

    def __init__(self, graph: Graph, places: Mapping[str, int], fast: bool) -> None:
        self.packed = self.mixed = self._scratch = 0
        self.constants: list[Tensor] = []
        self._functions: dict[str, str] = {}
        self._prepared: list[str] = []
        self._first: list[str] = []
        self._steps: list[str] = []
        self._buffers: list[Buffer] = []
        self._values: dict[fx.Node, Any] = {}
        self._fast, nodes = fast, list(graph.module.graph.nodes)
        for node in (n for n in nodes if hasattr(n.target, "_schema")):
            # A batch's length is here that of one vector: only a shape may be made of it.
            alone = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
            if any(isinstance(a.meta.get("val"), int) for a in alone):
                raise Unsupported(f"{node.name} computes with the length of a batch")
        self._total = sum(n.meta["val"].numel() for n in nodes if "name" in n.meta)
        for node in (n for n in nodes if n.op in ("placeholder", "get_attr")):
            value, weight = node.meta["val"], node.op == "get_attr" or "name" in node.meta
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise Unsupported(f"{node.name} is not float32")
            if not weight and isinstance(node.meta["shape"][0], int):
                raise Unsupported(f"{node.name} is the same for all samples")
            if not weight:
                size = math.prod(value.shape[1:])
                x = self._values[node] = self._fresh([1, *value.shape[1:]])
                source = f"call.inputs[{len(self._steps)}]"
                self._steps.append(f"load({source}, {x.start}, {size}, at, call.samples);")
                continue
            name = f"w + {places[node.meta['name']]}" if "name" in node.meta else ""
            if not name:
                name = f"call.constants[{len(self.constants)}]"
                self.constants.append(getattr(graph.module, node.target).contiguous())
            self._values[node] = Array(torch.empty(value.shape, device="meta"), None, name)
        self._loads = list(self._steps)
        for node in nodes:
            if node.op == "call_function" and node not in self._values:
                self._take(node)
        out = self._straight(self._values[nodes[-1].args[0]])
        cast(Buffer, out.home).last = len(self._steps)
        self.shape, extent = tuple(out.lies.shape[1:]), self._place()
        self.memory = extent + self._scratch
        numbers = {"size": out.lies.numel(), "memory": self.memory, "packed": self.packed}
        known = f"  vec* scratch = m + {extent};"
        known += "".join(f" vec* b{i} = m + {b.start};" for i, b in enumerate(self._buffers))
        tile = "(const Call& call, const float* w, long at, vec* m, "
        self.text = "\n".join([
            '#include "native.h"',
            *(f"static NOINLINE void {name}{text}" for text, name in self._functions.items()),
            "struct Network {",
            *(f"static constexpr long {k} = {v};" for k, v in numbers.items()),
            f"static constexpr long mixed = {self.mixed};",
            "static void prepare(const Call& call, const float* w, float* packed) {",
            *(*self._prepared, "}", f"static void first{tile}vec* z) {{", known, *self._first, "}"),
            f"static const vec* rest{tile}const float* packed, const vec* z) {{",
            *(known, *self._steps, f"return {out.start};", "}", "};"),
            'extern "C" void forward(const Call& call) { forward<Network>(call); }',
            'extern "C" void first_layer(const Call& call) { first_layer<Network>(call); }', "",
        ])  # fmt: skip

    def _take(self, node: fx.Node) -> None:
        """Enter what a node computes: a number, views, or a new array."""
        target = cast(Any, node.target)
        both = (node.args, node.kwargs)
        args, kwargs = (cast(Any, fx.map_arg(a, self._values.__getitem__)) for a in both)
        if target is operator.getitem:
            self._values[node] = args[0][args[1]]
            return
        name, given = bound(node, args, kwargs) if hasattr(target, "_schema") else ("", {})
        if name in POINTWISE:
            value, operands = expression(name, given)
            self._values[node] = self._loops(value, operands, self._fresh(_shape(node), node))
        elif hasattr(self, f"_on_{name}"):
            getattr(self, f"_on_{name}")(node, given, _shape(node))
        else:  # a number or a view; others are not run here, as torch would import sympy for them
            lies = tree_map(lambda a: a.lies if isinstance(a, Array) else a, (args, kwargs))
            whole = {_id(a.lies): a for a in tree_leaves((args, kwargs)) if isinstance(a, Array)}
            found = target(*lies[0], **lies[1]) if _is_view(target) else torch.empty(0)
            if not all(_id(t) in whole for t in tree_leaves(found) if isinstance(t, Tensor)):
                raise Unsupported(f"{target} is not among its operators")
            self._values[node] = tree_map(
                lambda t: whole[_id(t)].viewed(t) if isinstance(t, Tensor) else t, found
            )
        value, shape = self._values[node], node.meta["shape"]
        if isinstance(value, Array) and value.home:  # then its rows are the samples' in order
            rows = Length(value.lies.shape[0], 0) if shape else None
            if not shape or shape[0] != rows or shape[1:] != value.lies.shape[1:]:
                raise Unsupported(f"{node.name} mixes the samples of a batch")

    # -- steps ------------------------------------------------------------------------------------

    def _fresh(self, shape: Sequence[int], node: fx.Node | None = None, rim: int = 0,
               fill: str = ZERO) -> Array:  # fmt: skip
        """Return a new array, which the next steps write, with a rim or that of a node's users."""
        for user in node.users if node else ():
            if user.target is torch.ops.aten.conv2d.default:
                rim = max(rim, *pair(bound(user, user.args, user.kwargs)[1]["padding"]))
        lengths = list(shape)
        for d in (-2, -1) if rim else ():  # to the right and below it, tiles of four are whole
            lengths[d] += 2 * rim + -(shape[d] + 2 * rim - 2) % 4
        home = Buffer(math.prod(lengths), len(self._steps), len(self._steps))
        a = Array(torch.empty(lengths, device="meta"), home, f"b{len(self._buffers)}", rim)
        self._buffers.append(home)
        lies = a.lies
        for d in (-2, -1) if rim else ():
            end = rim + shape[d]
            self._loops(fill, [], a.viewed(lies.narrow(d, 0, rim)))
            self._loops(fill, [], a.viewed(lies.narrow(d, end, lengths[d] - end)))
            lies = lies.narrow(d, rim, shape[d])
        return Array(lies, home, a.name, rim)

    def _step(self, body: str, operands: Sequence[Array], out: Array, scratch: int = 0) -> Array:
        """Add a step: ``body`` reads the operands a0, a1 … and writes ``out``."""
        kinds = ["const vec*" if a.home else "const float* __restrict" for a in operands]
        heads = "".join(f"{kind} a{i}, " for i, kind in enumerate(kinds))
        function = f"({heads}vec* out, vec* scratch) {{\n  {body}\n}}"
        name = self._functions.setdefault(function, f"f{len(self._functions)}")
        for a in (*operands, out):
            if a.home:
                a.home.last = len(self._steps)
        self._steps.append(f"{name}({', '.join(a.start for a in (*operands, out))}, scratch);")
        self._scratch = max(self._scratch, scratch)
        return out

    def _loops(self, value: str, operands: Sequence[Array], out: Array) -> Array:
        """Add loops that write ``value`` of {0}, {1} … over the operands, broadcast."""
        if operands and not any(a.home for a in operands):
            raise Unsupported("it computes with weights alone")
        shape = out.lies.shape
        read = [f"a{k}[{place(a.lies.expand(shape))}]" for k, a in enumerate(operands)]
        return self._step(
            f"{loops(shape)}out[{place(out.lies)}] = {value.format(*read)};", operands, out
        )

    def _folded(self, x: Array, most: bool, node: fx.Node | None = None, over: int = 2) -> Array:
        """Add the mean, or the largest, over the last dimensions of an array."""
        shape, value, kept = x.lies.shape, f"a0[{place(x.lies)}]", x.lies.dim() - over
        start = f"a0[{place(cast(Any, x.lies)[(..., *[0] * over)])}]" if most else ZERO
        fold = f"vmax(s, {value})" if most else f"s + {value}"
        end, out = 1 if most else math.prod(shape[kept:]), self._fresh(shape[:kept], node)
        body = (
            f"vec s = {start}; {loops(shape, kept)}s = {fold}; out[{place(out.lies)}] = s / {end};"
        )
        return self._step(f"{loops(shape[:kept])}{{ {body} }}", [x], out)

    def _straight(self, a: Array) -> Array:
        """Return an activation without gaps, in order: itself or a copy."""
        if a.home and a.lies.is_contiguous():
            return a
        return self._loops(COPY, [a], self._fresh(a.lies.shape))

    def _place(self) -> int:
        """Give buffers starts so that none that are needed at once overlap; return their extent."""
        living: list[Buffer] = []
        for b in self._buffers:
            living = sorted((x for x in living if x.last >= b.first), key=lambda x: x.start)
            for x in living:
                if x.start < b.start + b.size:
                    b.start = x.start + x.size
            living.append(b)
        return max(b.start + b.size for b in self._buffers)

    # -- convolutions and linear layers -----------------------------------------------------------

    def _fused(self, node: fx.Node, body: str, names: str, operands: Sequence[Array],
               bias: Array | None, shape: Sequence[int], scratch: int = 0) -> None:  # fmt: skip
        """Add a step whose END is done with each vector ``v`` at indices with ``names``.

        That is adding the bias of unit ``o``, and then each pointwise operator that is the only
        user.
        """
        used, end, chain = list(operands), "", [node]
        if operands[1].home or (bias is not None and bias.home):
            raise Unsupported("it has weights that follow from its input")
        if bias is not None:
            end = f"v += a{len(used)}[o * {bias.lies.stride(0)}]; "
            used.append(bias)
        v = Array(torch.empty(tuple(shape), device="meta"), None, "v")
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            known = {**self._values, chain[-1]: v}
            args = [known.get(a) if isinstance(a, fx.Node) else a for a in user.args]
            if user.op != "call_function" or None in args or not hasattr(user.target, "_schema"):
                break
            name, given = bound(user, args, user.kwargs)
            if name not in POINTWISE:
                break
            value, terms = expression(name, given)
            others = [a for a in terms if a is not v]
            if not all(a.home and a.lies.shape == v.lies.shape for a in others):
                break
            at = [f"a{len(used) + i}[{place(a.lies, names)}]" for i, a in enumerate(others)]
            end += f"v = {value.format(*('v' if a is v else at[others.index(a)] for a in terms))}; "
            used += others
            chain.append(user)
        out = self._fresh(shape, chain[-1])
        body = body.replace("END", end + f"out[{place(out.lies, names)}] = v;")
        self._values.update(dict.fromkeys(chain, self._step(body, used, out, scratch)))

    def _on_conv2d(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, w, groups = given["input"], given["weight"], given["groups"]
        (ph, pw), (sh, sw), (dh, dw) = (pair(given[k]) for k in ("padding", "stride", "dilation"))
        if not x.home or x.rim < max(ph, pw):
            x = self._loops(COPY, [x], self._fresh(x.lies.shape, rim=max(ph, pw)))
        (co, ci, kh, kw), (_, _, oh, ow) = w.lies.shape, shape
        units, (_, channel, row, column) = co // groups, x.lies.stride()
        a = f"a1 + g * {units * ci * kh * kw}"
        corner = f"a0 - {ph * row + pw * column}"
        b = f"{corner} + g * {ci * channel} + y * {sh * row}, {ow}, {sw * column}"
        numbers = listed(units, ci, kh, kw, ci * kh * kw, channel, dh * row, dw * column)
        body = f"for (int g = 0; g < {groups}; g++) for (int y = 0; y < {oh}; y++)\n"
        body += f"  product<{numbers}>({a}, {b}, [=](int m, int x, vec v) {{ "
        body += f"int o = g * {units} + m; END }});"
        direct, tiles, room = 9 * oh * ow * ci * co, math.ceil(oh / 4) * math.ceil(ow / 4), 0
        saved = direct - 36 * tiles * (ci * co + 6 * (ci + co))  # 6: additions of the transforms
        plain = (kh, kw, sh, sw, dh, dw, groups, ph, pw) == (3, 3, 1, 1, 1, 1, 1, x.rim, x.rim)
        if self._fast and plain and x.rim and column == 1 and saved > direct / 4:
            u, room = f"packed + {self.packed}", 36 * (ci + co + 2) * (4 if ci * co > 4096 else 1)
            self._prepared.append(f"winograd_weights<{ci}, {co}>({w.start}, {u});")
            self.packed += 36 * ci * co
            w = Array(torch.empty(1, device="meta"), None, u)
            body = f"winograd<{listed(ci, co, oh, ow, channel, row)}>(a1, {corner}, scratch, "
            body += "[=](int o, int y, int x, vec v) { END });"
        self._fused(node, body, "0oyx", [x, w], given["bias"], shape, room)

    def _on_linear(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, w, bias = given["input"], given["weight"], given["bias"]
        if x.lies.dim() != 2 or not x.home or w.lies.stride(1) != 1:
            raise Unsupported("it has a linear layer of another kind")
        (units, k), step, source = w.lies.shape, x.lies.stride(1), cast(fx.Node, node.args[0])
        body = f"product<{listed(units, k, 1, 1, w.lies.stride(0), step, 0, 0)}>(a1, a0, 1, 0, "
        body += "[=](int o, int, vec v) { END });"
        while (
            source.op == "call_function" and len(source.users) == len(source.all_input_nodes) == 1
        ):
            (source,) = source.all_input_nodes
        terms = [x, w, bias] if bias is not None else [x, w]
        moves = all(a.name.startswith("w ") for a in terms[1:])
        alone = source.op == "placeholder" and len(source.users) == len(self._loads) == 1
        large = k > 15 and w.lies.numel() >= LARGE * self._total and self._steps == self._loads
        if not (self._fast and moves and alone and large):
            self._fused(node, body, "0o", [x, w], bias, shape)
            return
        z = Array(torch.empty(shape, device="meta"), None, "z")
        end = f"out[o] = v{' + a2[o]' if bias is not None else ''};"
        self._step(body.replace("END", end), terms, z)
        self._first, self._steps, self.mixed = self._steps, [], units
        copy, out = f"for (int i = 0; i < {units}; i++) out[i] = a0[i];", self._fresh(shape)
        self._values[node] = self._step(copy, [Array(z.lies, out.home, "z")], out)

    # -- others -----------------------------------------------------------------------------------

    def _on_batch_norm(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        names = ("running_mean", "running_var", "weight", "bias")
        per_channel = (-1, *[1] * (len(shape) - 2))
        fixed = [given[k].viewed(given[k].lies.view(per_channel)) for k in names if given[k]]
        value = f"({{0}} - {{1}}) / sqrtf({{2}} + {literal(given['eps'])})"
        value += "".join([" * {3}", " + {4}"][: len(fixed) - 2])
        self._values[node] = self._loops(value, [given["input"], *fixed], self._fresh(shape, node))

    def _on_mean(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x = given["self"]
        along = [d % x.lies.dim() for d in given["dim"]]
        kept = [d for d in range(x.lies.dim()) if d not in along]
        found = self._folded(x.viewed(x.lies.permute(kept + along)), False, over=len(along))
        self._values[node] = found.viewed(found.lies.view(shape))

    def _on_max_pool2d(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, most, pad = given["self"], "dilation" in given, pair(given.get("padding", 0))
        steps = [n // m for n, m in zip(x.lies.shape[-2:], shape[-2:], strict=True)]
        size = pair(given.get("kernel_size", steps))
        uneven = "output_size" in given and x.lies.shape[-2:] != (
            shape[-2] * steps[0],
            shape[-1] * steps[1],
        )
        steps = pair(given.get("stride") or size)
        rimless = any(pad) and not given.get("count_include_pad", True)
        if uneven or rimless or pair(given.get("dilation", 1)) != [1, 1]:
            raise Unsupported("it has a pool of another kind")
        if any(pad):
            rim = self._fresh(x.lies.shape, None, max(pad), "all(-INFINITY)" if most else ZERO)
            x = self._loops(COPY, [x], rim)
        (n, c, *rest), lies = x.lies.stride(), x.lies
        start = lies.storage_offset() - sum(p * s for p, s in zip(pad, rest, strict=True))
        strides = [s * n for s, n in zip(rest, steps, strict=True)]
        lies = lies.as_strided((*shape, *size), (n, c, *strides, *rest), start)
        self._values[node] = self._folded(x.viewed(lies), most, node)

    _on_avg_pool2d = _on_adaptive_avg_pool2d = _on_max_pool2d

    def _on_cat(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        self._values[node] = out = self._fresh(shape, node)
        at, d = 0, given["dim"] % len(shape)
        if d == 0:
            raise Unsupported(f"{node.name} mixes the samples of a batch")
        for a in given["tensors"]:
            self._loops(COPY, [a], out.viewed(out.lies.narrow(d, at, a.lies.shape[d])))
            at += a.lies.shape[d]

    def _on_pad(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        pad, x, out = given["pad"], given["self"], self._fresh(shape, node)
        inner = self._loops(f"all({literal(given['value'] or 0)})", [], out).lies
        for d, before in enumerate(pad[::2], 1):
            inner = inner.narrow(-d, before, x.lies.shape[-d])
        self._loops(COPY, [x], out.viewed(inner))
        self._values[node] = out

    _on_constant_pad_nd = _on_pad

    def _on_reshape(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x = given["self"]
        try:
            self._values[node] = x.viewed(x.lies.view(shape))
        except RuntimeError:  # no strides say how it would lie
            x = self._straight(x)
            self._values[node] = x.viewed(x.lies.view(shape))


def _id(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _is_view(target: Any) -> bool:
    """Whether an operator's outcome lies in what it is given; sizes count as such, too."""
    returns = target._schema.returns if hasattr(target, "_schema") else ()
    return all(r.alias_info is not None or "Tensor" not in str(r.type) for r in returns)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of what a node computes for a vector of samples."""
    lengths = [Length(0, n) if isinstance(n, int) else n for n in node.meta["shape"]]
    if any(n.each and n.rest for n in lengths):
        raise Unsupported(f"{node.name} mixes the samples of a batch")
    return tuple(n.each + n.rest for n in lengths)
