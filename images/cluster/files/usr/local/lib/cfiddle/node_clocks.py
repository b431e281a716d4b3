"""Let a node whose clock is off take no jobs, with the reason, until it is right again, and see who is back.

Runs once a minute in slurmctld's container (cluster-role). The node cannot do it itself, as it does with other faults
(node-health): MUNGE refuses what was said more than 300 s ago or is dated ahead by more (munged(8), --max-ttl), so
neither does Slurm hear such a node nor it Slurm. The agents, though, tell their time to whoever connects to them.

Slurm itself takes minutes to see that a node that it gave up answers again: such nodes it does not ping
(ping_nodes in its ping_nodes.c), only asks for their registration now and then. One whose slurmd takes connections is
resumed, which has it asked at once.

Only a drain that was made here is ended here; a person's, or another check's, is left alone.
"""

import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from agent import letters

MOST_S = 60.0
"""As long as a job's credential is good (cred_expire in slurm.conf): a node further ahead starts no job."""
REASON = "its clock is "
SILENT = "Not responding"
"""What Slurm itself says of a node that it does not hear (set_node_down in its node_mgr.c)."""

SLURMD_PORT = 6818
ASK_S = 5.0
SLURM_S = 20.0
PARALLEL = 16


class Clock(NamedTuple):
    """A node's clock.

    Attributes:
        node: whose it is.
        offset_s: how far it is ahead of this machine's.
        error_s: by how much that may be wrong, to either side.
    """

    node: str
    offset_s: float
    error_s: float

    @property
    def fault(self) -> str:
        """What is wrong with it, as a drain's reason; empty where it is right."""
        if abs(self.offset_s) - self.error_s <= MOST_S:
            return ""
        return f"{REASON}{abs(self.offset_s):.0f} s {'ahead of' if self.offset_s > 0 else 'behind'} the head's"


def read(address: str) -> Clock | None:
    """Return the clock of the node whose agent listens there; None where it does not answer, or is of before."""
    sent = time.time()
    try:
        with socket.create_connection((address, letters.PORT), timeout=ASK_S) as connection:
            greeting = letters.parse(letters.receive(connection))
        received = time.time()
        return Clock(str(greeting["node"]), float(greeting["time"]) - (sent + received) / 2, (received - sent) / 2)
    except (OSError, EOFError, letters.LetterError, KeyError) as error:
        print(f"node_clocks: {address} does not tell its time: {error!r}", file=sys.stderr, flush=True)
        return None


def takes_connections(address: str) -> bool:
    """Return whether a slurmd listens there."""
    try:
        socket.create_connection((address, SLURMD_PORT), timeout=ASK_S).close()
    except OSError:
        return False
    return True


def changes(clocks: Iterable[Clock], reasons: Mapping[str, str], back: Container[str]) -> dict[str, list[str]]:
    """Return what Slurm is to be told of which nodes, as settings of `scontrol update`.

    Args:
        clocks: the nodes' clocks, as far as they are known.
        reasons: why nodes take no jobs, as `sinfo` has it; "none" of those that do.
        back: the nodes that Slurm gave up and whose slurmd listens.
    """
    told = {}
    for clock in clocks:
        reason = reasons.get(clock.node, "")
        is_ours = reason.startswith(REASON)
        if clock.fault and (is_ours or reason in ("none", SILENT)) and reason != clock.fault:
            told[clock.node] = ["state=drain", f"reason={clock.fault}"]
        elif not clock.fault and (is_ours or clock.node in back):
            told[clock.node] = ["state=resume"]
    return told


def main() -> None:
    """Look at all nodes once."""
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        clocks = [clock for clock in pool.map(read, agents()) if clock]
        said = slurm("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N|%o|%E")
        nodes = [line.split("|", 2) for line in said.splitlines()]
        given_up = {node: address for node, address, reason in nodes if reason == SILENT}
        listens = pool.map(takes_connections, given_up.values())
        back = set(itertools.compress(given_up, listens))
    for node, settings in changes(clocks, {node: reason for node, _, reason in nodes}, back).items():
        slurm("scontrol", "update", f"nodename={node}", *settings)


def agents() -> set[str]:
    """Return the addresses of the agents that are there."""
    try:
        found = socket.getaddrinfo("agent", letters.PORT, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror:
        return set()
    return {str(address[0]) for *_, address in found}


def slurm(*argv: str) -> str:
    """Run one of Slurm's commands; return what it prints."""
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=SLURM_S, check=True).stdout


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"node_clocks: {error}")
