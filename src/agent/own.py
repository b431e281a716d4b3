"""What the agent finds out about the container that it runs in itself, if it runs in one."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.engine import Engine, EngineError


def place_on_machine(engine: Engine, directory: Path) -> str:
    """Return where the engine finds a directory of this process.

    Raises:
        EngineError: this is a container, and the directory is no mount of it.
    """
    mount = _mount(engine, directory)
    return str(mount["Source"]) if mount else os.fspath(directory)


def volumes_in(engine: Engine, directory: Path) -> Callable[[str], Mapping[str, str]]:
    """Return a function that returns the options of a volume (of the driver `local`) that is a part of a directory.

    The engine mounts no part of a volume in a way that all its versions know; it can mount the same source deeper.

    Raises:
        EngineError: this is a container, and the directory is no mount of it.
    """
    mount = _mount(engine, directory)
    options = (engine.volume(mount["Name"])["Options"] if mount and mount["Type"] == "volume" else None) or {
        "type": "none",
        "o": "bind",
        "device": str(mount["Source"]) if mount else os.fspath(directory),
    }
    return lambda name: {**options, "device": f"{options['device'].rstrip('/')}/{name}"}


def _mount(engine: Engine, directory: Path) -> dict[str, Any] | None:
    """Return what the engine says of the mount that a directory is; None if this is no container."""
    container = _container()
    if not container:
        return None
    for mount in engine.inspect(container)["Mounts"]:
        if mount["Destination"] == os.fspath(directory):
            return dict(mount)
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
