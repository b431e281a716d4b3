"""The live cluster, as tests see it: commands as a user, looks into containers and machines, waits with a deadline."""

import functools
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cfiddle_cluster import config, machines, swarm
from cfiddle_cluster.commands import docker_cli
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import PATIENCE

NOBODY = "172.31.240.99"
"""An address of the simulated machines' network that none of them has."""

ROOT = Path(__file__).resolve().parent.parent
CHECKOUT = (
    *("tasks.py", "invoke", "config.sh", "docker-compose.yml", "policy.yaml", "install_docker.sh", "pyproject.toml"),
    *("test_slurm.sh", "test_cfiddle.py", "distribute_images.sh", "start_cluster.sh"),
    *("src", "conf", "images", "requirements", "notebooks"),
)
"""What a second checkout needs, to drive the cluster and to build its images."""
SERVICES = ("mysql", "slurmdbd", "slurmctld", "slurmd", "agent", "user-registry", "userhost")
MACHINE = "cfiddle-machine-"
SANDBOX_LABEL = "cfiddle.sandbox"
CONTAINER_LABEL = "cfiddle.container"

Found = TypeVar("Found")


def wait_until(predicate: Callable[[], Found], *, timeout_s: float, what: str, interval_s: float = 0.2) -> Found:
    """Return the predicate's first true value; raise AssertionError with what was seen last after `timeout_s`."""
    deadline = time.monotonic() + timeout_s * PATIENCE
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s * PATIENCE:.0f} s; seen last: {value!r}")
        time.sleep(interval_s)


class CommandFailed(Exception):
    """A command that must succeed cannot be run or did not: no assertion, for it is not what a test is about."""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    exit_status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def output(self) -> str:
        """Return both streams, for messages that may come on either."""
        return self.stdout + self.stderr

    def ok(self) -> str:
        """Return the standard output of a command that must have succeeded; raise CommandFailed if it did not."""
        if self.exit_status:
            raise CommandFailed(f"{self.argv[-1]!r} ended with {self.exit_status}:\n{self.output[-3000:]}")
        return self.stdout


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float = 60,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Result:
    """Run a command and return how it ended, whatever that is."""
    command = tuple(map(str, argv))
    start = time.monotonic()
    done = subprocess.run(
        command,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        check=False,
        text=True,
        errors="replace",
        timeout=timeout_s * PATIENCE,
        env=None if env is None else {**os.environ, **env},
        cwd=cwd,
    )
    return Result(command, done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def docker(*argv: str, timeout_s: float = 60, input: str | None = None) -> Result:
    """Run the engine's client on the head."""
    return run([docker_cli(), *argv], timeout_s=timeout_s, input=input)


def copy_of_checkout(root: Path) -> Path:
    """Make a second checkout there, to be changed by a test; return it."""
    root.mkdir()
    for name in CHECKOUT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, symlinks=True)
        else:
            shutil.copy2(ROOT / name, root / name)
    return root


def task_of(root: Path, *arguments: str) -> list[str | Path]:
    """Return the command that runs a task of a checkout."""
    if root == ROOT:
        return [ROOT / "invoke", *arguments]
    # In this checkout's environment: the launcher would make another one for the copy each time.
    return [sys.executable, "-m", "invoke", "--search-root", root, *arguments]


