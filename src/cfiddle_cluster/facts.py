"""Facts about machines, gathered from all of them at once by probe.sh."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import PARALLEL, Machine, Silent

PROBE = Path(__file__).with_name("probe.sh")
PROBE_TIMEOUT_S = 45
KERNEL = "kernel"
"""The holder of a port that no process holds."""


@dataclass(frozen=True)
class Facts:
    """What one machine says of itself.

    Attributes:
        machine: the machine, by its own name.
        values: single facts, by probe.sh's names.
        listeners: who listens, by protocol and port: ("tcp", 2377) → "dockerd".
        reached: whether it can connect, by "HOST:PORT".
        trusted: the digest of the authority that its engine trusts for a registry, by "HOST:PORT".
        sandboxes: containers of sandboxes, and the number of the job that each is for.
        pmu: the names of the CPU's performance monitoring units.
        settings: what measurements vary with, by the file that says it; "swap:DEVICE" for a swap area.
        busy: who took a tenth of a CPU or more just now, and how many percent.
        foreign: running containers that are not the cluster's.
        engine: what the engine says of itself; None if none runs.
        is_engine_installed: whether there is one to be started.
        offset_s: how far its clock is ahead of ours.
        offset_error_s: by how much that may be wrong, to either side.
    """

    machine: Machine
    values: Mapping[str, str]
    listeners: Mapping[tuple[str, int], str] = field(default_factory=dict)
    reached: Mapping[str, bool] = field(default_factory=dict)
    trusted: Mapping[str, str] = field(default_factory=dict)
    sandboxes: Mapping[str, str] = field(default_factory=dict)
    pmu: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    busy: Sequence[tuple[str, int]] = ()
    foreign: Sequence[str] = ()
    engine: Mapping[str, Any] | None = None
    is_engine_installed: bool = False
    offset_s: float = 0.0
    offset_error_s: float = 0.0

    @property
    def name(self) -> str:
        return self.values.get("name", self.machine.name)

    def is_yes(self, name: str) -> bool:
        """Return whether a fact is there and true."""
        return self.values.get(name) == "yes"

    def number(self, name: str) -> int | None:
        """Return a fact that is a whole number; None where the machine does not say."""
        text = self.values.get(name, "")
        return int(text) if text.lstrip("-").isdigit() else None


def gather(
    machines: Iterable[Machine], *, home_root: Path, ports: Iterable[int], targets: Iterable[str]
) -> list[Facts | Silent]:
    """Ask every machine at once; return what each says, in the machines' order.

    Args:
        machines: whom to ask.
        home_root: the directory whose free space is asked for.
        ports: whose holders are asked for.
        targets: as HOST:PORT, what is to be reached from each.
    """
    script = PROBE.read_text()
    args = [str(home_root), " ".join(map(str, ports)), " ".join(targets)]

    def ask(machine: Machine) -> Facts | Silent:
        sent = time.time()
        try:
            text = machine.script(script, args, timeout_s=PROBE_TIMEOUT_S)
        except ClusterError as error:
            return Silent(machine, error)
        return parse(machine, text, sent=sent, received=time.time())

    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        return list(pool.map(ask, machines))


def parse(machine: Machine, text: str, *, sent: float, received: float) -> Facts:
    """Read what probe.sh prints.

    Args:
        machine: who printed it.
        text: the lines.
        sent: when it was asked, by our clock in seconds.
        received: when the answer was complete.
    """
    values: dict[str, str] = {}
    listeners: dict[tuple[str, int], str] = {}
    reached: dict[str, bool] = {}
    trusted: dict[str, str] = {}
    sandboxes: dict[str, str] = {}
    pmu: list[str] = []
    settings: dict[str, str] = {}
    busy: list[tuple[str, int]] = []
    foreign: list[str] = []
    engine: dict[str, Any] | None = None
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == "listen":
            protocol, port, holder = value.split(" ", 2)
            listeners[protocol, int(port)] = holder
        elif name.startswith("reach-"):
            reached[name.removeprefix("reach-")] = value == "yes"
        elif name == "trust":
            address, digest = value.split()
            trusted[address] = digest
        elif name == "sandbox":
            container, _, job = value.partition(" ")
            sandboxes[container] = job
        elif name == "pmu":
            pmu.append(value)
        elif name == "setting":
            path, _, setting = value.partition(" ")
            settings[path] = setting
        elif name == "busy":
            percent, _, who = value.partition(" ")
            busy.append((who, int(percent)))
        elif name == "container":
            foreign.append(value)
        elif name == "info":
            engine = json.loads(value)
        else:
            values[name] = value
    offset_s, error_s = _offset(values, sent, received)
    return Facts(
        machine=machine,
        values=values,
        listeners=listeners,
        reached=reached,
        trusted=trusted,
        sandboxes=sandboxes,
        pmu=pmu,
        settings=settings,
        busy=busy,
        foreign=foreign,
        engine=engine,
        is_engine_installed=values.get("engine") != "absent",
        offset_s=offset_s,
        offset_error_s=error_s,
    )


def _offset(values: Mapping[str, str], sent: float, received: float) -> tuple[float, float]:
    """Return how far the machine's clock is ahead and the error of that, as NTP does it (RFC 5905, section 8)."""
    if "began" not in values or "ended" not in values:
        return 0.0, 0.0
    most, least = float(values["began"]) - sent, float(values["ended"]) - received
    return (most + least) / 2, abs(most - least) / 2
