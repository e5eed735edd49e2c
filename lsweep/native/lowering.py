"""A network as C++ source whose vectors hold one number of sixteen (or eight) samples.

A graph is followed with tensors on the meta device, where dimension 0 counts such vectors: it has
length 1. Torch itself says how each view lies in memory, so views cost nothing. Every other
operator is a step: a call of a function on ``native.h``, written once however often it is used. A
pointwise operator joins the step whose array it alone reads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from lsweep.backends.graph import Graph
from lsweep.backends.tracing import Length, Unsupported
from lsweep.native.steps import Array, Step, arranged, loops, place

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
USUAL = {"scale": 1, "input_scale": 1, "rounding_mode": None, "mode": "constant", "training": False,
         "ceil_mode": False, "divisor_override": None, "count_include_pad": True}  # fmt: skip
PIXEL = {"padding": 0, "stride": 1, "dilation": 1, "groups": 1}
CONSTANTS = 2**16  # numbers that may be part of the source
_meta = functools.partial(torch.empty, device="meta")
Given = dict[str, Any]
Shape = tuple[int, ...]


class Lowering:
    """A network as C++ source.

    Args:
        graph: the network.
        places: packed name -> where it begins among the weights of a point.

    Attributes:
        text: the source.
        prepared: floats that weights in Winograd's domain take.
        memory: vectors that each thread needs.
        shape: of a sample's output.

    Raises:
        Unsupported: it has an operator that is not known, or mixes samples.
    """

    def __init__(self, graph: Graph, places: Mapping[str, int]) -> None:
        self.prepared = self._scratch = 0
        self._prepare: list[str] = []
        self._constants: list[str] = []
        self._inputs: list[Step] = []
        self._steps: list[Step] = []
        self._values: dict[fx.Node, Any] = {}
        self._graph, self._places = graph, places
        *nodes, output = graph.module.graph.nodes
        for node in nodes:
            self._values[node] = self._value(node)
        out = self._straight(output, self._values[output.args[0]])
        self.shape = tuple(out.lies.shape[1:])
        extent = arranged(self._steps, out)
        self.memory = extent + self._scratch
        header = (resources.files("lsweep.native") / "native.h").read_text()
        functions: dict[str, str] = {}
        calls: list[str] = []
        for step in self._steps:
            name = functions.setdefault(step.function, f"f{len(functions)}")
            told = [a.address for a in (*step.operands, Array(step.lies, step))]
            calls.append(f"{name}({', '.join(told)}, m + {extent});")
        self.text = "\n".join([
            f"constexpr long SIZE = {out.lies.numel()}, MEMORY = {self.memory};",
            f"constexpr long PREPARED = {self.prepared};", header, *self._constants,
            *(f"static NOINLINE void {name}{text}" for text, name in functions.items()),
            "static void prepare(const float* w, float* u) {", *self._prepare, "}",
            "static const vec* network(const vec* const* inputs, long tile, const float* w,",
            "const float* u, vec* m) {", *calls, f"return {out.address};", "}", "",
        ])  # fmt: skip

    # -- values -----------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        """Return what a node computes: an array, several, or a number."""
        t = node.meta["val"]
        if isinstance(t, Tensor) and t.dtype != torch.float32:
            raise Unsupported(f"{node.name} is not float32")
        if node.op == "call_function":
            return self._computed(node)
        if "name" in node.meta:
            return Array(_meta(t.shape), f"w + {self._places[node.meta['name']]}")
        if node.op == "placeholder":
            lies = _meta(_shape(node))
            start = f"inputs[{len(self._inputs)}] + tile * {lies.numel()}"
            self._inputs.append(Step(node, "", [], lies, "", -1, start))
            return Array(lies, self._inputs[-1])
        numbers = getattr(self._graph.module, str(node.target)).flatten().tolist()
        if len(numbers) > CONSTANTS:
            raise Unsupported(f"{node.name} is more than {CONSTANTS} constant numbers")
        name, listed = f"c{len(self._constants)}", ", ".join(map(_literal, numbers))
        self._constants.append(f"static const float {name}[] = {{{listed}}};")
        return Array(_meta(t.shape), name)

    def _computed(self, node: fx.Node) -> Any:
        target = cast(Any, node.target)
        args, kwargs = cast(Any, fx.map_arg((node.args, node.kwargs), self._values.__getitem__))
        arrays = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Array)]
        moves = any(isinstance(a.source, Step) for a in arrays)
        shape = _shape(node) if moves and isinstance(node.meta["val"], Tensor) else ()
        if _is_view(target):  # a number counts as one, too
            lies = tree_map_only(Array, lambda a: a.lies, (args, kwargs))
            found = target(*lies[0], **lies[1])
            if shape and found.shape != shape:  # the one vector is no dimension of length 1
                raise Unsupported(f"{node.name} drops the samples of a batch")
            return tree_map_only(Tensor, lambda t: Array(t, arrays[0].source), found)
        name, given = _bound(target, args, kwargs)
        if not moves:
            raise Unsupported(f"{node.name} is computed of weights alone")
        if name not in POINTWISE:
            if not hasattr(self, f"_on_{name}"):
                raise Unsupported(f"{target} is not among its operators")
            return getattr(self, f"_on_{name}")(node, given, shape)
        # A batch's length is here that of one vector: only a shape may be made of it.
        if any(isinstance(n.meta["val"], int) for n in node.all_input_nodes):
            raise Unsupported(f"{node.name} computes with the length of a batch")
        terms = [a for k in ("self", "input", "other") if (a := given.get(k)) is not None]
        terms = [f"{{{arrays.index(a)}}}" if a in arrays else _literal(a) for a in terms]
        known = {k: _literal(v) for k, v in given.items() if isinstance(v, int | float)}
        return self._pointwise(node, POINTWISE[name].format(*terms, **known), arrays, shape)

    # -- steps ------------------------------------------------------------------------------------

    def _step(self, node: fx.Node, body: str, operands: Sequence[Array], shape: Sequence[int],
              indices: str = "") -> Array:  # fmt: skip
        """Add a step and return what it makes."""
        step = Step(node, body, list(operands), _meta(shape), indices, len(self._steps))
        self._steps.append(step)
        return Array(step.lies, step)

    def _pointwise(self, node: fx.Node, value: str, operands: Sequence[Array],
                   shape: Sequence[int]) -> Array:  # fmt: skip
        """Return ``value`` of {0}, {1} … over arrays, broadcast."""
        made = [a.source for a in operands if isinstance(a.source, Step)]
        step = max(made, key=lambda s: s.number)  # what else is read was there before it
        joins = "END" in step.body and len(step.node.users) == 1 and step.lies.shape == shape
        if not joins or any(a.source is step and a.lies is not step.lies for a in operands):
            body = f"{loops(shape)}{{ vec v; END }}"
            step = cast(Step, self._step(node, body, [], shape).source)
        step.apply(value, operands)
        step.node = node
        return Array(step.lies, step)

    def _straight(self, node: fx.Node, a: Array) -> Array:
        """Return an array of samples without gaps, in order: itself or a copy."""
        if isinstance(a.source, Step) and a.lies.is_contiguous():
            return a
        return self._folded(node, a, 0, False)

    def _folded(self, node: fx.Node, x: Array, over: int, most: bool) -> Array:
        """Return the mean, or the largest, over the last dimensions of an array."""
        shape, kept = x.lies.shape, x.lies.dim() - over
        start, fold, end = "all(-INFINITY)", "vmax(v, {})", ""
        if not most:
            start, fold, end = "all(0)", "v + {}", f"v = v / {math.prod(shape[kept:])}; "
        body = f"{loops(shape[:kept])}{{ vec v = {start}; {loops(shape, kept)}"
        body += f"v = {fold.format(f'a0[{place(x.lies)}]')}; {end}END }}"
        return self._step(node, body, [x], shape[:kept])

    def _padded(self, node: fx.Node, x: Array, pad: Sequence[int], fill: float) -> Array:
        """Return an array with so many numbers more before and after its last dimensions."""
        if min(pad) < 0:
            raise Unsupported(f"{node.name} cuts where it pads")
        shape = list(x.lies.shape)
        for d, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
            shape[-d] += before + after
        whole = inner = _meta(shape)
        for d, before in enumerate(pad[::2], 1):
            inner = inner.narrow(-d, before, x.lies.shape[-d])
        body = f"{loops(shape)}out[{place(whole)}] = all({_literal(fill)});"
        return self._step(node, body + _copy(inner, x, 0), [x], shape)

    # -- operators --------------------------------------------------------------------------------

    def _on_linear(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        if given["input"].lies.dim() != 2:
            raise Unsupported(f"{node.name} is a linear layer of more than vectors")
        for name in ("input", "weight"):
            given[name] = Array(given[name].lies[..., None, None], given[name].source)
        return self._on_conv2d(node, {**PIXEL, **given}, shape)

    def _on_conv2d(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        x, w, bias, groups = (given[k] for k in ("input", "weight", "bias", "groups"))
        if isinstance(given["padding"], str) or not w.lies.is_contiguous():
            raise Unsupported(f"{node.name} has padding by name, or weights that are not in order")
        (ph, pw), (sh, sw), (dh, dw) = (_pair(given[k]) for k in ("padding", "stride", "dilation"))
        (co, ci, kh, kw), (oh, ow) = w.lies.shape, (*shape, 1, 1)[2:4]
        direct = 9 * oh * ow * ci * co  # additions: those of Winograd's transforms count, too
        least = 36 * math.ceil(oh / 4) * math.ceil(ow / 4) * (ci * co + 6 * (ci + co))
        if (kh, kw, sh, sw, dh, dw, groups) == (3, 3, 1, 1, 1, 1, 1) and least < 0.75 * direct:
            prepared = f"u + {self.prepared}"
            self.prepared += 36 * ci * co
            self._prepare.append(f"winograd_weights<{ci}, {co}>({w.address}, {prepared});")
            self._scratch = max(self._scratch, 36 * (ci + co + 2) * (4 if ci * co > 4096 else 1))
            w = Array(_meta(w.lies.shape), prepared)
            numbers = (ci, co, *x.lies.shape[2:], ph, pw, *x.lies.stride()[1:])
            body = f"winograd<{_listed(numbers)}>(a1, a0, scratch, "
            body += "[=](int o, int y, int x, vec v) { END });"
        else:
            x = self._padded(node, x, (pw, pw, ph, ph), 0) if ph or pw else x
            units, (_, channel, row, column) = co // groups, x.lies.stride()
            numbers = (units, ci, kh, kw, ci * kh * kw, 1, channel, dh * row, dw * column)
            a, b = f"a1 + g * {units * ci * kh * kw}", f"a0 + g * {ci * channel} + y * {sh * row}"
            body = f"for (int g = 0; g < {groups}; g++) for (int y = 0; y < {oh}; y++)\n  "
            body += f"product<{_listed(numbers)}>({a}, {b}, {ow}, {sw * column}, "
            body += f"[=](int m, int x, vec v) {{ int o = g * {units} + m; END }});"
        out = self._step(node, body, [x, w], shape, "0oyx"[: len(shape)])
        if bias is not None:
            cast(Step, out.source).apply("{0} + {1}", [out, _per_channel(bias, shape)])
        return out

    def _on_batch_norm(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        does = {k: sign for k, sign in (("weight", "*"), ("bias", "+")) if given[k]}
        known = (_per_channel(given[k], shape) for k in ("running_mean", "running_var", *does))
        value = f"({{0}} - {{1}}) / sqrtf({{2}} + {_literal(given['eps'])})"
        value += "".join(f" {sign} {{{k}}}" for k, sign in enumerate(does.values(), 3))
        return self._pointwise(node, value, [given["input"], *known], shape)

    def _on_mean(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        x = given["self"]
        along = [d % x.lies.dim() for d in given["dim"]]
        kept = [d for d in range(x.lies.dim()) if d not in along]
        found = self._folded(node, Array(x.lies.permute(kept + along), x.source), len(along), False)
        return Array(found.lies.view(shape), found.source)

    def _pool(self, node: fx.Node, given: Given, shape: Shape, most: bool) -> Array:
        x, size, (ph, pw) = given["self"], _pair(given["kernel_size"]), _pair(given["padding"])
        if ph or pw:
            x = self._padded(node, x, (pw, pw, ph, ph), -math.inf if most else 0)
        strides, gaps = _pair(given["stride"] or size), _pair(given.get("dilation", 1))
        windows, rank = x.lies, x.lies.dim()
        for d, n, stride, gap in zip((rank - 2, rank - 1), size, strides, gaps, strict=True):
            windows = windows.unfold(d, (n - 1) * gap + 1, stride)[..., ::gap]
        return self._folded(node, Array(windows, x.source), 2, most)

    _on_max_pool2d = functools.partialmethod(_pool, most=True)
    _on_avg_pool2d = functools.partialmethod(_pool, most=False)

    def _on_adaptive_avg_pool2d(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        lengths = list(zip(given["self"].lies.shape[-2:], shape[-2:], strict=True))
        if any(n % m for n, m in lengths):
            raise Unsupported(f"{node.name} is a pool of uneven windows")
        even = {"kernel_size": [n // m for n, m in lengths], "stride": None, "padding": 0}
        return self._pool(node, {**given, **even}, shape, most=False)

    def _on_cat(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        d, at, body, out = given["dim"], 0, "", _meta(shape)
        for i, a in enumerate(given["tensors"]):
            body += _copy(out.narrow(d, at, a.lies.shape[d]), a, i)
            at += a.lies.shape[d]
        return self._step(node, body, given["tensors"], shape)

    def _on_pad(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        return self._padded(node, given["self"], given["pad"], given["value"] or 0)

    def _on_reshape(self, node: fx.Node, given: Given, shape: Shape) -> Array:
        x = given["self"]
        try:
            return Array(x.lies.view(shape), x.source)
        except RuntimeError:  # no strides say how it would lie
            x = self._straight(node, x)
            return Array(x.lies.view(shape), x.source)


def _bound(target: Any, args: Sequence[Any], kwargs: Given) -> tuple[str, Given]:
    """Return an operator's name and all its arguments by name."""
    schema = target._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
    name = schema.name.removeprefix("aten::")
    for key, usual in USUAL.items():
        if given.get(key, usual) != usual:
            raise Unsupported(f"its {name} has {key} {given[key]}")
    return name, given


