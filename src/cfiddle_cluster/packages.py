"""What the head's operating system must have: packages, and a running engine."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cfiddle_cluster import engine
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State

INSTALL_TIMEOUT_S = 900
FIRST_WITH_PLUGIN = 23

COMMANDS = {"ssh": "openssh-client", "openssl": "openssl", "ip": "iproute2"}
"""The commands that the head needs, and the packages of Debian and Ubuntu that have them."""

TEST_COMMANDS = {"sudo": "sudo", "sshd": "openssh-server"}
"""What the tests drive besides, likewise."""

MACHINES_TEST_COMMANDS = {
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "vde_switch": "vde2",
}
"""What makes and boots virtual machines, likewise."""

_SSH_UNITS = ("ssh.service", "ssh.socket")


def ensure_root() -> None:
    """Raise `ClusterError` unless we are root."""
    if os.geteuid():
        raise ClusterError(
            "this needs root: it drives the machine's engine and keeps the cluster's secrets", "sudo ./invoke …"
        )


def ensure_packages(packages: Iterable[str]) -> None:
    """Install those packages that are missing.

    Raises:
        ClusterError: there is no apt-get, or it fails.
    """
    missing = [package for package in packages if not is_installed(package)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(f"this machine lacks {' '.join(missing)} and has no apt-get", "install them by hand")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing]
    try:
        run(["apt-get", "update", "-q"], timeout_s=INSTALL_TIMEOUT_S, env=environment)
        run(install, timeout_s=INSTALL_TIMEOUT_S, env=environment)
    except CommandError as error:
        raise ClusterError(
            f"{' '.join(missing)} cannot be installed:\n{error.output}", "mend what apt-get says"
        ) from error


def ensure_commands() -> None:
    """Install the packages of those commands that the head lacks."""
    ensure_packages([package for command, package in COMMANDS.items() if not shutil.which(command, path=_PATH)])


def ensure_test_commands() -> None:
    """Install what only the tests need; they start an SSH server of their own, so the package's does not run."""
    missing = [package for command, package in TEST_COMMANDS.items() if not shutil.which(command, path=_PATH)]
    is_new_server = "openssh-server" in missing and Path("/run/systemd/system").is_dir()
    if is_new_server:
        run(["systemctl", "mask", "--runtime", *_SSH_UNITS], timeout_s=60)
    try:
        ensure_packages(missing)
        if is_new_server:
            run(["systemctl", "disable", *_SSH_UNITS], timeout_s=60)
    finally:
        if is_new_server:
            run(["systemctl", "unmask", "--runtime", *_SSH_UNITS], timeout_s=60)


def ensure_development_packages(root: Path) -> None:
    """Have what checks and tests need of Python in the environment that runs this, as a checkout's lock file says.

    Raises:
        ClusterError: pip fails.
    """
    lock, installed = root / "requirements" / "development.lock", Path(sys.prefix) / "development-from"
    with open(f"{sys.prefix}.lock", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        if installed.exists() and installed.read_bytes() == lock.read_bytes():
            return
        print(f"installing {lock.relative_to(root)}, once", file=sys.stderr, flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes"]
        try:
            run([*pip, "--requirement", lock], timeout_s=INSTALL_TIMEOUT_S)
        except CommandError as error:
            raise ClusterError(
                f"the Python packages of requirements/{lock.name} cannot be installed:\n{error.output}",
                "mend what pip says; this machine must reach a package index, or a mirror set in pip.conf",
            ) from error
        shutil.copyfile(lock, installed)


def refuse_missing_machines_test_commands() -> None:
    """Raise `ClusterError` where the tests on virtual machines lack a command: nobody gets an emulator unasked."""
    missing = {package for command, package in MACHINES_TEST_COMMANDS.items() if not shutil.which(command, path=_PATH)}
    if missing:
        raise ClusterError("virtual machines cannot be made here", f"apt-get install {' '.join(sorted(missing))}")


def ensure_engine(config: Config, state: State) -> None:
    """Install Docker Engine if there is none, start it if it does not run, and have what it builds images with.

    Raises:
        ClusterError: it does not start; the message has the end of its log.
    """
    if not engine.is_running():
        _start_engine(config, state)
    ensure_builder()


def ensure_builder() -> None:
    """Install the plugin that the docker client builds images with, if it is of a version that needs one.

    Since 23.0 it does (docs.docker.com/engine/release-notes/23.0), and the engine's package does not bring it.
    """
    version = run([docker_cli(), "version", "--format", "{{.Client.Version}}"], timeout_s=30)
    if int(version.partition(".")[0]) >= FIRST_WITH_PLUGIN and not _has_builder():
        ensure_packages(["docker-buildx"])


def _has_builder() -> bool:
    try:
        run([docker_cli(), "buildx", "version"], timeout_s=30)
    except CommandError:
        return False
    return True


def _start_engine(config: Config, state: State) -> None:
    log = state.path("dockerd.log")
    environment = os.environ | {"DOCKERD_LOG": str(log)}
    try:
        run([config.root / "install_docker.sh"], timeout_s=INSTALL_TIMEOUT_S, env=environment)
    except CommandError as error:
        tail = log.read_text(errors="replace").splitlines()[-10:] if log.exists() else []
        raise ClusterError(
            "\n".join(["Docker Engine does not start:", error.output, *tail]),
            "mend what it says; ./install_docker.sh alone does just this step",
        ) from error


def is_installed(package: str) -> bool:
    """Whether a package of Debian's or Ubuntu's is installed on this machine."""
    argv = ["dpkg-query", "--show", "--showformat", "${db:Status-Abbrev}", package]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return False
    return done.stdout.startswith("ii")


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
