"""Measure each pair of processes, and compute pi with all of them; print one line of JSON.

usage: srun --mpi=pmix --ntasks-per-node=1 … python3 mpi_pairs.py     (./invoke test-mpi does so)

All others wait while a pair measures. A latency is half of a round trip of eight bytes, the least of many: what else
ran meanwhile is not in it. A bandwidth is that of the best of some round trips of a megabyte.
"""

import json
import math
import time

import numpy as np
from mpi4py import MPI

SMALL, LARGE = 8, 1 << 20
ROUNDS, TRIPS = {SMALL: 200, LARGE: 10}, {SMALL: 10, LARGE: 1}
INTERVALS = 20_000_000


def half_trip_s(world: MPI.Comm, one: int, other: int, size: int) -> float:
    """Return the seconds of a message from one process to the other; both must call it."""
    data, best = np.zeros(size, dtype="b"), math.inf
    for _ in range(ROUNDS[size]):
        start = time.perf_counter()
        for _ in range(TRIPS[size]):
            if world.rank == one:
                world.Send(data, other)
                world.Recv(data, other)
            else:
                world.Recv(data, one)
                world.Send(data, one)
        best = min(best, (time.perf_counter() - start) / TRIPS[size] / 2)
    return best


def computed_pi(world: MPI.Comm) -> float:
    """Return pi, as the integral of 4 / (1 + x²) from 0 to 1, of which each process adds up its share."""
    middles = (np.arange(world.rank, INTERVALS, world.size) + 0.5) / INTERVALS
    return float(world.allreduce(float(np.sum(4 / (1 + middles**2)))) / INTERVALS)


def main() -> None:
    """Measure, and let the first process tell."""
    world = MPI.COMM_WORLD
    nodes = world.gather(MPI.Get_processor_name())
    pairs = []
    for one in range(world.size):
        for other in range(one + 1, world.size):
            seconds = {}
            if world.rank in (one, other):
                seconds = {size: half_trip_s(world, one, other, size) for size in (SMALL, LARGE)}
            # Nobody waits in a busy loop beside the pair.
            waiting = world.Ibarrier()
            while not waiting.Test():
                time.sleep(0.001)
            said = world.bcast(seconds, one)
            pairs.append((one, other, said[SMALL] * 1e6, LARGE / said[LARGE] / 1e6))
    pi = computed_pi(world)
    if world.rank == 0:
        print(json.dumps({"nodes": nodes, "pairs": pairs, "pi": pi}))


if __name__ == "__main__":
    main()
