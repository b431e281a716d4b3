"""Measure messages between two workers against messages between the same two processes on one worker, by turns.

usage: ./invoke benchmark mpi, or .venv/bin/python benchmarks/mpi.py [--rounds N]
"""

import json
import statistics
import sys
from collections.abc import Iterator

from common import Measured, container, docker, in_userhost, measure, ratio

PROGRAM = "/usr/local/lib/cfiddle/mpi_pairs.py"
SRUN = ("srun", "--quiet", "--mpi=pmix", "--partition=shared", "--ntasks=2")
MOST_LATENCY, LEAST_BANDWIDTH = 60, 0.1
"""Reaches: how many times the latency, and which part of the bandwidth, the network may have of shared memory's."""


class Bench:
    """Two processes of jovyan's, so many times."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self._program = docker("exec", container("userhost"), "cat", PROGRAM)

    def measured(self, nodes: int) -> tuple[float, float]:
        """Return latency in seconds and bandwidth in MB/s of two processes on so many nodes."""
        said = json.loads(in_userhost(*SRUN, f"--nodes={nodes}", "python3", "-c", self._program))
        [[_, _, latency_us, megabytes_per_s]] = said["pairs"]
        return latency_us / 1e6, megabytes_per_s

    def close(self) -> None:
        """Nothing is left to undo."""


def two_nodes_against_one(bench: Bench) -> Iterator[Measured]:
    """Latency and bandwidth between two nodes, against one node."""
    latency: dict[str, list[float]] = {"two nodes": [], "one node": []}
    bandwidth: dict[str, list[float]] = {"two nodes": [], "one node": []}
    for _ in range(bench.rounds):
        for kind, nodes in (("two nodes", 2), ("one node", 1)):
            seconds, megabytes_per_s = bench.measured(nodes)
            latency[kind].append(seconds)
            bandwidth[kind].append(megabytes_per_s)
    for kind in latency:
        microseconds = statistics.median(latency[kind]) * 1e6
        print(f"  {kind}: {microseconds:.2f} µs, {statistics.median(bandwidth[kind]):.0f} MB/s", flush=True)
    compared = {"what": "two nodes", "against": "one node"}
    yield ratio("latency between two nodes, against one node", MOST_LATENCY, latency, **compared)
    yield ratio("bandwidth between two nodes, against one node", LEAST_BANDWIDTH, bandwidth, **compared, at_least=True)


if __name__ == "__main__":
    sys.exit(measure("mpi", __doc__.splitlines()[0], {"pairs": two_nodes_against_one}, Bench))
