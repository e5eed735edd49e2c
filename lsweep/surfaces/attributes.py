"""Attributes: what HDF5 keeps beside its arrays, as text of fixed length, and all of it digested.

HDF5's own B-trees and its heap of texts carry no checksum; what is written here is checked whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

TEXTS: tuple[str, ...] = ("long_name", "units", "split", "metric", "direction", "replicate")
TEXTS += ("norm", "samples", "estimator", "kind", "layers", "moved")
_UNHASHED = {"lsweep_sha256", "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "_Netcdf4Dimid"}


def as_text(value: str) -> np.bytes_:
    """Return text as it is stored: never empty, which HDF5 cannot hold, and of fixed length.

    >>> as_string(as_text("θ")), as_text("")
    ('θ', np.bytes_(b' '))
    """
    # Variable-length strings live in HDF5's global heap, which has no checksum.
    return np.bytes_(value.encode() or b" ")


def as_string(value: Any) -> str:
    """Return stored text as it was given."""
    return (value.decode() if isinstance(value, bytes) else str(value)).strip()


def write_attributes(dataset: h5py.Dataset, attributes: Mapping[str, str]) -> None:
    """Give a data set its attributes, in the order of their names."""
    for key, value in sorted(attributes.items()):
        dataset.attrs[key] = as_text(value)


def content_digest(f: h5py.File) -> str:
    """sha256 over every name, attribute and array: HDF5's own B-trees carry no checksum."""
    h = hashlib.sha256()

    def add(name: str, node: h5py.Group | h5py.Dataset) -> None:
        h.update(f"\0{name}\0".encode())
        for key in sorted(node.attrs):
            if key not in _UNHASHED:
                h.update(f"\0{key}\0{np.asarray(node.attrs[key]).tolist()!r}".encode())
        if isinstance(node, h5py.Dataset):
            h.update(f"{node.shape}{node.dtype.str}".encode())
            h.update(np.ascontiguousarray(node[()]).tobytes())
        else:
            for child in sorted(node):
                add(f"{name}/{child}", node[child])

    add("", f)
    return h.hexdigest()
