"""The network whose loss landscape is swept: edit this file.

`make` is called by every worker and must give the same network and data each time. As it stands it
trains a small classifier on two spirals once, saves it, and loads it from then on.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import lsweep


def make(checkpoint: str = "net.pt", hidden: int = 64) -> lsweep.Problem:
    """Return network, data, loss and metrics; arguments come from ``options`` in sweep.toml."""
    model = nn.Sequential(
        nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2)
    )
    data = {"train": spirals(400, seed=0), "test": spirals(400, seed=1)}

    # With a network of your own, keep the line after this block and delete the block.
    if not Path(checkpoint).exists():
        train(model, *data["train"])
        torch.save(model.state_dict(), checkpoint)

    # Reads plain state dicts and those of Lightning, timm, Hugging Face, DataParallel.
    model.load_state_dict(lsweep.load_state(checkpoint, model))

    return lsweep.Problem(
        model,
        # Tensors (x, y), a Dataset, a DataLoader with shuffle=False, or dicts; no augmentation.
        data=data,
        # Any loss: one of torch's, or f(output, target) -> one value per sample.
        loss=nn.CrossEntropyLoss(),
        metrics={"accuracy": lsweep.accuracy},
        # For anything else give, instead of loss and metrics,
        #   forward=lambda model, batch: {"loss": values_per_sample}
        # such as lsweep.causal_lm for a language model; grad=True if it needs autograd inside.
    )


def spirals(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n points (n, 2) on two spirals with noise, and which spiral each is on (n,)."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.arange(n) % 2
    turn = torch.rand(n, generator=generator).sqrt() * 3 * torch.pi
    angle = turn + arm * torch.pi
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * (turn / torch.pi)[:, None]
    return points + 0.1 * torch.randn(n, 2, generator=generator), arm


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Fit the network to all of (x, y) with Adam."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(500):
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        optimizer.step()
