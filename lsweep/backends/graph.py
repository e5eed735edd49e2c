"""A network as a graph whose batch norm is folded into its weights where that is exact.

The fold: gamma·(w∗x + b - mean)/sqrt(var + eps) + beta = (s·w)∗x + (beta + s·(b - mean)) with
s = gamma/sqrt(var + eps) (Jacob et al. 2018, arXiv:1712.05877, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from lsweep.backends.simplifying import tidy
from lsweep.backends.tracing import Unsupported as Unsupported
from lsweep.backends.tracing import plain_graph
from lsweep.problems.weights import buffers_of, parameters_of

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default: 6, aten.conv2d.default: 6, aten.conv3d.default: 6,
    aten.conv1d.padding: 6, aten.conv2d.padding: 6, aten.conv3d.padding: 6,
    aten.conv_transpose1d.default: 6, aten.conv_transpose2d.input: 6,
    aten.conv_transpose3d.input: 6, aten.convolution.default: 8,
}  # fmt: skip  # -> which argument is the number of groups


@dataclass(frozen=True)
class Fold:
    """One batch norm that is part of a weight: names in a state, and the packed names made of them.

    ``groups`` is 0 but for transposed convolutions, whose output units lie along dimension 1.
    """

    weight: str
    bias: str | None
    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    eps: float
    groups: int

    @property
    def names(self) -> tuple[str, str]:
        """Names of the packed weight and bias."""
        norm = self.mean.rpartition(".")[0] or self.mean
        return f"{self.weight}*{norm}", f"{self.bias or ''}*{norm}+shift"

    def scale(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return s = gamma/sqrt(var + eps), float64 of shape (units,)."""
        s = (state[self.variance].double() + self.eps).rsqrt()
        return s if self.gamma is None else s * state[self.gamma].double()

    def fold_into(self, weight: Tensor, bias: Tensor, state: Mapping[str, Tensor]) -> None:
        """Write s·w, each output unit by its own number, and beta + s·(b - mean)."""
        w, s = state[self.weight], self.scale(state)
        each = s[:, None]
        if self.groups:
            each = s.view(self.groups, 1, -1).expand(-1, len(w) // self.groups, -1).flatten(0, 1)
        torch.mul(w, each.to(w.dtype).view(*each.shape, *[1] * (w.dim() - 2)), out=weight)
        shift = -state[self.mean].double()
        if self.bias is not None:
            shift += state[self.bias].double()
        shift *= s
        if self.beta is not None:
            shift += state[self.beta].double()
        bias.copy_(shift)


@dataclass(frozen=True)
class Graph:
    """A network as functional aten operations on packed tensors and inputs.

    Attributes:
        module: its placeholders are the packed tensors in the order of ``names``, then the
            inputs; a node's ``meta["val"]`` has its shape and dtype, ``meta["name"]`` of a
            placeholder its packed name. Returns one tensor.
        names: the packed tensors.
        folds: the batch norms that are part of packed tensors.
        keys: the inputs' names where they are a dict.
        shapes: the inputs' shapes without the batch dimension.
    """

    module: fx.GraphModule
    names: tuple[str, ...]
    folds: tuple[Fold, ...]
    keys: tuple[str, ...] | None
    shapes: tuple[torch.Size, ...]

    def leaves(self, inputs: Any) -> Sequence[Tensor]:
        """Return a batch's inputs in the order of the graph's placeholders.

        Raises:
            Unsupported: all but their length must be as it was traced.
        """
        if isinstance(inputs, Tensor):
            found: Sequence[Tensor] = (inputs,)
        elif self.keys is not None:
            found = [inputs[k] for k in self.keys]
        else:
            found = tuple(inputs)
        for t, shape in zip(found, self.shapes, strict=True):
            if t.shape[1:] != shape:
                raise Unsupported(
                    f"batches differ in more than length: {tuple(t.shape[1:])}, {tuple(shape)}"
                )
        return found

    def like(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return packed name -> a tensor of its shape and memory order."""
        folded = {
            n: state[like]
            for f in self.folds
            for n, like in zip(f.names, (f.weight, f.mean), strict=True)
        }
        return {n: folded[n] if n in folded else state[n] for n in self.names}

    def pack(
        self, state: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tensor]:
        """Return the packed tensors of a whole state, batch norm folded with its own statistics.

        Args:
            state: every parameter and floating-point buffer by canonical name.
            out: packed name -> where it is written; None writes to new tensors.
        """
        if out is None:
            out = {n: torch.empty_like(t) for n, t in self.like(state).items()}
        folded = {n for f in self.folds for n in f.names}
        for name in self.names:
            if name not in folded:
                out[name].copy_(state[name])
        for f in self.folds:
            weight, bias = f.names
            f.fold_into(out[weight], out[bias], state)
        return out


def traced(model: nn.Module, inputs: Any) -> Graph:
    """Return a network as a graph; the network, its mode and the generators stay as they are.

    Args:
        model: any network, at the origin.
        inputs: an example batch's inputs: a tensor, a tuple or a dict of tensors [B, …].

    Raises:
        Unsupported: it does not trace, fixes its batch length, draws random numbers, changes its
            own buffers or its input, or takes minutes.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    >>> graph = traced(net, torch.zeros(2, 1, 4, 4))
    >>> [n.target for n in graph.module.graph.nodes if n.op == "call_function"]
    [<OpOverload(op='aten.conv2d', overload='default')>]
    >>> graph.names
    ('0.weight*1', '0.bias*1+shift')
    """
    state = {**parameters_of(model), **buffers_of(model)}
    module = plain_graph(model, inputs, state)
    folds = _fold(module)
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    names = tuple(n.meta["name"] for n in nodes if "name" in n.meta)
    keys = tuple(inputs) if isinstance(inputs, Mapping) else None
    shapes = tuple(n.meta["val"].shape[1:] for n in nodes if "name" not in n.meta)
    return Graph(module, names, folds, keys, shapes)


# -- folding ---------------------------------------------------------------------------------------


def _fold(module: fx.GraphModule) -> tuple[Fold, ...]:
    """Fold each batch norm that follows a convolution or linear layer with no other user."""
    graph, folds = module.graph, dict[tuple[str, str], Fold]()
    packed: dict[str, fx.Node] = {}
    made: dict[str, Fold] = {}
    for node in [n for n in graph.nodes if n.target is aten.batch_norm.default]:
        fold = _foldable(node)
        if fold is None or fold.weight in packed:  # a second one behind the first
            continue
        if any(made.setdefault(name, fold) != fold for name in fold.names):  # another of that name
            continue
        layer = node.args[0]
        sources = (layer.args[1], node.args[3])
        for name, like in zip(fold.names, sources, strict=True):
            if name not in packed:
                with graph.inserting_before(like):
                    packed[name] = graph.placeholder(f"folded_{len(packed)}")
                packed[name].meta.update(like.meta, name=name)
        weight, bias = (packed[n] for n in fold.names)
        layer.args = (layer.args[0], weight, bias, *layer.args[3:])
        node.replace_all_uses_with(layer)
        graph.erase_node(node)
        folds[fold.names] = fold
    tidy(module)
    return tuple(folds.values())


def _foldable(node: fx.Node) -> Fold | None:
    layer, gamma, beta, mean, variance, training, _, eps, *_ = cast(Any, node.args)
    if training or len(layer.users) != 1:
        return None
    if layer.target is not aten.linear.default and layer.target not in CONVOLUTIONS:
        return None
    arguments = (*layer.args, None)[1:3]
    ranks = [n.meta["val"].dim() for n in arguments if isinstance(n, fx.Node)]
    # Units lie along dimension 1 of a batch; a lone sample and sequences have them elsewhere.
    if ranks != [layer.meta["val"].dim(), 1][: len(ranks)]:
        return None
    names = [  # "" where it is computed, or is a constant that no state has
        n.meta.get("name", "") if isinstance(n, fx.Node) else n
        for n in (*arguments, gamma, beta, mean, variance)
    ]
    if "" in names or None in (names[4], names[5]):
        return None
    groups = 0
    if "transpose" in str(layer.target) or (
        layer.target is aten.convolution.default and layer.args[6]
    ):
        at = CONVOLUTIONS[layer.target]
        groups = layer.args[at] if len(layer.args) > at else 1
    weight, bias, gamma, beta, mean, variance = names
    return Fold(weight, bias, gamma, beta, mean, variance, eps, groups)
