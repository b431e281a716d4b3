"""Errors as a person reads them."""

import errno

import pytest
from docker.errors import APIError, DockerException

from cfiddle_cluster.errors import FOREIGN, ClusterError, explained


def test_error_ends_with_what_to_do() -> None:
    assert str(ClusterError("port 8888 is in use", "set JUPYTER_PORT")) == "port 8888 is in use\n→ set JUPYTER_PORT"


def test_error_without_a_remedy_is_its_message() -> None:
    assert str(ClusterError("no")) == "no"


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/var/x"), "the disk of /var/x is full", "docker system df"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/srv/x"), "no rights to /srv/x", "sudo"),
        (FileNotFoundError(errno.ENOENT, "No such file", "users.csv"), "users.csv: No such file", "path"),
        (APIError("409 Client Error", explanation="name in use"), "the engine refuses: name in use", "doctor"),
        (DockerException("no engine"), "DockerException: no engine", "doctor"),
        (TimeoutError("read timed out"), "TimeoutError: read timed out", "doctor"),
    ],
)
def test_what_machine_and_engine_complain_of_is_said_with_what_to_do(
    error: Exception, message: str, remedy: str
) -> None:
    assert isinstance(error, FOREIGN)
    found = explained(error)
    assert found.message == message
    assert remedy in found.remedy
