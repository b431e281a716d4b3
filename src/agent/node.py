"""What a measurement depends on and the machine says of itself."""

import os
from pathlib import Path
from typing import Any


def fingerprint(*, cpus: str, image: str, root: Path = Path("/")) -> dict[str, Any]:
    """Return the node's fingerprint; a value is None where the machine does not say.

    Args:
        cpus: the CPUs that the sandbox has, as in "0-3,8"; "" for all.
        image: the sandbox's image, by the digest of its content.
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
    }


def numbers(cpulist: str) -> set[int]:
    """Return the CPUs in a list as in "0-3,8"."""
    found: set[int] = set()
    for part in filter(None, cpulist.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


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
