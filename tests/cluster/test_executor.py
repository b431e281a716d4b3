"""Many calls at once: they share leases, each ends in one result or one error, and detached ones are found again."""

import json
import signal
import time

from live import PATIENCE, LiveCluster, wait_until

PRELUDE = """
import collections, json, os, pathlib, subprocess, sys, threading, time
from concurrent.futures import as_completed, wait
from delegate_function import DelegateFunctionException, Executor, SandboxDelegate, SlurmDelegate

def jobs(*options):
    return subprocess.run(["squeue", "--me", "-h", "-o", "%i", *options], capture_output=True, text=True).stdout.split()

def square(number):
    return number * number

def nap(seconds):
    print("begun", flush=True)
    time.sleep(seconds)
    return os.uname().nodename
"""


def _python(cluster: LiveCluster, program: str, user: str = "test_user1", *, timeout_s: float = 120) -> list[str]:
    return cluster.python(PRELUDE + program, user, timeout_s=timeout_s).ok().splitlines()


def test_hundred_calls_share_two_jobs_and_have_a_sandbox_each(cluster: LiveCluster) -> None:
    program = """
most, done = 0, threading.Event()
def count():
    global most
    while not done.wait(0.1):
        most = max(most, len(jobs("--states=PENDING,RUNNING")))
threading.Thread(target=count).start()
with Executor(max_workers=2) as executor:
    start = time.monotonic()
    futures = [executor.submit(square, number) for number in range(100)]
    values = [future.result() for future in futures]
    calls = [future.call for future in futures]
    print(json.dumps({"seconds": time.monotonic() - start, "right": values == [n * n for n in range(100)],
        "jobs": len({call.job_id for call in calls}), "nodes": sorted({call.node["name"] for call in calls}),
        "containers": len({call.container for call in calls})}))
done.set()
print(most, jobs("--states=PENDING,RUNNING"))
"""
    said, left = _python(cluster, program, timeout_s=240)
    found = json.loads(said)
    assert found["right"]
    assert found["containers"] == 100
    assert found["nodes"] == cluster.workers[:2]
    assert found["jobs"] < 25, "the calls share them"
    assert left == "2 []", "jobs at once, and those left after the block"


def test_cancelled_call_frees_its_node_within_two_seconds(cluster: LiveCluster) -> None:
    program = """
with Executor() as executor:
    future = executor.submit(nap, 1000)
    while not future.running():
        time.sleep(0.05)
    while not os.path.exists("/tmp/go-on"):
        time.sleep(0.05)
    os.unlink("/tmp/go-on")
    print("cancelled", future.cancel(), future.cancelled(), flush=True)
    while jobs():
        time.sleep(0.05)
    print("free", flush=True)
"""
    caller = cluster.background(["python3", "-c", PRELUDE + program], "test_user1")
    caller.wait_for_line("begun")
    cluster.user("touch /tmp/go-on", "test_user1").ok()
    assert caller.wait_for_line("^cancelled") == "cancelled True True"
    caller.wait_for_line("^free", timeout_s=20)
    times = {line.split()[0]: at for at, line in caller.arrivals}
    assert times["free"] - times["cancelled"] < 2
    assert cluster.sandboxes() == []
    assert caller.wait(timeout_s=10).exit_status == 0


def test_job_ended_in_the_middle_costs_no_more_than_the_call_that_ran_in_it(cluster: LiveCluster) -> None:
    program = """
def work(number):
    time.sleep(0.3)
    return number

with Executor(max_workers=2) as executor:
    futures = [executor.submit(work, number) for number in range(30)]
    for _ in range(2):
        next(as_completed(futures))
        wait(futures[:8])
        ended = jobs()[0]
        subprocess.run(["scancel", ended], check=True)
    wait(futures)
values = [future.result() for future in futures if future.exception() is None]
errors = [future.exception() for future in futures if future.exception() is not None]
print(values == [number for number in range(30) if futures[number].exception() is None], len(values), len(errors))
for error in errors:
    print(isinstance(error, DelegateFunctionException), str(error).replace(chr(10), " "))
"""
    first, *errors = _python(cluster, program, timeout_s=200)
    right, values, failed = first.split()
    assert right == "True"
    assert int(values) + int(failed) == 30
    assert 28 <= int(values) <= 30, errors
    assert all(line.startswith("True ") for line in errors)


def test_other_users_job_comes_in_between_and_no_call_is_lost(cluster: LiveCluster) -> None:
    program = """
with Executor(turn_s=60) as executor:
    futures = [executor.submit(nap, 1) for _ in range(24)]
    print("all submitted", flush=True)
    print("done", len([future.result() for future in futures]), flush=True)
"""
    caller = cluster.background(["python3", "-c", PRELUDE + program], "test_user1")
    try:
        for _ in cluster.workers:
            caller.wait_for_line("begun")
        start = time.monotonic()
        assert cluster.user(["srun", "hostname"], "test_user2", timeout_s=60).ok().strip() in cluster.workers
        waited = time.monotonic() - start
        assert caller.wait_for_line("^done", timeout_s=120) == "done 24"
        assert waited < 6 * PATIENCE
    finally:
        caller.end()


