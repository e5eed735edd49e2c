"""What tests may ask for, a real Slurm cluster, one for all; and which stay in one process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, NoCluster


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


# In .ci/run two processes share the tests: a file stays together, as do all that want the cluster.
# What takes longest comes first, so that no process is left alone with it at the end.
CLUSTER = "slurm"
LONGEST = (CLUSTER, "test_nfs", "test_mpi", "test_stopping", "test_doctor", "test_benchmarks")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return  # one process: in the order of files

    def group(item: pytest.Item) -> str:
        wants = getattr(item, "fixturenames", ())
        return CLUSTER if "only_cluster" in wants else item.path.stem

    def place(item: pytest.Item) -> int:
        name = group(item)
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
