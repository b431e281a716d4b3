"""What serves jobs on a worker is killed during one: its caller is told, the others go on, the worker comes back."""

from collections.abc import Callable

import pytest

from live import LiveCluster, wait_until
from load import Load, Victim

LOST = ("ConnectionLost", "HopFailed", "JobCancelled", "NodeFailed")
"""What a call is told whose job has ended with its machine, or whose machine says nothing any more."""


def _kill_slurmd(cluster: LiveCluster, worker: str) -> None:
    cluster.in_service("slurmd", "kill -9 $(pidof slurmstepd slurmd)", worker).ok()


def _restart_engine(cluster: LiveCluster, worker: str) -> None:
    # In a simulated machine all else ends with its engine, which is then started anew with the machine.
    cluster.on_worker(worker, ["sh", "-c", "kill $(cat /run/docker.pid)"]).ok()


def _kill_agent(cluster: LiveCluster, worker: str) -> None:
    cluster.in_service("agent", "kill -9 $(pidof python3)", worker).ok()


@pytest.mark.parametrize("fault", [_kill_slurmd, _restart_engine, _kill_agent])
def test_call_is_told_others_go_on_and_the_worker_comes_back(
    cluster: LiveCluster, fault: Callable[[LiveCluster, str], None]
) -> None:
    worker = cluster.workers[0]
    with Victim(cluster, worker) as victim, Load(cluster) as load:
        services = {name: cluster.container(name, worker) for name in ("slurmd", "agent")}
        fault(cluster, worker)
        _, kind, text = victim.told(timeout_s=20)
        assert kind in LOST, text
        assert worker in text
        load.wait_for_results(3)
        replaced = "agent" if fault is _kill_agent else "slurmd"
        wait_until(
            lambda: cluster.container(replaced, worker) not in ("", services[replaced]),
            timeout_s=90,
            what=f"{replaced} runs again",
        )
        wait_until(lambda: cluster.nodes()[worker] in ("allocated", "mixed"), timeout_s=90, what=f"{worker} has jobs")
        load.wait_for_results(3)
        load.stop()


def test_job_without_a_call_is_told_too_when_slurmd_is_killed(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    waiting = cluster.background(["srun", "-w", worker, "bash", "-c", "echo begun; sleep 1000"], "test_user1")
    waiting.wait_for_line("begun")
    with Load(cluster) as load:
        _kill_slurmd(cluster, worker)
        result = waiting.wait(timeout_s=60)
        assert result.exit_status != 0
        assert "Node failure" in result.stdout
        load.stop()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_worker_that_slurm_gave_up_takes_jobs_soon_after_its_slurmd_answers(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    cluster.in_service("slurmd", "kill -STOP $(pidof slurmd)", worker).ok()
    try:
        wait_until(lambda: "down" in cluster.nodes()[worker], timeout_s=150, what=f"{worker} is given up")
    finally:
        cluster.in_service("slurmd", "kill -CONT $(pidof slurmd)", worker).ok()
    wait_until(lambda: cluster.nodes()[worker] == "idle", timeout_s=90, what=f"{worker} takes jobs")