def _is_view(target: Any) -> bool:
    """Whether what an operator returns lies in what it is given, or is a number."""
    if not hasattr(target, "_schema"):
        return True
    alike = all(r.alias_info or "Tensor" not in str(r.type) for r in target._schema.returns)
    return alike and "reshape" not in target._schema.name  # which may be a copy


def _shape(node: fx.Node) -> Shape:
    """Return the shape of what a node computes for one vector of samples."""
    first, *rest = node.meta["shape"] or (0,)
    if first != Length(1, 0) or any(isinstance(n, Length) for n in rest):
        raise Unsupported(f"{node.name} mixes the samples of a batch")
    return (1, *rest)


def _copy(out: Tensor, a: Array, number: int) -> str:
    """Return loops that write an operand into a part of what a step makes."""
    to = f"out[{out.storage_offset()} + {place(out)}]"
    return f"{loops(out.shape)}{to} = all(0) + a{number}[{place(a.lies)}];"


def _pair(value: Any) -> list[int]:
    """Return a number, or one or two of them, as those of height and width."""
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return many * 2 if len(many) == 1 else many


def _per_channel(a: Array, shape: Shape) -> Array:
    return Array(a.lies.view(-1, *[1] * (len(shape) - 2)), a.source)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _literal(value: float) -> str:
    """Return a number as C++."""
    return f"{float(value)!r}f".replace("inff", "INFINITY").replace("nanf", "NAN")
