"""The firewall on a machine with an engine: a member gets through to what is the cluster's, and a stranger does not."""

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cfiddle_cluster import firewall
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import LABEL, Config
from cfiddle_cluster.firewall import Wall
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State
from containers import Container, Start, machine_options
from live import wait_until
from samples import config

SUBNET, SUBNET6 = "10.77.0.0/24", "fd77::/64"
HEAD, MEMBER, STRANGER = 1, 2, 3
"""The last numbers of their addresses; the bridge's own is another."""
CLOSED = {"tcp": [111, 662, 2049, 2377, 5000, 5001, 7946], "udp": [111, 662, 2049, 4789, 7946]}
PUBLISHED = {5001, 8888}
"""Those that a container listens on, not the machine."""
SOMEBODY_S = 9999
ALL = [f"{protocol} {port}" for protocol, ports in CLOSED.items() for port in ports]
FOR_EVERYBODY = ["tcp 22", "tcp 8888", f"tcp {SOMEBODY_S}"]
SLURMCTLD, USER_S = 6817, 20000

SERVE = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for word in sys.argv[1:]:
    protocol, port = word.split(":")
    server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", int(port)))
    if protocol == "tcp":
        server.listen()
    selector.register(server, selectors.EVENT_READ, protocol)
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        if key.data == "tcp":
            with key.fileobj.accept()[0] as connection:
                connection.sendall(b"here")
        else:
            key.fileobj.sendto(b"here", key.fileobj.recvfrom(64)[1])
"""
ASK = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
address, *words = sys.argv[1:]

def answers(word):
    protocol, port = word.split(":")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM) as asking:
        asking.settimeout(1.5)
        try:
            asking.connect((address, int(port)))
            asking.send(b"hello") if protocol == "udp" else None
            return bool(asking.recv(4))
        except OSError:
            return False

with ThreadPoolExecutor(max_workers=32) as pool:
    print(json.dumps([word.replace(":", " ") for word, is_there in zip(words, pool.map(answers, words)) if is_there]))
"""


@dataclass(frozen=True)
class Network:
    """A head that has everything open that a cluster has, a member, and a stranger, on one switch.

    Attributes:
        head: a container that is a machine, with an engine.
        others: the containers of the others, by the last number of their address.
        machine: the head as the administrator's side drives it.
        settings: config.sh there.
        services: the container in the services' network, by its address there.
    """

    head: Container
    others: dict[int, Container]
    machine: Machine
    settings: Config
    services: str

    def answering(self, who: int, ports: Sequence[str], *, address: str = "") -> list[str]:
        """Return which of these ports answer somebody."""
        words = [port.replace(" ", ":") for port in ports]
        return list(json.loads(self.others[who].run("python3", "-c", ASK, address or _address(HEAD), *words)))

    def rules(self, kind: str = "") -> str:
        """Return everything that is in the kernel's tables, without counters."""
        saved = self.head.run("sh", "-c", f"iptables{kind}-save; ip6tables{kind}-save")
        return "\n".join(line.partition(" [")[0] for line in saved.splitlines() if not line.startswith("#"))

    def use(self, kind: str) -> None:
        """Let iptables be one of its two kinds."""
        for tables in ("iptables", "ip6tables"):
            self.head.run("update-alternatives", "--quiet", "--set", tables, f"/usr/sbin/{tables}-{kind}")


def _address(number: int) -> str:
    return SUBNET.replace("0/24", str(number + 10))


def _address6(number: int) -> str:
    return SUBNET6.replace("/64", str(number + 10))


@pytest.fixture(scope="module")
def switch() -> Iterator[str]:
    name = f"cfiddle-test-{uuid.uuid4().hex[:8]}"
    subnets = ["--subnet", SUBNET, "--ipv6", "--subnet", SUBNET6]
    run([docker_cli(), "network", "create", "--label", LABEL, *subnets, name], timeout_s=30)
    yield name
    # Containers go after what they are on, so they leave it first.
    left = run([docker_cli(), "ps", "--all", "--quiet", "--filter", f"network={name}"], timeout_s=30).split()
    for container in left:
        run([docker_cli(), "network", "disconnect", "--force", name, container], timeout_s=30)
    run([docker_cli(), "network", "rm", name], timeout_s=30)


