"""Operators and tensors as C++: what a value is computed of, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from lsweep.backends.tracing import Unsupported

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
USUAL = {"scale": 1, "input_scale": 1, "rounding_mode": None, "mode": "constant",
         "ceil_mode": False, "divisor_override": None}  # fmt: skip
Given = Mapping[str, Any]


@dataclass(eq=False)
class Buffer:
    """Memory of an activation, in vectors: needed from its first step to its last."""

    size: int
    first: int
    last: int
    start: int = 0


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor: how it lies (on the meta device) in an activation's buffer, or else in a weight.

    Around its last two dimensions are as many zeros as ``rim`` says.
    """

    lies: Tensor
    home: Buffer | None
    name: str
    rim: int = 0

    def viewed(self, lies: Tensor) -> Array:
        """Return a view, without a rim, of the same memory."""
        return Array(lies, self.home, self.name)

    @property
    def start(self) -> str:
        """Where its first element is, as C++."""
        return f"{self.name} + {self.lies.storage_offset()}"


def pair(value: Any) -> list[int]:
    """Return a number, or one or two of them, as those of height and width."""
    many = list(value) if isinstance(value, (list, tuple)) else [value]
    return many * 2 if len(many) == 1 else many


def listed(*numbers: int) -> str:
    """Return numbers as arguments of a template."""
    return ", ".join(map(str, numbers))


def loops(shape: Sequence[int], first: int = 0) -> str:
    """Return loops over i0, i1 … of a shape, from one of its dimensions on."""
    lengths = list(enumerate(shape))[first:]
    return "".join(f"for (int i{d} = 0; i{d} < {n}; i{d}++) " for d, n in lengths)


def place(lies: Tensor, names: str = "") -> str:
    """Return where an element lies whose indices are i0, i1 …, or are named by letters."""
    indices = list(names) or [f"i{d}" for d in range(lies.dim())]
    return " + ".join(f"{i} * {s}" for i, s in zip(indices, lies.stride(), strict=True)) or "0"


def literal(value: Any) -> str:
    """Return a number as C++."""
    if not isinstance(value, (int, float)):
        return str(value)
    return f"{float(value)!r}f".replace("inff", "INFINITY").replace("nanf", "NAN")


def bound(node: fx.Node, args: Sequence[Any], kwargs: Given) -> tuple[str, dict[str, Any]]:
    """Return an operator's name and all its arguments by name."""
    schema = cast(Any, node.target)._schema
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    given |= dict(zip([a.name for a in schema.arguments], args, strict=False)) | dict(kwargs)
    name = schema.name.removeprefix("aten::")
    for key, usual in USUAL.items():
        if given.get(key, usual) != usual:
            raise Unsupported(f"its {name} has {key} {given[key]}")
    return name, given


def expression(name: str, given: Given) -> tuple[str, list[Array]]:
    """Return a pointwise operator as C++ of {0}, {1} …, and these operands."""
    operands = [a for a in (given.get(k) for k in ("self", "input", "other")) if a is not None]
    arrays = [a for a in operands if isinstance(a, Array)]
    terms = [f"{{{arrays.index(a)}}}" if a in arrays else literal(a) for a in operands]
    return POINTWISE[name].format(*terms, **{k: literal(v) for k, v in given.items()}), arrays