def test_end_of_the_interpreter_ends_the_calls(cluster: LiveCluster) -> None:
    program = """
executor = Executor()
futures = [executor.submit(nap, 1000) for _ in range(4)]
while not any(future.running() for future in futures):
    time.sleep(0.05)
time.sleep(1)
print("the end", flush=True)
"""
    caller = cluster.background(["python3", "-c", PRELUDE + program], "test_user1")
    caller.wait_for_line("^the end")
    result = caller.wait(timeout_s=10)
    assert result.exit_status == 0, result.stdout
    assert "Error" not in result.stdout
    cluster.wait_until_idle(timeout_s=5)


DETACHED = """
executor = Executor(detached=True)
future = executor.submit(nap, 4)
print("job", future.job_id, flush=True)
print("value", future.result(), flush=True)
"""


def test_detached_call_is_found_after_its_process_was_killed(cluster: LiveCluster) -> None:
    caller = cluster.background(["python3", "-c", PRELUDE + DETACHED], "test_user1")
    job = caller.wait_for_line("^job ").split()[1]
    cluster.wait_until_runs(job)
    caller.kill(signal.SIGKILL)
    caller.wait(timeout_s=20)
    program = f"""
future = Executor.reattach({job})
print(future.result(timeout=60), "|", future.call.where, "|", future.call.job_id, "|", bool(future.call.usage))
print(*[(call.job_id, call.function, call.state) for call in Executor.detached_calls() if call.job_id == "{job}"])
Executor.forget({job})
print([call.job_id for call in Executor.detached_calls() if call.job_id == "{job}"])
"""
    begun, said, listed, left = _python(cluster, program)
    host, where, job_id, usage = said.split(" | ")
    assert begun == "begun"
    assert host not in (*cluster.workers, "userhost"), "it ran in a sandbox"
    assert where.startswith("hop 2 of 2 (sandbox on ")
    assert (job_id, usage) == (job, "True")
    assert listed == f"('{job}', 'nap', 'DONE')"
    assert left == "[]"
    assert cluster.wait_for_state(job, "COMPLETED")["name"] == "delegate"


def test_detached_calls_become_a_job_array_and_cancelled_ones_are_told(cluster: LiveCluster) -> None:
    program = """
executor = Executor(detached=True)
futures = [executor.submit(nap, 1000 if number > 3 else 0) for number in range(6)]
ids = [future.job_id for future in futures]
print(*ids, flush=True)
print(*[bool(future.result(60)) for future in futures[:4]], flush=True)
job, _, number = ids[4].partition("_")
detached = pathlib.Path.home() / ".delegate_function" / "detached"
[directory] = [path.parent for path in detached.glob("*/job") if path.read_text() == job]
while not any(b"begun" in path.read_bytes() for path in directory.glob(f"{number or 0}.partial.*")):
    time.sleep(0.1)
subprocess.run(["scancel", ids[4]], check=True)
error = futures[4].exception(30)
print(type(error).__name__, error.details["job_id"] == ids[4], error.output_tail, flush=True)
print(futures[5].cancel(), futures[5].cancelled())
deadline = time.monotonic() + 20
while jobs() and time.monotonic() < deadline:
    time.sleep(0.1)
print(jobs())
for job in ids:
    Executor.forget(job)
print(Executor.detached_calls())
"""
    lines = [line for line in _python(cluster, program, "test_user2") if line != "begun"]
    ids = lines[0].split()
    assert len({job.split("_")[0] for job in ids}) <= 3
    assert any("_" in job for job in ids)
    assert lines[1] == "True True True True"
    assert lines[2] == "JobCancelled True begun"
    assert lines[3:] == ["True True", "[]", "[]"]


def test_detached_call_of_a_plain_job(cluster: LiveCluster) -> None:
    program = """
with Executor(SlurmDelegate(partition="shared", time=2), detached=True) as executor:
    future = executor.submit(nap, 0)
print(future.result(), future.call.where)
Executor.forget(future.job_id)
"""
    _, said = _python(cluster, program)
    host, where = said.split(maxsplit=1)
    assert host in cluster.workers
    assert where == f"hop 1 of 1 (batch job on {host})"


def test_nobody_else_sees_detached_calls(cluster: LiveCluster) -> None:
    _python(cluster, "Executor(detached=True).submit(nap, 0).result(60)")
    directories = cluster.user("find .delegate_function -printf '%y %m %u\\n' | sort -u", "test_user1").ok()
    modes = [line.split() for line in directories.splitlines()]
    assert {mode for kind, mode, _ in modes if kind == "d"} == {"700"}
    assert {owner for _, _, owner in modes} == {"test_user1"}
    assert {kind for kind, _, _ in modes} <= {"d", "f"}
    wait_until(lambda: cluster.is_idle() == "", timeout_s=20, what="its job has ended")
    cluster.user("rm -r .delegate_function", "test_user1").ok()
