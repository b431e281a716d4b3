"""Calls in sandboxes: one call is one container; what comes back; what ends when its caller does."""

import json
import re
import signal
import time

import pytest

from live import PATIENCE, Background, LiveCluster, wait_until

PRELUDE = """
import json, os, sys, time
from delegate_function import SandboxDelegate, SlurmDelegate
from delegate_function.errors import DelegateFunctionException

def chain(**limits):
    return SlurmDelegate(SandboxDelegate(**limits), nodelist=os.environ.get("NODE"))
"""

DEAD_WITHIN_S = 2.0
"""A call that nobody waits for is ended within this time, and its container with it."""


def _call(cluster: LiveCluster, program: str, user: str = "jovyan", *, timeout_s: float = 60, **env: str) -> list[str]:
    return cluster.python(PRELUDE + program, user, timeout_s=timeout_s, env=env).ok().splitlines()


def _start(cluster: LiveCluster, program: str, user: str = "test_user1", **env: str) -> Background:
    return cluster.background(["python3", "-c", PRELUDE + program], user, env=env)


def test_one_call_is_one_container_on_an_exclusive_worker(cluster: LiveCluster) -> None:
    program = """
class Where:
    def run(self):
        return os.uname().nodename, os.getuid()

for _ in range(3):
    delegate = chain()
    host, uid = delegate.invoke(Where(), "run")
    said = delegate.last_call
    print(json.dumps([host, uid, said.container, said.job_id, said.where]))
"""
    node = cluster.workers[0]
    since = time.time()
    calls = [json.loads(line) for line in _call(cluster, program, NODE=node)]
    cluster.wait_until_idle(timeout_s=30)
    events = cluster.events(node, since)
    containers = [call[2] for call in calls]
    assert len(set(containers)) == 3
    for action in ("die", "destroy"):
        seen = [event.container for event in events if event.action == action]
        assert sorted(seen) == sorted(containers), f"the engine's events '{action}'"
    log = cluster.on_worker(node, ["docker", "logs", cluster.container("agent", node)]).output
    user = cluster.ids("jovyan")[0]
    for host, uid, container, job, where in calls:
        assert uid == 65533
        assert host not in (*cluster.workers, "userhost")
        served = rf"call [0-9a-f]{{32}} of user {user}, job {job}, in {container[:12]}: exited 0"
        assert len(re.findall(served, log)) == 1
        assert node in where
        assert cluster.job(job)["nodes"] == node
    for other in cluster.workers[1:]:
        assert not [event for event in cluster.events(other, since) if event.action == "die"]


def test_value_and_changed_state_come_back(cluster: LiveCluster) -> None:
    program = """
class Counter:
    def __init__(self):
        self.values = [1]
    def add(self, *numbers, factor=1):
        self.values += [number * factor for number in numbers]
        return sum(self.values)

counter = Counter()
print(chain().invoke(counter, "add", 2, 3, factor=10), counter.values)
"""
    assert _call(cluster, program) == ["51 [1, 20, 30]"]


def test_large_arguments_and_results_come_whole(cluster: LiveCluster) -> None:
    program = """
class Echo:
    def run(self, data):
        import hashlib
        return hashlib.sha256(data).hexdigest(), data[::-1]

import hashlib
data = os.urandom(1 << 16) * 256
digest, back = chain().invoke(Echo(), "run", data)
print(digest == hashlib.sha256(data).hexdigest(), back[::-1] == data)
"""
    assert _call(cluster, program, timeout_s=120) == ["True True"]


def test_exception_comes_with_its_remote_traceback(cluster: LiveCluster) -> None:
    program = """
class Wrong:
    def run(self):
        print("before", flush=True)
        return self.deeper({})
    def deeper(self, table):
        return table["missing key"]

try:
    chain().invoke(Wrong(), "run")
except KeyError as error:
    print("caught", error, "|", type(error.__cause__).__name__, "|", str(error.__cause__).replace(chr(10), " "))
"""
    lines = _call(cluster, program)
    assert lines[0] == "before"
    assert lines[1].startswith("caught 'missing key' | RemoteTraceback |")
    assert "deeper" in lines[1]
    assert "sandbox" in lines[1]


