"""The agent's image with a real engine: calls from a job step's container, each in a sandbox of its own."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster.commands import docker_cli, run
from containers import Start
from hostile import ABUSES, ESCAPE, GOES_ON, VIEW, check_view, program
from live import wait_until
from worker import OTHER, RAW, USER, Worker, start_worker

POLICY = """
version: 1
calls: {at_once: 8, per_user: 3}
profiles:
  default: &default
    command: [python3, -I, -m, delegate_function.inside]
    limits: &limits
      {seconds: 30, memory_mb: 256, processes: 48, cpus: job, open_files: 256, file_mb: 16, tmpfs_mb: 64,
       tmpfs_files: 500, output_mb: 4}
  one-core: {<<: *default, limits: {<<: *limits, cpus: "0"}}
  no-answer: {<<: *default, command: [python3, -c, "raise SystemExit(3)"]}
"""


@pytest.fixture(scope="module")
def worker(start_for_all: Start, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return start_worker(start_for_all, image, tmp_path_factory.mktemp("worker"), POLICY)


@pytest.fixture(autouse=True)
def _nothing_is_left(worker: Worker) -> Iterator[None]:
    worker.grant(7, f"{USER}\n")
    worker.grant(8, f"{OTHER}\n")
    yield
    worker.revoke(7, 8)
    worker.wait_until_none_is_left()
    assert worker.agent.run("sh", "-c", "ls /run/cfiddle-sandboxes") == ""


# What a call is given back


def test_call_returns_its_value_and_streams_its_output(worker: Worker) -> None:
    program = """
print(call("import os; print('from inside', os.getuid()); result = arguments[0] * 2", 21))
"""
    assert worker.python(program).split("\n") == ["from inside 65533", "42"]


def test_each_call_has_a_container_of_its_own(worker: Worker) -> None:
    began = time.time()
    worker.python("for number in range(3): assert call('result = arguments[0]', number) == number")
    worker.revoke(7)
    worker.wait_until_none_is_left()
    events = worker.events(began)
    started = [event["id"] for event in events if event["Action"] == "start"]
    assert len(started) == len(set(started)) == 3
    for container in started:
        actions = [event["Action"] for event in events if event["id"] == container]
        assert [actions.count(action) for action in ("create", "start", "die", "destroy")] == [1, 1, 1, 1]
    log = worker.agent.log()
    for container in started:
        assert re.search(f"call [0-9a-f]{{32}} of user {USER}, job 7, in {container[:12]}: exited 0", log)


def test_usage_and_fingerprint_come_with_the_result(worker: Worker) -> None:
    program = """
from agent.call import Call
import socket
# What the call is has no part in it: here its process finds nobody at the other end, and ends.
ours, theirs = socket.socketpair()
read, write = os.pipe()
ours.close()
streams = {"channel": theirs, "stdout": write, "stderr": write}
asked = Call(job=7, profile="one-core", seconds=5, memory_mb=150, **streams)
started, ended = asked.take(), asked.take()
import json
print(json.dumps([started, ended.reason, ended.exit_status, ended.usage, ended.node]))
"""
    started, reason, status, usage, node = json.loads(worker.python(program))
    assert (reason, status) == ("exited", 1)
    assert started["limits"] == {"seconds": 5, "memory_mb": 150, "processes": 48, "output_mb": 4}
    assert 0 < usage["wall_s"] < 5
    assert 5 < usage["peak_memory_mb"] < 150
    assert usage["user_s"] >= 0
    assert usage["system_s"] >= 0
    assert node == started["node"]
    assert node["name"] == "c1"
    assert (node["cores"], node["cpus"]) == (1, "0")
    assert node["image"].startswith("sha256:")
    assert node["kernel"]


def test_memory_and_time_of_a_call_are_counted(worker: Worker) -> None:
    program = """
delegate = SandboxDelegate()
text = '''
import time
data = bytearray(100 * 2**20)
end = time.process_time() + 0.5
while time.process_time() < end: pass
'''
delegate.invoke(Call(), "run", text)
usage = delegate.last_call.usage
print(usage["peak_memory_mb"] > 100, usage["peak_memory_mb"] < 200, 0.4 < usage["user_s"] + usage["system_s"] < 2)
"""
    assert worker.python(program) == "True True True"


def test_a_crash_is_told_by_its_signal(worker: Worker) -> None:
    program = """
for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM):
    try:
        call("import os, sys; os.kill(os.getpid(), arguments[0])", int(number))
    except ProcessDied as error:
        print(number.name in str(error))
try:
    call("import os; os._exit(7)")
