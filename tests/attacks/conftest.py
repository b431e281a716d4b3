"""The first test here finds the cluster idle, and each leaves it so."""

import pytest

from live import LiveCluster


@pytest.fixture(scope="session", autouse=True)
def _found_idle(cluster: LiveCluster) -> None:
    cluster.wait_until_idle(timeout_s=90)


@pytest.fixture(autouse=True)
def _left_idle(left_idle: None) -> None:
    """Have the fixture for every test of the directory."""
