"""Point 11: the head is lost. Its backup, restored on another machine, has all, and the workers join that one."""

import pytest

from machines.real import CHECKOUT, HOMES, KNOWN_HOSTS, UP_TIMEOUT_S, RealCluster, Record, let_in, traces
from machines.virtual import Lab


@pytest.mark.last
@pytest.mark.timeout(4 * UP_TIMEOUT_S)
def test_cluster_goes_on_with_another_head(lab: Lab, cluster: RealCluster, record: Record) -> None:
    worker, lost, heir = cluster.workers[0], cluster.head, lab.machine("c2")
    heir.wait_until_up()
    record.before[heir.name] = traces(heir)
    job = cluster.sbatch("true")
    cluster.wait_for_state(job, "COMPLETED")
    cluster.invoke("backup /root/backup", timeout_s=120).ok()
    let_in(lost, heir)
    copied = ["/root/backup", "/root/.ssh/id_ed25519", "/root/.ssh/id_ed25519.pub", CHECKOUT, HOMES, KNOWN_HOSTS]
    ssh = f"ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null {heir.addr}"
    lost.run(f"tar -cP {' '.join(copied)} | {ssh} tar -xP", timeout_s=120).ok()
    lost.cut_power()
    worker.run("docker swarm leave --force").ok()
    cluster.head = heir
    cluster.settings({"HEAD_ADDR": heir.addr})
    cluster.invoke("restore /root/backup", timeout_s=3 * UP_TIMEOUT_S).ok()
    assert cluster.state(job) == "COMPLETED"
    following = cluster.sbatch("hostname > where")
    assert following > job
    cluster.wait_for_state(following, "COMPLETED")
    assert cluster.user("cat where").ok().strip() == worker.name
