"""Users' containers with a real engine: their ports, the administrator's options, and nothing half-made."""

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster.commands import docker_cli, run
from containers import Start
from live import wait_until
from worker import OTHER, USER, Worker, start_worker

FIRST_PORT = 25400
MEMORY_MB = 64

POLICY = """
version: 1
calls: {{at_once: 8, per_user: 3}}
profiles:
  default:
    command: [python3, -I, -m, delegate_function.inside]
    limits: {{seconds: 30, memory_mb: 256, processes: 48, cpus: job, open_files: 256, file_mb: 16, tmpfs_mb: 64,
       tmpfs_files: 500, output_mb: 4}}
containers:
  images: [my_task_image]
  per_user: 8
  disk_mb: 1024
  cpus: 1
  memory_mb: 64
  processes: 64
  start_port_num: {port}
  additional_options:
    - -v {shared}:/shared
    - -v {shared}:/read-only:ro -e GREETING='good day' --shm-size 8m
    - --ulimit sigpending=100:200
"""

HOLD = """
import sys
from agent.hold import hold
job, user, name, image, ports = sys.argv[1:]
sys.exit(hold(job=int(job), user=user, name=name, image=image, ports=int(ports)))
"""


class Holds:
    """Steps of jobs, each of which holds a container."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._steps: list[subprocess.Popen[str]] = []
        self._job = 100

    def start(
        self, name: str, *, ports: int = 0, image: str = "my_task_image", uid: int = USER
    ) -> subprocess.Popen[str]:
        """Start a step that asks for a container, in a job of its own."""
        self._job += 1
        self.worker.grant(self._job, f"{uid} * 1 {MEMORY_MB}\n")
        arguments = [str(self._job), f"user{uid}", name, image, str(ports)]
        argv = [str(docker_cli()), "exec", "-i", "--user", f"{uid}:{uid}", self.worker.step.name, "python3", "-c", HOLD]
        step = subprocess.Popen([*argv, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._steps.append(step)
        return step

    def run(self, name: str, **options: Any) -> dict[str, Any]:
        """Have a container run, and return what the engine knows of it."""
        step = self.start(name, **options)
        uid = options.get("uid", USER)

        def runs() -> dict[str, Any] | None:
            assert step.poll() is None, step.communicate()[1]
            known = inspected(f"u{uid}.{name}")
            return known if known and known["State"]["Running"] else None

        return wait_until(runs, timeout_s=30, what=f"container {name} runs") or {}

    def end(self) -> None:
        """End all jobs and remove their containers."""
        for job in range(101, self._job + 1):
            self.worker.revoke(job)
        for step in self._steps:
            step.communicate(timeout=30)
        for name in names():
            run([docker_cli(), "rm", "--force", name], timeout_s=30)


def inspected(name: str) -> dict[str, Any]:
    """Return what the engine knows of a container; nothing if there is none."""
    argv = [str(docker_cli()), "inspect", "--type", "container", name]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return dict(json.loads(done.stdout)[0]) if done.returncode == 0 else {}


def names() -> list[str]:
    """Return the engine's names of all containers of users."""
    form = ["--format", "{{.Names}}"]
    return run([docker_cli(), "ps", "-a", *form, "--filter", "label=cfiddle.container"], timeout_s=30).split()


def published(known: dict[str, Any]) -> dict[str, str]:
    """Return the ports that the engine has published for a container that runs: inside and outside."""
    ports = known["NetworkSettings"]["Ports"]
    return {inside: f"{outside[0]['HostIp']}:{outside[0]['HostPort']}" for inside, outside in ports.items() if outside}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of the machine's that everybody may write in."""
    path = tmp_path_factory.mktemp("shared")
    path.chmod(0o777)
    return path


@pytest.fixture(scope="module")
def worker(
    start_for_all: Start, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, shared: Path
) -> Worker:
    base = tmp_path_factory.mktemp("worker")
    for uid in (USER, OTHER):
        (base / "homes" / f"user{uid}").mkdir(mode=0o700, parents=True)
        os.chown(base / "homes" / f"user{uid}", uid, uid)
    options = ["--volume", f"{base}/homes:/home", "--env", f"TASK_IMAGE={image('task')}"]
    policy = POLICY.format(port=FIRST_PORT, shared=shared)
    return start_worker(start_for_all, image, base, policy, options=options)


