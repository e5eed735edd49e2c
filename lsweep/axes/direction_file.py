"""The direction file: norms, cosines and fingerprints of the directions, for who looks at a run."""

from __future__ import annotations

import io
import math

import h5py
import numpy as np

from lsweep.axes.directions import Directions
from lsweep.plans.plan import Plan
from lsweep.storage.files import write_whole
from lsweep.storage.folder import RunFolder


def write_directions(folder: RunFolder, plan: Plan, directions: Directions) -> None:
    """Write norms and fingerprints of the directions; no arrays, for the recipe remakes them."""
    image = io.BytesIO()
    with h5py.File(image, "w", libver=("v110", "v110")) as f:
        f.attrs["plan"] = np.bytes_(plan.digest)
        f.create_dataset("gram", data=directions.gram, fletcher32=True)
        f.create_dataset("cosines", data=directions.cosines(), fletcher32=True)
        for axis, d in directions.axes.items():
            g = f.create_group(axis)
            g.attrs["norm"] = d.norm
            g.attrs["sha256"] = np.bytes_(plan.directions[axis]["sha256"])
            g.attrs["zero_filters"] = d.zero_filters
            names = sorted(d.tensors)
            norms = np.array(
                [math.sqrt(float(d.tensors[n].double().square().sum())) for n in names]
            )
            g.create_dataset("tensor_norms", data=norms, fletcher32=True)
            joined = np.array([n.encode() for n in names], dtype=None if names else "S1")
            g.create_dataset("tensor_names", data=joined, fletcher32=True)
    write_whole(folder.directions, image.getvalue())
