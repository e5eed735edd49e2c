"""What one trained network shows: every number comes out of a sweep of lsweep."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import lsweep
from lsweep.commands.cli import main
from lsweep.measures.convexity import nonconvex_fraction, plane_hessian_extremes
from lsweep.surfaces.surface import Surface

from .claims import DIRECTIONS, PLANE, RADIUS, SADDLE_STEP
from .training import Spec, problem, remade, save

FloatArray = npt.NDArray[np.float64]


def swept(
    of: lsweep.Problem, *grid: tuple[Any, ...], metrics: tuple[str, ...] = ("loss",), **more: Any
) -> Surface:
    """Sweep the training data in this process, by plain torch: what is timed is not the point."""
    quiet: dict[str, Any] = {"device": "cpu", "backend": "eager", "progress": False}
    return lsweep.sweep(of, *grid, metrics=list(metrics), splits=["train"], **(quiet | more))


def plane(of: lsweep.Problem, seed: int, count: int = PLANE) -> dict[str, Any]:
    """Return the non-convex fraction of one plane, with its values."""
    axis = (-1, 1, count)
    surface = swept(of, axis, axis, directions={"seed": seed})
    return {"nc10": nonconvex_fraction(surface), "plane": surface["train_loss"].tolist()}


def planes(
    of: lsweep.Problem,
    radius: float,
    normalize: str = "filter",
    count: int = DIRECTIONS,
    metric: str = "loss",
    precision: str = "float32",
) -> FloatArray:
    """Return (count, 3, 3) values of planes of offsets -r, 0, r, each of its own two directions."""
    axis = (-radius, radius, 3)
    recipes = {"seed": 100, "normalize": normalize, "z": {"kind": "replicate"}}
    surface = swept(
        of, axis, axis, (0, count - 1, count),
        metrics=(metric,), directions=recipes, precision=precision,
    )  # fmt: skip
    return surface[f"train_{metric}"]


def rises(values: FloatArray) -> FloatArray:
    """Return (planes, 2): the rise from the centre, averaged over both ends of each direction.

    >>> rises(np.array([[[9, 1, 9], [2, 0, 4], [9, 3, 9]]], float))
    array([[3., 2.]])
    """
    center = values[:, 1, 1]
    x = (values[:, 1, 0] + values[:, 1, 2]) / 2 - center
    y = (values[:, 0, 1] + values[:, 2, 1]) / 2 - center
    return np.stack([x, y], axis=1)


def average(values: FloatArray, name: str) -> dict[str, float]:
    """Return the mean rise, its standard error over directions and the variation over planes."""
    each = rises(values)
    of_planes = each.mean(axis=1)
    spread = {f"{name}_se": 0.0, f"{name}_cv": 0.0}
    if len(each) > 1:
        spread = {
            f"{name}_se": float(each.std(ddof=1) / np.sqrt(each.size)),
            f"{name}_cv": float(of_planes.std(ddof=1) / abs(of_planes.mean())),
        }
    return {name: float(each.mean()), **spread}


def sharpness(of: lsweep.Problem, normalize: str = "filter", radius: float = RADIUS,
              count: int = DIRECTIONS) -> dict[str, float]:  # fmt: skip
    """Return ``rise`` (or ``rise_layer``, ``rise_at_1``) with standard error and variation."""
    name = "rise" if normalize == "filter" else f"rise_{normalize}"
    name += "" if radius == RADIUS else f"_at_{radius:g}"
    return average(planes(of, radius, normalize, count), name)


def error_rise(of: lsweep.Problem, radius: float, count: int) -> dict[str, float]:
    """Return how many points the training error rises: comparable where losses are not."""
    fall = average(planes(of, radius, count=count, metric="accuracy"), "error_rise")
    return fall | {"error_rise": -fall["error_rise"]}


def smallest_curvatures(values: FloatArray, step: float) -> FloatArray:
    """Return the smaller curvature at the centre of each plane of 3 x 3 values."""
    offsets = np.array([-step, 0.0, step])
    return np.array([plane_hessian_extremes(z, offsets, offsets)[0].item() for z in values])


def saddle(of: lsweep.Problem, count: int = DIRECTIONS) -> dict[str, Any]:
    """Return how many of ten random planes curve downwards at the centre."""
    values = planes(of, SADDLE_STEP, count=count, precision="float64")
    low = smallest_curvatures(values, SADDLE_STEP)
    return {"planes": count, "planes_negative": int((low < 0).sum())}


def curvatures(of: lsweep.Problem, count: int = 2 * DIRECTIONS) -> dict[str, Any]:
    """Return how many random filter-normalised directions have dᵀHd < 0, by exact products.

    A Rademacher probe vᵀDHDv of the trace in the filter metric is that: each filter of Dv is as
    long as that of the weights.
    """
    recipe = {"kind": "replicate"}
    surface = swept(of, (0, count - 1, count), metrics=("filter_hessian_trace",), directions=recipe)
    values = surface["train_filter_hessian_trace"]
    return {"directions": count, "directions_negative": int((values < 0).sum())}


def weight_norm(network: nn.Module) -> float:
    """Return ‖θ‖ over what a filter-normalised direction moves: tensors of two dimensions."""
    squares = (p.detach().double().square().sum() for p in network.parameters() if p.dim() > 1)
    return float(sum(s.item() for s in squares) ** 0.5)


def interpolation(spec: Spec, start: nn.Module, end: nn.Module, count: int) -> dict[str, Any]:
    """Return both widths on the line from ``start`` (at 0) to ``end`` (at 1)."""
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "end.pt"
        save(end, other)
        line = swept(
            problem(spec, start), (-0.5, 1.5, count),
            directions={"kind": "to", "checkpoint": str(other)},
        )  # fmt: skip
    values = line["train_loss"]
    return {
        "width_start": width(line.x, values, 0.0),
        "width_end": width(line.x, values, 1.0),
        "line": values.tolist(),
    }


def width(x: FloatArray, values: FloatArray, at: float, rise: float = 0.5) -> float:
    """Return the length of the interval around ``at``, within ± 0.5, where L < L(at) + rise.

    Its ends are interpolated linearly between points.

    >>> x = np.linspace(-0.5, 1.5, 9)
    >>> width(x, 4 * abs(x), 0.0)
    0.25
    """
    center = int(np.argmin(np.abs(x - at)))
    level, total = values[center] + rise, 0.0
    for direction in (-1, 1):
        k = center
        while 0 <= k + direction < len(x) and abs(x[k] - at) < 0.5 - 1e-9:
            inner, outer = values[k], values[k + direction]
            length = abs(x[k + direction] - x[k])
            if not outer < level:
                total += length * (level - inner) / (outer - inner) if np.isfinite(outer) else 0
                break
            total += length
            k += direction
    return float(total)


def rescaled(network: nn.Module, rebuilt: nn.Module, seed: int) -> nn.Module:
    """Return an equivalent plain network: filters before batch norm scaled by 2^u, u in [-2, 2].

    What a batch norm reads is scaled with its running statistics, so that it is undone there.
    """
    random = torch.Generator().manual_seed(seed)
    rebuilt.load_state_dict(network.state_dict())
    feeding: nn.Linear | None = None
    with torch.no_grad():
        for module in rebuilt.modules():
            if isinstance(module, nn.Linear):
                feeding = module
            elif isinstance(module, nn.BatchNorm1d) and feeding is not None:
                scale = 2.0 ** (4 * torch.rand(len(feeding.weight), generator=random) - 2)
                feeding.weight.mul_(scale[:, None])
                if feeding.bias is not None:
                    feeding.bias.mul_(scale)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.mul_(scale)
                module.running_var.mul_(scale**2)
    return rebuilt.eval()


def equivalence(one: lsweep.Problem, other: lsweep.Problem, count: int) -> dict[str, Any]:
    """Return, for each normalisation, how far the same line differs between equivalent networks."""
    defects: dict[str, Any] = {}
    for normalize in ("filter", "layer"):
        recipe = {"seed": 0, "normalize": normalize}
        a, b = (
            swept(of, (-0.5, 0.5, count), directions=recipe)["train_loss"] for of in (one, other)
        )
        defects[f"defect_{normalize}"] = float(np.abs(a - b).max() / np.ptp(a))
    return defects


def explained(of: lsweep.Problem, checkpoints: list[Path]) -> dict[str, float]:
    """Return the share of two principal components of a trajectory, and lsweep's null beside it."""
    axis = ("auto", 3)
    recipe = {"kind": "pca", "checkpoints": [str(c) for c in checkpoints]}
    surface = swept(of, axis, axis, directions=recipe)
    facts = surface.provenance["plan"]["facts"]["axes"]
    return {
        "share": sum(facts[a]["explained"] for a in ("x", "y")),
        "null": sum(facts[a]["random_walk_null"] for a in ("x", "y")),
    }


