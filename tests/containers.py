"""A container of one image, as a test sees it: commands in it, its health, and what its log complains of."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cfiddle_cluster import simulated
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.wait import wait_until

COMPLAINT = re.compile(r"\b(warn(ing)?|error|critical|fatal|traceback)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Container:
    """A container of a test.

    Attributes:
        name: its name, unique to the test.
    """

    name: str

    def run(self, *argv: str, user: str = "", input: str | bytes | None = None, timeout_s: float = 30) -> str:
        """Run a command in it and return what it wrote; raise if it fails."""
        options = ["--user", user] if user else []
        return run([docker_cli(), "exec", "-i", *options, self.name, *argv], timeout_s=timeout_s, input=input)

    def inspect(self, form: str) -> str:
        """Return what `docker inspect` says in a Go template."""
        return run([docker_cli(), "inspect", "--format", form, self.name], timeout_s=30).strip()

    @property
    def address(self) -> str:
        """Its address on the engine's bridge."""
        return self.inspect("{{.NetworkSettings.IPAddress}}")

    def log(self) -> str:
        """Return everything that it logged."""
        argv = [docker_cli(), "logs", self.name]
        return subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30, check=True
        ).stdout

    def complaints(self, *, but: str = "$^") -> list[str]:
        """Return the lines of its log that warn or complain, except those that match `but`."""
        return [line for line in self.log().splitlines() if COMPLAINT.search(line) and not re.search(but, line)]

    def wait_until_healthy(self, timeout_s: float = 60) -> float:
        """Wait for its health check to pass; return how long that took."""
        began = time.monotonic()
        wait_until(
            lambda: self.inspect("{{.State.Health.Status}} {{.State.Running}}") == "healthy true",
            timeout_s=timeout_s,
            what=f"{self.name} healthy",
        )
        return time.monotonic() - began

    def wait_until_ended(self, timeout_s: float = 30) -> int:
        """Wait for its end and return its exit status."""
        wait_until(
            lambda: self.inspect("{{.State.Running}}") == "false", timeout_s=timeout_s, what=f"{self.name} ended"
        )
        return int(self.inspect("{{.State.ExitCode}}"))

    def stop(self) -> None:
        """Ask it to end, and kill it if it does not within ten seconds."""
        run([docker_cli(), "stop", self.name], timeout_s=40)

    def restart(self) -> None:
        """End it and start it again, with what it has on disk."""
        run([docker_cli(), "restart", self.name], timeout_s=40)


Start = Callable[..., Container]
"""What starts a container: an image's short name, a command, and `options` of docker run."""


def machine_options(authorized_keys: Path, volume: str = "") -> list[str]:
    """Return the options of docker run with which a container of the image `machine` is a machine."""
    argv = ["--cgroupns", "private", "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"]
    argv += ["--device-cgroup-rule", "a *:* rwm", "--volume", f"{authorized_keys}:/etc/ssh/authorized_keys:ro"]
    for capability in simulated.capabilities(Path("/proc/self/status").read_text()):
        argv += ["--cap-add", capability]
    return [*argv, "--volume", f"{volume}:/var/lib/docker"] if volume else argv
