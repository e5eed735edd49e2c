"""Together: the way of one rank through ``run --on mpi``, from a common start to one merge.

All ranks plan, for planning twice changes nothing, and all work, through leases. None ever waits
for another inside MPI: what they must know of each other they read in the run folder, asleep in
between. Under most launchers a rank that exits with an error takes the others with it, so one that
cannot go on stays, idle, until the others have ended.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lsweep.errors import LsweepError, SickDevice
from lsweep.hosts.machine import host_identity, start_time
from lsweep.hosts.ranks import Rank, end_launch, launch_of
from lsweep.hosts.startup import CROWD, first_of_siblings
from lsweep.hosts.stopping import Stop
from lsweep.runs.display import Display
from lsweep.runs.status import is_complete, share_done
from lsweep.storage.files import publish, read_json, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import PATIENCE, Observer, State, Verdict, all_workers

HEAD_START = 3.0  # seconds that the first rank has to say why nothing can begin
QUIET = 60.0  # seconds that the others may take to begin
NAP = (1.0, 3.0)  # seconds between looks, by chance
ONE_LAUNCH = 60.0  # seconds within which one launcher's processes begin


def say(text: str) -> None:
    """Print a line in one write, for ranks share their launcher's output."""
    sys.stderr.write(f"lsweep: {' '.join(text.splitlines())}\n")
    sys.stderr.flush()


def refuse(rank: Rank, error: Exception, stop: Stop) -> int:
    """Say why nothing can begin, once for all ranks, and have the launcher end them.

    Ranks fail for one reason as a rule. The first rank says it at once and ends all; on another
    node one speaks if that did not happen in time.

    Returns:
        The exit code.
    """
    try:
        if rank.index:
            time.sleep(HEAD_START + min(rank.index, 60) * random.uniform(0.5, 1.0))
        # Not ended yet, and nobody here said it.
        if not stop.reason and (rank.of == 1 or first_of_siblings("cannot begin")):
            say(str(error))
            end_launch(rank, _code(error))
    except KeyboardInterrupt:
        pass  # so it was ended
    return _code(error)


def _code(error: Exception) -> int:
    return error.exit_code if isinstance(error, LsweepError) else LsweepError.exit_code


def take_part(
    folder: RunFolder,
    rank: Rank,
    workers: int,
    evaluate: Callable[[Display, set[int]], None],
    stop: Stop,
    may_leave: bool = False,
) -> int | None:
    """Evaluate with the others until the run is complete, or nobody is left who goes on.

    Args:
        folder: a planned run.
        rank: this one.
        workers: how many workers all ranks have.
        evaluate: works, and notes the pids of its workers.
        stop: asked while this waits.
        may_leave: one of a crowd may go home when nothing is left to take; others stand by.

    Returns:
        0 when the run is complete; None when others complete it; else the exit code of what
        stopped this rank.

    Raises:
        LsweepError: nothing could begin.
    """
    begun, pids = time.time(), {os.getpid()}
    if is_complete(folder):
        return 0
    done, total = share_done(folder)
    if rank.index == 0:
        print(f"{folder.root}: {total - done} of {total} points to evaluate", flush=True)
    told: list[str] = []

    def look_for_singletons() -> None:
        if not told and rank.of == 1:
            told.extend(singletons(folder, begun, pids))
            for text in told:
                say(text)

    soon = threading.Timer(ONE_LAUNCH / 4, look_for_singletons)
    soon.daemon = True
    code = 0
    with Display(folder, total, done, sys.stderr if rank.index == 0 else None) as display:
        soon.start()
        try:
            evaluate(display, pids)
        except (LsweepError, OSError) as e:
            if not isinstance(e, SickDevice) and not _own(folder, pids):
                raise
            code = _code(e)
            idle = f" (rank {rank.index} stays idle until the others end)" if rank.of > 1 else ""
            say(f"{e}{idle}")
        finally:
            soon.cancel()
        look_for_singletons()
        if is_complete(folder):
            return 0
        if may_leave and not code:
            return None
        complete = rank.of > 1 and _stay(folder, begun, pids, workers, stop)
    return 0 if complete else code or 3


