"""A network as a graph of plain operations: traced by ``torch.export``, then simplified.

In eval mode with a free batch length, at the level where a convolution, a linear layer, a
normalisation and an attention are one operation each. What every backend that generates code
would do by itself is done here once: dropout, copies and dead code are gone, attention keeps the
batch dimension first.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from lsweep.errors import LsweepError
from lsweep.problems.problem import call
from lsweep.problems.takeover import generators_kept, model_kept

aten = torch.ops.aten
SECONDS = 120.0  # a trace that takes longer than this costs more than it can save
IDENTITIES = (
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default,
)  # fmt: skip
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
CHECKS = ("_assert", "sym_constrain")  # what export adds to guard a batch length


class Unsupported(LsweepError):
    """A network that a backend cannot take; the message is one clause that says why."""


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
        a module called with the tensors of the state that it uses, then the inputs.

    Raises:
        Unsupported: it does not trace, fixes its batch length, draws random numbers, changes its
            own buffers or its input, or takes minutes.
    """
    keys = tuple(inputs) if isinstance(inputs, Mapping) else None
    leaves = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    leaves = [leaves] if isinstance(leaves, Tensor) else list(leaves)
    if not leaves or not all(isinstance(t, Tensor) and t.dim() for t in leaves):
        raise Unsupported("its inputs are not plain tensors")
    if len(leaves[0]) < 2:  # a batch of one would be taken for a constant
        leaves = [torch.cat([t, t]) for t in leaves]
    with _left_alone(model):
        model.eval()
        called = _Called(model, keys, isinstance(inputs, Tensor))
        module = _bound(_exported(called, leaves, free), called, state)
        tidy(module)
    for node in module.graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise Unsupported(f"it draws random numbers ({node.target})")
        if "as_strided" in str(node.target):
            raise Unsupported("it reads memory by strides of its own (as_strided)")
    _compute_constants(module)
    return module


class _Called(nn.Module):
    """The network as the engine calls it: from tensors to its one output."""

    def __init__(self, model: nn.Module, keys: tuple[str, ...] | None, single: bool) -> None:
        super().__init__()
        self.model, self.keys, self.single = model, keys, single

    def forward(self, *tensors: Tensor) -> Any:
        """Return the output or the logits."""
        if self.keys is not None:
            return call(self.model, dict(zip(self.keys, tensors, strict=True)))
        return call(self.model, tensors[0] if self.single else tensors)


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


