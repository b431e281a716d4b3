"""The cluster as a place of containers: agents keep them, and each runs in a Slurm job of its owner's."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from agent import letters
from container_manager import names, room
from container_manager.agents import Agents, together
from container_manager.errors import ContainerError
from container_manager.launch import Launch, Launches
from container_manager.place import IMAGE, Container, in_shell

CPUS = 1
MEMORY_MB = 512
"""What a container's job asks for where nobody says otherwise."""


class Cluster:
    """The user's containers on all machines.

    Attributes:
        data: `data` in the user's home.
    """

    def __init__(self) -> None:
        self.data = Path.home() / "data"
        self._agents = Agents()
        self._user = pwd.getpwuid(os.getuid()).pw_name
        self._launches = Launches(self._agents)

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
        self._launches.start([self._launch(container) for container in containers if not container.is_running])

    def execute(self, container: Container, command: str, output: Callable[[bytes], None]) -> int:
        """Run a shell command in a running container; return its exit status."""
        machine = self._machine_of(container)
        stream = self._agents.run(machine, name=container.name, argv=in_shell(command), terminal=False)
        with closing(stream):
            stream.send(letters.INPUT_ENDS)
            status = stream.relay(lambda _, content: output(content))
        if status is None:
            raise ContainerError(f"container {container.name} ended while the command ran")
        return status

    def stop(self, containers: Sequence[Container]) -> None:
        """Have none of them run; their jobs end, also that of one that is being started meanwhile."""
        self._launches.give_up({(container.machine, container.name) for container in containers})

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

    def _launch(self, container: Container) -> Launch:
        return Launch(
            user=self._user,
            name=container.name,
            image=IMAGE if container.status == "created" else "",
            machine=container.machine,
            cpus=CPUS,
            memory_mb=MEMORY_MB,
            counts_cpus=False,
        )

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
