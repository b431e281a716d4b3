"""Compare what a program measures in a sandbox with what it measures on the bare worker, on the same core, by turns.

A kernel bound by the core and one bound by memory, each in a fresh process: bare, in a sandbox, bare again, in an order
drawn anew for each round. The second bare run shows how far two runs of the same thing lie apart here, which is the
machine's own noise.
usage: ./invoke benchmark fidelity, or .venv/bin/python benchmarks/fidelity.py [--rounds N]
"""

import argparse
import base64
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import MACHINE, User, docker, draw, in_userhost, keep, machine_facts, simulated_workers

from cfiddle_cluster.commands import docker_cli

HERE = Path(__file__).resolve().parent
RESAMPLES = 2000
WITHIN = 0.005
SPREAD = 1.1
REST_S = 1.0
"""Between runs: what follows a call (its sandbox is removed, another one made) is over then."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Compared:
    """One kernel's times in nanoseconds, and what they say."""

    kernel: str
    bare: list[float]
    sandbox: list[float]
    again: list[float]
    ratio: float
    interval: Interval
    noise: Interval
    spread: float

    @property
    def is_faithful(self) -> bool:
        """Say whether the sandbox's times are the bare machine's, as far as can be told on it."""
        low, high = self.interval
        return (low >= 1 - WITHIN and high <= 1 + WITHIN) or (self.noise[0] <= low and high <= self.noise[1])


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the 95 % interval of the ratio of two medians: percentile bootstrap, Efron and Tibshirani 1993, ch. 13."""
    chance = random.Random(1)
    ratios = sorted(
        statistics.median(chance.choices(above, k=len(above))) / statistics.median(chance.choices(below, k=len(below)))
        for _ in range(RESAMPLES)
    )
    return ratios[int(0.025 * RESAMPLES)], ratios[int(0.975 * RESAMPLES) - 1]


def spread(samples: Sequence[float]) -> float:
    """Return the interquartile range over the median."""
    first, _, third = statistics.quantiles(samples, n=4)
    return (third - first) / statistics.median(samples)


def compare(kernel: str, bare: list[float], sandbox: list[float], again: list[float]) -> Compared:
    """Return what the times say."""
    ratio = statistics.median(sandbox) / statistics.median(bare)
    spreads = spread(sandbox) / spread(bare + again)
    return Compared(
        kernel, bare, sandbox, again, ratio, ratio_interval(sandbox, bare), ratio_interval(again, bare), spreads
    )


class BareWorker:
    """A process on a worker, outside of any container of the cluster, that runs a kernel when asked."""

    def __init__(self, worker: str, program: bytes) -> None:
        machine = f"{MACHINE}{worker}"
        self._machine, self._file = machine, "/var/tmp/kernel"
        argv = [str(docker_cli()), "exec", "-i", machine, "sh", "-c", f"cat >{self._file}; chmod 755 {self._file}"]
        subprocess.run(argv, input=program, check=True, timeout=30)
        argv = [str(docker_cli()), "exec", "-i", machine, self._file, "serve"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, kernel: str, core: int) -> float:
        """Run a kernel; return its nanoseconds."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{kernel} {core}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End it and take the program away."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)
        docker("exec", self._machine, "rm", "-f", self._file)


def compiled() -> bytes:
    """Return the kernels' program, compiled on the users' node: one file for all places."""
    source = (HERE / "kernel.c").read_text()
    command = "cd $(mktemp -d) && cat >kernel.c && gcc -O2 -static -o kernel kernel.c && base64 -w0 kernel"
    return base64.b64decode(in_userhost("sh", "-c", command, input=source))


def measure(rounds: int) -> list[Compared]:
    """Run all; on the last core of the first worker."""
    worker = simulated_workers()[0]
    program = compiled()
    core = int(docker("exec", f"{MACHINE}{worker}", "nproc")) - 1
    bare, user = BareWorker(worker, program), User()
    found, chance = [], random.Random(1)
    try:
        user("hold_for_kernel", worker, base64.b64encode(program).decode())
        for kernel in ("cpu", "memory"):
            times: dict[str, list[float]] = {"bare": [], "sandbox": [], "again": []}
            for _ in range(rounds):
                for place in chance.sample([*times], k=len(times)):
                    time.sleep(REST_S)
                    run = bare if place != "sandbox" else lambda *asked: float(user("kernel", *asked))
                    times[place].append(run(kernel, core))
            found.append(compare(kernel, **times))
        user("end_lease")
    finally:
        user.close()
        bare.close()
    return found


def main() -> int:
    """Measure, print the table, write the file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="how often each is run (default: %(default)s)")
    options = parser.parse_args()
    facts = machine_facts()
    rows = measure(options.rounds)
    print("kernel  sandbox/bare  95 % interval      bare/bare          spread  reached")
    for row in rows:
        reached = "yes" if row.is_faithful and row.spread <= SPREAD else "no"
        print(
            f"{row.kernel:6}  {row.ratio:12.4f}  {row.interval[0]:.4f} … {row.interval[1]:.4f}  "
            f"{row.noise[0]:.4f} … {row.noise[1]:.4f}  {row.spread:6.2f}  {reached}"
        )
    keep("fidelity", [asdict(row) for row in rows], facts)
    draw("fidelity", [asdict(row) for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
