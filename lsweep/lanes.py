"""C++ source in which the samples of a batch lie side by side in the lanes of a vector.

Operations become calls of functions on ``native.h``, each written once however often it is used;
activations share the memory of one thread as long as they live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lsweep.tracing import Unsupported


@dataclass(eq=False)
class Buffer:
    """Memory of one activation: so many vectors, needed from its first to its last step.

    It may take the place of ``over`` where that is needed for the last time when this begins.
    """

    size: int
    first: int
    last: int
    over: Buffer | None = None
    start: int = 0


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor: how it lies (on the meta device) in an activation's buffer, or else in a weight."""

    lies: Tensor
    home: Buffer | None
    name: str

    @property
    def at(self) -> str:
        """Return the C++ expression of its first element."""
        return f"{self.name} + {int(self.lies.storage_offset())}"

    @property
    def flat(self) -> bool:
        """Whether it lies without gaps, in order."""
        return self.lies.is_contiguous()


@dataclass
class Source:
    """A network's C++ source as it is written; ``groups`` of lanes are taken in one pass."""

    groups: int
    functions: dict[str, str] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    prologue: list[str] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    scratch: int = 0  # vectors that one step needs beside its operands

    def fresh(self, shape: Sequence[int], over: Buffer | None = None) -> Array:
        """Return a new array, which the next step writes."""
        home = Buffer(math.prod(shape), len(self.steps), len(self.steps), over)
        self.buffers.append(home)
        return Array(torch.empty(tuple(shape), device="meta"), home, f"b{len(self.buffers) - 1}")

    def step(self, body: str, operands: Sequence[Array], out: Array, scratch: int = 0) -> Array:
        """Add a step: ``body`` reads the operands a0, a1 … and writes ``out``, which is returned."""
        kinds = ["const vec*" if a.home else "const float* __restrict" for a in operands]
        names = "".join(f"{kind} a{i}, " for i, kind in enumerate(kinds))
        function = f"({names}vec* out, vec* scratch) {{\n  {body}\n}}"
        name = self.functions.setdefault(function, f"f{len(self.functions)}")
        for a in (*operands, out):
            if a.home:
                a.home.last = len(self.steps)
        self.steps.append(f"{name}({', '.join(a.at for a in (*operands, out))}, scratch);")
        self.scratch = max(self.scratch, scratch)
        return out

    def loops(self, value: str, operands: Sequence[Array], out: Array | None = None) -> Array:
        """Add loops that write ``value`` of {0}, {1} … over the operands, broadcast."""
        if out is None:
            if not any(a.home for a in operands):
                raise Unsupported("it computes with weights alone")
            shape = torch.broadcast_shapes(*(a.lies.shape for a in operands))
            homes = [a.home for a in operands]
            same = [a.home for a in operands if a.lies.shape == shape and a.flat]
            out = self.fresh(shape, next((h for h in same if homes.count(h) == 1), None))
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
            "[" + " + ".join([f"i{d} * {s[k]}" for d, (_, s) in enumerate(around)] or ["0"]) + "]"
            for k in range(len(lies))
        ]
        read = value.format(*(f"a{k}{at}" for k, at in enumerate(places[:-1])))
        return self.step(f"{''.join(heads)}out{places[-1]} = {read};", operands, out)

    def copied(self, a: Array, out: Array | None = None) -> Array:
        """Return a copy of an activation or a weight, in ``out`` or without gaps."""
        return self.loops("all(0) + {0}", [a], out or self.fresh(a.lies.shape))

    def straight(self, a: Array) -> Array:
        """Return an activation without gaps, in order: itself or a copy."""
        return a if a.home and a.flat else self.copied(a)

    def text(self, inputs: Sequence[Array], output: Array, weights: int) -> tuple[str, int]:
        """Return the source, and how many vectors of memory each thread needs.

        ``forward(in, result, n, packed, memory, threads)`` takes the addresses of the weights,
        then of the inputs, and returns whether everything in the result is finite.
        """
        size = place(self.buffers)
        length = [a.lies.numel() // self.groups for a in (*inputs, output)]
        lines = ['#include "native.h"']
        lines += [
            f"static void __attribute__((noinline)) {n}{f}" for f, n in self.functions.items()
        ]
        lines += ['extern "C" int forward(const float* const* in, float* result, long n,']
        lines += ["                       float* packed, vec* memory, int threads) {"]
        lines += [*self.prologue, "std::atomic<bool> finite{true};"]
        lines += [f"over(n, {self.groups} * L, threads, [&](long first, int thread) {{"]
        lines += [f"vec* m = memory + (long)thread * {size + self.scratch}, *scratch = m + {size};"]
        lines += [f"vec* b{i} = m + {b.start};" for i, b in enumerate(self.buffers)]
        for i, a in enumerate(inputs):
            lines += [f"load(in[{weights + i}], {a.at}, {length[i]}, {self.groups}, first, n);"]
        stored = f"store({output.at}, result, {length[-1]}, {self.groups}, first, n)"
        lines += [*self.steps, f"if (!{stored}) finite = false;", "});", "return finite;", "}"]
        return "\n".join(lines) + "\n", size + self.scratch


def place(buffers: Sequence[Buffer]) -> int:
    """Give each buffer a start, so that none that are needed at once overlap; return their extent.

    >>> a, b, c = Buffer(4, 0, 1), Buffer(2, 1, 2), Buffer(3, 2, 3)
    >>> place([a, b, c]), [x.start for x in (a, b, c)]
    (6, [0, 4, 0])
    """
    living: list[Buffer] = []
    for b in buffers:
        living = [x for x in living if x.last >= b.first]
        if b.over and b.over.last == b.first and b.over.size == b.size:
            b.start = b.over.start
            living.remove(b.over)
        else:
            for x in sorted(living, key=lambda x: x.start):
                if x.start < b.start + b.size:
                    b.start = x.start + x.size
        living.append(b)
    return max((b.start + b.size for b in buffers), default=0)
