"""The task of many containers: each says what its share of many random numbers comes to, all at the same time.

What takes long to import is imported where it is used: `cm --help` has no use for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from container_manager import interrupts
from container_manager.errors import ContainerError
from container_manager.manager import Manager
from container_manager.place import Container, Place

if TYPE_CHECKING:
    from concurrent.futures import Future

SIZE = 100_000
CONTAINERS = 4
MOST = 10_000_000
"""So many numbers at most: every container reads all of them."""

FILE = "data.csv"


@dataclass(frozen=True)
class Figures:
    """What some numbers come to.

    Attributes:
        count: how many they are.
        deviation: the standard deviation, of them as the whole population.
    """

    count: int
    sum: float
    max: float
    min: float
    deviation: float

    @property
    def average(self) -> float:
        """Their mean."""
        return self.sum / self.count


def share_size(size: int, index: int, shares: int) -> int:
    """Return how many of `size` numbers are in a share: the shares have them all, and differ by one at most."""
    return size * (index + 1) // shares - size * index // shares


def write_numbers(path: Path, size: int, seed: int | None) -> None:
    """Write random numbers from 0 up to 1, one a line, to the last digit."""
    import random

    from container_manager.files import written

    chance = random.Random(seed)
    with written(path) as file:
        file.writelines(f"{chance.random()!r}\n" for _ in range(size))


def parsed(text: str, count: int) -> Figures:
    """Return what a container said of its share.

    Raises:
        ContainerError: it said something else.
    """
    import ast

    try:
        said = ast.literal_eval(text)
        return Figures(count, said["sum"], said["max"], said["min"], said["standard deviation"])
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise ContainerError(f"a container printed what is no result: {text[:200]}") from error


def combined(shares: Sequence[Figures]) -> Figures:
    """Return what all numbers come to together.

    The variance is that of the shares' means about the common mean, and the mean of the shares' own variances.
    """
    count = sum(share.count for share in shares)
    total = math.fsum(share.sum for share in shares)
    spread = (share.count * (share.deviation**2 + (share.average - total / count) ** 2) for share in shares)
    return Figures(
        count,
        total,
        max(share.max for share in shares),
        min(share.min for share in shares),
        math.sqrt(math.fsum(spread) / count),
    )


def whole(results: Sequence[str], size: int) -> dict[str, float]:
    """Return what all numbers come to, from what each container printed of its share, in the containers' own words."""
    shares = [parsed(text, share_size(size, index, len(results))) for index, text in enumerate(results)]
    all_ = combined(shares)
    return {
        "sum": all_.sum,
        "average": all_.average,
        "max": all_.max,
        "min": all_.min,
        "standard deviation": all_.deviation,
    }


def run(
    manager: Manager,
    *,
    size: int = SIZE,
    containers: int = CONTAINERS,
    seed: int | None = None,
    progress: Callable[[str], None] = lambda _text: None,
) -> list[str]:
    """Have new containers work on new numbers, each on its share; return what each printed.

    If one fails, or this is interrupted, none of the containers is left; else they go on running.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    place = manager.place
    with manager.new(containers) as new, ThreadPoolExecutor(containers) as pool:
        try:
            starting = [pool.submit(place.start, [container]) for container in new]
            progress(f"{size} random numbers for {place.data / FILE}")
            write_numbers(place.data / FILE, size, seed)
            working = [
                pool.submit(_work, place, container, start, index, containers)
                for index, (container, start) in enumerate(zip(new, starting, strict=True))
            ]
            for done, work in enumerate(as_completed(working), 1):
                work.result()
                progress(f"containers done: {done} of {containers}")
            return [work.result() for work in working]
        except BaseException:
            # Ends what the pool would wait for.
            with interrupts.put_off():
                place.stop(new)
            raise


def _work(place: Place, container: Container, start: Future[None], index: int, shares: int) -> str:
    start.result()
    output = bytearray()
    command = f"python task2.py --file data/{FILE} --idx {index} --of {shares}"
    status = place.execute(container, command, output.extend)
    text = output.decode(errors="replace").strip()
    if status != 0:
        raise ContainerError(f"{container.name} ended with status {status}:\n{text[-2000:]}")
    return text
