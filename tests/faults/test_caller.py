"""Who makes a call is ended at each of its steps: nothing of the call is left, and the others go on."""

import contextlib
import signal
import time
from collections.abc import Iterator

import pytest

from live import LiveCluster, docker, job_name, wait_until
from load import Load, each_has_one_record

CALL = """
import sys, time
from delegate_function import SandboxDelegate, SlurmDelegate, lease

def say(what):
    print(what, flush=True)

class Task:
    def sleep(self, step):
        say(step)
        time.sleep(1000)

    def grow(self, step):
        say(step)
        return bytes(10**8)  # which is under way for seconds

step, node, name = sys.argv[1:]
chain = SlurmDelegate(SandboxDelegate(), nodelist=node, job_name=name)
if step == "is leased":
    with lease(chain) as held:
        held.invoke(Task(), "sleep", step)
elif step == "returns":
    chain.invoke(Task(), "grow", step)
else:
    chain.invoke(Task(), "sleep", step)
"""

GONE_S = 10
ALL_GONE_S = 60


class Caller:
    """A call to a worker, by its step: it waits in the queue, runs, returns a large result, or is leased."""

    def __init__(self, cluster: LiveCluster, step: str, worker: str, user: str = "test_user1") -> None:
        """Start it."""
        self._cluster = cluster
        self._step = step
        self._name = job_name()
        self.program = cluster.background(["python3", "-c", CALL, step, worker, self._name], user)

    def state(self) -> str:
        """Return its job's state; empty if there is no such job in the queue."""
        return self._cluster.slurm(f"squeue -h -n {self._name} -o %T").strip()

    def wait_for_its_step(self) -> None:
        """Wait until it is where it shall be, before all others that wait for its worker."""
        wait_until(self.state, timeout_s=30, what="its job is in the queue")
        if self._step == "waits":
            assert self.state() == "PENDING"
            return
        self._cluster.slurm(
            f"squeue -h -t PENDING -n {self._name} -o %i | xargs -ri scontrol update job={{}} priority=1000000"
        )
        self.program.wait_for_line(f"^{self._step}")

    def is_ended_by(self, number: signal.Signals) -> None:
        """End it, and see its job go."""
        self.program.kill(number)
        assert self.program.wait(timeout_s=GONE_S).exit_status != 0
        wait_until(lambda: not self.state(), timeout_s=GONE_S, what=f"the job of one that {self._step} is gone")


@contextlib.contextmanager
def _caller(cluster: LiveCluster, step: str, worker: str, user: str = "test_user1") -> Iterator[Caller]:
    caller = Caller(cluster, step, worker, user)
    try:
        caller.wait_for_its_step()
        yield caller
    finally:
        caller.program.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_caller_ended_at_each_step_leaves_nothing(cluster: LiveCluster, number: signal.Signals) -> None:
    worker = cluster.workers[0]
    with _caller(cluster, "is leased", worker) as leased, Load(cluster, chains=2, leases=0, executors=0) as load:
        leased.is_ended_by(number)
        with _caller(cluster, "runs", worker) as running, _caller(cluster, "waits", worker) as waiting:
            waiting.is_ended_by(number)
            running.is_ended_by(number)
        with _caller(cluster, "returns", worker) as returning:
            returning.is_ended_by(number)
        load.wait_for_results(3)
        load.stop()
        assert not load.errors()


@pytest.mark.slow
def test_userhost_killed_with_all_its_callers_leaves_nothing(cluster: LiveCluster) -> None:
    since, first = time.time(), cluster.next_job()
    before = cluster.container("userhost")
    one, other = cluster.workers[:2]
    with contextlib.ExitStack() as callers:
        callers.enter_context(_caller(cluster, "is leased", one))
        callers.enter_context(_caller(cluster, "runs", other))
        for user in ("test_user1", "test_user2", "jovyan"):
            callers.enter_context(_caller(cluster, "waits", other, user))
        docker("kill", before).ok()
        began = time.monotonic()
        wait_until(lambda: not cluster.queue(), timeout_s=ALL_GONE_S, what="no job is left")
        print(f"the queue was empty after {time.monotonic() - began:.1f} s")
    wait_until(lambda: cluster.container("userhost") not in ("", before), timeout_s=60, what="a new container")
    cluster.wait_until_idle(timeout_s=10)
    each_has_one_record(cluster, range(first, cluster.next_job()), since)
    assert cluster.user(["srun", "echo", "served"], "test_user1").ok() == "served\n"
