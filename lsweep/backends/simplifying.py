"""Simplifying a graph: what computes nothing goes, what is constant is computed once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten
IDENTITIES = (
    aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default,
)  # fmt: skip
CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device)
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip  # a batch of one sample stays a batch, whatever else is squeezed


def tidy(module: fx.GraphModule) -> None:
    """Remove what computes nothing: copies, casts to the same dtype, checks, dead code.

    A view becomes a reshape, because without the copies a tensor may lie otherwise in memory.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if target in IDENTITIES or (target in CASTS and _same(node)) or _whole(node):
            node.replace_all_uses_with(node.args[0])
        elif target in RESHAPES:
            known = [s if isinstance(s, int) else -1 for s in node.meta["shape"]]
            if known.count(-1) <= 1:  # then no length need be computed while it runs
                node.target, node.args, node.kwargs = (
                    aten.reshape.default,
                    (node.args[0], known),
                    {},
                )
            if node.meta["shape"] == node.args[0].meta["shape"]:
                node.replace_all_uses_with(node.args[0])
        elif target is aten.transpose.int:
            _cancel_transposes(node)
        elif target is aten.cat.default and (only := _nothing_added(node)) is not None:
            node.replace_all_uses_with(only)
    for node in reversed(list(graph.nodes)):  # the graph is functional: nothing acts unseen
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "placeholder" and "name" in node.meta and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def computed_constants(module: fx.GraphModule) -> None:
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
        module.register_buffer(f"computed_{i}", known[node].clone())
        with module.graph.inserting_before(node):
            new = module.graph.get_attr(f"computed_{i}")
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
    tidy(module)


def _nothing_added(node: fx.Node) -> fx.Node | None:
    """Return the one tensor of a cat that holds any number: a cache that is still empty."""
    parts = [n for n in cast(Any, node.args[0]) if n.meta["shape"] != (0,)]
    return parts[0] if len(parts) == 1 else None


def _same(node: fx.Node) -> bool:
    before, after = cast(fx.Node, node.args[0]).meta["val"], node.meta["val"]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _whole(node: fx.Node) -> bool:
    """Whether it is a slice that takes all, at any batch length."""
    if node.target is not aten.slice.Tensor:
        return False
    source, dim, start, end, step = cast(
        Any, (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    )
    size = source.meta["shape"][dim]
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
