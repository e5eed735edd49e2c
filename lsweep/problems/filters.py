"""Filters: which weights belong to one output unit, and directions scaled filter by filter.

H. Li, Z. Xu, G. Taylor, C. Studer, T. Goldstein, *Visualizing the Loss Landscape of Neural Nets*,
NeurIPS 2018, section 4: d_{i,j} <- d_{i,j} / ||d_{i,j}|| · ||θ_{i,j}|| for filter j of layer i.
"""

from __future__ import annotations

from torch import Tensor, nn

EPSILON = 1e-10
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """True for a normalisation module, torch's own or one that is named as such.

    >>> is_norm(nn.BatchNorm1d(2)), is_norm(nn.Linear(1, 1))
    (True, False)
    """
    return isinstance(module, _NORMS) or type(module).__name__.endswith(
        ("Norm", "Norm1d", "Norm2d", "Norm3d")
    )


def filter_rows(weight: Tensor, module: nn.Module | None) -> Tensor:
    """Return ``weight`` as (filters, numbers per filter): row j is all that enters output unit j.

    Output units lie along dimension 0, except ConvTranspose (dimension 1 per group; stored
    ``[in, out/groups, ...]``) and Hugging Face's ``Conv1D`` (dimension 1; stored ``[in, out]``). An
    embedding's units are its rows; fused projections and recurrent gates are rows of dimension 0
    as well. A tensor of at most one dimension is one filter. May be a copy: use `scale_rows`.

    >>> import torch
    >>> filter_rows(torch.zeros(3, 4, 5, 5), nn.Conv2d(4, 3, 5)).shape
    torch.Size([3, 100])
    >>> filter_rows(torch.zeros(4, 3, 5, 5), nn.ConvTranspose2d(4, 6, 5, groups=2)).shape
    torch.Size([6, 50])
    """
    if weight.dim() <= 1:
        return weight.reshape(1, -1)
    if isinstance(module, _TRANSPOSED):
        groups = module.groups
        split = weight.reshape(groups, -1, *weight.shape[1:])  # [g, in/g, out/g, k...]
        return split.transpose(1, 2).flatten(0, 1).flatten(1)
    if type(module).__name__ == "Conv1D" and weight.dim() == 2:
        return weight.t()
    return weight.reshape(weight.shape[0], -1)


def filter_dim(weight: Tensor, module: nn.Module | None) -> int:
    """Return the dimension along which output units lie, a group of a ConvTranspose aside.

    >>> import torch
    >>> filter_dim(torch.zeros(4, 3, 5, 5), nn.ConvTranspose2d(4, 3, 5))
    1
    """
    swapped = isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D"
    return 1 if swapped and weight.dim() > 1 else 0


def scale_rows(direction: Tensor, factors: Tensor, module: nn.Module | None) -> Tensor:
    """Return ``direction`` with filter j multiplied by ``factors[j]``, in the shape it came in."""
    if direction.dim() <= 1:
        return direction * factors[0]
    shape = [1] * direction.dim()
    if isinstance(module, _TRANSPOSED):
        groups = module.groups
        split = direction.reshape(groups, -1, *direction.shape[1:])
        f = factors.reshape([groups, 1, direction.shape[1], *shape[2:]])
        return (split * f).flatten(0, 1)
    dim = 1 if type(module).__name__ == "Conv1D" and direction.dim() == 2 else 0
    shape[dim] = -1
    return direction * factors.reshape(shape)


def filter_normalize(direction: Tensor, weight: Tensor, module: nn.Module | None) -> Tensor:
    """Return ``direction`` with filters as long as the network's: d_f · ||w_f|| / (||d_f|| + ε).

    Six numbers by hand, for a layer ``Linear(2, 3)``. Its three filters are the three rows: all
    that enters output 1 is (3, 4), of norm 5; output 2 is (0, 1), of norm 1; output 3 is (0, 0).

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]])
    >>> d = torch.tensor([[1.0, 0.0], [3.0, 4.0], [6.0, 8.0]])

    The rows of d have norms 1, 5 and 10, so they are multiplied by 5/1, 1/5 and 0/10:

    >>> filter_normalize(d, weight, layer)
    tensor([[5.0000, 0.0000],
            [0.6000, 0.8000],
            [0.0000, 0.0000]])

    Each row keeps its direction and takes the norm of the weights: 5, 1 and 0. A filter of norm
    zero cannot move; such filters are counted and reported. On the line θ + x·d, x = 1 therefore
    means "as far as the filter is long", for small and large filters alike.

    Args:
        direction: same shape as ``weight``.
        weight: the trained weights.
        module: the module that owns it, which tells which dimension is the output.
    """
    norms = filter_rows(weight.double(), module).norm(dim=1)
    lengths = filter_rows(direction.double(), module).norm(dim=1)
    # The factor is rounded to the weights' precision, so that the last bits of a sum, which differ
    # between machines, do not reach the direction.
    return scale_rows(direction, (norms / (lengths + EPSILON)).to(direction.dtype), module)


def normalize(rule: str, direction: Tensor, weight: Tensor, module: nn.Module | None) -> Tensor:
    """Apply one of the paper's rules to one tensor: filter, layer, weight (elementwise), none.

    >>> import torch
    >>> normalize("layer", torch.tensor([2.0]), torch.tensor([3.0]), None)
    tensor([3.])
    """
    if rule == "filter":
        return filter_normalize(direction, weight, module)
    scaled: Tensor = direction
    if rule == "layer":
        length = direction.double().norm()
        scaled = direction * (weight.double().norm() / (length + EPSILON)).to(direction.dtype)
    elif rule == "weight":
        scaled = direction * weight
    return scaled


def count_zero_filters(weight: Tensor, module: nn.Module | None) -> int:
    """Return how many filters have norm zero and so cannot move.

    >>> import torch
    >>> count_zero_filters(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), nn.Linear(2, 2))
    1
    """
    return int((filter_rows(weight.double(), module).norm(dim=1) == 0).sum())
