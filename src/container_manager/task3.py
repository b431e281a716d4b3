"""The task of one container: linear regression in PyTorch on points that are made there too, and pictures of it."""

from collections.abc import Callable

from container_manager.errors import ContainerError
from container_manager.manager import Manager

MOST_SEED = 2**63 - 1
"""PyTorch takes no greater one."""


def run(manager: Manager, *, seed: int | None = None, output: Callable[[bytes], None]) -> None:
    """Have a new container make points in the data's `data.ptd`, fit a line to them, and draw it.

    If it fails, or this is interrupted, the container is not left; else it goes on running.

    Args:
        manager: whose container it is.
        seed: what all chance comes from; the same one gives the same result.
        output: gets what it prints, while it comes.
    """
    command = "python task3.py --file data/data.ptd --make"
    if seed is not None:
        command += f" --seed {seed}"
    with manager.new(1) as [container]:
        manager.place.start([container])
        status = manager.place.execute(container, command, output)
        if status != 0:
            raise ContainerError(f"{container.name} ended with status {status}")
