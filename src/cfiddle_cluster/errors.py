"""What goes wrong, said to a person: what, where, and what to do about it."""

import errno

from docker.errors import APIError, DockerException

FOREIGN = (OSError, DockerException)
"""What the machine and its engine raise; `explained` says it to a person."""


class ClusterError(Exception):
    """An error that a command's user can do something about.

    Args:
        message: what is wrong and where; several lines where that helps.
        remedy: what to do, ideally a command.
    """

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n→ {self.remedy}" if self.remedy else self.message


def explained(error: Exception) -> ClusterError:
    """Return what the machine or its engine complains of as an error that says what to do."""
    if isinstance(error, APIError):
        return ClusterError(
            f"the engine refuses: {error.explanation or error}", "./invoke doctor looks at what it needs"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" of {error.filename}" if error.filename else ""
        return ClusterError(f"the disk{where} is full", "make room: df and docker system df show what takes it")
    if isinstance(error, PermissionError):
        return ClusterError(f"no rights to {error.filename or 'do this'}", "run it as root, or with sudo")
    if isinstance(error, OSError) and error.filename:
        return ClusterError(f"{error.filename}: {error.strerror}", "see that the path is right")
    return ClusterError(f"{type(error).__name__}: {error}", "./invoke doctor looks at what may be the cause")
