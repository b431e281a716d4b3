"""What the benchmarks share: commands, a bare Slurm to compare with, and how figures are shown and kept."""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cfiddle_cluster import config
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import CLUSTER, LABEL
from cfiddle_cluster.wait import wait_until

ROOT = Path(__file__).resolve().parent.parent
BARE = ROOT / "benchmarks" / "bare"
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "cfiddle-machine-"
LONG_S = 900.0


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        median: what is judged; of ratios, the ratio of the medians.
        target: the most that it should be; the least, where `at_least`.
        samples: what was measured, by kind where several things were compared.
        compared: which of the kinds, `what` against which, `against`.
    """

    name: str
    unit: str
    target: float
    median: float
    samples: list[float] | dict[str, list[float]] = field(repr=False)
    at_least: bool = False
    compared: dict[str, str] = field(default_factory=dict)

    @property
    def reached(self) -> bool:
        """Say whether the median is within the target."""
        return self.median >= self.target if self.at_least else self.median <= self.target


def docker(*argv: str, timeout_s: float = 60) -> str:
    """Run the client of this machine's engine."""
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


def in_userhost(*argv: str, input: str | None = None) -> str:
    """Run a command as jovyan on the userhost."""
    options = ["-i", "-u", "1000:100", "-e", "HOME=/home/jovyan", "-w", "/home/jovyan"]
    return run([docker_cli(), "exec", *options, container("userhost"), *argv], timeout_s=60, input=input)


Docker = Callable[..., str]


def on_machine(name: str) -> Docker:
    """Return the client of a simulated machine's engine, which runs there."""
    return lambda *argv, timeout_s=60.0: docker("exec", f"{MACHINE}{name}", "docker", *argv, timeout_s=timeout_s)


@contextlib.contextmanager
def bare_pair(engine: Docker, image: str, settings: Path, *options: str) -> Iterator[Callable[..., str]]:
    """Run slurmctld and slurmd of the cluster's own image in two plain containers on a plain network.

    Args:
        engine: where.
        settings: the directory of `bare`, as that engine finds it.
        options: for `docker run` of the two.

    Yields:
        what runs a shell command in the container of slurmctld: as a user who may submit jobs, or as root.
    """
    network = "cfiddle-bare"
    names = ("slurmctld", "slurmd")
    _remove_bare(engine, network, names)
    try:
        engine("network", "create", "--label", LABEL, network)
        for name in names:
            host = f"bare-{name}"
            engine(
                *("run", "-d", "--name", host, "--hostname", host, "--network", network, "--label", LABEL, "--init"),
                *("-v", f"{settings}:/bare:ro", *options, "--entrypoint", "/bare/start", "--no-healthcheck"),
                *(image, name),
            )

        def in_bare(command: str, user: str = "1000:1000") -> str:
            return engine("exec", "-u", user, "-w", "/tmp", "bare-slurmctld", "bash", "-c", command)

        def ready() -> bool:
            with contextlib.suppress(Exception):
                return "idle" in in_bare("sinfo -h -o %T")
            return False

        wait_until(ready, timeout_s=60, what="the bare slurmd is idle")
        yield in_bare
    finally:
        _remove_bare(engine, network, names)


def _remove_bare(engine: Docker, network: str, names: tuple[str, ...]) -> None:
    for argv in [("rm", "-f", f"bare-{name}") for name in names] + [("network", "rm", network)]:
        with contextlib.suppress(Exception):
            engine(*argv)


SRUN_TRUE = 'start=$EPOCHREALTIME; srun true; end=$EPOCHREALTIME; echo "$start $end"'


def timed(said: str) -> float:
    """Return the seconds between the two times that a shell command printed."""
    start, end = map(float, said.split())
    return end - start


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


class User:
    """The program of `user_side.py` as jovyan on the users' node."""

    def __init__(self) -> None:
        options = ["-i", "-u", "1000:100", "-e", "HOME=/home/jovyan", "-e", "USER=jovyan", "-w", "/home/jovyan"]
        text = (ROOT / "benchmarks" / "user_side.py").read_text()
        argv = [str(docker_cli()), "exec", *options, container("userhost"), "python3", "-W", "ignore", "-c", text]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Have a function of it called; return its result."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"error: {name} failed on the users' node; see above")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def ratio(
    name: str, target: float, samples: dict[str, list[float]], *, what: str, against: str, at_least: bool = False
) -> Measured:
    """Return the row for the ratio of two medians."""
    median = statistics.median(samples[what]) / statistics.median(samples[against])
    return Measured(name, "times", target, median, samples, at_least, {"what": what, "against": against})


def simulated_workers() -> list[str]:
    """Return the names of the simulated workers; end where there are none."""
    if not config.load(ROOT).simulated:
        raise SystemExit("error: the benchmarks look into simulated workers; this cluster has real ones (WORKER_ADDRS)")
    found = docker("ps", "--filter", f"name=^{MACHINE}", "--format", "{{.Names}}").split()
    return sorted(name.removeprefix(MACHINE) for name in found)


def show_and_keep(name: str, rows: Sequence[Measured], facts: dict[str, Any]) -> None:
    """Print the table and write it, with all that was measured, to `benchmarks/results/NAME.json`."""
    width = max(len(row.name) for row in rows)
    print(f"\n{'what':{width}}  {'median':>12}  {'reach':>14}")
    for row in rows:
        note = "" if row.reached else "  not reached"
        sign = "≥" if row.at_least else "≤"
        print(f"{row.name:{width}}  {row.median:>6.3g} {row.unit:5}  {sign} {row.target:>6.3g} {row.unit:5}{note}")
    keep(name, [asdict(row) for row in rows], facts)


def keep(name: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write all that was measured to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    content = {"cluster": CLUSTER, "machine": facts, "measured": rows}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {file.relative_to(ROOT)}")


def draw(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw what was measured, with matplotlib on the users' node, to `benchmarks/results/NAME.svg`."""
    program = (ROOT / "benchmarks" / "picture.py").read_text()
    file = RESULTS / f"{name}.svg"
    file.write_text(in_userhost("env", "MPLCONFIGDIR=/tmp", "python3", "-c", program, name, input=json.dumps(rows)))
    print(f"drawn to {file.relative_to(ROOT)}")


class Rounds(Protocol):
    """What the rows of a benchmark measure with."""

    def close(self) -> None:
        """Leave everything as it was."""


Bench = TypeVar("Bench", bound=Rounds)


def measure(
    name: str,
    description: str,
    rows_of: Mapping[str, Callable[[Bench], Iterator[Measured]]],
    make: Callable[[int], Bench],
) -> int:
    """Be the command of a benchmark: measure, print the table, write the file and the picture; return 0.

    Args:
        rows_of: what measures the rows, by the names that `--only` takes.
        make: returns what they measure with, for so many rounds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=10, help="how often each is measured (default: %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], choices=[*rows_of], metavar="NAME", help=" ".join(rows_of))
    options = parser.parse_args()
    facts = machine_facts()
    rows: list[Measured] = []
    with contextlib.closing(make(options.rounds)) as bench:
        for of, function in rows_of.items():
            if not options.only or of in options.only:
                print(f"{of} …", flush=True)
                for row in function(bench):
                    rows.append(row)
                    print(f"  {row.name}: {row.median:.3g} {row.unit}", flush=True)
    show_and_keep(name, rows, facts)
    draw(name, [asdict(row) for row in rows])
    return 0
