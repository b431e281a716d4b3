"""The machines of these tests, and the cluster of README's chapter for real machines on them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from machines.real import RealCluster, Record, make
from machines.virtual import Lab, VirtualMachine, opened

CACHE = Path(os.environ.get("CFIDDLE_MACHINES", "/var/tmp/cfiddle-machines"))
"""Where the disk that all machines start from is kept from one run to the next."""


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Have a place for machines."""
    with opened(CACHE) as lab:
        yield lab


@pytest.fixture(scope="session")
def made(lab: Lab) -> tuple[RealCluster, Record]:
    """Make the cluster, once."""
    return make(lab)


@pytest.fixture
def cluster(made: tuple[RealCluster, Record]) -> RealCluster:
    """Return the cluster, ready."""
    made[0].wait_until_ready(timeout_s=60)
    return made[0]


@pytest.fixture
def stranger(lab: Lab) -> VirtualMachine:
    """Return a machine that is no member."""
    machine = lab.machine("c2")
    machine.wait_until_up()
    return machine


@pytest.fixture
def record(made: tuple[RealCluster, Record]) -> Record:
    """Return what was seen while the cluster was made."""
    return made[1]
