"""What is left of users' containers on a machine goes, and nothing else; programs stand for docker and iptables."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster import user_containers
from cfiddle_cluster.errors import ClusterError
from samples import machine
from stand_ins import program

DOCKER = """
echo "docker $*" >>"$DID"
case "$*" in
    "ps "*) printf '%s' "$CONTAINERS" ;;
    "volume ls"*) printf '%s\\n' $VOLUMES ;;
    "network inspect"*) exit "${NO_NETWORK:-0}" ;;
    "rm "*) exit "${BROKEN:-0}" ;;
esac
"""


@pytest.fixture
def did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return what tells which commands have changed anything."""
    log = tmp_path / "did"
    log.touch()
    program(tmp_path, "docker", DOCKER)
    # There is one rule of each kind, and a second in INPUT.
    program(
        tmp_path,
        "iptables",
        'echo "iptables $*" >>"$DID"\n[ "$2" != -D ] || [ "$(grep -cxF "iptables $*" "$DID")" -le 1 ]',
    )
    for name, value in {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "DID": str(log),
        "CONTAINERS": "one\ntwo\n",
        "VOLUMES": "cfiddle-home-ada-0123abcd cfiddle-home-ada-lovelace-0123abcd cfiddle-home-eve-0123abcd grants",
    }.items():
        monkeypatch.setenv(name, value)
    return lambda: [line for line in log.read_text().splitlines() if not line.startswith("docker volume ls")]


def test_containers_are_stopped_where_there_are_any(
    did: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    user_containers.stop(machine("c1"))
    monkeypatch.setenv("CONTAINERS", "")
    user_containers.stop(machine("c1"))
    listed = "docker ps --quiet --filter label=cfiddle.container"
    assert did() == [listed, "docker stop --time 1 one two", listed]


def test_one_user_s_containers_and_home_volume_go(did: Callable[[], list[str]]) -> None:
    user_containers.remove_of(machine("c1"), uid=2003, user="ada")
    assert did() == [
        "docker ps --all --quiet --filter label=cfiddle.uid=2003",
        "docker rm --force --volumes one two",
        "docker volume rm cfiddle-home-ada-0123abcd",
    ]


def test_everybody_s_go_with_the_network_and_its_rules(did: Callable[[], list[str]]) -> None:
    user_containers.remove_all(machine("c1"))
    done = did()
    assert done[1:3] == [
        "docker rm --force --volumes one two",
        "docker volume rm cfiddle-home-ada-0123abcd cfiddle-home-ada-lovelace-0123abcd cfiddle-home-eve-0123abcd",
    ]
    assert "docker network rm cfiddle-users" in done
    assert done[-2:] == ["iptables -w -F CFIDDLE-USERS", "iptables -w -X CFIDDLE-USERS"]
    rules = {line for line in done if " -D " in line}
    assert rules == {
        "iptables -w -D DOCKER-USER -i cfiddle-users -j CFIDDLE-USERS",
        "iptables -w -D INPUT -i cfiddle-users -j REJECT",
        "iptables -w -D INPUT -i cfiddle-users -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    }
    assert all(done.count(rule) == 2 for rule in rules), "until there is none left"


def test_machine_that_never_had_any_is_left_alone(
    did: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"CONTAINERS": "", "VOLUMES": "grants", "NO_NETWORK": "1"}.items():
        monkeypatch.setenv(name, value)
    user_containers.remove_all(machine("c1"))
    assert not [line for line in did() if " rm " in line or line.startswith("iptables")]


def test_what_cannot_be_removed_is_said(did: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(ClusterError):
        user_containers.remove_of(machine("c1"), uid=2003, user="ada")
