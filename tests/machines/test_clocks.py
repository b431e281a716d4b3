"""Point 7, clocks: one that is ten minutes off is said, keeps its node from jobs, and is forgiven once it is right."""

from collections.abc import Iterator

import pytest

from live import wait_until
from machines.real import RealCluster
from machines.virtual import VirtualMachine


@pytest.fixture
def ahead(cluster: RealCluster) -> Iterator[VirtualMachine]:
    """Return a worker whose clock is ten minutes ahead; afterwards it is right."""
    worker = cluster.workers[0]
    worker.run("systemctl stop systemd-timesyncd; date -s '+10 minutes'").ok()
    yield worker
    set_clock(cluster, worker)
    cluster.wait_until_ready(timeout_s=120)


def set_clock(cluster: RealCluster, worker: VirtualMachine) -> None:
    """Give a worker the head's time."""
    worker.run(f"date -s @{cluster.head.run('date +%s').ok().strip()}").ok()


def test_clock_that_is_off_is_said_by_doctor(cluster: RealCluster, ahead: VirtualMachine) -> None:
    said = cluster.invoke("doctor")
    assert said.exit_status == 1
    assert f"{ahead.name}" in said.output
    assert "s ahead of the head's" in said.output


def test_node_with_a_wrong_clock_is_drained_and_comes_back(cluster: RealCluster, ahead: VirtualMachine) -> None:
    def reason() -> str:
        return cluster.slurm(f"sinfo -h -N -p normal -n {ahead.name} -o %E")

    wait_until(lambda: "clock" in reason(), timeout_s=120, interval_s=5, what="it is drained with the reason")
    set_clock(cluster, ahead)
    cluster.wait_until_ready(timeout_s=120)
    cluster.wait_for_state(cluster.sbatch("true"), "COMPLETED")
