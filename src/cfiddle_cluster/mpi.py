"""MPI on the cluster: the list of its nodes for mpirun, and a test of what goes between them."""

import base64
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docker.models.containers import Container

from cfiddle_cluster import slurm, userhost
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError

MACHINEFILE = "/etc/machinefile"
TEST_TIMEOUT_S = 600
PI_TOLERANCE = 1e-9
"""The rule of midpoints with mpi_pairs.py's number of intervals errs by 2e-16; the rest is for rounding."""

_PROGRAMS = "/usr/local/lib/cfiddle"


def machinefile(slots: Mapping[str, int]) -> str:
    """Return the nodes as a hostfile of mpirun(1)."""
    return "".join(f"{node} slots={cpus}\n" for node, cpus in slots.items())


def write_machinefile() -> str:
    """Write the nodes that take jobs to /etc/machinefile on the users' node; return what stands there.

    Raises:
        ClusterError: the users' node or slurmctld does not run.
    """
    text = machinefile(slurm.slots())
    # A reader sees the old file or the new one.
    script = f"umask 022 && cat >{MACHINEFILE}.new && mv {MACHINEFILE}.new {MACHINEFILE}"
    _in_userhost(userhost.running(), ["sh", "-c", script], input=text)
    return text


def test(config: Config, *, user: str, picture: Path) -> None:
    """Measure all pairs of nodes and compute pi on all of them, as a user; print a table and draw a heat map.

    Raises:
        ClusterError: there are fewer than two nodes, the job fails, or pi is wrong.
    """
    container = userhost.running()
    nodes = len(slurm.slots())
    if nodes < 2:
        raise ClusterError(f"{nodes} node takes jobs, and a pair needs two", "./invoke scale 2")
    argv = ["srun", "--quiet", "--mpi=pmix", "--partition=shared", f"--nodes={nodes}", "--ntasks-per-node=1"]
    command = ["as-user", user, *argv, "python3", "-c", _program(container, "mpi_pairs.py")]
    try:
        measured = json.loads(_in_userhost(container, command, timeout_s=TEST_TIMEOUT_S))
    except CommandError as error:
        raise ClusterError(f"the nodes do not reach each other by MPI:\n{error.output}", "./invoke doctor") from error
    print(table(measured))
    _draw(container, measured, picture)
    check_pi(measured["pi"])


def table(measured: Mapping[str, Any]) -> str:
    """Return the measured pairs as lines, and pi."""
    nodes = measured["nodes"]
    width = max(len(word) for word in ("from", *nodes))
    lines = [f"{'from':<{width}}  {'to':<{width}}  {'latency':>12}  {'bandwidth':>12}"]
    lines += [
        f"{nodes[one]:<{width}}  {nodes[other]:<{width}}  {latency:>9.1f} µs  {bandwidth:>7.0f} MB/s"
        for one, other, latency, bandwidth in measured["pairs"]
    ]
    return "\n".join([*lines, f"pi, by {len(nodes)} processes: {measured['pi']:.15f}"])


def check_pi(pi: float) -> None:
    """Raise ClusterError unless what was computed is pi."""
    if not math.isclose(pi, math.pi, abs_tol=PI_TOLERANCE):
        raise ClusterError(f"the processes computed {pi:.15f} for pi", "./invoke test-mpi again; ./invoke doctor")


def _draw(container: Container, measured: Mapping[str, Any], picture: Path) -> None:
    argv = ["as-user", "jovyan", "python3", f"{_PROGRAMS}/mpi_picture.py"]
    picture.write_bytes(base64.b64decode(_in_userhost(container, argv, input=json.dumps(measured))))
    print(f"drawn to {picture}")


def _program(container: Container, name: str) -> str:
    return _in_userhost(container, ["cat", f"{_PROGRAMS}/{name}"])


def _in_userhost(container: Container, argv: list[str], *, timeout_s: float = 60, input: str | None = None) -> str:
    return run([docker_cli(), "exec", "--interactive", str(container.id), *argv], timeout_s=timeout_s, input=input)
