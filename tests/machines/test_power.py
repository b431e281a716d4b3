"""Point 5: machines cut off without warning and started in any order are ready again by themselves."""

from collections.abc import Sequence

import pytest

from cfiddle_cluster.wait import PATIENCE
from live import wait_until
from machines.real import RealCluster
from machines.virtual import Lab

RETURN_TIMEOUT_S = 120
TOLD = ("COMPLETED", "FAILED", "NODE_FAIL", "CANCELLED", "TIMEOUT")
"""How a job may end whose machine went away."""

WRITER = f"sync; echo begun > begun; sync begun; sleep {10 * PATIENCE:.0f}; echo done"
"""A job that still runs when the power is cut."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("cut", "order"),
    [(["c1"], ["c1"]), (["head"], ["head"]), (["head", "c1"], ["c1", "head"]), (["head", "c1"], ["head", "c1"])],
    ids=["a worker", "the head", "all, the worker first", "all, the head first"],
)
def test_all_goes_on_by_itself_after_a_power_cut(
    lab: Lab, cluster: RealCluster, cut: Sequence[str], order: Sequence[str]
) -> None:
    node = cluster.workers[0].name
    running = cluster.sbatch(WRITER)
    cluster.wait_for_state(running, "RUNNING")
    queued = cluster.sbatch("hostname > where")
    assert cluster.state(queued) == "PENDING"
    for name in cut:
        lab.machines[name].cut_power()
    lab.restart(*order)
    cluster.wait_until_ready(timeout_s=RETURN_TIMEOUT_S)
    cluster.wait_for_state(queued, "COMPLETED", timeout_s=RETURN_TIMEOUT_S)
    assert cluster.user("cat where").ok().strip() == node
    cluster.wait_for_state(running, *TOLD, timeout_s=RETURN_TIMEOUT_S)
    assert list(cluster.nodes()) == [node], "nobody else has its name, and it is there once"
    numbers = cluster.slurm("sacct -X -n -P -a -S 2000-01-01 -o JobIDRaw").split()
    assert len(numbers) == len(set(numbers)), "one record for each job"
    following = cluster.sbatch("true")
    assert following > queued, "numbers of jobs are not given away again"
    cluster.wait_for_state(following, "COMPLETED")


def test_head_waits_for_a_worker_without_power(lab: Lab, cluster: RealCluster) -> None:
    node = cluster.workers[0].name
    lab.machines[node].cut_power()
    wait_until(lambda: "down" in cluster.nodes()[node], timeout_s=60, interval_s=2, what="Slurm gives it up")
    job = cluster.sbatch("true")
    lab.restart(node)
    cluster.wait_for_state(job, "COMPLETED", timeout_s=RETURN_TIMEOUT_S)
