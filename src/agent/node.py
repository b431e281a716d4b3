"""What a measurement depends on and the machine says of itself."""

import errno
import functools
import os
from pathlib import Path
from typing import Any

from agent.policy import Profile

_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")


def fingerprint(*, cpus: str, image: str, counters: str | None, root: Path = Path("/")) -> dict[str, Any]:
    """Return the node's fingerprint; a value is None where the machine does not say.

    Args:
        cpus: the CPUs that the sandbox has, as in "0-3,8"; "" for all.
        image: the sandbox's image, by the digest of its content.
        counters: what `counters` says.
        root: where proc and sys are.
    """
    cpu = root / "sys/devices/system/cpu"
    used = numbers(cpus) or numbers(_text(cpu / "online") or "0")
    return {
        "name": os.uname().nodename,
        "cpu_model": _cpu_model(root / "proc/cpuinfo"),
        "cores": len(used),
        "cpus": cpus or _text(cpu / "online"),
        "governor": _text(cpu / f"cpu{min(used)}/cpufreq/scaling_governor"),
        "boost": _boost(cpu),
        "smt": _flag(cpu / "smt/active"),
        "kernel": os.uname().release,
        "image": image,
        "counters": counters,
    }


def counters(profile: Profile, error: int | None, paranoid: Path = _PARANOID) -> str | None:
    """Return "available" if calls can use hardware counters, else what the reason is: policy, kernel or machine.

    Args:
        error: the number of the error with which a sandbox's process could not open one; 0 if it could. None, and the
            answer too, where it did not try.
    """
    if not profile.counters:
        return f"policy: profile {profile.name} has no counters"
    if error in (None, 0):
        return None if error is None else "available"
    if error in (errno.EACCES, errno.EPERM):
        return f"kernel: perf_event_paranoid is {_text(paranoid)}; counting one's own programs needs 2 or less"
    if error == errno.ENOSYS:
        return "kernel: it was built without perf events"
    return f"machine: no PMU that the kernel can use ({os.strerror(error)})"


def numbers(cpulist: str) -> set[int]:
    """Return the CPUs in a list as in "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, cpulist.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


@functools.cache
def _cpu_model(path: Path) -> str | None:
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return None


def _boost(cpu: Path) -> bool | None:
    no_turbo = _flag(cpu / "intel_pstate/no_turbo")
    return _flag(cpu / "cpufreq/boost") if no_turbo is None else not no_turbo


def _flag(path: Path) -> bool | None:
    text = _text(path)
    return None if text is None else text == "1"


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None
