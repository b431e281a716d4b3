"""A simulated machine: an engine that keeps its limits and an SSH server that lets one key in."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster.commands import docker_cli, run
from containers import Container, Start, machine_options

# What the tests run inside: the machine's engine has no image of its own.
INNER = "common"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with two key pairs: `own` may log in, `other` may not."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], timeout_s=30)
    return directory


@pytest.fixture(scope="module")
def machine(start_for_all: Start, keys: Path, image: Callable[[str], str]) -> Container:
    found = start_for_all("machine", options=machine_options(keys / "own.pub"))
    found.wait_until_healthy()
    load(found, image(INNER))
    return found


def load(machine: Container, reference: str) -> None:
    with subprocess.Popen([docker_cli(), "save", reference], stdout=subprocess.PIPE) as save:
        argv = [docker_cli(), "exec", "-i", machine.name, "docker", "load", "--quiet"]
        subprocess.run(argv, stdin=save.stdout, check=True, timeout=120, capture_output=True)


def ssh(machine: Container, key: Path, command: str, user: str = "root") -> subprocess.CompletedProcess[str]:
    argv = ["ssh", "-F", "/dev/null", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"]
    argv += ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    argv += [f"{user}@{machine.address}", command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def test_engine_is_driven_over_ssh(machine: Container, keys: Path) -> None:
    done = ssh(machine, keys / "own", "docker version --format '{{.Server.Version}}'")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.partition(".")[0]) >= 26


@pytest.mark.parametrize(("key", "user"), [("other", "root"), ("own", "nobody")])
def test_nobody_else_logs_in(machine: Container, keys: Path, key: str, user: str) -> None:
    done = ssh(machine, keys / key, "true", user)
    assert done.returncode == 255
    assert "Permission denied" in done.stderr


def test_limits_hold_inside(machine: Container, image: Callable[[str], str]) -> None:
    limits = ["--memory", "64m", "--memory-swap", "64m", "--pids-limit", "40", "--read-only", "--cap-drop", "ALL"]
    limits += ["--security-opt", "no-new-privileges", "--network", "none", "--tmpfs", "/tmp:size=1m"]
    script = """
        grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status
        touch /x 2>&1
        head -c 2000000 /dev/zero 2>&1 >/tmp/x
        python3 -c 'bytearray(200 << 20)' || echo "memory: $?"
        python3 -c 'import subprocess; [subprocess.Popen(["sleep", "1"]) for _ in range(60)]' 2>&1 | tail -1
    """
    said = machine.run("docker", "run", "--rm", *limits, "--entrypoint", "sh", image(INNER), "-c", script, timeout_s=60)
    assert "CapEff:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said
    assert "Read-only file system" in said
    assert "No space left on device" in said
    assert "memory: 137" in said
    assert "Resource temporarily unavailable" in said


def test_log_has_no_complaint_that_matters(machine: Container) -> None:
    # containerd says at each start which of its plugins this kernel has no use for; it calls none of them a warning.
    assert machine.complaints(but="level=info|shim disconnected|Connection closed|Permission denied|invalid user") == []


def test_images_survive_a_restart(start: Start, keys: Path, volume: str, image: Callable[[str], str]) -> None:
    machine = start("machine", options=machine_options(keys / "own.pub", volume))
    machine.wait_until_healthy()
    load(machine, image(INNER))
    machine.run(
        "docker", "run", "--detach", "--restart", "always", "--name", "inner", image(INNER), "sleep", "infinity"
    )
    machine.restart()
    machine.wait_until_healthy()
    assert "inner" in machine.run("docker", "ps", "--format", "{{.Names}}")


def test_killed_machine_comes_back(start: Start, keys: Path) -> None:
    machine = start("machine", options=machine_options(keys / "own.pub"))
    machine.wait_until_healthy()
    run([docker_cli(), "kill", machine.name], timeout_s=30)
    run([docker_cli(), "start", machine.name], timeout_s=30)
    machine.wait_until_healthy()


def test_machine_ends_with_its_engine(start: Start, keys: Path) -> None:
    machine = start("machine", options=machine_options(keys / "own.pub"))
    machine.wait_until_healthy()
    machine.run("sh", "-c", "kill -9 $(cat /run/docker.pid)")
    assert machine.wait_until_ended() == 1
    assert "the engine or the SSH server ended" in machine.log()


def test_machine_stops_at_once_when_told(start: Start, keys: Path) -> None:
    machine = start("machine", options=machine_options(keys / "own.pub"))
    machine.wait_until_healthy()
    began = time.monotonic()
    machine.stop()
    assert time.monotonic() - began < 8
    assert machine.inspect("{{.State.ExitCode}}") == "0"


def test_each_machine_makes_its_own_host_key(start: Start, machine: Container, keys: Path) -> None:
    other = start("machine", options=machine_options(keys / "own.pub"))
    other.wait_until_healthy()
    read = ("cat", "/etc/ssh/ssh_host_ed25519_key.pub")
    assert machine.run(*read) != other.run(*read)


def test_machine_without_a_key_to_log_in_with_says_so(start: Start) -> None:
    machine = start("machine")
    assert machine.wait_until_ended() == 1
    assert "no key to log in with" in machine.log()


def test_machine_without_the_rights_that_it_needs_says_so(start: Start, keys: Path) -> None:
    machine = start("machine", options=["--volume", f"{keys / 'own.pub'}:/etc/ssh/authorized_keys:ro"])
    assert machine.wait_until_ended() == 1
    assert "CAP_SYS_ADMIN" in machine.log()
