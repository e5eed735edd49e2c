"""Submissions: what was handed to Slurm and with which options, remembered in the run.

Each is one published file; the newest one's options serve the next submission that does not say.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from lsweep.errors import LsweepError
from lsweep.storage.files import publish, readable, sealed
from lsweep.storage.folder import RunFolder


@dataclass(frozen=True)
class Options:
    """How a run is submitted; 0, "" and () leave it to the site.

    Attributes:
        tasks: tasks of the array.
        partition: one, or several with commas.
        gpus_per_task: GPUs of each process.
        time: minutes.
        array_parallelism: how many tasks may run at once.
        ranks: processes of an array task.
        cpus_per_task: CPUs of each process.
        setup: shell lines before the work, such as ``module load cuda``.
        wrap: words before the Python, such as ``apptainer exec --nv x.sif``.
        sbatch: options of sbatch, as typed.
        device: for every worker.
        threads: torch threads of each.
        claims: ``lease`` or ``static``.
    """

    tasks: int = 0
    partition: str = ""
    gpus_per_task: int = 0
    time: int = 0
    array_parallelism: int = 0
    ranks: int = 1
    cpus_per_task: int = 0
    setup: tuple[str, ...] = ()
    wrap: str = ""
    sbatch: tuple[str, ...] = ()
    device: str = "auto"
    threads: int = 1
    claims: str = "lease"

    def changed(self, given: dict[str, Any]) -> Options:
        """Return these options with those that were given, None being not given.

        >>> Options(tasks=4, time=60).changed({"time": 30, "tasks": None})
        Options(tasks=4, ..., time=30, ...)
        """
        names = {f.name for f in dataclasses.fields(self)}
        new = {k: v for k, v in given.items() if k in names and v is not None}
        new |= {k: tuple(w for w in new[k] if w) for k in ("setup", "sbatch") if k in new}
        return dataclasses.replace(self, **new)


@dataclass(frozen=True)
class Submission:
    """One array and the merge after it.

    Attributes:
        number: 0, 1, ….
        options: as they were asked for.
        array: the job's id.
        count: how many tasks it has, which may be fewer than were asked for.
        merge: the merge's job id, or "" when it was refused.
        logs: name of the folder of logs.
        when: seconds since 1970.
    """

    number: int
    options: Options
    array: str
    count: int
    merge: str
    logs: str
    when: float

    @property
    def tasks(self) -> list[str]:
        """The tasks' ids, as Slurm writes them; an array of one is a plain job."""
        return [self.array] if self.count == 1 else [f"{self.array}_{i}" for i in range(self.count)]

    @classmethod
    def all(cls, folder: RunFolder) -> list[Submission]:
        """Return the submissions of a run, oldest first; unreadable ones are passed over."""
        found = []
        for value in readable(folder.all_submissions()):
            try:
                options = Options().changed(value["options"])
                fields = {f.name: value[f.name] for f in dataclasses.fields(cls)}
                found.append(cls(**{**fields, "options": options}))
            except (KeyError, TypeError):
                continue
        return sorted(found, key=lambda s: s.number)


def remember(
    folder: RunFolder, plan: str, options: Options, array: str, count: int, merge: str, logs: str
) -> Submission:
    """Publish a submission under the next free number.

    Raises:
        LsweepError: the disk does not take it; the jobs are submitted all the same.
    """
    number = len(folder.all_submissions())
    while True:
        submission = Submission(number, options, array, count, merge, logs, time.time())
        try:
            if publish(
                folder.submission(number), sealed({"plan": plan, **dataclasses.asdict(submission)})
            ):
                return submission
        except LsweepError as e:
            raise LsweepError(f"array {array} is submitted, but not remembered: {e}") from None
        number += 1
