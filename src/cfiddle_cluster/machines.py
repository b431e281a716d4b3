"""Machines: hosts with a Docker Engine. The head is the one we stand on, the others are reached by OpenSSH.

Simulated machines are driven by the same code; only their SSH key and host keys are the cluster's own.
"""

import http.client
import json
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar

from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import PATIENCE

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
ALIVE_INTERVAL_S = 10
CONTROL_PERSIST_S = 60
ASK_TIMEOUT_S = 600
"""How long a person may think about a host key."""
SSH_FAILED = 255
"""ssh's own exit status when it could not connect or log in."""
PARALLEL = 16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A host with an engine.

    Attributes:
        name: its short hostname, which is its node's name too.
        addr: the address that it is reached at.
        roles: of `head` and `worker`.
        simulated: whether it is a container on the head.
        ssh: the ssh command up to the destination's command; empty for the machine we stand on.
        sudo: whether commands need sudo there.
    """

    name: str
    addr: str
    roles: frozenset[str]
    simulated: bool = False
    ssh: tuple[str, ...] = ()
    sudo: bool = False

    def run(self, argv: Sequence[str | Path], *, timeout_s: float, input: str | bytes | None = None) -> str:
        """Run a command there, as root, and return what it wrote to its standard output.

        Raises:
            CommandError: it ended with another status than 0 or not in time.
            ClusterError: the machine cannot be reached.
        """
        try:
            return run(self.argv(argv), timeout_s=timeout_s, input=input)
        except CommandError as error:
            if self.ssh and error.returncode == SSH_FAILED:
                raise self._unreachable(error) from error
            if self.sudo and "sudo: a password is required" in error.output:
                raise ClusterError(
                    f"{self.ssh[-1]} cannot become root on {self.addr} without a password",
                    "let sudo ask that user for none there, or set SSH_USER=root in config.sh",
                ) from error
            raise

    def script(self, text: str, args: Sequence[str] = (), *, timeout_s: float) -> str:
        """Run a shell script there, as root, with arguments; it travels on standard input."""
        return self.run(["bash", "-s", "--", *args], timeout_s=timeout_s, input=text)

    def argv(self, argv: Sequence[str | Path]) -> list[str]:
        """Return the local command that runs this one there."""
        words = [str(word) for word in argv]
        if not self.ssh:
            return words
        return [*self.ssh, shlex.join(["sudo", "-n", *words] if self.sudo else words)]

    def engine_get(self, path: str, *, timeout_s: float = 60) -> Any:
        """Ask the machine's engine; return its answer, parsed.

        Raises:
            EngineError: the engine refuses.
        """
        return self._engine("GET", path, None, timeout_s)

    def engine_post(self, path: str, body: Any = None, *, timeout_s: float = 120) -> Any:
        """Tell the machine's engine something; what is in the body is in no argument list.

        Raises:
            EngineError: the engine refuses.
        """
        return self._engine("POST", path, body, timeout_s)

    def _engine(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        timeout_s *= PATIENCE
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        client = docker_cli() if not self.ssh else "docker"
        argv = self.argv([client, "--host", "unix:///var/run/docker.sock", "system", "dial-stdio"])
        # Standard input stays open until the answer is there: the engine takes its end for a client that went away.
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            timer = threading.Timer(timeout_s, process.kill)
            timer.start()
            try:
                process.stdin.write(head.encode() + data)
                process.stdin.flush()
                answer = http.client.HTTPResponse(_Reply(process.stdout), method=method)  # type: ignore[arg-type]
                answer.begin()
                text = answer.read().decode(errors="replace")
            except (OSError, http.client.HTTPException) as error:
                late = not timer.is_alive()
                process.kill()
                with suppress(OSError):  # what could not be written is tried once more, in vain
                    process.stdin.close()
                said = f"no answer in {timeout_s:.0f} s" if late else process.stderr.read().decode(errors="replace")
                failure = CommandError(argv, process.wait(), said, "got no answer from the engine")
                raise (
                    self._unreachable(failure) if self.ssh and process.returncode == SSH_FAILED else failure
                ) from error
            finally:
                timer.cancel()
        if answer.status >= 400:
            raise EngineError(self.name, answer.status, text)
        return json.loads(text) if text.strip() else None

    def _unreachable(self, error: CommandError) -> ClusterError:
        said = error.output.lower()
        user = self.ssh[-1]
        known = _option(self.ssh, "UserKnownHostsFile")
        if "identification has changed" in said:
            return ClusterError(
                f"{self.addr} shows another host key than the known one:\n{error.output}",
                f"make sure that it is the right machine, then run: ssh-keygen -f {known} -R {self.addr}",
            )
        if "host key verification failed" in said:
            return ClusterError(
                f"the host key of {self.addr} is not known yet:\n{error.output}",
                "run ./invoke machines in a terminal, which asks about it; "
                f"or, on a network that you trust: ssh-keyscan {self.addr} >>{known}",
            )
        if "permission denied" in said:
            return ClusterError(
                f"{self.addr} does not let {user} in:\n{error.output}",
                f"set SSH_USER and SSH_KEY in config.sh so that this works without a question: ssh {user}",
            )
        return ClusterError(
            f"{self.addr} cannot be reached by SSH:\n{error.output}",
            f"see that the address in config.sh is right and that this works: ssh {user}",
        )


@dataclass(frozen=True)
class Silent:
    """A machine that could not be asked."""

    machine: Machine
    error: ClusterError


class EngineError(ClusterError):
    """A machine's engine refused a request.

    Attributes:
        status: the HTTP status.
        explanation: what the engine says.
    """

    def __init__(self, machine: str, status: int, text: str) -> None:
        self.status = status
        try:
            self.explanation = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            self.explanation = text.strip()
        super().__init__(f"the engine of {machine} refuses: {self.explanation}")


class _Reply:
    """What `http.client` reads an answer from."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def makefile(self, _mode: str) -> IO[bytes]:
        return self._stream


