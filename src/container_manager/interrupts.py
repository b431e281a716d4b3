"""Ctrl-C and its like: they end a command at any point, but not in the middle of what must be whole."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# The last one is what srun passes on to a job's processes (in_job).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

# Long enough for the callback that dropped one to be over, in seconds.
_AGAIN_S = 0.01


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.exit_status = 128 + number


class _Handler:
    """What the signals come to."""

    def __init__(self) -> None:
        self.blocks = 0
        self.waiting: int | None = None
        self.has_raised = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.blocks:
            self.waiting = number
        elif not self.has_raised:  # what the first one began is not to be left half done for a second
            self.has_raised = True
            raise Interrupted(number)


_handler = _Handler()


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Python drops what is raised in a weak reference's callback or a `__del__`; then the signal comes once more."""
    if isinstance(unraisable.exc_value, Interrupted):
        _handler.has_raised = False
        again = threading.Timer(_AGAIN_S, os.kill, (os.getpid(), unraisable.exc_value.number))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def raise_them() -> None:
    """Have the first of the signals raise Interrupted in the main thread, unless whoever started us ignores it."""
    _handler.has_raised = False
    sys.unraisablehook = _raise_again
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handler)


@contextmanager
def put_off() -> Iterator[None]:
    """Raise what interrupts the block when it is over: for what is short, has a deadline, and must be whole.

    In another thread than the main one nothing is interrupted anyway.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _handler.blocks += 1
    try:
        yield
    finally:
        _handler.blocks -= 1
        if _handler.waiting is not None and not _handler.blocks:
            number, _handler.waiting = _handler.waiting, None
            _handler(number, None)
