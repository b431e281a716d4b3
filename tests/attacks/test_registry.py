"""Attack 19: the registry is pushed to without its password and over plain HTTP, from where the network reaches it."""

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


@pytest.fixture
def place(cluster: LiveCluster) -> tuple[str, str]:
    return cluster.config.head_addr, str(cluster.config.registry_port)


def test_user_cannot_push(cluster: LiveCluster, place: tuple[str, str]) -> None:
    for command in (["python3", "-c", PUSH, *place], ["srun", "python3", "-c", PUSH, *place]):
        said = json.loads(cluster.user(command, timeout_s=60).ok())
        plain = said.pop("plain")
        # Where the registry cannot even be reached, it is refused all the same.
        assert plain == 400 or isinstance(plain, str), said
        assert all(answer == REFUSED for answer in said.values() if isinstance(answer, int)), said


def test_neighbour_on_the_network_cannot_push(cluster: LiveCluster, place: tuple[str, str]) -> None:
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
    said = json.loads(docker(*argv, "-", *place, input=PUSH).ok())
    assert said.pop("plain") == 400
    assert set(said.values()) == {REFUSED}


def test_registry_is_who_it_says(cluster: LiveCluster, place: tuple[str, str]) -> None:
    trusting = ssl.create_default_context(cafile=str(cluster.state.path("ca.crt")))
    connection = http.client.HTTPSConnection(place[0], int(place[1]), timeout=10, context=trusting)
    connection.request("GET", "/v2/")
    assert connection.getresponse().status == 401
    stranger = http.client.HTTPSConnection(place[0], int(place[1]), timeout=10, context=ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        stranger.request("GET", "/v2/")


def test_engine_of_the_head_pushes_nothing_without_the_password(cluster: LiveCluster, place: tuple[str, str]) -> None:
    target = f"{place[0]}:{place[1]}/cfiddle-sandbox:attack"
    docker("tag", images.reference(cluster.config, "common"), target).ok()
    try:
        pushed = docker("--config", "/nonexistent", "push", target)
    finally:
        docker("image", "rm", target).ok()
    assert pushed.exit_status != 0
    assert "no basic auth credentials" in pushed.output
