"""A sweep so small that it takes milliseconds, as files; commands in this process; what is on disk.

`SWEEP` has every key whose value a test may want to be wrong.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lsweep.commands.cli import main

torch.set_num_threads(1)  # threads wait for each other where other tests run beside these

PROBLEM = """\
import torch
from torch import nn

import lsweep


def make(width=3, checkpoint=None):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 2, generator=generator), torch.arange(8) % 2
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    if checkpoint:
        model.load_state_dict(lsweep.load_state(checkpoint))
    data = {"train": (x, y), "test": (x[:4] + 1, y[:4])}
    metrics = {"accuracy": lsweep.accuracy}
    return lsweep.Problem(model, data, loss=nn.CrossEntropyLoss(), metrics=metrics)
"""

SWEEP = """\
[problem]
factory = "problem.py:make"
options = { width = 3 }

[grid.x]
range = [-1.0, 1.0]
count = 3

[directions]
kind = "random"
seed = 0
normalize = "filter"

[evaluate]
metrics = ["loss", "accuracy"]
splits = ["train", "test"]
batch_norm = "eval"
precision = "float32"
slices = 1
"""


def write_sweep(folder: Path, sweep: str = SWEEP, problem: str = PROBLEM) -> Path:
    """Write problem.py and sweep.toml in ``folder`` and return the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problem.py").write_text(problem)
    toml = folder / "sweep.toml"
    toml.write_text(sweep)
    return toml


def toward(checkpoint: object) -> list[str]:
    """Return the arguments that make x the direction to a checkpoint."""
    table = {"kind": "to", "checkpoint": checkpoint, "normalize": "none"}
    return [word for k, v in table.items() for word in ("--set", f"directions.{k}={v}")]


def lsweep(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    try:
        return main([str(a) for a in arguments])
    except SystemExit as e:  # argparse's own
        assert isinstance(e.code, int)
        return e.code


def contents(folder: Path) -> dict[str, str]:
    """Return every path below ``folder`` with the sha256 of what it holds."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else "a folder"
        for p in sorted(folder.rglob("*"))
    }
