"""Why there are no hardware counters where this process runs.

A counter of what a process itself does in user space, which is what cfiddle's are, needs no capability: only a kernel
whose `perf_event_paranoid` is 2 or less, a list of system calls that has `perf_event_open`, and a CPU that counts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

# linux/perf_event.h: types and configurations of events, and the flags disabled, exclude_kernel and exclude_hv.
_HARDWARE, _SOFTWARE = 0, 1
_INSTRUCTIONS, _DUMMY = 1, 9
_FLAGS = 1 << 0 | 1 << 5 | 1 << 6
_CLOEXEC = 8
# perf_event_open(2) has no function in the C library; its number, by uname's name of the machine.
_NUMBERS = {"x86_64": 298, "aarch64": 241}
_PARANOID = "/proc/sys/kernel/perf_event_paranoid"


def unavailable(events: Iterable[str]) -> str | None:
    """Return why these counters, one of which could not be had, cannot be: "policy: …", "kernel: …" or "machine: …".

    None where it is the name: one that this CPU does not have, or too many at once.
    """
    return obstacle() if all(map(is_known, events)) else None


def obstacle() -> str | None:
    """Return what keeps this process from hardware counters, if anything does."""
    # A software event needs no counter of the CPU's, so what is refused there is the policy's or the kernel's to allow.
    for kind, event in ((_SOFTWARE, _DUMMY), (_HARDWARE, _INSTRUCTIONS)):
        if number := error(kind, event):
            return _explained(number)
    return None


def error(kind: int = _HARDWARE, event: int = _INSTRUCTIONS) -> int:
    """Return the number of the error with which an event of this process cannot be opened; 0 if it can."""
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        return errno.ENOSYS
    attributes = struct.pack("=IIQ24xQ16x", kind, 64, event, _FLAGS)  # 64: the structure's first size
    libc = ctypes.CDLL(None, use_errno=True)
    counter = libc.syscall(number, attributes, 0, -1, -1, _CLOEXEC)  # of this process, on any CPU
    if counter < 0:
        return ctypes.get_errno()
    os.close(counter)
    return 0


def is_known(event: str) -> bool:
    """Return whether libpfm, from which cfiddle has its counters' names, knows one for this CPU."""
    pfm = ctypes.CDLL("libpfm.so.4")
    return int(pfm.pfm_initialize()) == 0 and int(pfm.pfm_find_event(event.encode())) >= 0


def _explained(number: int) -> str:
    if number == errno.EPERM:
        return "policy: perf_event_open is not among the system calls that are allowed here"
    if number == errno.EACCES:
        with open(_PARANOID) as setting:
            found = setting.read().strip()
        return f"kernel: perf_event_paranoid is {found}; counters need 2 or less"
    if number == errno.ENOSYS:
        return "kernel: it was built without performance events"
    if number in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
        return "machine: its CPU has no counters, or the virtual machine that it is does not show them"
    return f"machine: {os.strerror(number)}"
