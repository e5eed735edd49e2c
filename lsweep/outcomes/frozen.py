"""What the first worker of each device class froze: how all workers of that class compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lsweep.errors import LsweepError
from lsweep.plans.plan import Plan
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder

AUDIT_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 0.1, "bfloat16": 0.5, "float16": 0.5}
ACROSS_CLASSES = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
KEPT = (
    "device", "backend", "precision", "error", "tried", "batch_sizes", "threads", "versions",
    "samples", "centre", "batch_norm", "seconds_per_point", "derivatives",
)  # fmt: skip


def frozen(folder: RunFolder, damaged: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return device class -> what its file says; a file that cannot be read is noted.

    Args:
        folder: the run.
        damaged: gets name of a file -> what is wrong with it.
    """
    devices = {}
    for path in folder.all_devices():
        try:
            value = read_json(path)
        except LsweepError as e:
            damaged[path.name] = str(e)
            continue
        devices[str(value["class"])] = {k: value[k] for k in KEPT if k in value}
    return devices


def coarsest(plan: Plan, devices: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the least exact precision that was used: the plan's, or better than that."""
    asked = str(plan.evaluate["precision"])
    used = [str(d.get("precision", asked)) for d in devices.values()] or [asked]
    return max(used, key=ACROSS_CLASSES.__getitem__)
