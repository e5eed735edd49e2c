"""What is committed: all valid rows of all parts, by point and slice."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lsweep.folder import RunFolder
from lsweep.parts import Kind, Part, read_part
from lsweep.plan import Plan
from lsweep.rounds import Round, Rounds


@dataclass(frozen=True)
class Committed:
    """The parts of a run, and which points they hold.

    Attributes:
        parts: all parts, by name.
        done: (points, slices) bool, True where a valid row exists.
    """

    parts: list[Part]
    done: npt.NDArray[np.bool_]

    @classmethod
    def read(cls, folder: RunFolder, plan: Plan, rounds: Rounds) -> Committed:
        """Read every part; safe while workers write."""
        done = np.zeros((rounds.total, plan.slices), dtype=bool)
        parts = []
        for path in folder.all_parts():
            part = read_part(path, plan.digest, len(plan.variables))
            rows = part.rows[part.rows["kind"] == Kind.VALUE]
            # A number beyond the rounds that were read belongs to a round published meanwhile.
            rows = rows[(rows["point"] < rounds.total) & (rows["slice"] < plan.slices)]
            done[rows["point"].astype(np.int64), rows["slice"].astype(np.int64)] = True
            parts.append(part)
        return cls(parts, done)

    def missing(self, round_: Round, unit: int, slices: int) -> list[int]:
        """Return the point numbers of a unit that have no row yet."""
        points, slice_ = round_.unit(unit, slices)
        return [p for p in points if not self.done[p, slice_]]


def read_run(folder: RunFolder) -> tuple[Plan, Rounds, Committed]:
    """Read all that a run is: its plan, its rounds, and what is committed."""
    plan = Plan.read(folder)
    rounds = Rounds.read(folder, plan)
    return plan, rounds, Committed.read(folder, plan, rounds)
