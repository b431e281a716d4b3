"""Attack 9: the engine's socket is hunted from the userhost, a job step and a sandbox; only the agent has it."""

import json

import pytest

from live import SERVICES, LiveCluster, docker

HUNT = r"""
import os, socket, stat, sys

def answers(address):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(address)
            client.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b"Api-Version" in client.recv(4096)
        except OSError:
            return False

found, looked = [], 0
places = {"/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock"}
with open("/proc/net/unix") as sockets:
    for line in sockets.readlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8:
            name = fields[7].rstrip("\n")
            places.add("\0" + name[1:] if name.startswith("@") else name)
roots = ["/"] + [f"/proc/{pid}/root/" for pid in os.listdir("/proc") if pid.isdigit()]
for root in roots:
    for top, folders, files in os.walk(root):
        if top.startswith(("/proc/", "/sys/")) and root == "/":
            folders.clear()
            continue
        if top.count("/") > 8 or top.endswith(("/site-packages", "/usr/share", "/proc", "/sys")):
            folders.clear()
        looked += 1
        for name in files:
            path = os.path.join(top, name)
            try:
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    places.add(path)
            except OSError:
                pass
found = sorted(repr(place) for place in places if len(place) < 107 and answers(place))
with open("/proc/self/mountinfo") as mounts:
    found += [line.split()[4] for line in mounts if "docker.sock" in line]
for port in (2375, 2376, 2377):
    for host in sys.argv[1:]:
        try:
            socket.create_connection((host, port), timeout=1).close()
            found.append(f"{host}:{port}")
        except OSError:
            pass
print("looked", looked > 100, "found", found)
"""

IN_SANDBOX = """
import sys
from delegate_function import SandboxDelegate, SlurmDelegate

class Hunt:
    def run(self, text):
        sys.argv = ["hunt"]
        exec(text, {"__name__": "hunt"})

SlurmDelegate(SandboxDelegate()).invoke(Hunt(), "run", sys.argv[1])
"""


def test_hunt_finds_the_socket_where_it_is(cluster: LiveCluster) -> None:
    text = cluster.in_service("agent", f"python3 - <<'END'\n{HUNT}\nEND", cluster.workers[0]).ok()
    assert "docker.sock" in text, "the hunter is good for something"


def test_no_socket_on_the_userhost(cluster: LiveCluster) -> None:
    assert cluster.python(HUNT, "test_user1", timeout_s=120).ok().strip() == "looked True found []"


def test_no_socket_in_a_job_step(cluster: LiveCluster) -> None:
    text = cluster.user(["srun", "python3", "-c", HUNT], "test_user1", timeout_s=120).ok()
    assert text.strip() == "looked True found []"


def test_no_socket_in_a_sandbox(cluster: LiveCluster) -> None:
    result = cluster.user(["python3", "-c", IN_SANDBOX, HUNT], "test_user1", timeout_s=120)
    assert result.ok().strip() == "looked True found []"


@pytest.mark.parametrize("service", SERVICES)
def test_only_the_agent_has_it_and_nobody_is_privileged(cluster: LiveCluster, service: str) -> None:
    if service in ("slurmd", "agent"):
        worker = cluster.workers[0]
        text = cluster.on_worker(worker, ["docker", "inspect", cluster.container(service, worker)]).ok()
    else:
        text = docker("inspect", cluster.container(service)).ok()
    said = json.loads(text)[0]
    assert not said["HostConfig"]["Privileged"]
    assert not said["HostConfig"]["CapAdd"]
    assert ("docker.sock" in json.dumps(said["Mounts"])) == (service == "agent")
    assert said["HostConfig"]["PidMode"] == ""
