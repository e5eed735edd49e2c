"""Data splits as batches that come the same way every time, whatever they were given as."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    default_collate,
)

from lsweep.errors import LsweepError
from lsweep.hosts.device import is_out_of_memory
from lsweep.problems.factory import describe
from lsweep.problems.takeover import generators_kept

Batch = Any
"""A tensor, a tuple or list of tensors, or a dict of tensors; dimension 0 counts samples."""

FINGERPRINT_SAMPLES = 32
ALIGNMENT = 64  # bytes, of torch's own tensors; kernels may round differently on others


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch, in order.

    >>> len(tensors_of({"x": torch.zeros(2), "y": (torch.ones(2), "text")}))
    2
    """
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for k in batch for t in tensors_of(batch[k])]
    if isinstance(batch, list | tuple):
        return [t for b in batch for t in tensors_of(b)]
    return []


def map_tensors(batch: Batch, f: Any) -> Batch:
    """Apply ``f`` to each tensor of a batch, keeping its structure."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        return {k: map_tensors(v, f) for k, v in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(b, f) for b in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(b, f) for b in batch)
    return batch


def moved(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``t`` on ``device``, and in ``dtype`` where it holds real numbers.

    >>> moved(torch.tensor([1]), torch.device("cpu"), torch.float64)
    tensor([1])
    """
    return t.to(device, dtype) if t.is_floating_point() else t.to(device)


def samples_in(batch: Batch) -> int:
    """Return the number of samples in a batch: the length of its first tensor's dimension 0.

    >>> samples_in((torch.zeros(3, 8), torch.zeros(3)))
    3
    """
    for t in tensors_of(batch):
        return len(t) if t.dim() else 1
    raise LsweepError(f"a batch of type {type(batch).__name__} holds no tensor")


