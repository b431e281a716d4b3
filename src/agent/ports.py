"""Ports of this machine for users' containers: counted up from the policy's first, none that a container has already.

Whether something else listens on one, the engine finds out when it starts the container.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from agent.wire import Refused

MOST = 64
"""So many has one container at most."""

_LAST = 65535
_IN_THE_WAY = re.compile(
    r"already (allocated|in use)|failed to bind|cannot (be )?assign|permission denied", re.IGNORECASE
)


def free(number: int, *, first: int, taken: Collection[int]) -> list[int]:
    """Return so many ports, the lowest that are not taken; Refused if there are not so many."""
    found: list[int] = []
    port = first
    while len(found) < number:
        if port > _LAST:
            raise Refused("ports", f"this machine has no {number} ports free from {first} to {_LAST}")
        if port not in taken:
            found.append(port)
        port += 1
    return found


def in_the_way(complaint: str, given: Sequence[int]) -> set[int]:
    """Return which of these ports the engine says that it cannot have.

    They are all of them where it names none, and none where it does not speak of ports.
    """
    if not _IN_THE_WAY.search(complaint):
        return set()
    named = {int(number) for number in re.findall(r":(\d{4,5})\b", complaint)} & set(given)
    return named or set(given)
