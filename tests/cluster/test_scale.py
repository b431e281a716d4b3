"""Workers come and go while jobs run: nothing is edited, nothing is restarted."""

import pytest

from live import NOBODY, LiveCluster, docker, invoke


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_scale_up_and_down_with_jobs_running(cluster: LiveCluster) -> None:
    before = cluster.workers
    containers = {service: cluster.container(service) for service in ("slurmctld", "slurmdbd", "mysql", "userhost")}
    job = cluster.sbatch("sleep 1000", "test_user1", "-w", before[0])
    cluster.wait_until_runs(job)
    try:
        invoke("scale", str(len(before) + 1), timeout_s=240).ok()
        new = (set(cluster.workers) - set(before)).pop()
        assert cluster.nodes()[new] == "idle"
        assert cluster.user(["srun", "-w", new, "hostname"]).ok().strip() == new
        # one job is on the new machine when it is told to go: it ends, and only then the machine leaves
        last = cluster.sbatch("sleep 15", "test_user2", "-w", new)
        cluster.wait_until_runs(last)
    finally:
        invoke("scale", str(len(before)), timeout_s=240).ok()
    assert cluster.wait_for_state(last, "COMPLETED")["nodes"] == new
    assert cluster.workers == sorted(before)
    assert sorted(cluster.nodes()) == sorted(before), "the node is deleted"
    assert new not in docker("node", "ls", "--format", "{{.Hostname}}").ok().split()
    assert f"cfiddle-machine-{new}" not in docker("ps", "-a", "--format", "{{.Names}}").ok().split()
    assert cluster.job(job)["state"] == "RUNNING"
    cluster.slurm(f"scancel {job}")
    assert containers == {service: cluster.container(service) for service in containers}


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_machine_that_is_in_another_swarm_is_refused(cluster: LiveCluster) -> None:
    count = len(cluster.workers)
    invoke("scale", str(count + 1), timeout_s=240).ok()
    new = cluster.workers[-1]
    try:
        cluster.on_worker(new, ["docker", "swarm", "leave", "--force"]).ok()
        cluster.on_worker(new, ["docker", "swarm", "init", "--advertise-addr", "127.0.0.1"]).ok()
        result = invoke("up", timeout_s=120)
        assert result.exit_status == 1
        assert new in result.output
        assert "another swarm" in result.output
        assert "Traceback" not in result.output
        assert "active" in cluster.on_worker(new, ["docker", "info", "--format", "{{.Swarm.LocalNodeState}}"]).ok()
    finally:
        invoke("scale", str(count), timeout_s=240).ok()
    assert sorted(cluster.nodes()) == cluster.workers


@pytest.mark.parametrize("count", ["-1", "two", "1000000"])
def test_scale_to_nonsense_changes_nothing(cluster: LiveCluster, count: str) -> None:
    result = invoke("scale", f"--workers={count}")
    assert result.exit_status == 1
    assert "Traceback" not in result.output
    assert count.lstrip("-") in result.output
    assert sorted(cluster.nodes()) == cluster.workers


def test_remove_worker_that_is_none_changes_nothing(cluster: LiveCluster) -> None:
    result = invoke("remove-worker", "c99")
    assert result.exit_status == 1
    assert "c99" in result.output
    assert "Traceback" not in result.output


def test_real_worker_is_not_added_to_simulated_ones(cluster: LiveCluster) -> None:
    result = invoke("add-worker", NOBODY, timeout_s=90)
    assert result.exit_status == 1
    assert "simulated" in result.output
    assert "Traceback" not in result.output
    assert sorted(cluster.nodes()) == cluster.workers
