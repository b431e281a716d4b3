"""Attack 19: the registries are pushed to without a password and over plain HTTP, from where they are reached."""

import http.client
import json
import ssl

import pytest

from cfiddle_cluster import images
from live import LiveCluster, docker

# Tries the registry in every way that needs no password, and with wrong ones; says how it is answered.
PUSH = r"""
import base64, http.client, json, ssl, sys
host, port = sys.argv[1], int(sys.argv[2])
context = ssl._create_unverified_context()

def status(path, method="GET", account=None, tls=True):
    try:
        connection = (http.client.HTTPSConnection(host, port, timeout=5, context=context) if tls
                      else http.client.HTTPConnection(host, port, timeout=5))
        headers = {"Authorization": "Basic " + base64.b64encode(account.encode()).decode()} if account else {}
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    except OSError as error:
        return type(error).__name__

print(json.dumps({
    "push": status("/v2/cfiddle-sandbox/blobs/uploads/", "POST"),
    "push, wrong password": status("/v2/cfiddle-sandbox/blobs/uploads/", "POST", "cfiddle:cfiddle"),
    "push, empty password": status("/v2/cfiddle-sandbox/blobs/uploads/", "POST", "cfiddle:"),
    "manifest": status("/v2/cfiddle-sandbox/manifests/latest", "PUT"),
    "list": status("/v2/_catalog"),
    "delete": status("/v2/cfiddle-sandbox/manifests/sha256:" + "0" * 64, "DELETE"),
    "plain": status("/v2/cfiddle-sandbox/blobs/uploads/", "POST", tls=False),
}))
"""

REFUSED = 401


Place = tuple[str, str]


@pytest.fixture
def places(cluster: LiveCluster) -> list[Place]:
    """Return address and port of the cluster's own registry, and of the one for what users commit."""
    ports = (cluster.config.registry_port, cluster.config.user_registry_port)
    return [(cluster.config.head_addr, str(port)) for port in ports]


def test_user_cannot_push(cluster: LiveCluster, places: list[Place]) -> None:
    for command in [[*srun, "python3", "-c", PUSH, *place] for place in places for srun in ([], ["srun"])]:
        said = json.loads(cluster.user(command, timeout_s=60).ok())
        plain = said.pop("plain")
        # Where the registry cannot even be reached, it is refused all the same.
        assert plain == 400 or isinstance(plain, str), said
        assert all(answer == REFUSED for answer in said.values() if isinstance(answer, int)), said


def test_neighbour_on_the_network_cannot_push(cluster: LiveCluster, places: list[Place]) -> None:
    argv = [
        "run",
        "--rm",
        "-i",
        "--network",
        "host",
        "--entrypoint",
        "python3",
        images.reference(cluster.config, "common"),
    ]
    for place in places:
        said = json.loads(docker(*argv, "-", *place, input=PUSH).ok())
        assert said.pop("plain") == 400
        assert set(said.values()) == {REFUSED}


def test_registry_is_who_it_says(cluster: LiveCluster, places: list[Place]) -> None:
    trusting = ssl.create_default_context(cafile=str(cluster.state.path("ca.crt")))
    for address, port in places:
        connection = http.client.HTTPSConnection(address, int(port), timeout=10, context=trusting)
        connection.request("GET", "/v2/")
        assert connection.getresponse().status == 401
        stranger = http.client.HTTPSConnection(address, int(port), timeout=10, context=ssl.create_default_context())
        with pytest.raises(ssl.SSLCertVerificationError):
            stranger.request("GET", "/v2/")


def test_engine_of_the_head_pushes_nothing_without_the_password(cluster: LiveCluster, places: list[Place]) -> None:
    for place in places:
        target = f"{':'.join(place)}/cfiddle-sandbox:attack"
        docker("tag", images.reference(cluster.config, "common"), target).ok()
        try:
            pushed = docker("--config", "/nonexistent", "push", target)
        finally:
            docker("image", "rm", target).ok()
        assert pushed.exit_status != 0
        assert "no basic auth credentials" in pushed.output
