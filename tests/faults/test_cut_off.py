"""A worker is cut off from the network, for a moment and for longer than Slurm waits, and comes back."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from live import LiveCluster, run, wait_until
from load import Load, Victim


@contextlib.contextmanager
def _unplugged(cluster: LiveCluster, worker: str) -> Iterator[None]:
    """Take the plug out of a simulated machine: its interface has no carrier as long as the other end is down."""
    peer = cluster.on_worker(worker, ["cat", "/sys/class/net/eth0/iflink"]).ok().strip()
    links = Path("/sys/class/net").iterdir()
    [link] = [found.name for found in links if (found / "ifindex").read_text().strip() == peer]
    run(["ip", "link", "set", "dev", link, "down"]).ok()
    try:
        yield
    finally:
        run(["ip", "link", "set", "dev", link, "up"]).ok()


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("is_given_up", [False, True], ids=["for a moment", "until Slurm gives it up"])
def test_call_on_a_worker_that_is_cut_off_is_told_and_others_go_on(cluster: LiveCluster, is_given_up: bool) -> None:
    worker = cluster.workers[0]
    with Victim(cluster, worker) as victim, Load(cluster) as load:
        with _unplugged(cluster, worker):
            _, kind, text = victim.told(timeout_s=20)
            assert kind == "ConnectionLost", text
            load.wait_for_results(5)
            if is_given_up:
                wait_until(lambda: "down" in cluster.nodes()[worker], timeout_s=150, what=f"{worker} is given up")
                load.wait_for_results(5)
        # Slurm tells a node again that a job is over a minute after it could not.
        wait_until(lambda: cluster.nodes()[worker] in ("allocated", "mixed"), timeout_s=180, what=f"{worker} has jobs")
        load.wait_for_results(3)
        load.stop()
