"""Packages and the engine: what is installed when, and what is said where it cannot be."""

import os
import subprocess
from pathlib import Path

import pytest

from cfiddle_cluster import packages
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from samples import config


@pytest.fixture
def bin_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put commands in front of the machine's own, which write down how they were called."""
    found = tmp_path / "bin"
    found.mkdir()
    monkeypatch.setenv("PATH", f"{found}:{os.environ['PATH']}")
    return found


def _command(path: Path, text: str = "") -> None:
    path.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >>{path.parent}/calls\n{text}\n')
    path.chmod(0o755)


def _calls(path: Path) -> list[str]:
    calls = path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def _dpkg(path: Path, *installed: str) -> None:
    """Say of some packages that they are installed, and of `removed` that only its configuration is left."""
    known = "\n".join(f"*' {name}') printf 'ii ' ;;" for name in installed)
    _command(path / "dpkg-query", f"case \" $*\" in\n{known}\n*' removed') printf 'rc ' ;;\n*) exit 1 ;;\nesac")


def test_only_missing_packages_are_installed(bin_path: Path) -> None:
    _dpkg(bin_path, "openssl", "ssh")
    _command(bin_path / "apt-get", 'echo "frontend $DEBIAN_FRONTEND" >>"${0%/*}/calls"')
    packages.ensure_packages(["openssl", "mmdebstrap", "removed", "ssh"])
    assert [call for call in _calls(bin_path) if not call.startswith("dpkg")] == [
        "apt-get update -q",
        "frontend noninteractive",
        "apt-get install -q -y --no-install-recommends mmdebstrap removed",
        "frontend noninteractive",
    ]


def test_nothing_is_done_where_nothing_is_missing(bin_path: Path) -> None:
    _dpkg(bin_path, "openssl")
    _command(bin_path / "apt-get", "exit 1")
    packages.ensure_packages(["openssl"])
    packages.ensure_packages([])
    assert not [call for call in _calls(bin_path) if call.startswith("apt-get")]


def test_installation_that_fails_is_told_with_apt_s_words(bin_path: Path) -> None:
    _dpkg(bin_path)
    _command(bin_path / "apt-get", "echo 'E: Unable to locate package mmdebstrap' >&2; exit 100")
    with pytest.raises(ClusterError, match="mmdebstrap cannot be installed:\nE: Unable to locate"):
        packages.ensure_packages(["mmdebstrap"])


def test_system_without_apt_is_told_what_it_lacks(bin_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _dpkg(bin_path)
    monkeypatch.setattr(packages.shutil, "which", lambda _command: None)
    with pytest.raises(ClusterError, match="lacks mmdebstrap and has no apt-get") as caught:
        packages.ensure_packages(["mmdebstrap"])
    assert caught.value.remedy == "install them by hand"


def test_system_without_dpkg_has_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ClusterError, match="has no apt-get"):
        packages.ensure_packages(["openssl"])


def test_commands_that_are_there_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(packages, "ensure_packages", asked.append)
    monkeypatch.setattr(packages.shutil, "which", lambda command, path: None if command == "ip" else f"/bin/{command}")
    packages.ensure_commands()
    assert asked == [["iproute2"]]


