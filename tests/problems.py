"""Small problems with known answers, for a live sweep and, through `factory_file`, for workers.

All are made of fixed numbers: a factory that is called twice makes the same problem twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lsweep

torch.set_num_threads(1)  # small tensors: threads only cost, and the machine is shared
HERE = Path(__file__).parent


def factory_file(folder: Path, name: str) -> str:
    """Write problem.py into ``folder``; its factory makes the problem ``name`` of this module."""
    code = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom problems import {name} as make\n"
    (folder / "problem.py").write_text(code)
    return "problem.py:make"


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """N(0, 1) numbers that no global generator has part in."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def labels(n: int, classes: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, (n, *shape)))


def fixed(model: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """Give a network weights that do not depend on the generator or the order of construction."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_((scale * numbers(*p.shape, seed=1000 * seed + i)).to(p.dtype))
    return model


# -- problems ----------------------------------------------------------------------------------


def signed_square(output: Tensor, target: Tensor) -> Tensor:
    """½ s·f² per sample: over f = a·θ its mean is ½ θᵀHθ with H = mean of s a aᵀ."""
    return 0.5 * target * output.squeeze(1) ** 2


def quadratic(samples: int = 9, parameters: int = 6) -> lsweep.Problem:
    """Loss ½ θᵀHθ, exactly, with an H of both signs: `hessian_of`."""
    a, s = numbers(samples, parameters, seed=3), numbers(samples, seed=4) + 0.5
    model = fixed(nn.Linear(parameters, 1, bias=False).double(), seed=5)
    return lsweep.Problem(model, {"train": (a, s)}, loss=signed_square)


def hessian_of(problem: lsweep.Problem) -> np.ndarray:
    a, s = (t.numpy() for t in problem.data["train"])
    return (a * s[:, None]).T @ a / len(a)


def classifier(samples: int = 40, classes: int = 3) -> lsweep.Problem:
    """A two-layer tanh classifier on 4 inputs, in float64."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    data = (numbers(samples, 4, seed=1), labels(samples, classes))
    test = (numbers(samples // 2, 4, seed=6), labels(samples // 2, classes, seed=7))
    return lsweep.Problem(
        fixed(model),
        {"train": data, "test": test},
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lsweep.accuracy},
    )


def normalized(samples: int = 30) -> lsweep.Problem:
    """A classifier with batch normalisation whose statistics were never fitted."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3)
    ).double()
    fixed(model)
    for i in (1, 4):
        model[i].running_mean.copy_(0.2 * numbers(len(model[i].running_mean), seed=20 + i))
        model[i].running_var.copy_(1 + 0.3 * numbers(len(model[i].running_var), seed=30 + i).abs())
        model[i].num_batches_tracked.fill_(7)
    data = (numbers(samples, 4, seed=1), labels(samples, 3))
    test = (numbers(14, 4, seed=2) + 0.5, labels(14, 3, seed=9))
    return lsweep.Problem(model, {"train": data, "test": test}, loss=nn.CrossEntropyLoss())


# -- two routes --------------------------------------------------------------------------------


def another(model: nn.Module, seed: int = 77, scale: float = 0.3) -> dict[str, Tensor]:
    """The state of a network not far from ``model``; its buffers are the same."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    order = {id(p): seed + i for i, p in enumerate(model.parameters())}  # tied weights stay tied
    for name, p in model.named_parameters(remove_duplicate=False):
        state[name] = p.detach() + (scale * numbers(*p.shape, seed=order[id(p)])).to(p.dtype)
    return state


def toward(model: nn.Module, path: Path, seed: int = 77) -> dict[str, Any]:
    """Save another state of ``model``; return the recipe that reaches it at offset 1."""
    torch.save(another(model, seed), path)
    return {"kind": "to", "checkpoint": str(path)}


def at(model: nn.Module, *moves: tuple[float, Mapping[str, Tensor]]) -> nn.Module:
    """A float64 copy of ``model`` in eval mode at θ + Σ offset·(state - θ), moved by hand."""
    moved = copy.deepcopy(model).double().eval()
    origin = {n: t.double() for n, t in model.state_dict().items() if t.is_floating_point()}
    state = dict(moved.state_dict())
    for n, t in origin.items():
        state[n] = t + sum(offset * (other[n].double() - t) for offset, other in moves)
    moved.load_state_dict(state)
    return moved


def mean(value: Callable[..., Any], *args: Any) -> float:
    with torch.no_grad():
        return float(value(*args))
