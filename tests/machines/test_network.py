"""Point 6: a worker without a network for a moment and for longer than Slurm waits; the registry away in a roll-out."""

import pytest

from live import wait_until
from machines.real import CHECKOUT, UP_TIMEOUT_S, RealCluster

MOMENT = "sleep 30"
SLURM_WAITS_S = 60


def test_job_outlives_a_moment_without_a_network(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    job = cluster.sbatch("sleep 60; hostname > where")
    cluster.wait_for_state(job, "RUNNING")
    worker.unplug()
    try:
        worker.run(MOMENT).ok()
    finally:
        worker.plug()
    cluster.wait_for_state(job, "COMPLETED", timeout_s=120)
    assert cluster.user("cat where").ok().strip() == worker.name


def test_job_of_a_worker_that_was_given_up_is_told_and_the_worker_comes_back(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    job = cluster.sbatch("sleep 1000")
    cluster.wait_for_state(job, "RUNNING")
    worker.unplug()
    try:
        wait_until(
            lambda: "down" in cluster.nodes()[worker.name], timeout_s=2 * SLURM_WAITS_S, what="Slurm gives it up"
        )
        cluster.wait_for_state(job, "NODE_FAIL")
    finally:
        worker.plug()
    cluster.wait_until_ready(timeout_s=120)
    wait_until(lambda: not worker.run("pgrep -u 1000").stdout, timeout_s=60, what="nothing of that job runs")
    cluster.wait_for_state(cluster.sbatch("true"), "COMPLETED")


@pytest.mark.timeout(2 * UP_TIMEOUT_S)
def test_images_come_without_the_registry(cluster: RealCluster) -> None:
    dockerfile = f"{CHECKOUT}/images/agent/Dockerfile"
    cluster.head.run(f"cp {dockerfile} before && echo 'LABEL tried=registry-away' >>{dockerfile}").ok()
    refuse = "-p tcp --dport 5000 -j REJECT --reject-with tcp-reset"
    cluster.workers[0].run(f"iptables -I OUTPUT {refuse}").ok()
    try:
        said = cluster.invoke("up", timeout_s=UP_TIMEOUT_S)
        assert said.exit_status == 0, said.output
        assert "over SSH, because" in said.output
    finally:
        cluster.workers[0].run(f"iptables -D OUTPUT {refuse}").ok()
        cluster.head.run(f"mv before {dockerfile}").ok()
    cluster.wait_for_state(cluster.sbatch("true"), "COMPLETED")
