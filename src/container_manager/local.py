"""A place of containers on this machine's engine, for where there is no cluster."""

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import requests
from docker import APIClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import Mount

from container_manager import interrupts, names
from container_manager.errors import ContainerError, Refusal
from container_manager.place import IMAGE, Container, in_shell

SOCKET = "unix:///var/run/docker.sock"

_OWNER = "container-manager.owner"
_NAME = "container-manager.name"
_TIMEOUT_S = 120
_AT_ONCE = 8
_CONFLICT = 409

# Ends every process whose environment holds $1: those of one command inherit it, wherever they have gone. Several
# times, since what is about to be ended may still start another.
_END = """
cd /proc
for _ in 1 2 3 4 5; do
    pids=$(grep -lsF "$1" [0-9]*/environ | cut -d/ -f1)
    [ -n "$pids" ] || exit 0
    kill -KILL $pids
done
"""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine:
    """This machine's engine: the one that DOCKER_HOST names, as for the docker command, else the one of its socket."""

    def __init__(self) -> None:
        self.data = Path.cwd() / "data"
        self._address = os.environ.get("DOCKER_HOST") or SOCKET
        self._uid = os.getuid()

    def naming(self) -> AbstractContextManager[None]:
        """See to it that nobody else gives names of this user's meanwhile."""
        return names.giving()

    def containers(self) -> list[Container]:
        """Return this user's own that the manager touches, newest first."""
        with self._explained():
            found = self._api.containers(all=True, filters={"label": f"{_OWNER}={self._uid}"})
            inspected = _at_once(self._inspect, [str(entry["Id"]) for entry in found])
        mine = (container for container in inspected if container and names.is_managed(container.name))
        # The engine drops zeros at the end of a fraction, so with the Z on it a shorter one would read as the greater.
        return sorted(mine, key=lambda container: container.created.rstrip("Z"), reverse=True)

    def silent(self) -> list[str]:
        """Return nothing: if this machine's engine does not answer, that is an error."""
        return []

    def create(self, names: Sequence[str]) -> None:
        """Create a container of each name, without starting it; all or none."""
        with self._explained():
            self.data.mkdir(exist_ok=True)
            made: list[str] = []
            try:
                # One after the other: sorted by age they are in the order of their names then.
                for name in names:
                    with interrupts.put_off():
                        made.append(self._create(name))
            except BaseException:
                with interrupts.put_off():
                    _at_once(self._remove, made)
                raise

    def start(self, containers: Sequence[Container]) -> None:
        """Have them all run; return when they do."""
        with self._explained():
            _at_once(self._api.start, [container.id for container in containers])

    def execute(self, container: Container, command: str, output: Callable[[bytes], None]) -> int:
        """Run a shell command in a running container; return its exit status."""
        mark = f"CONTAINER_MANAGER_COMMAND={uuid.uuid4()}"
        with self._explained():
            execution = self._api.exec_create(container.id, in_shell(command), environment=[mark])["Id"]
            try:
                for piece in self._api.exec_start(execution, stream=True):
                    output(piece)
            except BaseException:
                with interrupts.put_off():
                    self._end(container, mark)
                raise
            return int(self._api.exec_inspect(execution)["ExitCode"])

    def stop(self, containers: Sequence[Container]) -> None:
        """Have none of them run; they keep what is on their disks."""
        with self._explained():
            _at_once(self._stop, [container.id for container in containers])

    def delete(self, containers: Sequence[Container]) -> None:
        """Remove those that do not run, with what is on their disks."""
        with self._explained():
            _at_once(self._delete, containers)

    @cached_property
    def _api(self) -> APIClient:
        return APIClient(base_url=self._address, timeout=_TIMEOUT_S)

    def _inspect(self, id: str) -> Container | None:
        try:
            found = self._api.inspect_container(id)
        except NotFound:
            return None
        return Container(
            name=found["Config"]["Labels"].get(_NAME, ""),
            id=found["Id"],
            image=found["Image"],
            status=found["State"]["Status"],
            created=found["Created"],
        )

    def _create(self, name: str) -> str:
        configuration = {
            "labels": {_OWNER: str(self._uid), _NAME: name},
            "user": f"{self._uid}:{os.getgid()}",
            "tty": True,
            "stdin_open": True,
            "host_config": self._api.create_host_config(mounts=[Mount("/home/me/data", str(self.data), type="bind")]),
        }
        try:
            return str(self._api.create_container(IMAGE, name=name, **configuration)["Id"])
        except APIError as error:
            if error.status_code != _CONFLICT:
                raise
            # It is not one of ours: somebody else who uses this engine has it. Names are counted for each user.
            return str(self._api.create_container(IMAGE, name=f"{name}.{self._uid}", **configuration)["Id"])

    def _stop(self, id: str) -> None:
        # Process 1 is a shell that waits for input; it hears no TERM, and whoever waits for it only waits.
        try:
            self._api.stop(id, timeout=0)
        except NotFound:
            return

    def _delete(self, container: Container) -> None:
        try:
            self._api.remove_container(container.id, v=True)
        except NotFound:
            return
        except APIError as error:
            now = self._inspect(container.id)
            if error.status_code == _CONFLICT and now and now.is_running:
                raise Refusal(f"container {container.name} is running, please stop it before delete it!") from error
            if now:
                raise

    def _remove(self, id: str) -> None:
        self._api.remove_container(id, v=True, force=True)

    def _end(self, container: Container, mark: str) -> None:
        try:
            execution = self._api.exec_create(container.id, ["/bin/sh", "-c", _END, "sh", mark])["Id"]
            self._api.exec_start(execution)
        except APIError:
            # Where the container runs no more, neither does the command.
            now = self._inspect(container.id)
            if now and now.is_running:
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ImageNotFound as error:
            raise ContainerError(f"no image {IMAGE} on this machine", "build it: ./invoke task-image") from error
        except APIError as error:
            raise ContainerError(f"the engine refuses: {error.explanation or error}") from error
        except (DockerException, requests.RequestException) as error:
            raise ContainerError(
                f"no Docker Engine answers at {self._address}: {_cause(error)}",
                "see that it runs (systemctl status docker) and that you may use it (id -nG names the group docker)",
            ) from error
        except OSError as error:
            raise ContainerError(f"{error.filename or self._address}: {error.strerror or error}") from error


def _at_once(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    if len(items) < 2:
        return [function(item) for item in items]
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _cause(error: BaseException) -> str:
    """Return what the innermost of the errors says that were raised from one another."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error)
