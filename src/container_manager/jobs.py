"""What Slurm says of nodes and of this user's jobs, by the parsable text of its own commands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from container_manager.errors import ContainerError
from container_manager.slurm import ask, last_line, printable, run

_ACCOUNTING_S = 2.0
_RECENT = "now-1hour"
_FIELD, _RECORD = "\x1f", "\x1e"
_ENDED = "BOOT_FAIL,CANCELLED,COMPLETED,DEADLINE,FAILED,NODE_FAIL,OUT_OF_MEMORY,PREEMPTED,TIMEOUT"
UNFINISHED = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
    "SUSPENDED",
)
MOST_MINUTES = 365 * 24 * 60


@dataclass(frozen=True)
class Node:
    """A node, with what all users' jobs have of it together."""

    name: str
    state: str
    cpus: int
    cpus_in_use: int
    memory_mb: int
    memory_mb_in_use: int
    gpus: int
    gpus_in_use: int
    reason: str

    @property
    def takes_jobs(self) -> bool:
        """Say whether it runs jobs, now or when others have ended."""
        # `-`: the scheduler has plans with it. Other flags, as in `idle*` (does not answer), speak against it.
        return self.state.rstrip("-") in ("idle", "mixed", "allocated", "completing")


@dataclass(frozen=True)
class Job:
    """A job of this user's.

    Attributes:
        id: as Slurm writes it: `12`, of an array `12_3`, or `12_[4-9]` for those of its jobs that wait.
        state: Slurm's word, in lower case.
        tries: how often it has been started, or will have been when it starts.
        cpus: what it has, or waits for, as are `memory_mb` and `gpus`; each job of an array.
        nodes: their names; empty while it waits.
        elapsed: since it started, in Slurm's form, as is `limit`.
        reason: why it waits, or how it ended; empty if there is nothing to say.
    """

    id: str
    name: str
    state: str
    tries: int
    cpus: int
    memory_mb: int
    gpus: int
    nodes: str
    elapsed: str
    limit: str
    reason: str


def nodes(partition: str | None = None) -> list[Node]:
    """Return the nodes, or those of a partition."""
    fields = "NodeHost StateLong CPUsState Memory AllocMem Gres GresUsed Reason".split()
    argv = ["sinfo", "--noheader", "--Node", f"--Format={_format(fields)}"]
    found: dict[str, Node] = {}
    for name, state, cpus, memory, memory_in_use, gres, gres_in_use, reason in _records(
        ask([*argv, f"--partition={partition}"] if partition else argv), len(fields)
    ):
        in_use, _, _, total = cpus.split("/")
        found[name] = Node(
            name,
            state,
            int(total),
            int(in_use),
            int(memory),
            int(memory_in_use),
            _gpus(gres),
            _gpus(gres_in_use),
            "" if reason == "none" else reason,
        )
    return list(found.values())


def longest_minutes(partition: str) -> int | None:
    """Return how long a job of a partition may take; None if as long as it likes, or if there is no such partition."""
    limit = ask(["sinfo", "--noheader", f"--partition={partition}", "--format=%l"]).split()
    return minutes(limit[0]) if limit and limit[0] != "infinite" else None


def partitions() -> list[str]:
    """Return the names of the partitions."""
    return ask(["sinfo", "--noheader", "--format=%R"]).split()


def queued() -> list[Job]:
    """Return this user's jobs that wait or run, those first that run."""
    fields = "JobArrayId State RestartCnt tres-alloc NodeList TimeUsed TimeLimit Reason Name".split()
    argv = ["squeue", "--me", "--noheader", "--sort=-t,i", f"--Format={_format(fields)}"]
    return [
        Job(
            number,
            name,
            state.lower(),
            int(restarts) + 1,
            *_resources(tres),
            nodes,
            elapsed,
            limit,
            "" if reason == "None" else reason,
        )
        for number, state, restarts, tres, nodes, elapsed, limit, reason, name in _records(ask(argv), len(fields))
    ]


def ended() -> list[Job]:
    """Return this user's jobs that ended within the last hour, the last one first.

    Raises:
        ContainerError: the accounting does not answer, or not soon.
    """
    fields = "JobID,State,Restarts,ReqTRES,NodeList,Elapsed,Timelimit,ExitCode,End,JobName"
    argv = ["sacct", "--allocations", "--noheader", "--parsable", f"--delimiter={_FIELD}"]
    argv += [f"--starttime={_RECENT}", "--endtime=now", f"--state={_ENDED}", f"--format={fields}"]
    found = []
    for record in ask(argv, timeout_s=_ACCOUNTING_S).split(f"{_FIELD}\n")[:-1]:
        number, state, restarts, tres, where, elapsed, limit, status, end, name = record.split(_FIELD, 9)
        word = state.split()[0].lower()
        nodes = "" if where == "None assigned" else where
        how = how_it_ended(word, status, short(limit))
        times = (short(elapsed), short(limit))
        found.append((end, Job(number, name, word, int(restarts) + 1, *_resources(tres), nodes, *times, how)))
    return [job for _, job in sorted(found, key=lambda pair: pair[0], reverse=True)]


