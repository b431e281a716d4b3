"""The tasks as an administrator sees them: their names, their help, and what they say when something is wrong."""

import errno
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tasks
from docker.errors import DockerException
from invoke import Context

from cfiddle_cluster.cluster import Cluster
from cfiddle_cluster.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]

TASKS = (
    "up doctor machines swarm label nfs build distribute deploy add-user remove-user import-users scale add-worker "
    "remove-worker machinefile test-mpi status shell url logs export-logs backup restore down test check "
    "setup-containers free-images import-info ddocker firewall"
).split()


def _invoke(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # By another name than in the tests' own environment: the launcher is to find its Python itself.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [ROOT / "invoke", *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def is_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tasks have a cluster that nothing is known of."""
    monkeypatch.setattr(Cluster, "of", classmethod(lambda _cls, root: object()))


def _exit_of(function: Any) -> Any:
    with pytest.raises(SystemExit) as caught:
        tasks.cluster_task(function)(Context())
    return caught.value.code


def test_list_names_every_task_with_a_line_of_help(tmp_path: Path) -> None:
    done = _invoke("--list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = dict(re.findall(r"^  ([a-z][a-z-]*)(?: \([^)]*\))?\s{2,}(\S.*)$", done.stdout, re.MULTILINE))
    assert set(TASKS) <= set(listed), done.stdout


def test_every_task_explains_itself() -> None:
    for name in TASKS:
        # A task that would hide a module of its own name has a line behind it.
        found = getattr(tasks, f"{name}_", None) or getattr(tasks, name.replace("-", "_"))
        assert found.__doc__, name
        assert found.__doc__.splitlines()[0].endswith("."), name


def test_options_are_those_that_people_are_told_of() -> None:
    assert {"--purge"} <= _flags("down")
    assert {"--json"} <= _flags("status")
    assert {"--json"} <= _flags("doctor")
    assert {"--user", "--command"} <= _flags("shell")
    assert {"--delete-home"} <= _flags("remove-user")
    assert {"--set", "--unset"} <= _flags("firewall")


def _flags(task: str) -> set[str]:
    done = _invoke("--help", task)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z-]+", done.stdout.partition("Options:")[2]))


@pytest.mark.parametrize(
    "name", ["add-user", "import-users", "scale", "add-worker", "remove-worker", "backup", "restore"]
)
def test_task_that_lacks_its_argument_says_so(name: str) -> None:
    done = _invoke(name)
    assert done.returncode == 1
    assert "did not receive required positional arguments" in done.stdout + done.stderr


def test_task_that_does_not_exist_is_said_so() -> None:
    done = _invoke("frobnicate")
    assert done.returncode == 1
    assert "frobnicate" in done.stdout + done.stderr


@pytest.mark.parametrize("count", ["-1", "two", "0"])
def test_number_of_workers_arrives_as_it_was_written(count: str) -> None:
    done = _invoke("scale", count)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: there cannot be {count} workers\n→ ")


@pytest.mark.usefixtures("is_cluster")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ClusterError("port 8888 is in use", "set JUPYTER_PORT"), "error: port 8888 is in use\n→ set JUPYTER_PORT"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: the disk is full\n→ make room"),
        (DockerException("gone"), "error: DockerException: gone\n→ ./invoke doctor"),
        (KeyboardInterrupt(), "interrupted; run the same command again"),
    ],
)
def test_what_goes_wrong_is_one_message(error: BaseException, words: str) -> None:
    def fail(_cluster: Any) -> None:
        raise error

    # sys.exit(TEXT) prints the text and ends with status 1.
    assert str(_exit_of(fail)).startswith(words)


@pytest.mark.usefixtures("is_cluster")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_lost_terminal_interrupts_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    undone = []

    def be_ended(_cluster: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb what is being undone
            undone.append(number)

    before = {found: signal.signal(found, signal.SIG_DFL) for found in (signal.SIGHUP, signal.SIGTERM)}
    try:
        assert str(_exit_of(be_ended)).startswith("interrupted")
    finally:
        for found, handler in before.items():
            signal.signal(found, handler)
    assert undone == [number]


@pytest.mark.usefixtures("is_cluster")
def test_defect_of_ours_is_not_hidden() -> None:
    def fail(_cluster: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tasks.cluster_task(fail)(Context())


@pytest.mark.usefixtures("is_cluster")
def test_exit_status_is_passed_on() -> None:
    assert _exit_of(lambda _cluster: 3) == 3
    tasks.cluster_task(lambda _cluster: 0)(Context())
    tasks.cluster_task(lambda _cluster: None)(Context())


def test_wrong_config_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_root: Path) -> None:
        raise ClusterError("config.sh: LOCAL_WORKERS is 'two'", "correct config.sh")

    monkeypatch.setattr(Cluster, "of", refuse)
    assert _exit_of(lambda _cluster: pytest.fail("it was called")) == (
        "error: config.sh: LOCAL_WORKERS is 'two'\n→ correct config.sh"
    )