def extremes(of: lsweep.Problem, samples: int | None = None) -> dict[str, float]:
    """Return λmax and λmin at the centre, raw and in the filter metric, with the larger residual.

    From two start vectors: Lanczos finds extreme eigenvalues from inside, so the outer one counts.
    """
    metrics = ("hessian_extremes", "filter_hessian_extremes")
    more = {} if samples is None else {"samples": samples}
    surface = swept(of, (0, 1, 2), metrics=metrics, directions={"kind": "replicate"}, **more)
    out: dict[str, float] = {}
    for metric in ("hessian", "filter_hessian"):
        for end, outer in (("max", np.argmax), ("min", np.argmin)):
            values = surface[f"train_{metric}_{end}"]
            k = int(outer(values))
            out[f"{metric}_{end}"] = float(values[k])
            residual = float(surface[f"train_{metric}_{end}_residual"][k])
            out["residual"] = max(out.get("residual", 0.0), residual)
    return out


def hessian_plane(of: lsweep.Problem) -> dict[str, float]:
    """Return the smaller curvature at the centre of the plane that the Hessian spans.

    Per unit of weight, so that it can be compared with λmin.
    """
    axis = (-SADDLE_STEP, SADDLE_STEP, 3)
    surface = swept(of, axis, axis, directions={"kind": "hessian"}, precision="float64")
    low = smallest_curvatures(surface["train_loss"][None], SADDLE_STEP)
    norm = float(surface.attributes["y"]["norm"])
    return {"hessian_plane_curvature": float(low[0]) / norm**2}


def certificate(spec: Spec, network: nn.Module, samples: int) -> dict[str, Any]:
    """Return what `lsweep invariance` says: which rescalings the directions follow, the defect."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, sweep = Path(scratch) / "net.pt", Path(scratch) / "sweep.toml"
        save(network, checkpoint)
        options = {"checkpoint": str(checkpoint), "spec": json.dumps(dataclasses.asdict(spec))}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in options.items())
        axis = "{ range = [-1, 1], count = 5 }"
        sweep.write_text(
            f'[problem]\nfactory = "{remade.__module__}:{remade.__name__}"\n'
            f"options = {{ {table} }}\n[grid]\nx = {axis}\ny = {axis}\n"
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            code = main(["invariance", str(sweep), "--json", f"--samples={samples}"])
        if code:
            raise RuntimeError(f"lsweep invariance: {code}")
    found = json.loads(printed.getvalue())
    return {"summary": found["summary"], "words": found["words"], "defect": found["defect"]}
