"""evaluate, directions, reference: surfaces of the reference implementation, computed anew.

Promise: with its own direction files, lsweep gives the numbers of tomgoldstein/loss-landscape to
2e-5 relative in loss, exactly in accuracy, and NaN exactly where it has NaN; and the line to a
checkpoint that lsweep makes itself is the line that the reference implementation stored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import problems  # noqa: F401  (one thread)
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import lsweep
from lsweep.axes.vectors import Origin
from lsweep.surfaces.reference import read_reference_directions, read_reference_surface
from lsweep.surfaces.surface import Status

ORACLE = Path(__file__).parent / "oracle"


def digits() -> lsweep.Problem:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    net.load_state_dict(torch.load(ORACLE / "net_a.pt", weights_only=True))
    data = load_digits()
    x = torch.from_numpy(data.images[:1200, None] / 16).float()
    return lsweep.Problem(
        net,
        {"train": (x, torch.from_numpy(data.target[:1200]))},
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lsweep.accuracy},
    )


CASES = [
    ("filter_2d", {}),  # the method of the paper
    ("layer_2d", {}),  # its two alternatives
    ("weight_2d", {}),
    ("filter_1d", {}),  # one axis: no y in either file
    ("states_interp_1d", {}),  # buffers move: beyond the ends a variance is negative, the loss NaN
    # the same line from the checkpoint itself: the recipe must move batch-norm statistics as well
    ("states_interp_1d", {"kind": "to", "checkpoint": str(ORACLE / "net_b.pt")}),
    ("weights_plane_2d", {}),  # parameters move, buffers stay: a file of 9 tensors, not of 15
]


@pytest.mark.parametrize(
    ("name", "recipe"), CASES, ids=[f"{n}-{r.get('kind', 'file')}" for n, r in CASES]
)
def test_surface_is_that_of_the_reference_implementation(name, recipe):
    wanted = read_reference_surface(ORACLE / f"{name}.surface.h5")
    recipe = recipe or {"kind": "file", "file": str(ORACLE / f"{name}.directions.h5")}
    grid = {a: (round(c[0], 6), round(c[-1], 6), len(c)) for a, c in wanted.axes.items()}
    found = lsweep.sweep(digits(), **grid, directions=recipe)
    for axis, there in wanted.axes.items():
        assert np.allclose(found.axes[axis], there, rtol=0, atol=1e-12)
    loss, there = found["train_loss"], wanted["train_loss"]
    assert np.array_equal(np.isnan(loss), np.isnan(there))
    assert np.array_equal(found.status == Status.NONFINITE, np.isnan(there))
    np.testing.assert_allclose(loss, there, rtol=2e-5)
    ok = np.isfinite(there)
    np.testing.assert_array_equal(found["train_accuracy"][ok], wanted["train_accuracy"][ok])


def test_states_interpolation_has_numbers_and_nan():
    """The case above would prove little if the oracle had no NaN, or nothing else."""
    nan = np.isnan(read_reference_surface(ORACLE / "states_interp_1d.surface.h5")["train_loss"])
    assert 0 < nan.sum() < nan.size


def test_stored_filter_direction_has_the_norms_of_the_filters():
    """The same rule on both sides: stored filters are as long as the network's, the rest is 0."""
    origin = Origin.of(digits().model)
    stored = read_reference_directions(ORACLE / "filter_2d.directions.h5")["x"]
    for (name, w), d in zip(origin.parameters.items(), stored, strict=True):
        if w.dim() <= 1:
            assert not d.any(), name
        else:
            norms = w.flatten(1).norm(dim=1).numpy()
            np.testing.assert_allclose(
                np.linalg.norm(d.reshape(len(d), -1), axis=1), norms, rtol=1e-5, err_msg=name
            )
