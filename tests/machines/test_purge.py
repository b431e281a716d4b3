"""Point 10, purge: each machine is as it was before it came to the cluster."""

import pytest

from machines.real import UP_TIMEOUT_S, RealCluster, Record, traces


@pytest.mark.last
@pytest.mark.timeout(UP_TIMEOUT_S)
def test_purge_leaves_each_machine_as_it_was(cluster: RealCluster, record: Record) -> None:
    cluster.invoke("down --purge", timeout_s=240).ok()
    for machine in (cluster.head, *cluster.workers):
        assert traces(machine) == record.before[machine.name]
        assert not machine.run("docker image ls -q").ok()
