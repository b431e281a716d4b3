"""Wait for a state, with a deadline."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

from cfiddle_cluster.errors import ClusterError

T = TypeVar("T")

PATIENCE = float(os.environ.get("CFIDDLE_PATIENCE", "1"))
"""Every deadline is multiplied by this: for machines that are much slower than real ones, as emulated ones are."""


def wait_until(
    predicate: Callable[[], T], *, timeout_s: float, interval_s: float = 0.2, what: str, remedy: str = ""
) -> T:
    """Call the predicate until it returns something true, and return that.

    Args:
        predicate: what is asked; asked at least once, and once more when the time is up.
        timeout_s: how long to wait, in seconds; `PATIENCE` makes them longer.
        interval_s: the pause between two calls, in seconds; `PATIENCE` makes it longer, since a look costs more there.
        what: what is waited for, as it stands in the error.
        remedy: what to do when it does not come.

    Raises:
        ClusterError: the time is up.
    """
    timeout_s *= PATIENCE
    deadline = time.monotonic() + timeout_s
    while True:
        late = time.monotonic() >= deadline
        value = predicate()
        if value:
            return value
        if late:
            raise ClusterError(f"waited {timeout_s:.0f} s in vain: {what}", remedy)
        time.sleep(interval_s * PATIENCE)
