"""What tests may ask for, a real Slurm cluster, one for all; and which stay in one process."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import end_all
from cluster import Cluster, NoCluster

# What a test draws without naming a seed, such as a network's first weights. Another whole number
# here asks whether an answer hangs on that draw.
SEED = int(os.environ.get("LSWEEP_TEST_SEED", "0"))


class DrawnAlike:
    """No row depends on which ran before it in its process: they share the global generators."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self) -> None:
        torch.manual_seed(SEED)
        np.random.seed(SEED)
        random.seed(SEED)

    pytest_runtest_call = pytest_fixture_setup


def pytest_configure(config: pytest.Config) -> None:
    """For the examples in docstrings too, which lie beside this folder; and let Ctrl-C be one."""
    config.pluginmanager.register(DrawnAlike())
    # A script's background job ignores it, and so would all that rows start, and then interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_goes_on() -> Iterator[None]:
    """No row leaves a process behind, least of all one that failed."""
    yield
    end_all()


@pytest.fixture(scope="session")
def only_cluster() -> Iterator[Cluster]:
    """The cluster, up from the first test that asks for it to the end."""
    cluster = Cluster()
    try:
        cluster.up()
        yield cluster
    except NoCluster as e:
        pytest.skip(f"no Slurm here: {e}")
    finally:
        cluster.down()


@pytest.fixture
def cluster(only_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster with an empty queue, found by every command, which finds this lsweep."""
    monkeypatch.setenv("SLURM_CONF", str(only_cluster.conf))
    bin_ = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    only_cluster.clear()
    yield only_cluster
    only_cluster.clear()


# In .ci/run two processes share the tests: a file stays together, as do those with the cluster.
# What takes longest comes first, so that no process is left alone with it at the end.
WANT_CLUSTER = ("test_submit", "test_faults", "test_refined_runs")
FIRST = (*WANT_CLUSTER, "test_nfs", "test_mpi", "test_kill", "test_benchmarks", "test_doctor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanting = {i.path.stem for i in items if "only_cluster" in getattr(i, "fixturenames", ())}
    assert wanting <= set(WANT_CLUSTER), "there would be a second cluster: name the file here"
    if hasattr(config, "workerinput"):  # one process alone goes in the order of files
        stems = {name: k for k, name in enumerate(FIRST)}
        items.sort(key=lambda item: stems.get(item.path.stem, len(stems)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "cluster" if Path(path).stem in WANT_CLUSTER else path

    return Files(config, log)
