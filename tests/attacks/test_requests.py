"""Attacks 5 and 6: the agent asked by hand, from a job step, for more than there is and for what is somebody else's."""

import json

import pytest

from agent import wire
from live import LiveCluster, wait_until

# A request to the agent by hand: any fields, any job.
REQUEST = """
import array, json, os, socket, sys
agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
agent.settimeout(20)
agent.connect("/run/cfiddle-agent/agent.sock")
channel, _ = socket.socketpair()
_, write = os.pipe()
request = {"v": VERSION, "type": "call", "id": os.urandom(16).hex(), "profile": "default"}
request |= {"job": int(os.environ["SLURM_JOB_ID"])} | json.loads(sys.argv[1])
given = array.array("i", [channel.fileno(), write, write])
agent.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
answer = json.loads(agent.recv(65536) or b"{}")
print(answer.get("code") or answer.get("type"), answer.get("message", ""))
""".replace("VERSION", str(wire.VERSION))


def _ask(cluster: LiveCluster, fields: dict[str, object], *options: str, user: str = "test_user1") -> str:
    argv = ["srun", *options, "python3", "-I", "-c", REQUEST, json.dumps(fields)]
    return cluster.user(argv, user).ok().strip()


def test_one_s_own_job_is_served(cluster: LiveCluster) -> None:
    assert _ask(cluster, {}) == "started"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        pytest.param({"image": "debian"}, "field", id="image"),
        pytest.param({"mounts": ["/:/host"]}, "field", id="mounts"),
        pytest.param({"uid": 0}, "field", id="uid"),
        pytest.param({"profile": "-v/:/host"}, "field", id="dash"),
        pytest.param({"profile": "default\n--privileged"}, "field", id="newline"),
        pytest.param({"profile": "default\0"}, "field", id="NUL"),
        pytest.param({"job": "1; id"}, "field", id="semicolon"),
        pytest.param({"id": "../" * 10 + "aa"}, "field", id="dots"),
        pytest.param({"type": "exec"}, "field", id="type"),
    ],
)
def test_what_is_smuggled_into_a_request_is_refused(cluster: LiveCluster, fields: dict[str, object], code: str) -> None:
    assert _ask(cluster, fields).startswith(f"{code} ")


def test_newer_version_is_refused_and_the_known_ones_are_named(cluster: LiveCluster) -> None:
    answer = _ask(cluster, {"v": wire.VERSION + 1})
    assert answer.startswith("version ")
    assert f"known: {', '.join(map(str, wire.VERSIONS))}" in answer


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
        # A machine with one CPU has no room for a second job, but its user can be there all the same.
        asking = _ask_beside(cluster, held, cluster.workers[0])
        assert asking.startswith("job "), asking
    finally:
        cluster.user(["scancel", str(held)], "test_user2").ok()


def _ask_beside(cluster: LiveCluster, job: int, worker: str) -> str:
    """Ask as test_user1 for another's job, from where that user's job steps run."""
    uid, gid = cluster.ids("test_user1")
    program = REQUEST.replace('int(os.environ["SLURM_JOB_ID"])', str(job))
    argv = ["docker", "exec", "-u", f"{uid}:{gid}", cluster.container("slurmd", worker)]
    return cluster.on_worker(worker, [*argv, "python3", "-I", "-c", program, "{}"]).ok().strip()


@pytest.mark.parametrize("job", [1, 999999, 2**31])
def test_no_job_no_sandbox(cluster: LiveCluster, job: int) -> None:
    assert _ask(cluster, {"job": job}).startswith("job ")


def test_job_that_ended_is_refused(cluster: LiveCluster) -> None:
    node = f"--nodelist={cluster.workers[0]}"
    ended = int(cluster.user(["srun", node, "printenv", "SLURM_JOB_ID"], "test_user1").ok())
    cluster.wait_until_idle()
    assert _ask(cluster, {"job": ended}, node).startswith("job ")
