"""Surfaces as VTK XML for ParaView: the grid's points lifted to the height of one metric.

Points are in C order with x fastest, which is VTK's order too. Every variable and the status are
PointData under their own names; ``zvalue`` (the reference implementation's name for it) is the
metric as drawn. Arrays are base64 of little-endian binary: ParaView reads NaN and every bit of a
float64 that way, which its text format does not promise.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.surfaces.scales import log_scale
from lsweep.surfaces.surface import FloatArray, Surface

_TYPES = {"f8": "Float64", "i8": "Int64", "u1": "UInt8"}
_HIDDEN = 2  # vtkDataSetAttributes.HIDDENPOINT


def structured_grid(surface: Surface, name: str | None = None, log: bool = False) -> bytes:
    """Return a ``.vts`` file: a line or a sheet at the height of ``name``, or a block for 3 axes.

    Points are (x, 0, height), (x, y, height) or (x, y, z). A point without a finite height has
    height NaN and is hidden, so that it is a hole; its values are in the file as they are.

    Args:
        surface: 1, 2 or 3 axes, any counts.
        name: the variable drawn; default ``train_loss`` or, without it, the first metric.
        log: draw T = ln L where all L > 0, else asinh((L - L0)/s); the variables stay as they are.

    Returns:
        The bytes of an XML file of type StructuredGrid.

    >>> s = Surface({"x": np.array([0.0, 1.0])}, {"train_loss": np.array([2.0, 1.0])})
    >>> structured_grid(s).decode().splitlines()[2]
    '<StructuredGrid WholeExtent="0 1 0 0 0 0">'
    """
    height = _height(surface, name, log)
    data = _point_data(surface, height)
    if not np.isfinite(height).all():
        data["vtkGhostType"] = np.where(np.isfinite(height.ravel()), 0, _HIDDEN).astype(np.uint8)
    last = [len(c) - 1 for c in surface.axes.values()] + [0, 0]
    extent = f'"0 {last[0]} 0 {last[1]} 0 {last[2]}"'
    return _document(
        "StructuredGrid",
        f"WholeExtent={extent}",
        f"Extent={extent}",
        [*_section("PointData", data, "zvalue"), *_points(surface, height)],
    )


def poly_data(surface: Surface, name: str | None = None, log: bool = False) -> bytes:
    """Return a ``.vtp`` file: quadrilaterals over a plane, or lines along one axis.

    The points are those of `structured_grid`, all of them; a quadrilateral or a segment is there
    where all its corners have a finite height.

    Args:
        surface: 1 or 2 axes, any counts.
        name: the variable drawn; default ``train_loss`` or, without it, the first metric.
        log: draw T = ln L where all L > 0, else asinh((L - L0)/s); the variables stay as they are.

    Returns:
        The bytes of an XML file of type PolyData.

    Raises:
        LsweepError: no variable ``name``, or three axes.

    >>> axes = {"x": np.arange(3.0), "y": np.arange(2.0)}
    >>> b'NumberOfPolys="2"' in poly_data(Surface(axes, {"train_loss": np.zeros((2, 3))}))
    True
    """
    if len(surface.axes) == 3:
        raise LsweepError("a .vtp is a surface and this has three axes: write .vts, a block")
    height = _height(surface, name, log)
    index = np.arange(height.size).reshape(height.shape)
    if len(surface.axes) == 1:
        cells = np.stack([index[:-1], index[1:]], axis=-1)  # (nx - 1, 2)
    else:
        corners = [index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]]
        cells = np.stack(corners, axis=-1).reshape(-1, 4)  # (quads, 4), counter-clockwise
    cells = cells[np.isfinite(height.ravel()[cells]).all(axis=1)]
    kind = "Lines" if len(surface.axes) == 1 else "Polys"
    ends = np.arange(1, len(cells) + 1, dtype=np.int64) * cells.shape[1]
    return _document(
        "PolyData",
        "",
        f'NumberOfPoints="{height.size}" NumberOfVerts="0" NumberOfStrips="0" '
        f'NumberOfLines="{len(cells) * (kind == "Lines")}" '
        f'NumberOfPolys="{len(cells) * (kind == "Polys")}"',
        [
            *_section("PointData", _point_data(surface, height), "zvalue"),
            *_points(surface, height),
            *_section(kind, {"connectivity": cells.ravel().astype(np.int64), "offsets": ends}),
        ],
    )


def height_name(surface: Surface, name: str | None) -> str:
    """Return ``name``, or the variable drawn by default: ``train_loss``, else the first metric.

    Raises:
        LsweepError: no variable ``name``, or none at all.

    >>> height_name(Surface({"x": np.zeros(1)}, {"test_loss": np.zeros(1)}), None)
    'test_loss'
    """
    if name is None:
        name = next((n for n in ("train_loss", *surface.metrics, *surface) if n in surface), None)
    if name is None:
        raise LsweepError("this surface holds no variable to draw")
    surface[name]  # raises where there is no such variable
    return name


def _height(surface: Surface, name: str | None, log: bool) -> FloatArray:
    value = surface[height_name(surface, name)]
    height = np.where(np.isfinite(value), value, np.nan)  # an infinity would be the bounding box
    if not log or not np.isfinite(height).any():
        return height
    center = surface.center(height_name(surface, name))
    return log_scale(height, center=center).forward(height)


def _point_data(surface: Surface, height: FloatArray) -> dict[str, npt.NDArray[Any]]:
    data: dict[str, npt.NDArray[Any]] = {**surface.values, "status": surface.status}
    return {n: v.ravel() for n, v in {**data, "zvalue": height}.items()}


def _points(surface: Surface, height: FloatArray) -> list[str]:
    lattice = np.meshgrid(*(surface.axes[d] for d in surface.dimensions), indexing="ij")[::-1]
    padding = {1: [np.zeros_like(height), height], 2: [height], 3: []}[len(lattice)]
    points = np.stack([c.ravel() for c in [*lattice, *padding]], axis=-1)  # (points, 3)
    return _section("Points", {"points": points})


def _section(tag: str, data: Mapping[str, npt.NDArray[Any]], active: str = "") -> list[str]:
    scalars = f' Scalars="{active}"' if active in data else ""
    return [f"<{tag}{scalars}>", *(_array(n, a) for n, a in data.items()), f"</{tag}>"]


def _array(name: str, array: npt.NDArray[Any]) -> str:
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    text = base64.b64encode(np.uint64(raw.nbytes).astype("<u8").tobytes() + raw.tobytes()).decode()
    components = f' NumberOfComponents="{raw.shape[1]}"' if raw.ndim == 2 else ""
    kind = _TYPES[raw.dtype.str[1:]]
    return (
        f'<DataArray type="{kind}" Name={quoteattr(name)}{components} format="binary">'
        f"{text}</DataArray>"
    )


def _document(kind: str, attributes: str, piece: str, body: Iterable[str]) -> bytes:
    lines = [
        '<?xml version="1.0"?>',
        f'<VTKFile type="{kind}" version="1.0" byte_order="LittleEndian" header_type="UInt64">',
        f"<{kind} {attributes}>".replace(" >", ">"),
        f"<Piece {piece}>",
        *body,
        "</Piece>",
        f"</{kind}>",
        "</VTKFile>",
        "",
    ]
    return "\n".join(lines).encode()