@pytest.fixture
def holds(worker: Worker) -> Iterator[Holds]:
    """Return what has containers run; none is left after the test."""
    holds = Holds(worker)
    yield holds
    holds.end()


def test_ports_are_counted_from_the_first_and_given_once(holds: Holds) -> None:
    one, other = holds.run("one", ports=2), holds.run("other", ports=1, uid=OTHER)
    assert published(one) == {f"{port}/tcp": f"0.0.0.0:{port}" for port in (FIRST_PORT, FIRST_PORT + 1)}
    assert published(other) == {f"{FIRST_PORT + 2}/tcp": f"0.0.0.0:{FIRST_PORT + 2}"}


def test_ports_of_a_stopped_container_stay_its_own(holds: Holds) -> None:
    holds.run("stopped", ports=1)
    run([docker_cli(), "stop", "--time", "1", f"u{USER}.stopped"], timeout_s=30)
    assert published(holds.run("next", ports=1)) == {f"{FIRST_PORT + 1}/tcp": f"0.0.0.0:{FIRST_PORT + 1}"}
    assert published(holds.run("stopped", image="")) == {f"{FIRST_PORT}/tcp": f"0.0.0.0:{FIRST_PORT}"}


def test_port_that_something_else_listens_on_is_passed_over(holds: Holds) -> None:
    with socket.create_server(("127.0.0.1", FIRST_PORT + 1)):
        given = published(holds.run("one", ports=2))
    assert given == {f"{port}/tcp": f"0.0.0.0:{port}" for port in (FIRST_PORT, FIRST_PORT + 2)}
    assert names() == [f"u{USER}.one"]


def test_stopped_container_whose_port_is_taken_says_so(holds: Holds) -> None:
    holds.run("stopped", ports=1)
    run([docker_cli(), "stop", "--time", "1", f"u{USER}.stopped"], timeout_s=30)
    with socket.create_server(("0.0.0.0", FIRST_PORT)):
        step = holds.start("stopped", image="")
        assert step.wait(30) == 1
        assert step.communicate()[1] == f"something else listens on port {FIRST_PORT} of this machine\n"


def test_published_port_reaches_the_container(holds: Holds) -> None:
    holds.run("served", ports=1)
    serve = f"import socket; s = socket.create_server(('', {FIRST_PORT})); c = s.accept()[0]; c.sendall(b'hello')"
    run([docker_cli(), "exec", "--detach", f"u{USER}.served", "python3", "-c", serve], timeout_s=30)

    def heard() -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", FIRST_PORT), timeout=5) as connection:
                return connection.recv(16)
        except OSError:
            return b""

    assert wait_until(heard, timeout_s=20, what="the container answers at its port") == b"hello"


def test_options_of_the_administrator_are_in_force(holds: Holds, shared: Path) -> None:
    holds.run("one")
    program = "echo written >/shared/file; echo $GREETING; df -m /dev/shm | tail -1; touch /read-only/x; "
    program += "python3 -c 'import resource; print(*resource.getrlimit(11))'"  # RLIMIT_SIGPENDING
    argv = [str(docker_cli()), "exec", f"u{USER}.one", "/bin/sh", "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    greeting, shm, limits = done.stdout.splitlines()
    assert (greeting, shm.split()[1], limits) == ("good day", "8", "100 200")
    assert "Read-only file system" in done.stderr
    assert (shared / "file").read_text() == "written\n"


def test_image_that_is_not_there_makes_no_container(holds: Holds) -> None:
    step = holds.start("one", image="no-such-image")
    assert step.wait(30) == 1
    assert "there is no image" in step.communicate()[1]
    assert names() == []


def test_too_many_ports_are_refused(holds: Holds) -> None:
    step = holds.start("one", ports=65)
    assert step.wait(30) == 1
    assert "not a number from 0 to 64" in step.communicate()[1]
    assert names() == []
