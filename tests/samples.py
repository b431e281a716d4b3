"""A configuration and machines for tests that need no cluster."""

import shlex
from pathlib import Path

from cfiddle_cluster.config import Config, from_settings
from cfiddle_cluster.machines import Machine

SETTINGS = {
    "LOCAL_WORKERS": "2",
    "LOCAL_WORKER_CPUS": "0",
    "LOCAL_WORKER_MEMORY_MB": "0",
    "HOME_ROOT": "/srv/cfiddle-cluster/home",
    "JUPYTER_PORT": "8888",
    "REGISTRY_PORT": "5000",
    "USER_REGISTRY_PORT": "5001",
    "CALIBRATION_LIMIT": "10",
    "TUNE": "governor boost smt swap counters",
    "HEAD_ADDR": "10.0.0.1",
}


def config(root: Path, **settings: str) -> Config:
    """Return config.sh's defaults with some settings changed."""
    return from_settings(root, {**SETTINGS, **settings})


def machine(name: str, *roles: str, addr: str = "", simulated: bool = False) -> Machine:
    """Return a machine that is this one, under another name."""
    return Machine(name=name, addr=addr or f"addr-{name}", roles=frozenset(roles or ("worker",)), simulated=simulated)


def reached_by(*ssh: str, sudo: bool = False) -> Machine:
    """Return a machine that is reached by a command in the place of ssh."""
    return Machine(name="c1", addr="10.0.0.2", roles=frozenset({"worker"}), ssh=ssh, sudo=sudo)


def shell(argv: list[str], *, without: int) -> list[str]:
    """Return what a remote shell makes of the words after ssh's own."""
    assert len(argv) == without + 1, argv
    return shlex.split(argv[-1])
