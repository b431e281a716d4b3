"""Wait for a state, with a deadline."""

import os
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from cfiddle_cluster.errors import ClusterError

T = TypeVar("T")

PATIENCE = float(os.environ.get("CFIDDLE_PATIENCE", "1"))
"""Every deadline is multiplied by this: for machines that are much slower than real ones, as emulated ones are."""


def wait_until(
    predicate: Callable[[], T],
    *,
    timeout_s: float,
    interval_s: float = 0.2,
    what: str | Callable[[], str],
    remedy: str = "",
) -> T:
    """Call the predicate until it returns something true, and return that.

    Args:
        predicate: what is asked; asked at least once, and once more when the time is up.
        timeout_s: how long to wait, in seconds; `PATIENCE` makes them longer.
        interval_s: the pause between two calls, in seconds; `PATIENCE` makes it longer, since a look costs more there.
        what: what is waited for, as it stands in the error; or what says so when the time is up.
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
            raise ClusterError(f"waited {timeout_s:.0f} s in vain: {what if isinstance(what, str) else what()}", remedy)
        time.sleep(interval_s * PATIENCE)


def wait_until_none(left: Callable[[], Collection[str]], *, timeout_s: float, what: str, remedy: str = "") -> None:
    """Wait until no name is left.

    Args:
        left: asked for the names.
        timeout_s: how long to wait, in seconds.
        what: what is waited for; the error has in the place of `{}` the names that are left.
        remedy: what to do when it does not come.

    Raises:
        ClusterError: the time is up.
    """
    names: Collection[str] = ()

    def is_none() -> bool:
        nonlocal names
        names = left()
        return not names

    wait_until(is_none, timeout_s=timeout_s, what=lambda: what.format(", ".join(names)), remedy=remedy)
