"""What a machine could do at most: its measured peak, and the ratio that all of it would give.

The limit of a row against a peer is the peer's seconds over those that the network's own
arithmetic takes at the peak. Winograd convolutions need up to four times less arithmetic, so they
may pass 100 % and the limit; what is no product (softmax, normalisation, activations) counts as
nothing, so everything else stays below.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import peers
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lsweep.hosts.device import synchronize

REPEATS = 8
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}  # others are float32


@dataclass
class Ceiling:
    """What arithmetic a point takes, and how fast that could be done here.

    Args:
        flop: floating-point operations of a point.
        peaks: precision -> FLOP a second.
    """

    flop: float
    peaks: dict[str, float]

    def least(self, precision: str) -> float:
        """Return the seconds that a point takes at the peak."""
        return self.flop / self.peaks[precision]

    def look(self, device: torch.device, clock: Callable[[], float]) -> None:
        """Measure the peaks once more: the best ones count."""
        for precision, before in self.peaks.items():
            self.peaks[precision] = max(before, peak(device, precision, clock))

    def __str__(self) -> str:
        rates = (f"{rate / 1e9:.3g} GFLOP/s in {p}" for p, rate in self.peaks.items())
        return (
            f"{self.flop / 1e9:.3g} GFLOP a point; a large matrix product reaches "
            f"{', '.join(rates)}; Winograd convolutions need less arithmetic and may pass 100 %"
        )


def ceiling(case: peers.Case, precisions: Iterable[str], clock: Callable[[], float]) -> Ceiling:
    """Return the ceiling of a case in some precisions."""
    found = Ceiling(flop(case), dict.fromkeys(precisions, 0.0))
    found.look(case.device, clock)
    return found


def flop(case: peers.Case) -> float:
    """Return the floating-point operations of a point: products and sums of the network's layers.

    Attention is counted as the plain products that it is: torch's counter knows no fused one of a
    CPU.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        case.network(case.x[:1])
    return float(counter.get_total_flops() * len(case.y))


def peak(device: torch.device, precision: str, clock: Callable[[], float]) -> float:
    """Return the FLOP a second of a large matrix product, by the faster of two libraries.

    Args:
        device: where; on a CPU with the threads that torch has now.
        precision: of the factors.
        clock: returns seconds.
    """
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES.get(precision, torch.float32))
    ways: list[Callable[[], object]] = [lambda: F.linear(a, b)]
    if device.type == "cpu" and precision in ("float32", "bfloat16"):
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    fastest = float("inf")
    for _ in range(REPEATS):
        for way in ways:
            synchronize(device)
            start = clock()
            way()
            synchronize(device)
            fastest = min(fastest, clock() - start)
        time.sleep(0.01)  # so that one disturbance does not meet all
    torch.set_float32_matmul_precision(before)
    return 2 * n**3 / fastest
