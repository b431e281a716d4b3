"""Point 9: with the rules all works, after a power cut too, and strangers get to SSH and JupyterLab alone."""

from collections.abc import Iterator

import pytest

from machines.real import UP_TIMEOUT_S, RealCluster
from machines.virtual import Lab, VirtualMachine

OPEN = [22, 8888]
"""What everybody gets to on the head; on a worker it is SSH alone."""
INNER = [111, 2049, 2377, 5000, 5001, 6817, 6818, 6819, 7946]
ASK_S = 3


@pytest.fixture
def _walled(cluster: RealCluster) -> Iterator[None]:
    """Have the rules set; they are gone afterwards."""
    cluster.invoke("firewall --set").ok()
    yield
    cluster.invoke("firewall --unset").ok()


def answering(stranger: VirtualMachine, machine: VirtualMachine) -> list[int]:
    """Return the TCP ports of a machine that a stranger can connect to, of those that matter."""
    ask = 'for port in {ports}; do timeout {s} bash -c "</dev/tcp/{addr}/$port" 2>/dev/null && echo $port; done; true'
    ports = " ".join(map(str, [*OPEN, *INNER]))
    said = stranger.run(ask.format(ports=ports, s=ASK_S, addr=machine.addr), timeout_s=120).ok()
    return sorted(map(int, said.split()))


def test_without_rules_a_stranger_gets_through(cluster: RealCluster, stranger: VirtualMachine) -> None:
    assert "not set, so these ports are for everybody" in cluster.invoke("firewall").output
    assert {22, 2049, 2377, 5000, 8888} <= set(answering(stranger, cluster.head))


def assert_all_works(cluster: RealCluster, stranger: VirtualMachine) -> None:
    """Check that the rules stand, that they keep a stranger out, and that a job and a call come back."""
    worker = cluster.workers[0]
    assert cluster.invoke("firewall").exit_status == 0
    assert answering(stranger, cluster.head) == OPEN
    assert answering(stranger, worker) == OPEN[:1]
    cluster.wait_for_state(cluster.sbatch("hostname > where"), "COMPLETED")
    assert cluster.user("cat where").ok().strip() == worker.name, "Slurm and the homes work"
    assert cluster.call_in_sandbox() == "42"


@pytest.mark.usefixtures("_walled")
@pytest.mark.timeout(2 * UP_TIMEOUT_S)
def test_with_rules_only_members_do_and_all_works(lab: Lab, cluster: RealCluster, stranger: VirtualMachine) -> None:
    worker = cluster.workers[0]
    assert_all_works(cluster, stranger)
    worker.cut_power()
    lab.restart(worker.name)
    cluster.wait_until_ready(timeout_s=120)
    assert_all_works(cluster, stranger)
    cluster.invoke("up", timeout_s=UP_TIMEOUT_S).ok()