@pytest.mark.parametrize("systemd", [True, False])
def test_what_the_tests_need_is_installed_and_no_server_is_started(
    systemd: bool, monkeypatch: pytest.MonkeyPatch, bin_path: Path
) -> None:
    _dpkg(bin_path)
    for name in ("apt-get", "systemctl"):
        _command(bin_path / name)
    monkeypatch.setattr(packages.shutil, "which", lambda command, path=None: command if command == "apt-get" else None)
    monkeypatch.setattr(packages.Path, "is_dir", lambda path: systemd)
    packages.ensure_test_commands()
    calls = [call for call in _calls(bin_path) if not call.startswith("dpkg")]
    install = "apt-get install -q -y --no-install-recommends sudo openssh-server"
    if not systemd:
        assert calls == ["apt-get update -q", install]
        return
    units = "ssh.service ssh.socket"
    assert calls == [
        f"systemctl mask --runtime {units}",
        "apt-get update -q",
        install,
        f"systemctl disable {units}",
        f"systemctl unmask --runtime {units}",
    ]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an environment whose pip can install nothing where a file `broken` is."""
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/development.lock").write_text("one==1\n")
    found = tmp_path / "environment"
    found.mkdir()
    _command(found / "python", f"[ ! -e {found}/broken ] || {{ echo no index; exit 1; }}")
    monkeypatch.setattr(packages.sys, "prefix", str(found))
    monkeypatch.setattr(packages.sys, "executable", str(found / "python"))
    return found


def test_packages_of_developers_are_installed_once_for_each_lock_file(environment: Path) -> None:
    root = environment.parent
    for text in ("one==1\n", "one==1\n", "one==2\n"):
        (root / "requirements/development.lock").write_text(text)
        packages.ensure_development_packages(root)
    calls = _calls(environment)
    assert len(calls) == 2
    assert all(call.endswith(f"--require-hashes --requirement {root}/requirements/development.lock") for call in calls)


def test_packages_of_developers_that_cannot_be_installed_are_tried_again(environment: Path) -> None:
    root = environment.parent
    (environment / "broken").touch()
    with pytest.raises(ClusterError, match=r"development\.lock cannot be installed:\nno index"):
        packages.ensure_development_packages(root)
    (environment / "broken").unlink()
    packages.ensure_development_packages(root)
    assert len(_calls(environment)) == 2


def test_ordinary_user_is_told_to_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    packages.ensure_root()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match="needs root") as caught:
        packages.ensure_root()
    assert "sudo ./invoke" in caught.value.remedy


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> State:
    found = State(tmp_path / "state")
    found.directory.mkdir()
    return found


@pytest.fixture(autouse=True)
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a docker client of a version that builds by itself."""
    found = tmp_path / "client"
    found.mkdir()
    _command(found / "docker", 'case "$1" in version) echo 20.10.24+dfsg1 ;; *) exit 1 ;; esac')
    monkeypatch.setattr(packages, "docker_cli", lambda: str(found / "docker"))
    return found


@pytest.mark.parametrize(
    ("version", "has_plugin", "installed"),
    [("20.10.24+dfsg1", False, []), ("26.1.5+dfsg1", False, [["docker-buildx"]]), ("28.2.2", True, [])],
)
def test_client_that_builds_with_a_plugin_only_gets_it(
    client: Path, monkeypatch: pytest.MonkeyPatch, version: str, has_plugin: bool, installed: list[list[str]]
) -> None:
    _command(client / "docker", f'case "$1" in version) echo {version} ;; *) exit {0 if has_plugin else 1} ;; esac')
    asked: list[list[str]] = []
    monkeypatch.setattr(packages, "ensure_packages", asked.append)
    packages.ensure_builder()
    assert asked == installed


def _install(tmp_path: Path, text: str) -> None:
    script = tmp_path / "install_docker.sh"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def test_engine_that_runs_is_let_alone(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.engine, "is_running", lambda: True)
    _install(tmp_path, "exit 1")
    packages.ensure_engine(config(tmp_path), state)


def test_engine_that_does_not_run_is_started(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.engine, "is_running", lambda: False)
    _install(tmp_path, 'echo started >"$DOCKERD_LOG"')
    packages.ensure_engine(config(tmp_path), state)
    assert state.path("dockerd.log").read_text() == "started\n"


def test_engine_that_does_not_start_is_told_with_the_end_of_its_log(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.engine, "is_running", lambda: False)
    _install(tmp_path, 'seq 100 >"$DOCKERD_LOG"; echo "no space left" >>"$DOCKERD_LOG"; echo timed out >&2; exit 1')
    with pytest.raises(ClusterError, match="Docker Engine does not start") as caught:
        packages.ensure_engine(config(tmp_path), state)
    lines = caught.value.message.splitlines()
    assert lines[1] == "timed out"
    assert lines[-2:] == ["100", "no space left"]
    assert "90" not in lines
    assert "./install_docker.sh" in caught.value.remedy


