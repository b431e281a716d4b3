"""Measure how long things take, print medians beside what they should reach, and write benchmarks/results.json.

It takes the cluster down and up again a few times; state, users, homes and images stay, running jobs do not.
usage: ./invoke benchmark, or .venv/bin/python benchmarks/run.py [--rounds N] [--only NAME…]
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cfiddle_cluster import config, images
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import CLUSTER, LABEL, Config
from cfiddle_cluster.wait import wait_until

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.json"
BARE = ROOT / "benchmarks" / "bare"
LONG_S = 900.0


@dataclass(frozen=True)
class Measured:
    """One row of the table."""

    name: str
    unit: str
    target: float
    median: float
    samples: list[float]

    @property
    def reached(self) -> bool:
        """Say whether the median is within the target."""
        return self.median <= self.target


def docker(*argv: str, timeout_s: float = 60) -> str:
    """Run the engine's client."""
    return run([docker_cli(), *argv], timeout_s=timeout_s)


def invoke(*argv: str) -> float:
    """Run a task; return how many seconds it took."""
    start = time.monotonic()
    run([ROOT / "invoke", *argv], timeout_s=LONG_S, cwd=ROOT)
    seconds = time.monotonic() - start
    print(f"  ./invoke {' '.join(argv)}: {seconds:.1f} s", flush=True)
    return seconds


def container(service: str) -> str:
    """Return the id of a service's container on the head."""
    return docker("ps", "-q", "--filter", f"label=com.docker.swarm.service.name=slurm-stack_{service}").split()[0]


def in_userhost(*argv: str) -> str:
    """Run a command as jovyan on the userhost."""
    return docker(
        "exec", "-u", "1000:100", "-e", "HOME=/home/jovyan", "-w", "/home/jovyan", container("userhost"), *argv
    )


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


SRUN_TRUE = 'start=$EPOCHREALTIME; srun true; end=$EPOCHREALTIME; echo "$start $end"'


def _srun_true(run_it: Callable[[str], str]) -> float:
    start, end = map(float, run_it(SRUN_TRUE).split())
    return end - start


def srun_against_bare(cluster_config: Config, rounds: int) -> dict[str, list[float]]:
    """Time `srun true` on the cluster and on two bare containers by turns, as a user, within the caller's container."""
    times: dict[str, list[float]] = {"cluster": [], "bare": [], "ratio": []}
    with bare_pair(cluster_config) as in_bare:
        for number in range(rounds * 10 + 3):
            bare = _srun_true(in_bare)
            ours = _srun_true(lambda command: in_userhost("bash", "-c", command))
            if number >= 3:  # the first ones load what the later ones find in memory
                times["bare"].append(bare)
                times["cluster"].append(ours)
                times["ratio"].append(ours / bare)
            time.sleep(0.3)  # the epilog of the last job is over then, on both
    return times


@contextlib.contextmanager
def bare_pair(cluster_config: Config) -> Iterator[Callable[[str], str]]:
    """Run slurmctld and slurmd of the cluster's own image in two plain containers on a plain network."""
    image = images.built(cluster_config)["cluster"]
    network = "cfiddle-bare"
    names = ("slurmctld", "slurmd")
    _remove_bare(network, names)
    try:
        docker("network", "create", "--label", LABEL, network)
        for name in names:
            host = f"bare-{name}"
            docker(
                *("run", "-d", "--name", host, "--hostname", host, "--network", network, "--label", LABEL, "--init"),
                *("-v", f"{BARE}:/bare:ro", "--entrypoint", "/bare/start", "--no-healthcheck", image, name),
            )

        def in_bare(command: str) -> str:
            return docker("exec", "-u", "1000:1000", "-w", "/tmp", "bare-slurmctld", "bash", "-c", command)

        def ready() -> bool:
            with contextlib.suppress(Exception):
                return "idle" in in_bare("sinfo -h -o %T")
            return False

        wait_until(ready, timeout_s=60, what="the bare slurmd is idle")
        yield in_bare
    finally:
        _remove_bare(network, names)


def _remove_bare(network: str, names: tuple[str, ...]) -> None:
    for argv in [("rm", "-f", f"bare-{name}") for name in names] + [("network", "rm", network)]:
        with contextlib.suppress(Exception):
            docker(*argv)


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


def machine_facts() -> dict[str, Any]:
    """Return what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    meminfo = Path("/proc/meminfo").read_text().split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "processor": next(
            (line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), platform.machine()
        ),
        "cpus": os.cpu_count(),
        "memory_gb": round(int(meminfo[1]) / 1024**2, 1),
        "kernel": platform.release(),
        "engine": docker("version", "--format", "{{.Server.Version}}").strip(),
        "load_before": os.getloadavg()[0],
    }


def measure(rounds: int, only: list[str]) -> list[Measured]:
    """Measure every row, or those named."""
    cluster_config = config.load(ROOT)
    if not cluster_config.simulated:
        sys.exit("error: the benchmarks make and remove simulated workers; this cluster has real ones (WORKER_ADDRS)")
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
    facts = machine_facts()
    try:
        rows = measure(options.rounds, options.only)
    finally:
        invoke("up")
    width = max(len(row.name) for row in rows)
    print(f"\n{'what':{width}}  {'median':>12}  {'reach':>12}")
    for row in rows:
        note = "" if row.reached else "  not reached"
        print(f"{row.name:{width}}  {row.median:>6.3g} {row.unit:5}  {row.target:>6.3g} {row.unit:5}{note}")
    RESULTS.write_text(
        json.dumps({"cluster": CLUSTER, "machine": facts, "measured": [asdict(row) for row in rows]}, indent=2) + "\n"
    )
    print(f"\nwritten to {RESULTS.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
