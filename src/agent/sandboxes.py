"""Sandboxes: containers of one fixed shape, each of which serves one call and is destroyed.

A sandbox is made, started, boots until its process has connected to the agent, prepares itself if there is time for it,
serves one call, and is gone. It hangs on that connection: its first process ends when the agent does.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import logging
import os
import platform
import select
import shutil
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agent import duty, own, seccomp, usage, wire
from agent.engine import Engine, EngineError
from agent.policy import Limits, Mount, Profile

UID = 65533
LABEL = "cfiddle.sandbox"
_INSIDE = "/run/cfiddle"
_SOCKET = "sandbox.sock"
_LOOK_S = 0.5
_DEATH_S = 5.0
_FAREWELL_S = 0.1
_CREATE_S = 5.0

log = logging.getLogger("agent")


class State(enum.Enum):
    """Where a sandbox is in its one life; from CONNECTED on it can take its call."""

    MADE = "made"
    CONNECTED = "connected"
    READY = "ready"
    SERVING = "serving"
    SERVED = "served"
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
        "Labels": {"cfiddle.cluster": "cfiddle", LABEL: "1"},
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
            "Mounts": [_bind(mount) for mount in profile.mounts],
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


def _bind(mount: Mount) -> dict[str, Any]:
    # Read-only holds for the one file system: what is mounted below its source stays out.
    options = {"NonRecursive": True, "Propagation": "rprivate"}
    return {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": True, "BindOptions": options}


class Holder(NamedTuple):
    """Whose call a sandbox serves."""

    call: str
    job: int
    uid: int


class Sandbox:
    """One sandbox.

    Attributes:
        container: its id.
        profile, limits, cpus: what it was made for, and what is in force.
        holder: whose call it has been given.
        image: the digest of its image, once it has started.
        counters: 0 if its process could open a hardware counter, else the error's number; None where it did not say.
        connection: the socket to its first process, once that has connected; before, the one that waits for it.
        has_returned: its call is over, and the call's process is just ending.
    """

    def __init__(
        self,
        engine: Engine,
        cgroups: Path,
        container: str,
        listener: socket.socket,
        *,
        profile: Profile,
        limits: Limits,
        cpus: str,
    ) -> None:
        self.container = container
        self.profile = profile
        self.limits = limits
        self.cpus = cpus
        self.state = State.MADE
        self.holder: Holder | None = None
        self.image = ""
        self.counters: int | None = None
        self.connection = listener
        self.has_returned = False
        self._engine = engine
        self._cgroups = cgroups
        self._frozen = False
        self._listens = True
        self._prepares = False

    @functools.cached_property
    def cgroup(self) -> usage.Cgroup:
        """Its control group; to be asked for once it has started."""
        return usage.Cgroup(self._cgroups, self.container)

    def start(self) -> None:
        """Start it; an EngineError if that fails."""
        self._engine.start(self.container)
        self.image = str(self._engine.inspect(self.container)["Image"])

    def wait_until(self, wanted: State, *, timeout_s: float, wake: int) -> bool:
        """Wait until it is CONNECTED or READY, or something else happens; then one may wait again.

        Args:
            wanted: to become READY it is told to import what the profile's command names.
            wake: a descriptor; the wait ends when it becomes readable.

        Returns:
            Whether the sandbox has come so far.

        Raises:
            SandboxError: it has not in time, or ends, or speaks otherwise.
        """
        deadline = time.monotonic() + timeout_s
        while self.state not in (wanted, State.READY):
            if self.state is State.CONNECTED and not self._prepares:
                self._tell("prepare")
                self._prepares = True
            poller = select.poll()
            poller.register(self.connection, select.POLLIN)
            poller.register(wake, select.POLLIN)
            ready = [fd for fd, _ in poller.poll(_LOOK_S * 1000)]
            if wake in ready:
                return False
            if ready:
                self._boot()
                continue
            if time.monotonic() > deadline:
                raise SandboxError("its process was not ready in time")
            state = self._engine.inspect(self.container)["State"]
            if not state["Running"]:
                raise SandboxError(f"its process ended with status {state['ExitCode']} before it was ready")
        return True

    def _boot(self) -> None:
        if self._listens:
            listener, self.connection = self.connection, self.connection.accept()[0]
            listener.close()
            self._listens = False
            return
        message = self._heard()
        if self.state is State.MADE and message.get("type") == "connected":
            counters = message.get("counters")
            self.counters = counters if type(counters) is int else None
            self.state = State.CONNECTED
        elif self._prepares and message.get("type") == "ready":
            self._prepares = False
            self.state = State.READY
        else:
            raise SandboxError("its process did not say that it is ready")

    def _heard(self) -> dict[str, Any]:
        try:
            return wire.receive(self.connection)[0]
        except (EOFError, OSError, wire.Refused) as error:
            raise SandboxError(f"its process spoke otherwise than it should: {error}") from error

    def _tell(self, what: str, descriptors: Sequence[int] = ()) -> None:
        self.connection.settimeout(_DEATH_S)
        try:
            wire.send(self.connection, {"type": what}, descriptors)
        except OSError as error:
            raise SandboxError(f"its process is gone: {error}") from error

    def is_well(self) -> bool:
        """Return whether it waits for its call; one whose process has ended, or speaks unasked, does not."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        return self.state is State.READY and not poller.poll(0)

    def freeze(self) -> None:
        """Let none of its processes run until `thaw`; a SandboxError where that cannot be had."""
        self._frozen = True
        try:
            self.cgroup.freeze()
        except OSError as error:
            raise SandboxError(f"it cannot be made to stand still: {error}") from error

    def thaw(self) -> None:
        """Let its processes run again, if they were made to stand still; a SandboxError where that cannot be had."""
        if self._frozen:
            try:
                self.cgroup.thaw()
            except OSError as error:
                raise SandboxError(f"it stands still for ever: {error}") from error
            self._frozen = False

    def lower(self, limits: Limits, cpus: str) -> None:
        """Put other limits in force: of seconds and memory, and of CPUs.

        Raises:
            EngineError: the engine does not do it; less memory than is in use cannot be had.
        """
        memory = limits.memory_mb * 2**20
        changes: dict[str, Any] = {}
        if limits.memory_mb != self.limits.memory_mb:
            changes.update(Memory=memory, MemorySwap=memory)
        if cpus != self.cpus:
            changes.update(CpusetCpus=cpus)
        if changes:
            self._engine.update(self.container, changes)
        self.limits, self.cpus = limits, cpus

    def hand_over(self, descriptors: Sequence[int]) -> None:
        """Give it its one call: the descriptors over which the call comes, and its output goes.

        Raises:
            SandboxError: its process is gone, or had its call already.
        """
        if self.state not in (State.CONNECTED, State.READY):
            raise SandboxError(f"it is {self.state.value}, not ready: a sandbox serves one call")
        self.state = State.SERVING
        self._tell("call", descriptors)

    def status(self) -> int | None:
        """Read what a serving sandbox says: how the call's process ended (negative: by which signal).

        The status is 0 as soon as the call has returned (`has_returned`); the process takes a while to end after that.

        Returns:
            None if it says something else, for which it had leave.

        Raises:
            EOFError: its first process ended without a word.
            SandboxError: it speaks otherwise than it should.
        """
        try:
            message, _ = wire.receive(self.connection)
        except (OSError, wire.Refused) as error:
            raise SandboxError(f"its first process spoke otherwise than it should: {error}") from error
        kind = message.get("type")
        if kind == "ready" and self._prepares:  # it was under way when the call was handed over
            self._prepares = False
            return None
        if kind == "returned" and not self.has_returned:
            self.has_returned = True
            return 0
        status = message.get("status")
        if kind != "done" or type(status) is not int or not -128 < status < 256:
            raise SandboxError("its first process spoke otherwise than it should")
        return status

    def see_off(self) -> None:
        """Wait until nothing of a call that has returned runs any more; see to it, if something does."""
        if self.has_returned:
            with contextlib.suppress(EOFError, SandboxError):
                self.connection.settimeout(_FAREWELL_S)
                self.status()
        if self.cgroup.read().processes == 1:  # its first process, which waits
            self.state = State.SERVED
        else:  # something was left running
            self.kill()

    def autopsy(self) -> tuple[int, bool]:
        """Return the status of its first process, which ended by itself, and whether memory was the reason."""
        status = self._engine.wait(self.container)
        self.state = State.SERVED
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
                self.state = State.SERVED
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
        self._host_directory = own.place_on_machine(engine, directory)
        self._cgroups = cgroups
        self._cgroup_parent = usage.parent(str(engine.info()["CgroupDriver"]))
        self._seccomp = {
            counters: json.dumps(seccomp.profile(platform.machine(), counters=counters), separators=(",", ":"))
            for counters in (False, True)
        }
        self._lock = threading.Condition()
        self._making = 0
        self._closed = False
        self._live: dict[str, tuple[Sandbox, Path]] = {}
        self._left = threading.Event()
        duty.begin(self._tidy, "tidy")

    def check_image(self, profile: Profile) -> None:
        """Raise EngineError if this machine lacks a profile's image."""
        self._engine.image(profile.image)

    def create(self, profile: Profile, limits: Limits, *, cpus: str) -> Sandbox:
        """Make a sandbox that is still to be started.

        Args:
            cpus: as in "0-3,8"; "" for all.

        Raises:
            EngineError: the engine does not make it.
            SandboxError: there is no place for its socket.
        """
        identifier = os.urandom(16).hex()
        directory = self._directory / identifier
        with self._lock:
            if self._closed:
                raise SandboxError("the agent ends")
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
                cgroup_parent=self._cgroup_parent,
                seccomp_profile=self._seccomp[profile.counters],
            )
            container = self._engine.create(f"cfiddle-sandbox-{identifier}", wanted)
            sandbox = Sandbox(
                self._engine, self._cgroups, container, listener, profile=profile, limits=limits, cpus=cpus
            )
            with self._lock:
                self._live[container] = sandbox, directory
            return sandbox
        except BaseException as error:
            listener.close()
            self._left.set()
            if isinstance(error, OSError):
                raise SandboxError(f"no place for its socket: {error}") from error
            raise
        finally:
            with self._lock:
                self._making -= 1
                self._lock.notify_all()

    def destroy(self, sandbox: Sandbox) -> None:
        """End a sandbox with all its processes and remove it; what the engine cannot do now is done later."""
        sandbox.state = State.GONE
        sandbox.connection.close()
        with self._lock:
            _, directory = self._live.pop(sandbox.container)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            sandbox.thaw()
            self._engine.remove(sandbox.container)
        except (EngineError, SandboxError) as error:
            log.warning("sandbox %.12s cannot be removed yet: %s", sandbox.container, error)
            self._left.set()

    def held(self) -> list[Sandbox]:
        """Return all sandboxes that are there."""
        with self._lock:
            return [sandbox for sandbox, _ in self._live.values()]

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
            kept = {directory.name for _, directory in self._live.values()}
        for container in strays:
            self._thaw(container)  # an agent that was killed may have left it frozen
            self._engine.remove(container)
        for directory in self._directory.iterdir():
            if directory.name not in kept:
                shutil.rmtree(directory, ignore_errors=True)
        return len(strays)

    def destroy_all(self) -> None:
        """Make no more sandboxes; end and remove all, those that serve too."""
        with self._lock:
            self._closed = True
            self._lock.wait_for(lambda: not self._making, _CREATE_S)
            live = [sandbox for sandbox, _ in self._live.values()]
        for sandbox in live:
            sandbox.thaw()
            self._engine.kill(sandbox.container)
        for sandbox in live:
            self._engine.remove(sandbox.container)

    def _thaw(self, container: str) -> None:
        try:
            usage.Cgroup(self._cgroups, container).thaw()
        except OSError as error:
            raise EngineError(0, f"sandbox {container:.12} stands still for ever: {error}") from error

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
