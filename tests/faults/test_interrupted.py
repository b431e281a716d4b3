"""`up` and `down` interrupted at any step and run again end in the same cluster."""

import itertools
import signal

import pytest

from live import Invocation, LiveCluster, docker, invoke, snapshot

SIGNALS = (signal.SIGINT, signal.SIGKILL)
MARK = "before"


def _mark_homes(cluster: LiveCluster) -> None:
    cluster.user(f"echo {MARK} > ~/.test-interrupted", "test_user1").ok()


def _same_cluster(cluster: LiveCluster, before: dict[str, object], last_job: int) -> None:
    cluster.wait_until_idle(timeout_s=120)
    assert snapshot(cluster) == before
    assert cluster.user("cat ~/.test-interrupted; rm ~/.test-interrupted", "test_user1").ok().strip() == MARK
    job = cluster.sbatch("true", "test_user1")
    assert job > last_job, "ids go on"
    assert cluster.wait_for_state(job, "COMPLETED", timeout_s=90)
    assert cluster.job(last_job)["state"] == "COMPLETED", "accounting goes on"


def _last_job(cluster: LiveCluster) -> int:
    job = cluster.sbatch("true", "test_user1")
    cluster.wait_for_state(job, "COMPLETED", timeout_s=90)
    cluster.wait_until_idle(timeout_s=60)
    return job


def _interrupt_each_step(*arguments: str) -> list[str]:
    """Run a task again and again, each time interrupted in a step in which it was not; return the steps.

    The signals take turns: what can be tidied up after the one must not be needed after the other.
    """
    steps: list[str] = []
    signals = itertools.cycle(SIGNALS)

    def begins(line: str) -> bool:
        return line.rstrip().endswith("…") and line.strip(" …\n") not in steps

    while True:
        task = Invocation(*arguments)
        line = task.wait_for_line(begins, timeout_s=400)
        if line is None:
            assert task.wait(timeout_s=60).exit_status == 0, task
            return steps
        task.interrupt(next(signals))
        result = task.wait(timeout_s=60)
        assert "Traceback" not in result.stdout, task
        steps.append(line.strip(" …"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_interrupted_at_each_step_ends_in_the_same_cluster(cluster: LiveCluster) -> None:
    _mark_homes(cluster)
    before, last_job = snapshot(cluster), _last_job(cluster)
    invoke("down", timeout_s=180).ok()
    steps = _interrupt_each_step("up")
    assert len(steps) > 5, steps
    _same_cluster(cluster, before, last_job)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_down_goes_on_and_up_brings_all_back(cluster: LiveCluster) -> None:
    _mark_homes(cluster)
    before, last_job = snapshot(cluster), _last_job(cluster)
    steps = _interrupt_each_step("down")
    assert steps
    left = docker("ps", "--filter", "label=cfiddle.cluster=cfiddle", "--format", "{{.Names}}").ok()
    assert left == "", "containers still run"
    invoke("up", timeout_s=400).ok()
    _same_cluster(cluster, before, last_job)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_up_after_half_a_down(cluster: LiveCluster, number: signal.Signals) -> None:
    _mark_homes(cluster)
    before, last_job = snapshot(cluster), _last_job(cluster)
    task = Invocation("down")
    task.wait_for_line(bool, timeout_s=120)
    task.interrupt(number)
    task.wait(timeout_s=60)
    invoke("up", timeout_s=400).ok()
    _same_cluster(cluster, before, last_job)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_scale_interrupted_and_run_again(cluster: LiveCluster) -> None:
    before = snapshot(cluster)
    count = len(cluster.workers)
    for number in SIGNALS:
        task = Invocation("scale", str(count + 1))
        task.wait_for_line(bool, timeout_s=120)
        task.interrupt(number)
        task.wait(timeout_s=60)
    invoke("scale", str(count), timeout_s=240).ok()
    cluster.wait_until_idle(timeout_s=120)
    assert snapshot(cluster) == before