except ProcessDied as error:
    print(error.details["exit_status"])
"""
    assert worker.python(program).split() == ["True", "True", "True", "True", "7"]


def test_cfiddle_measures_in_a_sandbox(worker: Worker) -> None:
    program = """
print(call('''
import ctypes, cfiddle, numpy, pandas
libc = ctypes.CDLL("libcfiddle.so")
result = cfiddle.are_perf_counters_available() in (True, False)
'''))
"""
    assert worker.python(program) == "True"


# Who may call


def test_only_who_holds_the_job_may_call(worker: Worker) -> None:
    assert worker.python("print(refusal()[0])", job=9) == "job", "no such job"
    assert worker.python("print(refusal()[0])", job=8) == "job", "another user's job"
    assert worker.python("print(call('result = 1'))", job=8, uid=OTHER) == "1"
    assert worker.python("print(refusal()[0])", job=7, uid=0) == "job", "root holds no job"
    worker.grant(10, f"{USER}\n")
    assert worker.python("print(call('result = 1'))", job=10) == "1"
    worker.revoke(10)
    assert worker.python("print(refusal()[0])", job=10) == "job", "the job ended"


@pytest.mark.parametrize("content", ["", "2001 0-1 more", "-2001", "2001 $(id)", "0x7d1", "2001,2002", "2001" * 2000])
def test_what_is_no_grant_grants_nothing(worker: Worker, content: str) -> None:
    worker.grant(11, content)
    assert worker.python("print(refusal()[0])", job=11) == "job"
    worker.revoke(11)


def test_a_grant_is_a_file_of_root_s_and_no_link(worker: Worker) -> None:
    worker.step.run("sh", "-c", "echo 2001 >/tmp/mine && ln -sf /tmp/mine /run/cfiddle-grants/12")
    assert worker.python("print(refusal()[0])", job=12) == "job"
    worker.step.run("sh", "-c", "rm /run/cfiddle-grants/12 && mkfifo /run/cfiddle-grants/12")
    assert worker.python("print(refusal()[0])", job=12) == "job"
    worker.step.run(
        "sh",
        "-c",
        "rm /run/cfiddle-grants/12 && echo 2001 >/run/cfiddle-grants/12 && chown 2001 /run/cfiddle-grants/12",
    )
    assert worker.python("print(refusal()[0])", job=12) == "job"
    worker.revoke(12)


def test_a_job_s_cpus_are_the_sandbox_s(worker: Worker) -> None:
    worker.grant(13, f"{USER} 1\n")
    program = "print(call('import os; result = sorted(os.sched_getaffinity(0))'), refusal(profile='none')[0])"
    assert worker.python(program, job=13) == "[1] profile"
    worker.revoke(13)


# What may be asked


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"image": "debian"}, "field"),
        ({"mounts": ["/:/host"]}, "field"),
        ({"privileged": True}, "field"),
        ({"v": 1}, "version"),
        ({"v": 3}, "version"),
        ({"v": "2"}, "version"),
        ({"v": True}, "version"),
        ({"type": "exec"}, "field"),
        ({"type": ["call"]}, "field"),
        ({"type": "lease"}, "field"),
        ({"type": "list"}, "user"),
        ({"profile": "--privileged"}, "field"),
        ({"profile": "default\n"}, "field"),
        ({"profile": "../default"}, "field"),
        ({"profile": "default\0"}, "field"),
        ({"profile": "none"}, "profile"),
        ({"job": "7"}, "field"),
        ({"job": "../7"}, "field"),
        ({"job": 7.0}, "field"),
        ({"job": -7}, "field"),
        ({"id": "../../" + "a" * 26}, "field"),
        ({"id": "A" * 32}, "field"),
        ({"seconds": 0}, "field"),
        ({"seconds": -1}, "field"),
        ({"seconds": 1e400}, "malformed"),
        ({"memory_mb": 1.5}, "field"),
        ({"memory_mb": 127}, "field"),
        (b"not JSON", "malformed"),
        (b"[]", "malformed"),
        (b"[" * 60000, "malformed"),
        (b'{"v": 2, "v": 2, "type": "call"}', "malformed"),
        (b"\xff\xfe", "malformed"),
    ],
)
def test_what_cannot_be_asked_is_refused(worker: Worker, request_: dict[str, Any] | bytes, code: str) -> None:
    program = f"print(*ask({request_!r}))"
    answer = worker.python(program.replace("inf", "float('inf')"), prelude=RAW)
    assert answer.split()[0] == code
    if code == "version":
        assert "known: 2" in answer
    if code == "field":
        assert answer.isprintable()


def test_only_streams_are_handed_through(worker: Worker) -> None:
    program = """
