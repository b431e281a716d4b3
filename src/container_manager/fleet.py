"""The containers of all machines at once, as `ddocker` knows them: a user's own, or for root everybody's."""

from __future__ import annotations

import getpass
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from agent import gpus
from container_manager import names, room
from container_manager.agents import AgentRefused, Agents, Stream
from container_manager.errors import ContainerError, NoRoomError
from container_manager.launch import Launch, Launches

PATIENCE_S = 3.0
"""Seconds that a container may wait for room: Slurm looks for some at once, and takes a moment to clear it."""


@dataclass(frozen=True)
class Found:
    """A container somewhere.

    Attributes:
        name: as it is called here: for root with its owner's uid, as the engine has it.
        own_name, uid, user: as its owner calls it, and who that is.
        created: the engine's ISO time.
        cpus, memory_mb: what its job asks for.
    """

    name: str
    own_name: str
    uid: int
    user: str
    machine: str
    image: str
    status: str
    created: str
    cpus: int
    memory_mb: int
    ports: tuple[int, ...]
    gpus: tuple[str, ...]

    @property
    def is_running(self) -> bool:
        """Whether processes of it are there, be they paused."""
        return self.status not in ("created", "exited", "dead")


@dataclass(frozen=True)
class Type:
    """What a container may be created with; the administrator's."""

    name: str
    cpus: int
    memory_mb: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Image:
    """What a container may be created from, and the machines that have it.

    Attributes:
        owner: who committed it; "" for the administrator's.
    """

    name: str
    id: str
    owner: str
    size: int
    machines: tuple[str, ...]


