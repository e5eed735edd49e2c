"""What the first worker of each device class froze: how all workers of that class compute."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lsweep.errors import LsweepError
from lsweep.plans.plan import Plan
from lsweep.storage.files import read_json
from lsweep.storage.folder import RunFolder
from lsweep.storage.rows import Rows, device_code

AUDIT_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 0.1, "bfloat16": 0.5, "float16": 0.5}
ACROSS_CLASSES = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 5e-2}
KEPT = (
    "device", "backend", "precision", "error", "tried", "batch_sizes", "threads", "versions",
    "samples", "centre", "batch_norm", "seconds_per_point", "derivatives",
)  # fmt: skip
CHOSEN = ("backend", "precision", "batch_sizes")  # what bits depend on within a class
MEASURED = ("error", "speed")  # of it, against eager, as it was chosen


def as_header(known: Mapping[str, Any]) -> str:
    """Return what a part says of how its rows are computed, for `as_before`."""
    return json.dumps({k: known[k] for k in (*CHOSEN, *MEASURED) if k in known}, sort_keys=True)


def as_before(headers: Iterable[Mapping[str, str]], name: str) -> dict[str, Any] | None:
    """Return how a device class computed what is committed, `CHOSEN` and `MEASURED`.

    None where no part tells.

    A choice is made by timing: made again it may be another, and other bits beside the old ones.

    Args:
        headers: of the parts of a run.
        name: of the class.

    >>> known = {"backend": "fused", "precision": "float32", "batch_sizes": {"train": 8}}
    >>> known["error"] = 2e-7
    >>> as_before([{"device_class": "a", "chosen": as_header(known)}], "a") == known
    True
    """
    told = Counter(h["chosen"] for h in headers if h.get("device_class") == name and "chosen" in h)
    return json.loads(told.most_common(1)[0][0]) if told else None


def of_this_version(value: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return a device file with what older versions did not write: all was in the plan's precision.

    Args:
        value: the file.
        plan: its plan.
    """
    return {"precision": str(plan.evaluate["precision"]), **value}


def frozen(folder: RunFolder, plan: Plan, damaged: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return device class -> what its file says; a file that cannot be read is noted.

    Args:
        folder: the run.
        plan: its plan.
        damaged: gets name of a file -> what is wrong with it.
    """
    devices = {}
    for path in folder.all_devices():
        try:
            value = of_this_version(read_json(path), plan)
        except LsweepError as e:
            damaged[path.name] = str(e)
            continue
        devices[str(value["class"])] = {k: value[k] for k in KEPT if k in value}
    return devices


def coarsest(plan: Plan, devices: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the least exact precision that was used: the plan's, or better than that."""
    used = [str(d["precision"]) for d in devices.values()] or [str(plan.evaluate["precision"])]
    return max(used, key=across_classes)


def across_classes(precision: str) -> float:
    """Return how far apart two device classes may be; of a precision not known here, the most."""
    return ACROSS_CLASSES.get(precision, max(ACROSS_CLASSES.values()))


def audit_tolerances(
    plan: Plan, devices: Mapping[str, Mapping[str, Any]], rows: Rows
) -> npt.NDArray[np.float64]:
    """Return how far off each row's audit may be, by the precision of its device class.

    Args:
        plan: whose precision stands for a class whose file is not there.
        devices: as `frozen` returns them.
        rows: that are audited, shape (n,).
    """
    precisions = {device_code(name): str(d["precision"]) for name, d in devices.items()}
    asked, most = str(plan.evaluate["precision"]), max(AUDIT_TOLERANCE.values())
    used = [precisions.get(code, asked) for code in rows["device"].tolist()]
    return np.array([AUDIT_TOLERANCE.get(p, most) for p in used], dtype=np.float64)
