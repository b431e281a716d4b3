"""`upgrade` brings new images while jobs run and wait, and takes them back where a worker does not come up."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from live import Invocation, LiveCluster, copy_of_checkout, docker, invoke, job_name, run, task_of

AGENT = Path("images/agent/Dockerfile")
"""What only a small image without children is made from."""


@pytest.fixture
def newer(cluster: LiveCluster, tmp_path: Path) -> Path:
    """Return a checkout that is like this one but for the agent's image."""
    root = copy_of_checkout(tmp_path / "checkout")
    _append(root, "LABEL cfiddle.version=newer")
    return root


@pytest.fixture(scope="module", autouse=True)
def _upgraded_back(cluster: LiveCluster) -> Iterator[None]:
    """Have the cluster run this checkout's images again, whatever the tests left."""
    yield
    invoke("upgrade", timeout_s=240).ok()


def _append(root: Path, line: str) -> None:
    with (root / AGENT).open("a") as file:
        file.write(f"{line}\n")


def _agents(cluster: LiveCluster) -> dict[str, str]:
    """Return the image of each worker's agent."""
    of_agent = "label=com.docker.swarm.service.name=slurm-stack_agent"
    argv = ["docker", "ps", "--no-trunc", "--filter", of_agent, "--format", "{{.Image}}"]
    return {worker: cluster.on_worker(worker, argv).ok().strip() for worker in cluster.workers}


def _wait_until_it_waits_for(task: Invocation, job: int) -> str | None:
    return task.wait_for_line(lambda line: "is drained, and waits for jobs" in line and str(job) in line, timeout_s=120)


def _paused() -> list[str]:
    listed = docker("node", "ls", "--format", "{{.Hostname}} {{.Availability}}").ok().splitlines()
    return [line for line in listed if not line.endswith(" Active")]


@pytest.mark.timeout(300)
def test_jobs_that_run_and_wait_survive_also_an_upgrade_that_is_killed_and_goes_on(
    cluster: LiveCluster, newer: Path
) -> None:
    first, second = cluster.workers[:2]
    before = _agents(cluster)
    signs = f"/tmp/{job_name()}"
    running = cluster.sbatch(f"until test -e {signs}; do sleep 0.2; done", "test_user1", "-w", first)
    cluster.wait_until_runs(running)
    waiting = cluster.sbatch("true", "test_user2", "-w", first)
    task = Invocation("upgrade", root=newer)
    assert _wait_until_it_waits_for(task, running), task
    elsewhere = cluster.sbatch("true", "test_user2")
    assert cluster.wait_for_state(elsewhere, "COMPLETED")["nodes"] != first
    task.interrupt(signal.SIGKILL)
    task.wait(timeout_s=30)

    cluster.slurm(f"scontrol update nodename={second} state=drain reason='kept for later'")
    try:
        task = Invocation("upgrade", root=newer)
        assert _wait_until_it_waits_for(task, running), task
        assert _agents(cluster) == before, "nothing is replaced under a job"
        cluster.in_service("slurmd", f"touch {signs}", first).ok()
        assert task.wait(timeout_s=240).exit_status == 0, task
        assert cluster.slurm(f"sinfo -h -n {second} -o %T/%E -p normal").strip() == "drained/kept for later"
    finally:
        cluster.slurm(f"scontrol update nodename={second} state=resume")
    after = _agents(cluster)
    assert not set(after.values()) & set(before.values())
    assert cluster.wait_for_state(running, "COMPLETED")["nodes"] == first
    assert cluster.wait_for_state(waiting, "COMPLETED")["nodes"] == first
    assert _paused() == []

    assert "nothing to do" in run(task_of(newer, "upgrade"), cwd=newer, timeout_s=120).output
    assert _agents(cluster) == after


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_all_goes_back_when_a_worker_does_not_come_up(cluster: LiveCluster, newer: Path) -> None:
    before, last = _agents(cluster), cluster.workers[-1]
    _append(newer, f'CMD ["sh", "-c", "test $(hostname) != {last} && exec python3 -m agent; echo no good; exit 1"]')
    waiting = cluster.sbatch("sleep 1", "test_user1", "--begin=now+5", "-w", cluster.workers[0])
    task = Invocation("upgrade", "--start-seconds=20", root=newer)
    assert task.wait_for_line(lambda line: f"{cluster.workers[0]} is up to date" in line, timeout_s=120)
    result = task.wait(timeout_s=240)
    assert result.exit_status == 1
    assert "Traceback" not in result.stdout
    assert f"{last} did not come up: " in result.stdout
    log = cluster.config.state_dir / "upgrade.log"
    assert str(log) in result.stdout
    assert "no good" in log.read_text()
    assert _agents(cluster) == before
    assert cluster.wait_for_state(waiting, "COMPLETED")
    assert _paused() == []
    cluster.wait_until_idle()
