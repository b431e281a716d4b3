"""Point 8, new images: rolled out while a job runs, which is waited for, and taken back where one does not come up."""

from collections.abc import Iterator

import pytest

from live import wait_until
from machines.real import CHECKOUT, UP_TIMEOUT_S, RealCluster
from terminal import Terminal

DOCKERFILE = f"{CHECKOUT}/images/agent/Dockerfile"
"""What only a small image without children is made from."""
START_S = 60
"""How long what does not come up is waited for, before patience."""


@pytest.fixture
def _goes_back(cluster: RealCluster) -> Iterator[None]:
    """Have the cluster run this checkout's images again, whatever a test left."""
    cluster.head.run(["cp", DOCKERFILE, "/root/before"]).ok()
    yield
    cluster.head.run(["cp", "/root/before", DOCKERFILE]).ok()
    cluster.invoke("upgrade", timeout_s=UP_TIMEOUT_S).ok()


def append(cluster: RealCluster, line: str) -> None:
    """Change the agent's image."""
    cluster.head.run(f"cat >>{DOCKERFILE}", input=f"{line}\n").ok()


def agent(cluster: RealCluster) -> str:
    """Return the image of the worker's agent."""
    of_agent = "label=com.docker.swarm.service.name=slurm-stack_agent"
    argv = ["docker", "ps", "--no-trunc", "--filter", of_agent, "--format", "{{.Image}}"]
    return cluster.workers[0].run(argv).ok().strip()


@pytest.mark.usefixtures("_goes_back")
@pytest.mark.timeout(3 * UP_TIMEOUT_S)
def test_job_that_runs_is_waited_for_and_the_next_one_waits(cluster: RealCluster) -> None:
    before = agent(cluster)
    append(cluster, "LABEL tried=upgrade")
    running = cluster.sbatch("until test -e go-on; do sleep 1; done; rm go-on")
    cluster.wait_for_state(running, "RUNNING")
    following = cluster.sbatch("true")
    terminal = Terminal(cluster.head.argv(cluster.command("upgrade"), "-tt"), columns=200)
    try:
        terminal.wait_for(rf"is drained, and waits for jobs.* {running}\b", timeout_s=UP_TIMEOUT_S)
        assert agent(cluster) == before, "nothing is replaced under a job"
        cluster.user("touch go-on").ok()
        wait_until(lambda: not terminal.read(), timeout_s=UP_TIMEOUT_S, what=f"it is over: {terminal.said}")
    finally:
        terminal.kill()
    assert f"{cluster.workers[0].name} is up to date" in terminal.said
    assert agent(cluster) not in ("", before)
    cluster.wait_for_state(running, "COMPLETED")
    cluster.wait_for_state(following, "COMPLETED")


@pytest.mark.usefixtures("_goes_back")
@pytest.mark.timeout(3 * UP_TIMEOUT_S)
def test_all_goes_back_where_a_node_does_not_come_up(cluster: RealCluster) -> None:
    before, node = agent(cluster), cluster.workers[0].name
    append(cluster, 'CMD ["sh", "-c", "echo no good; exit 1"]')
    said = cluster.invoke(f"upgrade --start-seconds={START_S}", timeout_s=2 * UP_TIMEOUT_S)
    assert said.exit_status == 1
    assert f"{node} did not come up: " in said.output
    assert "no good" in cluster.head.run("cat /var/lib/cfiddle-cluster/upgrade.log").ok()
    cluster.wait_until_ready(timeout_s=120)
    assert agent(cluster) == before
    cluster.wait_for_state(cluster.sbatch("true"), "COMPLETED")