tcp = socket.socket(); listening = socket.socket(socket.AF_UNIX); listening.bind("/tmp/listening"); listening.listen()
os.unlink("/tmp/listening")
datagram, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
good, other = socket.socketpair()
read, write = os.pipe()
home, null, plain = (os.open(path, os.O_RDONLY) for path in ("/", "/dev/null", "/etc/passwd"))
for bad in (tcp.fileno(), listening.fileno(), datagram.fileno(), home, null, plain):
    assert ask({}, [bad, write, write])[0] == "descriptors", bad
    assert ask({}, [good.fileno(), bad, write])[0] == "descriptors", bad
    assert ask({}, [good.fileno(), write, bad])[0] == "descriptors", bad
assert ask({}, [read, write, write])[0] == "descriptors", "a pipe is no channel"
assert ask({}, [])[0] == "descriptors"
assert ask({}, [good.fileno(), write])[0] == "descriptors"
assert ask({}, [good.fileno(), write, write, write])[0] == "malformed"
assert ask({}, [good.fileno(), good.fileno(), good.fileno()])[0] == "started"
"""
    worker.python(program, prelude=RAW)


def test_refusals_leave_no_descriptor_open_in_the_agent(worker: Worker) -> None:
    count = ["sh", "-c", "ls /proc/[0-9]*/fd | wc -l"]
    before = int(worker.agent.run(*count))
    worker.python("for _ in range(100): ask({'v': 9}); ask({'job': 99}); ask(b'', [0, 1])", prelude=RAW)
    wait_until(lambda: int(worker.agent.run(*count)) <= before + 2, timeout_s=10, what="all are closed")


def test_calls_beyond_a_user_s_share_are_refused(worker: Worker) -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
def one(number):
    try:
        return call("import time; time.sleep(3); result = 'served'")
    except SandboxRefused as error:
        return error.details["reason"]
with ThreadPoolExecutor(6) as pool:
    print(sorted(pool.map(one, range(6))))
"""
    assert worker.python(program) == str(["busy"] * 3 + ["served"] * 3)


# What a sandbox may have


