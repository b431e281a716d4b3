"""Measure how long calls take, each against what it is compared with, by turns within one run.

usage: ./invoke benchmark latency, or .venv/bin/python benchmarks/latency.py [--rounds N] [--only NAME…]
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common import (
    BARE,
    MACHINE,
    SRUN_TRUE,
    Docker,
    Measured,
    User,
    bare_pair,
    docker,
    measure,
    on_machine,
    ratio,
    simulated_workers,
    timed,
)

from cfiddle_cluster.commands import docker_cli
from cfiddle_cluster.wait import wait_until

HERE = Path(__file__).resolve().parent
PAUSE_S = 1.5
"""Between calls that shall find a full pool; one sandbox takes about half of it to make."""
MEGABYTES = 100
CALLS = 100
MADE = 8

Samples = dict[str, list[float]]


class Bench:
    """The cluster, a bare Slurm on the engine of one of its workers, and a user."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.workers = simulated_workers()
        self.worker = self.workers[0]
        self.engine = on_machine(self.worker)
        self.user = User()

    def close(self) -> None:
        """End the user's program."""
        self.user.close()

    def by_turns(self, *, pause_s: float = PAUSE_S, **measured: Callable[[], float]) -> Samples:
        """Measure several things by turns; the first round, which loads what the others find in memory, is left out."""
        samples: Samples = {name: [] for name in measured}
        for number in range(self.rounds + 1):
            for name, take in measured.items():
                time.sleep(pause_s)
                seconds = take()
                if number:
                    samples[name].append(seconds)
        for name, seconds in samples.items():
            print(f"  {name}: {statistics.median(seconds) * 1000:.1f} ms", flush=True)
        return samples

    def sandbox_image(self) -> str:
        """Return the image of sandboxes, as the worker's engine knows it."""
        agent = self.agent(self.worker)
        found = self.engine("inspect", "--format", "{{json .Config.Env}}", agent)
        return dict(entry.split("=", 1) for entry in json.loads(found))["SANDBOX_IMAGE"]

    def agent(self, worker: str) -> str:
        """Return the id of a worker's agent's container."""
        return _service(on_machine(worker), "agent")

    def docker_run(self, *command: str) -> float:
        """Return the seconds of `docker run` on the worker, started there."""
        script = f"start=$EPOCHREALTIME; {_run_sandbox_image(self.sandbox_image(), *command)} end=$EPOCHREALTIME; "
        return timed(docker("exec", f"{MACHINE}{self.worker}", "bash", "-c", script + 'echo "$start $end"'))

    def drain_pool(self) -> None:
        """Leave no sandbox on the workers that waits for a call, and no work with those that did."""
        killed = {worker: self._sandboxes(worker) for worker in self.workers}
        for worker, sandboxes in killed.items():
            for sandbox in sandboxes:
                with contextlib.suppress(Exception):  # it may have been on its way out
                    on_machine(worker)("kill", sandbox)
        wait_until(
            lambda: not any(sandboxes & self._sandboxes(worker, "-a") for worker, sandboxes in killed.items()),
            timeout_s=20,
            what="the agents have removed them",
        )

    def _sandboxes(self, worker: str, *options: str) -> set[str]:
        return set(on_machine(worker)("ps", "-q", "--filter", "label=cfiddle.sandbox", *options).split())


def _run_sandbox_image(image: str, *command: str) -> str:
    program, *arguments = command
    return f"docker run --rm --network none --entrypoint {program} {image} {' '.join(arguments)} >/dev/null;"


def _service(engine: Docker, name: str) -> str:
    return engine("ps", "-q", "--filter", f"label=com.docker.swarm.service.name=slurm-stack_{name}").split()[0]


def against_srun(bench: Bench) -> Iterator[Measured]:
    """An empty call, warm and cold, against a bare Slurm's srun."""
    worker = f"{MACHINE}{bench.worker}"
    settings = "/var/tmp/bare"
    docker("exec", worker, "rm", "-rf", settings)
    docker("cp", str(BARE), f"{worker}:{settings}")
    cli = docker("exec", worker, "sh", "-c", "command -v docker").strip()
    options = ("-v", "/var/run/docker.sock:/var/run/docker.sock", "-v", f"{cli}:/usr/bin/docker:ro")
    slurmd = _service(bench.engine, "slurmd")
    image = bench.engine("inspect", "--format", "{{.Image}}", slurmd).strip()
    with bare_pair(bench.engine, image, Path(settings), *options) as in_bare:
        warm = bench.by_turns(
            srun=lambda: timed(in_bare(SRUN_TRUE)),
            call=lambda: float(bench.user("empty")),
            without_sandbox=lambda: float(bench.user("without_sandbox")),
            own_srun=lambda: float(bench.user("srun", "true")),
            srun_python=lambda: float(bench.user("srun", "python3", "-I", "-S", "-c", "pass")),
        )
        name = "an empty call, warm, against bare `srun true`"
        yield ratio(name, 1.7, warm, what="call", against="srun")
        run = _run_sandbox_image(bench.sandbox_image(), "/bin/true").rstrip(";").replace(">/dev/null", "")
        script = f"start=$EPOCHREALTIME; srun {run} >/dev/null; end=$EPOCHREALTIME; " + 'echo "$start $end"'

        def cold() -> float:
            bench.drain_pool()
            return float(bench.user("empty"))

        times = bench.by_turns(srun_docker_run=lambda: timed(in_bare(script, "0:0")), call=cold)
        name = "the same, cold, against bare `srun docker run true`"
        yield ratio(name, 1.3, times, what="call", against="srun_docker_run")
    docker("exec", worker, "rm", "-rf", settings)


