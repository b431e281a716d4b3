"""Measure the commands of the container manager, each against what it is compared with, by turns within one run.

usage: ./invoke benchmark containers, or .venv/bin/python benchmarks/containers.py [--rounds N] [--only NAME…]
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

from common import (
    MACHINE,
    Docker,
    Measured,
    docker,
    in_userhost,
    measure,
    on_machine,
    ratio,
    simulated_workers,
    timed,
)

MANY = 8
EACH = 20
QUEUED = 1000
PAUSE_S = 1.0


class Bench:
    """The cluster, and jovyan on its users' node."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.worker = simulated_workers()[0]

    def seconds(self, command: str) -> float:
        """Return how long a shell command takes on the users' node."""
        script = f'start=$EPOCHREALTIME; {command} >/tmp/benchmark-output 2>&1; end=$EPOCHREALTIME; echo "$start $end"'
        return timed(in_userhost("bash", "-ec", script))

    def docker_run(self) -> float:
        """Return how long `docker run … true` takes on a worker, with the image of the users' containers."""
        image = _task_image(on_machine(self.worker))
        script = f'start=$EPOCHREALTIME; docker run --name bench {image} true; end=$EPOCHREALTIME; echo "$start $end"'
        try:
            return timed(docker("exec", f"{MACHINE}{self.worker}", "bash", "-ec", script))
        finally:
            docker("exec", f"{MACHINE}{self.worker}", "docker", "rm", "-f", "bench")

    def by_turns(self, **measured: Callable[[], float]) -> dict[str, list[float]]:
        """Measure several things by turns, from a clean slate; the first round is left out."""
        samples: dict[str, list[float]] = {name: [] for name in measured}
        for number in range(self.rounds + 1):
            for name, take in measured.items():
                self.clear()
                time.sleep(PAUSE_S)
                seconds = take()
                if number:
                    samples[name].append(seconds)
        self.clear()
        for name, found in samples.items():
            print(f"  {name}: {statistics.median(found) * 1000:.1f} ms", flush=True)
        return samples

    def clear(self) -> None:
        """Leave jovyan no container."""
        in_userhost("sh", "-c", "cm stop >/dev/null && cm delete >/dev/null")

    close = clear


def _task_image(engine: Docker) -> str:
    return engine("image", "ls", "--quiet", "--filter", "reference=cfiddle-task").split()[0]


def run_in_a_new_one(bench: Bench) -> Iterator[Measured]:
    """A command in a new container, against `docker run` on the worker."""
    times = bench.by_turns(docker_run=bench.docker_run, cm_run=lambda: bench.seconds("cm run --cmd true"))
    yield ratio(
        "`cm run --cmd true`, against `docker run … true` on the worker",
        1.8,
        times,
        what="cm_run",
        against="docker_run",
    )


def create_many(bench: Bench) -> Iterator[Measured]:
    """Eight containers, against one."""
    times = bench.by_turns(one=lambda: bench.seconds("cm create 1"), many=lambda: bench.seconds(f"cm create {MANY}"))
    yield ratio(f"`cm create {MANY}`, against `cm create 1`", 3, times, what="many", against="one")


def task2(bench: Bench) -> Iterator[Measured]:
    """The task of four containers, against one command in one."""
    times = bench.by_turns(
        run=lambda: bench.seconds("cm run --cmd true"),
        task2=lambda: bench.seconds("cm task2"),
    )
    yield ratio("`cm task2`, against `cm run --cmd true`", 2.5, times, what="task2", against="run")


def containers_everywhere(bench: Bench) -> Iterator[Measured]:
    """`ddocker ps -a` with many containers on each of the machines that there are: once with two, once with eight."""
    machines = len(simulated_workers())
    bench.clear()
    try:
        for _ in range(machines):
            in_userhost("cm", "create", str(EACH))
        samples = [bench.seconds("ddocker ps -a") for _ in range(bench.rounds)]
        shown = len(in_userhost("ddocker", "ps", "-a").splitlines()) - 1
        if shown != EACH * machines:
            raise RuntimeError(f"{shown} containers are shown, not {EACH * machines}")
    finally:
        bench.clear()
    name = f"`ddocker ps -a` on {machines} machines with {EACH} containers each"
    yield Measured(name, "s", 0.5, statistics.median(samples), samples)


def info_of_many_jobs(bench: Bench) -> Iterator[Measured]:
    """`cminfo` while many jobs wait."""
    name = "cminfo-benchmark"
    try:
        for _ in range(QUEUED // 100):  # each takes a while
            submit = f"sbatch --hold --output=/dev/null --job-name={name} --wrap=true >/dev/null"
            in_userhost("bash", "-ec", f"for number in {{1..100}}; do {submit}; done")
        samples = [bench.seconds("cminfo") for _ in range(bench.rounds)]
    finally:
        in_userhost("scancel", "--me", f"--name={name}")
    yield Measured(f"`cminfo` with {QUEUED} jobs that wait", "s", 0.5, statistics.median(samples), samples)


def start_of_a_command(bench: Bench) -> Iterator[Measured]:
    """What a command takes before it does anything."""
    for command in ("cm", "cminfo", "ddocker"):
        samples = [bench.seconds(f"{command} --help") for _ in range(bench.rounds * 2)]
        yield Measured(f"`{command} --help`", "s", 0.15, statistics.median(samples), samples)


ROWS: dict[str, Callable[[Bench], Iterator[Measured]]] = {
    "run": run_in_a_new_one,
    "create": create_many,
    "task2": task2,
    "ps": containers_everywhere,
    "cminfo": info_of_many_jobs,
    "help": start_of_a_command,
}


if __name__ == "__main__":
    sys.exit(measure("containers", __doc__.splitlines()[0], ROWS, Bench))