def test_exit_and_death_in_the_sandbox_are_typed_errors(cluster: LiveCluster) -> None:
    program = """
class Dies:
    def exits(self):
        print("last words", flush=True)
        os._exit(7)
    def crashes(self):
        import ctypes
        ctypes.string_at(0)
    def raises(self):
        raise SystemExit(3)

for method in ("exits", "crashes", "raises"):
    try:
        chain().invoke(Dies(), method)
    except DelegateFunctionException as error:
        print(method, type(error).__name__, str(error).replace(chr(10), " "))
    except SystemExit as error:
        print(method, type(error).__name__, error.code)
"""
    lines = [line for line in _call(cluster, program) if line != "last words"]
    assert lines[0].startswith("exits ProcessDied")
    assert "last words" in lines[0], "the tail of its output"
    assert lines[1].startswith("crashes ProcessDied")
    assert lines[2].startswith("raises ")


def test_output_streams_while_the_call_runs(cluster: LiveCluster) -> None:
    program = """
class Talker:
    def run(self):
        for number in range(4):
            print("tick", number, flush=True)
            time.sleep(1)
        print("to the error stream", file=sys.stderr)

chain().invoke(Talker(), "run")
print("end")
"""
    caller = _start(cluster, program)
    result = caller.wait()
    assert result.exit_status == 0, result.stdout
    times = {line: at for at, line in caller.arrivals}
    gaps = [times[f"tick {number + 1}"] - times[f"tick {number}"] for number in range(3)]
    assert all(0.5 < gap < 1.8 for gap in gaps), gaps
    assert "to the error stream" in times


def test_files_travel_with_a_call(cluster: LiveCluster) -> None:
    program = """
import tempfile
class Upper:
    def run(self):
        before = sorted(os.listdir("."))
        with open("data/in.txt") as source, open("out.txt", "w") as target:
            target.write(source.read().upper())
        open("not-asked-for", "w").close()
        return before

with tempfile.TemporaryDirectory(dir=os.path.expanduser("~")) as folder:
    os.chdir(folder)
    os.mkdir("data")
    open("data/in.txt", "w").write("text")
    open("secret", "w").write("stays here")
    print(chain().call(Upper(), "run", inputs=["data/in.txt"], outputs=["out.txt"]))
    print(open("out.txt").read(), sorted(os.listdir(".")))
"""
    assert _call(cluster, program) == ["['data']", "TEXT ['data', 'out.txt', 'secret']"]


@pytest.mark.parametrize(
    ("limits", "body", "limit"),
    [
        ("seconds=2", "time.sleep(100)", "time"),
        ("memory_mb=128", "x = bytearray(600 << 20)", "memory"),
        ("seconds=2", "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15)]; time.sleep(100)", "time"),
    ],
    ids=["time", "memory", "ignores-signals"],
)
def test_limit_ends_a_call_with_its_name(cluster: LiveCluster, limits: str, body: str, limit: str) -> None:
    program = f"""
class Greedy:
    def run(self):
        {body}
        return "got it all"

start = time.monotonic()
try:
    print(chain({limits}).invoke(Greedy(), "run"))
except DelegateFunctionException as error:
    print(type(error).__name__, error.details.get("limit"), round(time.monotonic() - start, 1))
except MemoryError:
    print("MemoryError memory 0")
"""
    name, found, seconds = _call(cluster, program)[-1].split()
    assert (name, found) in (("LimitExceeded", limit), ("MemoryError", "memory"))
    if limit == "time":
        assert 2 <= float(seconds) < 8


def test_unknown_profile_is_refused_with_the_ones_there_are(cluster: LiveCluster) -> None:
    program = """
try:
    chain(profile="no-such-profile").invoke(time, "time")
except DelegateFunctionException as error:
    print(type(error).__name__, str(error).replace(chr(10), " "))
"""
    line = _call(cluster, program)[-1]
    assert line.startswith("SandboxRefused")
    assert "default" in line


SLEEPER = """
class Sleeper:
    def run(self):
        print("begun", flush=True)
        time.sleep(1000)

try:
    chain().invoke(Sleeper(), "run")
except DelegateFunctionException as error:
    print("told", type(error).__name__, str(error).replace(chr(10), " "), flush=True)
"""


PING = """
class Ping:
    def run(self):
        return "pong"

print(chain().invoke(Ping(), "run"))
"""


