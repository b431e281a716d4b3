"""Slurm, asked and told through its own commands in the container of slurmctld."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.services import container
from cfiddle_cluster.wait import PATIENCE, wait_until

ACCOUNT = "cfiddle"
"""The one account that all users belong to; each has a share of their own in it."""

PROBE = "2000:2000"
"""The ordinary account `probe`, which has no home: it runs what proves and measures workers, and nothing else."""

SHORT_JOB = ("srun", "--chdir=/", "--ntasks=1", f"--immediate={5 * PATIENCE:.0f}", f"--time={math.ceil(PATIENCE)}")
"""How such a job is started: at once, or not at all where somebody else's came first."""

_SUBMITTED = {"MaxSubmitJobsPU": "5000"}
"""So many jobs may a user have that wait or run: slurmctld takes MaxJobCount (slurm.conf), and then nobody's."""

QOS = {
    "lease": {"GraceTime": "00:00:30", "MaxWall": "01:00:00", "MaxJobsPU": "4", **_SUBMITTED, "Flags": "DenyOnLimit"},
    "normal": {"Preempt": "lease", **_SUBMITTED},
}
"""The qualities of service that a job may have, and what is set of each (sacctmgr(1)); `normal` is there anyway.

A lease holds a machine for many calls, so it gives way: when an ordinary job finds no room, it gets TERM, and KILL
after its grace time. A user has so many at once, and each so long; one that asks for more time is refused.
"""

SHARED = "shared"
"""The partition where several jobs are on one machine, and the QOS that it gives to all of them."""

SHARE = 0.75
"""So much of SHARED may one user have at most, of its memory and of turns at its CPUs: another finds room at once."""

_SHOW = ("sacctmgr", "--noheader", "--parsable2", "show")
WORKING = frozenset({"allocated", "mixed", "completing", "draining"})
"""The states of a node that runs a job or its epilog."""

_ABSENT = frozenset({"down", "unknown", "future"})

_APPENDED = re.compile(r"( : Not responding)+$")
"""What slurmctld adds to a drained node's reason when its slurmd is silent for `SlurmdTimeout`, and leaves there."""


def slurm(argv: Sequence[str], *, timeout_s: float = 60, user: str = "slurm", input: str | None = None) -> str:
    """Run a command in the container of slurmctld and return what it prints.

    Args:
        argv: the command and its arguments.
        timeout_s: seconds until it is given up.
        user: who runs it: slurm, who may do everything, or "UID:GID" for an ordinary user.
        input: what it gets on standard input.

    Raises:
        ClusterError: slurmctld's container does not run, or the command fails.
    """
    found = container("slurmctld")
    if found is None:
        raise ClusterError(
            "slurmctld does not run on this machine", "./invoke status shows the services, ./invoke logs slurmctld why"
        )
    interactive = [] if input is None else ["--interactive"]
    argv = [docker_cli(), "exec", *interactive, "--user", user, str(found.id), *argv]
    return run(argv, timeout_s=timeout_s, input=input)


def is_answering() -> bool:
    """Tell whether slurmctld runs and answers."""
    try:
        return " is UP" in slurm(["scontrol", "ping"], timeout_s=20)
    except ClusterError:
        return False


@dataclass(frozen=True)
class Node:
    """A worker as Slurm sees it.

    Attributes:
        name: the machine's short hostname.
        state: Slurm's word for it, such as idle, mixed, allocated, draining, drained, down.
        is_answering: whether its slurmd answers and the node is known to be up.
        reason: why it is drained or down, as who did that put it; empty if it is neither.
    """

    name: str
    state: str
    is_answering: bool
    reason: str = ""

    @property
    def is_idle(self) -> bool:
        return self.is_answering and self.state == "idle"

    @property
    def is_drained(self) -> bool:
        """Whether it takes no more jobs, be some still running or not."""
        return self.state in ("draining", "drained")


def nodes() -> dict[str, Node]:
    """Return the nodes by name."""
    return parse_nodes(slurm(["sinfo", "--noheader", "--Node", "--format=%N|%T|%E"]))


