"""The evaluator: the network at origin + Σ offset·direction, as mergeable sums over the data.

Σwv/Σw over samples is the value; sums of w², w²v, w²v² give its standard error, and the same with
d = v - v(centre), sample by sample, that of the difference to the centre. All sums are float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lsweep.axes.directions import Directions
from lsweep.backends import catalogue
from lsweep.backends.eager import Backend, Eager, Ground, Seat
from lsweep.backends.packed import KEPT, Packed, Spot
from lsweep.backends.summing import Reference, Samples, stacked
from lsweep.backends.variants import Replayed
from lsweep.derivatives.differentiating import Differentiating
from lsweep.errors import LsweepError, nearest
from lsweep.evaluating.pieces import piece_of, values_in_pieces
from lsweep.hosts.device import is_out_of_memory
from lsweep.plans.pointwise import POINTWISE, expanded
from lsweep.problems import batchnorm
from lsweep.problems.data import Batch, map_tensors, moved, samples_in
from lsweep.problems.factory import describe
from lsweep.problems.problem import Problem, Sampled
from lsweep.problems.supply import Supply, default_batch_size
from lsweep.problems.takeover import generators_kept, model_kept, numerics, products
from lsweep.storage.sums import SUMS

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]


class Evaluator:
    """Takes over a problem's network on one device, and gives it back exactly as it was.

    Use it as a context manager. It is the only object with a life of its own in the engine.

    Args:
        problem: network, data, metrics.
        settings: the plan's ``evaluate`` table.
        directions: what to move along.
        device: where to evaluate.
        batch_sizes: split name -> batch size, where it is free.
        own: nobody else needs the network, so that it is not kept to be given back.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Mapping[str, Any],
        directions: Directions,
        device: torch.device,
        batch_sizes: Mapping[str, int] | None = None,
        own: bool = False,
    ) -> None:
        self.problem, self.device, self.directions, self._own = problem, device, directions, own
        self.splits: tuple[str, ...] = tuple(settings["splits"])
        asked: tuple[str, ...] = tuple(settings["metrics"])
        self.pointwise = tuple(m for m in asked if m in POINTWISE)
        self.stored = tuple(m for m in asked if m not in POINTWISE)
        # Where all are pointwise, the checks at the centre still need something to look at.
        self.metrics = self.stored or problem.metric_names[:1]
        self.settings = {**settings, "metrics": list(self.metrics)}
        self._columns = [list(expanded(asked)).index(v) for v in expanded(self.stored)]
        self._asked = asked
        self.slices = int(settings["slices"])
        for name in (*self.splits, *self._calibration_splits()):
            if name not in problem.splits:
                raise LsweepError(f"no data split {name!r}{nearest(name, problem.splits)}")
        self.batch_sizes = dict(batch_sizes or {})
        for name in {*self.splits, *self._calibration_splits()}:
            if name not in self.batch_sizes:
                size, split = settings["batch_size"], problem.splits[name]
                free = not isinstance(size, int)
                self.batch_sizes[name] = default_batch_size(split, device) if free else size
        sizes = self.batch_sizes.items()
        self._pieces = {s: piece_of(settings, problem, s, n) for s, n in sizes}
        self.dtype = torch.float64 if settings["precision"] == "float64" else torch.float32
        self._supply = Supply(problem.splits, self.batch_sizes, self.slices, device, self.dtype)
        self._centre: dict[int, list[list[list[Reference]]]] = {}
        self._builder: catalogue.Builder | None = None
        self._stack = contextlib.ExitStack()

    @property
    def names(self) -> list[str]:
        """``train_loss`` and the like: what `samples` and `centre` return, in order."""
        return [f"{s}_{m}" for s in self.splits for m in self.metrics]

    def _calibration_splits(self) -> tuple[str, ...]:
        if self.settings["batch_norm"] != "recalibrate":
            return ()
        return ("train" if "train" in self.problem.splits else self.splits[0],)

    # -- taking over and giving back ----------------------------------------------------------

    def __enter__(self) -> Evaluator:
        try:
            self._stack.enter_context(numerics(self.device))
            self._stack.enter_context(products(tf32=self.settings["precision"] == "tf32"))
            self._stack.enter_context(generators_kept())
            if not self._own:
                self._stack.enter_context(model_kept(self.problem.model))
            self.problem.model.eval()
            self._take_over()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._forget(self.backend)
        self._stack.close()

    def _take_over(self) -> None:
        """Move the network to the device, and all that may move into packed rows."""
        model = self.problem.model
        for p in model.parameters():
            p.data, p.grad = moved(p.data, self.device, self.dtype), None
            p.requires_grad_(p.requires_grad and self.problem.grad)
        clones: dict[int, Tensor] = {}  # by identity: a shared buffer stays shared
        for module in model.modules():
            for name, b in module._buffers.items():
                if b is not None:
                    if id(b) not in clones:
                        clones[id(b)] = moved(b.clone(), self.device, self.dtype)
                    module._buffers[name] = clones[id(b)]
        self.seat = Seat(model)
        start = {**self.seat.tensors, **self.directions.origin}
        plain = {n: start[n].detach().contiguous() for n in self.seat.tensors}
        axes = [axis.tensors for axis in self.directions.axes.values()]
        packed = Packed(plain, axes, self.device, self.dtype)
        for axis, row in zip(axes, packed.axes, strict=True):
            for name, view in packed.views_of(row).items() if axis else ():
                old = axis.get(name)
                if old is not None and (old.dtype, old.device) == (view.dtype, view.device):
                    axis[name] = view  # the same numbers: a copy of each direction less
        here = self.device, self.dtype, packed.views_of(packed.origin)
        self.ground = Ground(self.problem, self.settings, self.directions, *here)
        self.seat.take(packed)
        self._packed = packed
        self.eager = Eager(self.ground, self.seat, packed)
        self.plain = Eager(self.ground, self.seat, packed, plain=True)
        self.backend: Backend = self.eager
        self._using = ("eager", self.ground.precisions[0])
        self.differentiating = Differentiating(self.ground, self.plain, self._supply.batches)

    # -- backends -------------------------------------------------------------------------------

    def builder(self) -> catalogue.Builder:
        """Return what builds backends; the same one until a backend is taken into use."""
        if self._builder is None:
            split = self.splits[0]
            example = next(self.fresh(split, self.batch_sizes[split]))
            self._builder = catalogue.Builder(
                self.ground, self.seat, self.eager, self._packed, example
            )
        return self._builder

    def use(self, name: str, batch_sizes: Mapping[str, int], precision: str = "") -> None:
        """Evaluate with a backend, batch sizes and precision (the plan's own) from now on.

        Raises:
            LsweepError: the backend is not for this problem, or does not build here.
        """
        asked = self.ground.precisions[0]
        wanted, backend = (name, precision or asked), self.backend
        if wanted != self._using:
            plain = wanted == ("eager", asked)
            backend = self.eager if plain else catalogue.build(name, self.builder(), wanted[1])
        if backend is not self.backend or self.batch_sizes != batch_sizes:
            self.batch_sizes |= batch_sizes
            self._forget(backend)
        self.backend, self._builder, self._using = backend, None, wanted

    def _forget(self, backend: Backend) -> None:
        """Let go of batches, the centre and graphs of batches that have other sizes from now on."""
        self._supply.clear()
        self._centre.clear()
        if isinstance(backend, Replayed):
            backend.release()

    # -- data -----------------------------------------------------------------------------------

    def batches(self, split: str, slice_: int = 0) -> Iterator[Batch]:
        """Yield the batches of a split on the device; kept there when they fit."""
        return self._supply.batches(split, slice_)

    def fresh(self, split: str, size: int) -> Iterator[Batch]:
        """Yield batches of a size on the device, without keeping them."""
        return self._supply.fresh(split, size)

    # -- evaluation -----------------------------------------------------------------------------

    def _passes(
        self,
        spots: Sequence[Spot],
        slice_: int,
        backend: Backend,
        recalibrate: str | None = None,
        limit: int | None = None,
    ) -> Iterator[tuple[slice, int, int, list[Mapping[str, Sampled]]]]:
        """Yield which spots, which split and batch of it, and their metrics on it.

        Data that is streamed is read once for all spots. Where it stays on the device and the
        spots have many batches, each has the network for itself, which is then moved only once.
        Both ways give the same bits.
        """
        many = any(self._supply.resident(s, slice_) > 1 for s in self.splits)
        alone = bool(recalibrate) or any(spot.step >= 0 for spot in spots)  # a step is a file
        if self.directions.family is not None:  # others are made anew for each batch
            index = self.directions.family.index
            alone |= len({index(spot.offsets) for spot in spots}) > KEPT
        resident = self._supply.all_resident(self.splits, slice_)
        if alone or (resident and many and not backend.together):
            groups = [slice(k, k + 1) for k in range(len(spots))]
        else:
            groups = [slice(0, len(spots))]
        # Float32 eager beside another way of evaluating, in use or still to be chosen.
        others = self.backend.name != "eager" or len(self.ground.precisions) > 1
        audits = backend is self.plain and others
        for group in groups:
            here, stay = spots[group], False
            if recalibrate:
                backend = eager = backend if isinstance(backend, Eager) else self.eager
                eager.move(*here)
                # A plan's own statistics are of all samples, however few are looked at.
                few = None if self._calibration_splits() else limit
                self._recalibrate(eager, recalibrate, few)
                stay = True
            for i, split in enumerate(self.splits):
                for b, batch in enumerate(self._some(split, slice_, limit)):
                    most = self._pieces[split] if audits else None
                    yield group, i, b, values_in_pieces(backend, here, batch, stay, most)
                    stay = len(here) == 1

    def _some(self, split: str, slice_: int, limit: int | None) -> Iterator[Batch]:
        """Yield all batches of a slice, or those that hold its first ``limit`` samples."""
        seen = 0
        for batch in self.batches(split, slice_):
            if limit is not None and seen >= limit:
                return
            seen += samples_in(batch)
            yield batch

    def samples(
        self,
        spots: Sequence[Spot],
        slice_: int = 0,
        recalibrate: str | None = None,
        limit: int | None = None,
        backend: Backend | None = None,
    ) -> list[list[Samples]]:
        """Return for each spot the samples of each variable, in the order of the plan.

        Args:
            spots: where.
            slice_: which fixed part of the data.
            recalibrate: average batch-norm statistics anew over this split at each spot.
            limit: only so many samples of each split, rounded up to whole batches.
            backend: another than the one in use.
        """
        recalibrate = recalibrate or next(iter(self._calibration_splits()), None)
        parts: list[list[list[Samples]]] = [
            [[] for _ in self.splits for _ in self.metrics] for _ in spots
        ]
        passes = self._passes(spots, slice_, backend or self.backend, recalibrate, limit)
        for group, i, _, found in passes:
            for variables, metrics in zip(parts[group], found, strict=True):
                for m, metric in enumerate(self.metrics):
                    variables[i * len(self.metrics) + m].append(Samples.of(metrics[metric]))
        return [[Samples.joined(p) for p in variables] for variables in parts]

    def _recalibrate(self, eager: Eager, split: str, limit: int | None) -> None:
        size = default_batch_size(self.problem.splits[split], self.device)
        self.batch_sizes.setdefault(split, size)

        def run_batches() -> None:
            for slice_ in range(self.slices):
                for batch in self._some(split, slice_, limit):
                    eager.here(batch)

        batchnorm.recalibrate(self.problem.model, run_batches)

    def first_batch(self) -> dict[str, float | None]:
        """Return each variable's mean over the first batch of its split at the present weights."""
        out: dict[str, float | None] = {}
        for split in self.splits:
            found = self.plain.here(map_tensors(next(iter(self.batches(split))), torch.clone))
            for metric, s in found.items():
                mean = float((s.weights.double() * s.values.double()).sum() / s.weights.sum())
                out[f"{split}_{metric}"] = mean if math.isfinite(mean) else None
        return out

    def whole(self, spot: Spot) -> list[Samples]:
        """Return the samples of each variable at one spot over all slices."""
        slices = [self.samples([spot], s)[0] for s in range(self.slices)]
        return [Samples.joined(parts) for parts in zip(*slices, strict=True)]

    @property
    def origin(self) -> Spot:
        """The spot where all offsets are 0."""
        return Spot((0.0,) * len(self.directions.axes))

    def _references(self, slice_: int) -> list[list[list[Reference]]]:
        """Return the centre, evaluated once: for each split, batch and metric."""
        if slice_ not in self._centre:
            batches: list[list[list[Reference]]] = [[] for _ in self.splits]
            recalibrate = next(iter(self._calibration_splits()), None)
            passes = self._passes([self.origin], slice_, self.backend, recalibrate)
            for _, i, _, (found,) in passes:
                batches[i].append([Reference(Samples.of(found[m])) for m in self.metrics])
            self._centre[slice_] = batches
        return self._centre[slice_]

    def centre(self, slice_: int = 0) -> list[Samples]:
        """Return the samples at offset 0, evaluated once: what differences refer to."""
        return [
            Samples.joined([r.centre for r in variable])
            for batches in self._references(slice_)
            for variable in zip(*batches, strict=True)
        ]

    def evaluate(self, spots: Sequence[Spot], slice_: int = 0, audit: bool = False) -> FloatArray:
        """Return the (K, V, 8) float64 sums of `sums.SUMS` at each spot.

        Args:
            spots: where.
            slice_: which fixed part of the data.
            audit: in eager float32 (or float64) whatever the backend and the precision; pointwise
                metrics, which are computed so at any time, are left out then, as NaN.

        Raises:
            LsweepError: the data gave another number of samples than at the centre.
        """
        variables = len(expanded(self._asked))
        out = np.full((len(spots), len(self.splits), variables, len(SUMS)), np.nan)
        if self.stored:
            found = self.sums(spots, slice_, self.plain if audit else self.backend)
            shape = (len(spots), len(self.splits), len(self.stored), len(SUMS))
            out[:, :, self._columns] = found.reshape(shape)
        for k, spot in enumerate(spots if self.pointwise and not audit else ()):
            for metric, at in self._places():
                for i, split in enumerate(self.splits):
                    out[k, i, at] = self.differentiating.sums(metric, spot, split)
        return out.reshape(len(spots), -1, len(SUMS))

    def _places(self) -> Iterator[tuple[str, slice]]:
        """Yield where among the variables each pointwise metric's are."""
        start = 0
        for metric in self._asked:
            end = start + len(expanded((metric,)))
            if metric in POINTWISE:
                yield metric, slice(start, end)
            start = end

    def sums(self, spots: Sequence[Spot], slice_: int, backend: Backend) -> FloatArray:
        """Return (K, V, 8) sums of the metrics that are means, by the backend that is given."""
        references = self._references(slice_)
        totals: Tensor | None = None
        seen = np.zeros((len(spots), len(self.splits)), dtype=np.int64)
        recalibrate = next(iter(self._calibration_splits()), None)
        for group, i, b, found in self._passes(spots, slice_, backend, recalibrate):
            if b >= len(references[i]):
                raise self._other_batches(references[i], b + 1)
            sums = stacked(references[i][b], self.metrics, found)
            if totals is None:
                shape = (len(spots), len(self.splits), len(self.metrics), len(SUMS))
                totals = sums.new_zeros(shape)
            totals[group, i] += sums
            seen[group, i] = b + 1
        assert totals is not None
        for i, batches in enumerate(references):
            if (seen[:, i] != len(batches)).any():
                raise self._other_batches(batches, int(seen[:, i].min()))
        return totals.flatten(1, 2).cpu().numpy().astype(np.float64)

    def _other_batches(self, there: Sequence[Any], here: int) -> LsweepError:
        return LsweepError(
            f"the data gave {here} batches here and {len(there)} at the centre: it must be the "
            "same at every point"
        )

    def halve_batch(self) -> bool:
        """Halve every free batch size after running out of memory; False when all are 1."""
        if self.settings["batch_norm"] != "eval":
            return False  # batch statistics, and so the values, depend on it
        free = [s for s in self.batch_sizes if self.problem.splits[s].sizable]
        if not free or all(self.batch_sizes[s] == 1 for s in free):
            return False
        for s in free:
            self.batch_sizes[s] = max(1, self.batch_sizes[s] // 2)
        self._forget(self.backend)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def fitted(self, work: Callable[[], T], what: str) -> T:
        """Return what ``work`` does, with smaller batches where memory is too small for it.

        Raises:
            LsweepError: ``what``, with the reason.
        """
        while True:
            try:
                return work()
            except LsweepError:
                raise
            except Exception as e:
                if not is_out_of_memory(e) or not self.halve_batch():
                    raise LsweepError(f"{what}: {describe(e)}") from e
