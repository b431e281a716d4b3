"""Measure how long it takes to bring the cluster up, change it and take it down.

It does that a few times; state, users, homes and images stay, running jobs do not.
usage: ./invoke benchmark cluster, or .venv/bin/python benchmarks/cluster.py [--rounds N] [--only NAME…]
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path

from common import (
    BARE,
    ROOT,
    SRUN_TRUE,
    Measured,
    bare_pair,
    docker,
    in_userhost,
    invoke,
    machine_facts,
    show_and_keep,
    simulated_workers,
    timed,
)

from cfiddle_cluster import config, images
from cfiddle_cluster.config import LABEL, Config


def up_with_new_workers(rounds: int, workers: int) -> list[float]:
    """Time `up` with images built and simulated workers that have never been: no image, no swarm, no job."""
    samples = []
    for _ in range(rounds):
        invoke("down")
        for container_id in docker("ps", "-aq", "--filter", "label=cfiddle.machine").split():
            docker("rm", "-f", "-v", container_id)
        for volume in docker("volume", "ls", "-q", "--filter", "label=cfiddle.machine").split():
            docker("volume", "rm", volume)
        samples.append(invoke("up"))
    return samples


def up_after_down(rounds: int, workers: int) -> dict[str, list[float]]:
    """Time `down`, and `up` after it."""
    downs, ups = [], []
    for _ in range(rounds):
        downs.append(invoke("down"))
        ups.append(invoke("up"))
    return {"down": downs, "up": ups}


def up_again(rounds: int, workers: int) -> list[float]:
    """Time `up` with nothing to do."""
    return [invoke("up") for _ in range(rounds)]


def one_more_worker(rounds: int, workers: int) -> list[float]:
    """Time one more simulated worker, until a job ran on it."""
    samples = []
    for _ in range(rounds):
        before = _nodes()
        start = time.monotonic()
        invoke("scale", str(workers + 1))
        (new,) = _nodes() - before
        in_userhost("srun", "-w", new, "true")
        samples.append(time.monotonic() - start)
        invoke("scale", str(workers))
    return samples


def _nodes() -> set[str]:
    return set(in_userhost("sinfo", "-h", "-N", "-p", "normal", "-o", "%N").split())


def srun_against_bare(cluster_config: Config, rounds: int) -> dict[str, list[float]]:
    """Time `srun true` on the cluster and on two bare containers by turns, as a user, within the caller's container."""
    times: dict[str, list[float]] = {"cluster": [], "bare": [], "ratio": []}
    with bare_pair(docker, images.built(cluster_config)["cluster"], BARE) as in_bare:
        for number in range(rounds * 10 + 3):
            bare = timed(in_bare(SRUN_TRUE))
            ours = timed(in_userhost("bash", "-c", SRUN_TRUE))
            if number >= 3:  # the first ones load what the later ones find in memory
                times["bare"].append(bare)
                times["cluster"].append(ours)
                times["ratio"].append(ours / bare)
            time.sleep(0.3)  # the epilog of the last job is over then, on both
    return times


def memory_mb(rounds: int, workers: int) -> list[float]:
    """Return the memory of all processes of the idle cluster: what is theirs alone and shared, without the page cache.

    Every process beneath a container of the cluster is counted with its proportional share of anonymous and shared
    memory (proc_pid_smaps(5), Pss_Anon and Pss_Shmem); a simulated machine's engine and all that runs in it belong to
    it, this machine's own engine does not.
    """
    samples = []
    for _ in range(rounds):
        kilobytes = 0
        for pid in _processes_of_the_cluster():
            with contextlib.suppress(OSError):
                for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
                    if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                        kilobytes += int(line.split()[1])
        samples.append(kilobytes / 1024)
        time.sleep(2)
    return samples


def _processes_of_the_cluster() -> set[int]:
    containers = docker("ps", "-q", "--no-trunc", "--filter", f"label={LABEL}").split()
    tops = {int(pid) for pid in docker("inspect", "--format", "{{.State.Pid}}", *containers).split()}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = set(), list(tops)
    while queue:
        pid = queue.pop()
        if pid not in found:
            found.add(pid)
            queue += children.get(pid, [])
    return found


def measure(rounds: int, only: list[str]) -> list[Measured]:
    """Measure every row, or those named."""
    cluster_config = config.load(ROOT)
    rows: list[Measured] = []

    def add(name: str, unit: str, target: float, samples: list[float]) -> None:
        row = Measured(name, unit, target, statistics.median(samples), samples)
        rows.append(row)
        print(f"{name}: {row.median:.3g} {unit}", flush=True)

    def wanted(name: str) -> bool:
        return not only or name in only

    invoke("up")
    workers = len(_nodes())
    if wanted("memory"):
        add("memory of the idle cluster", "MB", 2500, memory_mb(rounds, workers))
    if wanted("srun"):
        times = srun_against_bare(cluster_config, rounds)
        for kind in ("cluster", "bare"):
            print(f"  srun true, {kind}: {statistics.median(times[kind]) * 1000:.0f} ms", flush=True)
        ratio = statistics.median(times["cluster"]) / statistics.median(times["bare"])
        rows.append(Measured("`srun true` against a bare pair", "times", 1.4, ratio, times["ratio"]))
        rows.append(
            Measured(
                "`srun true` as a user",
                "s",
                1.4 * statistics.median(times["bare"]),
                statistics.median(times["cluster"]),
                times["cluster"],
            )
        )
    if wanted("again"):
        add("`up` again with nothing to do", "s", 8, up_again(rounds, workers))
    if wanted("worker"):
        add("one more simulated worker until a job ran on it", "s", 20, one_more_worker(rounds, workers))
    if wanted("down"):
        both = up_after_down(rounds, workers)
        add("`down`", "s", 20, both["down"])
        add("`up` after `down`, until jobs ran", "s", 45, both["up"])
    if wanted("new"):
        name = f"`up` with images built and {workers} new simulated workers, until jobs ran"
        add(name, "s", 90, up_with_new_workers(rounds, workers))
    return rows


def main() -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="memory srun again worker down new")
    options = parser.parse_args()
    simulated_workers()
    facts = machine_facts()
    try:
        rows = measure(options.rounds, options.only)
    finally:
        invoke("up")
    show_and_keep("cluster", rows, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
