"""Operators of a network's graph as steps of C++ source: one function for each kind of layer.

Tensors are followed on the meta device, where dimension 0 counts groups of lanes instead of
samples: torch itself says how each view lies in memory, and views cost nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from lsweep.graph import Graph
from lsweep.lanes import Array, Source
from lsweep.tracing import Unsupported

POINTWISE = {  # {0} and {1} are tensors, {name} is an argument of the operator
    "relu": "relu({0})", "tanh": "vtanh({0})", "sigmoid": "sigmoid({0})", "exp": "vexp({0})",
    "abs": "vabs({0})", "neg": "-{0}", "sqrt": "each(sqrtf, {0})", "silu": "{0} * sigmoid({0})",
    "rsqrt": "1 / each(sqrtf, {0})", "square": "{0} * {0}", "log": "each(logf, {0})",
    "add": "{0} + {alpha} * {1}", "sub": "{0} - {alpha} * {1}", "mul": "{0} * {1}",
    "div": "{0} / {1}", "maximum": "vmax({0}, {1})", "minimum": "vmin({0}, {1})",
    "leaky_relu": "({0} < 0 ? {negative_slope} * {0} : {0})",
    "elu": "({0} < 0 ? {alpha} * (vexp({0}) - 1) : {0})",
    "softplus": "({0} > 20 ? {0} : each(log1pf, vexp({0})))",
    "hardtanh": "vmin(vmax({0}, all({min_val})), all({max_val}))",
    "clamp": "vmin(vmax({0}, all({min})), all({max}))", "rsub": "{1} - {alpha} * {0}",
    "relu6": "vmin(relu({0}), all(6))", "hardsigmoid": "vmin(relu({0} + 3), all(6)) / 6",
    "hardswish": "{0} * vmin(relu({0} + 3), all(6)) / 6", "gelu": "gelu_{approximate}({0})",
}  # fmt: skip
USUAL = {"scale": 1, "input_scale": 1, "beta": 1, "threshold": 20, "rounding_mode": None}
Given = Mapping[str, Any]


class Lowered:
    """A network as C++ source, ``text``, with what it asks of its caller.

    Args:
        graph: of float32 tensors.
        groups: how many groups of lanes one pass takes.
        winograd: whether convolutions may be computed by Winograd's algorithm.

    Attributes:
        text: the source; `Source.text` says how it is called.
        memory: vectors for each thread.
        packed: floats for weights that are rearranged at each call.
        constants: the graph's, which follow the packed tensors.

    Raises:
        Unsupported: it has an operator that is not known, or mixes samples.
    """

    def __init__(self, graph: Graph, groups: int, winograd: bool) -> None:
        self.source, self.winograd = Source(groups), winograd
        self.values: dict[fx.Node, Any] = {}
        self.packed = 0
        nodes = list(graph.module.graph.nodes)
        weights = [n for n in nodes if n.op == "placeholder" and "name" in n.meta]
        constants = [n for n in nodes if n.op == "get_attr"]
        inputs = [n for n in nodes if n.op == "placeholder" and "name" not in n.meta]
        self.constants = [getattr(graph.module, n.target) for n in constants]
        for node in (*weights, *constants, *inputs):
            value = node.meta["val"]
            if not isinstance(value, Tensor) or value.dtype != torch.float32:
                raise Unsupported(f"{node.name} is not float32")
            if node in inputs:
                self.values[node] = self.source.fresh([groups, *value.shape[1:]])
            else:
                lies = torch.empty(tuple(value.shape), device="meta")
                self.values[node] = Array(lies, None, f"in[{len(self.values)}]")
        self.batch = inputs[0].meta["val"].shape[0]
        for node in nodes:
            if node.op == "call_function" and node not in self.values:
                self._take(node)
        output = self.source.straight(self.values[nodes[-1].args[0]])
        places = [self.values[n] for n in inputs]
        self.text, self.memory = self.source.text(places, output, len(weights) + len(constants))

    def _take(self, node: fx.Node) -> None:
        """Enter what a node computes: a number, views, or a new array."""
        target = cast(Any, node.target)
        args, kwargs = (fx.map_arg(a, self.values.__getitem__) for a in (node.args, node.kwargs))
        if target is operator.getitem:
            self.values[node] = args[0][args[1]]
            return
        homes = {_memory(a.lies): a for a in tree_leaves((args, kwargs)) if isinstance(a, Array)}
        lies = tree_map(lambda a: a.lies if isinstance(a, Array) else a, (args, kwargs))
        found = target(*lies[0], **lies[1])
        if not isinstance(tree_leaves(found)[0], Tensor):
            self.values[node] = found
        elif all(_memory(t) in homes for t in tree_leaves(found)):

            def array(t: Tensor) -> Array:
                return Array(t, homes[_memory(t)].home, homes[_memory(t)].name)

            self.values[node] = tree_map(array, found)
        else:
            name, given = _bound(node, args, kwargs)
            if name in POINTWISE:
                value, operands = _expression(name, given)
                self.values[node] = self.source.loops(value, operands)
            elif hasattr(self, f"on_{name}"):
                getattr(self, f"on_{name}")(node, given, found.shape)
            else:
                raise Unsupported(f"{target} is not among its operators")
        value, like = self.values[node], node.meta["val"]
        if isinstance(value, Array) and value.home:
            numbers = self.batch * (value.lies.numel() // self.source.groups)
            if like.dim() != value.lies.dim() or like.numel() != numbers:
                raise Unsupported(f"{node.name} mixes the samples of a batch")

    # -- products ---------------------------------------------------------------------------------

    def _fused(
        self, node: fx.Node, body: str, operands: Sequence[Array], bias: Array | None,
        shape: Sequence[int], scratch: int = 0,
    ) -> None:  # fmt: skip
        """Add a step whose END is done with each vector ``v`` of unit ``o`` at index ``i``.

        That is adding the bias, and then the pointwise operators that are its only users.
        """
        used, end = list(operands), ""
        if bias is not None:
            end = f"v += a{len(used)}[o * {bias.lies.stride(0)}]; "
            used.append(bias)
        v = Array(torch.empty(tuple(shape), device="meta"), None, "v")
        chain = [node]
        while len(chain[-1].users) == 1:
            user, done = next(iter(chain[-1].users)), chain[-1]
            args = [v if a is done else self.values.get(a) if isinstance(a, fx.Node) else a
                    for a in user.args]  # fmt: skip
            if user.op != "call_function" or None in args:
                break
            name, given = _bound(user, args, user.kwargs)
            if name not in POINTWISE:
                break
            value, terms = _expression(name, given)
            others = [a for a in terms if a is not v]
            if not all(a.home and a.flat and a.lies.shape == v.lies.shape for a in others):
                break
            reads = ["v" if a is v else f"a{len(used) + others.index(a)}[i]" for a in terms]
            used += others
            end += f"v = {value.format(*reads)}; "
            chain.append(user)
        homes = [a.home for a in used]
        over = next((h for h in homes[len(operands) :] if h and homes.count(h) == 1), None)
        out = self.source.fresh(shape, over)
        self.source.step(body.replace("END", end + "out[i] = v;"), used, out, scratch)
        self.values.update(dict.fromkeys(chain, out))

    def on_conv2d(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Convolution, by Winograd's algorithm where that saves enough."""
        x, w = self.source.straight(given["input"]), _weight(given["weight"])
        (n, ci, h, width), (_, co, oh, ow) = x.lies.shape, shape
        kernel, dilation = w.lies.shape[2:], _pair(given["dilation"])
        stride, padding = _pair(given["stride"]), given["padding"]
        if isinstance(padding, str):
            if padding == "same" and not (kernel[0] % 2 and kernel[1] % 2):
                raise Unsupported("it pads an even kernel to the same size")
            same = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
            padding = same if padding == "same" else 0
        pad = _pair(padding)
        each = f"for (int g = 0; g < {n}; g++) "
        rest = f"a0 + (long)g * {ci * h * width}, scratch, [=](int o, int i, vec v) {{ "
        rest += f"i += g * {co * oh * ow}; END }});"
        tiles = math.ceil(oh / 4) * math.ceil(ow / 4)
        cost = 36 * tiles * (ci * co + 6 * (ci + co)) / (9 * oh * ow * ci * co)
        plain = (*kernel, *stride, *dilation, given["groups"]) == (3, 3, 1, 1, 1, 1, 1)
        if self.winograd and plain and cost < 0.75:
            at, self.packed = self.packed, self.packed + 36 * ci * (co + 15)
            self.source.prologue.append(f"winograd_weights<{ci}, {co}>({w.at}, packed + {at});")
            body = f"{each}winograd<{ci}, {co}, {h}, {width}, {pad[0]}, {pad[1]}>(a1, {rest}"
            u = Array(torch.empty(1, device="meta"), None, f"packed + {at}")
            room = 36 * (4 * ci + 1) + 36 * (4 * 64 + 1)
            self._fused(node, body, [x, u], given["bias"], shape, room)
            return
        numbers = [ci, co, h, width, *kernel, *stride, *pad, *dilation, given["groups"]]
        body = f"{each}conv<{', '.join(map(str, numbers))}>(a1, {rest}"
        room = ci * (h + 2 * pad[0]) * (width + 2 * pad[1])
        self._fused(node, body, [x, w], given["bias"], shape, room)

    def on_linear(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Linear layer."""
        self._rows(node, given["input"], given["weight"], given["bias"], shape)

    def on_addmm(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Linear layer whose weight is transposed."""
        w, bias = given["mat2"], given["self"]
        if w.home or bias.home or bias.lies.dim() != 1 or (given["alpha"], given["beta"]) != (1, 1):
            raise Unsupported("it has an addmm that is no linear layer")
        self._rows(node, given["mat1"], Array(w.lies.t(), None, w.name), bias, shape)

    def _rows(
        self, node: fx.Node, x: Array, w: Array, bias: Array | None, shape: Sequence[int]
    ) -> None:
        x = self.source.straight(x)
        if w.home:
            raise Unsupported("it has weights that follow from its input")
        (units, k), (sm, sk) = w.lies.shape, w.lies.stride()
        body = f"product<{units}, {x.lies.numel() // k}, {k}, {sm}, {sk}, 1, {k}>(a1, a0, "
        body += f"[=](int o, int n, vec v) {{ int i = n * {units} + o; END }});"
        self._fused(node, body, [x, w], bias, shape)

    def on_matmul(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Products of matrices, at least one of which is an activation."""
        a, b = given["self"], given.get("other") or given["mat2"]
        if not b.home and b.lies.dim() == 2:
            self._rows(node, a, Array(b.lies.t(), None, b.name), None, shape)
            return
        if a.lies.dim() < 2 or b.lies.dim() < 2 or not b.home:
            raise Unsupported("it has a product of a matrix and a vector")
        a, b = (_like(x, x.lies.expand(*shape[:-2], *x.lies.shape[-2:])) for x in (a, b))
        out = torch.empty(tuple(shape), device="meta")
        heads, (at_a, at_b, at) = _offsets(shape[:-2], a.lies, b.lies, out)
        numbers = [*shape[-2:], a.lies.shape[-1], *a.lies.stride()[-2:], *b.lies.stride()[-2:]]
        body = f"{heads}product<{', '.join(map(str, numbers))}>(a0 + {at_a}, a1 + {at_b}, "
        body += f"[=](int o, int n, vec v) {{ int i = {at} + o * {shape[-1]} + n; END }});"
        self._fused(node, body, [a, b], None, shape)

    on_mm = on_bmm = on_matmul

    def on_scaled_dot_product_attention(
        self, node: fx.Node, given: Given, shape: Sequence[int]
    ) -> None:
        """Attention, one head at a time."""
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if given["attn_mask"] is not None or given["dropout_p"] or given["enable_gqa"]:
            raise Unsupported("its attention has a mask, dropout or shared heads")
        q, k, v = (_like(x, x.lies.expand(*shape[:-2], *x.lies.shape[-2:])) for x in (q, k, v))
        (t, e), s = q.lies.shape[-2:], k.lies.shape[-2]
        scale = _literal(given["scale"] or 1 / math.sqrt(e))
        out = self.source.fresh(shape)
        heads, (at_q, at_k, at_v, at) = _offsets(shape[:-2], q.lies, k.lies, v.lies, out.lies)
        (qt, qe), (ks, ke), (vs, ve) = (x.lies.stride()[-2:] for x in (q, k, v))
        mask = "o > n ? all(-INFINITY) : " if given["is_causal"] else ""
        body = f"""{heads}{{
  product<{s}, {t}, {e}, {ks}, {ke}, {qe}, {qt}>(a1 + {at_k}, a0 + {at_q},
    [=](int o, int n, vec v) {{ scratch[n * {s} + o] = {mask}v * {scale}; }});
  for (int i = 0; i < {t}; i++) softmax(scratch + i * {s}, scratch + i * {s}, {s}, false);
  product<{t}, {shape[-1]}, {s}, {s}, 1, {vs}, {ve}>(scratch, a2 + {at_v},
    [=](int o, int n, vec v) {{ out[{at} + o * {shape[-1]} + n] = v; }});
  }}"""
        self.values[node] = self.source.step(body, [q, k, v], out, t * s)

    # -- rows -------------------------------------------------------------------------------------

    def _each_row(self, x: Array, dims: Sequence[int], body: str, shape: Sequence[int]) -> Array:
        """Return a new array of ``shape``: ``body`` done for each row r of n numbers along dims."""
        along = [d % x.lies.dim() for d in dims]
        order = [d for d in range(x.lies.dim()) if d not in along] + along
        x = self.source.straight(_like(x, x.lies.permute(order)))
        n = math.prod(x.lies.shape[len(order) - len(along) :])
        rows = f"for (int r = 0; r < {x.lies.numel() // n}; r++) "
        return self.source.step(rows + body.replace("N", str(n)), [x], self.source.fresh(shape))

    def on_mean(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Mean over dimensions."""
        body = "out[r] = row_sum(a0 + r * N, N) / N;"
        self.values[node] = self._each_row(given["self"], given["dim"], body, shape)

    def on_sum(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Sum over dimensions."""
        body = "out[r] = row_sum(a0 + r * N, N);"
        self.values[node] = self._each_row(given["self"], given["dim"], body, shape)

    def on_softmax(
        self, node: fx.Node, given: Given, shape: Sequence[int], log: str = "false"
    ) -> None:
        """Softmax over one dimension."""
        dim = given["dim"]
        if not isinstance(node.meta["val"].shape[dim], int):
            raise Unsupported("its softmax mixes the samples of a batch")
        moved = torch.empty(tuple(shape), device="meta").movedim(dim, -1).shape
        body = f"softmax(a0 + r * N, out + r * N, N, {log});"
        found = self._each_row(given["self"], [dim], body, moved)
        self.values[node] = _like(found, found.lies.movedim(-1, dim))

    def on_log_softmax(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Logarithm of softmax over one dimension."""
        self.on_softmax(node, given, shape, "true")

    def on_layer_norm(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Layer normalisation."""
        x, dims = given["input"], range(-len(given["normalized_shape"]), 0)
        body = f"normalize(a0 + r * N, out + r * N, N, {_literal(given['eps'])});"
        value = self._each_row(x, dims, body, shape)
        self.values[node] = self._affine(value, given, lambda t: t)

    def on_group_norm(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Group normalisation."""
        x = self.source.straight(given["input"])
        x = _like(x, x.lies.view(shape[0], given["num_groups"], -1))
        body = f"normalize(a0 + r * N, out + r * N, N, {_literal(given['eps'])});"
        value = self._each_row(x, [-1], body, shape)
        per_channel = (-1, *[1] * (len(shape) - 2))
        self.values[node] = self._affine(value, given, lambda t: t.view(per_channel))

    def on_batch_norm(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Batch normalisation that was not folded."""
        x, per_channel = given["input"], (-1, *[1] * (len(shape) - 2))
        mean, var = (given[f"running_{name}"] for name in ("mean", "var"))
        fixed = [_like(t, t.lies.view(per_channel)) for t in (mean, var)]
        value = f"({{0}} - {{1}}) / sqrtf({{2}} + {_literal(given['eps'])})"
        value = self.source.loops(value, [x, *fixed])
        self.values[node] = self._affine(value, given, lambda t: t.view(per_channel))

    def _affine(self, x: Array, given: Given, shaped: Callable[[Tensor], Tensor]) -> Array:
        w, b = given["weight"], given["bias"]
        if w is None:
            return x
        operands = [x, *(_like(t, shaped(t.lies)) for t in (w, b) if t is not None)]
        return self.source.loops("{0} * {1} + {2}" if b is not None else "{0} * {1}", operands)

    # -- windows and pieces -----------------------------------------------------------------------

    def on_max_pool2d(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Largest of each window."""
        if _pair(given["dilation"]) != [1, 1]:
            raise Unsupported("it has a dilated pool")
        self._pool(node, given, shape, "true", 0)

    def on_avg_pool2d(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Mean of each window."""
        without = -1 if not given["count_include_pad"] else 0
        self._pool(node, given, shape, "false", given["divisor_override"] or without)

    def on_adaptive_avg_pool2d(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Mean of windows that share the input out evenly."""
        even = {"self": given["self"], "kernel_size": 1, "stride": 0, "padding": 0}
        self._pool(node, even, shape, "false", -1)

    def _pool(
        self, node: fx.Node, given: Given, shape: Sequence[int], largest: str, divisor: int
    ) -> None:
        x = self.source.straight(given["self"])
        (h, w), (oh, ow) = x.lies.shape[-2:], shape[-2:]
        kernel = _pair(given["kernel_size"])
        stride = kernel if given["stride"] == [] else _pair(given["stride"])
        numbers = [h, w, oh, ow, *kernel, *stride, *_pair(given["padding"]), divisor]
        body = f"for (int c = 0; c < {x.lies.numel() // (h * w)}; c++) pool<{largest}>(a0 + c * {h * w}, "
        body += f"out + c * {oh * ow}, {', '.join(map(str, numbers))});"
        self.values[node] = self.source.step(body, [x], self.source.fresh(shape))

    def on_cat(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """Tensors one after the other."""
        out, at = self.source.fresh(shape), 0
        for a in given["tensors"]:
            n = a.lies.shape[given["dim"]]
            self.source.copied(a, _like(out, out.lies.narrow(given["dim"], at, n)))
            at += n
        self.values[node] = out

    def on_pad(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """A rim of one number."""
        pad, x = given["pad"], given["self"]
        if given.get("mode", "constant") != "constant" or min(pad) < 0:
            raise Unsupported("it pads by something else than a constant")
        out, rim = self.source.fresh(shape), _literal(given["value"] or 0)
        body = f"for (int i = 0; i < {math.prod(shape)}; i++) out[i] = all({rim});"
        inner = self.source.step(body, [], out).lies
        for d, before in enumerate(pad[::2], 1):
            inner = inner.narrow(-d, before, x.lies.shape[-d])
        self.source.copied(x, _like(out, inner))
        self.values[node] = out

    on_constant_pad_nd = on_pad

    def on_reshape(self, node: fx.Node, given: Given, shape: Sequence[int]) -> None:
        """A view that its memory order does not allow."""
        x = self.source.straight(given["self"])
        self.values[node] = _like(x, x.lies.view(tuple(shape)))

    on_flatten = on_reshape


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _like(a: Array, lies: Tensor) -> Array:
    return Array(lies, a.home, a.name)


def _weight(a: Array) -> Array:
    if a.home or not a.flat:
        raise Unsupported("it has weights that follow from its input")
    return a


def _pair(value: Any) -> list[int]:
    """Return an argument that is one number or a list as two numbers."""
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return many * 2 if len(many) == 1 else many


def _literal(value: Any) -> str:
    """Return an argument in C++."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{float(value)!r}f".replace("inff", "INFINITY").replace("nanf", "NAN")


def _bound(node: fx.Node, args: Sequence[Any], kwargs: Given) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and all its arguments by name."""
    schema = cast(Any, node.target)._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | dict(kwargs)
    return schema.name.removeprefix("aten::"), given


def _expression(name: str, given: Given) -> tuple[str, list[Array]]:
    """Return a pointwise operator as C++ of {0}, {1}, and these operands."""
    for key, usual in USUAL.items():
        if given.get(key, usual) != usual:
            raise Unsupported(f"its {name} has {key} {given[key]}")
    open_ends = {"min": -math.inf, "max": math.inf}
    words = {k: _literal(open_ends.get(k) if v is None else v) for k, v in given.items()}
    operands, terms = [], []
    for key in ("self", "input", "other"):
        if isinstance(given.get(key), Array):
            terms.append(f"{{{len(operands)}}}")
            operands.append(given[key])
        elif key in given:
            terms.append(words[key])
    return POINTWISE[name].format(*terms, **words), operands


def _offsets(shape: Sequence[int], *lies: Tensor) -> tuple[str, list[str]]:
    """Return loops over leading dimensions, and each tensor's offset inside them."""
    heads = "".join(f"for (int i{d} = 0; i{d} < {n}; i{d}++) " for d, n in enumerate(shape))
    return heads, [
        " + ".join([f"i{d} * {t.stride(d)}" for d in range(len(shape))] or ["0"]) for t in lies
    ]
