"""Wrong input gets one clear message with what to do, exit status 1, and changes nothing."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfiddle_cluster import machines
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State
from live import NOBODY, LiveCluster, Result, copy_of_checkout, docker, run, task_of


@pytest.fixture
def checkout(cluster: LiveCluster, tmp_path: Path) -> Iterator[Path]:
    """Make a second checkout, whose config.sh can be spoilt; prove that the cluster did not change meanwhile."""
    root = copy_of_checkout(tmp_path / "checkout")
    before = _state(cluster)
    yield root
    assert _state(cluster) == before


def _state(cluster: LiveCluster) -> tuple[object, ...]:
    return (
        docker("ps", "-q", "--no-trunc").ok().split(),
        docker("node", "ls", "-q").ok().split(),
        cluster.nodes(),
        (cluster.config.state_dir / "users.json").read_text(),
    )


def _refused(result: Result, *words: str) -> None:
    assert result.exit_status == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.output, result.output
    errors = [line for line in result.output.splitlines() if "error" in line.lower() or "failed" in line.lower()]
    assert errors, result.output


def _set(root: Path, text: str) -> None:
    with (root / "config.sh").open("a") as file:
        file.write(f"\n{text}\n")


def _up(root: Path, timeout_s: float = 120) -> Result:
    return run(task_of(root, "up"), cwd=root, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("HEAD_ADDR=(", ["config.sh"]),
        ("LOCAL_WORKER=3", ["LOCAL_WORKER", "LOCAL_WORKERS"]),
        ("LOCAL_WORKERS=many", ["LOCAL_WORKERS", "many"]),
        ("LOCAL_WORKERS=-1", ["LOCAL_WORKERS", "-1"]),
        ("JUPYTER_PORT=99999", ["JUPYTER_PORT", "99999"]),
        ("HOME_STORAGE=floppy", ["HOME_STORAGE", "floppy"]),
        ("WORKER_ADDRS=10.9.9.9 HOME_STORAGE=bind", ["HOME_STORAGE"]),
        ("HOME_ROOT=/home", ["HOME_ROOT"]),
        ("JUPYTER_PORT=5000", ["REGISTRY_PORT"]),
        ("LOCAL_WORKERS=$(nonsense", ["config.sh"]),
        ("HEAD_ADDR=not-an-address!", ["HEAD_ADDR"]),
        ("WORKER_ADDRS='10.0.0.1 10.0.0.1'", ["10.0.0.1"]),
    ],
)
def test_config_with_a_wrong_value(checkout: Path, line: str, words: list[str]) -> None:
    _set(checkout, line)
    _refused(_up(checkout, 60), *words)


def test_config_names_everything_that_is_wrong_at_once(checkout: Path) -> None:
    _set(checkout, "LOCAL_WORKERS=many\nJUPYTER_PORT=99999\nHOME_STORAGE=floppy")
    _refused(_up(checkout, 60), "LOCAL_WORKERS", "JUPYTER_PORT", "HOME_STORAGE")


def test_head_address_of_another_machine(checkout: Path) -> None:
    _set(checkout, "HEAD_ADDR=203.0.113.1")
    _refused(_up(checkout), "203.0.113.1")


def test_real_workers_beside_simulated_ones(checkout: Path) -> None:
    _set(checkout, f"WORKER_ADDRS={NOBODY}")
    _refused(_up(checkout), "c1, c2", "./invoke down")


def test_worker_that_cannot_be_reached(cluster: LiveCluster) -> None:
    machine = machines.real_worker(cluster.config, State(cluster.config.state_dir), NOBODY)
    with pytest.raises(ClusterError, match=NOBODY) as caught:
        machines.named([machine])
    assert "config.sh" in caught.value.remedy


def test_port_that_is_in_use(checkout: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        _set(checkout, f"JUPYTER_PORT={port}")
        _refused(_up(checkout), str(port))


def test_user_without_rights(checkout: Path) -> None:
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", "HOME=/nonexistent"]
    for parent in (checkout, *checkout.parents):
        if parent != Path("/") and parent.stat().st_uid == 0 and "pytest" in str(parent):
            parent.chmod(0o755)
    result = run([*become, checkout / "invoke", "up"], cwd=checkout, timeout_s=60)
    assert result.exit_status == 1, result.output
    assert "root" in result.output or "sudo" in result.output
    assert "Traceback" not in result.output


def test_disk_without_room_for_homes(checkout: Path) -> None:
    full = checkout / "full"
    full.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "nr_inodes=2,size=4k", "tmpfs", full]).ok()
    (full / "last").touch()
    try:
        _set(checkout, f"HOME_ROOT={full}/home")
        _refused(_up(checkout), str(full))
    finally:
        run(["umount", full]).ok()
