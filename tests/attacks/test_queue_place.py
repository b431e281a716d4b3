"""Attack 11: the service that tells places in the queue tells nothing of others' jobs, and no user stops it."""

import json
import re
import time
from collections.abc import Iterator

import pytest

from live import PATIENCE, LiveCluster

VICTIM, THIEF = "test_user1", "test_user2"
SOCKET = "/run/queue-place/socket"

ASK = f"""
import json, socket, sys

def ask(jobs):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect({SOCKET!r})  # waits where there are many, as a connect with a timeout would not
        connection.settimeout(10)
        connection.send(json.dumps({{"jobs": jobs}}).encode())
        return connection.recv(65536).decode()
"""

FLOOD = f"""
import array, os, socket, threading, time
PACKETS = [b"", b"[" * 4096, b"\\xff" * 100, b'{{"jobs": [' + b"9" * 4000 + b"]}}", b'{{"jobs": [1]}}', b"x" * 100000]
end = time.monotonic() + 8
def flood(number):
    speaks, held = number % 2, []
    while time.monotonic() < end:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(1)
        try:
            connection.connect({SOCKET!r})
            if speaks:
                descriptors = array.array("i", [0, 1, 2] * 30)
                packet = PACKETS[int(time.monotonic() * 1000) % len(PACKETS)]
                connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        except OSError:
            pass
        held = [*held[-10 if speaks else -200:], connection]
        if not speaks:
            time.sleep(0.01)  # those that say nothing stay for two seconds
threads = [threading.Thread(target=flood, args=(number,)) for number in range(8)]
print("begun", flush=True)
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.fixture
def waiting(cluster: LiveCluster) -> Iterator[int]:
    """Let a job of the victim's wait."""
    for worker in cluster.workers:
        cluster.wait_until_runs(cluster.sbatch("sleep 300", VICTIM, "-w", worker))
    yield cluster.sbatch("true", VICTIM)
    cluster.user(f"scancel -u {VICTIM}", VICTIM)


def _ask(cluster: LiveCluster, user: str, jobs: str) -> str:
    return cluster.python(f"{ASK}\nprint(ask({jobs}))", user).ok().strip()


def test_jobs_of_another_user_are_counted_and_nothing_else_is_told(cluster: LiveCluster, waiting: int) -> None:
    assert json.loads(_ask(cluster, VICTIM, str([waiting])))["jobs"][str(waiting)]["place"] == 1
    assert json.loads(_ask(cluster, THIEF, f"list(range({waiting} - 50, {waiting} + 50))")) == {"of": 1, "jobs": {}}


def test_another_user_s_name_in_a_request_is_refused(cluster: LiveCluster, waiting: int) -> None:
    uid, _ = cluster.ids(VICTIM)
    request = json.dumps({"jobs": [waiting], "uid": uid})
    program = ASK.replace('json.dumps({"jobs": jobs})', repr(request))
    assert cluster.python(f"{program}\nprint(ask([]))", THIEF).stdout.strip() == ""


def test_the_socket_is_nobody_else_s_to_replace(cluster: LiveCluster) -> None:
    for command in (
        f"rm -f {SOCKET}",
        f"mv {SOCKET} /tmp/socket",
        f"ln -sf /tmp/x {SOCKET}",
        "touch /run/queue-place/x",
    ):
        assert cluster.user(command, THIEF).exit_status != 0, command
    assert json.loads(_ask(cluster, THIEF, "[]"))["jobs"] == {}


def test_flood_of_garbage_and_silence_is_bounded_and_others_are_answered(cluster: LiveCluster, waiting: int) -> None:
    [pid] = cluster.in_service("userhost", "pgrep -f queue_place[.]py").ok().split()
    before, began = _asked(cluster), time.monotonic()
    enemy = cluster.background(["python3", "-c", FLOOD], THIEF)
    enemy.wait_for_line("begun")
    answered = 0
    while enemy.process.poll() is None:
        assert json.loads(_ask(cluster, VICTIM, str([waiting])))["jobs"][str(waiting)]["place"] == 1
        answered += 1
        status = cluster.in_service("userhost", f"grep VmRSS /proc/{pid}/status; ls /proc/{pid}/fd | wc -l").ok()
        megabytes, descriptors = int(status.split()[1]) / 1024, int(status.split()[-1])
        assert megabytes < 40
        assert descriptors < 20
    assert enemy.wait().exit_status == 0
    assert answered >= 3
    asked = _asked(cluster) - before
    assert 0 < asked <= time.monotonic() - began + 2 * PATIENCE


def _asked(cluster: LiveCluster) -> int:
    """Return how often the service has asked Slurm for the queue."""
    text = cluster.slurm("sdiag")
    found = re.search(r"^\s*slurm\s+\(\s*802\) count:(\d+)", text, re.MULTILINE)
    return int(found[1]) // 2 if found else 0  # squeue speaks to slurmctld twice
