"""Sandboxes that were made before anybody asked, and used ones that are still to be removed.

Both are work that would spoil a measurement, so it is done while none runs. One that is being made when a measurement
begins stands still until it is over, or until a call takes it. A used one, in which nothing runs any more, is removed
then too, or with the end of its job, or when too many wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from agent import duty
from agent.engine import EngineError
from agent.grants import Grant, Grants
from agent.policy import Limits, Profile
from agent.quiet import Quiet
from agent.sandboxes import Abandoned, Sandbox, SandboxError, Sandboxes, State

_BOOT_S = 30.0
_SETTLE_S = 0.02
"""Nothing has been measured for so long when work begins: a call that follows another comes sooner."""
_WORKING_LOOK_S = 0.005
_IDLE_LOOK_S = 0.1
_MOST_USED = 8
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0

log = logging.getLogger("agent")


class _Making:
    """A sandbox that is being made for the pool.

    Attributes:
        claimed: a call waits for it.
        sandbox: what came of it, once it is over.
        wake, over: descriptors that become readable when it may have to stop or go on, and when it is over.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.claimed = False
        self.sandbox: Sandbox | None = None
        self.wake = os.eventfd(0)
        self.over = os.eventfd(0)

    def __del__(self) -> None:
        os.close(self.wake)
        os.close(self.over)


class _Used(NamedTuple):
    sandbox: Sandbox
    job: int
    grant: Grant


class _Closed(Exception):
    """The agent ends."""


_EXPECTED = (EngineError, SandboxError, OSError, _Closed)


class _Trouble:
    """How often in a row a profile's sandboxes could not be made, and when that is tried again."""

    def __init__(self) -> None:
        self._retry_s = 0.0
        self.until = 0.0

    def note(self, profile: str, error: Exception) -> None:
        if not self._retry_s:
            unexpected = None if isinstance(error, _EXPECTED) else error
            log.warning("no sandbox of profile %s can be made to wait: %s", profile, error, exc_info=unexpected)
        self._retry_s = min(max(_FIRST_RETRY_S, 2 * self._retry_s), _LAST_RETRY_S)
        self.until = time.monotonic() + self._retry_s

    def end(self, profile: str) -> None:
        if self._retry_s:
            log.info("sandboxes of profile %s can be made again", profile)
        self._retry_s = self.until = 0.0


