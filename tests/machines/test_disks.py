"""Point 7, disks: full on the head and on a worker; said, and mended once there is room."""

from live import wait_until
from machines.real import RealCluster
from machines.virtual import VirtualMachine

HEALTH_TIMEOUT_S = 90
"""Slurm asks idle nodes once a minute."""

FILLING = "/var/lib/docker/filling"
"""A file on the disk that the services' volumes are on."""
FILL = f"fallocate -l $(($(df --output=avail -B1 /var/lib/docker | tail -n1) - (8 << 20))) {FILLING}"


def reason(cluster: RealCluster, node: str) -> str:
    """Return why a node takes no jobs."""
    return cluster.slurm(f"sinfo -h -N -p normal -n {node} -o %E").strip()


def fill(machine: VirtualMachine) -> None:
    """Leave next to no room on a machine's disk."""
    machine.run(FILL).ok()


def test_worker_with_a_full_disk_is_drained_until_there_is_room(cluster: RealCluster) -> None:
    worker = cluster.workers[0]
    fill(worker)
    try:
        wait_until(
            lambda: reason(cluster, worker.name) == "health check: the disk is full",
            timeout_s=HEALTH_TIMEOUT_S,
            interval_s=2,
            what="it is drained",
        )
    finally:
        worker.run(["rm", FILLING]).ok()
    cluster.wait_until_ready(timeout_s=HEALTH_TIMEOUT_S)


def test_head_with_a_full_disk_says_so_and_loses_no_job(cluster: RealCluster) -> None:
    before = cluster.sbatch("true")
    cluster.wait_for_state(before, "COMPLETED")
    fill(cluster.head)
    try:
        said = cluster.invoke("doctor")
        assert said.exit_status == 1
        assert " MB of disk left for images" in said.output
    finally:
        cluster.head.run(["rm", FILLING]).ok()
    after = cluster.sbatch("true")
    cluster.wait_for_state(after, "COMPLETED", timeout_s=120)
    assert after > before
    assert cluster.state(before) == "COMPLETED"
