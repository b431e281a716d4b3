"""The cluster as a place of containers: agents keep them, and each runs in a Slurm job of its owner's."""

from __future__ import annotations

import os
import pwd
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from agent import letters
from container_manager import names, room
from container_manager.agents import Agents, together
from container_manager.errors import ContainerError
from container_manager.place import IMAGE, Container, in_shell

CPUS = 1
MEMORY_MB = 512
"""What a container's job asks for where nobody says otherwise."""

_PINNED_S = 1.0
_LOOK_S = 1.0
_SAY_S = 3.0
_HEADING = 8  # of a piece of output: stream (1), nothing (3), length (4), as the engine's API has it


class _Start:
    """A container that is being started.

    Attributes:
        job: that it shall run in, as soon as there is one.
        is_wanted: whether it still shall.
    """

    def __init__(self) -> None:
        self.job: int | None = None
        self.is_wanted = True


class Cluster:
    """The user's containers on all machines.

    Attributes:
        data: `data` in the user's home.
    """

    def __init__(self) -> None:
        self.data = Path.home() / "data"
        self._agents = Agents()
        self._user = pwd.getpwuid(os.getuid()).pw_name
        self._starting: dict[str, _Start] = {}
        self._lock = threading.Lock()

    def naming(self) -> AbstractContextManager[None]:
        """See to it that nobody else gives names of this user's meanwhile."""
        return names.giving()

    def containers(self) -> list[Container]:
        """Return those that the manager touches, newest first."""
        found = [
            _container(machine, told)
            for machine, answer in self._agents.ask_all("list").items()
            for told in answer["containers"]
            if names.is_managed(told["name"])
        ]

        def age(container: Container) -> tuple[str, tuple[str, int]]:
            # Those that are created together are so in no order, by several clocks: within a second, names tell it.
            return container.created[:19], names.in_order(container.name)

        return sorted(found, key=age, reverse=True)

    def silent(self) -> list[str]:
        """Return the machines that Slurm knows and whose agents do not answer."""
        return sorted({machine.name for machine in room.machines()} - set(self._agents.machines))

    def create(self, new: Sequence[str]) -> None:
        """Create containers without starting them, each on the machine that has most room; all or none."""
        targets = self._targets(len(new))

        def create_on(target: tuple[str, str]) -> None:
            machine, name = target
            self._agents.ask(machine, "create", user=self._user, name=name, image=IMAGE)

        together(create_on, list(zip(targets, new, strict=True)))

    def start(self, containers: Sequence[Container]) -> None:
        """Have them all run, each in a job; one that never ran may come to run on another machine."""
        try:
            self.data.mkdir(exist_ok=True)
        except OSError as error:
            raise ContainerError(f"{self.data} cannot be made: {error.strerror}", f"ls -ld {self.data}") from error
        idle = {container.id: container for container in containers if not container.is_running}
        with self._lock:
            self._starting.update({identifier: _Start() for identifier in idle})
        try:
            together(self._start_one, idle.values(), giving_up=lambda: self._give_up(idle))
        finally:
            with self._lock:
                for identifier in idle:
                    del self._starting[identifier]

    def execute(self, container: Container, command: str, output: Callable[[bytes], None]) -> int:
        """Run a shell command in a running container; return its exit status."""
        machine = self._machine_of(container)
        stream = self._agents.run(machine, name=container.name, argv=in_shell(command), terminal=False)
        with closing(stream):
            stream.send(letters.INPUT_ENDS)
            unfinished = b""
            for kind, content in stream.pieces():
                if kind == letters.EXIT:
                    return _status(letters.parse(content), container)
                unfinished = _pass_on(unfinished + content, output)
        raise AssertionError("a stream ends with an exit")

    def stop(self, containers: Sequence[Container]) -> None:
        """Have none of them run; their jobs end, also that of one that is being started meanwhile."""
        self._give_up(container.id for container in containers)

        def stop_one(container: Container) -> None:
            self._agents.ask(self._machine_of(container), "stop", name=container.name)

        together(stop_one, containers)

    def delete(self, containers: Sequence[Container]) -> None:
        """Remove those that do not run."""

        def delete_one(container: Container) -> None:
            self._agents.ask(self._machine_of(container), "delete", name=container.name)

        together(delete_one, containers)

    def _machine_of(self, container: Container) -> str:
        """Return where a container is now: one that had not run may have come to another machine since."""
        if container.status != "created":
            return container.machine
        called_so = [now for now in self.containers() if now.name == container.name]
        same = [now for now in called_so if now.id == container.id] or called_so
        return same[0].machine if same else container.machine

    def _start_one(self, container: Container) -> None:
        fresh = container.status == "created"
        job = room.submit(
            user=self._user,
            name=container.name,
            image=IMAGE if fresh else "",
            machine=container.machine,
            cpus=CPUS,
            memory_mb=MEMORY_MB,
        )
        start = self._starting[container.id]
        with self._lock:
            start.job = job
        if not start.is_wanted:
            room.cancel([job])
        machine = self._wait_until_running(container, job, may_move=fresh)
        if machine != container.machine:
            self._agents.ask(container.machine, "delete", name=container.name)

    def _give_up(self, identifiers: Iterable[str]) -> None:
        """End the jobs of those that are being started; one that is just being submitted is ended by who does that."""
        with self._lock:
            given_up = [self._starting[identifier] for identifier in identifiers if identifier in self._starting]
            for start in given_up:
                start.is_wanted = False
            jobs = [start.job for start in given_up if start.job is not None]
        room.cancel(jobs)

    def _targets(self, number: int) -> list[str]:
        """Return the machines for so many new containers: those with most memory free, by turns."""
        free = {
            machine.name: machine.free_memory_mb
            for machine in room.machines()
            if machine.takes_jobs and machine.name in self._agents.machines
        }
        if not free:
            raise ContainerError("no machine takes containers now", "sinfo shows how the machines are")
        chosen = []
        for _ in range(number):
            chosen.append(max(free, key=lambda name: (free[name], name)))
            free[chosen[-1]] -= MEMORY_MB
        return chosen

    def _wait_until_running(self, container: Container, job: int, *, may_move: bool) -> str:
        """Return the machine on which the container runs in the job.

        Raises:
            ContainerError: the job ended, or the agent refused it.
        """
        machine, pinned = container.machine, True
        began = time.monotonic()
        said = False
        while True:
            if machine and self._agents.ask(machine, "outcome", job=job, wait_s=_LOOK_S)["id"]:
                return machine
            found = room.job(job)
            if found.waits:
                if pinned and may_move and time.monotonic() - began > _PINNED_S:
                    room.let_go_anywhere(job)
                    pinned = False
                if not said and time.monotonic() - began > _SAY_S:
                    print(f"{container.name} waits for room, in job {job}: {found.reason}", file=sys.stderr)
                    said = True
                machine = ""
                time.sleep(_LOOK_S)
            elif found.state == "RUNNING":
                machine = found.machine
            else:
                if found.machine:
                    self._agents.ask(found.machine, "outcome", job=job, wait_s=0.0)  # which may know why
                raise ContainerError(f"container {container.name} did not start: its job {job} is {found.state}")


def _container(machine: str, told: dict[str, Any]) -> Container:
    return Container(
        name=told["name"],
        id=told["id"],
        image=told["image_id"],
        status=told["status"],
        created=told["created"],
        machine=machine,
        job=told["job"],
    )


def _pass_on(content: bytes, output: Callable[[bytes], None]) -> bytes:
    """Pass on the whole pieces of the engine's; return what is left of one that has not come yet."""
    while len(content) >= _HEADING:
        end = _HEADING + int.from_bytes(content[4:_HEADING])
        if len(content) < end:
            break
        output(content[_HEADING:end])
        content = content[end:]
    return content


def _status(told: dict[str, Any], container: Container) -> int:
    status = told.get("status")
    if status is None:
        raise ContainerError(f"container {container.name} ended while the command ran")
    return int(status)