# --- install_docker.sh -----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).resolve().parents[2] / "install_docker.sh"


def _run_script(
    tmp_path: Path, *, dockerd: bool, systemd: bool, user: int = 0, known: str = ""
) -> tuple[int, str, list[str]]:
    """Run the script among commands of our own; return its status, what it says, and what it called."""
    commands = tmp_path / "bin"
    commands.mkdir()
    started = commands / "started"
    _command(commands / "docker", f"test -e {started}")
    for name in ("systemctl", "dockerd"):
        _command(commands / name, f": >{started}")
    _command(commands / "setsid", 'shift; exec "$@"')
    _command(commands / "apt-get", f"case $1 in install) cp {commands}/dockerd {commands}/installed ;; esac")
    _command(commands / "apt-cache", f'case " {known} " in *" $2 "*) ;; *) exit 100 ;; esac')
    text = SCRIPT.read_text()
    for real, ours in {
        "/usr/bin/dockerd": str(commands / ("dockerd" if dockerd else "installed")),
        "/usr/sbin/dockerd": "/nonexistent",
        "/usr/bin/docker ": f"{commands}/docker ",
        "/run/systemd/system": str(tmp_path if systemd else tmp_path / "none"),
        "PATH=/usr/local/sbin:/usr/sbin:/sbin:$PATH ": "",
        "EUID": str(user),
    }.items():
        assert real in text, f"{real} is not in install_docker.sh any more"
        text = text.replace(real, ours)
    script = tmp_path / "install.sh"
    script.write_text(text)
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "DOCKERD_LOG": str(tmp_path / "log")}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False, timeout=30)
    asked = ("docker ", "apt-cache ")
    return done.returncode, done.stderr, [call for call in _calls(commands) if not call.startswith(asked)]


def test_script_installs_and_starts_an_engine_where_there_is_none(tmp_path: Path) -> None:
    status, _, calls = _run_script(tmp_path, dockerd=False, systemd=True)
    assert (status, [call.split()[0] for call in calls]) == (0, ["apt-get", "apt-get", "systemctl"])
    assert calls[1].endswith(" ca-certificates docker.io iptables")
    assert calls[2] == "systemctl enable --now docker"


def test_script_installs_client_and_builder_where_they_are_packages_of_their_own(tmp_path: Path) -> None:
    _, _, calls = _run_script(tmp_path, dockerd=False, systemd=True, known="docker-cli docker-buildx")
    assert calls[1].endswith(" docker.io iptables docker-buildx docker-cli")


def test_script_starts_an_engine_itself_where_nobody_else_does(tmp_path: Path) -> None:
    status, _, calls = _run_script(tmp_path, dockerd=True, systemd=False)
    assert (status, [call.split()[0] for call in calls]) == (0, ["setsid", "dockerd"])


def test_script_wants_root(tmp_path: Path) -> None:
    status, said, calls = _run_script(tmp_path, dockerd=True, systemd=True, user=1000)
    assert (status, said, calls) == (1, "error: run it as root, or with sudo\n", [])


def test_what_virtual_machines_need_is_named_and_not_installed(bin_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _command(bin_path / "apt-get")
    there = ("ssh", "mmdebstrap", "mkfs.ext4")
    monkeypatch.setattr(packages.shutil, "which", lambda command, path: command if command in there else None)
    with pytest.raises(ClusterError) as caught:
        packages.refuse_missing_machines_test_commands()
    assert caught.value.remedy == "apt-get install qemu-system-x86 qemu-utils vde2"
    assert not _calls(bin_path)


def test_nothing_is_said_where_virtual_machines_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda command, path: command)
    packages.refuse_missing_machines_test_commands()