@pytest.fixture(scope="module")
def network(
    start_for_all: Start, image: Callable[[str], str], switch: str, tmp_path_factory: pytest.TempPathFactory
) -> Network:
    key = tmp_path_factory.mktemp("keys") / "key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], timeout_s=30)

    def plugged(number: int) -> list[str]:
        return ["--network", switch, "--ip", _address(number), "--ip6", _address6(number)]

    head = start_for_all("machine", options=[*machine_options(key.with_suffix(".pub")), *plugged(HEAD)])
    others = {
        number: start_for_all("common", "python3", "-c", SERVE, "tcp:5000", options=plugged(number))
        for number in (MEMBER, STRANGER)
    }
    head.wait_until_healthy()
    with subprocess.Popen([docker_cli(), "save", image("common")], stdout=subprocess.PIPE) as save:
        argv = [docker_cli(), "exec", "-i", head.name, "docker", "load", "--quiet"]
        subprocess.run(argv, stdin=save.stdout, check=True, timeout=120, capture_output=True)
    for bridge in ("docker_gwbridge", "cfiddle-users"):
        option = f"com.docker.network.bridge.name={bridge}"
        head.run("docker", "network", "create", "--opt", option, bridge)

    def serve(name: str, options: Sequence[str], ports: Sequence[str]) -> None:
        argv = ["docker", "run", "--detach", "--name", name, *options, image("common"), "python3", "-c", SERVE, *ports]
        head.run(*argv)
        wait_until(lambda: "ready" in head.run("docker", "logs", name), timeout_s=30, what=f"{name} serves")

    own = [f"{protocol}:{port}" for protocol, ports in CLOSED.items() for port in ports if port not in PUBLISHED]
    serve("machine", ["--network", "host"], [*own, f"tcp:{SOMEBODY_S}"])
    published = [word for port in PUBLISHED for word in ("--publish", f"{port}:{port}")]
    ports = [*(f"tcp:{port}" for port in PUBLISHED), f"tcp:{SLURMCTLD}"]
    serve("services", ["--network", "docker_gwbridge", *published], ports)
    serve("user", ["--network", "cfiddle-users", "--publish", f"0.0.0.0:{USER_S}:{USER_S}"], [f"tcp:{USER_S}"])
    # As where forwarding was on before the engine came, which then leaves it so.
    head.run("iptables", "--wait", "--policy", "FORWARD", "ACCEPT")
    form = '{{(index .NetworkSettings.Networks "docker_gwbridge").IPAddress}}'
    services = head.run("docker", "inspect", "--format", form, "services").strip()
    for other in others.values():
        net = f"--net=/proc/{other.inspect('{{.State.Pid}}')}/ns/net"
        run(["nsenter", net, "ip", "route", "add", f"{services}/32", "via", _address(HEAD)], timeout_s=30)
    there = (docker_cli(), "exec", "-i", head.name, "sh", "-c")
    machine = Machine(name="head", addr=_address(HEAD), roles=frozenset({"head"}), ssh=there)
    settings = config(Path("/"), HEAD_ADDR=_address(HEAD), WORKER_ADDRS=_address(MEMBER))
    return Network(head, others, machine, settings, services)


@pytest.fixture(params=["nft", "legacy"])
def walled(request: pytest.FixtureRequest, network: Network, tmp_path: Path) -> Iterator[State]:
    """Have the rules set, by one kind of iptables; they are gone after the test."""
    state = State(tmp_path)
    network.use(request.param)
    assert firewall.ensure(network.settings, state, [network.machine]) == []
    yield state
    assert firewall.remove([network.machine]) == []
    network.use("nft")


def _wall(network: Network, state: State) -> Wall:
    [wall] = firewall.survey(network.settings, state, [network.machine])
    assert isinstance(wall, Wall), wall
    return wall


def test_without_rules_everything_answers_everybody(network: Network) -> None:
    for address in (_address(HEAD), _address6(HEAD)):
        assert network.answering(STRANGER, [*ALL, *FOR_EVERYBODY], address=address) == [*ALL, *FOR_EVERYBODY]
    assert network.answering(STRANGER, [f"tcp {USER_S}"]) == [f"tcp {USER_S}"]
    assert network.answering(STRANGER, [f"tcp {SLURMCTLD}"], address=network.services) == [f"tcp {SLURMCTLD}"]


@pytest.mark.usefixtures("walled")
def test_member_reaches_all_and_a_stranger_what_is_for_everybody(network: Network) -> None:
    assert network.answering(MEMBER, [*ALL, *FOR_EVERYBODY]) == [*ALL, *FOR_EVERYBODY]
    assert network.answering(STRANGER, [*ALL, *FOR_EVERYBODY]) == FOR_EVERYBODY


@pytest.mark.usefixtures("walled")
def test_nobody_gets_around_by_ipv6(network: Network) -> None:
    for who in (MEMBER, STRANGER):
        assert network.answering(who, [*ALL, *FOR_EVERYBODY], address=_address6(HEAD)) == FOR_EVERYBODY


@pytest.mark.usefixtures("walled")
def test_ports_of_users_containers_answer_members(network: Network) -> None:
    assert network.answering(MEMBER, [f"tcp {USER_S}"]) == [f"tcp {USER_S}"]
    assert network.answering(STRANGER, [f"tcp {USER_S}"]) == []


@pytest.mark.usefixtures("walled")
def test_machine_is_no_way_into_the_services_network(network: Network) -> None:
    for who in (MEMBER, STRANGER):
        assert network.answering(who, [f"tcp {SLURMCTLD}"], address=network.services) == []


