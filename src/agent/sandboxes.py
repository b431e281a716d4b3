"""Sandboxes: containers of one fixed shape, each of which serves one call and is destroyed.

A sandbox is made, boots until its process has connected to the agent and is ready, serves one call, and is gone. It
hangs on that connection: its first process ends when the agent does.
"""

from __future__ import annotations

import enum
import json
import logging
import os
import platform
import re
import select
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent import seccomp, usage, wire
from agent.engine import Engine, EngineError
from agent.policy import Limits, Profile

UID = 65533
LABEL = "cfiddle.sandbox"
_INSIDE = "/run/cfiddle"
_SOCKET = "sandbox.sock"
_LOOK_S = 0.5
_DEATH_S = 5.0

log = logging.getLogger("agent")


class State(enum.Enum):
    """Where a sandbox is in its one life."""

    MADE = "made"
    READY = "ready"
    SERVING = "serving"
    GONE = "gone"


class SandboxError(Exception):
    """A sandbox did not get as far as serving a call."""


class Abandoned(Exception):
    """Whoever wanted the sandbox is gone."""


def configuration(
    *,
    profile: Profile,
    limits: Limits,
    cpus: str,
    socket_directory: str,
    labels: dict[str, str],
    cgroup_parent: str,
    seccomp_profile: str,
) -> dict[str, Any]:
    """Return what the engine is asked for: all of it is the policy's or fixed here, nothing is the caller's.

    Args:
        cpus: as in "0-3,8"; "" for all.
        socket_directory: where on the machine the sandbox's socket is.
    """
    tmpfs = f"rw,exec,nosuid,nodev,size={limits.tmpfs_mb}m,nr_inodes={limits.tmpfs_files},mode=1777"
    memory = limits.memory_mb * 2**20
    ulimits = {"nofile": limits.open_files, "fsize": limits.file_mb * 2**20, "core": 0, "msgqueue": 0, "memlock": 2**16}
    return {
        "Image": profile.image,
        "Entrypoint": list(profile.command),
        "Cmd": [],
        "User": f"{UID}:{UID}",
        "WorkingDir": "/tmp",
        "Hostname": "sandbox",
        "NetworkDisabled": True,
        "Labels": {"cfiddle.cluster": "cfiddle", LABEL: "1", **labels},
        "HostConfig": {
            "AutoRemove": False,
            "Binds": [f"{socket_directory}:{_INSIDE}:ro"],
            "CapAdd": [],
            "CapDrop": ["ALL"],
            "CgroupParent": cgroup_parent,
            "CpusetCpus": cpus,
            "Init": False,
            "IpcMode": "none",
            "LogConfig": {"Type": "none"},
            "Memory": memory,
            "MemorySwap": memory,  # memory and swap together
            "NetworkMode": "none",
            "OomKillDisable": False,
            "PidsLimit": limits.processes,
            "Privileged": False,
            "ReadonlyRootfs": True,
            "RestartPolicy": {"Name": "no"},
            "SecurityOpt": ["no-new-privileges", f"seccomp={seccomp_profile}"],
            "Tmpfs": {"/dev/shm": tmpfs, "/tmp": tmpfs},
            "Ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in ulimits.items()],
        },
    }


class Sandbox:
    """One sandbox; `connection` is the socket to its first process once it is ready."""

    def __init__(
        self, engine: Engine, container: str, limits: Limits, listener: socket.socket, cgroup: usage.Cgroup
    ) -> None:
        self.container = container
        self.limits = limits
        self.state = State.MADE
        self.connection = listener
        self.cgroup = cgroup
        self._engine = engine

    def wait_until_ready(self, *, timeout_s: float, waiter: socket.socket | None = None) -> None:
        """Wait until its process has said that it is ready.

        Args:
            waiter: whoever waits for it; the wait ends when that connection is closed.

        Raises:
            SandboxError: it is not ready in time, or ends, or speaks otherwise.
            Abandoned: nobody waits any more.
        """
        deadline = time.monotonic() + timeout_s
        self._await(deadline, waiter)
        listener, self.connection = self.connection, self.connection.accept()[0]
        listener.close()
        self._await(deadline, waiter)
        try:
            message, _ = wire.receive(self.connection)
        except (EOFError, OSError, wire.Refused) as error:
            raise SandboxError(f"its process spoke otherwise than it should: {error}") from error
        if message != {"type": "ready"}:
            raise SandboxError("its process did not say that it is ready")
        self.state = State.READY

    def _await(self, deadline: float, waiter: socket.socket | None) -> None:
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        if waiter:
            poller.register(waiter, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll(_LOOK_S * 1000)]
            if waiter and waiter.fileno() in ready:
                raise Abandoned
            if ready:
                return
            if time.monotonic() > deadline:
                raise SandboxError("its process was not ready in time")
            state = self._engine.inspect(self.container)["State"]
            if not state["Running"]:
                raise SandboxError(f"its process ended with status {state['ExitCode']} before it was ready")

    def hand_over(self, descriptors: Sequence[int]) -> None:
        """Give it its one call: the descriptors over which the call comes, and its output goes.

        Raises:
            SandboxError: its process is gone, or had its call already.
        """
        if self.state is not State.READY:
            raise SandboxError(f"it is {self.state.value}, not ready: a sandbox serves one call")
        self.state = State.SERVING
        self.connection.settimeout(_DEATH_S)
        try:
            wire.send(self.connection, {"type": "call"}, descriptors)
        except OSError as error:
            raise SandboxError(f"its process is gone: {error}") from error

    def status(self) -> int:
        """Read the one thing that a serving sandbox says: how the call's process ended (negative: by which signal).

        Raises:
            EOFError: its first process ended without a word.
            SandboxError: it says something else.
        """
        try:
            message, _ = wire.receive(self.connection)
        except (OSError, wire.Refused) as error:
            raise SandboxError(f"its first process spoke otherwise than it should: {error}") from error
        status = message.get("status")
        if message.get("type") != "done" or type(status) is not int or not -128 < status < 256:
            raise SandboxError("its first process spoke otherwise than it should")
        return status

    def autopsy(self) -> tuple[int, bool]:
        """Return the status of its first process, which ended by itself, and whether memory was the reason."""
        status = self._engine.wait(self.container)
        return status, bool(self._engine.inspect(self.container)["State"]["OOMKilled"])

    def kill(self) -> None:
        """Kill all its processes and wait until they are dead."""
        try:
            self._engine.kill(self.container)
        except EngineError as error:
            log.warning("sandbox %.12s cannot be killed: %s", self.container, error)
            return
        deadline = time.monotonic() + _DEATH_S
        while time.monotonic() < deadline:
            self.connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                wire.receive(self.connection)
            except wire.Refused:
                continue
            except (EOFError, OSError):
                return


