"""The agent's pool with a real engine: sandboxes that wait for calls, made while nothing is measured on the machine."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import duty
from cfiddle_cluster.commands import docker_cli, run
from containers import Start
from hostile import GOES_ON
from live import wait_until
from worker import OTHER, USER, Worker, start_worker

SIZE = 2
POLICY = """
version: 1
calls: {at_once: 8, per_user: 8}
profiles:
  default: &default
    command: [python3, -I, -m, delegate_function.inside, --import, cfiddle]
    pool: 2
    counters: true
    mounts: [{source: /etc/alternatives, target: /data}]
    limits:
      {seconds: 30, memory_mb: 512, processes: 48, cpus: job, open_files: 256, file_mb: 16, tmpfs_mb: 64,
       tmpfs_files: 500, output_mb: 4}
  bare: {<<: *default, pool: 0, counters: false, mounts: []}
"""

CONTAINER = """
delegate = SandboxDelegate()
delegate.invoke(Call(), "run", "result = 1")
print(delegate.last_call.container)
"""

HELD = """
from agent.call import Refused, hold
held = hold(job=7)
"""


@pytest.fixture(scope="module")
def worker(
    start_for_all: Start, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    made = start_worker(start_for_all, image, tmp_path_factory.mktemp("worker"), POLICY)
    yield made
    made.agent.stop()  # and its pool with it, which would outlive an agent that is killed
    assert made.sandboxes() == []


@pytest.fixture(autouse=True)
def _full_and_quiet(worker: Worker) -> Iterator[None]:
    """Begin with a full pool and no job; whatever a test does, the pool is full again when its jobs are over."""
    wait_until_full(worker)
    yield
    worker.revoke(7, 8)
    wait_until_full(worker)


def wait_until_full(worker: Worker) -> list[str]:
    """Wait until the pool is full and nothing else is there; return what it holds."""

    def full() -> list[str]:
        ready = worker.held("ready")
        return ready if len(ready) == SIZE and sorted(worker.sandboxes()) == sorted(ready) else []

    return wait_until(full, timeout_s=60, what="the pool is full, and nothing else is there")


def half_made(worker: Worker) -> list[str]:
    """Wait until one or more are being made, and return them."""
    return wait_until(lambda: worker.held("made", "connected"), timeout_s=20, interval_s=0.01, what="one is being made")


def is_frozen(container: str) -> bool:
    """Return whether the kernel says that no process of a container may run."""
    freezers = {
        Path(f"/sys/fs/cgroup/freezer/cfiddle/{container}/freezer.state"): "FROZEN",
        Path(f"/sys/fs/cgroup/cfiddle/{container}/cgroup.freeze"): "1",
        Path(f"/sys/fs/cgroup/cfiddle.slice/docker-{container}.scope/cgroup.freeze"): "1",
    }
    return any(path.exists() and path.read_text().strip() == said for path, said in freezers.items())


def ticks(container: str) -> int:
    """Return how many ticks of CPU time the processes of a container have had."""
    pids = run([docker_cli(), "top", container, "-o", "pid"], timeout_s=30).split()[1:]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(found[11]) + int(found[12]) for found in fields)


def test_each_call_gets_one_that_waited_and_never_the_same(worker: Worker) -> None:
    ready = worker.held("ready")
    worker.grant(7, f"{USER}\n")
    used = [worker.python(CONTAINER) for _ in range(SIZE)]
    assert sorted(used) == sorted(ready)
    cold = worker.python(CONTAINER)
    assert cold not in ready, "an empty pool means a new one"
    worker.revoke(7)
    assert not set(wait_until_full(worker)) & {*used, cold}


def test_no_call_begins_beside_one_that_says_it_has_returned_and_goes_on(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    program = f"""
try:
    call({GOES_ON!r})
except DelegateFunctionException:
    print(call("import time; result = time.time()"))
