"""Say from within a call how far it has come.

This is a module apart from `inside`, which is another one where it runs as a program: what a call imports is this.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator

from delegate_function import frames

_EVERY_S = 0.1

_lock = threading.Lock()
_process = -1
_send: Callable[[bytes], None] | None = None
_next = 0.0


def progress(done: int, total: int) -> None:
    """Tell the caller that `done` of `total` steps of this call are done, to be shown to whoever waits for it.

    At most ten times a second something is sent, and always that all is done. Where no call runs, and in processes that
    the call started, nothing happens.

    Raises:
        TypeError: if they are no whole numbers. ValueError: unless 0 ≤ done ≤ total < 2**53.
    """
    global _next
    frame = frames.encode_progress(operator.index(done), operator.index(total))
    if _process != os.getpid():
        return
    with _lock:
        now = time.monotonic()
        if _send is not None and (now >= _next or done == total):
            _next = now + _EVERY_S
            _send(frame)


@contextlib.contextmanager
def through(send: Callable[[bytes], None]) -> Iterator[None]:
    """Let progress be told through `send` until this context is left, also by a thread that goes on then."""
    global _process, _send, _next
    with _lock:
        _process, _send, _next = os.getpid(), send, 0.0
    try:
        yield
    finally:
        with _lock:
            _send = None
