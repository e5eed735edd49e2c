"""Variants of eager: the network's own code in another order, compiled, stacked or replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lsweep.backends.eager import Eager, Ground, Seat
from lsweep.backends.packed import Packed, Spot
from lsweep.problems import weights
from lsweep.problems.data import Batch, map_tensors, tensors_of
from lsweep.problems.problem import Sampled

STACK = 16  # points that are computed at once; always as many, as bits may depend on how many
GRAPHS = 32  # kinds of batches that are captured; of more, each takes memory, the rest are run
WARM_UP = 3  # runs before a capture: libraries choose and allocate in the first


def image_weights(model: nn.Module) -> frozenset[str]:
    """Return the names of two-dimensional convolutions' weights."""
    kinds = nn.Conv2d | nn.ConvTranspose2d
    owners = weights.owners_of(model)
    return frozenset(n for n, m in owners.items() if isinstance(m, kinds) and n.endswith("weight"))


class ChannelsLast(Eager):
    """Convolution weights in the order that a CPU's and a GPU's kernels like; so is what follows.

    Args:
        ground: what to evaluate.
        seat: the network's tensors.
        scratch: as in `Packed`.
    """

    name = "channels_last"

    def __init__(self, ground: Ground, seat: Seat, scratch: Tensor) -> None:
        images, order = image_weights(ground.problem.model), torch.channels_last
        state = {
            n: t.contiguous(memory_format=order) if n in images and t.dim() == 4 else t
            for n, t in ground.state.items()
        }
        packed = Packed(state, ground.moves, ground.device, ground.dtype, scratch=scratch)
        super().__init__(ground, seat, packed)


class Compiled(Eager):
    """The network through torch.compile, its weights as inputs: once for each shape of a batch.

    Args:
        ground: what to evaluate.
        seat: the network's tensors.
        packed: the rows that it moves along.
    """

    name = "compiled"

    def __init__(self, ground: Ground, seat: Seat, packed: Packed) -> None:
        super().__init__(ground, seat, packed)
        self._network = torch.compile(ground.problem.model, dynamic=False)


class Vmapped:
    """Many points at once: network and metrics over stacked weights, for networks that are small.

    On a CPU, where it is never chosen by itself, the last bits of a few networks depend on a
    point's place in the stack: rows of products lie there at addresses that are aligned or not.

    Args:
        ground: what to evaluate.
        packed: rows of the network's own tensors.
    """

    name, together = "vmap", True

    def __init__(self, ground: Ground, packed: Packed) -> None:
        self._ground, self._packed = ground, packed
        model = ground.problem.model
        named = (*model.named_parameters(), *model.named_buffers())
        self._raw = {weights.canonical_name(n): n for n, _ in named}

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield the metrics at each spot; see `Backend`."""
        for first in range(0, len(spots), STACK):
            some = list(spots[first : first + STACK])
            found = self._stack([*some, *[some[-1]] * (STACK - len(some))], batch)
            for k in range(len(some)):
                yield {m: Sampled(v[k], w[k], opaque) for m, (v, w, opaque) in found.items()}

    def _stack(self, spots: Sequence[Spot], batch: Batch) -> dict[str, tuple[Tensor, Tensor, bool]]:
        ground, opaque = self._ground, {}
        stack = self._packed.stack([s.offsets for s in spots])
        for k, spot in enumerate(spots):
            if spot.step >= 0:
                for name, t in ground.step(spot.step).items():
                    stack[name][k].copy_(t)

        def one(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
            def network(*args: Any, **kwargs: Any) -> Any:
                return functional_call(ground.problem.model, dict(state), args, kwargs)

            found = ground.problem.evaluate(batch, ground.metrics, network)
            opaque.update({m: s.opaque for m, s in found.items()})
            return {m: (s.values, s.weights) for m, s in found.items()}

        with ground.context(), _no_fast_path():
            found = torch.func.vmap(one)({self._raw[n]: t for n, t in stack.items()})
        return {m: (v, w, opaque[m]) for m, (v, w) in found.items()}


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Attention as plain operations: what torch fuses of it cannot be stacked."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def signature(batch: Batch) -> str:
    """Return what a graph of a batch depends on beside the numbers in its tensors.

    What is no tensor is fixed when a graph is captured, as shapes and strides are.

    >>> signature((torch.zeros(2), "a")) == signature((torch.ones(2), "a"))
    True
    >>> signature((torch.zeros(2), "a")) == signature((torch.zeros(2), "b"))
    False
    """
    return repr(map_tensors(batch, lambda t: (t.dtype, tuple(t.shape), t.stride())))


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Let torch refuse what waits for the device: a capture that fails of it cannot be cleared up.

    A graph would leave out what Python does with a number that it waited for.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Replayed(Eager):
    """A CUDA graph of network and metrics for each kind of batch: one launch for all kernels.

    Weights are moved in place, so that a replay computes with those of the present point. Graphs
    are replayed in turn on one stream and what they leave is copied at once, so they share memory.
    Who changes the batch sizes calls `release`.

    Args:
        ground: what to evaluate.
        seat: the network's tensors.
        packed: the rows that it moves along.
    """

    name = "cudagraph"

    def __init__(self, ground: Ground, seat: Seat, packed: Packed) -> None:
        super().__init__(ground, seat, packed)
        self._captured: dict[str, tuple[Any, Batch, Mapping[str, Sampled]]] = {}
        self._stream = torch.cuda.Stream(ground.device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def values(
        self, spots: Sequence[Spot], batch: Batch, stay: bool = False
    ) -> Iterator[Mapping[str, Sampled]]:
        """Yield the metrics at each spot; see `Backend`."""
        self._seat.take(self._moving.packed)
        key = signature(batch)
        if key not in self._captured:
            if len(self._captured) >= GRAPHS:
                yield from super().values(spots, batch, stay)
                return
            self._captured[key] = self._capture(batch)
        graph, inputs, outputs = self._captured[key]
        for there, t in zip(tensors_of(inputs), tensors_of(batch), strict=True):
            there.copy_(t)
        for spot in spots:
            if not stay:
                self.move(spot)
            graph.replay()
            yield {
                m: Sampled(s.values.clone(), s.weights.clone(), s.opaque)
                for m, s in outputs.items()
            }

    def release(self) -> None:
        """Forget what was captured: graphs of batches of another size hold memory for ever."""
        self._captured.clear()
        self._pool = torch.cuda.graph_pool_handle()  # one that lost all its graphs is not reused

    def _capture(self, batch: Batch) -> tuple[Any, Batch, Mapping[str, Sampled]]:
        inputs = map_tensors(batch, torch.clone)
        present = torch.cuda.current_stream(self._ground.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                self.here(inputs)
            with _no_waiting():
                self.here(inputs)
        present.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The stream of the warm-up has the libraries' workspaces already. Other threads, such as
        # those that pin a loader's batches, may allocate meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            outputs = self.here(inputs)
        return graph, inputs, outputs