def _own(folder: RunFolder, pids: set[int]) -> list[dict[str, Any]]:
    """The files of this rank's workers; a worker makes its file before it takes a lease."""
    here = host_identity()
    return [w for w in all_workers(folder) if w["identity"] == here and w["pid"] in pids]


def _stay(folder: RunFolder, begun: float, pids: set[int], workers: int, stop: Stop) -> bool:
    """Wait until the run is complete, or nobody works on it; return whether it is complete."""
    observer, last, ended = Observer(folder), time.monotonic(), -1
    while True:
        mine = {w["worker"] for w in _own(folder, pids)}
        seen = [w for w in all_workers(folder) if w["worker"] not in mine]
        working = [w for w in seen if w["state"] == State.WORKING]
        alive = any(observer.verdict(w["worker"]) is Verdict.ALIVE for w in working)
        if not alive or len(seen) - len(working) != ended:
            ended = len(seen) - len(working)
            if is_complete(folder):
                return True
        if alive:
            last = time.monotonic()
        began = sum(w["since"] > begun - ONE_LAUNCH for w in seen) + 1
        if not alive and (began >= workers or time.monotonic() - last > QUIET):
            return False
        stop.check()
        time.sleep(random.uniform(*NAP) * max(1.0, workers / CROWD))


def is_closer(folder: RunFolder, rank: Rank, stop: Stop) -> bool:
    """Let one rank merge for all: True for it, False for the others, once it has.

    It need not be the first rank, which may be dead; should it die itself, another takes over.
    """
    launch = launch_of(rank)
    if not launch:
        return True
    here, generation = host_identity(), 0
    facts = {"identity": here, "pid": os.getpid(), "start": start_time(os.getpid())}
    while True:
        claim = folder.closing(launch, generation)
        if publish(claim, sealed(facts), sync=False):
            return True
        since = time.monotonic()
        while not _is_gone(claim, here, time.monotonic() - since):
            if _is_merged(folder.surface, claim):
                return False
            stop.check()
            time.sleep(random.uniform(0.1, 0.3) * NAP[0])
        if _is_merged(folder.surface, claim):
            return False
        generation += 1


def _is_merged(surface: Path, claim: Path) -> bool:
    try:
        return surface.stat().st_mtime_ns >= claim.stat().st_mtime_ns
    except OSError:
        return False


def _is_gone(claim: Path, here: str, waited: float) -> bool:
    try:
        closer = read_json(claim)
    except LsweepError:
        return waited > PATIENCE
    if closer.get("identity") != here:
        return waited > PATIENCE
    return start_time(int(closer["pid"])) != closer.get("start")


def singletons(folder: RunFolder, begun: float, pids: set[int]) -> list[str]:
    """Return a line if several processes were started together and each takes itself for all.

    Only the first of them, by name, is given it to say.

    Args:
        folder: the run.
        begun: when this process began.
        pids: of its workers.
    """
    crowd = sorted(w["worker"] for w in all_workers(folder) if abs(w["since"] - begun) < ONE_LAUNCH)
    mine = {w["worker"] for w in _own(folder, pids)}
    if len(crowd) <= len(mine) or crowd[0] not in mine:
        return []
    return [
        f"{len(crowd)} workers began within a minute, and this one was told that it is alone: if "
        "one launcher started them, its variables (PMI_RANK, OMPI_COMM_WORLD_RANK, SLURM_PROCID) "
        "do not reach them, as in a container that cleans its environment, or its MPI and mpi4py's "
        "are different ones. They share the work, but all take the first GPU: pass the variables "
        "on, or use the mpiexec of mpi4py's MPI"
    ]
