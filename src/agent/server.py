"""Serve calls: each from a user who holds the job that it names, each in a sandbox of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from agent import node, wire
from agent.container_request import hold_request
from agent.containers import Containers
from agent.engine import EngineError
from agent.grants import Grant, Grants
from agent.policy import MIN_MEMORY_MB, Policy, Profile
from agent.pool import Pool
from agent.quiet import Quiet
from agent.request import CallRequest, call_request, lease_request
from agent.sandboxes import Abandoned, Holder, Sandbox, SandboxError, Sandboxes
from agent.usage import Reading

_REQUEST_S = 5.0
_LOOK_S = 0.5
_CONNECTIONS_PER_USER = 64
_PAUSE_S = 0.1

log = logging.getLogger("agent")


class Ending(NamedTuple):
    """Why a call is over."""

    reason: str
    exit_status: int | None
    detail: str
    reading: Reading


class Server:
    """The agent's socket and the calls that come over it."""

    def __init__(
        self,
        path: Path,
        *,
        policy: Policy,
        grants: Grants,
        quiet: Quiet,
        sandboxes: Sandboxes,
        containers: Containers | None,
    ) -> None:
        self._policy = policy
        self._grants = grants
        self._sandboxes = sandboxes
        self._containers = containers
        self._quiet = quiet
        self._pool = Pool(sandboxes, grants, quiet, policy.profiles.values())
        self._closing = False
        self._lock = threading.Lock()
        self._connections: Counter[int] = Counter()
        self._calls: Counter[int] = Counter()
        self._ending = 0
        self._changed = threading.Condition(self._lock)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listener.bind(os.fspath(path))
        path.chmod(0o666)  # who may do what is decided by uid and grant
        self._listener.listen(256)

    def run(self) -> None:
        """Accept connections for ever, each in a thread of its own."""
        while True:
            try:
                connection, _ = self._listener.accept()
                self._let_in(connection)
            except (OSError, RuntimeError) as error:  # no descriptor or no thread is to be had just now
                log.warning("nobody can be let in: %s", error)
                time.sleep(_PAUSE_S)

    def _let_in(self, connection: socket.socket) -> None:
        uid = _peer_uid(connection)
        with self._lock:
            if self._connections[uid] >= _CONNECTIONS_PER_USER:
                connection.close()
                return
            self._connections[uid] += 1
        try:
            threading.Thread(target=self._serve, args=(connection, uid), daemon=True).start()
        except RuntimeError:
            connection.close()
            with self._lock:
                self._connections[uid] -= 1
            raise

    def close(self) -> None:
        """End all calls and remove their sandboxes."""
        self._closing = True
        self._listener.close()
        self._pool.close()
        self._sandboxes.destroy_all()

    def _serve(self, connection: socket.socket, uid: int) -> None:
        connection.settimeout(_REQUEST_S)
        descriptors: list[int] = []
        try:
            message, descriptors = wire.receive(connection, descriptors=len(wire.DESCRIPTORS))
            self._answer(connection, uid, message, descriptors)
        except (wire.Refused, EngineError, SandboxError) as error:
            code = error.code if isinstance(error, wire.Refused) else "sandbox"
            text = str(error) if isinstance(error, wire.Refused) else f"a sandbox could not be started: {error}"
            log.info("user %d refused (%s): %s", uid, code, text)
            _tell(connection, {"type": "refused", "code": code, "message": text})
        except (EOFError, Abandoned, OSError):
            pass  # nobody is there any more
        except Exception:
            log.exception("a call of user %d failed", uid)
            _tell(connection, {"type": "refused", "code": "internal", "message": "the agent failed; its log says why"})
        finally:
            wire.close(descriptors)
            connection.close()
            with self._lock:
                self._connections[uid] -= 1

    def _answer(self, connection: socket.socket, uid: int, message: dict[str, Any], descriptors: list[int]) -> None:
        wire.check_version(message)
        if message.get("type") == "ping":
            profiles = sorted(self._policy.profiles)
            wire.send(connection, {"type": "pong", "versions": list(wire.VERSIONS), "profiles": profiles})
        elif message.get("type") == "call":
            self._call(connection, uid, call_request(message), descriptors)
        elif message.get("type") == "lease":
            self._lease(connection, uid, lease_request(message))
        elif message.get("type") == "container":
            self._container(connection, uid, hold_request(message))
        elif message.get("type") == "list":
            self._list(connection, uid)
        else:
            raise wire.Refused("field", "type is none of call, container, lease, list, ping")

    def _call(self, connection: socket.socket, uid: int, request: CallRequest, descriptors: list[int]) -> None:
        grant = self._grant(uid, request.job)
        profile = self._profile(request)
        check_descriptors(descriptors)
        with self._slot(uid):
            limits = profile.limits.lowered(request.seconds, request.memory_mb)
            cpus = profile.limits.cpus_in(grant.cpus)
            given = self._pool.sandbox(profile, limits, cpus=cpus, waiter=connection, job=request.job, grant=grant)
            with given as sandbox:
                sandbox.holder = Holder(request.id, request.job, uid)
                self._run(connection, request, grant, sandbox, descriptors)

    def _lease(self, connection: socket.socket, uid: int, job: int) -> None:
        """Hold a lease as long as its connection and its job last."""
        grant = self._grant(uid, job)
        with self._quiet.lease(job, grant):
            wire.send(connection, {"type": "held"})
            poller = select.poll()
            poller.register(connection, select.POLLIN)
            while not poller.poll(_LOOK_S * 1000) and self._grants.find(job) == grant:
                pass

    def _container(self, connection: socket.socket, uid: int, request: dict[str, Any]) -> None:
        if self._containers is None:
            raise wire.Refused("containers", "policy.yaml of this cluster allows no containers")
        connection.settimeout(None)
        self._containers.hold(connection, uid, request)

    def _list(self, connection: socket.socket, uid: int) -> None:
        """Tell root which sandboxes there are, a packet for each."""
        if uid != 0:
            raise wire.Refused("user", "only root may ask which sandboxes there are")
        for sandbox in self._sandboxes.held():
            holder = sandbox.holder
            told = {"container": sandbox.container, "state": sandbox.state.value, "profile": sandbox.profile.name}
            wire.send(connection, {"type": "sandbox", **told, "holder": holder and holder._asdict()})
        wire.send(connection, {"type": "end"})

    def _grant(self, uid: int, job: int) -> Grant:
        grant = self._grants.find(job)
        if grant is None or grant.uid != uid:
            raise wire.Refused("job", f"user {uid} has no job {job} on {os.uname().nodename}")
        return grant

    def _profile(self, request: CallRequest) -> Profile:
        profile = self._policy.profiles.get(request.profile)
        if profile is None:
            known = ", ".join(sorted(self._policy.profiles))
            raise wire.Refused("profile", f"there is no profile {request.profile}; there are: {known}")
        if request.memory_mb is not None and request.memory_mb < MIN_MEMORY_MB:
            raise wire.Refused("field", f"memory_mb is {request.memory_mb}; a sandbox needs {MIN_MEMORY_MB}")
        return profile

    def _run(
        self,
        connection: socket.socket,
        request: CallRequest,
        grant: Grant,
        sandbox: Sandbox,
        descriptors: list[int],
    ) -> None:
        limits = sandbox.limits
        with self._changed:  # what another call leaves to the kernel to clear away shall not disturb this one
            self._changed.wait_for(lambda: not self._ending, _REQUEST_S)
        before = sandbox.cgroup.read()
        sandbox.hand_over(descriptors)
        began = time.monotonic()
        wire.close(descriptors)
        descriptors.clear()
        in_force = {
            "seconds": limits.seconds,
            "memory_mb": limits.memory_mb,
            "processes": limits.processes,
            "output_mb": limits.output_mb,
        }
        fingerprint = node.fingerprint(
            cpus=sandbox.cpus, image=sandbox.image, counters=node.counters(sandbox.profile, sandbox.counters)
        )
        started = {"type": "started", "container": sandbox.container, "limits": in_force, "node": fingerprint}
        _tell(connection, started)
        ending = self._watch(connection, request, grant, sandbox, began + limits.seconds)
        wall_s = time.monotonic() - began
        used = {
            "wall_s": round(wall_s, 6),
            "user_s": _difference(before.user_s, ending.reading.user_s),
            "system_s": _difference(before.system_s, ending.reading.system_s),
            "peak_memory_mb": ending.reading.peak_memory_mb,
        }
        known = {"reason": ending.reason, "exit_status": ending.exit_status, "detail": ending.detail}
        if sandbox.has_returned:
            with self._lock:
                self._ending += 1
        _tell(connection, {"type": "ended", **known, "usage": used, "node": fingerprint})
        if sandbox.has_returned:
            self._see_off(sandbox)
        log.info(
            "call %s of user %d, job %d, in %.12s: %s %s after %.3f s%s",
            *(request.id, grant.uid, request.job, sandbox.container, ending.reason, ending.exit_status, wall_s),
            f" ({ending.detail})" if ending.detail else "",
        )

    def _see_off(self, sandbox: Sandbox) -> None:
        try:
            sandbox.see_off()
        finally:
            with self._changed:
                self._ending -= 1
                self._changed.notify_all()

    def _watch(
        self, connection: socket.socket, request: CallRequest, grant: Grant, sandbox: Sandbox, deadline: float
    ) -> Ending:
        """Wait until the call is over, and end it where nobody may wait any longer; then none of it runs any more."""
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        poller.register(sandbox.connection, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            ready = [fd for fd, _ in poller.poll(max(0.0, min(left, _LOOK_S)) * 1000)]
            if sandbox.connection.fileno() in ready:
                if ending := self._over(sandbox):
                    return ending
                continue
            if connection.fileno() in ready:
                return self._end(sandbox, "cancelled", "the caller is gone")
            if self._grants.find(request.job) != grant:
                return self._end(sandbox, "cancelled", f"job {request.job} ended")
            if left <= 0:
                return self._end(sandbox, "time", f"time limit of {sandbox.limits.seconds:g} s")

    def _end(self, sandbox: Sandbox, reason: str, detail: str) -> Ending:
        reading = sandbox.cgroup.read()
        sandbox.kill()
        return Ending(reason, None, detail, reading)

    def _over(self, sandbox: Sandbox) -> Ending | None:
        """Find out how a call ended whose sandbox has something to say, or has just died; None if it goes on."""
        limits = sandbox.limits
        try:
            status = sandbox.status()
        except EOFError:
            if self._closing:
                return Ending("cancelled", None, "the agent was told to end", Reading())
            status, out_of_memory = sandbox.autopsy()
            if out_of_memory:
                return Ending("memory", None, f"memory limit of {limits.memory_mb} MB", Reading())
            return Ending("error", None, f"the sandbox's first process ended with status {status}", Reading())
        except SandboxError as error:
            return self._end(sandbox, "error", str(error))
        if status is None:
            return None
        reading = sandbox.cgroup.read()
        if not sandbox.has_returned:
            sandbox.see_off()
        reason, detail = "exited", ""
        if reading.oom_kills:
            reason, detail = "memory", f"memory limit of {limits.memory_mb} MB"
        elif reading.refused_forks:
            reason, detail = "processes", f"limit of {limits.processes} processes"
        if status == 0 and detail:
            # The call went on without what the limit took from it, and returned.
            reason, detail = "exited", f"{detail} was reached on the way"
        return Ending(reason, status, detail, reading)

    @contextlib.contextmanager
    def _slot(self, uid: int) -> Iterator[None]:
        """Count a call while it lasts; refuse one too many."""
        with self._lock:
            if self._calls[uid] >= self._policy.calls_per_user:
                raise wire.Refused(
                    "busy", f"{self._calls[uid]} calls of user {uid} run on this machine, the most there may be"
                )
            if self._calls.total() >= self._policy.calls_at_once:
                raise wire.Refused("busy", f"{self._calls.total()} calls run on this machine, the most there may be")
            self._calls[uid] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[uid] -= 1


def check_descriptors(descriptors: list[int]) -> None:
    """Refuse anything but a connected Unix stream socket, and for output such sockets or pipes.

    What else a descriptor may stand for (a directory, a device, a network) would be in the sandbox with it.
    """
    if len(descriptors) != len(wire.DESCRIPTORS):
        raise wire.Refused("descriptors", f"{len(descriptors)} descriptors came, not {len(wire.DESCRIPTORS)}")
    for name, descriptor in zip(wire.DESCRIPTORS, descriptors, strict=True):
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) and name != "channel":
            continue
        if not stat.S_ISSOCK(mode) or not _is_unix_stream(descriptor):
            wanted = "a connected Unix stream socket" + ("" if name == "channel" else " or a pipe")
            raise wire.Refused("descriptors", f"{name} is not {wanted}")


def _is_unix_stream(descriptor: int) -> bool:
    try:
        found = socket.socket(fileno=descriptor)  # it owns the descriptor only if this succeeds
        try:
            found.getpeername()
            return found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM
        finally:
            found.detach()
    except OSError:
        return False


def _peer_uid(connection: socket.socket) -> int:
    # The process id that stands there too reads 0 across containers; it proves nothing and is not used.
    credentials = struct.Struct("iII")
    _, uid, _ = credentials.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    return int(uid)


def _tell(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        wire.send(connection, message)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else round(after - before, 6)
