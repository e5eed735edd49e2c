"""Supply: the batches of each split on the device, kept there when they fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from lsweep.hosts.device import room
from lsweep.problems.data import Batch, Split, map_tensors, moved, tensors_of

RESIDENT_SHARE = 0.25  # of the free memory may hold the data


def default_batch_size(split: Split, device: torch.device) -> int:
    """Return a batch size that follows from the data alone: about 0.5 MiB of inputs on a CPU.

    Deterministic on purpose: values are bit for bit functions of the batch shape.
    """
    numbers = max(1, split.sample_numbers())
    budget, low, high = (2**17, 32, 2048) if device.type == "cpu" else (2**26, 256, 8192)
    size = 2 ** round(math.log2(max(1.0, budget / numbers)))
    return int(min(high, max(low, size)))


class Supply:
    """Batches on a device.

    Args:
        splits: by name.
        batch_sizes: of each split; they may change, followed by `clear`.
        slices: into how many parts the data is cut.
        device: where batches go.
        dtype: of their floating-point tensors.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        batch_sizes: Mapping[str, int],
        slices: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._splits, self._batch_sizes, self._slices = splits, batch_sizes, slices
        self._device, self._dtype = device, dtype
        self._resident: dict[tuple[str, int], list[Batch] | None] = {}

    def batches(self, split: str, slice_: int = 0) -> Iterator[Batch]:
        """Yield the batches of a split; kept on the device when they fit."""
        key = (split, slice_)
        kept = self._resident.get(key)
        if kept:
            yield from kept
            return
        keeping: list[Batch] | None = None if key in self._resident else []
        free = room(self._device) * RESIDENT_SHARE
        used = sum(
            t.numel() * t.element_size()
            for batches in self._resident.values()
            for b in batches or ()
            for t in tensors_of(b)
        )
        for there in self.fresh(split, self._batch_sizes[split], slice_):
            if keeping is not None:
                used += sum(t.numel() * t.element_size() for t in tensors_of(there))
                if used <= free:
                    keeping.append(there)
                else:
                    keeping = None
            yield there
        self._resident[key] = keeping

    def fresh(self, split: str, size: int, slice_: int = 0) -> Iterator[Batch]:
        """Yield batches of a size, without keeping them."""
        for batch in self._splits[split].batches(size, slice_, self._slices):
            yield map_tensors(batch, lambda t: moved(t, self._device, self._dtype))

    def resident(self, split: str, slice_: int) -> int:
        """Return how many batches of a slice are kept on the device."""
        return len(self._resident.get((split, slice_)) or ())

    def all_resident(self, splits: Iterable[str], slice_: int) -> bool:
        """True when the slices of all splits are on the device."""
        return all(self.resident(s, slice_) for s in splits)

    def clear(self) -> None:
        """Let go of what is kept."""
        self._resident.clear()
