"""Which ports are for members, who is one, and what an administrator sees; the rules themselves run in tests/images."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cfiddle_cluster import firewall
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.firewall import FORWARD, MEMBERS, PORTS, Wall
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State
from samples import config, machine

HEAD = machine("head", "head", addr="10.0.0.1")
C1, C2 = machine("c1", addr="10.0.0.2"), machine("c2", addr="10.0.0.3")


class World:
    """Machines that answer as firewall.sh does."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = State(tmp_path / "state")
        self.state.directory.mkdir()
        self.config = config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3")
        self.rules: dict[str, dict[str, list[str]]] = {}
        self.sources = {"10.0.0.1": ["10.0.0.1"], "10.0.0.2": ["10.0.0.2"], "10.0.0.3": ["10.0.0.3"]}
        self.kept = "yes"
        self.silent: set[str] = set()
        self.did: list[str] = []
        monkeypatch.setattr(Machine, "script", lambda found, _text, args=(), **_: self._script(found, args))

    def _script(self, found: Machine, args: Sequence[str]) -> str:
        if found.addr in self.silent:
            raise ClusterError(f"{found.addr} cannot be reached", "switch it on")
        root, what, *words = args
        assert root == ""
        rules = self.rules.setdefault(found.addr, {"iptables": [], "ip6tables": []})
        if what == "look":
            assert set(words) <= {"10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.3"}
            lines = [f"name {found.name}", *(f"source {source}" for source in self.sources[found.addr])]
            for tables, there in rules.items():
                lines += [f"family {tables}", f"{tables} -N {PORTS}", *(f"{tables} {rule}" for rule in there)]
            return "\n".join([*lines, f"kept {self.kept}"])
        self.did.append(f"{what} {found.name}")
        texts = words[2:] if what == "set" else ["", ""]
        for tables, text in zip(rules, texts, strict=True):
            rules[tables] = [
                line.replace("-I", "-A", 1) for line in text.splitlines() if line and not line.startswith(":")
            ]
        return ""

    def ensure(self) -> list[str]:
        return [silent.machine.addr for silent in firewall.ensure(self.config, self.state, [HEAD, C1, C2])]

    def walls(self) -> list[Wall]:
        return [wall for wall in firewall.survey(self.config, self.state, [HEAD, C1, C2]) if isinstance(wall, Wall)]

    def text(self) -> str:
        walls = firewall.survey(self.config, self.state, [HEAD, C1, C2])
        return firewall.text(self.config, self.state, walls)

    def let_in(self, addr: str) -> list[str]:
        rules = self.rules[addr]["iptables"]
        return [rule.split()[3].removesuffix("/32") for rule in rules if rule.startswith(f"-A {MEMBERS} -s ")]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# --- the rules -------------------------------------------------------------------------------------------------------


def _config(tmp_path: Path, **settings: str) -> Config:
    return config(tmp_path, **{"WORKER_ADDRS": "10.0.0.2", **settings})


def test_head_has_more_to_close_than_a_worker(tmp_path: Path) -> None:
    found = _config(tmp_path)
    assert firewall.closed(found, HEAD) == {
        "tcp": [111, 662, 2049, 2377, 5000, 5001, 7946],
        "udp": [111, 662, 2049, 4789, 7946],
    }
    assert firewall.closed(found, C1) == {"tcp": [2377, 7946], "udp": [4789, 7946]}


@pytest.mark.parametrize(
    ("settings", "tcp"),
    [
        ({"HOME_SERVER": "10.0.0.9"}, [2377, 5000, 5001, 7946]),
        ({"DOCKERHUB_USERNAME": "ada"}, [111, 662, 2049, 2377, 5001, 7946]),
        ({"WORKER_ADDRS": "", "USER_REGISTRY_PORT": "6001", "REGISTRY_PORT": "6000"}, [2377, 6000, 6001, 7946]),
    ],
    ids=["homes elsewhere", "images elsewhere", "simulated workers"],
)
def test_what_the_cluster_has_not_is_not_closed(tmp_path: Path, settings: dict[str, str], tcp: list[int]) -> None:
    assert firewall.closed(_config(tmp_path, **settings), HEAD)["tcp"] == tcp


def test_what_people_reach_is_never_closed(tmp_path: Path) -> None:
    found = firewall.closed(_config(tmp_path, JUPYTER_PORT="2377", SSH_PORT="7946", REGISTRY_PORT="22"), HEAD)
    assert found["tcp"] == [111, 662, 2049, 5001]


