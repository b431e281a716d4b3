"""A worker machine is gone: its jobs' callers are told, nobody takes its name, `up` brings it back."""

import pytest

from live import MACHINE, LiveCluster, docker, invoke, wait_until

CALL = """
import os, time
from delegate_function import SandboxDelegate, SlurmDelegate
from delegate_function.errors import DelegateFunctionException

class Sleeper:
    def run(self):
        print("begun", flush=True)
        time.sleep(1000)

try:
    SlurmDelegate(SandboxDelegate(), nodelist=os.environ["NODE"]).invoke(Sleeper(), "run")
except DelegateFunctionException as error:
    print("told:", type(error).__name__, str(error)[:500].replace(chr(10), " "), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worker_gone_for_good_and_back(cluster: LiveCluster) -> None:
    others = cluster.workers[:-1]
    lost = cluster.workers[-1]
    before = cluster.workers
    holders = [cluster.sbatch("sleep 1000", "test_user2", "-w", other) for other in others]
    for job in holders:
        cluster.wait_until_runs(job)
    caller = cluster.background(["python3", "-c", CALL], "test_user1", env={"NODE": lost})
    try:
        caller.wait_for_line("begun")
        docker("rm", "-f", "-v", f"{MACHINE}{lost}").ok()
        docker("volume", "rm", f"{MACHINE}{lost}").ok()
        line = caller.wait_for_line("^told:", timeout_s=120)
        assert caller.wait(timeout_s=30).exit_status == 0
        assert line.split()[1] in ("ConnectionLost", "NodeFailed", "HopFailed", "JobError"), line
        wait_until(lambda: "down" in cluster.nodes()[lost], timeout_s=240, interval_s=2, what="Slurm gives the node up")
        assert sorted(cluster.nodes()) == before, "nobody else takes its name"
        for other in others:
            assert cluster.nodes()[other].rstrip("*") in ("allocated", "mixed"), "the others go on"
    finally:
        caller.end()
        for job in holders:
            cluster.slurm(f"scancel {job}")
        invoke("up", timeout_s=400).ok()
    cluster.wait_until_idle(timeout_s=120)
    assert cluster.workers == before
    assert cluster.user(["srun", "-w", lost, "hostname"]).ok().strip() == lost
