"""The engine of the machine we stand on, which is the head's."""

from functools import cache

import docker
from docker.errors import DockerException, ImageNotFound

from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.wait import PATIENCE

SOCKET = "/var/run/docker.sock"
TIMEOUT_S = 120


@cache
def client() -> docker.DockerClient:
    """Return the client of the head's engine, whatever DOCKER_HOST or a docker context say.

    Raises:
        ClusterError: no engine answers.
    """
    try:
        found = docker.DockerClient(base_url=f"unix://{SOCKET}", timeout=TIMEOUT_S * PATIENCE)
        found.ping()
    except DockerException as error:
        raise ClusterError(
            f"no Docker Engine answers at {SOCKET}: {error}", "./invoke up starts one, and installs it if there is none"
        ) from error
    return found


def is_running() -> bool:
    """Tell whether the head's engine answers."""
    try:
        return bool(client().ping())
    except (ClusterError, DockerException):
        client.cache_clear()
        return False


def image_id(reference: str) -> str:
    """Return the identity of an image that this engine has, whatever it is called; empty if it has it not."""
    try:
        return str(client().images.get(reference).id)
    except ImageNotFound:
        return ""
