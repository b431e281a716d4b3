"""Containers are started in jobs: Slurm finds the room, and the agent there is asked whether the container runs."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from container_manager import interrupts, room
from container_manager.agents import Agents
from container_manager.errors import ContainerError, NoRoomError

_PINNED_S = 1.0
_LOOK_S = 1.0
_FIRST_LOOK_S = 0.1
_SAY_S = 3.0
_END_S = 20.0


@dataclass(frozen=True)
class Launch:
    """A container that shall run in a job.

    Attributes:
        user, name: whose it is, and how they call it.
        image: what it is made of where it is not there yet; "" if it must be there.
        machine: where it is or shall be; "" for anywhere. With an image, it may come to be elsewhere.
        cpus, memory_mb, gpus: what its job asks for; GPUs by Slurm's word for their model.
        ports: how many it gets.
        shares_cpus: whether other such jobs may use the same CPUs.
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
    shares_cpus: bool = False
    patience_s: float | None = None


class Launches:
    """A block in which containers are started; where it does not come to its end, the jobs of all of them are ended."""

    def __init__(self, agents: Agents) -> None:
        self._agents = agents
        self._jobs: dict[int, Launch] = {}
        self._given_up = False
        self._lock = threading.Lock()

    def __enter__(self) -> Launches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            with interrupts.put_off():
                self._give_up()

    def start(self, launch: Launch) -> str:
        """Return the machine on which the container runs at last.

        Raises:
            NoRoomError: it had to wait for longer than it may.
            ContainerError: the job ended, or the agent refused it.
        """
        with interrupts.put_off():
            job = room.submit(launch)
            with self._lock:
                self._jobs[job] = launch
                late = self._given_up
        if late:
            room.cancel([job])
        machine = self._wait_until_running(launch, job)
        if launch.machine and machine != launch.machine:
            self._agents.ask(launch.machine, "delete", name=launch.name)
        return machine

    def _wait_until_running(self, launch: Launch, job: int) -> str:
        machine, pinned = launch.machine, bool(launch.machine)
        may_move = bool(launch.image)
        began = time.monotonic()
        said = False
        while True:
            if machine and self._agents.ask(machine, "outcome", job=job, wait_s=_LOOK_S)["id"]:
                return machine
            found = room.job(job)
            waited_s = time.monotonic() - began
            if found.waits:
                if pinned and may_move and waited_s > _PINNED_S:
                    room.let_go_anywhere(job)
                    pinned = False
                if launch.patience_s is not None and waited_s > launch.patience_s:
                    room.cancel([job])
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

    def _give_up(self) -> None:
        """End all jobs, and leave no container that was made for one of them."""
        with self._lock:
            self._given_up = True
            room.cancel(self._jobs)
        new = [launch.name for launch in self._jobs.values() if not launch.machine]
        if not new:
            return
        deadline = time.monotonic() + _END_S
        while any(not room.job(job).is_over for job in self._jobs) and time.monotonic() < deadline:
            time.sleep(_FIRST_LOOK_S)
        for machine, answer in self._agents.ask_all("list").items():
            for name in [told["name"] for told in answer["containers"] if told["name"] in new]:
                self._agents.ask(machine, "stop", name=name)
                self._agents.ask(machine, "delete", name=name)