def short_hostname() -> str:
    """Return this machine's name as its node has it."""
    return socket.gethostname().partition(".")[0]


def head(config: Config) -> Machine:
    """Return the machine we stand on."""
    roles = {"head", "worker"} if config.head_addr in config.worker_addrs else {"head"}
    return Machine(name=short_hostname(), addr=config.head_addr, roles=frozenset(roles))


def simulated_worker(state: State, name: str, addr: str) -> Machine:
    """Return a simulated machine by its name and address."""
    ssh = _ssh(state, "root", addr, str(state.path("ssh/id_ed25519")))
    return Machine(name=name, addr=addr, roles=frozenset({"worker"}), simulated=True, ssh=ssh)


def resolved(addr: str) -> str:
    """Return the IP address of a host, or what was given where nobody knows it."""
    try:
        return socket.gethostbyname(addr)
    except OSError:
        return addr


def real_worker(config: Config, state: State, addr: str) -> Machine:
    """Return a machine by its address, not yet asked for its name."""
    ssh = _ssh(state, config.ssh_user, addr, config.ssh_key)
    return Machine(name=addr, addr=addr, roles=frozenset({"worker"}), ssh=ssh, sudo=config.ssh_user != "root")


def named(machines: Iterable[Machine]) -> list[Machine]:
    """Return the machines with their own short hostnames; each is asked, all at once.

    Before that, where there is a terminal, host keys that are not known yet are shown and asked about, one by one.

    Raises:
        ClusterError: one or more cannot be reached, or let us be root only with a password.
    """
    return on_each(_introduced(machines), _named)


def reached(machines: Iterable[Machine]) -> tuple[list[Machine], list[Silent]]:
    """Return what `named` does of those that can be reached, and the others."""
    answers = on_each(_introduced(machines), _ask)
    return (
        [answer for answer in answers if isinstance(answer, Machine)],
        [answer for answer in answers if isinstance(answer, Silent)],
    )


def answering(machines: Iterable[Machine]) -> list[Machine]:
    """Return those machines that answer, with their own short hostnames; nobody is asked about a host key."""
    return [answer for answer in on_each(machines, _ask) if isinstance(answer, Machine)]


def _ask(machine: Machine) -> Machine | Silent:
    try:
        return _named(machine)
    except ClusterError as error:
        return Silent(machine, error)


def _named(machine: Machine) -> Machine:
    name = machine.run(["hostname", "-s"], timeout_s=CONNECT_TIMEOUT_S + 20).strip()
    return replace(machine, name=name)


def on_each(machines: Iterable[Machine], action: Callable[[Machine], T]) -> list[T]:
    """Do something with every machine at once; return the results in the machines' order.

    Raises:
        ClusterError: it failed on at least one; the message tells of all of them.
    """
    listed = list(machines)
    with ThreadPoolExecutor(max_workers=PARALLEL) as pool:
        futures = [pool.submit(action, machine) for machine in listed]
        try:
            errors = [future.exception() for future in futures]
        except BaseException:  # interrupted: what has not begun does not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for error in errors:
        if error is not None and not isinstance(error, ClusterError):
            raise error
    failed = [
        (machine, error) for machine, error in zip(listed, errors, strict=True) if isinstance(error, ClusterError)
    ]
    if failed:
        message = "\n".join(
            error.message if machine.name in error.message else f"{machine.name}: {error.message}"
            for machine, error in failed
        )
        raise ClusterError(message, failed[0][1].remedy) from failed[0][1]
    return [future.result() for future in futures]


def _introduced(machines: Iterable[Machine]) -> list[Machine]:
    machines = list(machines)
    if _has_terminal():
        for machine in machines:
            _introduce(machine)
    return machines


def _introduce(machine: Machine) -> None:
    """Let ssh ask about a host key that is not known yet. What comes of it the next command there tells."""
    known = _option(machine.ssh, "UserKnownHostsFile")
    if not machine.ssh or machine.simulated:
        return
    argv = ["ssh-keygen", "-F", machine.addr, "-f", known]
    if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
        return
    # The first value of an option counts.
    ssh = [machine.ssh[0], "-o", "StrictHostKeyChecking=ask", "-o", "BatchMode=no", *machine.ssh[1:], "true"]
    print(flush=True)
    with suppress(subprocess.TimeoutExpired):
        subprocess.run(ssh, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=ASK_TIMEOUT_S, check=False)


def _option(ssh: Sequence[str], name: str) -> str:
    return next((word.partition("=")[2] for word in ssh if word.startswith(f"{name}=")), "")


def _has_terminal() -> bool:
    try:
        with open("/dev/tty"):
            return True
    except OSError:
        return False


def _ssh(state: State, user: str, addr: str, key: str) -> tuple[str, ...]:
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "ConnectTimeout": f"{CONNECT_TIMEOUT_S * PATIENCE:.0f}",
        "ServerAliveInterval": f"{ALIVE_INTERVAL_S * PATIENCE:.0f}",
        "ServerAliveCountMax": "3",
        "UserKnownHostsFile": str(state.path("ssh/known_hosts")),
        "GlobalKnownHostsFile": "/dev/null",
        "ControlMaster": "auto",
        "ControlPath": str(state.path("ssh/control-%C")),
        "ControlPersist": str(CONTROL_PERSIST_S),
        "LogLevel": "ERROR",
    }
    if key:
        # An agent with many keys would use up the server's patience before this one is offered.
        settings |= {"IdentityFile": key, "IdentitiesOnly": "yes"}
    words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    return ("ssh", "-F", "/dev/null", "-T", *words, f"{user}@{addr}")
