"""Whether something is measured on this machine: work of the agent's that can wait does, as long as it is.

A job measures from its grant to its end, unless its user holds a lease for it: then its calls measure, and between
them nothing does. Such work begins when that has lasted a little, and so not between two calls that follow each other.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from agent import wire
from agent.grants import Grant, Grants

_PACE_S = 0.5
_AT_ONCE = 4


class Quiet:
    """What is known of the measurements on this machine; its methods may be called from any thread."""

    def __init__(self, grants: Grants) -> None:
        self._grants = grants
        self._lock = threading.Lock()
        self._serving = 0
        self._leases: dict[int, Grant] = {}
        self._since: float | None = None
        self._turns: dict[int, float] = {}
        self.on_change: Callable[[], None] = lambda: None
        """Called when a call has begun or ended; what else changes has to be looked for."""

    def lasted_s(self) -> float | None:
        """Return for how long nothing has been measured, as far as was looked; None while something is."""
        grants = self._grants.all()
        with self._lock:
            if self._serving or any(self._leases.get(job) != grant for job, grant in grants.items()):
                self._since = None
                return None
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            return now - self._since

    def give_way(self, uid: int) -> None:
        """While something is measured, have a user wait who asks the engine for one thing after the other.

        A few things are done at once, as a command asks for them; then two a second. Each user has a pace of their own:
        who asks for more than that delays nobody else.
        """
        if self.lasted_s() is not None:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(self._turns.get(uid, 0.0), now - (_AT_ONCE - 1) * _PACE_S)
            self._turns[uid] = turn + _PACE_S
        time.sleep(max(0.0, turn - now))

    @contextlib.contextmanager
    def broken(self) -> Iterator[None]:
        """Say that a call is served as long as this context lasts."""
        with self._lock:
            self._serving += 1
            self._since = None
        self.on_change()
        try:
            yield
        finally:
            with self._lock:
                self._serving -= 1
            self.on_change()

    @contextlib.contextmanager
    def lease(self, job: int, grant: Grant) -> Iterator[None]:
        """Say that a job measures by its calls alone as long as this context lasts.

        Raises:
            Refused: that is said of it already.
        """
        with self._lock:
            if self._leases.get(job) == grant:
                raise wire.Refused("busy", f"a lease of job {job} is held already")
            self._leases[job] = grant
        self.on_change()
        try:
            yield
        finally:
            with self._lock:
                if self._leases.get(job) == grant:
                    del self._leases[job]
            self.on_change()
