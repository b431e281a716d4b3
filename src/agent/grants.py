"""Who holds which job on this machine: files that Slurm's prolog writes as root and its epilog takes away.

A grant is a file named by the job's number. It holds the user's id, the CPUs of the job in the form "0-3,8" or "*" for
all, how many those are, how much memory the job has in megabytes, and how many GPUs of each kind, in the form
"titan_xp:2,h200:1", if it has any. The directory is root's; all the same nothing in it is followed.
"""

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

MAX_SIZE = 4096
_GPUS = r"(([a-z0-9_]+:[0-9]{1,2})(,[a-z0-9_]+:[0-9]{1,2})*)?"
_CPULIST = frozenset("0123456789,-")


class Grant(NamedTuple):
    """A job of a user on this machine.

    Attributes:
        cpus: the CPUs of the job, as in "0-3,8"; "" for all.
        cpu_count, memory_mb: how many CPUs and megabytes it has; 0 where that is not known.
        gpus: the kinds of its GPUs, each as often as it has one of them.
        stamp: tells this grant from a later one for the same job.
    """

    uid: int
    cpus: str
    stamp: tuple[int, int, int]
    cpu_count: int = 0
    memory_mb: int = 0
    gpus: tuple[str, ...] = ()


class Grants:
    """The grants in a directory; only files of `owner` count."""

    def __init__(self, directory: Path, *, owner: int = 0) -> None:
        self._directory = directory
        self._owner = owner

    def all(self) -> dict[int, Grant]:
        """Return the grants of all jobs on this machine."""
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return {}
        found = {int(name): self.find(int(name)) for name in names if name.isascii() and name.isdigit()}
        return {job: grant for job, grant in found.items() if grant}

    def find(self, job: int) -> Grant | None:
        """Return the grant for a job; None if there is none, or what is there is no grant."""
        try:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            # O_NONBLOCK: a FIFO must not keep the agent waiting for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(str(int(job)), flags, dir_fd=directory)
        except OSError:
            return None
        finally:
            os.close(directory)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != self._owner or status.st_size > MAX_SIZE:
                return None
            return _parse(os.read(file, MAX_SIZE), (status.st_dev, status.st_ino, status.st_mtime_ns))
        finally:
            os.close(file)


def _parse(content: bytes, stamp: tuple[int, int, int]) -> Grant | None:
    fields = content.decode("ascii", "replace").split()
    if len(fields) not in (1, 2, 4, 5):
        return None
    uid, cpus, count, memory_mb, gpus = fields + ["", "*", "0", "0", ""][len(fields) :]
    cpus = "" if cpus == "*" else cpus
    if not set(cpus) <= _CPULIST or not all(text.isascii() and text.isdigit() for text in (uid, count, memory_mb)):
        return None
    if not re.fullmatch(_GPUS, gpus):
        return None
    kinds = [entry.split(":") for entry in gpus.split(",") if entry]
    cards = tuple(kind for kind, number in kinds for _ in range(int(number)))
    return Grant(int(uid), cpus, stamp, int(count), int(memory_mb), cards)