class Sandboxes:
    """Makes sandboxes on this machine's engine and sees to it that none is left behind."""

    def __init__(self, engine: Engine, directory: Path, *, cgroups: Path) -> None:
        """Find out what making one takes.

        Args:
            directory: for their sockets; nobody but root may reach it.
            cgroups: the machine's cgroup tree.

        Raises:
            EngineError: the engine does not answer.
        """
        self._engine = engine
        self._directory = directory
        self._host_directory = _on_the_machine(engine, directory)
        self._cgroups = cgroups
        self._cgroup_parent = usage.parent(str(engine.info()["CgroupDriver"]))
        self._seccomp = json.dumps(seccomp.profile(platform.machine()), separators=(",", ":"))
        self._lock = threading.Lock()
        self._making = 0
        self._live: dict[str, Path] = {}
        self._left = threading.Event()
        threading.Thread(target=self._tidy, name="tidy", daemon=True).start()

    def image_id(self, profile: Profile) -> str:
        """Return the digest of a profile's image; raise EngineError if this machine lacks it."""
        return str(self._engine.image(profile.image)["Id"])

    def make(self, profile: Profile, limits: Limits, *, cpus: str, labels: dict[str, str]) -> Sandbox:
        """Create and start a sandbox.

        Args:
            cpus: as in "0-3,8"; "" for all.
            labels: what its container is labelled with beside what all are.

        Raises:
            EngineError: the engine does not make it.
            SandboxError: there is no place for its socket.
        """
        identifier = os.urandom(16).hex()
        directory = self._directory / identifier
        with self._lock:
            self._making += 1
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            directory.mkdir(mode=0o711)
            listener.bind(os.fspath(directory / _SOCKET))
            os.chown(directory / _SOCKET, UID, UID)
            listener.listen(1)
            wanted = configuration(
                profile=profile,
                limits=limits,
                cpus=cpus,
                socket_directory=f"{self._host_directory}/{identifier}",
                labels=labels,
                cgroup_parent=self._cgroup_parent,
                seccomp_profile=self._seccomp,
            )
            container = self._engine.create(f"cfiddle-sandbox-{identifier}", wanted)
            self._engine.start(container)
            with self._lock:
                self._live[container] = directory
            return Sandbox(self._engine, container, limits, listener, usage.Cgroup(self._cgroups, container))
        except BaseException as error:
            listener.close()
            self._left.set()
            if isinstance(error, OSError):
                raise SandboxError(f"no place for its socket: {error}") from error
            raise
        finally:
            with self._lock:
                self._making -= 1

    def destroy(self, sandbox: Sandbox) -> None:
        """End a sandbox with all its processes and remove it; what the engine cannot do now is done later."""
        sandbox.state = State.GONE
        sandbox.connection.close()
        with self._lock:
            directory = self._live.pop(sandbox.container)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            self._engine.remove(sandbox.container)
        except EngineError as error:
            log.warning("sandbox %.12s cannot be removed yet: %s", sandbox.container, error)
            self._left.set()

    def sweep(self) -> int:
        """Remove every sandbox that nobody here holds; return how many there were.

        Raises:
            EngineError: the engine does not answer, or one could not be removed.
        """
        found = self._engine.containers(LABEL)
        with self._lock:
            if self._making:
                raise EngineError(0, "a sandbox is being made")
            strays = [container for container in found if container not in self._live]
            kept = {directory.name for directory in self._live.values()}
        for container in strays:
            self._engine.remove(container)
        for directory in self._directory.iterdir():
            if directory.name not in kept:
                shutil.rmtree(directory, ignore_errors=True)
        return len(strays)

    def destroy_all(self) -> None:
        """End and remove all sandboxes, those that serve too."""
        with self._lock:
            live = list(self._live)
        for container in live:
            self._engine.kill(container)
        for container in live:
            self._engine.remove(container)

    def _tidy(self) -> None:
        """Try again what could not be removed, as often as it takes."""
        while True:
            self._left.wait()
            time.sleep(1)
            self._left.clear()
            try:
                self.sweep()
            except EngineError:
                self._left.set()


def _on_the_machine(engine: Engine, directory: Path) -> str:
    """Return where the engine finds a directory of this process, which may itself run in a container."""
    mounts = Path("/proc/self/mountinfo").read_text()
    own = re.search(r"/containers/([0-9a-f]{64})/hostname /etc/hostname ", mounts)
    if not own:
        return os.fspath(directory)
    for mount in engine.inspect(own[1])["Mounts"]:
        if mount["Destination"] == os.fspath(directory):
            return str(mount["Source"])
    raise EngineError(0, f"{directory} is no mount of the agent's container: the engine cannot find sockets in it")