class Split:
    """One split of the data; `batches` yields the same batches in the same order at every call.

    A tuple or dict of tensors and a dataset are cut into batches of the size asked for; a
    re-iterable of batches (a DataLoader, a list) keeps its own.

    Attributes:
        data: as it was given, arrays as tensors.
        whole: the split that this one was cut from, as long as somebody needs it; or None.
        indices: which of its samples these are, sorted; or None.
        classes: over how many classes they were drawn in proportion; 0 when plainly at random.

    >>> split = Split("train", (torch.arange(5.0), torch.zeros(5)))
    >>> [samples_in(b) for b in split.batches(2)], split.samples
    ([2, 2, 1], 5)
    """

    def __init__(self, name: str, data: Any) -> None:
        self.name = name
        self.whole: Split | None = None
        self.indices: npt.NDArray[np.int64] | None = None
        self.classes = 0
        self._source: Split | None = None
        self._digest = ""
        data = _as_tensors(data)
        self.data = data
        self._tensors: Batch | None = None
        self._dataset: Dataset[Any] | None = None
        self._stream: IterableDataset[Any] | None = None
        self._iterable: Iterable[Batch] | None = None
        self._collate: Callable[[list[Any]], Batch] = default_collate
        if _is_bundle(data):
            self._tensors = data
        elif isinstance(data, IterableDataset):
            self._stream = data
        elif isinstance(data, Dataset):
            self._dataset = data
        elif isinstance(data, Iterator):
            raise LsweepError(
                f"data[{name!r}] is an iterator, which can be read once: give a list, a "
                "DataLoader, or an object whose __iter__ starts anew"
            )
        elif isinstance(data, tuple) and all(isinstance(t, Tensor) and t.dim() for t in data):
            lengths = ", ".join(str(len(t)) for t in data)
            raise LsweepError(
                f"data[{name!r}]: its tensors have {lengths} samples: make them equal"
            )
        elif isinstance(data, Iterable) and not isinstance(data, str | bytes):
            self._iterable = data
        else:
            raise LsweepError(
                f"data[{name!r}] is a {type(data).__name__}: give tensors, a Dataset, or a "
                "re-iterable of batches"
            )
        if self.samples == 0:
            raise LsweepError(f"data[{name!r}] is empty")

    @property
    def samples(self) -> int | None:
        """How many samples there are, or None where only reading all batches would tell."""
        if self._tensors is not None:
            return samples_in(self._tensors)
        if self._dataset is not None:
            return len(self._dataset)  # type: ignore[arg-type]
        return None

    @property
    def pickable(self) -> int | None:
        """Of how many samples `cut` can pick; None where the data is batches of its own.

        Behind a `DataLoader` that takes a dataset in its order is that dataset.
        """
        return len(self.data.dataset) if _is_sequential(self.data) else self.samples

    @functools.cached_property
    @generators_kept()
    def bytes(self) -> float:
        """How large the split is, from its first sample; infinite where nobody knows its length.

        >>> Split("train", (torch.zeros(5, 3), torch.zeros(5))).bytes
        80.0
        """
        first = next(iter(self.batches(1)))
        size = sum(t.numel() * t.element_size() for t in tensors_of(first))
        if self.samples is not None:
            return float(self.samples * size)
        try:
            return float(len(self._iterable) * size)  # type: ignore[arg-type]
        except TypeError:
            return math.inf

    def cut(self, indices: npt.NDArray[np.int64], classes: int = 0) -> Split:
        """Return some of the samples as a split of its own, that remembers the whole.

        Args:
            indices: which, sorted.
            classes: over how many classes they were drawn in proportion.

        Raises:
            LsweepError: the data is batches of its own, which cannot be cut.

        >>> split = Split("train", (torch.arange(5), torch.zeros(5))).cut(np.array([1, 4]))
        >>> split.samples, next(split.batches(8))[0]
        (2, tensor([1, 4]))
        """
        if self._tensors is not None:
            rows = torch.from_numpy(indices)
            part = Split(self.name, map_tensors(self._tensors, lambda t: t[rows.to(t.device)]))
        elif self._dataset is not None:
            part = Split(self.name, Subset(self._dataset, indices.tolist()))
            part._collate = self._collate
        elif _is_sequential(self.data):
            part = Split(self.name, Subset(self.data.dataset, indices.tolist()))
            part._collate = self.data.collate_fn
        else:
            raise LsweepError(
                f"data[{self.name!r}] is batches of its own, which cannot be cut: give tensors, "
                "a Dataset or a DataLoader that takes one in its order"
            )
        part.whole, part.indices, part.classes = self, indices, classes
        return part

    def residing(self, tensors: Batch, digest: str) -> Split:
        """Return this split with its samples in other memory, its own copy let go of.

        Args:
            tensors: all samples as one batch, as they are evaluated.
            digest: the `full_digest` of the samples as they were given.
        """
        out = copy.copy(self)
        out.data, out._tensors, out._dataset, out._digest = None, tensors, None, digest
        out._source = None if self._dataset is None else self
        return out

    @property
    def sizable(self) -> bool:
        """True when batches are cut here, so that the batch size is free."""
        return self._iterable is None

    @generators_kept()
    def sample_numbers(self) -> int:
        """Return how many numbers one sample's inputs hold, from which a batch size follows."""
        first = next(iter(self.batches(1)))
        if not tensors_of(first):
            raise LsweepError(
                f"data[{self.name!r}]: a batch of type {type(first).__name__} holds no tensor: "
                "give tensors (x, y), a Dataset, or a list of such batches"
            )
        return max(t.numel() // max(1, samples_in(first)) for t in tensors_of(first))

    def batches(self, size: int, slice_: int = 0, slices: int = 1) -> Iterator[Batch]:
        """Yield the batches of one slice, samples ``[slice·n/slices, (slice+1)·n/slices)``.

        Raises:
            LsweepError: the data is empty, or cannot be sliced, or an item fails to load.
        """
        if self.samples is None:
            if slices > 1:
                raise LsweepError(
                    f"data[{self.name!r}] is an iterable of batches, which cannot be sliced: give "
                    "tensors or a Dataset, or use slices = 1"
                )
            empty = True
            for batch in self._collated(size) if self._iterable is None else self._iterable:
                empty = False
                yield _as_tensors(batch)
            if empty:
                raise LsweepError(f"data[{self.name!r}] yields no batch; is it empty, or used up?")
            return
        n = self.samples
        assert n is not None
        start, stop = slice_ * n // slices, (slice_ + 1) * n // slices
        for a in range(start, stop, size):
            b = min(a + size, stop)
            if self._tensors is not None:
                aligned = self._source is not None  # as samples that are collated anew are
                yield map_tensors(
                    self._tensors, lambda t, a=a, b=b, c=aligned: _aligned(t[a:b]) if c else t[a:b]
                )
            else:
                items = [self._dataset[i] for i in range(a, b)]  # type: ignore[index]
                yield self._collated_once(items, a)

    def _collated_once(self, items: list[Any], first: int) -> Batch:
        try:
            return self._collate(items)
        except (RuntimeError, TypeError, ValueError) as e:
            if is_out_of_memory(e):
                raise  # smaller batches are tried
            raise LsweepError(
                f"data[{self.name!r}]: samples {first} to {first + len(items) - 1} make no batch "
                f"({describe(e)}): give a transform that makes tensors, or a DataLoader with a "
                "collate_fn, which pads them"
            ) from e

    def _collated(self, size: int) -> Iterator[Batch]:
        samples = iter(self._stream)  # type: ignore[arg-type]
        while some := list(itertools.islice(samples, size)):
            yield self._collated_once(some, 0)

    @generators_kept()
    def fingerprint(self) -> str:
        """Return a sha256 that changes with the data, from a few samples: cheap, for resuming.

        Raises:
            LsweepError: a second look finds other samples.

        >>> zeros, ones = Split("a", torch.zeros(4, 2)), Split("a", torch.ones(4, 2))
        >>> zeros.fingerprint() == ones.fingerprint()
        False
        """
        once, twice = self._fingerprint(), self._fingerprint()
        self.require_same(once, twice)
        return once

    def require_same(self, once: str, twice: str) -> None:
        """Refuse data that differs between two passes.

        Raises:
            LsweepError: it does.
        """
        if once != twice:
            raise LsweepError(
                f"the {self.name} data differs between two passes: a loader that shuffles, or an "
                "augmentation; use shuffle=False and the transforms of evaluation (other samples "
                "at each point draw dozens of minima that are not there)"
            )

    def _fingerprint(self) -> str:
        h = hashlib.sha256()
        if self.samples is None:
            for batch in itertools.islice(self.batches(1), 2):
                _hash_batch(h, batch)
            return h.hexdigest()
        h.update(str(self.samples).encode())
        for _, sample in self.probes():
            _hash_batch(h, sample)
        return h.hexdigest()

    def probes(self) -> Iterator[tuple[int, Batch]]:
        """Yield a few samples, spread over the split, with their numbers."""
        n = self.samples
        assert n is not None
        for i in np.unique(np.linspace(0, n - 1, min(n, FINGERPRINT_SAMPLES)).astype(int)).tolist():
            if self._tensors is not None:
                yield i, map_tensors(self._tensors, lambda t, i=i: t[i : i + 1])
            else:
                yield i, self._collated_once([self._dataset[i]], i)  # type: ignore[index]

    def full_digest(self, size: int) -> str:
        """Return the sha256 over every sample in order, whatever the batch size."""
        if self._source is not None:  # a file of samples that were augmented once would not show it
            return self._source.full_digest(size)
        if self._digest:
            return self._digest
        if self._collate is not default_collate:  # it may pad to the longest of a batch
            size = 1
        hashes: dict[int, Any] = {}
        for batch in self.batches(size):
            for i, t in enumerate(tensors_of(batch)):
                hashes.setdefault(i, hashlib.sha256()).update(_bytes(t))
        return hashlib.sha256(
            "".join(h.hexdigest() for _, h in sorted(hashes.items())).encode()
        ).hexdigest()


def _as_tensors(data: Any) -> Any:
    if isinstance(data, np.ndarray):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a read-only array, such as a memory map, is welcome
            return torch.from_numpy(np.ascontiguousarray(data))
    if isinstance(data, Mapping):
        return {k: _as_tensors(v) for k, v in data.items()}
    if type(data) in (tuple, list):
        return type(data)(_as_tensors(v) for v in data)
    return data


def _is_bundle(data: Any) -> bool:
    """Tensors of equal length: the whole split at once. A list is a sequence of batches.

    >>> x = torch.zeros(3)
    >>> [_is_bundle(data) for data in ((x, x), ((x, x), x), ({"a": x}, x), ((x, x), (x, x)))]
    [True, True, True, False]
    """
    if isinstance(data, Tensor):
        return True
    if isinstance(data, tuple) and data and isinstance(data[-1], Tensor):
        inputs = [v for v in data if isinstance(v, tuple | Mapping)]  # batches would be all alike
        if not all(_is_bundle(v) for v in inputs):
            return False
        values = [v for v in data if not isinstance(v, tuple | Mapping)] + tensors_of(inputs)
    elif isinstance(data, Mapping):
        values = list(data.values())
    else:
        return False
    return (
        bool(values)
        and all(isinstance(v, Tensor) and v.dim() for v in values)
        and len({len(v) for v in values}) == 1
    )


def _is_sequential(data: Any) -> bool:
    """Whether a plain DataLoader takes every sample of a dataset in its order."""
    return (
        type(data) is DataLoader
        and type(data.batch_sampler) is BatchSampler
        and type(data.sampler) is SequentialSampler
        and not data.drop_last
    )


def _aligned(t: Tensor) -> Tensor:
    return t.clone() if t.data_ptr() % ALIGNMENT else t


def _bytes(t: Tensor) -> bytes:
    t = t.detach().cpu().contiguous().flatten()
    if t.numel() == 1:  # of any stride: contiguous as it is, but not for a view as bytes
        t = t.clone(memory_format=torch.contiguous_format)
    return t.view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _hash_batch(h: Any, batch: Batch) -> None:
    for t in tensors_of(batch):
        h.update(f"{tuple(t.shape)}{t.dtype}".encode())
        h.update(_bytes(t))