def test_configuration_is_the_same_whatever_is_asked(worker: Worker) -> None:
    worker.grant(16, f"{USER}\n")
    process = worker.start("call('import time; time.sleep(60)', seconds=20, memory_mb=128)", job=16)
    said = worker.one_that_serves()
    worker.revoke(16)
    assert process.wait(10) != 0
    host = said["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert not host["Devices"]
    assert host["NetworkMode"] == "none"
    assert host["IpcMode"] == "none"
    assert (host["PidMode"], host["UTSMode"], host["UsernsMode"]) == ("", "", "")
    assert host["ReadonlyRootfs"]
    assert host["Memory"] == host["MemorySwap"] == 128 * 2**20
    assert host["PidsLimit"] == 48
    assert host["LogConfig"]["Type"] == "none"
    assert host["SecurityOpt"][0] == "no-new-privileges"
    assert host["SecurityOpt"][1].startswith('seccomp={"defaultAction":"SCMP_ACT_ERRNO"')
    assert len(host["SecurityOpt"]) == 2
    assert said["Config"]["User"] == "65533:65533"
    assert [(mount["Destination"], mount["RW"]) for mount in said["Mounts"]] == [("/run/cfiddle", False)]
    assert sorted(host["Tmpfs"]) == ["/dev/shm", "/tmp"]


@pytest.mark.parametrize("name", ABUSES)
def test_a_limit_holds_and_is_named(worker: Worker, name: str) -> None:
    abuse = ABUSES[name]
    assert worker.python(abuse.program(through_slurm=False), prelude="") == abuse.outcome
    began = time.monotonic()
    assert worker.python("print(call('result = 1'))") == "1", "the next call is served"
    assert time.monotonic() - began < 3


def test_every_way_out_is_closed(worker: Worker) -> None:
    assert json.loads(worker.python(program(ESCAPE, through_slurm=False), prelude="")) == {}


def test_a_sandbox_sees_nothing_of_the_machine(worker: Worker) -> None:
    check_view(json.loads(worker.python(program(VIEW, through_slurm=False), prelude="")))


# How a call ends that nobody waits for


def test_the_caller_killed_ends_the_sandbox(worker: Worker) -> None:
    process = worker.start("print(os.getpid(), flush=True)\ncall('import time; time.sleep(60)')")
    assert process.stdout
    pid = process.stdout.readline().strip()
    worker.one_that_serves()
    worker.step.run("kill", "-9", pid)
    worker.wait_until_none_runs()
    process.wait(10)


def test_a_grant_taken_away_ends_the_sandbox(worker: Worker) -> None:
    worker.grant(14, f"{USER}\n")
    program = """
try:
    call("import time; time.sleep(60)")
except DelegateFunctionException as error:
    print("job 14 ended" in str(error))
"""
    process = worker.start(program, job=14)
    worker.one_that_serves()
    worker.revoke(14)
    worker.wait_until_none_runs()
    assert process.communicate(timeout=10)[0].strip() == "True"


def test_a_grant_given_anew_is_not_the_old_one(worker: Worker) -> None:
    worker.grant(15, f"{USER}\n")
    process = worker.start("call('import time; time.sleep(60)')", job=15)
    worker.one_that_serves()
    worker.grant(15, f"{OTHER}\n")
    worker.wait_until_none_runs()
    assert process.wait(10) != 0
    worker.revoke(15)


def test_what_a_call_leaves_running_ends_with_it(worker: Worker) -> None:
    leave = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
"""
    began = time.monotonic()
    worker.python(f"call({leave!r})")
    worker.wait_until_none_runs()
    assert time.monotonic() - began < 5


def test_a_call_that_says_it_has_returned_and_goes_on_is_ended_at_once(worker: Worker) -> None:
    program = f"""
began = time.monotonic()
try:
    call({GOES_ON!r})
except ProcessDied as error:
    print("without a result" in str(error), time.monotonic() - began < 5)
"""
    assert worker.python(program) == "True True"
    told = time.monotonic()
    worker.wait_until_none_runs()
    assert time.monotonic() - told < 3


def test_a_process_that_is_never_ready_is_an_error_that_says_so(worker: Worker) -> None:
    answer = worker.python("print(refusal(profile='no-answer'))")
    assert "'sandbox'" in answer
    assert "could not be started" in answer


def test_the_agent_killed_takes_sandboxes_with_it_and_sweeps_when_it_is_back(worker: Worker) -> None:
    program = """
try:
    call("import time; time.sleep(60)")
except DelegateFunctionException as error:
    print("agent went away" in str(error) or str(error))
"""
    process = worker.start(program)
    container = worker.one_that_serves()["Id"]
    run([docker_cli(), "kill", "--signal", "KILL", worker.agent.name], timeout_s=30)
    worker.wait_until_none_runs()
    assert process.communicate(timeout=10)[0].strip() == "True"
    assert worker.sandboxes() == [container], "a dead one is left, for nobody is there to remove it"
    run([docker_cli(), "start", worker.agent.name], timeout_s=30)
    worker.wait_until_none_is_left()
    worker.agent.wait_until_healthy()
    assert worker.python("print(call('result = 1'))") == "1"


def test_the_agent_told_to_end_leaves_nothing(worker: Worker) -> None:
    process = worker.start("call('import time; time.sleep(60)')")
    worker.one_that_serves()
    began = time.monotonic()
    worker.agent.stop()
    assert time.monotonic() - began < 5
    assert worker.sandboxes() == []
    assert process.wait(10) != 0
    run([docker_cli(), "start", worker.agent.name], timeout_s=30)
    worker.agent.wait_until_healthy()


def test_health_fails_when_the_agent_does_not_answer(worker: Worker) -> None:
    worker.agent.run("python3", "-m", "agent", "--check")
    stopped = subprocess.run(
        [docker_cli(), "exec", worker.agent.name, "python3", "-m", "agent", "--check", "--socket", "/tmp/none"],
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert stopped.returncode != 0


def test_log_says_what_was_served_and_complains_of_nothing(worker: Worker) -> None:
    worker.python("call('result = 1')")
    assert worker.agent.complaints(but="refused|profile no-answer") == []
    assert "exited 0 after" in worker.agent.log()


@pytest.mark.parametrize(
    "policy", ["", "version: 1\ncalls: {at_once: 1, per_user: 1}\nprofiles: {default: {privileged: true}}"]
)
def test_a_wrong_policy_is_no_start(start: Start, tmp_path: Path, policy: str) -> None:
    (tmp_path / "policy.yaml").write_text(policy)
    options = [
        "--volume",
        f"{tmp_path}/policy.yaml:/etc/cfiddle/policy.yaml:ro",
        "--volume",
        "/var/run/docker.sock:/var/run/docker.sock",
    ]
    agent = start("agent", options=options)
    assert agent.wait_until_ended() == 1
    assert "error: /etc/cfiddle/policy.yaml:" in agent.log()
