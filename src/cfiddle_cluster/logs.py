"""What the services said."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from cfiddle_cluster import registry, services, slurm, status
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.config import STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import PATIENCE

TIMEOUT_S = 120 * PATIENCE
LEAST_SECRET_LENGTH = 8


def show(service: str = "") -> None:
    """Print the log of a service, or the last lines of each.

    Raises:
        ClusterError: there is no such service.
    """
    known = _services()
    if not known:
        raise ClusterError("no services run here", "./invoke up starts them")
    if service and service not in known:
        raise ClusterError(f"there is no service {service!r}", f"name one of: {', '.join(known)}")
    chosen = [service] if service else list(known)
    for name in chosen:
        if not service:
            print(f"==> {name}", flush=True)
        tail = [] if service else ["--tail", "50"]
        argv = [docker_cli(), "service", "logs", "--timestamps", *tail, known[name]]
        try:
            subprocess.run(argv, stderr=subprocess.STDOUT, check=False, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            # The engine waits for ever where it has lost one of the service's earlier containers.
            raise ClusterError(
                f"the engine has not come to the end of the log of {name} within {TIMEOUT_S:.0f} s",
                "docker logs, on the machine where its container runs, shows the rest",
            ) from error


def export(config: Config, state: State, directory: Path) -> None:
    """Write the logs of all services and what the cluster looks like into a directory that only its owner can read.

    What cannot be had is said in its file; secrets are taken out.

    Raises:
        ClusterError: the directory cannot be written.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        hide = _redaction(state)
        for name, take in _takes(config, state).items():
            try:
                text = take()
            except (ClusterError, OSError) as error:
                text = f"could not be had: {error}\n"
            file = directory / name
            file.touch(mode=0o600)
            file.write_text(hide(text))
    except OSError as error:
        raise ClusterError(
            f"{directory} cannot be written: {error.strerror}", "name a directory that can be"
        ) from error
    print(f"wrote {directory}", file=sys.stderr)


def redact(text: str, secrets: Iterable[tuple[str, str]]) -> str:
    """Return the text with each secret, given as name and value, replaced by its name."""
    for name, value in secrets:
        text = text.replace(value, f"({name})")
    return text


def _services() -> dict[str, str]:
    """Return the full names of services by their short ones."""
    found = {str(service.name).removeprefix(f"{STACK}_"): str(service.name) for service in services.services()}
    if (
        services.is_manager()
        and run([docker_cli(), "service", "ls", "-q", "--filter", f"name={registry.SERVICE}"], timeout_s=30).strip()
    ):
        found["registry"] = registry.SERVICE
    return found


def _takes(config: Config, state: State) -> dict[str, Callable[[], str]]:
    """Return how each file of an export is made."""

    def command(*argv: str) -> Callable[[], str]:
        return lambda: _output([docker_cli(), *argv])

    def of_slurm(*argv: str) -> Callable[[], str]:
        return lambda: slurm.slurm(argv)

    def status_now() -> str:
        return json.dumps(status.collect(config, state), indent=2) + "\n"

    takes: dict[str, Callable[[], str]] = {
        "status.json": status_now,
        "engine.txt": command("info"),
        "machines.txt": command("node", "ls"),
        "tasks.txt": command("stack", "ps", "--no-trunc", STACK),
        "containers.txt": command("ps", "--all", "--no-trunc", "--filter", "label=cfiddle.cluster"),
        "volumes.txt": command("volume", "ls", "--filter", "label=cfiddle.cluster"),
        "slurm-configuration.txt": of_slurm("scontrol", "show", "config"),
        "slurm-nodes.txt": of_slurm("scontrol", "show", "nodes"),
        "slurm-queue.txt": of_slurm("squeue", "--all", "--format=%i|%u|%P|%T|%r|%M|%N"),
        "slurm-jobs.txt": of_slurm("sacct", "--allusers", "--allocations", "--starttime=now-7days", "--parsable2"),
    }
    for short, name in _services().items():
        takes[f"{short}.log"] = command("service", "logs", "--timestamps", name)
    engine_log = state.path("dockerd.log")
    if engine_log.exists():
        takes["dockerd.log"] = lambda: engine_log.read_text(errors="replace")
    return takes


def _output(argv: list[str]) -> str:
    """Return all that a command writes, also to its standard error."""
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace") + f"\n(cut: not complete after {TIMEOUT_S:.0f} s)\n"
    return done.stdout.decode(errors="replace")


def _redaction(state: State) -> Callable[[str], str]:
    secrets = []
    for path in sorted(state.path("secrets").iterdir()) if state.path("secrets").is_dir() else []:
        value = path.read_text(errors="replace").strip() if path.is_file() else ""
        if len(value) >= LEAST_SECRET_LENGTH:
            secrets.append((path.name, value))
    return lambda text: redact(text, secrets)
