"""Leases on the cluster: one job, a sandbox for each call."""

import time

from live import LiveCluster, wait_until

CALLS = """
import os, sys, time
from delegate_function import CallCancelled, JobTimeout, LeaseEnded, lease
class Task:
    def run(self, seconds=0):
        time.sleep(seconds)
        return os.getpid()
    def mark(self):
        found = os.path.exists("/tmp/mark")
        open("/tmp/mark", "w").close()
        return found
"""


def test_calls_of_a_lease_are_one_job_and_a_sandbox_each(cluster: LiveCluster) -> None:
    program = """
with lease(seconds=60) as held:
    found = []
    for _ in range(5):
        assert held.invoke(Task(), "mark") is False
        found.append((held.last_call.job_id, held.last_call.container, held.last_call.node["name"]))
jobs, containers, nodes = (set(column) for column in zip(*found))
print(len(jobs), len(containers), len(nodes), *jobs)
"""
    *counts, job = cluster.python(CALLS + program).ok().split()
    assert counts == ["1", "5", "1"]
    record = wait_until(
        lambda: cluster.user(["sacct", "-nPX", "-j", job, "-o", "State,JobName,QOS"]).ok().strip(),
        timeout_s=10,
        what="the lease is on record",
    )
    assert record == "COMPLETED|lease|lease"


def test_call_of_a_lease_is_cancelled_alone(cluster: LiveCluster) -> None:
    program = """
import threading
with lease(seconds=60) as held:
    held.invoke(Task(), "run")
    threading.Timer(1, held.cancel).start()
    began = time.monotonic()
    try:
        held.invoke(Task(), "run", 60)
    except CallCancelled:
        print(time.monotonic() - began < 3)
    held.invoke(Task(), "run")
    print(held.last_call.job_id == held.job_id)
"""
    assert cluster.python(CALLS + program).ok().split() == ["True", "True"]


def test_lease_gives_way_to_an_ordinary_job_when_its_call_has_ended(cluster: LiveCluster) -> None:
    program = """
print("begun", flush=True)
with lease(seconds=300) as first, lease(seconds=300) as second:
    for held in (first, second):
        held.invoke(Task(), "run")
    print("held", flush=True)
    try:
        while True:
            for held in (first, second):
                held.invoke(Task(), "run", 0.3)
    except LeaseEnded as error:
        print("told", error.details["reason"], flush=True)
"""
    caller = cluster.background(["python3", "-c", CALLS + program])
    caller.wait_for_line("held")
    began = time.monotonic()
    cluster.user(["srun", "true"], "test_user1").ok()
    assert time.monotonic() - began < 10
    caller.wait_for_line("told preempted", timeout_s=20)
    assert caller.wait(timeout_s=30).exit_status == 0


def test_lease_whose_caller_is_killed_is_given_back(cluster: LiveCluster) -> None:
    program = """
with lease(seconds=300) as held:
    held.invoke(Task(), "run")
    print("held", flush=True)
    time.sleep(100)
"""
    caller = cluster.background(["python3", "-c", CALLS + program])
    caller.wait_for_line("held")
    caller.kill()
    cluster.wait_until_idle(timeout_s=5)
    caller.wait(timeout_s=10)
