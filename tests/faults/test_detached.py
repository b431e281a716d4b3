"""A detached call is made again when its node dies."""

import signal

import pytest

from live import LiveCluster, wait_until

CALL = """
import os, sys, time
from delegate_function import Executor, SandboxDelegate, SlurmDelegate

def work(seconds):
    print("begun", flush=True)
    time.sleep(seconds)
    return "done"

chain = SlurmDelegate(SandboxDelegate(), nodelist=os.environ["NODE"])
future = Executor(chain, detached=True).submit(work, 8)
print("job", future.job_id, flush=True)
print(future.result(), future.call.where, flush=True)
Executor.forget(future.job_id)
"""


@pytest.mark.slow
def test_detached_call_whose_node_dies_is_made_again(cluster: LiveCluster) -> None:
    node = cluster.workers[0]
    caller = cluster.background(["python3", "-c", CALL], "test_user1", env={"NODE": node})
    try:
        job = caller.wait_for_line("^job ").split()[1]
        cluster.wait_until_runs(job)
        wait_until(lambda: cluster.sandboxes(node), timeout_s=20, what="the call runs")
        killed = cluster.container("slurmd", node)
        cluster.on_worker(node, ["docker", "kill", f"--signal={signal.SIGKILL.value}", killed]).ok()
        assert caller.wait_for_line("^done ", timeout_s=150) == f"done hop 2 of 2 (sandbox on {node})"
        assert caller.wait(timeout_s=20).exit_status == 0
        assert caller.output.count("begun") == 1, "what the first try wrote is not taken for the second one's"
        text = cluster.slurm(f"sacct --duplicates -X -n -P -j {job} -o State")
        assert [line.split()[0] for line in text.splitlines()][-1] == "COMPLETED"
        assert len(text.splitlines()) == 2, text
    finally:
        caller.end()
