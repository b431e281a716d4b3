"""Attack 22: homes mounted from an address that is no worker's, and a setuid file that a worker's root left in one.

Homes of simulated workers are bind mounts, and this kernel may have no NFS. So what is exported to whom, and how it is
mounted, is read where it is written; what a setuid file gives is tried.
"""

import re
import uuid
from collections.abc import Iterator

import pytest

from cfiddle_cluster import homes
from live import LiveCluster, invoke
from samples import config

USER = "test_user1"
WORKERS = ("10.0.0.2", "10.0.0.3")


def test_homes_are_exported_to_the_cluster_s_machines_alone_and_not_to_their_root(cluster: LiveCluster) -> None:
    line = homes.exports(config(cluster.config.root, WORKER_ADDRS=" ".join(WORKERS)))
    path, *clients = line.split()
    assert path == "/srv/cfiddle-cluster/home"
    found = dict(re.fullmatch(r"([^()]+)\(([^()]+)\)", client).groups() for client in clients)  # type: ignore[union-attr]
    assert sorted(found) == ["10.0.0.1", *WORKERS], "addresses; no name that DNS answers for, no network, no *"
    for options in found.values():
        assert "root_squash" in options.split(",")
        assert not {"no_root_squash", "insecure", "all_squash", "crossmnt"} & set(options.split(","))


def test_homes_are_mounted_without_setuid_and_devices(cluster: LiveCluster) -> None:
    options = homes.volume_options(config(cluster.config.root, WORKER_ADDRS=" ".join(WORKERS)))["o"].split(",")
    assert {"nosuid", "nodev"} <= set(options)


def test_nobody_serves_files_without_having_been_told_to(cluster: LiveCluster) -> None:
    listening = cluster.user("cat /proc/net/tcp /proc/net/udp /proc/net/tcp6 /proc/net/udp6", USER).ok()
    ports = {int(number, 16) for number in re.findall(r"^ *\d+: [0-9A-F]+:([0-9A-F]{4})", listening, re.MULTILINE)}
    assert 8888 in ports, "the list is good for something"
    assert not ports & {111, 2049}


# An NFS server takes it from a port below 1024 which user somebody is: only a machine's root has one, it thinks.
TAKE_PORT = 'python3 -c \'import socket; socket.socket().bind(("", 700)); print("taken")\''


def test_user_has_no_port_that_servers_trust(cluster: LiveCluster) -> None:
    places = {
        "the users' node": cluster.user(TAKE_PORT, USER),
        "a job": cluster.user(["srun", "bash", "-c", TAKE_PORT], USER),
        "a container": cluster.user(["cm", "run", "--cmd", TAKE_PORT], USER),
    }
    cluster.user("cm stop && cm delete", USER)
    for place, said in places.items():
        assert said.exit_status != 0, f"{place}: {said.output}"
        assert "Permission denied" in said.output, f"{place}: {said.output}"


@pytest.fixture
def setuid_file(cluster: LiveCluster) -> Iterator[str]:
    """Give a shell in a user's home that is root's and setuid, put there by the root of a worker's slurmd."""
    path = f"/home/{USER}/.setuid-{uuid.uuid4().hex[:8]}"
    command = f"cp /bin/bash {path} && chown 0:0 {path} && chmod 6755 {path}"
    cluster.in_service("slurmd", command, cluster.workers[0]).ok()
    assert cluster.in_service("userhost", f"stat -c '%u %a' {path}").ok().strip() == "0 6755", (
        "else this proves nothing"
    )
    yield path
    cluster.in_service("slurmd", f"rm -f {path}", cluster.workers[0]).ok()


# -p: a shell that was given other rights keeps them.
WHO = "-p -c 'echo $EUID; grep ^NoNewPrivs /proc/self/status'"


def test_setuid_file_in_a_home_makes_nobody_root(cluster: LiveCluster, setuid_file: str) -> None:
    uid = cluster.ids(USER)[0]
    shell = invoke("shell", "--user", USER, "--command", f"{setuid_file} {WHO}").ok().split()
    step = cluster.user(f"srun {setuid_file} {WHO}", USER).ok().split()
    for found in (shell, step):
        assert found == [str(uid), "NoNewPrivs:", "1"]


def test_setuid_file_of_the_system_makes_nobody_root(cluster: LiveCluster) -> None:
    find = "find / -xdev -type f -perm /6000 -not -path '/proc/*' 2>/dev/null; grep NoNewPrivs /proc/self/status"
    shell = invoke("shell", "--user", USER, "--command", find).ok().split("\n")
    assert shell[0].split() == ["NoNewPrivs:", "1"], "no program of the users' node is setuid"
    step = cluster.user(["srun", "bash", "-c", "cat /proc/self/status"], USER).ok()
    assert re.search(r"^NoNewPrivs:\s+1$", step, re.MULTILINE)
