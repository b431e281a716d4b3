"""What the agent finds out about the container that it runs in itself, if it runs in one."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from agent.engine import Engine, EngineError


def place_on_machine(engine: Engine, directory: Path) -> str:
    """Return where the engine finds a directory of this process.

    Raises:
        EngineError: this is a container, and the directory is no mount of it.
    """
    container = _container()
    if not container:
        return os.fspath(directory)
    for mount in engine.inspect(container)["Mounts"]:
        if mount["Destination"] == os.fspath(directory):
            return str(mount["Source"])
    raise EngineError(0, f"{directory} is no mount of the agent's container: the engine cannot find what is in it")


def image(engine: Engine) -> str:
    """Return the id of the image that this process runs in; "" if in none."""
    container = _container()
    return str(engine.inspect(container)["Image"]) if container else ""


def address() -> str:
    """Return this node's address on the network that its name stands for: the one that the cluster shares.

    Another one, of Swarm's bridge, is the same on all machines.
    """
    return str(socket.getaddrinfo(os.uname().nodename, None, socket.AF_INET)[0][4][0])


def _container() -> str:
    mounts = Path("/proc/self/mountinfo").read_text()
    own = re.search(r"/containers/([0-9a-f]{64})/hostname /etc/hostname ", mounts)
    return own[1] if own else ""
