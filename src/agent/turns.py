"""Work that is done on one thing by one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from agent.wire import Refused

Key = TypeVar("Key", bound=Hashable)


class Turns(Generic[Key]):
    """Who is at work on what.

    Args:
        changed: guards `taken`, and is told of each change; its lock may guard more.

    Attributes:
        taken: what somebody is at work on.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self.taken: set[Key] = set()

    @contextlib.contextmanager
    def take(self, key: Key, *, timeout_s: float, refusal: str) -> Iterator[None]:
        """Let nobody else be at work on this meanwhile; Refused, with these words, if somebody is for too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: key not in self.taken, timeout_s):
                raise Refused("busy", refusal)
            self.taken.add(key)
        try:
            yield
        finally:
            with self._changed:
                self.taken.remove(key)
                self._changed.notify_all()
