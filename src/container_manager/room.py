"""Slurm finds the room: the jobs in which containers run."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from typing import NamedTuple

from container_manager.errors import ContainerError

PARTITION = "shared"
_SCRIPT = "/usr/local/lib/cfiddle/container-job"
_TIMEOUT_S = 30
_LOOK_S = 0.1


class Job(NamedTuple):
    """How a job is: Slurm's word, the machine it runs on, and why it waits or has ended."""

    state: str
    machine: str
    reason: str

    @property
    def waits(self) -> bool:
        """Whether it may still get room."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED")


class Machine(NamedTuple):
    """What a machine has free for jobs."""

    name: str
    state: str
    free_cpus: int
    free_memory_mb: int

    @property
    def takes_jobs(self) -> bool:
        """Whether Slurm would send a job there."""
        return self.state.rstrip("*+~#%$@^!-") in ("idle", "mixed", "allocated") and not self.state.endswith("*")


def submit(
    *, user: str, name: str, image: str, machine: str, cpus: int, memory_mb: int, options: Iterable[str] = ()
) -> int:
    """Submit the job in which a container shall run; return its number.

    Args:
        image: what it is made of where it is not there yet; "" if it must be there.
        machine: where it shall run; "" for anywhere.
        options: further ones of sbatch.

    Raises:
        ContainerError: Slurm does not take it.
    """
    argv = ["sbatch", "--parsable", "--partition", PARTITION, "--job-name", name, "--oversubscribe"]
    argv += ["--cpus-per-task", str(cpus), "--mem", f"{memory_mb}M", "--no-requeue"]
    argv += ["--export", "NIL", "--chdir", "/", "--output", "/dev/null"]
    argv += [*(["--nodelist", machine] if machine else []), *options]
    answer = _run([*argv, _SCRIPT, user, name, image])
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
    """Return what each machine has free, by name."""
    form = "NodeHost:|,StateLong:|,CPUsState:|,Memory:|,AllocMem:|"
    found = []
    for line in _run(["sinfo", "--noheader", "--Node", "--partition", PARTITION, "--Format", form]).splitlines():
        name, state, cpus, memory_mb, allocated_mb = (field.strip() for field in line.split("|")[:5])
        idle = int(cpus.split("/")[1])
        found.append(Machine(name, state, idle, int(memory_mb) - int(allocated_mb)))
    return found


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
        raise ContainerError(f"{argv[0]}: {said or f'exit status {done.returncode}'}")
    return done.stdout
