"""Containers are started in jobs: Slurm finds the room, and the agent there is asked whether the container runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from container_manager import room
from container_manager.agents import Agents, together
from container_manager.errors import ContainerError, NoRoomError

_PINNED_S = 1.0
_LOOK_S = 1.0
_FIRST_LOOK_S = 0.1
_SAY_S = 3.0


@dataclass(frozen=True)
class Launch:
    """A container that shall run in a job.

    Attributes:
        user, name: whose it is, and how they call it.
        image: what it is made of where it is not there yet; "" if it must be there.
        machine: where it is or shall be; "" for anywhere. With an image, it may come to be elsewhere.
        cpus, memory_mb, gpus: what its job asks for; GPUs by Slurm's word for their model.
        ports: how many it gets.
        counts_cpus: whether its CPUs are to be free of others that count theirs.
        patience_s: how long it may wait for room; None for ever.
    """

    user: str
    name: str
    image: str
    machine: str
    cpus: int
    memory_mb: int
    gpus: tuple[str, ...] = ()
    ports: int = 0
    counts_cpus: bool = True
    patience_s: float | None = None


class _Start:
    """A container that is being started.

    Attributes:
        job: that it shall run in, as soon as there is one.
        is_wanted: whether it still shall.
    """

    def __init__(self) -> None:
        self.job: int | None = None
        self.is_wanted = True


class Launches:
    """Containers that are being started, each in a job; methods may be called in many threads."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents
        self._starting: dict[Launch, _Start] = {}
        self._lock = threading.Lock()

    def start(self, launches: Sequence[Launch]) -> list[str]:
        """Have them all run, and return on which machines; or none: then their jobs have ended, and new ones are gone.

        Raises:
            NoRoomError: one had to wait for longer than it may.
            ContainerError: a job ended, or the agent refused it.
        """
        with self._lock:
            self._starting.update({launch: _Start() for launch in launches})
        try:
            return together(self._start, launches, giving_up=lambda: self._undo(launches))
        finally:
            with self._lock:
                for launch in launches:
                    del self._starting[launch]

    def give_up(self, containers: Collection[tuple[str, str]]) -> None:
        """End the jobs of those that are being started, by machine and name."""
        with self._lock:
            found = [launch for launch in self._starting if (launch.machine, launch.name) in containers]
        self._end_jobs(found)

    def _start(self, launch: Launch) -> str:
        job = room.submit(launch)
        start = self._starting[launch]
        with self._lock:
            start.job = job
        if not start.is_wanted:
            room.cancel([job])
        machine = self._wait_until_running(launch, job)
        if launch.machine and machine != launch.machine:
            self._agents.ask(launch.machine, "delete", name=launch.name)
        return machine

    def _wait_until_running(self, launch: Launch, job: int) -> str:
        machine, pinned = launch.machine, bool(launch.machine)
        began = time.monotonic()
        said = False
        while True:
            if machine and self._agents.ask(machine, "outcome", job=job, wait_s=_LOOK_S)["id"]:
                return machine
            found = room.job(job)
            waited_s = time.monotonic() - began
            if found.waits:
                if pinned and launch.image and waited_s > _PINNED_S:
                    room.let_go_anywhere(job)
                    pinned = False
                if launch.patience_s is not None and waited_s > launch.patience_s:
                    raise NoRoomError(f"there is no room for container {launch.name} now: {found.reason}")
                if launch.patience_s is None and not said and waited_s > _SAY_S:
                    print(f"{launch.name} waits for room, in job {job}: {found.reason}", file=sys.stderr)
                    said = True
                machine = ""
                time.sleep(_FIRST_LOOK_S if waited_s < _LOOK_S else _LOOK_S)
            elif found.state == "RUNNING":
                machine = found.machine
            else:
                if found.machine:
                    self._agents.ask(found.machine, "outcome", job=job, wait_s=0.0)  # which may know why
                raise ContainerError(f"container {launch.name} did not start: its job {job} is {found.state}")

    def _undo(self, launches: Sequence[Launch]) -> None:
        """End all jobs, and remove the containers that were made for them."""
        self._end_jobs(launches)
        new = [launch.name for launch in launches if not launch.machine]
        if not new:
            return
        for machine, answer in self._agents.ask_all("list").items():
            for name in [told["name"] for told in answer["containers"] if told["name"] in new]:
                self._agents.ask(machine, "stop", name=name)
                self._agents.ask(machine, "delete", name=name)

    def _end_jobs(self, launches: Sequence[Launch]) -> None:
        """End the jobs of those that are being started; one that is just being submitted is ended by who does that."""
        with self._lock:
            starts = [self._starting[launch] for launch in launches if launch in self._starting]
            for start in starts:
                start.is_wanted = False
            jobs = [start.job for start in starts if start.job is not None]
        room.cancel(jobs)