class Fleet:
    """All machines.

    Attributes:
        silent: machines that were asked and did not answer.
    """

    def __init__(self, agents: Agents | None = None) -> None:
        self.silent: list[str] = []
        self._agents = agents or Agents()
        self._is_administrator = os.getuid() == 0

    def containers(self) -> list[Found]:
        """Return those of this user, or root's view of all, the newest first."""
        found = [
            self._found(machine, told)
            for machine, answer in self._ask_all("list").items()
            for told in answer["containers"]
        ]
        return sorted(found, key=lambda container: container.created, reverse=True)

    def find(self, name: str) -> Found:
        """Return the container of that name; a ContainerError if there is none."""
        if not self._is_administrator:  # whose names are longer
            names.check(name)
        for container in self.containers():
            if container.name == name:
                return container
        unknown = f" on the machines that answer ({', '.join(self.silent)} does not)" if self.silent else ""
        raise ContainerError(f"no such container: {name}{unknown}", "ddocker ps -a shows them")

    def types(self) -> list[Type]:
        """Return what containers may be created with, in the administrator's order."""
        answers = self._ask_all("types")
        if not answers:
            raise ContainerError("no machine answers", "sinfo shows how the machines are")
        told = answers[min(answers)]["types"]
        return [Type(one["name"], one["cpus"], one["memory_mb"], tuple(one["gpus"])) for one in told]

    def images(self) -> list[Image]:
        """Return the images of all machines, the administrator's first."""
        machines: dict[tuple[str, str], list[str]] = {}
        known: dict[tuple[str, str], dict[str, Any]] = {}
        for machine, answer in sorted(self._ask_all("images").items()):
            for image in answer["images"]:
                key = (image["name"], image["id"])
                known.setdefault(key, image)
                machines.setdefault(key, []).append(machine)
        found = [
            Image(**{name: image[name] for name in ("name", "id", "owner", "size")}, machines=tuple(have))
            for image, have in zip(known.values(), machines.values(), strict=True)
        ]
        return sorted(found, key=lambda image: image.owner)

    def inspect(self, name: str) -> dict[str, Any]:
        """Return what the engine knows of a container."""
        container = self.find(name)
        return dict(self._agents.ask(container.machine, "inspect", name=name)["container"])

    def gpu_report(self, machine: str) -> str:
        """Return what nvidia-smi says of a machine's GPUs; a ContainerError if there is no such machine, or no GPU."""
        known = sorted({machine.name for machine in room.machines()} | set(self._agents.machines))
        if machine not in known:
            raise ContainerError(f"there is no machine {machine!r}; there are: {', '.join(known)}")
        return str(self._agents.ask(machine, "gpus")["report"])

    def amiss(self) -> dict[str, list[str]]:
        """Return what the administrator has to see to on each machine that answers; nothing is an empty list."""
        if not self._is_administrator:
            raise ContainerError("setup is the administrator's", "on the head: ./invoke setup-containers")
        found: dict[str, list[str]] = {}
        for machine, answer in sorted(self._ask_all("amiss").items()):
            found[machine] = [
                *(f"lacks the image {name}; on the head: ./invoke setup-containers" for name in answer["missing"]),
                *(f"container {name} is not the cluster's: remove it" for name in answer["foreign"]),
            ]
        return found

    def create(self, name: str, *, image: str, kind: Type, ports: int) -> str:
        """Create a container and start it; return its machine.

        Raises:
            NoRoomError: no machine has room for it now.
            ContainerError: the name is taken or illegal, or it cannot be had for another reason; then nothing of it is.
        """
        if self._is_administrator:
            raise ContainerError("root has no containers", "be a user: ./invoke shell --user NAME on the head")
        names.check(name)
        with names.giving():
            if name in [container.name for container in self.containers()]:
                raise ContainerError(f"there is a container {name} already", f"ddocker rm {name} removes it")
            return self._launch(
                Launch(
                    user=getpass.getuser(),
                    name=name,
                    image=image,
                    machine="",
                    cpus=kind.cpus,
                    memory_mb=kind.memory_mb,
                    gpus=tuple(map(gpus.kind, kind.gpus)),
                    ports=ports,
                    patience_s=PATIENCE_S,
                )
            )

    def start(self, name: str) -> str:
        """Have a container run, where it is, or if it never ran where there is room; return its machine."""
        container = self.find(name)
        if container.is_running:
            return container.machine
        return self._launch(
            Launch(
                user=container.user,
                name=container.own_name,
                image=container.image if container.status == "created" else "",
                machine=container.machine,
                cpus=container.cpus,
                memory_mb=container.memory_mb,
                gpus=tuple(map(gpus.kind, container.gpus)),
                patience_s=PATIENCE_S,
            )
        )

    def stop(self, name: str) -> None:
        """Have a container run no longer; its job ends."""
        self._agents.ask(self.find(name).machine, "stop", name=name)

    def remove(self, name: str) -> None:
        """Remove a container that does not run."""
        container = self.find(name)
        try:
            self._agents.ask(container.machine, "delete", name=name)
        except AgentRefused as refused:
            if refused.code == "running":
                raise ContainerError(f"container {name} is running", f"ddocker stop {name}") from refused
            raise

    def commit(self, name: str, image: str) -> None:
        """Make an image of a container, and have it on every machine."""
        container = self.find(name)
        with names.giving():
            self._agents.ask(container.machine, "commit", name=name, image=image)
        owned = f"u{container.uid}/{image}" if self._is_administrator else image
        self._ask_all("fetch", image=owned)

    def remove_image(self, image: str) -> None:
        """Remove a user's image from the registry and from every machine."""
        for container in self.containers():
            of = f"u{container.uid}/{container.image}" if self._is_administrator else container.image
            if _full(of) == _full(image):
                raise ContainerError(f"container {container.name} is made of {image}", f"ddocker rm {container.name}")
        known = {_full(found.name): found for found in self.images()}.get(_full(image))
        if known is None:
            raise ContainerError(f"no such image: {image}", "ddocker images shows them")
        if not known.owner:
            raise ContainerError(f"{image} is the administrator's", "policy.yaml says which images there are")
        self._ask_all("forget", image=image)

    def execute(self, name: str, argv: Sequence[str], *, terminal: bool) -> Stream:
        """Run a command in a container that runs; return its streams."""
        return self._agents.run(self.find(name).machine, name=name, argv=list(argv), terminal=terminal)

    def _launch(self, launch: Launch) -> str:
        try:
            return Launches(self._agents).start([launch])[0]
        except NoRoomError as error:
            raise NoRoomError(f"{error}\n{_free()}") from error

    def _ask_all(self, kind: str, **fields: Any) -> dict[str, dict[str, Any]]:
        with ThreadPoolExecutor(1) as pool:
            machines = pool.submit(room.machines)
            answers = self._agents.ask_all(kind, **fields)
            self.silent = sorted({machine.name for machine in machines.result()} - set(answers))
        return answers

    def _found(self, machine: str, told: dict[str, Any]) -> Found:
        own_name = str(told["name"])
        return Found(
            name=f"u{told['uid']}.{own_name}" if self._is_administrator else own_name,
            own_name=own_name,
            machine=machine,
            ports=tuple(told["ports"]),
            gpus=tuple(told.get("gpus", ())),
            **{key: told[key] for key in ("uid", "user", "image", "status", "created", "cpus", "memory_mb")},
        )


def _free() -> str:
    """Return a line for each machine: what it has free."""
    lines = []
    for machine in room.machines():
        if machine.takes_jobs:
            cards = "".join(f", {number} {kind}" for kind, number in machine.free_gpus.items() if number)
            free = f"{machine.free_cpus} CPUs, {machine.free_memory_mb / 1024:.1f} GB{cards} free"
        else:
            free = "takes no jobs"
        lines.append(f"  {machine.name} ({machine.state.partition('+')[0]}): {free}")
    return "\n".join(lines)


def _full(image: str) -> str:
    """Return an image's name with its tag."""
    return image if ":" in image.rpartition("/")[2] else f"{image}:latest"