@pytest.mark.usefixtures("walled")
def test_machine_and_its_services_reach_what_is_open_here(network: Network) -> None:
    places = [("services", _address(HEAD)), *(("machine", at) for at in (_address(HEAD), "127.0.0.1", "::1"))]
    for container, address in places:
        asking = ["python3", "-c", ASK, address, "tcp:2377", "tcp:5001"]
        answering = json.loads(network.head.run("docker", "exec", container, *asking))
        assert answering == ["tcp 2377", "tcp 5001"], (container, address)


@pytest.mark.usefixtures("walled")
def test_machine_and_its_containers_reach_the_world(network: Network) -> None:
    asking = ["python3", "-c", ASK, _address(STRANGER), "tcp:5000"]
    for container in ("machine", "services", "user"):
        assert json.loads(network.head.run("docker", "exec", container, *asking)) == ["tcp 5000"], container


def test_what_is_set_is_seen_to_be_set(network: Network, walled: State) -> None:
    wall = _wall(network, walled)
    assert (wall.state, wall.differences) == ("set", [])
    assert wall.kept == "never"
    assert wall.closed == CLOSED
    network.head.run("iptables", "--wait", "-t", "mangle", "-D", firewall.MEMBERS, "-j", "DROP")
    assert _wall(network, walled).differences == [f"lacks: iptables -A {firewall.MEMBERS} -j DROP"]
    assert network.answering(STRANGER, ["tcp 2377"]) == ["tcp 2377"]
    assert firewall.ensure(network.settings, walled, [network.machine]) == []
    assert network.answering(STRANGER, ["tcp 2377"]) == []


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_other_people_s_rules_stay_and_ours_leave_nothing(network: Network, tmp_path: Path, kind: str) -> None:
    network.use(kind)
    # A table is there, and listed, from its first rule on.
    for tables in ("iptables", "ip6tables"):
        for change in ("-A", "-D"):
            network.head.run(tables, "--wait", "-t", "mangle", change, "PREROUTING", "-j", "ACCEPT")
    network.head.run("iptables", "--wait", "-t", "mangle", "-A", "PREROUTING", "-s", "10.9.9.9", "-j", "DROP")
    before = network.rules(f"-{kind}")
    for _ in range(2):
        assert firewall.ensure(network.settings, State(tmp_path), [network.machine]) == []
        network.machine.script(firewall.SCRIPT.read_text(), ["", "set", "", "", *_texts(network)], timeout_s=30)
        once = network.rules(f"-{kind}").splitlines()
        assert once.count(f"-A PREROUTING -j {firewall.PORTS}") == 2  # in both families
        assert [line for line in before.splitlines() if line not in once] == []
    assert firewall.remove([network.machine, network.machine]) == []
    assert network.rules(f"-{kind}") == before
    network.head.run("iptables", "--wait", "-t", "mangle", "-D", "PREROUTING", "-s", "10.9.9.9", "-j", "DROP")
    network.use("nft")


def _texts(network: Network) -> list[str]:
    members = [_address(HEAD), _address(MEMBER)]
    return [firewall.to_restore(firewall.rules(CLOSED, members, tables=name)) for name in ("iptables", "ip6tables")]


def test_rules_come_back_by_what_is_kept_for_systemd(network: Network, tmp_path: Path) -> None:
    state, head = State(tmp_path), network.head
    head.run("mkdir", "-p", "/run/systemd/system")
    # It stands for systemd's: a unit is enabled while there is a file that says so.
    systemctl = "case $1 in enable) >/enabled ;; disable) rm /enabled ;; is-enabled) [ -e /enabled ] ;; esac"
    head.run("sh", "-c", "cat >/usr/bin/systemctl; chmod +x /usr/bin/systemctl", input=f"#!/bin/sh\n{systemctl}\n")
    try:
        assert firewall.ensure(network.settings, state, [network.machine]) == []
        assert (_wall(network, state).state, _wall(network, state).kept) == ("set", "yes")
        head.run("sh", "-c", "iptables -t mangle -F; iptables -t mangle -X; ip6tables -t mangle -F")
        assert network.answering(STRANGER, ["tcp 2377"]) == ["tcp 2377"]
        unit = head.run("cat", "/etc/systemd/system/cfiddle-firewall.service")
        [command] = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("ExecStart=")]
        head.run("sh", "-c", command)
        assert network.answering(STRANGER, ["tcp 2377"]) == []
        assert _wall(network, state).state == "set"
        head.run("rm", "/enabled")
        assert _wall(network, state).differences == ["would lose its rules when it starts anew"]
    finally:
        head.run("touch", "/enabled")
        assert firewall.remove([network.machine]) == []
    left = head.run("sh", "-c", "ls -d /enabled /etc/cfiddle-firewall /etc/systemd/system/cfiddle-firewall* || true")
    assert left == ""
    head.run("rm", "-r", "/run/systemd")
