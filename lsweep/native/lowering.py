"""A network as C++ source whose vectors hold one number of sixteen (or eight) samples.

A graph is followed with tensors on the meta device, where dimension 0 counts groups of samples
instead of samples: torch itself says how each view lies in memory, so views cost nothing. Every
other operator is a step: a call of a function on ``native.h``, written once however often it is
used. Activations share the memory of a thread as long as they live.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lsweep.backends.graph import Graph
from lsweep.backends.tracing import Length, Unsupported

POINTWISE = {  # {0} and {1} are tensors or numbers, {name} is an argument of the operator
    "relu": "relu({0})", "tanh": "vtanh({0})", "sigmoid": "sigmoid({0})", "exp": "vexp({0})",
    "abs": "vabs({0})", "neg": "-{0}", "silu": "{0} * sigmoid({0})", "div": "{0} / {1}",
    "add": "{0} + {alpha} * {1}", "sub": "{0} - {alpha} * {1}", "mul": "{0} * {1}",
    "rsub": "{1} - {alpha} * {0}", "leaky_relu": "({0} < 0 ? {negative_slope} * {0} : {0})",
    "elu": "({0} < 0 ? {alpha} * (vexp({0}) - 1) : {0})", "relu6": "vmin(relu({0}), all(6))",
    "hardtanh": "vmin(vmax({0}, all({min_val})), all({max_val}))",
    "hardsigmoid": "vmin(relu({0} + 3), all(6)) / 6",
    "hardswish": "{0} * vmin(relu({0} + 3), all(6)) / 6",
}  # fmt: skip
USUAL = {"scale": 1, "input_scale": 1, "rounding_mode": None}
Given = Mapping[str, Any]


@dataclass(eq=False)
class _Buffer:
    """Memory of an activation, in vectors: needed from its first step to its last."""

    size: int
    first: int
    last: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class _Array:
    """A tensor: how it lies (on the meta device) in an activation's buffer, or else in a weight."""

    lies: Tensor
    home: _Buffer | None
    name: str

    def viewed(self, lies: Tensor) -> _Array:
        return _Array(lies, self.home, self.name)

    @property
    def at(self) -> str:
        return f"{self.name} + {self.lies.storage_offset()}"


