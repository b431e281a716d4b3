"""What agents have made for users' containers on a machine, where the agent is gone or its user is."""

from agent import container_shape, user_network
from cfiddle_cluster.machines import Machine

_TIMEOUT_S = 300

_STOP = 'docker ps --quiet --filter "label=$1" | xargs --no-run-if-empty docker stop --time 1 >/dev/null'
_REMOVE = """
    set -eo pipefail
    docker ps --all --quiet --filter "label=$1" | xargs --no-run-if-empty docker rm --force --volumes >/dev/null
    docker volume ls --quiet | { grep -E "^cfiddle-home-$2-[0-9a-f]{8}$" || true; } |
        xargs --no-run-if-empty docker volume rm >/dev/null
"""
_REMOVE_NETWORK = """
    set -e
    docker network inspect "$1" >/dev/null 2>&1 || exit 0
    docker network rm "$1" >/dev/null
    rule() { while iptables -w -D "$@" 2>/dev/null; do :; done; }
    rule DOCKER-USER -i "$1" -j CFIDDLE-USERS
    rule INPUT -i "$1" -j REJECT
    rule INPUT -i "$1" -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    iptables -w -F CFIDDLE-USERS 2>/dev/null || exit 0
    iptables -w -X CFIDDLE-USERS
"""


def stop(machine: Machine) -> None:
    """Stop all users' containers on a machine: they are in no job any more."""
    machine.script(_STOP, [container_shape.LABEL], timeout_s=_TIMEOUT_S)


def remove_of(machine: Machine, *, uid: int, user: str) -> None:
    """Remove one user's containers from a machine, with all that is on their disks; the home stays."""
    machine.script(_REMOVE, [f"{container_shape.UID_LABEL}={uid}", user], timeout_s=_TIMEOUT_S)


def remove_all(machine: Machine) -> None:
    """Remove everybody's containers from a machine, and the network and the firewall's rules that they had."""
    machine.script(_REMOVE, [container_shape.LABEL, ".*"], timeout_s=_TIMEOUT_S)
    machine.script(_REMOVE_NETWORK, [user_network.NAME], timeout_s=60)
