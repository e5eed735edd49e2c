"""What a certificate says: its rows, its summary in words, and its file in the run, without torch.

"Invariant" is never said of what was not tested: the verdicts are exact, up to eps, approximate,
broken and untested.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEMA = 1
HOLDS = ("exact", "up to eps")
PASS = 1e-3  # of a picture's range: a smaller plane invariance defect is none


@dataclass(frozen=True)
class Tested:
    """One transform of one group of units, and whether the function survived it.

    Attributes:
        layer: between which modules.
        transform: what was done.
        units: how many units it may be done to one by one.
        tensors: all that it changes.
        verdict: ``exact``, ``up to eps``, ``approximate``, ``broken`` or ``untested``.
        factor: the finite factor with the largest error; None for an order or signs.
        error: max|Δf| / rms f there.
        error32: the same in float32, at factor 3.
        loss_error: |ΔL| / max(L, 1e-3).
        noise: the floor: the same forward in another order and other pieces.
        residual: of T1, 0 where the gradient is orthogonal to the orbit; None where there is none.
        precision: of all but ``error32``.
        note: the reason, where it is untested; how the error falls with eps.
    """

    layer: str
    transform: str
    units: int
    tensors: tuple[str, ...]
    verdict: str
    factor: float | None = None
    error: float | None = None
    error32: float | None = None
    loss_error: float | None = None
    noise: float | None = None
    residual: float | None = None
    precision: str = ""
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the function is the same, to rounding or to the eps of a normalisation."""
        return self.verdict in HOLDS


@dataclass(frozen=True)
class Defect:
    """How much a picture changes for an equivalent network: max|ΔL| / range over its grid.

    Attributes:
        transform: all certified groups of this kind at once.
        groups: how many groups.
        values: one for each random element of the group.
    """

    transform: str
    groups: int
    values: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest of its values."""
        return max(self.values)
