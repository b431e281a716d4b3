"""The list of nodes for mpirun, the table of pairs, and which network the nodes share."""

import math
import types
from importlib.machinery import SourceFileLoader
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cfiddle_cluster import mpi
from cfiddle_cluster.errors import ClusterError

PROGRAM = Path(__file__).resolve().parents[2] / "images/mpi/files/usr/local/sbin/mpi-network"
ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t00000000\t010012AC\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth1\t000012AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
"""


def test_machinefile_names_nodes_with_their_slots() -> None:
    assert mpi.machinefile({"c1": 4, "c2": 16}) == "c1 slots=4\nc2 slots=16\n"


def test_table_has_a_line_for_each_pair_and_pi() -> None:
    measured = {"nodes": ["c1", "c2", "c10"], "pairs": [(0, 1, 12.34, 987.6), (1, 2, 1, 2)], "pi": math.pi}
    assert mpi.table(measured).splitlines() == [
        "from  to         latency     bandwidth",
        "c1    c2         12.3 µs      988 MB/s",
        "c2    c10         1.0 µs        2 MB/s",
        "pi, by 3 processes: 3.141592653589793",
    ]


def test_wrong_pi_is_an_error() -> None:
    mpi.check_pi(math.pi + 1e-12)
    with pytest.raises(ClusterError, match=r"3\.14"):
        mpi.check_pi(3.14)


@pytest.mark.parametrize(
    ("address", "interface", "network"), [("10.0.2.5", "eth0", "10.0.2.0/24"), ("172.18.3.4", "eth1", "172.18.0.0/16")]
)
def test_network_is_that_of_the_address_and_not_the_way_to_the_world(
    address: str, interface: str, network: str
) -> None:
    program = types.ModuleType("mpi_network")
    SourceFileLoader("mpi_network", str(PROGRAM)).exec_module(program)
    found, its_network = program.network_of(IPv4Address(address), ROUTES)
    assert (found, str(its_network)) == (interface, network)
    with pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        program.network_of(IPv4Address("192.0.2.1"), ROUTES)
