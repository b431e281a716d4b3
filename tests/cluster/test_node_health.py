"""Slurm's health check of its nodes: what cannot run a call takes none, and takes some again when it can."""

from collections.abc import Iterator

import pytest

from live import LiveCluster, wait_until

CHECK = "/usr/local/lib/cfiddle/node-health"
INTERVAL_S = 60


def _state(cluster: LiveCluster, worker: str) -> str:
    return cluster.slurm(f"sinfo -h -N -p normal -n {worker} -o '%T %E'").strip()


@pytest.fixture
def deaf_worker(cluster: LiveCluster) -> Iterator[str]:
    """Yield a worker whose agent stands still."""
    worker = cluster.workers[0]
    agent = cluster.container("agent", worker)
    cluster.on_worker(worker, ["docker", "pause", agent]).ok()
    yield worker
    cluster.on_worker(worker, ["docker", "unpause", agent])


def test_healthy_nodes_are_let_alone(cluster: LiveCluster) -> None:
    for worker in cluster.workers:
        cluster.in_service("slurmd", CHECK, worker).ok()
        assert _state(cluster, worker) == "idle none"


@pytest.mark.slow
def test_a_node_whose_agent_does_not_answer_is_drained_and_comes_back_by_itself(
    cluster: LiveCluster, deaf_worker: str
) -> None:
    cluster.in_service("slurmd", CHECK, deaf_worker, timeout_s=90).ok()
    assert _state(cluster, deaf_worker) == "drained health check: the agent, which makes sandboxes, does not answer"
    cluster.on_worker(deaf_worker, ["docker", "unpause", cluster.container("agent", deaf_worker)]).ok()
    wait_until(
        lambda: _state(cluster, deaf_worker) == "idle none", timeout_s=INTERVAL_S + 30, what="Slurm runs the check"
    )


def test_a_full_tmp_is_told(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    try:
        cluster.in_service("slurmd", f"fallocate -l 1000M /tmp/full && {CHECK}", worker).ok()
        assert _state(cluster, worker) == "drained health check: /tmp is full"
    finally:
        cluster.in_service("slurmd", f"rm -f /tmp/full && {CHECK}", worker).ok()
    # Slurm asks the node once more before it believes that it is back.
    wait_until(lambda: _state(cluster, worker) == "idle none", timeout_s=30, what="the node is back")


def test_what_two_users_keep_each_other_from_removing_goes(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    both = [f"setpriv --reuid={uid} --clear-groups sh -c" for uid in (2001, 2002)]
    nested = [
        f"{both[0]} 'mkdir -m 0777 /tmp/a'",
        f"{both[1]} 'mkdir -m 0777 /tmp/a/b'",
        f"{both[0]} 'fallocate -l 1000M /tmp/a/b/full'",
        f"{both[1]} 'chmod 0700 /tmp/a/b'",
        f"{both[0]} 'chmod 0700 /tmp/a'",
        *(f"{user} /usr/local/lib/cfiddle/clean || true" for user in both),
    ]
    try:
        cluster.in_service("slurmd", f"{' && '.join(nested)}; {CHECK}", worker).ok()
        assert _state(cluster, worker) == "drained health check: /tmp is full"
        cluster.in_service("slurmd", CHECK, worker).ok()
        wait_until(lambda: _state(cluster, worker) == "idle none", timeout_s=30, what="the node is back")
    finally:
        cluster.in_service("slurmd", f"rm -rf /tmp/a && {CHECK}", worker).ok()


def test_a_drain_of_somebody_s_is_let_alone(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    cluster.slurm(f"scontrol update nodename={worker} state=drain reason='a broken fan'")
    cluster.in_service("slurmd", f"fallocate -l 1000M /tmp/full && {CHECK}; rm -f /tmp/full && {CHECK}", worker).ok()
    assert _state(cluster, worker) == "drained a broken fan"
    cluster.slurm(f"scontrol update nodename={worker} state=resume")


def test_a_node_whose_epilog_did_not_end_in_time_comes_back_without_what_it_left(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    left = "setpriv --reuid=2001 --clear-groups mkdir -p -m 0500 /tmp/a/b"
    cluster.in_service("slurmd", left, worker).ok()
    cluster.slurm(f"scontrol update nodename={worker} state=drain reason='Epilog error'")
    cluster.in_service("slurmd", f"{CHECK} && ! ls -d /tmp/a", worker).ok()
    wait_until(lambda: _state(cluster, worker) == "idle none", timeout_s=30, what="the node is back")


def test_a_node_on_which_a_job_could_not_be_killed_comes_back_when_it_is_gone(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    left = "setpriv --reuid=2001 --clear-groups sleep 600 & echo $!"
    pid = cluster.in_service("slurmd", f"({left}) 2>&1 <&- | head -n 1", worker).ok().strip()
    try:
        cluster.slurm(f"scontrol update nodename={worker} state=drain reason='Kill task failed'")
        cluster.in_service("slurmd", CHECK, worker).ok()
        assert _state(cluster, worker) == "drained Kill task failed"
    finally:
        cluster.in_service("slurmd", f"kill {pid}; {CHECK}", worker).ok()
    wait_until(lambda: _state(cluster, worker) == "idle none", timeout_s=30, what="the node is back")
