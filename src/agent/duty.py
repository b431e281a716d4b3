"""Threads that the agent cannot do without."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

log = logging.getLogger("agent")

FAILED = signal.SIGUSR1
"""What the agent sends itself when such a thread fails."""


def begin(work: Callable[[], object], name: str) -> None:
    """Do work that never ends, in a thread of its own.

    Should it fail, the agent ends as a whole, and Swarm starts another: a call that waits for what nobody does any more
    would wait for ever, and used sandboxes would stay.
    """

    def do() -> None:
        try:
            work()
        except BaseException:
            log.critical("the agent ends, for its thread %s failed", name, exc_info=True)
            os.kill(os.getpid(), FAILED)

    threading.Thread(target=do, name=name, daemon=True).start()