def parse_nodes(text: str) -> dict[str, Node]:
    """Read what `sinfo -h -N -o '%N|%T|%E'` prints: one line for each node and partition."""
    found = {}
    for line in text.splitlines():
        name, state, reason = line.split("|", 2)
        # sinfo(1), "NODE STATE CODES": a sign behind the state, * where slurmd does not answer.
        base = state.rstrip("*$~#%!@^-+").lower()
        reason = "" if reason == "none" else _APPENDED.sub("", reason)
        found[name] = Node(name, base, "*" not in state and base not in _ABSENT, reason)
    return found


def slots() -> dict[str, int]:
    """Return how many CPUs each node that takes jobs has, by name."""
    text = slurm(["sinfo", "--noheader", "--Node", "--partition", SHARED, "--responding", "--format", "%N %c %T"])
    lines = (line.split() for line in text.splitlines())
    return {name: int(cpus) for name, cpus, state in sorted(lines) if not state.startswith(("drain", "down"))}


@dataclass(frozen=True)
class Job:
    """A job in the queue."""

    id: str
    user: str
    partition: str
    state: str
    elapsed: str
    nodes: str


def jobs(node: str | None = None) -> list[Job]:
    """Return the jobs in the queue, or those that run on a node, in the order of their ids.

    Their names are left out: a user chooses them, and may put a line break into one.
    """
    where = [] if node is None else [f"--nodelist={node}"]
    lines = slurm(["squeue", "--noheader", "--sort=i", "--format=%i|%u|%P|%T|%M|%N", *where]).splitlines()
    return [Job(*line.split("|", 5)) for line in lines]


def drain(names: Iterable[str], reason: str) -> None:
    """Let those of the nodes that Slurm knows take no more jobs; jobs that run go on."""
    if names := _known(names):
        slurm(["scontrol", "update", f"nodename={','.join(names)}", "state=drain", f"reason={reason}"])


def _known(names: Iterable[str]) -> list[str]:
    """Return those names that are nodes; a machine whose slurmd never came up is none."""
    known = nodes()
    return [name for name in names if name in known]


def set_down(names: Iterable[str], reason: str) -> None:
    """Give those of the nodes up that Slurm knows; the jobs that ran on them end."""
    if names := _known(names):
        slurm(["scontrol", "update", f"nodename={','.join(names)}", "state=down", f"reason={reason}"])


def resume(names: Iterable[str]) -> None:
    """Let the nodes that are drained take jobs again."""
    wanted = set(names)
    drained = [node.name for node in nodes().values() if node.name in wanted and node.is_drained]
    if drained:
        slurm(["scontrol", "update", f"nodename={','.join(drained)}", "state=resume"])


def wait_until_empty(
    names: Iterable[str], *, timeout_s: float, say: Callable[[str], None] = lambda _text: None
) -> None:
    """Wait until no job runs on the nodes and no epilog either.

    Args:
        names: the nodes.
        timeout_s: how long to wait, in seconds.
        say: is told for which jobs it waits, at first and whenever they have become others.

    Raises:
        ClusterError: jobs still run after that time.
    """
    wanted = set(names)
    waiting = f"{next(iter(wanted))} is drained, and waits" if len(wanted) == 1 else "the workers are drained, and wait"
    said = ""

    def is_empty() -> bool:
        nonlocal said
        working = [
            name for name, node in nodes().items() if name in wanted and node.state in WORKING and node.is_answering
        ]
        waited_for = ", ".join(f"{job.id} ({job.user})" for name in working for job in jobs(name))
        if waited_for not in ("", said):
            say(f"{waiting} for jobs: {waited_for}")
            said = waited_for
        return not working

    wait_until(is_empty, timeout_s=timeout_s, interval_s=0.5, what=f"the jobs on {', '.join(sorted(wanted))} to end")


def delete_node(name: str) -> None:
    """Forget a node whose machine has left; nothing happens where it is not known."""
    if name in nodes():
        slurm(["scontrol", "delete", f"nodename={name}"])


