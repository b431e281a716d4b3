"""Attack 15: database and slurmdbd are tried from a sandbox, a job step and the userhost."""

import json

from live import LiveCluster, docker

KNOCK = r"""
import socket, sys
answering = []
for place in sys.argv[1:]:
    host, port = place.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=2) as server:
            # MariaDB speaks first. A proxy on the way out of the cluster may take any connection, and then say nothing.
            if port != "3306" or server.recv(100):
                answering.append(place)
    except OSError:
        pass
print("answering", sorted(answering))
"""

IN_SANDBOX = """
import sys
from delegate_function import SandboxDelegate, SlurmDelegate

class Knock:
    def run(self, text, places):
        sys.argv = ["knock", *places]
        exec(text, {"__name__": "knock"})

SlurmDelegate(SandboxDelegate()).invoke(Knock(), "run", sys.argv[1], sys.argv[2:])
"""


def _addresses(cluster: LiveCluster, service: str) -> list[str]:
    said = json.loads(docker("inspect", cluster.container(service)).ok())[0]
    return [service, *(network["IPAddress"] for network in said["NetworkSettings"]["Networks"].values())]


def _bridge_addresses(cluster: LiveCluster, service: str) -> list[str]:
    # Every task has an address on docker_gwbridge too.
    return cluster.in_service(service, "hostname -I").ok().split()


def test_database_is_reached_from_slurmdbd_alone(cluster: LiveCluster) -> None:
    hosts = dict.fromkeys(_addresses(cluster, "mysql") + _bridge_addresses(cluster, "mysql"))
    places = [f"{host}:3306" for host in hosts] + [f"{cluster.config.head_addr}:3306"]
    knocks = {
        "userhost": ["python3", "-c", KNOCK],
        "job step": ["srun", "python3", "-c", KNOCK],
        "sandbox": ["python3", "-c", IN_SANDBOX, KNOCK],
    }
    said = {where: cluster.user([*knock, *places], timeout_s=120).ok().strip() for where, knock in knocks.items()}
    assert said == dict.fromkeys(knocks, "answering []")
    script = f"python3 - {' '.join(places)} <<'END'\n{KNOCK}\nEND"
    assert "mysql:3306" in cluster.in_service("slurmdbd", script).ok(), "the knocker is good for something"


def test_slurmdbd_is_not_reached_from_a_sandbox(cluster: LiveCluster) -> None:
    hosts = dict.fromkeys(_addresses(cluster, "slurmdbd") + _bridge_addresses(cluster, "slurmdbd"))
    hosts |= dict.fromkeys([*_addresses(cluster, "slurmctld"), cluster.config.head_addr])
    places = [f"{host}:{port}" for host in hosts for port in (6817, 6818, 6819)]
    result = cluster.user(["python3", "-c", IN_SANDBOX, KNOCK, *places], timeout_s=200)
    assert result.ok().strip() == "answering []"


def test_slurmdbd_tells_a_user_their_own_and_takes_no_orders(cluster: LiveCluster) -> None:
    job = cluster.sbatch("true", "test_user1")
    cluster.wait_for_state(job, "COMPLETED")
    assert str(job) not in cluster.user("sacct -a -X -n -P -o JobID -S now-1day", "test_user2").ok().split()
    show = "sacctmgr -n -P show user format=User,AdminLevel; sacctmgr -n -P show assoc format=User,Account,Fairshare"
    before = cluster.slurm(show)
    for command in (
        "sacctmgr -i delete user test_user1",
        "sacctmgr -i add account mine",
        "sacctmgr -i add user mallory account=users",
        "sacctmgr -i delete cluster cfiddle",
        "sacctmgr -i modify user test_user2 set adminlevel=Operator",
    ):
        cluster.user(command, "test_user2", timeout_s=60)
    assert cluster.slurm(show) == before


def test_secrets_are_nowhere_a_user_can_read(cluster: LiveCluster) -> None:
    look = "cat /run/secrets/* /etc/slurm/* /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null; true"
    for text in (cluster.user(look, "test_user1").ok(), cluster.user(["srun", "bash", "-c", look], "test_user1").ok()):
        for name in ("database-password", "jupyter-token"):
            assert cluster.state.secret(name).strip() not in text, name
