"""The limits of a Slurm site: how large an array may be, which partitions there are, for how long.

Slurm takes some requests that can never start; what is wrong with them is said here beforehand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lsweep.errors import LsweepError, nearest
from lsweep.slurm.tasks import ask, require_controller


def minutes(text: str) -> float | None:
    """Return a time limit as Slurm writes it in minutes, or None where there is no limit.

    >>> [minutes(t) for t in ("90", "10:30", "1:00:00", "1-00:00:00", "2-12", "UNLIMITED")]
    [90.0, 10.5, 60.0, 1440.0, 3600.0, None]

    Raises:
        LsweepError: it is no time limit.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE", "-1"):
        return None
    days, dash, clock = text.rpartition("-")
    try:
        fields = [int(f) for f in clock.split(":")]
        if not dash and len(fields) < 3:
            fields = [0, *fields]  # without days, hours are there only before two colons
        h, m, s, *_ = [*fields, 0, 0]
        return int(days or 0) * 1440 + h * 60 + m + s / 60
    except ValueError:
        raise LsweepError(f"{text!r} is no time limit: minutes, H:M:S or days-hours") from None


@dataclass(frozen=True)
class Partition:
    """A partition's limits; None where there is none.

    Attributes:
        name: of the partition.
        state: ``UP``, or why nothing starts in it.
        longest: minutes that a job may take at most.
        usual: minutes that it gets when it does not say.
        is_default: where jobs go that name no partition.
    """

    name: str
    state: str
    longest: float | None
    usual: float | None
    is_default: bool


@dataclass(frozen=True)
class Site:
    """What limits a submission here.

    Attributes:
        array: how many tasks an array may have.
        partitions: by name.
    """

    array: int
    partitions: dict[str, Partition]

    @classmethod
    def read(cls) -> Site:
        """Ask the controller.

        Raises:
            LsweepError: it does not answer.
        """
        require_controller()
        return cls.parse(ask("scontrol", "show", "config"), ask("scontrol", "show", "part", "-o"))

    @classmethod
    def parse(cls, config: str, partitions: str) -> Site:
        """Read what scontrol prints.

        >>> Site.parse("MaxArraySize            = 1001", "PartitionName=a MaxTime=1:00:00").array
        1000
        """
        size = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
        found = {}
        for line in partitions.splitlines():
            facts = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
            longest = minutes(facts.get("MaxTime", "UNLIMITED"))
            usual = minutes(facts.get("DefaultTime", "NONE"))
            name = facts["PartitionName"]
            found[name] = Partition(
                name, facts.get("State", "UP"), longest, usual, facts.get("Default") == "YES"
            )
        return cls(int(size[1]) - 1 if size else 1000, found)

    def chosen(self, names: str | None) -> list[Partition]:
        """Return the partitions of a submission: those that it names, or the default.

        Raises:
            LsweepError: one does not exist, or none is named and there is no default.
        """
        if not names:
            found = [p for p in self.partitions.values() if p.is_default]
            if not found:
                listed = ", ".join(self.partitions)
                raise LsweepError(f"no default partition here: say --partition, one of {listed}")
            return found
        for name in names.split(","):
            if name not in self.partitions:
                raise LsweepError(f"no partition {name!r} here{nearest(name, self.partitions)}")
        return [self.partitions[name] for name in names.split(",")]


def require_time(partitions: list[Partition], wanted: float | None) -> None:
    """Refuse a time that none of the partitions allows: its tasks would wait for ever.

    Raises:
        LsweepError: naming the limit.
    """
    limits = [p.longest for p in partitions]
    if wanted is None or None in limits or any(wanted <= m for m in limits if m is not None):
        return
    longest = max((m, p.name) for m, p in zip(limits, partitions, strict=True) if m is not None)
    raise LsweepError(
        f"--time {wanted:g}: partition {longest[1]!r} allows at most {longest[0]:g} minutes"
    )