def test_no_rule_names_no_port() -> None:
    assert not [rule for rule in firewall.rules({"tcp": [], "udp": [4789]}, []) if " -p tcp " in rule]


def test_rules_are_these() -> None:
    assert firewall.rules({"tcp": [2377], "udp": [4789, 7946]}, ["10.0.0.1", "172.31.240.0/24"]) == [
        f"-A PREROUTING -j {PORTS}",
        f"-A FORWARD -j {FORWARD}",
        f"-A {PORTS} -p tcp -m addrtype ! --dst-type UNICAST -m multiport --dports 2377 -j {MEMBERS}",
        f"-A {PORTS} -p udp -m addrtype ! --dst-type UNICAST -m multiport --dports 4789,7946 -j {MEMBERS}",
        f"-A {FORWARD} -o docker_gwbridge -m conntrack ! --ctstate DNAT --ctdir ORIGINAL -j DROP",
        f"-A {FORWARD} -o cfiddle-users -j {MEMBERS}",
        f"-A {MEMBERS} -i lo -j RETURN",
        f"-A {MEMBERS} -i docker_gwbridge -j RETURN",
        f"-A {MEMBERS} -m conntrack --ctdir REPLY -j RETURN",
        f"-A {MEMBERS} -s 10.0.0.1/32 -j RETURN",
        f"-A {MEMBERS} -s 172.31.240.0/24 -j RETURN",
        f"-A {MEMBERS} -j DROP",
    ]


def test_by_ipv6_nobody_is_a_member() -> None:
    found = firewall.rules({"tcp": [2377], "udp": [4789]}, ["10.0.0.1"], tables="ip6tables")
    assert not [rule for rule in found if " -s " in rule]
    assert f"-A {PORTS} -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 2377 -j {MEMBERS}" in found


def test_chains_are_made_anew_and_come_before_others_rules() -> None:
    lines = firewall.to_restore(firewall.rules({"tcp": [2377], "udp": [4789]}, [])).splitlines()
    assert lines[:5] == [
        *(f":{chain} - [0:0]" for chain in (PORTS, FORWARD, MEMBERS)),
        f"-I PREROUTING -j {PORTS}",
        f"-I FORWARD -j {FORWARD}",
    ]
    assert all(line.startswith("-A CFIDDLE-") for line in lines[5:])


# --- the machines ----------------------------------------------------------------------------------------------------


def test_all_machines_get_the_rules_once(world: World) -> None:
    assert not firewall.is_set(world.state)
    assert world.ensure() == []
    assert sorted(world.did) == ["set c1", "set c2", "set head"]
    assert world.let_in("10.0.0.2") == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert firewall.is_set(world.state)
    assert world.ensure() == []
    assert len(world.did) == 3


def test_member_is_known_by_the_address_that_it_uses_also_while_it_is_silent(world: World) -> None:
    world.sources["10.0.0.3"] = ["10.1.0.3"]
    world.ensure()
    assert world.let_in("10.0.0.1") == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.3"]
    world.silent.add("10.0.0.3")
    assert world.ensure() == ["10.0.0.3"]
    assert world.let_in("10.0.0.1") == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.3"]


def test_who_is_no_member_any_longer_is_not_let_in(world: World, tmp_path: Path) -> None:
    world.ensure()
    world.config = config(tmp_path, WORKER_ADDRS="10.0.0.2")
    assert firewall.ensure(world.config, world.state, [HEAD, C1]) == []
    assert world.let_in("10.0.0.1") == world.let_in("10.0.0.2") == ["10.0.0.1", "10.0.0.2"]


def test_silent_machine_is_told_and_the_others_go_on(world: World) -> None:
    world.silent.add("10.0.0.2")
    assert world.ensure() == ["10.0.0.2"]
    assert sorted(world.did) == ["set c2", "set head"]
    said = world.text()
    assert "c1       no answer" in said
    assert "c1: 10.0.0.2 cannot be reached" in said
    assert said.endswith("not as it should be: ./invoke firewall --set")
    assert [silent.machine.addr for silent in firewall.remove([HEAD, C1, C2])] == ["10.0.0.2"]
    assert sorted(world.did[2:]) == ["unset c2", "unset head"]