class Pool:
    """Gives sandboxes to calls and takes them back; its methods may be called from any thread."""

    def __init__(self, sandboxes: Sandboxes, grants: Grants, quiet: Quiet, profiles: Iterable[Profile]) -> None:
        """Begin to fill it."""
        self._sandboxes = sandboxes
        self._grants = grants
        self._quiet = quiet
        self._profiles = tuple(profiles)
        self._at_once = len(os.sched_getaffinity(0))
        self._changed = threading.Condition()
        self._calm = False
        self._closed = False
        self._making: list[_Making] = []
        self._ready: list[Sandbox] = []
        self._used: list[_Used] = []
        self._trouble: defaultdict[str, _Trouble] = defaultdict(_Trouble)
        self._to_remove: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        self._removals = 0
        self._wake = os.eventfd(0)
        quiet.on_change = lambda: os.eventfd_write(self._wake, 1)
        duty.begin(self._keep, "keep")
        duty.begin(self._remove, "remove")

    @contextlib.contextmanager
    def sandbox(
        self, profile: Profile, limits: Limits, *, cpus: str, waiter: socket.socket, job: int, grant: Grant
    ) -> Iterator[Sandbox]:
        """Give a call a sandbox for as long as this context lasts: one that waits, or is being made, or is made now.

        Args:
            limits, cpus: what shall be in force in it.
            waiter: who waits for it; the wait ends when that connection is closed.
            job, grant: the call's.

        Raises:
            EngineError, SandboxError: there is none to be had.
            Abandoned: nobody waits any more.
        """
        sandbox = self._take_ready(profile) or self._take_half_made(profile, waiter)
        sandbox = sandbox or self._make_now(profile, limits, cpus, waiter)
        try:
            with self._quiet.broken():
                sandbox.lower(limits, cpus)
                yield sandbox
        finally:
            self._take_back(sandbox, job, grant)

    def close(self) -> None:
        """Make no more; what is there already is left to whoever ends all sandboxes."""
        with self._changed:
            self._closed = True
            self._rouse()

    # What a call is given

    def _take_ready(self, profile: Profile) -> Sandbox | None:
        with self._changed:
            for sandbox in [sandbox for sandbox in self._ready if sandbox.profile is profile]:
                if sandbox.is_well():
                    self._ready.remove(sandbox)
                    return sandbox
        return None

    def _take_half_made(self, profile: Profile, waiter: socket.socket) -> Sandbox | None:
        with self._changed:
            making = next((found for found in self._making if found.profile is profile and not found.claimed), None)
            if making is None:
                return None
            making.claimed = True
            self._rouse()
        poller = select.poll()
        poller.register(making.over, select.POLLIN)
        poller.register(waiter, select.POLLIN)
        ready = [fd for fd, _ in poller.poll()]
        with self._changed:
            if waiter.fileno() not in ready:
                return making.sandbox
            making.claimed = False
            if making.sandbox:
                self._keep_ready(making.sandbox)
            self._rouse()
        raise Abandoned

    def _make_now(self, profile: Profile, limits: Limits, cpus: str, waiter: socket.socket) -> Sandbox:
        sandbox = self._sandboxes.create(profile, limits, cpus=cpus)
        try:
            sandbox.start()
            # It prepares nothing: the call imports what it needs.
            if not sandbox.wait_until(State.CONNECTED, timeout_s=_BOOT_S, wake=waiter.fileno()):
                raise Abandoned
        except BaseException:
            self._discard(sandbox)
            raise
        return sandbox

    # What is kept ready

    def _rouse(self) -> None:
        """Let everybody look at what has changed; the lock is held."""
        self._changed.notify_all()
        for making in self._making:
            os.eventfd_write(making.wake, 1)
        os.eventfd_write(self._wake, 1)

    def _keep(self) -> None:
        while not self._closed:
            wait_s = self._look()
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            with self._changed:
                for sandbox in self._ready:
                    poller.register(sandbox.connection, select.POLLIN)  # that it dies
            poller.poll(None if wait_s is None else wait_s * 1000)
            os.eventfd_write(self._wake, 1)  # so that there is something to read
            os.eventfd_read(self._wake)

    def _look(self) -> float | None:
        """Do what can be done now; return after which time to look again, None for when something is said."""
        with self._changed:
            self._drop_dead()
            now = time.monotonic()
            missing = [profile for profile in self._profiles if self._trouble[profile.name].until <= now]
            missing = [profile for profile in missing for _ in range(profile.pool - self._count(profile))]
            retries = [trouble.until - now for trouble in self._trouble.values() if trouble.until > now]
            if not (missing or self._making or self._used):
                return min(retries, default=None)
            lasted_s = self._quiet.lasted_s()
            calm = lasted_s is not None and lasted_s >= _SETTLE_S
            if calm != self._calm:
                self._calm = calm
                self._rouse()
            self._give_to_remove()
            if calm and not self._closed:
                for profile in missing[: max(0, self._at_once - len(self._making))]:
                    self._begin(profile)
            if lasted_s is None:
                return _IDLE_LOOK_S
            if not calm:
                return _SETTLE_S
            return _WORKING_LOOK_S if self._making or self._used else _IDLE_LOOK_S

    def _count(self, profile: Profile) -> int:
        ready = sum(sandbox.profile is profile for sandbox in self._ready)
        return ready + sum(making.profile is profile and not making.claimed for making in self._making)

    def _drop_dead(self) -> None:
        for sandbox in [sandbox for sandbox in self._ready if not sandbox.is_well()]:
            log.warning("sandbox %.12s, which waited for a call, has ended", sandbox.container)
            self._ready.remove(sandbox)
            self._trouble[sandbox.profile.name].note(sandbox.profile.name, SandboxError("it ended while it waited"))
            self._discard(sandbox)

    def _begin(self, profile: Profile) -> None:
        making = _Making(profile)
        self._making.append(making)
        threading.Thread(target=self._make, args=(making,), daemon=True).start()

    def _make(self, making: _Making) -> None:
        profile = making.profile
        sandbox: Sandbox | None = None
        problem: Exception | None = None
        try:
            sandbox = self._sandboxes.create(profile, profile.limits, cpus=profile.limits.cpus_in(""))
            self._wait_for_leave(making)
            sandbox.start()
            self._boot(making, sandbox)
        except Exception as error:  # whatever it was: a call that waits for this one has to go on
            problem = error
            if sandbox:
                self._discard(sandbox)
        with self._changed:
            self._making.remove(making)
            if problem is None:
                self._trouble[profile.name].end(profile.name)
                making.sandbox = sandbox
                if sandbox and not making.claimed:
                    self._keep_ready(sandbox)
            elif not self._closed:
                self._trouble[profile.name].note(profile.name, problem)
            self._rouse()
        os.eventfd_write(making.over, 1)

    def _keep_ready(self, sandbox: Sandbox) -> None:
        """Keep one that was never used, unless it was taken so early that it is not prepared; the lock is held."""
        if sandbox.state is State.READY:
            self._ready.append(sandbox)
        else:
            self._discard(sandbox)

    def _boot(self, making: _Making, sandbox: Sandbox) -> None:
        """Let it boot while it may, and stand still while it may not."""
        left_s = _BOOT_S
        while True:
            if not self._may_work(making):
                sandbox.freeze()
                self._wait_for_leave(making)
                sandbox.thaw()
            began = time.monotonic()
            wanted = State.CONNECTED if making.claimed else State.READY
            if sandbox.wait_until(wanted, timeout_s=left_s, wake=making.wake):
                return
            os.eventfd_read(making.wake)
            left_s -= time.monotonic() - began

    def _may_work(self, making: _Making) -> bool:
        if self._closed:
            raise _Closed
        return self._calm or making.claimed

    def _wait_for_leave(self, making: _Making) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._may_work(making))

    # What is removed

    def _take_back(self, sandbox: Sandbox, job: int, grant: Grant) -> None:
        """Remove a sandbox when that disturbs nobody; at once, if something may still run in it."""
        if sandbox.state is not State.SERVED:
            self._discard(sandbox)
            return
        with self._changed:
            self._used.append(_Used(sandbox, job, grant))
        os.eventfd_write(self._wake, 1)

    def _give_to_remove(self) -> None:
        for used in list(self._used):
            over = self._grants.find(used.job) != used.grant
            if over or (self._calm and not self._removals) or len(self._used) > _MOST_USED:
                self._used.remove(used)
                self._discard(used.sandbox)

    def _discard(self, sandbox: Sandbox) -> None:
        with self._changed:
            self._removals += 1
        self._to_remove.put(sandbox)

    def _remove(self) -> None:
        while True:
            self._sandboxes.destroy(self._to_remove.get())
            with self._changed:
                self._removals -= 1
            os.eventfd_write(self._wake, 1)
