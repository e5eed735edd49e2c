"""Steps: calls of C++ functions, each of which makes one array of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor: how it lies (on the meta device) in what a step makes, or in floats in memory."""

    lies: Tensor
    source: Step | str

    @property
    def address(self) -> str:
        """Where its first element is, as C++."""
        start = self.source if isinstance(self.source, str) else self.source.start
        return f"{start} + {self.lies.storage_offset()}"


@dataclass(eq=False)
class Step:
    """A call, or an input.

    Attributes:
        node: whose value it makes.
        body: C++ that reads the operands a0, a1 …; END where it has made a ``vec v``.
        operands: what it reads.
        lies: how what it makes lies in memory from ``start`` on.
        indices: names of the indices of ``v``.
        last: the number of the last step that reads it.
        then: what is done with each ``v`` before it is written.
    """

    node: fx.Node
    body: str
    operands: list[Array]
    lies: Tensor
    indices: str
    last: int
    start: str = ""
    then: str = ""

    def apply(self, value: str, operands: Sequence[Array]) -> None:
        """Let ``value`` of {0}, {1} … be in each number's place; its own array is that number."""
        terms = []
        for a in operands:
            at = place(a.lies.expand(self.lies.shape), self.indices)
            terms.append("v" if a.source is self else f"a{len(self.operands)}[{at}]")
            self.operands += [] if a.source is self else [a]
        self.then += f"v = {value.format(*terms)}; "

    @property
    def function(self) -> str:
        """The function's parameters and body."""
        weights = [isinstance(a.source, str) for a in self.operands]
        kinds = ["const float* __restrict" if is_weight else "const vec*" for is_weight in weights]
        heads = "".join(f"{kind} a{i}, " for i, kind in enumerate(kinds))
        end = f"{self.then}out[{place(self.lies, self.indices)}] = v;"
        return f"({heads}vec* out, vec* scratch) {{\n  {self.body.replace('END', end)}\n}}"


def place(lies: Tensor, indices: str = "") -> str:
    """Return where an element lies, as C++: its indices are i0, i1 …, or named by letters."""
    named = list(indices) or [f"i{d}" for d in range(lies.dim())]
    return " + ".join(f"{i} * {s}" for i, s in zip(named, lies.stride(), strict=True)) or "0"


def loops(shape: Sequence[int], first: int = 0) -> str:
    """Return loops over i0, i1 … of a shape, from one of its dimensions on."""
    lengths = list(enumerate(shape))[first:]
    return "".join(f"for (int i{d} = 0; i{d} < {n}; i{d}++) " for d, n in lengths)


def arranged(steps: Sequence[Step]) -> int:
    """Give steps starts so that none whose arrays are needed at once overlap; return the extent."""
    extent, living = 0, list[tuple[int, Step]]()
    for number, step in enumerate(steps):
        start, size = 0, step.lies.numel()
        living = sorted((x for x in living if x[1].last >= number), key=lambda x: x[0])
        for at, other in living:
            if at < start + size:
                start = at + other.lies.numel()
        living.append((start, step))
        step.start, extent = f"m + {start}", max(extent, start + size)
    return extent
