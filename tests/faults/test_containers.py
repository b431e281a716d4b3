"""What users' containers and their jobs depend on fails: none runs without a job, and the commands say what is."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from live import CommandFailed, LiveCluster, Result, UsersContainer, run, wait_until

USER = "test_user1"
NAME = "my_task_container_0"


@pytest.fixture(autouse=True)
def _nobody_has_containers(cluster: LiveCluster, _left_idle: None) -> Iterator[None]:
    cluster.remove_containers(USER)
    yield
    cluster.remove_containers(USER)


@pytest.fixture
def running(cluster: LiveCluster) -> UsersContainer:
    """Return a container that runs, with something on its disk."""
    cluster.user(["cm", "run", "--cmd", "echo kept >/tmp/kept"], USER).ok()
    [found] = cluster.containers(USER)
    assert found.state == "running"
    return found


def _job(cluster: LiveCluster) -> int:
    return int(cluster.slurm(f"squeue -h -u {USER} -o %A"))


def _cm(cluster: LiveCluster, *words: str) -> Result:
    return cluster.user(["cm", *words], USER)


def _state(cluster: LiveCluster, container: UsersContainer) -> str:
    form = "{{.State.Status}}"
    return cluster.on_worker(container.worker, ["docker", "inspect", "-f", form, container.id]).stdout.strip()


def _began(cluster: LiveCluster, container: UsersContainer) -> str:
    form = "{{.State.StartedAt}}"
    return cluster.on_worker(container.worker, ["docker", "inspect", "-f", form, container.id]).ok().strip()


def _wait_until_stopped(cluster: LiveCluster, container: UsersContainer, *, timeout_s: float) -> None:
    wait_until(lambda: _state(cluster, container) == "exited", timeout_s=timeout_s, what="the container is stopped")


def _wait_until_starts(cluster: LiveCluster, container: UsersContainer) -> None:
    """Wait until it starts again where it was, with what it had."""
    kept = "command output:\nkept\n"
    what = "it starts again"
    words = ("run", "--name", container.name, "--cmd", "cat /tmp/kept")
    wait_until(lambda: _cm(cluster, *words).stdout == kept, timeout_s=120, interval_s=2, what=what)
    [found] = cluster.containers(USER)
    assert (found.id, found.state) == (container.id, "running")


def _new_service(cluster: LiveCluster, service: str, worker: str, old: str) -> None:
    def look() -> bool:
        with contextlib.suppress(CommandFailed):  # its engine may be away
            return cluster.container(service, worker) not in ("", old)
        return False

    wait_until(look, timeout_s=90, what=f"{service} of {worker} runs again")


def test_container_outlives_its_agent_and_is_the_next_one_s(cluster: LiveCluster, running: UsersContainer) -> None:
    job, began = _job(cluster), _began(cluster, running)
    old = cluster.container("agent", running.worker)
    command = cluster.background(["cm", "run", "--name", NAME, "--cmd", "echo begun; sleep 300"], USER)
    command.wait_for_line("begun", timeout_s=20)
    cluster.in_service("agent", "kill -9 $(pidof python3)", running.worker).ok()
    result = command.wait(timeout_s=20)
    assert result.exit_status == 1
    assert f"{running.worker} went away while the command ran" in result.stdout
    _new_service(cluster, "agent", running.worker, old)
    listed = f"'NAME': '{NAME}'.*'STATUS': 'running'"
    wait_until(lambda: re.search(listed, _cm(cluster, "list").stdout), timeout_s=60, what="cm list shows it")
    # Longer than a new agent waits for those who come for theirs.
    wait_until(lambda: str(job) in _cm(cluster, "list", "--table").stdout, timeout_s=15, what="it is in its job again")
    assert (_began(cluster, running), _job(cluster)) == (began, job)
    assert _cm(cluster, "run", "--name", NAME, "--cmd", "cat /tmp/kept").ok() == "command output:\nkept\n"
    cluster.user(["scancel", str(job)], USER).ok()
    _wait_until_stopped(cluster, running, timeout_s=3)


@pytest.mark.slow
def test_container_is_stopped_by_an_agent_that_was_away_too_long_for_its_job(
    cluster: LiveCluster, running: UsersContainer
) -> None:
    job = _job(cluster)
    agents = "docker ps -q --filter label=com.docker.swarm.service.name=slurm-stack_agent"
    away = f"timeout 45 sh -c 'while :; do {agents} | xargs -r docker kill >/dev/null 2>&1; sleep 0.2; done'"
    cluster.on_worker(running.worker, ["sh", "-c", f"({away}) >/dev/null 2>&1 &"]).ok()
    said = f"{running.worker} does not answer: containers that are there are not shown\n"
    wait_until(lambda: _cm(cluster, "list").stderr == said, timeout_s=20, what="cm list says who does not answer")
    record = cluster.wait_for_state(job, "FAILED", "NODE_FAIL", timeout_s=60)
    assert record["user"] == USER
    _wait_until_stopped(cluster, running, timeout_s=60)
    _wait_until_healthy(cluster, running.worker)
    _wait_until_starts(cluster, running)


def test_container_is_stopped_when_slurmd_is_killed(cluster: LiveCluster, running: UsersContainer) -> None:
    job, old = _job(cluster), cluster.container("slurmd", running.worker)
    cluster.in_service("slurmd", "kill -9 $(pidof slurmstepd slurmd)", running.worker).ok()
    _wait_until_stopped(cluster, running, timeout_s=10)
    _new_service(cluster, "slurmd", running.worker, old)
    cluster.wait_for_state(job, "NODE_FAIL", "FAILED", "CANCELLED", timeout_s=120)
    _wait_until_healthy(cluster, running.worker)
    _wait_until_starts(cluster, running)


@pytest.mark.timeout(420)
def test_container_ends_with_its_engine_and_starts_again(cluster: LiveCluster, running: UsersContainer) -> None:
    job, old = _job(cluster), cluster.container("slurmd", running.worker)
    # In a simulated machine all else ends with its engine, which is then started anew with the machine.
    cluster.on_worker(running.worker, ["sh", "-c", "kill $(cat /run/docker.pid)"]).ok()
    _new_service(cluster, "slurmd", running.worker, old)
    cluster.wait_for_state(job, "NODE_FAIL", "FAILED", "CANCELLED", timeout_s=120)
    assert _state(cluster, running) == "exited"
    _wait_until_healthy(cluster, running.worker)
    _wait_until_starts(cluster, running)


def test_job_that_is_cancelled_behind_the_manager_s_back(cluster: LiveCluster, running: UsersContainer) -> None:
    command = cluster.background(["cm", "run", "--name", NAME, "--cmd", "echo begun; sleep 300"], USER)
    command.wait_for_line("begun", timeout_s=20)
    cluster.slurm(f"scancel {_job(cluster)}")
    result = command.wait(timeout_s=10)
    assert result.exit_status != 0
    _wait_until_stopped(cluster, running, timeout_s=3)
    stopped = _cm(cluster, "stop", "--name", NAME)
    assert (stopped.exit_status, stopped.stderr) == (1, f"container {NAME} is not running\n")
    _wait_until_starts(cluster, running)


def test_container_that_is_removed_behind_the_manager_s_back_ends_its_job(
    cluster: LiveCluster, running: UsersContainer
) -> None:
    job = _job(cluster)
    cluster.on_worker(running.worker, ["docker", "rm", "-f", running.id]).ok()
    cluster.wait_for_state(job, "FAILED", "COMPLETED", timeout_s=15)
    missing = _cm(cluster, "run", "--name", NAME, "--cmd", "true")
    assert (missing.exit_status, missing.stderr) == (1, f"no container name {NAME}\n")


@contextlib.contextmanager
def _full(cluster: LiveCluster, workers: Sequence[str], path: str) -> Iterator[None]:
    """Have no room where the engines of some workers keep this."""
    for worker in workers:
        full = ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "full", f"/var/lib/docker/{path}"]
        cluster.on_worker(worker, full).ok()
    try:
        yield
    finally:
        for worker in workers:
            cluster.on_worker(worker, ["umount", f"/var/lib/docker/{path}"]).ok()


@pytest.mark.slow
def test_full_disk_is_said_and_no_container_is_half_made(cluster: LiveCluster, running: UsersContainer) -> None:
    job = _job(cluster)
    create = ("ddocker", "create", "--type", "0", "--ports", "2", "--image", "my_task_image", "--name", "half")
    with _full(cluster, cluster.workers, "image/overlay2/layerdb/mounts"):
        for words in (("cm", "create", "3"), ("cm", "run", "--cmd", "true"), create):
            result = cluster.user(words, USER)
            assert (result.exit_status, "no space left on device" in result.stderr) == (1, True), result
            assert cluster.containers(USER) == [running]
            assert _job(cluster) == job
    with _full(cluster, [running.worker], "image/overlay2/layerdb/tmp"):
        result = cluster.user(["ddocker", "commit", NAME, "half"], USER)
        assert (result.exit_status, "no space left on device" in result.stderr) == (1, True), result
    assert "half" not in cluster.user(["ddocker", "images"], USER).ok()
    assert cluster.containers(USER) == [running]
    assert cluster.user(create, USER).ok().endswith("Successfully created!\n")
    [half] = [found for found in cluster.containers(USER) if found.name == "half"]
    form = "{{range .HostConfig.PortBindings}}{{(index . 0).HostPort}} {{end}}"
    ports = cluster.on_worker(half.worker, ["docker", "inspect", "-f", form, half.id]).ok()
    assert ports == "25000 25001 \n", "none was kept"
    assert cluster.user(["ddocker", "commit", NAME, "half"], USER, timeout_s=120).ok() == "half\n"
    cluster.user(["ddocker", "rmi", "half"], USER).ok()


@contextlib.contextmanager
def _unplugged(cluster: LiveCluster, worker: str) -> Iterator[None]:
    peer = cluster.on_worker(worker, ["cat", "/sys/class/net/eth0/iflink"]).ok().strip()
    [link] = [
        found.name for found in Path("/sys/class/net").iterdir() if (found / "ifindex").read_text().strip() == peer
    ]
    run(["ip", "link", "set", "dev", link, "down"]).ok()
    try:
        yield
    finally:
        run(["ip", "link", "set", "dev", link, "up"]).ok()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_machine_that_is_cut_off_is_named_and_what_runs_there_is_in_a_job_or_stopped(
    cluster: LiveCluster, running: UsersContainer
) -> None:
    job = _job(cluster)
    with _unplugged(cluster, running.worker):
        said = f"{running.worker} does not answer: containers that are there are not shown\n"
        wait_until(lambda: said in _cm(cluster, "list").stderr, timeout_s=60, what="cm list says who does not answer")
        for words in (("run", "--cmd", "true"), ("stop",), ("delete",)):
            result = _cm(cluster, *words, "--name", NAME)
            assert result.exit_status == 1, words
            assert "no container name" in result.stderr or "does not answer" in result.stderr, result.stderr
        ps = cluster.user(["ddocker", "ps", "-a"], USER)
        assert (ps.exit_status, ps.stderr) == (0, f"{running.worker} does not answer\n")
        gone = cluster.user(["ddocker", "exec", NAME, "true"], USER)
        assert (gone.exit_status, f"{running.worker} does not" in gone.stderr) == (1, True), gone
        down = f"{running.worker} is down"
        wait_until(lambda: "down" in cluster.nodes()[running.worker], timeout_s=200, interval_s=2, what=down)
        assert _cm(cluster, "create", "1").ok().startswith("created 1 containers\n"), "the others go on"
        create = ("ddocker", "create", "--type", "0", "--ports", "1", "--image", "my_task_image", "--name", "other")
        assert cluster.user(create, USER).ok().endswith("Successfully created!\n")
        cluster.user(["ddocker", "stop", "other"], USER).ok()
    cluster.wait_for_state(job, "NODE_FAIL", timeout_s=120)
    _wait_until_stopped(cluster, running, timeout_s=120)
    _wait_until_healthy(cluster, running.worker)
    wait_until(
        lambda: not cluster.slurm(f"squeue -h -u {USER}") and not _running(cluster),
        timeout_s=60,
        what="all is consistent",
    )


def _running(cluster: LiveCluster) -> list[UsersContainer]:
    return [found for found in cluster.containers(USER) if found.state == "running"]


def _wait_until_healthy(cluster: LiveCluster, worker: str) -> None:
    """Wait until Slurm sends jobs there again and the agent answers."""

    def look() -> bool:
        return cluster.nodes()[worker] in ("idle", "mixed", "allocated") and not _cm(cluster, "list").stderr

    wait_until(look, timeout_s=150, interval_s=1, what=f"{worker} takes jobs")


@pytest.mark.parametrize("number", range(3))
def test_start_during_which_the_agent_is_killed_leaves_nothing_half_made(cluster: LiveCluster, number: int) -> None:
    worker = cluster.workers[number % len(cluster.workers)]
    old = cluster.container("agent", worker)
    starting = cluster.background("for n in 1 2 3; do cm run --cmd true; done", USER)
    cluster.in_service("agent", f"sleep 0.{3 * number}; kill -9 $(pidof python3)", worker).ok()
    starting.wait(timeout_s=120)
    _new_service(cluster, "agent", worker, old)

    def is_consistent() -> bool:
        jobs = cluster.slurm(f"squeue -h -u {USER} -o '%j %N'").splitlines()
        return sorted(jobs) == sorted(f"{found.name} {found.worker}" for found in _running(cluster))

    wait_until(is_consistent, timeout_s=60, what="each container that runs is in a job, and each job has its container")
    assert _running(cluster), "one was started"
