"""Families: directions that change along an axis that counts replicates or layers.

Replicate k of a random direction is keyed by ``x`` for k = 0 and ``x.k`` beyond, so that the first
is the direction of a sweep without replicates. At layer l only that layer's tensors move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lsweep.axes.noise import random_tensor
from lsweep.axes.vectors import Direction, Origin, finish, ignored_names, is_weight
from lsweep.plans.recipes import WEIGHTS_ONLY, Recipe
from lsweep.problems.weights import State

Index = tuple[int, int]


def layer_of(name: str) -> str:
    """Return the module that a parameter belongs to; one of the network itself is its own layer.

    >>> layer_of("blocks.0.fc.weight"), layer_of("scale")
    ('blocks.0.fc', 'scale')
    """
    return name.rpartition(".")[0] or name


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that own parameters, in order.

    >>> layers_of(["a.weight", "a.bias", "b.weight"])
    ('a', 'b')
    """
    return tuple(dict.fromkeys(layer_of(n) for n in names))


def curved(recipes: Mapping[str, Recipe], origin: Origin) -> Curved:
    """Return what derivatives are taken over: what a random direction of the plan moves.

    The ``ignore`` and ``parameters`` of the first axis that leaves biases and normalisation out by
    default; those of `Recipe` where there is none, as far as they leave any.
    """
    usual = [r for r in recipes.values() if r.kind in WEIGHTS_ONLY]
    recipe = usual[0] if usual else Recipe(seed=next(iter(recipes.values())).seed)
    if not usual and not any(is_weight(n, p, origin) for n, p in origin.parameters.items()):
        recipe = dataclasses.replace(recipe, ignore="none")
    still = set(ignored_names(recipe, origin))
    return Curved(recipe, tuple(n for n in origin.parameters if n not in still))


@dataclass(frozen=True)
class Curved:
    """The parameters that derivatives are taken over, and the recipe that says so."""

    recipe: Recipe
    names: tuple[str, ...]

    def __str__(self) -> str:
        where = (
            "" if self.recipe.parameters == ("*",) else f" in {', '.join(self.recipe.parameters)}"
        )
        still = "" if self.recipe.ignore == "none" else f", {self.recipe.ignore} ignored"
        return f"{len(self.names)} tensors{where}{still}"


def moved_layers(
    recipes: Mapping[str, Recipe], axes: Mapping[str, Direction], origin: Origin
) -> tuple[str, ...]:
    """Return the layers that an axis of kind ``layer`` counts.

    Those that the other axes move; where no other moves anything, those that its own ``ignore``
    and ``parameters`` leave to move.
    """
    moved = {n for d in axes.values() for n in d.weights}
    if not moved:
        recipe = next(r for r in recipes.values() if r.kind == "layer")
        moved = set(origin.parameters) - set(ignored_names(recipe, origin))
    return layers_of(n for n in origin.parameters if n in moved)


def random_direction(key: str, recipe: Recipe, origin: Origin) -> Direction:
    """Return a random direction, normalised as its recipe says, keyed by (seed, key, name)."""
    still = set(ignored_names(recipe, origin))
    noise = {
        n: random_tensor(recipe.seed, key, n, p)
        for n, p in origin.parameters.items()
        if n not in still
    }
    return finish(noise, recipe, origin)


@dataclass(frozen=True)
class Family:
    """What the moving axes are at each replicate and layer.

    Attributes:
        recipes: axis -> recipe, in the order of a point's offsets.
        axes: axis -> direction at replicate 0, of all layers.
        origin: the trained weights.
        layers: names of the layers, where an axis counts them.
    """

    recipes: Mapping[str, Recipe]
    axes: Mapping[str, Direction]
    origin: Origin
    layers: tuple[str, ...] = ()
    _last: dict[int, list[State]] = field(default_factory=dict, repr=False, compare=False)

    def index(self, offsets: Sequence[float]) -> Index:
        """Return the replicate and the layer of a point; -1 where no axis counts layers."""
        found = {r.kind: round(o) for r, o in zip(self.recipes.values(), offsets, strict=True)}
        return found.get("replicate", 0), found.get("layer", -1)

    def at(self, index: Index) -> list[State]:
        """Return each axis' tensors at an index; nothing for an axis that moves nothing."""
        replicate, layer = index
        if replicate not in self._last:  # its layers come one after the other
            self._last.clear()
            self._last[replicate] = [self._replicate(a, replicate) for a in self.recipes]
        everything = self._last[replicate]
        if layer < 0:
            return everything
        here = self.layers[layer]
        return [{n: t for n, t in ts.items() if layer_of(n) == here} for ts in everything]

    def _replicate(self, axis: str, replicate: int) -> State:
        recipe = self.recipes[axis]
        if recipe.kind == "random" and replicate:
            return random_direction(f"{axis}.{replicate}", recipe, self.origin).tensors
        return self.axes[axis].tensors
