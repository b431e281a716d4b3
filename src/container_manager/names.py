"""How containers are called: which names are legal, which come next, and that nobody gives one twice."""

import fcntl
import itertools
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from container_manager.errors import ContainerError

PREFIX = "my_task_container"

_LEGAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def is_legal(name: str) -> bool:
    """Tell whether a container may be called so: letters, digits, `_`, `.` and `-`, at most 63, no mark in front."""
    return _LEGAL.fullmatch(name) is not None


def check(name: str) -> None:
    """Raise a ContainerError if no container may be called so."""
    if not is_legal(name):
        raise ContainerError(f"{name!r} is no name of a container: letters, digits, _ . and -, at most 63")


def is_managed(name: str) -> bool:
    """Tell whether the manager touches a container of this name at all."""
    return name.startswith(PREFIX)


def in_order(name: str) -> tuple[str, int]:
    """Return what names are sorted by, the tenth after the ninth."""
    stem = name.rstrip("0123456789")
    return stem, int(name[len(stem) :] or 0)


def next_names(taken: Collection[str], number: int) -> list[str]:
    """Return so many names `my_task_container_N` that are not taken, with the lowest numbers."""
    free = (name for count in itertools.count() if (name := f"{PREFIX}_{count}") not in taken)
    return list(itertools.islice(free, number))


@contextmanager
def giving(*, timeout_s: float = 60) -> Iterator[None]:
    """Be the only process of this user's that gives names.

    Raises:
        ContainerError: another has been giving some for `timeout_s`, or the lock cannot be kept in the user's cache.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "container_manager" / "names.lock"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ContainerError(
            f"no lock can be kept at {path}: {error.strerror}", "see that it can be written"
        ) from error
    try:
        _lock(descriptor, path, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ContainerError(
                    f"another command has been making containers for {timeout_s:.0f} s", f"see who: fuser {path}"
                ) from None
            time.sleep(0.02)
        else:
            return