def test_simulated_machines_are_members_by_their_network(world: World, tmp_path: Path) -> None:
    world.config = config(tmp_path, HEAD_ADDR="172.31.240.1")
    world.sources["172.31.240.1"] = []
    head = machine("head", "head", addr="172.31.240.1")
    assert firewall.ensure(world.config, world.state, [head]) == []
    rules = world.rules["172.31.240.1"]["iptables"]
    assert f"-A {MEMBERS} -s 172.31.240.0/24 -j RETURN" in rules


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_table_before_and_after(world: World) -> None:
    said = world.text()
    assert said.splitlines()[:4] == [
        "machine  firewall  for members only",
        "head     not set   tcp 111 662 2049 2377 5000 5001 7946",
        "                   udp 111 662 2049 4789 7946",
        "c1       not set   tcp 2377 7946",
    ]
    assert "members: 10.0.0.1 10.0.0.2 10.0.0.3" in said
    assert said.endswith("not set, so these ports are for everybody: ./invoke firewall --set")
    world.ensure()
    assert world.text().endswith("\nset")
    firewall.forget(world.state)
    assert world.text().endswith("not wanted, and there: ./invoke firewall --unset takes it away")


def test_what_differs_is_said(world: World) -> None:
    world.ensure()
    rules = world.rules["10.0.0.2"]
    rules["iptables"].remove(f"-A {MEMBERS} -s 10.0.0.3/32 -j RETURN")
    rules["ip6tables"].append(f"-A {MEMBERS} -j ACCEPT")
    head, c1, c2 = world.walls()
    assert (head.state, c1.state, c2.state) == ("set", "differs", "set")
    assert c1.differences == [
        f"lacks: iptables -A {MEMBERS} -s 10.0.0.3/32 -j RETURN",
        f"has: ip6tables -A {MEMBERS} -j ACCEPT",
    ]
    assert f"c1 has: ip6tables -A {MEMBERS} -j ACCEPT" in world.text()
    assert world.ensure() == []
    assert [wall.state for wall in world.walls()] == ["set"] * 3


def test_order_of_rules_matters_and_that_of_their_parts_does_not(world: World) -> None:
    world.ensure()
    rules = world.rules["10.0.0.2"]["iptables"]
    rules[4] = f"-A {FORWARD} -o docker_gwbridge -m conntrack --ctdir ORIGINAL ! --ctstate DNAT -j DROP"
    rules.insert(0, rules.pop(4))
    assert world.walls()[1].differences == []
    rules.insert(rules.index(f"-A {MEMBERS} -i lo -j RETURN"), rules.pop())
    assert world.walls()[1].differences == ["has its rules of iptables in another order, or one twice"]


def test_machine_that_would_forget_its_rules_differs_unless_it_cannot_help_it(world: World) -> None:
    world.ensure()
    world.kept = "no"
    assert [wall.differences for wall in world.walls()] == [["would lose its rules when it starts anew"]] * 3
    world.kept = "never"
    assert [wall.state for wall in world.walls()] == ["set"] * 3
    assert "no systemd on head, c1, c2: after a restart there, ./invoke up sets it again" in world.text()


def test_lines_are_at_most_80_columns_wide(world: World, tmp_path: Path) -> None:
    world.config = config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3", SSH_PORT="2222")
    world.ensure()
    world.rules["10.0.0.1"] = {"iptables": ["-A CFIDDLE-MEMBERS -j ACCEPT"], "ip6tables": []}
    world.kept = "never"
    world.silent.add("10.0.0.3")
    said = world.text()
    assert "2222" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("what", [["set", "", "", ":A - [0:0]", ":A - [0:0]"], ["unset"]], ids=["set", "unset"])
@pytest.mark.parametrize(("refused", "status"), [(1, 0), (9, 1)])
def test_change_that_the_kernel_refuses_is_tried_again(
    tmp_path: Path, what: list[str], refused: int, status: int
) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    for tables in ("iptables", "ip6tables"):
        write(tables, f"echo '-N {PORTS}'; echo '-A PREROUTING -j {PORTS}'")
        write(
            f"{tables}-restore",
            f"echo >>{tmp_path}/tries; cat >{tmp_path}/{tables}.in; [ $(wc -l <{tmp_path}/tries) -gt {refused} ]",
        )
    write("sleep", "")
    done = subprocess.run(
        ["bash", firewall.SCRIPT, tmp_path, *what],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        timeout=30,
        check=False,
    )
    assert done.returncode == status
    assert f"-D PREROUTING -j {PORTS}" in (tmp_path / "iptables.in").read_text().splitlines()
    tries = len((tmp_path / "tries").read_text().splitlines())
    assert tries == (5 if status else 3 if Path("/proc/net/if_inet6").exists() else 2)
