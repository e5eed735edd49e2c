"""A surface: the merged values of a run on its lattice, read and written as one self-checking file.

Shapes: ``A`` axes named ``x``, then ``y``, then ``z``; every variable has shape ``(nz, ny, nx)``,
``(ny, nx)`` or ``(nx,)`` in C order, so the last index is always x and ``values[j, i]`` belongs
to ``(x[i], y[j])``. Offsets are in units of the direction they belong to (``units = "1"``).

This module imports neither torch nor matplotlib, so that looking at a result starts at once.
"""

from __future__ import annotations

import enum
import importlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from lsweep.errors import DamagedFile, LsweepError, nearest
from lsweep.storage.files import write_whole
from lsweep.surfaces.attributes import TEXTS, as_string, as_text, content_digest, write_attributes

if TYPE_CHECKING:
    import xarray
    from matplotlib.axes import Axes

SCHEMA = 1
FloatArray = npt.NDArray[np.float64]


class Status(enum.IntEnum):
    """What became of a point; 0 is the fill value, so that what was never written is pending.

    >>> Status(2).name
    'NONFINITE'
    """

    PENDING = 0
    OK = 1
    NONFINITE = 2
    FAILED = 3
    INTERPOLATED = 4


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints projected on the plane (least squares), beside their true distance and values.

    Attributes:
        offsets: (T, A) float64, coordinates in the plane, axis order x, y.
        residual: (T,) float64, L2 distance in weight space from the checkpoint to the plane.
        in_plane: (T,) float64, L2 norm in weight space of the projection.
        values: name -> (T,) float64, the metric at the checkpoint itself, not at its projection.
        labels: T names, in the order of training.

    >>> t = Trajectory(np.zeros((1, 2)), np.ones(1), np.ones(1), {}, ("epoch1",))
    >>> len(t.labels)
    1
    """

    offsets: FloatArray
    residual: FloatArray
    in_plane: FloatArray
    values: Mapping[str, FloatArray]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Surface:
    """Values on a lattice, each with its status, and the record of how they came about.

    Attributes:
        axes: axis name -> (n,) float64 offsets; order x, then y, then z.
        values: variable name (``train_loss``, ``train_loss_se``, ``weight_sq``, ...) -> float64,
            shape ``(nz, ny, nx)`` without the axes that do not exist; NaN where pending or failed.
        status: uint8, same shape, see `Status`; by default, what the values say.
        attributes: variable or axis name -> its attributes (``long_name``, ``units``, ...).
        trajectory: checkpoints on the plane, or None.
        provenance: how it was made; JSON-able (``plan``, ``plan_sha256``, ``versions``, ...).
        title: one line.
        history: one line per command that made it.

    >>> s = Surface({"x": np.array([-1.0, 0.0, 1.0])}, {"train_loss": np.array([2.0, 1.0, 3.0])})
    >>> s.x, s["train_loss"].min(), s.complete
    (array([-1.,  0.,  1.]), np.float64(1.0), True)
    """

    axes: Mapping[str, FloatArray]
    values: Mapping[str, FloatArray]
    status: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    attributes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    trajectory: Trajectory | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    title: str = "loss landscape"
    history: str = ""

    def __post_init__(self) -> None:
        if list(self.axes) != ["x", "y", "z"][: len(self.axes)] or not self.axes:
            raise LsweepError(f"a surface has axes x, or x y, or x y z, not {list(self.axes)}")
        if not self.status.size:
            finite = [np.isfinite(v) for n, v in self.values.items() if not n.endswith("_se")]
            good = np.logical_and.reduce(finite) if finite else np.ones(self.shape, bool)
            status = np.where(good, Status.OK, Status.NONFINITE).astype(np.uint8)
            object.__setattr__(self, "status", status)
        ordered = {n: self.values[n] for n in sorted(self.values, key=_variable_order)}
        object.__setattr__(self, "values", ordered)
        arrays: dict[str, npt.NDArray[Any]] = {**self.values, "status": self.status}
        for name, value in arrays.items():
            if value.shape != self.shape:
                raise LsweepError(f"{name} has shape {value.shape}, the axes say {self.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(nz, ny, nx) without the axes that do not exist."""
        return tuple(len(c) for c in reversed(list(self.axes.values())))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Axis names in array order: ``("y", "x")`` for a plane."""
        return tuple(reversed(list(self.axes)))

    @property
    def x(self) -> FloatArray:
        """(nx,) offsets along the first direction."""
        return self.axes["x"]

    @property
    def y(self) -> FloatArray:
        """(ny,) offsets along the second direction."""
        return self._axis("y")

    @property
    def z(self) -> FloatArray:
        """(nz,) offsets along the third direction."""
        return self._axis("z")

    def _axis(self, name: str) -> FloatArray:
        if name not in self.axes:
            raise LsweepError(f"this surface has no axis {name!r}, only {', '.join(self.axes)}")
        return self.axes[name]

    def _axis_attributes(self, name: str) -> dict[str, str]:
        return {"units": "1", **self.attributes.get(name, {})}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the swept quantities, ``train_loss`` first, without their errors."""
        described = {n: self.attributes.get(n) for n in self.values}
        return tuple(n for n, about in described.items() if not about or "metric" in about)

    @property
    def evaluated(self) -> npt.NDArray[np.bool_]:
        """Where the network was evaluated, with any outcome; not pending or interpolated.

        >>> Surface({"x": np.zeros(3)}, {"a": np.zeros(3)}, np.array([0, 1, 4], np.uint8)).evaluated
        array([False,  True, False])
        """
        return np.isin(self.status, (Status.PENDING, Status.INTERPOLATED), invert=True)

    def evaluated_at(self, where: Mapping[str, float]) -> bool:
        """Return whether the point at these offsets was evaluated.

        >>> Surface({"x": np.array([0.0, 1.0])}, {"a": np.zeros(2)}).evaluated_at({"x": 1.0})
        True
        """
        index = [int(np.flatnonzero(self.axes[d] == where[d])[0]) for d in self.dimensions]
        return bool(self.evaluated[tuple(index)])

    @property
    def complete(self) -> bool:
        """True when no point is pending."""
        return bool((self.status != Status.PENDING).all())

    def __repr__(self) -> str:
        """Return its axes, how many points were evaluated, its variables, centre and minimum."""
        axes = ", ".join(
            f"{a} {c[0]:.6g} to {c[-1]:.6g} ({len(c)})" for a, c in self.axes.items() if len(c)
        )
        counts = f"{int(self.evaluated.sum())} of {self.status.size} points evaluated"
        lines = [f"<Surface {self.title!r}: {axes}; {counts}", ", ".join(self.values)]
        for name in self.metrics[:1]:
            if np.isfinite(self[name]).any():
                word, where, best = self.best(name)
                at = ", ".join(f"{a} = {offset:.6g}" for a, offset in where.items())
                same = "constant, " if self.constant(name) else ""
                value = self.center(name)
                center = f"{value:.6g} at the centre, " if np.isfinite(value) else ""
                lines.append(f"{name}: {same}{center}{word} {best:.6g} at {at}")
        return "\n  ".join(lines) + ">"

    def __getitem__(self, name: str) -> FloatArray:
        if name not in self.values:
            raise LsweepError(f"no variable {name!r} in this surface{nearest(name, self.values)}")
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def minimum(self, name: str) -> tuple[dict[str, float], float]:
        """Return the offsets and the value of the least finite value of ``name``.

        Of several that are equal the one nearest to the centre, each axis by its own range; where
        the surface is constant they are all equal.

        Raises:
            LsweepError: no value of ``name`` is finite.

        >>> Surface({"x": np.array([0.0, 1.0])}, {"a": np.array([2.0, 1.0])}).minimum("a")
        ({'x': 1.0}, 1.0)
        """
        value = self[name]
        good = np.isfinite(value)
        if not good.any():
            raise LsweepError(f"no value of {name} is finite")
        if not self.constant(name):
            good &= value == value[good].min()
        sizes = [np.abs(self.axes[d]) for d in self.dimensions]
        each = np.meshgrid(*(s / (s.max() or 1.0) for s in sizes), indexing="ij")
        far = np.where(good, np.sum(np.square(each), axis=0), np.inf)
        index = np.unravel_index(int(np.argmin(far)), value.shape)
        where = {d: float(self.axes[d][i]) for d, i in zip(self.dimensions, index, strict=True)}
        return dict(sorted(where.items())), float(value[index])

    def best(self, name: str) -> tuple[str, dict[str, float], float]:
        """Return "minimum" with where and what it is; of an accuracy "maximum", likewise."""
        turned = -1.0 if name.endswith(("_accuracy", "_acc")) else 1.0
        held = replace(self, values={**self.values, name: turned * self[name]})
        where, value = held.minimum(name)
        return "minimum" if turned > 0 else "maximum", where, turned * value

    def constant(self, name: str) -> bool:
        """Return whether two or more finite values of ``name`` are equal, but for rounding.

        Rounding is that of float32 where the network was run in less than float64.

        >>> Surface({"x": np.arange(2.0)}, {"a": np.array([1.0, 1.0 + 1e-15])}).constant("a")
        True
        """
        value = self[name][np.isfinite(self[name])]
        numerics = self.provenance.get("numerics") or self.provenance.get("plan", {})
        precise = numerics.get("evaluate", numerics).get("precision", "float64") == "float64"
        unit = 16 * np.finfo(np.float64).eps if precise else np.finfo(np.float32).eps
        return len(value) > 1 and bool(np.ptp(value / 2) <= unit * np.abs(value / 2).max())

    def center(self, name: str) -> float:
        """Return the value at offset 0, or NaN where the lattice does not contain it.

        >>> Surface({"x": np.array([0.0, 1.0])}, {"a": np.array([2.0, 1.0])}).center("a")
        2.0
        """
        index = []
        for d in self.dimensions:
            hits = np.flatnonzero(self.axes[d] == 0.0)
            if len(hits) != 1:
                return float("nan")
            index.append(int(hits[0]))
        return float(self[name][tuple(index)])

    def plot(self, name: str | None = None, **options: Any) -> Axes:
        """Draw one metric (a line or a filled contour) and return the matplotlib Axes."""
        # By name, the only call upward: drawing knows surfaces, surfaces do not know drawing.
        axes: Axes = importlib.import_module("lsweep.pictures.drawing").draw(self, name, **options)
        return axes

    def to_xarray(self) -> xarray.Dataset:
        """Return an `xarray.Dataset` with coordinates, units and attributes (needs xarray)."""
        import xarray

        data = {
            n: (self.dimensions, v, dict(self.attributes.get(n, {})))
            for n, v in {**self.values, "status": self.status}.items()
        }
        coords = {n: ((n,), c, self._axis_attributes(n)) for n, c in self.axes.items()}
        return xarray.Dataset(data, coords, {"title": self.title, "history": self.history})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write netCDF-4, whole or not at all: a temporary file, synced, then renamed.

        Equal surfaces give equal bytes: no timestamps, fixed-length attributes.
        """
        image = io.BytesIO()  # HDF5 does not survive a full disk; a write of finished bytes does
        with h5py.File(image, "w", libver=("v110", "v110")) as f:  # v108 checks no chunk's place
            self._write(f)
            f.attrs["lsweep_sha256"] = np.bytes_(content_digest(f))
        write_whole(path, image.getvalue())

    def _write(self, f: h5py.File) -> None:
        f.attrs["Conventions"] = np.bytes_("CF-1.10")
        f.attrs["lsweep_schema"] = np.int64(SCHEMA)
        f.attrs["title"] = as_text(self.title)
        f.attrs["history"] = as_text(self.history)
        for name, coordinates in self.axes.items():
            d = f.create_dataset(name, data=coordinates, fletcher32=True)
            d.make_scale(name)
            write_attributes(d, self._axis_attributes(name))
        flags = {
            "long_name": "outcome of the point",
            "flag_meanings": " ".join(s.name.lower() for s in Status),
        }
        for name, value in {**self.values, "status": self.status}.items():
            d = f.create_dataset(name, data=value, fletcher32=True)
            for i, dim in enumerate(self.dimensions):
                d.dims[i].attach_scale(f[dim])
            write_attributes(d, flags if name == "status" else self.attributes.get(name, {}))
            if name == "status":
                d.attrs["flag_values"] = np.arange(len(Status), dtype=np.uint8)
        if self.trajectory is not None:
            t = self.trajectory
            g = f.create_group("trajectory")
            g.attrs["labels"] = as_text(json.dumps(t.labels))
            for name, value in {
                "offset": t.offsets,
                "residual": t.residual,
                "in_plane": t.in_plane,
                **t.values,
            }.items():
                g.create_dataset(name, data=value, fletcher32=True)
        g = f.create_group("provenance")
        for key, item in sorted(self.provenance.items()):
            g.attrs[key] = as_text(json.dumps(item, sort_keys=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Surface:
        """Read a surface written by `save`; every byte that is used is checked.

        Raises:
            DamagedFile: the file is truncated, altered, or not a surface.
            LsweepError: the file is missing or its schema is newer than this lsweep.
        """
        p = Path(path)
        if not p.is_file():
            raise LsweepError(f"no surface at {p}")
        try:
            with h5py.File(p, "r", locking="best-effort") as f:
                return cls._read(f, p)
        except LsweepError:
            raise
        except Exception as e:  # HDF5 reports damage as almost any exception
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise DamagedFile(f"{p} is damaged or not a surface: {reason}") from e

    @classmethod
    def _read(cls, f: h5py.File, path: Path) -> Surface:
        if "lsweep_schema" not in f.attrs:
            raise DamagedFile(
                f"{path} is not an lsweep surface (no lsweep_schema); "
                "files of other tools are read by 'lsweep convert'"
            )
        schema = int(f.attrs["lsweep_schema"])
        if schema > SCHEMA:
            raise LsweepError(
                f"{path} has schema {schema}, this lsweep reads up to {SCHEMA}: update lsweep"
            )
        if as_string(f.attrs["lsweep_sha256"]) != content_digest(f):
            raise DamagedFile(f"{path} is damaged: its content does not match its checksum")
        names = [n for n in f if isinstance(f[n], h5py.Dataset)]
        axes = {n: f[n][()] for n in ("x", "y", "z") if n in names}
        values = {n: f[n][()] for n in names if n not in axes and n != "status"}
        # Not attrs.items(): the references of dimension scales lie in an unchecked heap, on which
        # a damaged file may keep HDF5 for ever.
        attributes = {
            n: {k: as_string(f[n].attrs[k]) for k in TEXTS if k in f[n].attrs} for n in names
        }
        trajectory = None
        if "trajectory" in f:
            g = f["trajectory"]
            fixed = {"offset", "residual", "in_plane"}
            trajectory = Trajectory(
                g["offset"][()],
                g["residual"][()],
                g["in_plane"][()],
                {n: g[n][()] for n in sorted(g, key=_variable_order) if n not in fixed},
                tuple(json.loads(as_string(g.attrs["labels"]))),
            )
        provenance = {k: json.loads(as_string(v)) for k, v in f["provenance"].attrs.items()}
        return cls(
            axes,
            values,
            f["status"][()],
            attributes,
            trajectory,
            provenance,
            as_string(f.attrs["title"]),
            as_string(f.attrs["history"]),
        )


def _variable_order(name: str) -> tuple[bool, bool, bool, str]:
    by_the_way = name.endswith(("_se", "_error")) or name in ("weight_sq", "device_class")
    return by_the_way, "loss" not in name, not name.startswith("train"), name
