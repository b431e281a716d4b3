"""Attacks 4, 10, 16 and 17: out of a sandbox, over its limits, and longer than it may last."""

import json
import time

import pytest

from hostile import ABUSES, ESCAPE, VIEW, check_view, program
from live import LiveCluster, wait_until


def test_call_sees_a_sandbox_around_it(cluster: LiveCluster) -> None:
    check_view(json.loads(cluster.python(program(VIEW, through_slurm=True), "test_user1").ok()))


def test_every_way_out_is_closed(cluster: LiveCluster) -> None:
    assert json.loads(cluster.python(program(ESCAPE, through_slurm=True), "test_user1").ok()) == {}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_is_contained_and_the_next_job_starts_in_normal_time(cluster: LiveCluster, name: str) -> None:
    abuse = ABUSES[name]
    text = cluster.python(abuse.program(through_slurm=True, within_s=10), "test_user1").ok()
    assert text.strip() == abuse.outcome
    cluster.wait_until_idle(timeout_s=10)
    began = time.monotonic()
    cluster.user(["srun", f"--nodelist={cluster.workers[0]}", "true"], "test_user2").ok()
    assert time.monotonic() - began < 3


def test_deaf_call_of_a_cancelled_job_is_gone_within_two_seconds(cluster: LiveCluster) -> None:
    running = cluster.background(
        ["python3", "-c", program(_DEAF_FOR_LONG, through_slurm=True, seconds=60)], "test_user1"
    )
    try:
        found = wait_until(cluster.sandboxes, timeout_s=30, what="a sandbox is there")
        worker = found[0].split(":")[0]
        top = ["docker", "top", found[0].split(":")[1]]
        wait_until(lambda: cluster.on_worker(worker, top).stdout.count("\n") > 4, timeout_s=20, what="it forked")
        job = cluster.queue()[0].split()[0]
        since = time.time()
        cluster.user(["scancel", job], "test_user1").ok()
        wait_until(lambda: not cluster.sandboxes(worker), timeout_s=20, what="the sandbox is gone")
        [died] = [event.time for event in cluster.events(worker, since) if event.action == "die"]
        assert died - since < 2.0
    finally:
        running.end()


_DEAF_FOR_LONG = ABUSES["deaf and detached"].text
