"""What the administrator has set in config.sh, read through the shell that also the scripts source it with."""

import difflib
import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.wait import PATIENCE

CLUSTER = "cfiddle"
STACK = "slurm-stack"
LABEL = f"cfiddle.cluster={CLUSTER}"
STATE_DIR = Path("/var/lib/cfiddle-cluster")

READ_TIMEOUT_S = 10

SIMULATED_NETWORK = ipaddress.IPv4Network("172.31.240.0/24")
SIMULATED_HEAD_ADDR = "172.31.240.1"
MAX_LOCAL_WORKERS = 64

KNOBS = (
    "WORKER_ADDRS",
    "HEAD_ADDR",
    "SSH_USER",
    "SSH_KEY",
    "LOCAL_WORKERS",
    "LOCAL_WORKER_CPUS",
    "LOCAL_WORKER_MEMORY_MB",
    "HOME_ROOT",
    "HOME_STORAGE",
    "HOME_SERVER",
    "JUPYTER_PORT",
    "SSH_PORT",
    "CALIBRATION_LIMIT",
    "TUNE",
    "DOCKERHUB_USERNAME",
    "REGISTRY_PORT",
    "USER_REGISTRY_PORT",
    "DEBIAN_RELEASE",
    "PACKAGES_OF",
)

TUNABLE = ("governor", "boost", "smt", "swap", "counters")

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
_ACCOUNT = re.compile(r"[a-z0-9][a-z0-9._-]*", re.IGNORECASE)
_REGISTRY_ACCOUNT = re.compile(r"([A-Za-z0-9.-]+(:[0-9]+)?/)?[a-z0-9][a-z0-9._-]*")
_SYSTEM = frozenset({"bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "proc", "run", "sbin", "sys", "usr"})
_REMEDY = "correct config.sh; its comments say what each setting means"

# What a setting may be written with; whatever else the caller's environment has says nothing about the cluster.
_KEPT = [f"{name}={os.environ[name]}" for name in ("HOME", "PATH", "USER") if name in os.environ]

# Prints the settings, NUL-separated, and names that look like settings but are none (`?NAME`).
_READ = r"""
set -a -u
before=" $(compgen -v | tr '\n' ' ') before "
source "$1" >&2 || exit 1
for name in $(compgen -v); do
    [[ $name =~ ^[A-Z][A-Z0-9_]*$ && $name != BASH* && $name != PIPESTATUS ]] || continue
    if [[ " $2 " == *" $name "* ]]; then
        printf '%s=%s\0' "$name" "${!name}"
    elif [[ $before != *" $name "* ]]; then
        printf '?%s\0' "$name"
    fi
done
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What config.sh says; the comments there explain each setting.

    Attributes:
        root: the checkout.
        local_worker_cpus: CPUs of a simulated worker as told to Slurm; 0 for the machine's own, shared out.
        local_worker_memory_mb: its memory in megabytes; 0 likewise.
        ssh_port: of the users' node, for SSH from elsewhere; 0 for none.
        calibration_limit: percent by which a worker may be slower than its fellows.
        tune: which of `TUNABLE` may be set on real workers.
        state_dir: where secrets and the list of users are kept.
    """

    root: Path
    head_addr: str
    worker_addrs: tuple[str, ...]
    ssh_user: str
    ssh_key: str
    local_workers: int
    local_worker_cpus: int
    local_worker_memory_mb: int
    home_root: Path
    home_storage: str
    home_server: str
    jupyter_port: int
    ssh_port: int
    calibration_limit: int
    tune: frozenset[str]
    dockerhub_username: str
    registry_port: int
    user_registry_port: int
    debian_release: str
    packages_of: str
    state_dir: Path = STATE_DIR

    @property
    def simulated(self) -> bool:
        """Whether the workers are simulated machines on this one."""
        return not self.worker_addrs


def load(root: Path) -> Config:
    """Read config.sh of a checkout.

    Raises:
        ClusterError: it cannot be read, or settings are wrong: all of them in one message.
    """
    return from_settings(root, _read(root / "config.sh"))


def from_settings(root: Path, settings: Mapping[str, str]) -> Config:
    """Check the settings and make the configuration of them.

    Raises:
        ClusterError: settings are wrong: all of them in one message.
    """
    faults: list[str] = []

    def number(name: str, least: int, most: int) -> int:
        text = settings.get(name, "")
        if re.fullmatch(r"-?[0-9]{1,9}", text) and least <= int(text) <= most:
            return int(text)
        faults.append(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
        return least

    def text(name: str, pattern: re.Pattern[str], meaning: str) -> str:
        value = settings.get(name, "")
        if value and not pattern.fullmatch(value):
            faults.append(f"{name} is {value!r}, which is no {meaning}")
        return value

    workers = tuple(settings.get("WORKER_ADDRS", "").split())
    faults += [f"WORKER_ADDRS has {addr!r}, which is no address" for addr in workers if not _HOST.fullmatch(addr)]
    faults += [f"WORKER_ADDRS has {addr} twice" for addr in sorted({a for a in workers if workers.count(a) > 1})]
    head = text("HEAD_ADDR", _HOST, "address") or _own_address(workers)
    server = text("HOME_SERVER", _HOST, "address")
    storage = settings.get("HOME_STORAGE", "") or ("nfs" if workers or server else "bind")
    if storage not in ("bind", "nfs"):
        faults.append(f"HOME_STORAGE is {storage!r}; it must be bind, nfs or empty")
    elif storage == "bind" and [addr for addr in workers if addr != head]:
        faults.append("HOME_STORAGE=bind reaches no other machine than the head: with WORKER_ADDRS set it must be nfs")
    elif storage == "bind" and server:
        faults.append("HOME_SERVER is set, but HOME_STORAGE is bind: it must be nfs")
    home_root = settings.get("HOME_ROOT", "")
    if not re.fullmatch(r"/[^\s:,'\"\\$]+", home_root) or ".." in home_root.split("/"):
        faults.append(f"HOME_ROOT is {home_root!r}; it must be an absolute path without blanks, commas and colons")
    elif server in ("", head) and _is_of_the_system(Path(home_root)):
        faults.append(
            f"HOME_ROOT is {home_root}, which is the machine's own; it must be a directory for the homes alone, "
            "two levels deep or more, as /srv/cfiddle-cluster/home is"
        )
    tune = settings.get("TUNE", "").split()
    if others := sorted(set(tune) - set(TUNABLE)):
        faults.append(f"TUNE has {', '.join(others)}; it may have {', '.join(TUNABLE)}")
    ssh_key = settings.get("SSH_KEY", "")
    if ssh_key and not Path(ssh_key).expanduser().is_file():
        faults.append(f"SSH_KEY is {ssh_key!r}; there is no such file")
    config = Config(
        root=root,
        head_addr=head,
        worker_addrs=workers,
        ssh_user=text("SSH_USER", _ACCOUNT, "account's name") or "root",
        ssh_key=str(Path(ssh_key).expanduser()) if ssh_key else "",
        local_workers=number("LOCAL_WORKERS", 1, MAX_LOCAL_WORKERS),
        local_worker_cpus=number("LOCAL_WORKER_CPUS", 0, 1024),
        local_worker_memory_mb=number("LOCAL_WORKER_MEMORY_MB", 0, 4 << 20),
        home_root=Path(home_root),
        home_storage=storage,
        home_server=server,
        jupyter_port=number("JUPYTER_PORT", 1, 65535),
        ssh_port=number("SSH_PORT", 1, 65535) if settings.get("SSH_PORT") else 0,
        calibration_limit=number("CALIBRATION_LIMIT", 1, 1000),
        tune=frozenset(tune),
        dockerhub_username=text("DOCKERHUB_USERNAME", _REGISTRY_ACCOUNT, "account's name"),
        registry_port=number("REGISTRY_PORT", 1, 65535),
        user_registry_port=number("USER_REGISTRY_PORT", 1, 65535),
        debian_release=text("DEBIAN_RELEASE", re.compile("[a-z]+"), "release of Debian") or "trixie",
        packages_of=text("PACKAGES_OF", re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}"), "day"),
    )
    ports = {
        "JUPYTER_PORT": config.jupyter_port,
        "REGISTRY_PORT": config.registry_port,
        "USER_REGISTRY_PORT": config.user_registry_port,
        "SSH_PORT": config.ssh_port,
    }
    faults += [
        f"{one} and {other} are both {ports[one]}"
        for one, other in combinations(ports, 2)
        if ports[one] == ports[other]
    ]
    if not head:
        faults.append(
            "HEAD_ADDR is empty, and the way to the first worker does not tell this machine's address; set it"
        )
    if faults:
        raise ClusterError("config.sh: " + "\n           ".join(faults), _REMEDY)
    return config


def _read(path: Path) -> dict[str, str]:
    checked = subprocess.run(
        ["bash", "-n", path], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if checked.returncode:
        raise ClusterError(f"config.sh cannot be read:\n{checked.stderr.strip()}", "correct the line it names")
    argv = ["env", "-i", *_KEPT, "bash", "--noprofile", "--norc", "-c", _READ, "bash", str(path), " ".join(KNOBS)]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=READ_TIMEOUT_S * PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"config.sh does not end within {READ_TIMEOUT_S * PATIENCE:.0f} s", "it must only set things"
        ) from error
    if done.returncode:
        raise ClusterError(f"config.sh cannot be read:\n{done.stderr.strip()}", "correct the line it names")
    words = done.stdout.split("\0")[:-1]
    unknown = [word[1:] for word in words if word.startswith("?")]
    if unknown:
        raise ClusterError("config.sh: " + "; ".join(_unknown(name) for name in unknown), _REMEDY)
    return dict(word.split("=", 1) for word in words)


def _is_of_the_system(directory: Path) -> bool:
    """Whether a directory is one that every machine has, or in one where only packages put anything (hier(7))."""
    parts = directory.parts[1:]
    return len(parts) < 2 or parts[0] in _SYSTEM or (parts[0] == "var" and len(parts) < 3)


def _own_address(workers: tuple[str, ...]) -> str:
    """Return the address from which this machine reaches the first worker; nothing is sent."""
    if not workers:
        return SIMULATED_HEAD_ADDR
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((workers[0], 22))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, KNOBS, n=1)
    return f"{name} is no setting" + (f" (did you mean {near[0]}?)" if near else "")
