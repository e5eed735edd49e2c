"""What tests may ask for: a real Slurm cluster, one for all of them."""

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
