"""Workers are compared with each other, and one that is slow takes no jobs until it no longer is."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from live import MACHINE, LiveCluster, docker, invoke, wait_until


@pytest.fixture
def slow_worker(cluster: LiveCluster) -> Iterator[str]:
    """Yield a worker that gets a tenth of a CPU."""
    worker = cluster.workers[-1]
    docker("update", "--cpu-period", "100000", "--cpu-quota", "10000", MACHINE + worker).ok()
    yield worker
    docker("update", "--cpu-quota", "-1", MACHINE + worker).ok()
    invoke("calibrate", timeout_s=120).ok()


def _calibrate() -> dict[str, dict[str, Any]]:
    found = invoke("calibrate", "--json", timeout_s=180)
    return {outcome["name"]: {**outcome, "status": found.exit_status} for outcome in json.loads(found.stdout)}


def test_equal_workers_are_no_different(cluster: LiveCluster) -> None:
    found = _calibrate()
    assert sorted(found) == cluster.workers
    for outcome in found.values():
        assert (outcome["what"], outcome["status"]) == ("", 0)
        assert 0 < outcome["figures"]["cpu_ns"] <= outcome["figures"]["cpu_median_ns"]
        assert 0 < outcome["figures"]["memory_ns"] <= outcome["figures"]["memory_median_ns"]
        assert not outcome["difference"]["is_off"]
    assert set(cluster.nodes().values()) == {"idle"}


@pytest.mark.slow
def test_a_slow_worker_is_drained_with_the_reason_and_resumed_when_it_is_mended(
    cluster: LiveCluster, slow_worker: str
) -> None:
    found = _calibrate()[slow_worker]
    assert found["status"] == 1
    reason = cluster.slurm(f"sinfo -h -N -p normal -n {slow_worker} -o '%T %E'").strip()
    assert reason.startswith(("drained calibration: ", "draining calibration: ")), reason
    assert "slower than its fellows: a program gets" in reason
    shown = json.loads(invoke("status", "--json").ok())
    assert [node["reason"] for node in shown["nodes"] if node["name"] == slow_worker] == [reason.partition(" ")[2]]
    others = [name for name, state in cluster.nodes().items() if state == "idle"]
    assert others == [name for name in cluster.workers if name != slow_worker]

    docker("update", "--cpu-quota", "-1", MACHINE + slow_worker).ok()
    found = _calibrate()[slow_worker]
    assert (found["what"], found["status"]) == ("resumed", 0)
    wait_until(lambda: cluster.nodes()[slow_worker] == "idle", timeout_s=20, what=f"{slow_worker} takes jobs again")


def test_a_worker_that_somebody_drained_stays_drained(cluster: LiveCluster) -> None:
    worker = cluster.workers[0]
    cluster.slurm(f"scontrol update nodename={worker} state=drain reason='a broken fan'")
    assert _calibrate()[worker]["what"] == "not measured now: a broken fan"
    assert cluster.nodes()[worker] == "drained"
    cluster.slurm(f"scontrol update nodename={worker} state=resume")


def test_figures_of_workers_that_did_not_change_are_kept_by_up(cluster: LiveCluster) -> None:
    before = (cluster.config.state_dir / "calibration.json").read_text()
    invoke("up", timeout_s=180).ok()
    assert (cluster.config.state_dir / "calibration.json").read_text() == before
