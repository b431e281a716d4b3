"""Measure messages between two workers against messages between the same two processes on one worker, by turns.

usage: ./invoke benchmark mpi, or .venv/bin/python benchmarks/mpi.py [--rounds N]
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict

from common import Measured, container, docker, draw, in_userhost, machine_facts, ratio, show_and_keep

PROGRAM = "/usr/local/lib/cfiddle/mpi_pairs.py"
SRUN = ("srun", "--quiet", "--mpi=pmix", "--partition=shared", "--ntasks=2")
MOST_LATENCY, LEAST_BANDWIDTH = 60, 0.1
"""Reaches: how many times the latency, and which part of the bandwidth, the network may have of shared memory's."""


def measured(program: str, nodes: int) -> tuple[float, float]:
    """Return latency in seconds and bandwidth in MB/s of two processes on so many nodes."""
    said = json.loads(in_userhost(*SRUN, f"--nodes={nodes}", "python3", "-c", program))
    [[_, _, latency_us, megabytes_per_s]] = said["pairs"]
    return latency_us / 1e6, megabytes_per_s


def main() -> int:
    """Measure, print the table, write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="how often each is measured (default: %(default)s)")
    options = parser.parse_args()
    program = docker("exec", container("userhost"), "cat", PROGRAM)
    latency: dict[str, list[float]] = {"two nodes": [], "one node": []}
    bandwidth: dict[str, list[float]] = {"two nodes": [], "one node": []}
    for _ in range(options.rounds):
        for kind, nodes in (("two nodes", 2), ("one node", 1)):
            seconds, megabytes_per_s = measured(program, nodes)
            latency[kind].append(seconds)
            bandwidth[kind].append(megabytes_per_s)
    for kind in latency:
        microseconds = statistics.median(latency[kind]) * 1e6
        print(f"  {kind}: {microseconds:.2f} µs, {statistics.median(bandwidth[kind]):.0f} MB/s", flush=True)
    compared = {"what": "two nodes", "against": "one node"}
    rows: list[Measured] = [
        ratio("latency between two nodes, against one node", MOST_LATENCY, latency, **compared),
        ratio("bandwidth between two nodes, against one node", LEAST_BANDWIDTH, bandwidth, **compared, at_least=True),
    ]
    show_and_keep("mpi", rows, machine_facts())
    draw("mpi", [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