class Lowering:
    """A network as C++ source; convolutions by Winograd's algorithm only where that is asked.

    Attributes:
        text: the source. ``forward(in, out, n, packed, memory, threads, moved)`` takes the
            addresses of the packed tensors, the ``constants``, then the inputs, and whether the
            weights have moved since the last call; it returns whether all is finite.
        packed: floats that weights in Winograd's domain take.
        memory: vectors that each thread needs.
        shape: of the output where dimension 0 of the inputs is ``groups``.

    Raises:
        Unsupported: it has an operator that is not known, or mixes samples.
    """

    def __init__(self, graph: Graph, groups: int, winograd: bool) -> None:
        self.groups, self._winograd = groups, winograd
        self._functions: dict[str, str] = {}
        self._steps: list[str] = []
        self._prologue: list[str] = []
        self._buffers: list[_Buffer] = []
        self._values: dict[fx.Node, Any] = {}
        self._scratch = self.packed = 0
        nodes = list(graph.module.graph.nodes)
        weights = [n for n in nodes if n.op == "placeholder" and "name" in n.meta]
        constants = [n for n in nodes if n.op == "get_attr"]
        inputs = [n for n in nodes if n.op == "placeholder" and "name" not in n.meta]
        self.constants = [getattr(graph.module, n.target) for n in constants]
        for node in (*weights, *constants, *inputs):
            value = node.meta["val"]
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise Unsupported(f"{node.name} is not float32")
            if node in inputs and isinstance(node.meta["shape"][0], int):
                raise Unsupported(f"{node.name} is the same for all samples")
            if node in inputs:
                self._values[node] = self._fresh([groups, *value.shape[1:]])
            else:
                lies = torch.empty(tuple(value.shape), device="meta")
                self._values[node] = _Array(lies, None, f"in[{len(self._values)}]")
        for node in nodes:
            if node.op == "call_function" and node not in self._values:
                self._take(node)
        output = self._straight(self._values[nodes[-1].args[0]])
        cast(_Buffer, output.home).last = len(self._steps)
        self.shape, size = tuple(output.lies.shape), self._place()
        self.memory, length = size + self._scratch, output.lies.numel() // groups
        loads = [
            f"load(in[{i}], {a.at}, {a.lies.numel() // groups}, {groups}, first, n);"
            for i, a in enumerate((self._values[n] for n in inputs), len(weights) + len(constants))
        ]
        lines = [
            '#include "native.h"',
            *(f"static void __attribute__((noinline)) {f}{x}" for x, f in self._functions.items()),
            'extern "C" int forward(const float* const* in, float* result, long n, float* packed,',
            "                       vec* memory, int threads, int moved) {",
            *("if (moved) {", *self._prologue, "}", "std::atomic<bool> finite{true};"),
            f"over(n, {groups} * L, threads, [&](long first, int thread) {{",
            f"vec *m = memory + (long)thread * {self.memory}, *scratch = m + {size};",
            *(f"vec* b{i} = m + {b.start};" for i, b in enumerate(self._buffers)),
            *(*loads, *self._steps),
            f"if (!store({output.at}, result, {length}, {groups}, first, n)) finite = false;",
            *("});", "return finite;", "}", ""),
        ]
        self.text = "\n".join(lines)

    def _take(self, node: fx.Node) -> None:
        """Enter what a node computes: a number, views, or a new array."""
        target = cast(Any, node.target)
        both = (node.args, node.kwargs)
        args, kwargs = (cast(Any, fx.map_arg(a, self._values.__getitem__)) for a in both)
        if target is operator.getitem:
            self._values[node] = args[0][args[1]]
            return
        name, given = _bound(node, args, kwargs) if hasattr(target, "_schema") else ("", {})
        if name in POINTWISE:
            self._values[node] = self._loops(*_expression(name, given))
        elif hasattr(self, f"_on_{name}"):
            getattr(self, f"_on_{name}")(node, given, self._shape(node))
        else:  # a number or a view; others are not run here, as torch would import sympy for them
            lies = tree_map(lambda a: a.lies if isinstance(a, _Array) else a, (args, kwargs))
            whole = {_id(a.lies): a for a in tree_leaves((args, kwargs)) if isinstance(a, _Array)}
            found = target(*lies[0], **lies[1]) if _is_view(target) else torch.empty(0)
            if not all(_id(t) in whole for t in tree_leaves(found) if isinstance(t, Tensor)):
                raise Unsupported(f"{target} is not among its operators")
            self._values[node] = tree_map(
                lambda t: whole[_id(t)].viewed(t) if isinstance(t, Tensor) else t, found
            )
        value, shape = self._values[node], node.meta["shape"]
        if isinstance(value, _Array) and value.home:  # then its rows are the samples' in order
            rows = Length(value.lies.shape[0] // self.groups, 0) if shape else None
            if not shape or shape[0] != rows or shape[1:] != value.lies.shape[1:]:
                raise Unsupported(f"{node.name} mixes the samples of a batch")

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of what a node computes for a group of samples."""
        lengths = [Length(0, n) if isinstance(n, int) else n for n in node.meta["shape"]]
        if any(n.each and n.rest for n in lengths):
            raise Unsupported(f"{node.name} mixes the samples of a batch")
        return tuple(n.each * self.groups + n.rest for n in lengths)

    # -- steps ------------------------------------------------------------------------------------

    def _fresh(self, shape: Sequence[int]) -> _Array:
        """Return a new array, which the next steps write."""
        home = _Buffer(math.prod(shape), len(self._steps), len(self._steps))
        self._buffers.append(home)
        return _Array(torch.empty(tuple(shape), device="meta"), home, f"b{len(self._buffers) - 1}")

    def _step(self, body: str, operands: Sequence[_Array], out: _Array, scratch: int = 0) -> _Array:
        """Add a step: ``body`` reads the operands a0, a1 … and writes ``out``."""
        kinds = ["const vec*" if a.home else "const float* __restrict" for a in operands]
        heads = "".join(f"{kind} a{i}, " for i, kind in enumerate(kinds))
        function = f"({heads}vec* out, vec* scratch) {{\n  {body}\n}}"
        name = self._functions.setdefault(function, f"f{len(self._functions)}")
        for a in (*operands, out):
            if a.home:
                a.home.last = len(self._steps)
        self._steps.append(f"{name}({', '.join(a.at for a in (*operands, out))}, scratch);")
        self._scratch = max(self._scratch, scratch)
        return out

    def _loops(self, value: str, operands: Sequence[_Array], out: _Array | None = None) -> _Array:
        """Add loops that write ``value`` of {0}, {1} … over the operands, broadcast."""
        if out is None:
            if not any(a.home for a in operands):
                raise Unsupported("it computes with weights alone")
            shapes = [a.lies.shape for a in operands]
            out = self._fresh(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
        shape = out.lies.shape
        lies = [*(a.lies.expand(shape) for a in operands), out.lies]
        around: list[tuple[int, list[int]]] = []  # each loop's length and steps
        for n, *steps in zip(shape, *(t.stride() for t in lies), strict=True):
            if around and [n * s for s in steps] == around[-1][1]:
                around[-1] = (around[-1][0] * n, steps)
            elif n != 1:
                around.append((n, steps))
        heads = [f"for (int i{d} = 0; i{d} < {n}; i{d}++) " for d, (n, _) in enumerate(around)]
        places = [
            " + ".join([f"i{d} * {s[k]}" for d, (_, s) in enumerate(around)] or ["0"])
            for k in range(len(lies))
        ]
        read = value.format(*(f"a{k}[{at}]" for k, at in enumerate(places[:-1])))
        return self._step(f"{''.join(heads)}out[{places[-1]}] = {read};", operands, out)

    def _straight(self, a: _Array) -> _Array:
        """Return an activation without gaps, in order: itself or a copy."""
        if a.home and a.lies.is_contiguous():
            return a
        return self._loops("all(0) + {0}", [a], self._fresh(a.lies.shape))

    def _place(self) -> int:
        """Give buffers starts so that none that are needed at once overlap; return their extent."""
        living: list[_Buffer] = []
        for b in self._buffers:
            living = sorted((x for x in living if x.last >= b.first), key=lambda x: x.start)
            for x in living:
                if x.start < b.start + b.size:
                    b.start = x.start + x.size
            living.append(b)
        return max(b.start + b.size for b in self._buffers)

    # -- convolutions and linear layers -----------------------------------------------------------

    def _fused(self, node: fx.Node, body: str, operands: Sequence[_Array], bias: _Array | None,
               shape: Sequence[int], scratch: int = 0) -> None:  # fmt: skip
        """Add a step whose END is done with each vector ``v`` of unit ``o`` at index ``i``.

        That is adding the bias, and then each pointwise operator that is the only user.
        """
        used, end, chain = list(operands), "", [node]
        if operands[1].home or (bias is not None and bias.home):
            raise Unsupported("it has weights that follow from its input")
        if bias is not None:
            end = f"v += a{len(used)}[o * {bias.lies.stride(0)}]; "
            used.append(bias)
        v = _Array(torch.empty(tuple(shape), device="meta"), None, "v")
        while len(chain[-1].users) == 1:
            user = next(iter(chain[-1].users))
            known = {**self._values, chain[-1]: v}
            args = [known.get(a) if isinstance(a, fx.Node) else a for a in user.args]
            if user.op != "call_function" or None in args or not hasattr(user.target, "_schema"):
                break
            name, given = _bound(user, args, user.kwargs)
            if name not in POINTWISE:
                break
            value, terms = _expression(name, given)
            others = [a for a in terms if a is not v]
            if not all(a.home and a.lies.is_contiguous() and a.lies.shape == shape for a in others):
                break
            reads = ["v" if a is v else f"a{len(used) + others.index(a)}[i]" for a in terms]
            used += others
            end += f"v = {value.format(*reads)}; "
            chain.append(user)
        out = self._step(
            body.replace("END", end + "out[i] = v;"), used, self._fresh(shape), scratch
        )
        self._values.update(dict.fromkeys(chain, out))

    def _on_conv2d(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, w = self._straight(given["input"]), given["weight"]
        if not w.lies.is_contiguous() or isinstance(given["padding"], str):
            raise Unsupported("it has a convolution of another kind")
        (n, ci, height, width), (_, co, oh, ow) = x.lies.shape, shape
        kernel, pad = tuple(w.lies.shape[2:]), _pair(given["padding"])
        how = (*kernel, *_pair(given["stride"]), *pad, *_pair(given["dilation"]), given["groups"])
        rest = f"a0 + (long)g * {ci * height * width}, scratch, "
        rest += f"[=](int o, int i, vec v) {{ i += g * {co * oh * ow}; END }});"
        direct, tiles = 9 * oh * ow * ci * co, math.ceil(oh / 4) * math.ceil(ow / 4)
        saved = direct - 36 * tiles * (ci * co + 6 * (ci + co))  # 6: additions of the transforms
        plain = how == (3, 3, 1, 1, *pad, 1, 1, 1)
        kind, numbers = "conv", [ci, co, height, width, *how]
        room = ci * (height + 2 * pad[0]) * (width + 2 * pad[1])
        if self._winograd and plain and saved > direct / 4:
            kind, numbers, room = "winograd", [ci, co, height, width, *pad], 144 * (ci + 65)
            u = f"packed + {self.packed}"
            self._prologue.append(f"winograd_weights<{ci}, {co}>({w.at}, {u});")
            self.packed += 36 * ci * (co + 15)
            w = _Array(torch.empty(1, device="meta"), None, u)
        call = f"{kind}<{', '.join(map(str, numbers))}>(a1, {rest}"
        body = f"for (int g = 0; g < {n}; g++) {call}"
        self._fused(node, body, [x, w], given["bias"], shape, room)

    def _on_linear(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, w = self._straight(given["input"]), given["weight"]
        (units, k), (sm, sk) = w.lies.shape, w.lies.stride()
        body = f"product<{units}, {x.lies.numel() // k}, {k}, {sm}, {sk}, 1, {k}>(a1, a0, "
        body += f"[=](int o, int n, vec v) {{ int i = n * {units} + o; END }});"
        self._fused(node, body, [x, w], given["bias"], shape)

    # -- others -----------------------------------------------------------------------------------

    def _on_batch_norm(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        names = ("running_mean", "running_var", "weight", "bias")
        per_channel = (-1, *[1] * (len(shape) - 2))
        fixed = [given[k].viewed(given[k].lies.view(per_channel)) for k in names if given[k]]
        value = f"({{0}} - {{1}}) / sqrtf({{2}} + {_literal(given['eps'])})"
        value += "".join([" * {3}", " + {4}"][: len(fixed) - 2])
        self._values[node] = self._loops(value, [given["input"], *fixed])

    def _on_mean(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        lies = given["self"].lies
        along = [d % lies.dim() for d in given["dim"]]
        kept = [d for d in range(lies.dim()) if d not in along]
        x = self._straight(given["self"].viewed(lies.permute(kept + along)))
        n = math.prod(lies.shape[d] for d in along)
        pool = f"pool<0>(a0 + r * {n}, out + r, {n}, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0);"
        body = f"for (int r = 0; r < {lies.numel() // n}; r++) {pool}"
        self._values[node] = self._step(body, [x], self._fresh(shape))

    def _on_max_pool2d(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        x, size = self._straight(given["self"]), _pair(given.get("kernel_size", 1))
        if _pair(given.get("dilation", 1)) != [1, 1] or given.get("divisor_override"):
            raise Unsupported("it has a pool of another kind")
        (h, w), (oh, ow), even = x.lies.shape[-2:], shape[-2:], "output_size" in given
        stride = _pair(0 if even else given["stride"] or size)
        rim = given.get("count_include_pad", False)
        numbers = [h, w, oh, ow, *size, *stride, *_pair(given.get("padding", 0)), int(rim)]
        largest = int("dilation" in given)
        body = f"for (int c = 0; c < {math.prod(shape[:-2])}; c++) pool<{largest}>("
        body += f"a0 + c * {h * w}, out + c * {oh * ow}, {', '.join(map(str, numbers))});"
        self._values[node] = self._step(body, [x], self._fresh(shape))

    _on_avg_pool2d = _on_adaptive_avg_pool2d = _on_max_pool2d

    def _on_cat(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        out, at = self._fresh(shape), 0
        if given["dim"] % len(shape) == 0:
            raise Unsupported(f"{node.name} mixes the samples of a batch")
        for a in given["tensors"]:
            n = a.lies.shape[given["dim"]]
            self._loops("all(0) + {0}", [a], out.viewed(out.lies.narrow(given["dim"], at, n)))
            at += n
        self._values[node] = out

    def _on_pad(self, node: fx.Node, given: Given, shape: tuple[int, ...]) -> None:
        pad, x, out = given["pad"], given["self"], self._fresh(shape)
        if given.get("mode", "constant") != "constant" or min(pad) < 0:
            raise Unsupported("it pads by something else than a constant")
        fill = f"out[i] = all({_literal(given['value'] or 0)});"
        self._step(f"for (int i = 0; i < {math.prod(shape)}; i++) {fill}", [], out)
        inner = out.lies
        for d, before in enumerate(pad[::2], 1):
            inner = inner.narrow(-d, before, x.lies.shape[-d])
        self._loops("all(0) + {0}", [x], out.viewed(inner))
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


def _pair(value: Any) -> list[int]:
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return many * 2 if len(many) == 1 else many


def _literal(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{float(value)!r}f".replace("inff", "INFINITY").replace("nanf", "NAN")


def _bound(node: fx.Node, args: Sequence[Any], kwargs: Given) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and all its arguments by name."""
    schema = cast(Any, node.target)._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | dict(kwargs)
    return schema.name.removeprefix("aten::"), given


def _expression(name: str, given: Given) -> tuple[str, list[_Array]]:
    """Return a pointwise operator as C++ of {0}, {1} …, and these operands."""
    for key, usual in USUAL.items():
        if given.get(key, usual) != usual:
            raise Unsupported(f"its {name} has {key} {given[key]}")
    operands = [a for a in (given.get(k) for k in ("self", "input", "other")) if a is not None]
    arrays = [a for a in operands if isinstance(a, _Array)]
    terms = [f"{{{arrays.index(a)}}}" if a in arrays else _literal(a) for a in operands]
    return POINTWISE[name].format(*terms, **{k: _literal(v) for k, v in given.items()}), arrays
