"""Where a user's containers are: what any such place can do, and which one this process uses."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

IMAGE = "my_task_image"

SHELL = ("/bin/bash", "-c")
"""What runs a command in a container."""

_USERHOST = Path("/etc/cfiddle/userhost")


@dataclass(frozen=True)
class Container:
    """A container of this user's.

    Attributes:
        name: as its owner calls it.
        id: the engine's, 64 hex digits.
        image: the id of its image, `sha256:…`.
        status: the engine's word: created, running, exited.
        created: the engine's ISO time.
        machine: where in the cluster it is; empty on this machine's engine.
        job: the Slurm job that it lives in, if it does.
    """

    name: str
    id: str
    image: str
    status: str
    created: str
    machine: str = ""
    job: int | None = None

    @property
    def is_running(self) -> bool:
        """Whether processes of it are there, be they paused."""
        return self.status not in ("created", "exited", "dead")


class Place(Protocol):
    """Where containers are. What goes wrong is raised as a ContainerError; methods may be called in many threads.

    Attributes:
        data: the directory, on the caller's side, that containers see as their `data`.
    """

    data: Path

    def naming(self) -> AbstractContextManager[None]:
        """See to it that nobody else gives names of this user's meanwhile."""

    def containers(self) -> list[Container]:
        """Return this user's own that the manager touches, newest first."""

    def silent(self) -> list[str]:
        """Return the machines that do not answer; what is there is not among the containers."""

    def create(self, names: Sequence[str]) -> None:
        """Create a container of each name, without starting it; all or none."""

    def start(self, containers: Sequence[Container]) -> None:
        """Have them all run; return when they do."""

    def execute(self, container: Container, command: str, output: Callable[[bytes], None]) -> int:
        """Run a shell command in a running container; return its exit status.

        Whatever ends this call early ends the command too.

        Args:
            container: where.
            command: for SHELL.
            output: gets what it writes to either stream, while it comes.
        """

    def stop(self, containers: Sequence[Container]) -> None:
        """Have none of them run; they keep what is on their disks."""

    def delete(self, containers: Sequence[Container]) -> None:
        """Remove those that do not run, with what is on their disks."""


def in_shell(command: str) -> list[str]:
    """Return what runs a command in a container: its two streams as one, in the order in which it writes."""
    return [*SHELL, f"exec 2>&1; {command}"]


def here() -> Place:
    """Return the place of this process: the cluster on its users' node, else the engine of this machine."""
    if _USERHOST.exists():
        from container_manager.cluster import Cluster

        return Cluster()
    from container_manager.local import Engine

    return Engine()
