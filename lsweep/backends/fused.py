"""A graph run by oneDNN's fused operations on a CPU, elsewhere as it is with channels last.

Convolutions and linear layers take the activation that follows with them; what is added to them
is added in place. In bfloat16 activations are kept in it, weights are moved in float32 and cast
once per point, attention without a mask is products of many heads at once, and the output is
float32.

oneDNN's relu turns NaN into 0, so a relu is torch's, in place, which takes 1 or 2 % longer. Where
an output is not finite the graph is run again as it is, so that overflow has the same outcome as
everywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from lsweep.backends.graph import Graph, Unsupported

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.conv3d.default)
LAYERS = (*CONVOLUTIONS, aten.linear.default, aten.addmm.default)
PRODUCTS = re.compile(r"conv|linear|mm|mv|matmul|dot|einsum|attention|lstm|gru|rnn")
SCORES = 2**19  # of attention that are held at once: they stay in a core's cache
FLOAT = (
    aten.log_softmax.int,
    aten.logsumexp.default,
    aten.exp.default,
    aten.log.default,
    aten.pow.Tensor_Scalar,
    aten.cumsum.default,
)


class FusedNetwork:
    """A network at the present weights, for any batch length.

    Args:
        graph: the network.
        views: packed tensors by name, float32 (or float64), changed in place to move.
        example_inputs: a batch's inputs, on the device.
        device: where it runs.
        dtype: of activations; only ``torch.bfloat16`` may differ from that of the views.
        threads: how many torch uses; this class does not set them.

    Raises:
        Unsupported: this build of torch lacks the operations, or the network fails in them.

    >>> from lsweep.backends.graph import traced
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x, views = torch.ones(3, 4), {n: p.detach() for n, p in net.named_parameters()}
    >>> graph = traced(net, x)
    >>> fused = FusedNetwork(graph, views, x, x.device, x.dtype, threads=1)
    >>> torch.allclose(fused(x), net(x))
    True
    """

    def __init__(
        self,
        graph: Graph,
        views: Mapping[str, Tensor],
        example_inputs: Any,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self._leaves = graph.leaves
        self._weights = [views[n] for n in graph.names]
        self._exact = graph.module.forward
        reduced = dtype == torch.bfloat16
        self._fuses = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
        self._given: list[Tensor] = list(self._weights)
        self._casts: dict[int, Tensor] = {}
        self._version = -1
        try:
            module = _rewritten(graph.module, self._fuses, dtype if reduced else None)
            self._forward = module.forward
            named = [n for n in module.graph.nodes if "name" in n.meta]
            self._casts = {
                i: self._weights[i].to(dtype) for i, n in enumerate(named) if "reduced" in n.meta
            }
            for i, cast_ in self._casts.items():
                self._given[i] = cast_
            if self._fuses:
                _keeps_nan()
            with torch.no_grad():
                self(example_inputs)
        except Exception as e:  # a private operation is missing, or two dtypes do not meet
            reason = str(e).partition("\n")[0][:160]
            raise Unsupported(f"it does not run fused in {_name(dtype)}: {reason}") from None

    def __call__(self, inputs: Any) -> Tensor:
        """Return the output on a batch, float32 or better."""
        leaves = self._leaves(inputs)
        if self._casts:
            version = self._weights[0]._version
            if version != self._version:  # in place changes count themselves: this is a new point
                whole = [self._weights[i] for i in self._casts]
                torch._foreach_copy_(list(self._casts.values()), whole)
                self._version = version
        output: Tensor = self._forward(*self._given, *leaves)
        if self._fuses and not math.isfinite(output.sum().item()):
            return cast(Tensor, self._exact(*self._weights, *leaves))
        return output


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _keeps_nan() -> None:
    """Check that the fused operations exist and let NaN pass."""
    x = torch.full((1, 1, 1, 1), math.nan)
    w = torch.ones(1, 1, 1, 1)
    leaky = ("leaky_relu", [0.01], "")
    found = [
        torch.ops.mkldnn._convolution_pointwise(x, w, None, [0] * 2, [1] * 2, [1] * 2, 1, *leaky),
        torch.ops.mkldnn._linear_pointwise(x.view(1, 1), w.view(1, 1), None, *leaky),
    ]
    if not all(bool(y.isnan().all()) for y in found):
        raise Unsupported("oneDNN's activations lose NaN here")


# -- rewriting -------------------------------------------------------------------------------------


def _rewritten(source: fx.GraphModule, fuses: bool, reduced: torch.dtype | None) -> fx.GraphModule:
    graph = fx.Graph()
    result = graph.graph_copy(source.graph, {})
    graph.output(result)
    module = fx.GraphModule(source, graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder" and "name" not in n.meta]
    for node in inputs:
        _prepare(graph, node, reduced)
    if fuses:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in LAYERS:
                _fuse(graph, node)
            elif reduced is not None and node.target is aten.scaled_dot_product_attention.default:
                _attend(node)
    if reduced is not None:
        _reduce(module, reduced)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _prepare(graph: fx.Graph, node: fx.Node, reduced: torch.dtype | None) -> None:
    """Bring an input into the dtype and the memory order of the activations."""
    value = node.meta["val"]
    images = value.dim() == 4 and any(n.target in CONVOLUTIONS for n in graph.nodes)
    keywords: dict[str, Any] = {"memory_format": torch.channels_last} if images else {}
    if reduced is not None and value.is_floating_point() and all(map(_multiplies, node.users)):
        keywords["dtype"] = reduced
    if keywords:
        users = list(node.users)
        with graph.inserting_after(node):
            new = graph.call_method("to", (node,), keywords)
        new.meta["val"] = value
        for user in users:
            user.replace_input_with(node, new)


def _fuse(graph: fx.Graph, node: fx.Node) -> None:
    """Write a layer as one operation with its activation; what else follows is done in place."""
    last = node
    activation: tuple[str, list[float], str] = ("none", [], "")
    user = _only_user(node)
    if user is not None and (found := _activation(user)) is not None:
        activation, last = found, user
    with graph.inserting_after(last):
        new = _layer(graph, node, activation)
    if new is None:
        return
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    if last is not node:
        graph.erase_node(last)
    graph.erase_node(node)
    user = _only_user(new)
    if user is not None and user.target is aten.add.Tensor and not user.kwargs:
        other = next((a for a in user.args if a is not new), None)
        sum_, own = user.meta["val"], new.meta["val"]
        if not isinstance(other, fx.Node) or (sum_.shape, sum_.dtype) != (own.shape, own.dtype):
            return
        user.target, user.args = aten.add_.Tensor, (new, other)
        user = _only_user(user)
    if user is not None and user.target is aten.relu.default:
        user.target = aten.relu_.default


def _layer(graph: fx.Graph, node: fx.Node, activation: tuple[Any, ...]) -> fx.Node | None:
    if node.target in CONVOLUTIONS:
        rank = node.meta["val"].dim() - 2
        x, w, b, stride, padding, dilation, groups = _filled(
            node, (None, None, None, [1] * rank, [0] * rank, [1] * rank, 1)
        )
        spread = [list(v) * (rank // len(v)) for v in (padding, stride, dilation)]
        arguments = (x, w, b, *spread, groups, *activation)
        return graph.call_function(torch.ops.mkldnn._convolution_pointwise.default, arguments)
    if node.target is aten.linear.default:
        x, w, b = _filled(node, (None, None, None))
    elif node.kwargs:  # addmm with factors of its own
        return None
    else:
        b, x, w = cast(Any, node.args)
    if b is not None and b.meta["val"].dim() != 1:
        return None
    if node.target is aten.addmm.default:
        with graph.inserting_before(node):
            w = graph.call_function(aten.t.default, (w,))
    return graph.call_function(torch.ops.mkldnn._linear_pointwise.default, (x, w, b, *activation))


def _attend(node: fx.Node) -> None:
    """Let attention be `attention` where it is to everything."""
    q, k, v, mask, dropout, causal = _filled(node, (None, None, None, None, 0.0, False))
    width = q.meta["val"].shape[-1]
    heads = {n.meta["val"].shape[:-2] for n in (q, k, v)}
    plain = mask is None and not dropout and not causal and node.kwargs.keys() <= {"scale"}
    if plain and len(heads) == 1:
        scale = node.kwargs.get("scale")
        scale = width**-0.5 if scale is None else scale
        node.target, node.args, node.kwargs = attention, (q, k, v, scale), {}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Return softmax(scale·q·kᵀ)·v by products of many heads at once.

    In bfloat16 torch's own, which goes from head to head, takes half as long again; it keeps the
    scores in float32, which are rounded here.

    Args:
        q: queries (…, n, width).
        k: keys (…, m, width).
        v: values (…, m, any width).
        scale: of the scores.

    >>> q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
    >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    >>> torch.allclose(attention(q, k, v, 0.5), wanted, atol=1e-5)
    True
    """
    shape, n, m = (*q.shape[:-1], v.shape[-1]), q.shape[-2], k.shape[-2]
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (q, k, v))
    out = v.new_empty(len(q), n, v.shape[-1])
    step = max(1, SCORES // (n * m))
    buffer = q.new_empty(min(step, len(q)), n, m)
    for start in range(0, len(q), step):
        some, p = slice(start, start + step), buffer[: len(q) - start]
        torch.baddbmm(p, q[some], k[some].transpose(1, 2), beta=0, alpha=scale, out=p)
        torch.softmax(p, -1, out=p)
        torch.bmm(p, v[some], out=out[some])
    return out.view(shape)


def _filled(node: fx.Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*node.args, *defaults[len(node.args) :])


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _activation(node: fx.Node) -> tuple[str, list[float], str] | None:
    """Return what oneDNN calls an activation; those that lose NaN there are left out."""
    plain = {
        aten.sigmoid.default: "sigmoid",
        aten.tanh.default: "tanh",
        aten.silu.default: "swish",
        aten.hardswish.default: "hardswish",
    }
    if node.target in plain:
        return plain[node.target], [], ""
    if node.target is aten.leaky_relu.default and (slope := _filled(node, (None, 0.01))[1]):
        return "leaky_relu", [slope], ""
    if node.target is aten.gelu.default:
        return "gelu", [], node.kwargs.get("approximate", "none")  # type: ignore[return-value]
    return None


def _reduce(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """Reduce the operands of products, and what is made of products.

    Exponentials and logarithms stay float32, and so do inputs until a product takes them, with all
    that they meet: a number may count something, and be an index later.
    """
    graph = module.graph
    exact: set[fx.Node] = set()
    held = [n for n in graph.nodes if n.op == "get_attr" or "name" in n.meta]
    for node in [n for n in graph.nodes if n not in held]:
        if node.op == "placeholder":
            stays = "dtype" not in next((u.kwargs for u in node.users if u.op == "call_method"), {})
        elif node.target in FLOAT:
            _cast(graph, node, node.args[:1], torch.float32)
            stays = True
        elif _multiplies(node):
            _cast(graph, node, exact.intersection(node.all_input_nodes), dtype)
            stays = False
        else:
            stays = not exact.isdisjoint(node.all_input_nodes)
        if stays and any(t.is_floating_point() for t in _tensors(node)):
            exact.add(node)
    for node in held:
        users = [u for u in node.users if u not in exact or _multiplies(u)]
        if not any(t.is_floating_point() for t in _tensors(node)):
            continue
        if len(users) == len(node.users):
            node.meta["reduced"] = True
            if node.op == "get_attr":
                constant = getattr(module, str(node.target))
                module.register_buffer(str(node.target), constant.to(dtype))
        for user in users if "reduced" not in node.meta else ():
            _cast(graph, user, [node], dtype)
    output = graph.output_node()
    with graph.inserting_before(output):
        output.args = (graph.call_method("to", (output.args[0], torch.float32)),)


def _multiplies(node: fx.Node) -> bool:
    """Whether it is a product of matrices, whose operands have one dtype."""
    return PRODUCTS.search(str(node.target)) is not None


def _tensors(node: fx.Node) -> list[Tensor]:
    return [t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)]


def _cast(graph: fx.Graph, node: fx.Node, operands: Iterable[Any], dtype: torch.dtype) -> None:
    for operand in list(operands):
        with graph.inserting_before(node):
            node.replace_input_with(operand, graph.call_method("to", (operand, dtype)))
