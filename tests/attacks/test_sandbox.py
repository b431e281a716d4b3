"""Sandboxes of the live cluster, from inside and from a job step: nobody gets out, nobody gets another's."""

import json
import time

import pytest

from hostile import ABUSES, ESCAPE, VIEW, check_view, program
from live import LiveCluster, wait_until

# A request to the agent by hand, from a job step: any fields, any job.
REQUEST = """
import array, json, os, socket, sys
agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
agent.settimeout(20)
agent.connect("/run/cfiddle-agent/agent.sock")
channel, _ = socket.socketpair()
_, write = os.pipe()
request = {"v": 2, "type": "call", "id": os.urandom(16).hex(), "profile": "default"}
request |= {"job": int(os.environ["SLURM_JOB_ID"])} | json.loads(sys.argv[1])
given = array.array("i", [channel.fileno(), write, write])
agent.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
answer = json.loads(agent.recv(65536) or b"{}")
print(answer.get("code") or answer.get("type"), answer.get("message", ""))
"""


def _ask(cluster: LiveCluster, fields: dict[str, object], user: str = "test_user1") -> str:
    return cluster.user(["srun", "python3", "-I", "-c", REQUEST, json.dumps(fields)], user).ok().strip()


def test_call_sees_a_sandbox_around_it(cluster: LiveCluster) -> None:
    check_view(json.loads(cluster.python(program(VIEW, through_slurm=True), "test_user1").ok()))


def test_every_way_out_is_closed(cluster: LiveCluster) -> None:
    assert json.loads(cluster.python(program(ESCAPE, through_slurm=True), "test_user1").ok()) == {}


def test_one_s_own_job_is_served(cluster: LiveCluster) -> None:
    assert _ask(cluster, {}) == "started"


def test_job_of_another_user_on_the_same_node_is_refused(cluster: LiveCluster) -> None:
    node = "--nodelist=" + cluster.workers[0]
    held = cluster.sbatch("srun sleep 60", "test_user2", "--partition=shared", "--ntasks=1", node)
    try:
        cluster.wait_until_runs(held)
        grant = f"test -e /run/cfiddle-grants/{held}"
        wait_until(
            lambda: cluster.in_service("slurmd", grant, cluster.workers[0]).exit_status == 0,
            timeout_s=20,
            what="the other's job has its grant",
        )
        srun = ["srun", "--partition=shared", "--ntasks=1", node, "python3", "-I", "-c", REQUEST]
        assert cluster.user([*srun, json.dumps({"job": held})], "test_user1").ok().startswith("job ")
    finally:
        cluster.user(["scancel", str(held)], "test_user2").ok()


@pytest.mark.parametrize("job", [1, 999999, 2**31])
def test_no_job_no_sandbox(cluster: LiveCluster, job: int) -> None:
    assert _ask(cluster, {"job": job}).startswith("job ")


def test_job_that_ended_is_refused(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    ended = int(cluster.user(["srun", f"--nodelist={worker}", "printenv", "SLURM_JOB_ID"], "test_user1").ok())
    cluster.wait_until_idle()
    argv = ["srun", f"--nodelist={worker}", "python3", "-I", "-c", REQUEST, json.dumps({"job": ended})]
    assert cluster.user(argv, "test_user1").ok().startswith("job ")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"image": "debian"}, "field"),
        ({"mounts": ["/:/host"]}, "field"),
        ({"v": 1}, "version"),
        ({"profile": "-v/:/host"}, "field"),
        ({"profile": "default\n--privileged"}, "field"),
        ({"job": "1; id"}, "field"),
        ({"id": "../" * 10 + "aa"}, "field"),
    ],
)
def test_what_is_smuggled_into_a_request_is_refused(cluster: LiveCluster, fields: dict[str, object], code: str) -> None:
    assert _ask(cluster, fields).startswith(f"{code} ")


@pytest.mark.parametrize("name", ABUSES)
def test_abuse_is_contained_and_the_next_job_starts_in_normal_time(cluster: LiveCluster, name: str) -> None:
    abuse = ABUSES[name]
    text = cluster.python(abuse.program(through_slurm=True, within_s=20), "test_user1").ok()
    assert text.strip() == abuse.outcome
    cluster.wait_until_idle(timeout_s=10)
    began = time.monotonic()
    cluster.user(["srun", f"--nodelist={cluster.workers[0]}", "true"], "test_user2").ok()
    assert time.monotonic() - began < 3


def test_deaf_call_of_a_cancelled_job_is_gone_within_two_seconds(cluster: LiveCluster) -> None:
    running = cluster.background(
        ["python3", "-c", program(_DEAF_FOR_LONG, through_slurm=True, seconds=120)], "test_user1"
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
