"""Attack 20: somebody else's engine joins the swarm with a token from a log, from before, or made up."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfiddle_cluster import config, engine, images, swarm
from containers import Container, machine_options
from live import LiveCluster, docker

TOKEN = re.compile(r"SWMTKN-1-\w+-\w+")


@pytest.fixture
def stranger(cluster: LiveCluster, tmp_path: Path) -> Iterator[Container]:
    """Give a machine with an engine that the cluster does not know, but which reaches the head."""
    (tmp_path / "keys").write_text("# nobody logs in\n")
    container = Container(f"cfiddle-test-stranger-{uuid.uuid4().hex[:8]}")
    argv = ["run", "--detach", "--name", container.name, "--hostname", "stranger", "--label", config.LABEL]
    argv += [*machine_options(tmp_path / "keys"), images.reference(cluster.config, "machine")]
    docker(*argv).ok()
    try:
        container.wait_until_healthy()
        yield container
    finally:
        docker("rm", "--force", "--volumes", container.name).ok()
        for node in swarm.nodes().values():
            if node["Description"].get("Hostname") == "stranger":
                engine.client().api.remove_node(node["ID"], force=True)


def _token() -> str:
    return str(engine.client().api.inspect_swarm()["JoinTokens"]["Worker"])


def _join(cluster: LiveCluster, stranger: Container, token: str) -> str:
    """Return what the stranger's engine says when it tries to join."""
    join = ["timeout", "20", "docker", "swarm", "join", "--token", token, f"{cluster.config.head_addr}:{swarm.PORT}"]
    said = docker("exec", stranger.name, *join, timeout_s=40).output
    # An attempt that failed goes on by itself; and one that did not shall not last.
    docker("exec", stranger.name, "docker", "swarm", "leave", "--force")
    return said


def test_token_from_before_is_refused(cluster: LiveCluster, stranger: Container) -> None:
    before = _token()
    assert "This node joined a swarm" in _join(cluster, stranger, before), "else this proves nothing"
    # What is done whenever machines join, here of none.
    swarm._let_join(cluster.config, cluster.state, [])
    said = _join(cluster, stranger, before)
    assert "This node joined a swarm" not in said
    assert "A valid join token is necessary" in said


def test_no_log_holds_a_token(cluster: LiveCluster) -> None:
    tokens = engine.client().api.inspect_swarm()["JoinTokens"]
    texts = {name: docker("logs", name).output for name in docker("ps", "--format", "{{.Names}}").ok().split()}
    for worker in cluster.workers:
        for name in cluster.on_worker(worker, ["docker", "ps", "--format", "{{.Names}}"]).ok().split():
            texts[f"{worker}: {name}"] = cluster.on_worker(worker, ["docker", "logs", name]).output
    engine_log = cluster.state.path("dockerd.log")
    if engine_log.exists():
        texts["the head's engine"] = engine_log.read_text(errors="replace")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        texts[str(path)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace") if path.exists() else ""
    look = "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /run/secrets/* ~/.* 2>/dev/null; true"
    texts["a user"] = cluster.user(look, "test_user1").ok()
    texts["a job"] = cluster.user(["srun", "bash", "-c", look], "test_user1").ok()
    assert len(texts) > 10
    for where, text in texts.items():
        assert not TOKEN.search(text), where
        assert not any(token in text for token in tokens.values()), where
