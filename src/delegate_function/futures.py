"""The future of a call, which can be cancelled while the call runs."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from delegate_function.callinfo import CallInfo

T = TypeVar("T")


class Future(concurrent.futures.Future[T], Generic[T]):
    """The result of a call that is under way.

    Attributes: `call` has what is known of the call (a CallInfo) once it is done.
    """

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.call: CallInfo | None = None
        self._way = way
        self.begun = False
        self._unsettled = threading.Lock()  # taken once and for all by whoever settles what becomes of it

    # To the standard library it is pending until it is settled, for what it takes to be running cannot be cancelled.

    def running(self) -> bool:
        """Say whether the call runs now."""
        return self.begun and not self.done()

    def cancel(self) -> bool:
        """Cancel the call, also if it runs; return whether it is cancelled."""
        if (self.running() and not self._way.ends_running_calls) or not self.settle_as_cancelled():
            return self.cancelled()
        self._way.end(self)
        return True

    def settle_as_cancelled(self) -> bool:
        """Cancel it without a word to what makes the call; return whether it was not settled yet."""
        if not self._unsettled.acquire(blocking=False):
            return False
        super().cancel()
        self.set_running_or_notify_cancel()
        return True

    def settle(self, call: CallInfo | None, value: T | None = None, error: BaseException | None = None) -> None:
        """Set what came of the call, unless it was cancelled meanwhile."""
        if not self._unsettled.acquire(blocking=False):
            return
        self.call = call
        self.set_running_or_notify_cancel()
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)  # type: ignore[arg-type]


class Way(Protocol):
    """How an executor's calls are made."""

    ends_running_calls: bool

    def add(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Future[Any]:
        """Make a call, now or later."""

    def end(self, future: Future[Any]) -> None:
        """End what there is of a call that was cancelled."""

    def finish(self, *, wait: bool, cancel: bool) -> None:
        """Take no more calls; cancel those that did not begin, and wait for the others, if that is wanted."""

    def abandon(self) -> None:
        """End all, within bounds: nobody waits for it any more."""