def _death(cluster: LiveCluster, node: str, since: float) -> float:
    """Return when the sandbox that was started since then died, by the engine."""
    deaths = [event.time for event in cluster.events(node, since) if event.action == "die"]
    return deaths[0] if deaths else 0.0


def _dies_soon(cluster: LiveCluster, node: str, since: float, ended: float) -> None:
    died = wait_until(lambda: _death(cluster, node, since), timeout_s=30, what="the sandbox died")
    assert died - ended < DEAD_WITHIN_S * PATIENCE, f"after {died - ended:.1f} s"
    wait_until(lambda: cluster.sandboxes(node) == [], timeout_s=10, what="its container is removed")
    cluster.wait_until_idle(timeout_s=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_caller_killed_leaves_no_container(cluster: LiveCluster, number: signal.Signals) -> None:
    node, since = cluster.workers[0], time.time()
    caller = _start(cluster, SLEEPER, NODE=node)
    caller.wait_for_line("begun")
    assert len(cluster.sandboxes(node)) == 1
    ended = caller.kill(number)
    _dies_soon(cluster, node, since, ended)
    assert caller.wait(timeout_s=20).exit_status != 0


def test_srun_killed_leaves_no_container_and_its_caller_is_told(cluster: LiveCluster) -> None:
    node, since = cluster.workers[0], time.time()
    caller = _start(cluster, SLEEPER, NODE=node)
    caller.wait_for_line("begun")
    ended = time.time()
    cluster.user("pkill -9 -x srun", "test_user1").ok()
    _dies_soon(cluster, node, since, ended)
    caller.wait_for_line("^told (HopFailed|ConnectionLost|JobError)", timeout_s=20)
    caller.wait(timeout_s=20)


def test_stopped_caller_is_taken_for_dead(cluster: LiveCluster) -> None:
    node, since = cluster.workers[0], time.time()
    caller = _start(cluster, SLEEPER, NODE=node)
    caller.wait_for_line("begun")
    ended = caller.kill(signal.SIGSTOP)
    _dies_soon(cluster, node, since, ended)
    caller.kill(signal.SIGCONT)
    caller.wait_for_line("^told ", timeout_s=20)
    caller.wait(timeout_s=20)


def test_scancel_leaves_no_container_and_the_caller_is_told(cluster: LiveCluster) -> None:
    node, since = cluster.workers[0], time.time()
    caller = _start(cluster, SLEEPER, NODE=node)
    caller.wait_for_line("begun")
    job = cluster.slurm(f"squeue -h -w {node} -o %i").strip()
    ended = time.time()
    cluster.user(["scancel", job], "test_user1").ok()
    _dies_soon(cluster, node, since, ended)
    line = caller.wait_for_line("^told ", timeout_s=20)
    assert line.split()[1] == "JobCancelled", line
    assert job in line
    caller.wait(timeout_s=20)


def test_call_after_a_killed_one_starts_in_normal_time(cluster: LiveCluster) -> None:
    node = cluster.workers[0]
    caller = _start(cluster, SLEEPER, NODE=node)
    caller.wait_for_line("begun")
    caller.kill()
    caller.wait(timeout_s=20)
    start = time.monotonic()
    assert _call(cluster, PING, NODE=node) == ["pong"]
    assert time.monotonic() - start < 20


def test_calls_of_several_users_at_once_each_come_back(cluster: LiveCluster) -> None:
    since = time.time()
    users = ("jovyan", "test_user1", "test_user2")
    callers = [(user, _start(cluster, PING, user)) for user in users for _ in range(2)]
    for user, caller in callers:
        result = caller.wait(timeout_s=120)
        assert result.stdout.split() == ["pong"], user
    cluster.wait_until_idle(timeout_s=30)
    ended = [event for worker in cluster.workers for event in cluster.events(worker, since) if event.action == "die"]
    assert len({event.container for event in ended}) == len(ended) == len(callers)


def test_delegates_from_yaml(cluster: LiveCluster) -> None:
    program = """
from delegate_function import DelegateGenerator
from delegate_function.testing import TestClass
text = '''
version: 0.1
sequence:
  - type: SlurmDelegate
    partition: shared
  - type: SandboxDelegate
    seconds: 20
'''
subject = TestClass()
DelegateGenerator(yaml=text).invoke(subject, "set_value", 5)
print(subject._value)
"""
    assert _call(cluster, program)[-1] == "5"
