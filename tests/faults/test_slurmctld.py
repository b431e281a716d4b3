"""Slurm's controller dies: nothing is lost, the ids of jobs go on, what runs goes on."""

import time

import pytest

from live import LiveCluster, docker, wait_until


def _submit_load(cluster: LiveCluster) -> tuple[list[int], list[int]]:
    running = [cluster.sbatch("sleep 25", "test_user1", "-w", worker) for worker in cluster.workers]
    for job in running:
        cluster.wait_until_runs(job)
    waiting = [cluster.sbatch("true", user) for user in ("test_user1", "test_user2") for _ in range(4)]
    return running, waiting


def _answers(cluster: LiveCluster) -> bool:
    if not cluster.container("slurmctld"):
        return False
    return cluster.user("scontrol ping", timeout_s=60).stdout.count("UP") >= 1


def _nothing_was_lost(cluster: LiveCluster, running: list[int], waiting: list[int]) -> None:
    jobs = running + waiting
    for job in jobs:
        record = cluster.wait_for_state(job, "COMPLETED", timeout_s=150)
        assert record["exit_code"] == "0:0"
    following = cluster.sbatch("true", "test_user1")
    assert following == max(jobs) + 1, "ids go on"
    cluster.wait_for_state(following, "COMPLETED", timeout_s=90)
    for job in jobs:
        name = cluster.job(job)["name"]
        text = cluster.slurm(f"sacct -X -D -n -P --name {name} -S now-1day -o JobID")
        assert text.split() == [str(job)], "one record for each job"


def test_controller_killed_under_load(cluster: LiveCluster) -> None:
    running, waiting = _submit_load(cluster)
    before = cluster.container("slurmctld")
    started = {worker: cluster.container("slurmd", worker) for worker in cluster.workers}
    docker("exec", before, "sh", "-c", "kill -9 $(pidof slurmctld)")
    wait_until(lambda: cluster.container("slurmctld") not in ("", before), timeout_s=90, what="a new container")
    wait_until(lambda: _answers(cluster), timeout_s=90, interval_s=1, what="the controller answers")
    _nothing_was_lost(cluster, running, waiting)
    assert started == {worker: cluster.container("slurmd", worker) for worker in cluster.workers}


def test_controller_s_container_removed_under_load(cluster: LiveCluster) -> None:
    running, waiting = _submit_load(cluster)
    before = cluster.container("slurmctld")
    docker("rm", "-f", before).ok()
    wait_until(lambda: cluster.container("slurmctld") not in ("", before), timeout_s=90, what="a new container")
    wait_until(lambda: _answers(cluster), timeout_s=90, interval_s=1, what="the controller answers")
    _nothing_was_lost(cluster, running, waiting)


@pytest.mark.timeout(240)
def test_caller_waits_through_a_restart_of_the_controller(cluster: LiveCluster) -> None:
    caller = cluster.background(["srun", "bash", "-c", "echo begun; sleep 12; echo done"], "test_user2")
    caller.wait_for_line("begun")
    before = cluster.container("slurmctld")
    docker("kill", "-s", "KILL", before).ok()
    result = caller.wait(timeout_s=120)
    assert "done" in result.stdout
    wait_until(lambda: cluster.container("slurmctld") not in ("", before), timeout_s=90, what="a new container")
    wait_until(lambda: _answers(cluster), timeout_s=90, interval_s=1, what="the controller answers")
    start = time.monotonic()
    cluster.wait_until_idle(timeout_s=120)
    assert time.monotonic() - start < 120