def how_it_ended(state: str, status: str, limit: str) -> str:
    """Return in words how a job ended, from Slurm's word and its `STATUS:SIGNAL`; empty if that is plain."""
    code, _, signal = status.partition(":")
    if state == "failed":
        return f"exit status {code}" if signal in ("", "0") else f"killed by signal {signal}"
    return {"timeout": f"over its time of {limit}", "node_fail": "its node died"}.get(state, "")


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, …"""
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"


def job(number: int) -> dict[str, str]:
    """Return what Slurm knows of a job, by the names of `scontrol show job`; nothing if there is none."""
    try:
        shown = ask(["scontrol", "--oneliner", "show", "job", str(number)])
    except ContainerError as error:
        if "Invalid job id" not in str(error):
            raise
        return recorded(str(number))
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def recorded(number: str) -> dict[str, str]:
    """Return what the accounting has of a job of this user's, by the names of `scontrol show job`."""
    names = ["JobState", "ExitCode", "NodeList", "TimeLimit", "Restarts"]
    argv = ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={number}"]
    lines = ask([*argv, "--format=State,ExitCode,NodeList,Timelimit,Restarts"]).splitlines()
    return dict(zip(names, lines[-1].split("|"), strict=True)) if lines else {}


def kill(number: str) -> None:
    """End a job of this user's.

    Args:
        number: as the user wrote it: of a job, or of one in an array, as in `12_3`.

    Raises:
        ContainerError: it is no number, there is no such job, it has ended, or it is another's.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,9}(_[0-9]{1,7})?", number, re.ASCII):
        raise ContainerError(
            f"{printable(number)!r} is no number of a job", "cminfo shows your jobs with their numbers"
        )
    # Only --verbose makes scancel say that there was nothing to end.
    said = run(["scancel", "--verbose", number]).stderr
    if "error:" not in said:
        return
    if "permission denied" in said:
        raise ContainerError(f"job {number} is not yours")
    if "Invalid job id" in said or "already completing or completed" in said:
        state = recorded(number).get("JobState", "")
        if state or "already" in said:
            raise ContainerError(f"job {number} has ended already" + (f": {state.lower()}" if state else ""))
        raise ContainerError(f"there is no job {number} of yours", "cminfo shows your jobs with their numbers")
    raise ContainerError(f"job {number} could not be ended: {last_line(said)}")


def minutes(text: str) -> int:
    """Return a time of Slurm's in minutes, rounded up: `30`, `10:30`, `2:00:00`, `1-12`, `1-12:30`, `1-12:30:00`.

    Raises:
        ValueError: it is none, is not longer than nothing, or longer than a year.
    """
    found = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", text, re.ASCII)
    if not found:
        raise ValueError(f"{printable(text)!r} is no time")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is not None:
        hours, mins, seconds = [*given, 0, 0][:3]
    elif len(given) == 3:
        hours, mins, seconds = given
    else:
        hours, (mins, seconds) = 0, [*given, 0][:2]
    total = (((days or 0) * 24 + hours) * 60 + mins) + -(-seconds // 60)
    if not 0 < total <= MOST_MINUTES:
        raise ValueError(f"{text} is {'longer than a year' if total else 'no time at all'}")
    return total


def _format(fields: Sequence[str]) -> str:
    return ",".join(f"{field}:{_RECORD if field == fields[-1] else _FIELD}" for field in fields)


def _records(text: str, fields: int) -> Iterator[list[str]]:
    """Yield the records of `--Format`; the last field may hold anything."""
    for record in text.split(f"{_RECORD}\n"):
        if record:
            yield record.split(_FIELD, fields - 1)


def _gpus(gres: str) -> int:
    """Return how many GPUs a node's GRES are: `gpu:a100:2(S:0),gpu:1`."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def short(time: str) -> str:
    """Return a time of the accounting's as squeue writes it: `00:10:05` is `10:05`."""
    return re.sub(r"^(00:)?0?(?=\d)", "", time)


def _resources(tres: str) -> tuple[int, int, int]:
    """Return CPUs, megabytes and GPUs of `cpu=2,mem=1.50G,node=1,billing=2,gres/gpu=1`."""
    given = dict(part.split("=", 1) for part in tres.split(",") if "=" in part)
    memory = given.get("mem", "0M")
    unit = memory[-1] if memory[-1].isalpha() else "M"
    memory_mb = float(memory.rstrip(unit)) * 1024 ** ("KMGTP".index(unit) - 1)
    return int(given.get("cpu", 0)), round(memory_mb), int(given.get("gres/gpu", 0))