class Invocation:
    """`./invoke …` as a process whose lines are read while it runs."""

    def __init__(self, *arguments: str, root: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
        self.arguments = arguments
        self.lines: list[str] = []
        self.ended_at = 0.0
        self._arrived: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            task_of(root, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=root,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            self._arrived.put(line)
        self._arrived.put(None)

    def wait_for_line(self, wanted: Callable[[str], object], *, timeout_s: float) -> str | None:
        """Return the first line that is wanted, from where the last call stopped; None if it ended before."""
        deadline = time.monotonic() + timeout_s * PATIENCE
        while True:
            try:
                line = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no such line in {timeout_s * PATIENCE:.0f} s: {self}") from None
            if line is None:
                return None
            if wanted(line):
                return line.strip()

    def interrupt(self, number: signal.Signals) -> None:
        """Send SIGINT to the whole group, as a terminal does, or another signal to the process alone."""
        if self.process.poll() is not None:
            return
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def wait(self, *, timeout_s: float) -> Result:
        """Wait for its end; kill it after `timeout_s`."""
        start = time.monotonic()
        try:
            status = self.process.wait(timeout_s * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"{self} did not end within {timeout_s * PATIENCE:.0f} s") from None
        text = "\n".join(self.lines)
        return Result(tuple(self.arguments), status, text, "", time.monotonic() - start)

    def __str__(self) -> str:
        return f"./invoke {' '.join(self.arguments)}\n" + "\n".join(self.lines[-30:])


def invoke(*arguments: str, timeout_s: float = 120, env: Mapping[str, str] | None = None) -> Result:
    """Run a task to its end."""
    return run([ROOT / "invoke", *arguments], timeout_s=timeout_s, env=env)


class Background:
    """A command that runs as a user in the userhost container."""

    def __init__(self, cluster: "LiveCluster", user: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._cluster = cluster
        self._user = user
        # The shell says its process id and then becomes the command, so that signals reach the command itself.
        wrapped = ["bash", "-c", 'echo "$$"; exec "$@"', "bash", *command]
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            cluster.exec_as_user(user, wrapped, env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.process.stdout
        self.pid = int(self.process.stdout.readline())
        self.arrivals: list[tuple[float, str]] = []
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._lock:
                self.arrivals.append((time.monotonic(), line.rstrip("\n")))
                self._lock.notify_all()

    @property
    def output(self) -> str:
        """Return what it has written so far."""
        return "\n".join(line for _, line in self.arrivals)

    def wait_for_line(self, pattern: str, *, timeout_s: float = 60) -> str:
        """Return the first line in which the pattern is found."""

        def seen() -> str | None:
            return next((line for _, line in self.arrivals if re.search(pattern, line)), None)

        def look() -> str | bool:
            line = seen()
            if line is None and self.process.poll() is not None:
                self._thread.join(5)
                line = seen()
                assert line is not None, f"ended without a line like {pattern!r}:\n{self.output[-3000:]}"
            return line if line is not None else False

        return str(wait_until(look, timeout_s=timeout_s, interval_s=0.02, what=f"a line like {pattern!r}"))

    def kill(self, number: signal.Signals = signal.SIGKILL) -> float:
        """Send a signal to the process; return when, by the clock that the engines use too."""
        self._cluster.user(["kill", f"-{number.value}", str(self.pid)], self._user).ok()
        return time.time()

    def wait(self, *, timeout_s: float = 60) -> Result:
        """Wait for its end."""
        try:
            status = self.process.wait(timeout_s * PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_s * PATIENCE:.0f} s:\n{self.output[-3000:]}") from None
        self._thread.join(5)
        return Result((str(self.pid),), status, self.output + "\n", "", time.monotonic() - self.started)

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self._cluster.user(["kill", "-9", str(self.pid)], self._user)
            self.process.kill()
            self.process.wait(10)


@dataclass(frozen=True)
class Event:
    """What an engine said about a container."""

    action: str
    container: str
    time: float


class Served(NamedTuple):
    """A call that an agent has served: when, by the engine's clock, and for which job."""

    begin: float
    end: float
    job: int


class UsersContainer(NamedTuple):
    """A container of a user's, as a worker's engine knows it; `name` is the owner's word, `state` the engine's."""

    worker: str
    id: str
    uid: int
    name: str
    state: str


class LiveCluster:
    """The cluster that `./invoke up` made on this machine."""

    def __init__(self) -> None:
        self.config = config.load(ROOT)
        self.state = State(self.config.state_dir)
        self.is_lost = False

    # machines and containers

    @property
    def workers(self) -> list[str]:
        """Return the names of the simulated machines that run, or of the real ones that answer."""
        if not self.config.simulated:
            members = [node for node in swarm.nodes().values() if node["Status"]["State"] == "ready"]
            labels = {node["Description"]["Hostname"]: node["Spec"].get("Labels", {}) for node in members}
            return sorted(name for name in labels if "slurm_worker" in labels[name])
        names = docker("ps", "--filter", f"name=^{MACHINE}", "--format", "{{.Names}}").ok().split()
        return sorted(name.removeprefix(MACHINE) for name in names)

    def on_worker(self, worker: str, argv: Sequence[str], *, timeout_s: float = 60) -> Result:
        """Run a command on a worker machine; a simulated one past SSH, so that it works when little else does."""
        if not self.config.simulated:
            machine = machines.real_worker(self.config, self.state, swarm.address_of(worker))
            return run(machine.argv(argv), timeout_s=timeout_s)
        return docker("exec", MACHINE + worker, *argv, timeout_s=timeout_s)

    def container(self, service: str, worker: str | None = None) -> str:
        """Return the id of the service's running container, on the head or on a worker; empty if there is none."""
        argv = ["ps", "-q", "--no-trunc", "--filter", f"label=com.docker.swarm.service.name=slurm-stack_{service}"]
        result = docker(*argv) if worker is None else self.on_worker(worker, ["docker", *argv])
        return (result.ok().split() or [""])[0]

    @functools.lru_cache(maxsize=64)  # noqa: B019 (one cluster in a test run)
    def _ids(self, user: str, _container: str) -> tuple[int, int]:
        text = docker("exec", _container, "getent", "passwd", user).ok()
        fields = text.split(":")
        return int(fields[2]), int(fields[3])

    def ids(self, user: str) -> tuple[int, int]:
        """Return uid and gid of a user."""
        return (0, 0) if user == "root" else self._ids(user, self.container("userhost"))

    def exec_as_user(self, user: str, argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
        """Return the command that runs `argv` as a user in the userhost container."""
        container = self.container("userhost")
        if not container:
            raise CommandFailed("no userhost container runs")
        uid, gid = self.ids(user)
        home = "/root" if user == "root" else f"/home/{user}"
        given = {"HOME": home, "USER": user, "LOGNAME": user, **env}
        variables = [part for name, value in given.items() for part in ("-e", f"{name}={value}")]
        return [str(docker_cli()), "exec", "-i", *variables, "-u", f"{uid}:{gid}", "-w", home, container, *argv]

    def user(
        self,
        command: str | Sequence[str],
        user: str = "jovyan",
        *,
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
        input: str | None = None,
    ) -> Result:
        """Run a command (a string: by bash) as a user on the userhost."""
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        return run(self.exec_as_user(user, argv, env or {}), timeout_s=timeout_s, input=input)

    def background(
        self, command: str | Sequence[str], user: str = "jovyan", *, env: Mapping[str, str] | None = None
    ) -> Background:
        """Start a command as a user on the userhost."""
        argv = ["bash", "-c", command] if isinstance(command, str) else list(command)
        return Background(self, user, argv, env or {})

    def python(
        self, program: str, user: str = "jovyan", *, timeout_s: float = 60, env: Mapping[str, str] | None = None
    ) -> Result:
        """Run a Python program as a user on the userhost."""
        return self.user(["python3", "-c", program], user, timeout_s=timeout_s, env=env)

    def in_service(self, service: str, command: str, worker: str | None = None, *, timeout_s: float = 60) -> Result:
        """Run a shell command as root in a service's container."""
        container = self.container(service, worker)
        if not container:
            raise CommandFailed(f"no container of {service} runs on {worker or 'the head'}")
        if worker is None:
            return docker("exec", container, "sh", "-c", command, timeout_s=timeout_s)
        return self.on_worker(worker, ["docker", "exec", container, "sh", "-c", command], timeout_s=timeout_s)

    # sandboxes

    def held(self, worker: str) -> dict[str, tuple[str, str]]:
        """Return what the worker's agent says of its sandboxes: by container, the state and the job (0 for none)."""
        agent = self.container("agent", worker)
        if not agent:
            return {}
        said = self.on_worker(worker, ["docker", "exec", agent, "python3", "-m", "agent", "--list"])
        if said.exit_status:  # it has just ended
            return {}
        lines = [line.split() for line in said.stdout.splitlines()]
        return {container: (state, job) for container, state, _, job in lines}

    def sandboxes(self, worker: str | None = None) -> list[str]:
        """Return the containers of calls, running or not, on one worker or on all; not those that wait for a call."""
        names = [worker] if worker else self.workers
        found = []
        for name in names:
            argv = ["docker", "ps", "-aq", "--no-trunc", "--filter", f"label={SANDBOX_LABEL}"]
            containers = self.on_worker(name, argv).ok().split()
            states = {container: state for container, (state, _) in self.held(name).items()} if containers else {}
            waiting = ("made", "connected", "ready")
            found += [f"{name}:{container}" for container in containers if states.get(container) not in waiting]
        return found

    def served(self, worker: str, since: float) -> list[Served]:
        """Return the calls of which a worker's agents, also earlier ones, say that they have ended since then."""
        argv = ["docker", "ps", "-aq", "--filter", "label=com.docker.swarm.service.name=slurm-stack_agent"]
        said = re.compile(r"^(\S+) INFO call .* job (\d+), .* after ([\d.]+) s", re.MULTILINE)
        found = []
        for container in self.on_worker(worker, argv).ok().split():
            log = self.on_worker(
                worker, ["docker", "logs", "--timestamps", "--since", f"{since:.3f}", container]
            ).output
            for at, job, seconds in said.findall(log):
                end = datetime.fromisoformat(at).timestamp()
                found.append(Served(end - float(seconds), end, int(job)))
        return found

    def events(self, worker: str, since: float) -> list[Event]:
        """Return what the worker's engine said about sandboxes since then."""
        argv = ["docker", "events", "--since", f"{since:.6f}", "--until", f"{time.time():.6f}", "--format"]
        argv += ["{{json .}}", "--filter", "type=container", "--filter", f"label={SANDBOX_LABEL}"]
        lines = self.on_worker(worker, argv).ok().splitlines()
        return [Event(said["Action"], said["id"], said["timeNano"] / 1e9) for said in map(json.loads, lines)]

    # users' containers

    def containers(self, user: str | None = None) -> list[UsersContainer]:
        """Return the containers of one user, or of all, on all workers."""
        form = '{{.ID}} {{.Label "cfiddle.uid"}} {{.Label "cfiddle.name"}} {{.State}}'
        uid = "" if user is None else str(self.ids(user)[0])
        found = []
        for worker in self.workers:
            argv = ["docker", "ps", "-a", "--no-trunc", "--filter", f"label={CONTAINER_LABEL}", "--format", form]
            lines = map(str.split, self.on_worker(worker, argv).ok().splitlines())
            found += [
                UsersContainer(worker, id_, int(owner), name, state)
                for id_, owner, name, state in lines
                if uid in ("", owner)
            ]
        return sorted(found, key=lambda container: container.name)

    def remove_containers(self, *users: str) -> None:
        """Remove all containers of these users, and end the jobs that they are in."""
        names = ",".join(users)
        for user in users:
            self.slurm(f"scancel --quiet --user {user} --partition shared")
        gone = "its jobs are gone"
        wait_until(lambda: not self.slurm(f"squeue -h -u {names} -p shared"), timeout_s=60, what=gone)
        for user, worker in itertools.product(users, self.workers):
            mine = f"docker ps -aq --filter label=cfiddle.uid={self.ids(user)[0]} | xargs -r docker rm -f"
            self.on_worker(worker, ["sh", "-c", mine]).ok()

    # Slurm

    def slurm(self, command: str, *, timeout_s: float = 60) -> str:
        """Run one of Slurm's commands as its administrator."""
        return self.in_service("slurmctld", command, timeout_s=timeout_s).ok()

    def nodes(self) -> dict[str, str]:
        """Return the nodes and their states, with Slurm's flags (`*` for one that does not answer)."""
        return dict(line.split() for line in self.slurm("sinfo -h -N -p normal -o '%N %T'").splitlines())

    def queue(self) -> list[str]:
        """Return the jobs that are in the queue, as `ID STATE`."""
        return self.slurm("squeue -h -a -o '%i %T'").splitlines()

    def next_job(self) -> int:
        """Return the number that the next job will have."""
        [number] = re.findall(r"NEXT_JOB_ID\s*=\s*(\d+)", self.slurm("scontrol show config"))
        return int(number)

    def job(self, job_id: str | int) -> dict[str, str]:
        """Return a job's accounting record; empty if there is none."""
        text = self.slurm(f"sacct -X -n -P -j {job_id} -o JobID,State,ExitCode,NodeList,User,JobName")
        lines = [line.split("|") for line in text.splitlines() if line]
        assert len(lines) < 2, f"{len(lines)} accounting records for job {job_id}: {lines}"
        names = ("id", "state", "exit_code", "nodes", "user", "name")
        return dict(zip(names, lines[0], strict=True)) if lines else {}

    def wait_for_state(self, job_id: str | int, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Return the job's record when it has one of these states there (`CANCELLED by 0` is `CANCELLED`)."""

        def look() -> dict[str, str]:
            record = self.job(job_id)
            return record if record and record["state"].split()[0] in states else {}

        return wait_until(look, timeout_s=timeout_s, what=f"job {job_id} is {' or '.join(states)}")

    def wait_until_runs(self, job_id: str | int, *, timeout_s: float = 60) -> None:
        """Wait until the job runs."""

        def runs() -> bool:
            state = self.slurm(f"squeue -h -j {job_id} -o %T 2>/dev/null || true").strip()
            assert state, f"job {job_id} is in the queue no longer: {self.job(job_id)}"
            return state == "RUNNING"

        wait_until(runs, timeout_s=timeout_s, what=f"job {job_id} runs")

    def sbatch(self, command: str, user: str = "jovyan", *options: str) -> int:
        """Submit a batch job that runs a shell command; return its id."""
        argv = ["sbatch", "--parsable", "-o", "/dev/null", "-J", job_name(), *options, f"--wrap={command}"]
        return int(self.user(argv, user).ok().strip())

    def is_idle(self) -> str:
        """Return why the cluster is not idle; empty if it is."""
        if jobs := self.queue():
            return f"jobs in the queue: {jobs}"
        states = self.nodes()
        if sorted(states) != self.workers:
            return f"nodes {sorted(states)} on machines {self.workers}"
        if busy := {name: state for name, state in states.items() if state != "idle"}:
            return f"nodes that are not idle: {busy}"
        with ThreadPoolExecutor() as pool:  # each asks several engines, which answer once all nodes are idle
            calls, containers = pool.submit(self.sandboxes), pool.submit(self.containers)
        if sandboxes := calls.result():
            return f"sandboxes: {sandboxes}"
        if running := [found for found in containers.result() if found.state == "running"]:
            return f"users' containers that run: {running}"
        return ""

    def wait_until_idle(self, *, timeout_s: float = 60) -> None:
        """Wait until no job, no sandbox and no busy node is left."""
        seen = ""
        deadline = time.monotonic() + timeout_s * PATIENCE
        while time.monotonic() < deadline:
            seen = self.is_idle()
            if not seen:
                return
            time.sleep(0.3)
        raise AssertionError(f"the cluster is not idle after {timeout_s * PATIENCE:.0f} s: {seen}")

    def cancel_all(self) -> None:
        """Cancel every job, so that a failed test does not make the following ones fail."""
        self.slurm("squeue -h -a -o %A | sort -u | xargs -r scancel")

    def mend(self) -> None:
        """Bring the cluster back after a test that failed; if that fails too, it is lost to all others."""
        self.is_lost = True
        invoke("up", timeout_s=400).ok()
        self.cancel_all()
        for node, state in self.nodes().items():
            if state.startswith(("drain", "down")):
                self.slurm(f"scontrol update nodename={node} state=resume")
        self.wait_until_idle(timeout_s=120)
        self.is_lost = False

    # what a person would look at when a test failed

    def report(self) -> Iterator[str]:
        """Yield short lines about services, tasks that failed, nodes, queue and the last of the logs."""

        def lines(title: str, command: Callable[[], str], most: int) -> Iterator[str]:
            try:
                text = command()
            except (ClusterError, CommandFailed, AssertionError, subprocess.SubprocessError, OSError) as error:
                text = f"(not to be had: {str(error)[:200]})"
            yield f"-- {title}"
            yield from [line[:180] for line in text.splitlines() if line.strip()][-most:]

        def tasks() -> str:
            columns = "{{.Name}} {{.Node}} {{.DesiredState}} {{.CurrentState}} {{.Error}}"
            text = docker("stack", "ps", "slurm-stack", "--format", columns, timeout_s=20).stdout
            return "\n".join(line for line in text.splitlines() if " Running Running" not in line)

        yield from lines("services", lambda: docker("service", "ls", "--format", "{{.Name}} {{.Replicas}}").stdout, 8)
        yield from lines("tasks that do not run", tasks, 8)
        yield from lines("nodes", lambda: self.slurm("sinfo -N -o '%N %P %T %E'", timeout_s=15), 6)
        yield from lines("queue", lambda: self.slurm("squeue -a -o '%i %u %T %R'", timeout_s=15), 6)
        for service in ("slurmctld", "userhost"):
            yield from lines(f"{service} said last", functools.partial(self._said_last, service, None), 4)
        for service, worker in itertools.product(("slurmd", "agent"), self.workers):
            yield from lines(f"{service} of {worker} said last", functools.partial(self._said_last, service, worker), 4)

    def _said_last(self, service: str, worker: str | None) -> str:
        argv = ["logs", "--tail", "4", self.container(service, worker)]
        return (docker(*argv) if worker is None else self.on_worker(worker, ["docker", *argv])).output


def job_name() -> str:
    """Return a name that no other job has."""
    return f"test-{uuid.uuid4().hex[:8]}"


def snapshot(cluster: LiveCluster) -> dict[str, Any]:
    """Return what must be the same after an interruption: nodes, users, secrets, homes."""
    secrets = {
        path.name: path.read_bytes()
        for path in sorted((cluster.config.state_dir / "secrets").iterdir())
        if path.is_file()
    }
    return {
        "nodes": sorted(cluster.nodes()),
        "users": json.loads((cluster.config.state_dir / "users.json").read_text()),
        "associations": sorted(cluster.slurm("sacctmgr -n -P show assoc format=Account,User").split()),
        "secrets": secrets,
        "homes": sorted(path.name for path in cluster.config.home_root.iterdir()),
    }