"""
    began = time.time()
    next_began = float(worker.python(program))
    [killed] = [event["timeNano"] / 1e9 for event in worker.events(began) if event["Action"] == "kill"]
    assert next_began > killed


def test_what_is_imported_is_there_before_the_call(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    text = "import sys; result = [name in sys.modules for name in ('cfiddle', 'numpy', 'pandas')]"
    assert worker.python(f"print(call({text!r}))") == "[True, True, True]"


def test_one_that_is_made_because_a_call_waits_imports_nothing_beforehand(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    for _ in range(SIZE):
        worker.python(CONTAINER)
    names = ("cfiddle", "numpy", "pandas", "cloudpickle")
    text = f"import sys; result = [name for name in {names} if name in sys.modules]"
    assert worker.python(f"print(call({text!r}))") == "['cloudpickle']", "which opens the call"


def test_nothing_is_made_and_nothing_removed_while_a_job_is_there(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    worker.grant(8, f"{OTHER}\n")
    before = sorted(worker.sandboxes())
    worker.python(CONTAINER)
    worker.python("import time; time.sleep(2)", prelude="")  # as long as it takes to make one
    assert sorted(worker.sandboxes()) == before
    assert [len(worker.held(state)) for state in ("ready", "served")] == [SIZE - 1, 1]
    worker.revoke(7)
    wait_until(lambda: not worker.held("served"), timeout_s=5, what="a used one does not outlive its job")
    assert len(worker.held()) == SIZE - 1, "another job is there"


def test_one_that_is_half_made_stands_still_until_the_job_is_over(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    worker.python(CONTAINER)
    worker.revoke(7)
    half_made(worker)
    worker.grant(8, f"{OTHER}\n")
    [half] = half_made(worker)
    running = half in worker.sandboxes("--filter", "status=running")
    if running:  # otherwise it was not even started
        wait_until(lambda: is_frozen(half), timeout_s=2, what="it is frozen")
    before = ticks(half) if running else 0
    worker.python("import time; time.sleep(1)", prelude="")
    assert worker.held("made", "connected") == [half]
    assert (half in worker.sandboxes("--filter", "status=running")) == running
    assert not running or ticks(half) == before
    worker.revoke(8)
    assert half in wait_until_full(worker), "it went on"


def test_a_call_takes_a_half_made_one_along(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    for _ in range(SIZE):
        worker.python(CONTAINER)
    worker.revoke(7)
    half_made(worker)
    worker.grant(8, f"{OTHER}\n")
    half = half_made(worker)
    taken = worker.python(CONTAINER, uid=OTHER, job=8)
    assert taken in half
    assert set(worker.held("made", "connected")) == {*half} - {taken}, "others still stand still"


def test_between_the_calls_of_a_lease_the_pool_is_filled(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    program = f"""{HELD}
containers = set()
for _ in range({2 * SIZE}):
    delegate = SandboxDelegate()
    delegate.invoke(Call(), "run", "result = 1")
    containers.add(delegate.last_call.container)
    print(len(containers), flush=True)
    sys.stdin.readline()
assert not held.lost
held.close()
"""
    process = worker.start(program)
    assert process.stdin
    assert process.stdout
    for number in range(2 * SIZE):
        assert process.stdout.readline() == f"{number + 1}\n"
        wait_until_full(worker)
        process.stdin.write("\n")
        process.stdin.flush()
    assert process.wait(10) == 0
    worker.python(CONTAINER)
    worker.python("import time; time.sleep(1)", prelude="")
    assert len(worker.held("ready")) == SIZE - 1, "without a lease the job counts again"


def test_a_lease_is_of_the_job_s_user_and_the_only_one(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    refused = """
from agent.call import Refused, hold
try:
    hold(job=JOB)
except Refused as error:
    print(error.code)
"""
    assert worker.python(refused.replace("JOB", "7"), uid=OTHER) == "job"
    assert worker.python(HELD + refused.replace("JOB", "9")) == "job"
    assert worker.python(HELD + refused.replace("JOB", "7")) == "busy"
    process = worker.start(HELD + "print(held.lost, flush=True)\nwhile not held.lost: time.sleep(0.05)")
    assert process.stdout
    assert process.stdout.readline() == "False\n"
    worker.revoke(7)
    assert process.wait(5) == 0, "it ends with the job"


def test_lowered_limits_are_in_force_in_one_that_waited(worker: Worker) -> None:
    ready = worker.held("ready")
    worker.grant(7, f"{USER} 1\n")
    program = """
from delegate_function import LimitExceeded
delegate = SandboxDelegate(memory_mb=256, seconds=20)
print(delegate.invoke(Call(), "run", "import os; result = sorted(os.sched_getaffinity(0))"))
print(delegate.last_call.container)
try:
    delegate.invoke(Call(), "run", "bytearray(300 << 20)")
except LimitExceeded as error:
    print("memory limit of 256 MB" in str(error), error.details["container"])
