"""Slurm finds the room: the jobs in which containers run."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from container_manager.errors import ContainerError, NoRoomError
from container_manager.slurm import ask

if TYPE_CHECKING:
    from container_manager.launch import Launch

PARTITION = "shared"
_SCRIPT = "/usr/local/lib/cfiddle/container-job"
_END_S = 30
_LOOK_S = 0.1
_CPUS = "container_cpus"  # a GRES (slurm.conf)
_TOO_LARGE = "Requested node configuration is not available"
_RUNS = "Invalid node name specified"  # which is for a job that has none yet
_OVER = "Invalid job id|already completing|already finished"
_CLOSED = {"drain", "fail", "invalid_reg", "maintenance", "not_responding", "powering_down", "reserved"}


class Job(NamedTuple):
    """How a job is: Slurm's word, the machine it runs on, and why it waits or has ended."""

    state: str
    machine: str
    reason: str

    @property
    def waits(self) -> bool:
        """Whether it may still get room."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED")

    @property
    def is_over(self) -> bool:
        """Whether nothing of it runs any more."""
        return not self.waits and self.state not in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED")


class Machine(NamedTuple):
    """How a machine is, in Slurm's words as in `mixed+drain`, and what it has free for containers."""

    name: str
    state: str
    free_cpus: int
    free_memory_mb: int
    free_gpus: Mapping[str, int]

    @property
    def takes_jobs(self) -> bool:
        """Whether Slurm would send a job there."""
        state, *flags = self.state.split("+")
        return state in ("idle", "mixed", "allocated") and not _CLOSED & set(flags)


def submit(launch: Launch) -> int:
    """Submit the job in which a container shall run; return its number.

    Raises:
        ContainerError: Slurm does not take it.
    """
    argv = ["sbatch", "--parsable", "--partition", PARTITION, "--job-name", launch.name]
    argv += ["--cpus-per-task", str(launch.cpus), "--mem", f"{launch.memory_mb}M", "--no-requeue"]
    argv += ["--export", "NIL", "--chdir", "/", "--output", "/dev/null"]
    if launch.machine:
        argv += ["--nodelist", launch.machine]
    gres = [f"{_CPUS}:{launch.cpus}"] if launch.counts_cpus else []
    gres += [f"gpu:{kind}:{number}" for kind, number in Counter(launch.gpus).items()]
    if gres:
        argv += ["--gres", ",".join(gres)]
    if os.getuid() == 0:  # who may submit for others
        argv += ["--uid", launch.user]
    argv += [_SCRIPT, launch.user, launch.name, launch.image, str(launch.ports)]
    try:
        return int(ask(argv).split(";")[0])
    except ContainerError as error:
        if _TOO_LARGE not in str(error):
            raise
        raise NoRoomError("no machine that is up has so many CPUs, so much memory or such GPUs") from error


def job(number: int) -> Job:
    """Return how a job is; one that is forgotten already is COMPLETED."""
    argv = ["squeue", "--noheader", "--states", "all", "--jobs", str(number), "--format", "%T|%N|%r"]
    answer = ask(argv, unless=_OVER)
    if not answer.strip():
        return Job("COMPLETED", "", "")
    state, machine, reason = answer.strip().split("|", 2)
    if re.match(r"QOSMax\w+PerUser", reason):
        reason = f"you have as much as one user may ({reason})"
    return Job(state, machine, reason)


def cancel(numbers: Iterable[int]) -> None:
    """End jobs, and wait until nothing of them runs; those that have ended are as they should be.

    Raises:
        ContainerError: one does not end.
    """
    wanted = [str(number) for number in numbers]
    if not wanted:
        return
    ask(["scancel", "--quiet", *wanted], unless=_OVER)
    deadline = time.monotonic() + _END_S
    while left := ask(["squeue", "--noheader", "--jobs", ",".join(wanted), "--format", "%i"], unless=_OVER).split():
        if time.monotonic() > deadline:
            raise ContainerError(f"job {left[0]} was cancelled {_END_S} s ago and has not ended", "sinfo, squeue")
        time.sleep(_LOOK_S)


def let_go_anywhere(number: int) -> None:
    """Let a job that waits for one machine run on any; it may have begun to run meanwhile."""
    ask(["scontrol", "update", f"JobId={number}", "ReqNodeList="], unless=f"{_RUNS}|{_OVER}")


def machines() -> list[Machine]:
    """Return what each machine has free for jobs, by name."""
    found = []
    for line in ask(["scontrol", "--details", "--oneliner", "show", "nodes"]).splitlines():
        told = dict(re.findall(r"(\w+)=(\S*)", line))
        if PARTITION not in told.get("Partitions", "").split(","):
            continue
        free_gpus = _gpus(told["Gres"])
        free_gpus.subtract(_gpus(told.get("GresUsed", "")))
        free_mb = int(told["RealMemory"]) - int(told.get("MemSpecLimit", 0)) - int(told["AllocMem"])
        free_cpus = _cpus(told["Gres"]) - _cpus(told.get("GresUsed", ""))
        found.append(Machine(told["NodeName"], told["State"].lower(), free_cpus, free_mb, free_gpus))
    return sorted(found)


def _cpus(gres: str) -> int:
    """Return how many CPUs for containers stand in what scontrol says of a machine."""
    found = re.search(rf"{_CPUS}:(\d+)", gres)
    return int(found[1]) if found else 0


def _gpus(gres: str) -> Counter[str]:
    """Return how many GPUs of each kind stand in what scontrol says, such as `gpu:titan_xp:2(S:0)`."""
    return Counter({kind: int(number) for kind, number in re.findall(r"gpu:([a-z0-9_]+):(\d+)", gres)})
