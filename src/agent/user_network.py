"""The network that users' containers are on: it leads to the world, and to nothing of the cluster's.

A bridge of its own, on which containers do not see each other. The machine's firewall keeps them from the machine
itself and from all private addresses, of which the cluster's machines, database, agents and homes are some. Only names
can be asked for there.
"""

from __future__ import annotations

import os
import time

from agent.engine import Engine, EngineError

NAME = "cfiddle-users"

_RULES = r"""
    set -eu
    # The engine's own rules are in one of two tables of the kernel's; DOCKER-USER is where they are.
    for tables in iptables-nft iptables-legacy; do
        if $tables -w -S DOCKER-USER >/dev/null 2>&1; then break; fi
    done
    rule() { chain=$1; shift; $tables -w -C "$chain" "$@" 2>/dev/null || $tables -w -I "$chain" "$@"; }
    # At once: in a chain that is empty for a moment, a connection could be made that is ESTABLISHED from then on.
    {
        echo "*filter"
        echo ":CFIDDLE-USERS - [0:0]"
        echo "-A CFIDDLE-USERS -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
        # The engine asks a machine's resolver from the container's network; it often has a private address.
        echo "-A CFIDDLE-USERS -p udp --dport 53 -j RETURN"
        echo "-A CFIDDLE-USERS -p tcp --dport 53 -j RETURN"
        for private in 0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 \
            172.16.0.0/12 192.168.0.0/16 224.0.0.0/3; do
            echo "-A CFIDDLE-USERS -d $private -j REJECT"
        done
        echo "-A CFIDDLE-USERS -j RETURN"
        echo "COMMIT"
    } | $tables-restore -w --noflush
    rule DOCKER-USER -i "$1" -j CFIDDLE-USERS
    rule INPUT -i "$1" -j REJECT
    rule INPUT -i "$1" -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
"""


def ensure(engine: Engine, *, image: str) -> str:
    """Make the network and the firewall's rules, if they are missing; return the network's name.

    Args:
        image: one that has iptables.

    Raises:
        EngineError: the network or the rules cannot be had; then there may be no container either.
    """
    try:
        engine.network(NAME)
    except EngineError as error:
        if error.status != 404:
            raise
        options = {
            "com.docker.network.bridge.name": NAME,
            "com.docker.network.bridge.enable_icc": "false",
            # A published port is for those who reach the machine, not for another container.
            "com.docker.network.bridge.enable_ip_masquerade": "true",
        }
        labels = {"cfiddle.cluster": "cfiddle"}
        wanted = {"Name": NAME, "Driver": "bridge", "EnableIPv6": False, "Options": options, "Labels": labels}
        engine.create_network({**wanted, "CheckDuplicate": True})
    _set_rules(engine, image)
    return NAME


def _set_rules(engine: Engine, image: str) -> None:
    wanted = {
        "Image": image,
        "Entrypoint": ["/bin/sh", "-c", _RULES, "sh", NAME],
        "Cmd": [],
        "User": "0:0",
        "Labels": {"cfiddle.cluster": "cfiddle"},
        "HostConfig": {
            "CapAdd": ["NET_ADMIN", "NET_RAW"],
            "CapDrop": ["ALL"],
            "NetworkMode": "host",
            "ReadonlyRootfs": True,
            "SecurityOpt": ["no-new-privileges"],
            "Tmpfs": {"/run": "rw,size=1m"},  # for iptables' lock
        },
    }
    container = engine.create(f"cfiddle-firewall-{os.getpid()}-{time.monotonic_ns()}", wanted)
    try:
        engine.start(container)
        if status := engine.wait(container):
            raise EngineError(0, f"the users' firewall cannot be set: iptables ended with status {status}")
    finally:
        engine.remove(container)
