"""The role: how one worker takes part in a run; picks its shard and its device, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from lsweep.errors import LsweepError


@dataclass(frozen=True)
class Role:
    """How this worker takes part: worker ``index`` of ``of``, the ``local``-th on its node.

    Attributes:
        index: picks the shard of a round that it begins with.
        of: number of workers.
        local: picks its GPU.
        device: ``auto``, ``cpu``, ``cuda:1``, ….
        threads: torch threads; 0 leaves torch's own choice.
        claims: ``lease``; or ``static``, each worker its shard only, where metadata lies.
        beat: seconds between heartbeats.
        trust: import a factory that belongs to another user.
        job: the Slurm task around it, for status; "" outside Slurm.
        plan: digest of the plan that a live problem was made for; "" where the factory is called.
    """

    index: int = 0
    of: int = 1
    local: int = 0
    device: str = "auto"
    threads: int = 1
    claims: str = "lease"
    beat: float = 10.0
    trust: bool = False
    job: str = ""
    plan: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise LsweepError(f"--index {self.index}: must be from 0 to {self.of - 1} (--of)")