def in_a_lease(bench: Bench) -> Iterator[Measured]:
    """An empty call within a lease, against `docker run`."""
    times = bench.by_turns(docker_run=lambda: bench.docker_run("/bin/true"), call=lambda: float(bench.user("in_lease")))
    name = "within a lease, against `docker run true`"
    yield ratio(name, 0.1, times, what="call", against="docker_run")
    back_to_back = [float(bench.user("in_lease")) for _ in range(bench.rounds * 2)]
    bench.user("end_lease")
    name = "within a lease, back to back (no reach: bound by making sandboxes)"
    yield Measured(name, "s", float("inf"), statistics.median(back_to_back), back_to_back)


def cfiddle_run(bench: Bench) -> Iterator[Measured]:
    """A run of CFiddle's on the cluster, against the same in a process on the users' node."""
    times = bench.by_turns(
        local=lambda: float(bench.user("local_run")), cluster=lambda: float(bench.user("cluster_run"))
    )
    name = "`cfiddle.run` on the cluster, warm, against locally"
    yield ratio(name, 0.35, times, what="cluster", against="local")


def sustained_rate(bench: Bench) -> Iterator[Measured]:
    """Many calls through the executor, against what the engines make and destroy."""
    calls, engines = [], []
    for _ in range(2):
        seconds, failed = bench.user("calls_through_executor", CALLS)
        if failed:
            raise SystemExit(f"error: {failed} of {CALLS} calls failed")
        calls.append(CALLS / seconds)
        time.sleep(10)  # the pools are full again
        engines.append(_engines_rate(bench))
        time.sleep(5)
    samples = {"calls per second": calls, "sandboxes per second": engines}
    print(f"  {samples}", flush=True)
    name = f"{CALLS} calls through the executor: rate against the engines'"
    yield ratio(name, 0.8, samples, what="calls per second", against="sandboxes per second", at_least=True)


def _engines_rate(bench: Bench) -> float:
    count = 24
    text = (HERE / "agent_side.py").read_text()
    running = []
    for worker in bench.workers:
        inner = ["docker", "exec", bench.agent(worker), "python3", "-c", text, str(count), "connected"]
        argv = ["exec", f"{MACHINE}{worker}", *inner]
        running.append(subprocess.Popen([str(docker_cli()), *argv], stdout=subprocess.PIPE, text=True))
    seconds = [float(process.communicate(timeout=300)[0]) for process in running]
    return count * len(running) / max(seconds)


def cost_of_one(bench: Bench) -> Iterator[Measured]:
    """CPU time to make a sandbox ready, against a container that imports cfiddle."""
    text = (HERE / "agent_side.py").read_text()
    agent = bench.agent(bench.worker)
    samples: Samples = {"sandbox": [], "docker run": []}
    for _ in range(bench.rounds):
        before = _cpu_seconds(bench.worker)
        bench.engine("exec", agent, "python3", "-c", text, str(MADE), "ready", timeout_s=120)
        samples["sandbox"].append((_cpu_seconds(bench.worker) - before) / MADE)
        before = _cpu_seconds(bench.worker)
        for _ in range(MADE):
            bench.docker_run("python3", "-I", "-W", "ignore", "-c", "'import cfiddle'")
        samples["docker run"].append((_cpu_seconds(bench.worker) - before) / MADE)
    print(f"  { ({name: statistics.median(found) for name, found in samples.items()}) } CPU seconds", flush=True)
    name = "CPU time of a sandbox with cfiddle, against `docker run python3 -c 'import cfiddle'`"
    yield ratio(name, 1.1, samples, what="sandbox", against="docker run")


def _cpu_seconds(worker: str) -> float:
    """Return the CPU time that a simulated machine has used so far, by its control group (versions 1 and 2)."""
    found = docker("inspect", "--format", "{{.Id}}", f"{MACHINE}{worker}").strip()
    for path in (f"cpuacct/docker/{found}/cpuacct.usage", f"docker/{found}/cpu.stat"):
        with contextlib.suppress(OSError):
            words = Path("/sys/fs/cgroup", path).read_text().split()
            return int(words[0]) / 1e9 if len(words) == 1 else int(words[1]) / 1e6
    scope = Path(f"/sys/fs/cgroup/system.slice/docker-{found}.scope/cpu.stat").read_text().split()
    return int(scope[1]) / 1e6


def from_job_to_job(bench: Bench) -> Iterator[Measured]:
    """From one call's end to the beginning of the next job's, on one node."""
    samples = []
    for _ in range(bench.rounds + 1):
        time.sleep(PAUSE_S * 2)
        samples.append(float(bench.user("gap", bench.worker)))
    yield Measured("from a job's end to the next one's call on the node", "s", 0.2, statistics.median(samples), samples)


def bulk(bench: Bench) -> Iterator[Measured]:
    """A call with much data in and out, against `cat` under the same srun."""
    size = MEGABYTES * 10**6
    times = bench.by_turns(
        cat=lambda: float(bench.user("bulk_cat", size)), call=lambda: float(bench.user("bulk", size))
    )
    yield ratio(f"{MEGABYTES} MB in and out, against `srun cat`", 1.5, times, what="call", against="cat")


ROWS: dict[str, Callable[[Bench], Iterator[Measured]]] = {
    "srun": against_srun,
    "lease": in_a_lease,
    "cfiddle": cfiddle_run,
    "gap": from_job_to_job,
    "bulk": bulk,
    "cost": cost_of_one,
    "rate": sustained_rate,
}


if __name__ == "__main__":
    sys.exit(measure("latency", __doc__.splitlines()[0], ROWS, Bench))
