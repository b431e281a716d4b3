"""Calls to other users, other machines and containers: a real sudo, a real sshd of the tests' own, and for Docker a
stand-in that runs what follows the image (the engine itself has its test in `tests/images`)."""

import getpass
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from delegate_function import (
    ConfigurationError,
    DelegateChain,
    DelegateFunctionException,
    DockerDelegate,
    HopFailed,
    NotOffered,
    SSHDelegate,
    SubprocessDelegate,
    SuDockerDelegate,
    SudoDelegate,
    TemporaryDirectoryDelegate,
    TestClass,
    VersionMismatch,
)
from delegate_function.delegates import BaseDelegate
from far import OTHER, Far, needed
from stand_ins import program

# The far side has no tests to import.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

IMAGE = "cfiddle-sandbox:test"


class Visitor:
    """What travels."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()

    def look(self) -> str:
        self.seen = (os.getuid(), str(Path.cwd()))
        print("here")
        return os.environ.get("HOME", "")

    def leave(self) -> None:
        os._exit(3)

    def sleep(self, file: str) -> None:
        Path(file).write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(60)


@pytest.fixture(scope="module")
def far() -> Iterator[Far]:
    """Return a far side that every user may read."""
    with tempfile.TemporaryDirectory(prefix="far-") as directory:
        yield Far(Path(directory))


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is searched for programs first."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


# sudo.


@pytest.fixture
def sudo(far: Far) -> SudoDelegate:
    """Return a delegate to a user who may do nothing."""
    needed("sudo", "sudo")
    return SudoDelegate(user=OTHER, delegate_executable_path=far.hop)


def test_sudo_runs_as_the_other_user(sudo: SudoDelegate, capsys: pytest.CaptureFixture[str]) -> None:
    visitor = Visitor()
    sudo.invoke(visitor, "look")
    assert visitor.seen[0] == pwd.getpwnam(OTHER).pw_uid
    assert capsys.readouterr().out == "here\n"
    assert sudo.last_call is not None
    assert sudo.last_call.where == f"hop 1 of 1 (sudo on {os.uname().nodename})"


def test_sudo_runs_as_root_where_no_user_is_named(far: Far) -> None:
    needed("sudo", "sudo")
    visitor = Visitor()
    SudoDelegate(delegate_executable_path=far.hop).invoke(visitor, "look")
    assert visitor.seen[0] == 0


def test_sudo_stands_anywhere_in_a_chain(sudo: SudoDelegate) -> None:
    visitor = Visitor()
    chain = SubprocessDelegate(TemporaryDirectoryDelegate(sudo))
    sudo.set_subdelegate(TemporaryDirectoryDelegate())
    chain.invoke(visitor, "look")
    assert visitor.seen[0] == pwd.getpwnam(OTHER).pw_uid
    assert not Path(visitor.seen[1]).exists()
    with pytest.raises(
        DelegateFunctionException, match=rf"^hop 4 of 4 \(temporary directory on {os.uname().nodename}\)"
    ):
        chain.invoke(visitor, "leave")


def test_sudo_that_says_no_is_quoted() -> None:
    needed("sudo", "sudo")
    with pytest.raises(HopFailed, match=r"(?s)hop 1 of 1 \(sudo on .*sudo ended with status 1.*unknown user no_such"):
        SudoDelegate(user="no_such_user").invoke(TestClass(), "hello")


def test_sudo_never_asks_for_a_password(far: Far) -> None:
    needed("sudo", "sudo")
    # The other user may use sudo for nothing.
    chain = SudoDelegate(SudoDelegate(user="root"), user=OTHER, delegate_executable_path=far.hop)
    with pytest.raises(HopFailed, match=r"(?s)hop 2 of 2 \(sudo.*password"):
        chain.invoke(TestClass(), "hello")


def test_an_interrupted_call_of_another_user_ends_with_its_processes(sudo: SudoDelegate, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o777)
        pids = Path(directory) / "pids"

        def interrupt() -> None:
            until = time.monotonic() + 10
            while time.monotonic() < until and not (pids.exists() and len(pids.read_text().split()) == 2):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            sudo.invoke(Visitor(), "sleep", str(pids))
        ended = time.monotonic()
        while any(Path(f"/proc/{pid}").exists() for pid in pids.read_text().split()):
            assert time.monotonic() - ended < 2
            time.sleep(0.02)


def test_a_far_side_without_the_package_is_named(bin_directory: Path) -> None:
    needed("sudo", "sudo")
    program(bin_directory, "hop", 'exec /usr/bin/env python3 -I -c "import delegate_function.hop"')
    with pytest.raises(VersionMismatch, match=r"hop 1 of 1 .*version 1\.\S+ is needed, cannot be imported there"):
        SudoDelegate(delegate_executable_path=str(bin_directory / "hop")).invoke(TestClass(), "hello")


# ssh.


@pytest.fixture(scope="module")
def sshd() -> Iterator[list[str]]:
    """Start an sshd of our own; return the options with which ssh finds it and is let in."""
    daemon = needed("sshd", "openssh-server")
    with tempfile.TemporaryDirectory(prefix="sshd-") as name, socket.socket() as probe:
        directory = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
        host_key = (directory / "host.pub").read_text().split()
        (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key[0]} {host_key[1]}\n")
        (directory / "config").write_text(
            f"Port {port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
            f"PidFile none\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin yes\nUsePAM no\n"
            "AcceptEnv DELEGATE_FUNCTION_*\n"
        )
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with subprocess.Popen([daemon, "-D", "-e", "-f", directory / "config"], stderr=subprocess.PIPE) as server:
            until = time.monotonic() + 10
            while True:
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert server.poll() is None and time.monotonic() < until, "sshd does not start"
                time.sleep(0.05)
            known = ["-o", f"UserKnownHostsFile={directory}/known_hosts", "-o", "StrictHostKeyChecking=yes"]
            yield ["-F", "none", "-p", str(port), "-i", f"{directory}/user", "-o", "IdentitiesOnly=yes", *known]
            server.terminate()


@pytest.fixture
def ssh(sshd: list[str], far: Far) -> SSHDelegate:
    """Return a delegate to this very machine, over its network."""
    return SSHDelegate(getpass.getuser(), "127.0.0.1", ssh_options=sshd, delegate_executable_path=far.hop)


def test_ssh_runs_on_the_machine_that_is_named(ssh: SSHDelegate, capsys: pytest.CaptureFixture[str]) -> None:
    visitor = Visitor()
    assert ssh.invoke(visitor, "look") == pwd.getpwuid(os.getuid()).pw_dir
    assert visitor.seen[0] == os.getuid()
    assert capsys.readouterr().out == "here\n"
    assert ssh.last_call is not None
    assert ssh.last_call.where == f"hop 1 of 1 (ssh on {os.uname().nodename})"
    with pytest.raises(DelegateFunctionException, match=r"hop 1 of 1 \(ssh on .*status 3 without a result"):
        ssh.invoke(visitor, "leave")


def test_large_values_travel_over_ssh(ssh: SSHDelegate) -> None:
    class Echo:
        def back(self, data: bytes) -> bytes:
            return data

    data = os.urandom(3_000_000)
    assert ssh.invoke(Echo(), "back", data) == data


def test_a_long_chain_counts_its_hops(ssh: SSHDelegate, sudo: SudoDelegate, sshd: list[str], far: Far) -> None:
    second = SSHDelegate(getpass.getuser(), "127.0.0.1", ssh_options=sshd, delegate_executable_path=far.hop)
    second.set_subdelegate(sudo)
    ssh.set_subdelegate(SubprocessDelegate(second))
    chain = TemporaryDirectoryDelegate(ssh)
    visitor = Visitor()
    chain.invoke(visitor, "look")
    assert visitor.seen[0] == pwd.getpwnam(OTHER).pw_uid
    assert chain.last_call is not None
    assert [hop["kind"] for hop in chain.last_call.hops] == ["ssh", "subprocess", "ssh", "sudo"]
    sudo.set_subdelegate(SubprocessDelegate(delegate_executable_path="/nowhere"))
    with pytest.raises(HopFailed, match=rf"^hop 6 of 6 \(subprocess on {os.uname().nodename}\): cannot be started"):
        chain.invoke(visitor, "look")


def test_a_machine_that_does_not_let_us_in_is_named(sshd: list[str]) -> None:
    stranger = SSHDelegate(getpass.getuser(), "127.0.0.1", ssh_options=["-o", "IdentityFile=none", *sshd[:4]])
    with pytest.raises(HopFailed, match=r"(?s)hop 1 of 1 \(ssh on 127\.0\.0\.1\): ssh to .*@127\.0\.0\.1 ended with"):
        stranger.invoke(TestClass(), "hello")


def test_another_version_of_the_package_is_named_before_the_call(sshd: list[str], far: Far, tmp_path: Path) -> None:
    other = Far(tmp_path, version="0.9.7")
    delegate = SSHDelegate(getpass.getuser(), "127.0.0.1", ssh_options=sshd, delegate_executable_path=other.hop)
    with pytest.raises(VersionMismatch, match=r"hop 1 of 1 \(ssh on .*delegate_function 1\.\S+ .*here it is 0\.9\.7"):
        delegate.invoke(Visitor(), "leave")
    # Also where it would only pass the call on.
    delegate.set_subdelegate(SubprocessDelegate(delegate_executable_path=far.hop))
    with pytest.raises(VersionMismatch, match=r"hop 1 of 2 \(ssh on .*here it is 0\.9\.7"):
        delegate.invoke(Visitor(), "look")


def test_ssh_never_asks(bin_directory: Path) -> None:
    program(bin_directory, "ssh", f'printf "%s\\n" "$@" >{bin_directory}/argv; exit 255')
    with pytest.raises(HopFailed):
        SSHDelegate("me", "far.example", ssh_options=["-o", "BatchMode=no"]).invoke(TestClass(), "hello")
    argv = (bin_directory / "argv").read_text().splitlines()
    assert argv.index("BatchMode=yes") < argv.index("BatchMode=no")
    assert argv[-5:] == ["-l", "me", "--", "far.example", "python3 -I -m delegate_function.hop"]


# Docker.

RUN = 'while [[ $1 != -- ]]; do shift; done; shift 2; exec "$@"'


def test_docker_gets_these_arguments_and_no_others(bin_directory: Path, far: Far) -> None:
    program(bin_directory, "docker", f'printf "%s\\n" "$@" >{bin_directory}/argv; {RUN}')
    arguments = ["--network", "none", "-e", "X=a b"]
    delegate = DockerDelegate(IMAGE, docker_cmd_line_args=arguments, delegate_executable_path=far.hop)
    thing = TestClass()
    delegate.invoke(thing, "set_value", 5)
    assert thing._value == 5
    argv = (bin_directory / "argv").read_text().splitlines()
    assert argv == ["run", "--rm", "-i", *arguments, "--", IMAGE, far.hop]
    [hop] = DockerDelegate("i").compile()
    assert hop == {"type": "docker", "image": "i"}


def test_sudocker_goes_through_sudo(bin_directory: Path, far: Far) -> None:
    program(bin_directory, "docker", RUN)
    program(bin_directory, "sudo", f'printf "%s\\n" "$@" >{bin_directory}/argv; {RUN.replace("shift 2", "shift")}')
    chain = DelegateChain(SubprocessDelegate, SuDockerDelegate)
    assert chain.__name__ == "SubprocessDelegate_to_SuDockerDelegate"
    delegate = SuDockerDelegate(
        IMAGE,
        docker_user="docker_user",
        sudo_args=["-H"],
        docker_cmd_line_args=["--init"],
        delegate_executable_path=far.hop,
    )
    SubprocessDelegate(delegate).invoke(TestClass(), "hello")
    argv = (bin_directory / "argv").read_text().splitlines()
    begin = ["-n", "-u", "docker_user", "-H", "--", "docker", "run", "--rm", "-i", "--init", "--", IMAGE]
    assert argv == [*begin, far.hop]


@pytest.mark.parametrize(
    "said",
    [
        "docker: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
        "docker: Got permission denied while trying to connect to the Docker daemon socket",
    ],
)
def test_who_has_no_engine_is_told_of_sandboxes(bin_directory: Path, said: str) -> None:
    program(bin_directory, "docker", f"echo '{said}' >&2; exit 125")
    with pytest.raises(NotOffered, match=r"hop 1 of 1 \(docker.*SandboxDelegate"):
        DockerDelegate(IMAGE).invoke(TestClass(), "hello")


def test_who_has_no_docker_at_all_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(NotOffered, match="SandboxDelegate"):
        DockerDelegate(IMAGE).invoke(TestClass(), "hello")


def test_an_image_that_is_not_there_is_named(bin_directory: Path) -> None:
    program(bin_directory, "docker", "echo 'Unable to find image' >&2; exit 125")
    with pytest.raises(HopFailed, match=rf"docker run of {IMAGE} ended with status 125.*\n.*Unable to find image"):
        DockerDelegate(IMAGE).invoke(TestClass(), "hello")


# What is refused before anything starts.


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (SudoDelegate, {"user": "-u"}),
        (SudoDelegate, {"user": "a b"}),
        (SudoDelegate, {"user": ""}),
        (SudoDelegate, {"user": "root\n"}),
        (SudoDelegate, {"sudo_args": "-E"}),
        (SudoDelegate, {"sudo_args": ["--", "id"]}),
        (SSHDelegate, {"user": "-oProxyCommand=id", "host": "h"}),
        (SSHDelegate, {"user": "u", "host": "-oProxyCommand=id"}),
        (SSHDelegate, {"user": "u", "host": "h;id"}),
        (SSHDelegate, {"user": "u", "host": "h\0"}),
        (SSHDelegate, {"user": "u", "host": ""}),
        (SSHDelegate, {"user": "u", "host": None}),
        (SSHDelegate, {"user": "u", "host": "h", "ssh_options": [22]}),
        (DockerDelegate, {"docker_image": "--privileged"}),
        (DockerDelegate, {"docker_image": "a b"}),
        (DockerDelegate, {"docker_image": "i", "docker_cmd_line_args": "--rm"}),
        (DockerDelegate, {"docker_image": "i", "docker_cmd_line_args": ["a\0"]}),
        (SuDockerDelegate, {"docker_image": "i", "docker_user": "-i"}),
    ],
)
def test_no_name_becomes_an_option(kind: type[BaseDelegate], arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        kind(**arguments)
