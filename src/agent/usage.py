"""A sandbox's control group (versions 1 and 2): what was used, which limit was run into, and how to hold it still.

The group lives as long as a process in it: it is read while the sandbox's first process still waits to be destroyed.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

PARENT = "cfiddle"
"""All sandboxes' groups lie in one of this name, so that they are found whatever the engine's own default is."""


class Reading(NamedTuple):
    """What the kernel counts; None where it cannot say.

    Attributes:
        oom_kills: how many processes the memory limit killed.
        refused_forks: how many processes or threads the limit of processes prevented.
        processes: how many there are.
    """

    user_s: float | None = None
    system_s: float | None = None
    peak_memory_mb: float | None = None
    oom_kills: int = 0
    refused_forks: int = 0
    processes: int | None = None


def parent(cgroup_driver: str) -> str:
    """Return the engine's `CgroupParent` for sandboxes."""
    return f"{PARENT}.slice" if cgroup_driver == "systemd" else f"/{PARENT}"


class Cgroup:
    """The control group of one container, in the machine's tree at `root`."""

    def __init__(self, root: Path, container: str) -> None:
        names = (Path(PARENT, container), Path(f"{PARENT}.slice", f"docker-{container}.scope"))
        self._unified = (root / "cgroup.controllers").exists()
        self._controllers = {
            controller: next((path for name in names if (path := base / name).is_dir()), None)
            for controller in ("memory", "pids", "cpuacct", "freezer")
            for base in [root if self._unified else root / controller]
        }

    def read(self) -> Reading:
        """Return what is counted now."""
        user_s, system_s = self._times()
        peak = self._number("memory", "memory.peak" if self._unified else "memory.max_usage_in_bytes")
        kills = self._table("memory", "memory.events" if self._unified else "memory.oom_control")
        return Reading(
            user_s=user_s,
            system_s=system_s,
            peak_memory_mb=None if peak is None else round(peak / 2**20, 3),
            oom_kills=kills.get("oom_kill", 0),
            refused_forks=self._table("pids", "pids.events").get("max", 0),
            processes=self._number("pids", "pids.current"),
        )

    def freeze(self) -> None:
        """Let none of its processes run until `thaw`; an OSError where that cannot be had.

        The engine's own `pause` does the same by starting a program (50 ms), on a machine that is to be quiet.
        """
        self._set_frozen(True)

    def thaw(self) -> None:
        """Let its processes run again; a group that is gone is as it should be."""
        try:
            self._set_frozen(False)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _set_frozen(self, frozen: bool) -> None:
        group = self._controllers["freezer"]
        if group is None:
            raise FileNotFoundError(errno.ENOENT, "its control group cannot be frozen, or is gone")
        if self._unified:
            (group / "cgroup.freeze").write_text(str(int(frozen)))
        else:
            (group / "freezer.state").write_text("FROZEN" if frozen else "THAWED")

    def _times(self) -> tuple[float | None, float | None]:
        if self._unified:
            table = self._table("cpuacct", "cpu.stat")
            microseconds = table.get("user_usec"), table.get("system_usec")
            return _scaled(microseconds[0], 1e6), _scaled(microseconds[1], 1e6)
        user, system = (self._number("cpuacct", f"cpuacct.usage_{kind}") for kind in ("user", "sys"))
        return _scaled(user, 1e9), _scaled(system, 1e9)

    def _number(self, controller: str, name: str) -> int | None:
        try:
            return int(self._text(controller, name))
        except ValueError:
            return None

    def _table(self, controller: str, name: str) -> dict[str, int]:
        rows = (line.split() for line in self._text(controller, name).splitlines())
        return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}

    def _text(self, controller: str, name: str) -> str:
        path = self._controllers[controller]
        try:
            return (path / name).read_text() if path else ""
        except OSError:
            return ""  # this kernel has no such count, or the group is gone


def _scaled(value: int | None, unit: float) -> float | None:
    return None if value is None else value / unit