"""
    cpus, first, told = worker.python(program).splitlines()
    assert cpus == "[1]"
    assert told.split()[0] == "True"
    assert sorted([first, told.split()[1]]) == sorted(ready)


def test_counters_need_the_policy_then_the_kernel_then_the_machine(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    text = """
import ctypes, os, struct
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 298, "aarch64": 241}[os.uname().machine]
def opened(pid, flags=0):
    # A software event (1), the task's clock (1), without the kernel's part: every machine has it.
    attributes = struct.pack("=IIQ24xQ16x", 1, 64, 1, 1 | 1 << 5 | 1 << 6)
    return 0 if libc.syscall(number, attributes, pid, -1, -1, flags) >= 0 else ctypes.get_errno()
result = [opened(0), opened(0, 8), opened(1), opened(os.getpid()), opened(-1), opened(0, 4)]
"""
    program = f"""
import json
for profile in ("default", "bare"):
    delegate = SandboxDelegate(profile=profile)
    print(json.dumps([delegate.invoke(Call(), "run", {text!r}), delegate.last_call.node["counters"]]))
"""
    (allowed, said), (denied, why) = map(json.loads, worker.python(program).splitlines())
    paranoid = int(Path("/proc/sys/kernel/perf_event_paranoid").read_text())
    assert allowed == ([0, 0] if paranoid <= 2 else [13, 13]) + [1] * 4, "of oneself, and nothing else"
    if paranoid <= 2:
        assert said == "available" or said.startswith("machine: ")
    else:
        assert said.startswith(f"kernel: perf_event_paranoid is {paranoid}")
    assert denied == [1] * 6
    assert why == "policy: profile bare has no counters"


def test_a_mount_is_the_policy_s_and_read_only(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    text = """
import os
mounts = [line.split() for line in open("/proc/self/mountinfo")]
result = [sorted(os.listdir("/data")), [fields[5] for fields in mounts if fields[4] == "/data"]]
"""
    program = f"import json\nprint(json.dumps(call({text!r})))\nprint(call({text!r}, profile='bare'))"
    seen = worker.start(program)
    out, err = seen.communicate(timeout=60)
    names, options = json.loads(out)
    assert names == sorted(path.name for path in Path("/etc/alternatives").iterdir())
    assert [found.split(",")[0] for found in options] == ["ro"]
    assert "No such file or directory: '/data'" in err, "another profile has none"


def test_one_that_dies_while_it_waits_is_replaced(worker: Worker) -> None:
    dead = worker.held("ready")[0]
    run([docker_cli(), "kill", dead], timeout_s=30)
    wait_until(lambda: dead not in worker.sandboxes(), timeout_s=20, what="it is removed")
    assert dead not in wait_until_full(worker)
    assert worker.agent.log().count(f"sandbox {dead[:12]}, which waited for a call, has ended") == 1


def test_an_agent_told_to_end_while_it_makes_some_leaves_nothing(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    worker.python(CONTAINER)
    worker.revoke(7)
    half_made(worker)
    worker.agent.stop()
    assert worker.sandboxes() == []
    run([docker_cli(), "start", worker.agent.name], timeout_s=30)
    worker.agent.wait_until_healthy()


def test_an_agent_that_fails_ends_with_1_and_leaves_nothing(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    worker.python(CONTAINER)
    worker.revoke(7)
    half_made(worker)
    run([docker_cli(), "kill", "--signal", duty.FAILED.name, worker.agent.name], timeout_s=30)
    assert run([docker_cli(), "wait", worker.agent.name], timeout_s=30) == "1\n"
    assert worker.sandboxes() == []
    run([docker_cli(), "start", worker.agent.name], timeout_s=30)
    worker.agent.wait_until_healthy()


def test_what_an_agent_leaves_that_is_killed_the_next_removes(worker: Worker) -> None:
    worker.grant(7, f"{USER}\n")
    worker.python(CONTAINER)
    worker.revoke(7)
    half_made(worker)
    worker.grant(7, f"{USER}\n")
    half_made(worker)
    run([docker_cli(), "kill", "--signal", "KILL", worker.agent.name], timeout_s=30)
    assert worker.sandboxes()
    run([docker_cli(), "start", worker.agent.name], timeout_s=30)
    wait_until(lambda: not worker.sandboxes(), timeout_s=20, what="none is left, and none made: a job is there")
    worker.agent.wait_until_healthy()


def test_log_complains_of_nothing_else(worker: Worker) -> None:
    known = "refused|which waited for a call, has ended|can be made to wait: it ended"
    assert worker.agent.complaints(but=known) == []