def _ensure_account() -> None:
    """Have the account that all users belong to; slurmctld registers the cluster itself, and this waits for it."""
    wait_until(
        lambda: slurm([*_SHOW, "cluster", "format=cluster"]).split(),
        timeout_s=120,
        interval_s=0.5,
        what="slurmctld to register the cluster with slurmdbd",
    )
    if ACCOUNT not in slurm([*_SHOW, "account", "format=account"]).split():
        slurm(
            ["sacctmgr", "--immediate", "add", "account", ACCOUNT, f"description={ACCOUNT}", f"organization={ACCOUNT}"]
        )


def users() -> set[str]:
    """Return the names of the users who may submit jobs."""
    return set(slurm([*_SHOW, "association", f"account={ACCOUNT}", "format=user"]).split())


def ensure_qos() -> None:
    """Have the qualities of service as `QOS` says, and let every user choose among them."""
    columns = ["Name", *dict.fromkeys(setting for settings in QOS.values() for setting in settings)]
    lines = slurm([*_SHOW, "qos", f"format={','.join(columns)}"]).splitlines()
    known = {found["Name"]: found for found in (dict(zip(columns, line.split("|"), strict=True)) for line in lines)}
    for name, settings in QOS.items():
        if name not in known:
            slurm(["sacctmgr", "--immediate", "add", "qos", name])
        if not settings.items() <= known.get(name, {}).items():
            wanted = [f"{setting}={_as_told(setting, value)}" for setting, value in settings.items()]
            slurm(["sacctmgr", "--immediate", "modify", "qos", name, "set", *wanted])
    may = slurm([*_SHOW, "association", f"account={ACCOUNT}", "user=", "format=QOS,DefaultQOS"]).strip()
    choices, _, default = may.partition("|")
    if set(choices.split(",")) != set(QOS) or default != "normal":
        wanted = [f"qos={','.join(sorted(QOS))}", "defaultqos=normal"]
        slurm(["sacctmgr", "--immediate", "modify", "account", f"name={ACCOUNT}", "set", *wanted])


def ensure_share() -> None:
    """Have one user's jobs leave room for others in SHARED, which has as many nodes as there are now."""
    cpus = turns = memory_mb = for_containers = 0
    for line in slurm(["sinfo", "--noheader", "--Node", f"--partition={SHARED}", "--format=%c|%m|%h|%G"]).splitlines():
        of_node, megabytes, at_once, gres = line.split("|")
        cpus += int(of_node)
        turns = int(at_once.partition(":")[2])
        memory_mb += int(megabytes)
        for_containers += sum(map(int, re.findall(r"\bcontainer_cpus:(\d+)", gres)))
    most = {"cpu": cpus * turns, "mem": memory_mb, "gres/container_cpus": for_containers}
    limit = ",".join(f"{what}={math.ceil(number * SHARE)}" for what, number in most.items() if number)
    slurm(["sacctmgr", "--immediate", "modify", "qos", SHARED, "set", "Flags=DenyOnLimit", f"MaxTRESPU={limit}"])


def _as_told(setting: str, value: str) -> str:
    """Return a setting's value as sacctmgr takes it: a grace time in seconds, which it shows as HH:MM:SS."""
    if setting != "GraceTime":
        return value
    hours, minutes, seconds = map(int, value.split(":"))
    return str(hours * 3600 + minutes * 60 + seconds)


def ensure_users(names: Iterable[str]) -> None:
    """Let the users submit jobs, each with a fair share of their own."""
    _ensure_account()
    ensure_qos()
    if missing := sorted(set(names) - users()):
        slurm(["sacctmgr", "--immediate", "add", "user", ",".join(missing), f"account={ACCOUNT}", "fairshare=1"])


def delete_user(name: str) -> None:
    """End a user's jobs and let them submit no more; what they used stays on record."""
    if name not in users():
        return
    slurm(["scancel", f"--user={name}"])
    is_gone = ["squeue", "--noheader", f"--user={name}", "--format=%i"]
    wait_until(lambda: not slurm(is_gone).strip(), timeout_s=120, interval_s=0.5, what=f"the jobs of {name} to end")
    slurm(["sacctmgr", "--immediate", "delete", "user", f"name={name}"])
