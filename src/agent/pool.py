"""Sandboxes that were made before anybody asked, and used ones that are still to be removed.

Both are work that would spoil a measurement, so it is done while none runs. One that is being made when a measurement
begins stands still until it is over, or until a call takes it. A used one, in which nothing runs any more, is removed
then too, or with the end of its job, or when too many wait.

A lease's calls that follow each other at once leave no such time, and use up the pool. Then, while one of them has its
sandbox made, others are made beside it, on the CPUs that it leaves, and it begins when that has come to rest.
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

_BOOT_S = 30.0 * float(os.environ.get("CFIDDLE_PATIENCE", "1"))
_SETTLE_S = 0.02
"""Nothing has been measured for so long when work begins: a call that follows another comes sooner."""
_WORKING_LOOK_S = 0.005
_IDLE_LOOK_S = 0.1
_MOST_USED = 8
_REST_S = 1.0
"""How long a call waits at most for what is done beside it to come to rest."""
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0

log = logging.getLogger("agent")


class _Making:
    """A sandbox that is being made for the pool, or for a call.

    Attributes:
        for_call: it was begun because a call found none.
        claimed: a call waits for it.
        rests: nothing is done for it now.
        sandbox, problem: what came of it, once it is over.
        wake, over: descriptors that become readable when it may have to stop or go on, and when it is over.
    """

    def __init__(self, profile: Profile, limits: Limits, cpus: str, *, for_call: bool) -> None:
        self.profile = profile
        self.limits = limits
        self.cpus = cpus
        self.for_call = self.claimed = for_call
        self.rests = False
        self.sandbox: Sandbox | None = None
        self.problem: Exception | None = None
        self.wake = os.eventfd(0)
        self.over = os.eventfd(0)

    def __del__(self) -> None:
        os.close(self.wake)
        os.close(self.over)


class _Used(NamedTuple):
    sandbox: Sandbox
    job: int
    grant: Grant


_EXPECTED = (EngineError, SandboxError, OSError)


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
        self._urgent = False
        self._waiting = 0
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
        with contextlib.ExitStack() as stack:
            if sandbox := self._take_ready(profile):
                stack.callback(self._take_back, sandbox, job, grant)
                stack.enter_context(self._quiet.broken())
            else:
                with self._pressing():
                    sandbox = self._take_half_made(profile, waiter) or self._make_now(profile, limits, cpus, waiter)
                    stack.callback(self._take_back, sandbox, job, grant)
                    stack.enter_context(self._quiet.broken())
                self._wait_for_rest()
            sandbox.lower(limits, cpus)
            yield sandbox

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

    @contextlib.contextmanager
    def _pressing(self) -> Iterator[None]:
        """Say that a call waits for its sandbox, or is about to begin, as long as this context lasts."""
        with self._changed:
            self._waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._rouse()

    def _take_half_made(self, profile: Profile, waiter: socket.socket) -> Sandbox | None:
        with self._changed:
            making = next((found for found in self._making if found.profile is profile and not found.claimed), None)
            if making is None:
                return None
            making.claimed = True
            self._rouse()
        self._wait_for(making, waiter)
        return making.sandbox

    def _make_now(self, profile: Profile, limits: Limits, cpus: str, waiter: socket.socket) -> Sandbox:
        with self._changed:
            making = self._begin(profile, limits, cpus, for_call=True)
            self._rouse()
        self._wait_for(making, waiter)
        if making.sandbox is None:
            raise making.problem or SandboxError("it was not made")
        return making.sandbox

    def _wait_for(self, making: _Making, waiter: socket.socket) -> None:
        """Wait until one that a call has claimed is over; it is the pool's again if nobody waits any more."""
        poller = select.poll()
        poller.register(making.over, select.POLLIN)
        poller.register(waiter, select.POLLIN)
        ready = [fd for fd, _ in poller.poll()]
        if waiter.fileno() not in ready:
            return
        with self._changed:
            making.claimed = False
            if making.sandbox:
                self._keep_ready(making.sandbox)
            self._rouse()
        raise Abandoned

    def _wait_for_rest(self) -> None:
        """Wait until nothing is done beside the call that begins now: what the engine has begun, it ends first."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._removals and all(making.rests or making.claimed for making in self._making), _REST_S
            )

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
            urgent = lasted_s is not None and any(making.for_call and making.claimed for making in self._making)
            calm = lasted_s is not None and lasted_s >= _SETTLE_S and not self._waiting
            if (calm, urgent) != (self._calm, self._urgent):
                self._calm, self._urgent = calm, urgent
                self._rouse()
            self._give_to_remove()
            if (calm or urgent) and not self._closed:
                for profile in missing[: max(0, self._at_once - len(self._making))]:
                    self._begin(profile, profile.limits, profile.limits.cpus_in(""))
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

    def _begin(self, profile: Profile, limits: Limits, cpus: str, *, for_call: bool = False) -> _Making:
        making = _Making(profile, limits, cpus, for_call=for_call)
        self._making.append(making)
        threading.Thread(target=self._make, args=(making,), daemon=True).start()
        return making

    def _make(self, making: _Making) -> None:
        profile = making.profile
        sandbox: Sandbox | None = None
        try:
            sandbox = self._sandboxes.create(profile, making.limits, cpus=making.cpus)
            self._wait_for_leave(making, sandbox)
            sandbox.start()
            self._boot(making, sandbox)
        except Exception as error:  # whatever it was: a call that waits for this one has to go on
            making.problem = error
            if sandbox:
                self._discard(sandbox)
        with self._changed:
            self._making.remove(making)
            if making.problem is None:
                self._trouble[profile.name].end(profile.name)
                making.sandbox = sandbox
                if sandbox and not making.claimed:
                    self._keep_ready(sandbox)
            elif not self._closed:
                self._trouble[profile.name].note(profile.name, making.problem)
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
            if not self._may_work(making, sandbox):
                sandbox.freeze()
                self._wait_for_leave(making, sandbox)
                sandbox.thaw()
            began = time.monotonic()
            wanted = State.READY if self._calm and not making.claimed else State.CONNECTED
            if not sandbox.wait_until(wanted, timeout_s=left_s, wake=making.wake):
                os.eventfd_read(making.wake)
            elif making.claimed or sandbox.state is State.READY:
                return
            left_s -= time.monotonic() - began

    def _may_work(self, making: _Making, sandbox: Sandbox) -> bool:
        # To import what it shall takes longer than all before: that is for calm times alone.
        return making.claimed or self._calm or (self._urgent and sandbox.state is State.MADE)

    def _wait_for_leave(self, making: _Making, sandbox: Sandbox) -> None:
        with self._changed:
            if not self._may_work(making, sandbox):
                making.rests = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._may_work(making, sandbox))
            making.rests = False
            if self._closed:
                raise SandboxError("the agent ends")

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
            in_time = (self._calm or self._urgent) and not self._removals
            if over or in_time or len(self._used) > _MOST_USED:
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
                self._changed.notify_all()
            os.eventfd_write(self._wake, 1)
