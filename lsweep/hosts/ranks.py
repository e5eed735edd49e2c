"""Ranks: which of how many workers a process is, by what its launcher put into its environment.

MPI only starts processes here: nothing of it is initialised where the environment says enough, so
that launcher and libmpi may be of different MPIs, a rank may die alone, and idle ones cost nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from lsweep.hosts.machine import host_identity, short_hash, start_time

PATIENCE = 5.0  # seconds for an answer of a launcher
GRACE = 2.0
HEARD = 0.3  # seconds in which hydra passes on what was said: an abort may overtake it

# Who sets which variables for: rank, number of ranks, rank on this node.
_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    ("MVAPICH2", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",)),
    ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",)),
    ("MPICH", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK")),
    ("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)


@dataclass(frozen=True)
class Rank:
    """This process among those that were started together.

    Attributes:
        index: 0, 1, …, over all tasks of a Slurm array.
        of: how many there are.
        local: its number on its node, which picks its GPU.
        source: who said so: ``MPICH``, ``Open MPI``, ``Slurm``, …; "" when nobody did.
        job: the Slurm job as Slurm writes it, ``51_3.0`` for step 0 of task 3; "" outside Slurm.
        launch: what only the processes of this launch share, where MPI itself was asked.
    """

    index: int = 0
    of: int = 1
    local: int = 0
    source: str = ""
    job: str = ""
    launch: str = ""


def own_rank(environment: Mapping[str, str] = os.environ, ask_mpi: bool = False) -> Rank:
    """Return what the environment says this process is; worker 0 of 1 where it says nothing.

    Several launchers may speak, for one is often started by another (``mpiexec`` has Slurm start
    its daemons) or left variables behind; the one with the most ranks is believed.

    Args:
        environment: of the process.
        ask_mpi: where it names no launcher, initialise MPI through mpi4py and ask that.

    >>> own_rank({"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}).index
    3
    >>> task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_JOB_ID": "53",
    ...         "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_STEP": "2",
    ...         "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_JOB_ID": "51"}
    >>> rank = own_rank(task)
    >>> rank.index, rank.of, rank.job
    (1, 3, '51_5')
    >>> own_rank({})
    Rank(index=0, of=1, local=0, source='', job='', launch='')
    """
    rank = _told(environment) or (_asked() if ask_mpi else Rank())
    task, tasks = _array(environment)
    return dataclasses.replace(
        rank,
        index=task * rank.of + rank.index,
        of=tasks * rank.of,
        source=rank.source or ("Slurm" if tasks > 1 else ""),
        job=_job(environment),
    )


def _told(environment: Mapping[str, str]) -> Rank | None:
    told = [r for names in _LAUNCHERS if (r := _named(environment, *names))]
    return max(told, key=lambda r: r.of, default=None)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else -1


def _named(
    environment: Mapping[str, str], source: str, rank: str, of: str, local: tuple[str, ...]
) -> Rank | None:
    if source == "Slurm" and not _in_step(environment):
        return None
    index, count = _number(environment, rank), _number(environment, of)
    if not 0 <= index < count:
        return None
    here = [n for name in local if (n := _number(environment, name)) >= 0]
    if not here and _number(environment, "SLURM_PROCID") == index:  # srun --mpi=pmi2
        here = [max(0, _number(environment, "SLURM_LOCALID"))]
    return Rank(index, count, here[0] if here else index, source)


def _in_step(environment: Mapping[str, str]) -> bool:
    """A batch script alone has SLURM_PROCID too, as 0, and SLURM_NTASKS of all its steps."""
    return _number(environment, "SLURM_STEP_ID") >= 0


def _array(environment: Mapping[str, str]) -> tuple[int, int]:
    """The place of this task in its array, and the array's size; 0 of 1 outside one."""
    task, low, high, step, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{n}") for n in ("ID", "MIN", "MAX", "STEP", "COUNT")
    )
    if min(task, low, high) < 0 or count < 1:
        return 0, 1
    step = max(1, step)
    if (high - low) // step + 1 == count:
        return (task - low) // step % count, count
    # A list such as 1,3,7-9 does not tell a task its place; two may begin with the same shard.
    return (task - low) % count, count


def _job(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in environment and "SLURM_ARRAY_TASK_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return f"{job}.{environment['SLURM_STEP_ID']}" if job and _in_step(environment) else job


def _is_of_srun(environment: Mapping[str, str]) -> bool:
    """True where srun started these ranks, and not the daemons of another launcher."""
    told = _told(environment)
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    return _in_step(environment) and told is not None and told.of == size


def launch_of(rank: Rank, environment: Mapping[str, str] = os.environ) -> str:
    """Return a name that the processes of this launch share, and no others; "" for one alone.

    After this MPICH's `end_launch` does nothing: who asked its process manager must take leave of
    it, or dies of its exit.
    """
    name = ""
    if rank.launch or rank.of == 1:
        return rank.launch
    if _is_of_srun(environment):
        turn = environment.get("SLURM_RESTART_COUNT", "0")
        name = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']} {turn}"
    elif rank.source == "Open MPI":
        name = environment.get("PMIX_NAMESPACE", "")
    elif rank.source == "Flux":
        name = environment.get("FLUX_JOB_ID", "")
    elif rank.source == "MPICH" and "mpi4py.MPI" not in sys.modules:  # else the wire is in use
        name = _told_by_hydra(environment, "get_my_kvsname").partition("kvsname=")[2]
        _told_by_hydra(environment, "finalize")
    if not name:  # then at least the processes of one node share their parent
        parent = os.getppid()
        name = f"{host_identity()} {parent} {start_time(parent)}"
    return short_hash(f"{rank.source} {name.strip()}")


def _told_by_hydra(environment: Mapping[str, str], command: str) -> str:
    """Say something to MPICH's process manager over its PMI 1 wire, which needs no MPI_Init."""
    fd = _number(environment, "PMI_FD")
    if fd < 0 or "MPI_LOCALRANKID" not in environment:  # others speak PMI 2 there
        return ""
    with contextlib.suppress(OSError, ValueError):
        os.write(fd, f"cmd={command}\n".encode())
        if select.select([fd], [], [], PATIENCE)[0]:
            return os.read(fd, 1024).decode(errors="replace")
    return ""


def _asked() -> Rank:
    """Ask MPI itself; it is finalised at once, so that afterwards a rank may die or idle alone."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # none is installed, or it finds no libmpi
        return Rank()
    if MPI.Is_finalized():  # asked before, by this process
        return Rank()
    world = MPI.COMM_WORLD
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    launch = world.bcast(uuid.uuid4().hex[:8], root=0)
    rank = Rank(world.rank, world.size, here.rank, "mpi4py", launch=launch)
    here.Free()
    MPI.Finalize()
    return rank if rank.of > 1 else Rank()


def end_launch(rank: Rank, code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Have the launcher end the other processes of this launch, where it can.

    Open MPI does so by itself when one exits with another status than 0.
    """
    if rank.of == 1:
        return
    if _is_of_srun(environment):
        step = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
        # Not at once: ranks that fail for the same reason then end by themselves, with its code.
        time.sleep(GRACE)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--signal=TERM", step], capture_output=True,
                           timeout=PATIENCE, check=False)  # fmt: skip
    elif rank.source == "MPICH":
        time.sleep(HEARD)
        _told_by_hydra(environment, f"abort exitcode={code}")
