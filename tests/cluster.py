"""A real Slurm cluster for the tests: brought up once, shot at, and taken down at the end.

Where tests were killed before that, the next ones take theirs down. With LSWEEP_SLURM_HOME set,
the cluster there is used and left running.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cases import wait_for

from lsweep.hosts.machine import host_identity, start_time

SCRIPT = Path(__file__).with_name("slurm-cluster.sh")
CANNOT = 77  # exit code of the script where Slurm cannot be had
OWNER = "owner"  # a file: the host, pid and start of the process whose cluster it is, its prefix
MOST_TASKS = 40  # of an array: few, so that the limit can be met


class NoCluster(Exception):
    """Slurm cannot be had here."""


class Cluster:
    """Four virtual nodes, three partitions: ``batch``, and ``high`` before ``low``."""

    def __init__(self) -> None:
        self._own = "LSWEEP_SLURM_HOME" not in os.environ
        settings = {"LSWEEP_SLURM_MAX_ARRAY": str(MOST_TASKS + 1)}
        if self._own:
            for home, prefix in _abandoned():
                _purge(home, LSWEEP_SLURM_HOME=str(home), LSWEEP_SLURM_PREFIX=prefix)
            port = next(p for p in itertools.count(21000, 1000) if all(map(_free, _ports(p))))
            prefix = f"c{port // 1000}n"
            settings["LSWEEP_SLURM_HOME"] = tempfile.mkdtemp(prefix="lsweep-", dir="/tmp")
            settings["LSWEEP_SLURM_PORT"] = str(port)
            settings["LSWEEP_SLURM_PREFIX"] = prefix
            facts = (host_identity(), os.getpid(), start_time(os.getpid()), prefix)
            Path(settings["LSWEEP_SLURM_HOME"], OWNER).write_text("\n".join(map(str, facts)))
        self._environment = {**os.environ, **settings}
        self.home = Path(self._environment["LSWEEP_SLURM_HOME"])
        self.conf = self.home / "etc" / "slurm.conf"

    def up(self) -> None:
        """Install what is missing, and start what does not run."""
        done = self._script("up")
        if done.returncode == CANNOT:
            raise NoCluster(done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr

    def down(self) -> None:
        """End it and leave nothing."""
        if self._own:
            _purge(self.home, **self._environment)

    def _script(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, *words], capture_output=True, text=True, env=self._environment
        )

    def stop(self, daemon: str) -> None:
        """Kill slurmctld or slurmdbd."""
        assert self._script("stop", daemon).returncode == 0

    def fault(self, what: str, node: str) -> str:
        """Let a node die, ``node-crash``, or be cut off, ``node-kill``; ``node-start`` mends it."""
        done = self._script(what, node[-1])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def saved(self, words: str) -> None:
        """Wait until the controller has saved a job that has ``words``."""
        state = self.home / "ctld" / "job_state"
        wait_for(lambda: state.exists() and words.encode() in state.read_bytes())

    def jobs(self) -> list[str]:
        """The tasks that wait or run."""
        return slurm("squeue", "-h", "-r", "-o", "%i").split()

    def clear(self) -> None:
        """Start what does not run, and end every job."""
        self.up()
        slurm("scancel", "--me")
        wait_for(lambda: not self.jobs())


def slurm(*words: object) -> str:
    """Return what a Slurm command prints."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _purge(home: Path, **environment: str) -> None:
    """End a cluster and remove what it left."""
    words = [SCRIPT, "down", "--purge"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    shutil.rmtree(home, ignore_errors=True)
    home.with_name(f"{home.name}.lock").unlink(missing_ok=True)


def _abandoned() -> Iterator[tuple[Path, str]]:
    """The folders and prefixes of clusters whose tests are no more."""
    for owner in Path("/tmp").glob(f"lsweep-*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError):
            host, pid, start, prefix = owner.read_text().splitlines()
            if host == host_identity() and start_time(int(pid)) != start:
                yield owner.parent, prefix


def _ports(first: int) -> list[int]:
    """What a cluster listens on: controller, accounting, and each node."""
    return [first, first + 1, *(first + 11 + node for node in range(4))]


def _free(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) != 0