def _exported(called: _Called, leaves: list[Tensor], free: bool) -> ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in leaves)
    try:
        with _Tracing(), _quiet():
            exported = torch.export.export(
                called,
                tuple(leaves),
                dynamic_shapes=(shapes,) if free else None,
                strict=False,
            )
            return cast(ExportedProgram, exported.run_decompositions({}))
    except _TooSlow:
        raise Unsupported(f"tracing it takes more than {SECONDS:.0f} s") from None
    except Exception as e:  # whatever the user's code or the exporter raises: no graph
        text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
        if "onstraint" in str(e):
            raise Unsupported(f"its batch length is fixed: {text[:160]}") from None
        raise Unsupported(f"it does not trace: {type(e).__name__}: {text[:160]}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch says about a network that it cannot trace is said in the exception already."""
    logger = logging.getLogger("torch.fx.experimental")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


class _TooSlow(Exception):
    pass


class _Tracing(TorchFunctionMode):
    """Watches the clock while a network is traced, and keeps attention's batch dimension first."""

    def __init__(self) -> None:
        super().__init__()
        self.end = time.monotonic() + SECONDS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, or attention as plain operations."""
        if time.monotonic() > self.end:
            raise _TooSlow
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
    if query is key is value or (key is value and query is key):
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


def _bound(
    exported: ExportedProgram, called: _Called, state: Mapping[str, Tensor]
) -> fx.GraphModule:
    """Return a graph whose placeholders are tensors of the state, once each, then inputs."""
    signature = exported.graph_signature
    mutated = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if mutated:
        raise Unsupported(f"it changes {mutated[0].removeprefix('model.')} while it runs")
    tensors = {
        **dict(called.named_parameters(remove_duplicate=False)),
        **dict(called.named_buffers(remove_duplicate=False)),
    }
    known = {id(t): n for n, t in state.items()}
    source: fx.GraphModule = exported.graph_module
    graph, root = source.graph, nn.Module()
    inputs = set(signature.user_inputs)
    first: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.name not in inputs]:
        target = next(s.target for s in signature.input_specs if s.arg.name == node.name)
        tensor = tensors.get(target)
        if tensor is None:
            tensor = exported.constants.get(target)
        if not isinstance(tensor, Tensor):
            raise Unsupported(f"it holds an object that is no tensor ({target})")
        name = known.get(id(tensor))
        if name is None:  # no direction knows it: a constant
            attribute = node.name
            root.register_buffer(attribute, tensor.detach().clone())
            with graph.inserting_after(node):
                constant = graph.get_attr(attribute)
            constant.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
        elif name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
        else:
            node.meta["name"] = name
            first[name] = node
    result = graph.output_node()
    outputs = cast(Sequence[Any], result.args[0])
    if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
        raise Unsupported("its output is not one tensor")
    result.args = (outputs[0],)
    graph.set_codegen(fx.graph.CodeGen())
    for name, child in source.named_children():  # bodies of higher-order operations
        root.add_module(name, child)
    return fx.GraphModule(root, graph)


# -- simplifying -----------------------------------------------------------------------------------


def tidy(module: fx.GraphModule) -> None:
    """Remove what computes nothing: copies, casts to the same dtype, checks, dead code.

    A view becomes a reshape, because without the copies a tensor may lie otherwise in memory.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target, value = node.target, node.meta.get("val")
        if any(word in str(target) for word in CHECKS):
            graph.erase_node(node)
        elif target in IDENTITIES or (target in CASTS and _same(node)) or _whole(node):
            node.replace_all_uses_with(node.args[0])
        elif target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
            node.target = aten.reshape.default
            known = [s if isinstance(s, int) else -1 for s in value.shape]
            if known.count(-1) <= 1:  # then no length need be computed while it runs
                node.args = (node.args[0], known)
            if list(value.shape) == list(node.args[0].meta["val"].shape):
                node.replace_all_uses_with(node.args[0])
        elif target is aten.transpose.int:
            _cancel_transposes(node)
        elif target is aten.cat.default and (only := _nothing_added(node)) is not None:
            node.replace_all_uses_with(only)
        elif target is aten._native_batch_norm_legit_no_training.default:
            _one_output(graph, node)
    for node in reversed(list(graph.nodes)):  # the graph is functional: nothing acts unseen
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "placeholder" and "name" in node.meta and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def _compute_constants(module: fx.GraphModule) -> None:
    """Compute once what depends on neither weights nor inputs: masks, positions."""
    known: dict[fx.Node, Tensor] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr" and isinstance(value, Tensor):
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and isinstance(value, Tensor):
            if not all(n in known for n in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known[n])
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    last = [n for n in known if n.op == "call_function" and not set(n.users) <= set(known)]
    for i, node in enumerate(last):
        module.register_buffer(f"constant_{i}", known[node].clone())
        with module.graph.inserting_before(node):
            new = module.graph.get_attr(f"constant_{i}")
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
    tidy(module)


def _nothing_added(node: fx.Node) -> fx.Node | None:
    """Return the one tensor of a cat that holds any number: a cache that is still empty."""
    parts = [n for n in cast(Any, node.args[0]) if n.meta["val"].shape != (0,)]
    return parts[0] if len(parts) == 1 else None


def _same(node: fx.Node) -> bool:
    before, after = cast(fx.Node, node.args[0]).meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _whole(node: fx.Node) -> bool:
    """Whether it is a slice that takes all."""
    if node.target is not aten.slice.Tensor:
        return False
    source, dim, start, end, step = cast(
        Any, (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    )
    size = source.meta["val"].shape[dim]
    if start not in (0, None) or step != 1 or isinstance(end, fx.Node):
        return False
    return end is None or end >= 2**62 or (isinstance(size, int) and bool(end >= size))


def _cancel_transposes(node: fx.Node) -> None:
    inner = node.args[0]
    rank = node.meta["val"].dim()
    if isinstance(inner, fx.Node) and inner.target is aten.transpose.int:
        swaps = [{cast(int, d) % rank for d in n.args[1:]} for n in (node, inner)]
        if swaps[0] == swaps[1]:
            node.replace_all_uses_with(cast(fx.Node, inner.args[0]))


def _one_output(graph: fx.Graph, node: fx.Node) -> None:
    """Write batch norm as the operation with one output."""
    x, gamma, beta, mean, variance, momentum, eps = node.args
    with graph.inserting_after(node):
        new = graph.call_function(
            aten.batch_norm.default,
            (x, gamma, beta, mean, variance, False, momentum, eps, False),
        )
    new.meta["val"] = node.meta["val"][0]
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(new)


def _draws(node: fx.Node) -> bool:
    """Whether it draws random numbers; some do so only where they are given a probability."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p") or (node.args[4:5] and node.args[4]))
    if node.target in RECURRENT:
        _, _, _, _, _, dropout, train, *_ = node.args
        return bool(dropout and train)
    return True
