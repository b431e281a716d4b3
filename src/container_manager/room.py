"""Slurm finds the room: the jobs in which containers run."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from container_manager.errors import ContainerError, NoRoomError

if TYPE_CHECKING:
    from container_manager.launch import Launch

PARTITION = "shared"
_SCRIPT = "/usr/local/lib/cfiddle/container-job"
_TIMEOUT_S = 30
_LOOK_S = 0.1
_CPUS = "container_cpus"  # a GRES (slurm.conf)
_TOO_LARGE = "Requested node configuration is not available"
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
    argv += ["--export", "NIL", "--chdir", "/", "--output", "/dev/null", "--oversubscribe"]
    if launch.machine:
        argv += ["--nodelist", launch.machine]
    gres = [f"{_CPUS}:{launch.cpus}"] if launch.counts_cpus else []
    gres += [f"gpu:{kind}:{number}" for kind, number in Counter(launch.gpus).items()]
    if gres:
        argv += ["--gres", ",".join(gres)]
    if os.getuid() == 0:  # who may submit for others
        argv += ["--uid", launch.user]
    answer = _run([*argv, _SCRIPT, launch.user, launch.name, launch.image, str(launch.ports)])
    return int(answer.split(";")[0])


def job(number: int) -> Job:
    """Return how a job is; one that is forgotten already is COMPLETED."""
    answer = _run(
        ["squeue", "--noheader", "--states", "all", "--jobs", str(number), "--format", "%T|%N|%r"], known=True
    )
    return Job(*answer.strip().split("|", 2)) if answer.strip() else Job("COMPLETED", "", "")


def cancel(numbers: Iterable[int]) -> None:
    """End jobs, and wait until nothing of them runs; those that have ended are as they should be.

    Raises:
        ContainerError: one does not end.
    """
    wanted = [str(number) for number in numbers]
    if not wanted:
        return
    _run(["scancel", "--quiet", *wanted], known=True)
    deadline = time.monotonic() + _TIMEOUT_S
    while left := _run(["squeue", "--noheader", "--jobs", ",".join(wanted), "--format", "%i"], known=True).split():
        if time.monotonic() > deadline:
            raise ContainerError(f"job {left[0]} was cancelled {_TIMEOUT_S} s ago and has not ended", "sinfo, squeue")
        time.sleep(_LOOK_S)


def let_go_anywhere(number: int) -> None:
    """Let a job that waits for one machine run on any."""
    _run(["scontrol", "update", f"JobId={number}", "ReqNodeList="], known=True)


def machines() -> list[Machine]:
    """Return what each machine has free for jobs, by name."""
    found = []
    for line in _run(["scontrol", "--details", "--oneliner", "show", "nodes"]).splitlines():
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


def _run(argv: list[str], *, known: bool = False) -> str:
    """Return what a command prints. With `known` it may fail because a job has ended: that says nothing then."""
    try:
        # In a session of its own: Ctrl-C is for this process, which must know what came of the command.
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ContainerError(f"{argv[0]} is not here: this is not a machine of a cluster") from error
    except subprocess.TimeoutExpired as error:
        raise ContainerError(f"{argv[0]} did not answer within {_TIMEOUT_S} s", "scontrol ping") from error
    if done.returncode and not (known and re.search("Invalid job id|already completing|already finished", done.stderr)):
        said = done.stderr.strip().removeprefix(f"{argv[0]}: ").removeprefix("error: ")
        if _TOO_LARGE in said:
            raise NoRoomError("no machine that is up has so many CPUs, so much memory or such GPUs")
        raise ContainerError(f"{argv[0]}: {said or f'exit status {done.returncode}'}")
    return done.stdout
