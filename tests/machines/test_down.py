"""Point 10, down: no part of the cluster runs on any machine, and nothing that it holds is lost."""

import pytest

from machines.real import UP_TIMEOUT_S, RealCluster


@pytest.mark.timeout(2 * UP_TIMEOUT_S)
def test_down_keeps_the_state_and_up_brings_it_back(cluster: RealCluster) -> None:
    job = cluster.sbatch("echo mine > mine")
    cluster.wait_for_state(job, "COMPLETED")
    cluster.invoke("down", timeout_s=120).ok()
    for machine in (cluster.head, *cluster.workers):
        assert machine.run("docker info --format '{{.Swarm.LocalNodeState}}'").ok().strip() == "inactive"
        assert not machine.run("docker ps -q").ok()
        assert not machine.run("findmnt -rn -t nfs,nfs4").stdout
    cluster.invoke("up", timeout_s=UP_TIMEOUT_S).ok()
    assert cluster.state(job) == "COMPLETED"
    assert cluster.user("cat mine").ok().strip() == "mine"
