"""The registry: whom it lets in, what it keeps, and images that reach a machine through it or past it."""

import base64
import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cfiddle_cluster import config, distribution, images, machines, registry
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.registry import RegistryUnreachable
from cfiddle_cluster.state import State
from containers import Container, Start, machine_options

ROOT = Path(__file__).resolve().parents[2]
WORKER_IMAGES = ("common", "registry")


@dataclass(frozen=True)
class Place:
    """A registry in a container, and what an administrator has to reach it."""

    container: Container
    settings: config.Config
    state: State

    def status(self, path: str = "/v2/", *, user: str = "", password: str = "", method: str = "GET") -> int:
        """Ask over TLS, trusting the cluster's authority alone; return the status."""
        context = ssl.create_default_context(cafile=str(self.state.path("ca.crt")))
        address = (self.settings.head_addr, self.settings.registry_port)
        connection = http.client.HTTPSConnection(*address, timeout=10, context=context)
        credential = base64.b64encode(f"{user}:{password}".encode()).decode()
        connection.request(method, path, headers={"Authorization": f"Basic {credential}"} if user else {})
        return connection.getresponse().status


def options(state: State, secret_file: Callable[[str, str], Path], port: int) -> list[str]:
    password = secret_file("password", state.secret("registry-password"))
    key = secret_file("key", state.path("registry.key").read_text())
    certificate = secret_file("crt", state.path("registry.crt").read_text())
    return [
        f"--publish={port}:5000",
        f"--volume={password}:/run/secrets/registry-password:ro",
        f"--volume={key}:/run/secrets/registry-key:ro",
        f"--volume={certificate}:/etc/docker-registry/registry.crt:ro",
    ]


@pytest.fixture(scope="module")
def place(
    start_for_all: Start, secret_file: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    (bridge,) = json.loads(run(["ip", "-json", "-4", "address", "show", "docker0"], timeout_s=30))
    gateway = bridge["addr_info"][0]["local"]
    with socket.create_server((gateway, 0)) as listener:
        port = listener.getsockname()[1]
    settings = replace(config.load(ROOT), head_addr=gateway, registry_port=port, dockerhub_username="")
    state = State(tmp_path_factory.mktemp("state"))
    state.ensure(gateway)
    container = start_for_all("registry", options=options(state, secret_file, port))
    container.wait_until_healthy()
    head = machines.head(settings)
    registry.ensure_trust(settings, state, [head])
    yield Place(container, settings, state)
    registry.remove_trust(settings, [head])
    names = run([docker_cli(), "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], timeout_s=30).split()
    ours = [name for name in names if name.startswith(f"{gateway}:{port}/")]
    if ours:
        run([docker_cli(), "image", "rm", *ours], timeout_s=60)


@pytest.fixture
def worker(start: Start, place: Place) -> Machine:
    """Return a machine with an engine that has no images."""
    key = place.state.path("ssh/id_ed25519.pub")
    container = start("machine", options=machine_options(key))
    container.wait_until_healthy()
    address = container.address
    host_key = container.run("cat", "/etc/ssh/ssh_host_ed25519_key.pub")
    place.state.write("ssh/known_hosts", f"{address} {host_key}")
    return machines.simulated_worker(place.state, "worker", address)


@pytest.fixture
def built(image: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return three images of which two are for workers, so that not all must be built for this."""
    roles = {"mysql": "head", "common": "worker", "registry": "worker"}
    some = {name: replace(images.IMAGES[name], roles=frozenset({role})) for name, role in roles.items()}
    monkeypatch.setattr(distribution, "IMAGES", some)
    return {name: image(name) for name in some}


def distribute(place: Place, worker: Machine, built: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    notes: list[str] = []
    everywhere = [machines.head(place.settings), worker]
    return distribution.distribute(place.settings, place.state, everywhere, built, notes.append), notes


def digests(machine: Machine) -> set[str]:
    form = "{{.Repository}}@{{.Digest}}"
    return set(machine.run(["docker", "image", "ls", "--digests", "--format", form], timeout_s=30).split())


def test_account_of_the_cluster_comes_in_and_nobody_else(place: Place) -> None:
    password = place.state.secret("registry-password")
    assert place.status(user="cfiddle", password=password) == 200
    assert place.status() == 401
    assert place.status(user="cfiddle", password="wrong") == 401
    assert place.status(user="root", password=password) == 401
    assert place.status("/v2/x/blobs/uploads/", method="POST") == 401


def test_plain_http_is_refused(place: Place) -> None:
    connection = http.client.HTTPConnection(place.settings.head_addr, place.settings.registry_port, timeout=10)
    connection.request("GET", "/v2/")
    assert connection.getresponse().status == 400


def test_registry_whose_disk_is_nearly_full_takes_nothing_and_goes_on(
    place: Place, start: Start, secret_file: Callable[[str, str], Path]
) -> None:
    with socket.create_server((place.settings.head_addr, 0)) as listener:
        port = listener.getsockname()[1]
    container = start("registry", options=[*options(place.state, secret_file, port), "--env=KEEP_FREE_MB=1000000000"])
    container.wait_until_healthy()
    full = Place(container, replace(place.settings, registry_port=port), place.state)
    password = place.state.secret("registry-password")
    for there, taken in ((place, 202), (full, 500)):
        assert there.status("/v2/x/blobs/uploads/", user="cfiddle", password=password, method="POST") == taken
    assert full.status(user="cfiddle", password=password) == 200


def test_registry_is_not_root_and_keeps_its_password_to_itself(place: Place) -> None:
    password = place.state.secret("registry-password")
    assert place.container.run("id", "-u").strip() == "804"
    everything = place.container.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'")
    assert "docker-registry" in everything
    assert password not in everything
    assert password not in place.container.log()
    assert password not in place.container.run("cat", "/dev/shm/htpasswd")


def test_log_has_no_complaint_but_of_those_who_were_refused(place: Place) -> None:
    place.status(user="cfiddle", password=place.state.secret("registry-password"))
    refused = "error authorizing context|error authenticating user|HTTP request to an HTTPS server|unknown"
    assert place.container.complaints(but=refused) == []


@pytest.mark.parametrize("missing", ["registry-password", "registry-key", "registry.crt"])
def test_registry_does_not_start_open(
    start: Start, place: Place, secret_file: Callable[[str, str], Path], missing: str
) -> None:
    given = [option for option in options(place.state, secret_file, 0) if missing not in option]
    container = start("registry", options=given[1:])
    assert container.wait_until_ended() == 1
    assert f"{missing} is missing" in container.log()


def test_worker_pulls_by_digest_what_it_runs(place: Place, worker: Machine, built: dict[str, str]) -> None:
    registry.ensure_trust(place.settings, place.state, [worker])
    references, notes = distribute(place, worker, built)
    assert notes == []
    assert {references[name] for name in WORKER_IMAGES} <= digests(worker)
    assert references["mysql"].startswith("sha256:")
    assert built["mysql"].partition(":")[0] not in str(digests(worker))
    again, _ = distribute(place, worker, built)
    assert again == references


def test_account_elsewhere_takes_the_same_way(
    place: Place, worker: Machine, built: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{place.settings.head_addr}:{place.settings.registry_port}"
    elsewhere = replace(place, settings=replace(place.settings, dockerhub_username=f"{address}/cfiddle"))
    registry.ensure_trust(place.settings, place.state, [worker])
    monkeypatch.setenv("DOCKERHUB_TOKEN", place.state.secret("registry-password"))
    references, notes = distribute(elsewhere, worker, built)
    assert notes == []
    assert references["common"].startswith(f"{address}/cfiddle/cfiddle-common@sha256:")
    assert references["common"] in digests(worker)


def test_wrong_password_elsewhere_is_one_clear_message(
    place: Place, worker: Machine, built: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{place.settings.head_addr}:{place.settings.registry_port}"
    elsewhere = replace(place, settings=replace(place.settings, dockerhub_username=f"{address}/teacher"))
    monkeypatch.setenv("DOCKERHUB_TOKEN", "wrong")
    with pytest.raises(ClusterError) as raised:
        distribute(elsewhere, worker, built)
    assert raised.value.message.endswith(f"{address} refuses the password of teacher")
    assert "DOCKERHUB_TOKEN" in raised.value.remedy
    assert digests(worker) == set()


def test_machine_that_does_not_trust_the_registry_gets_images_over_ssh(
    place: Place, worker: Machine, built: dict[str, str]
) -> None:
    references, notes = distribute(place, worker, built)
    assert len(notes) == 1
    assert notes[0].startswith("over SSH, because worker cannot pull")
    ids = worker.run(["docker", "image", "ls", "--quiet", "--no-trunc"], timeout_s=30).split()
    assert sorted(ids) == sorted(references[name] for name in WORKER_IMAGES)


def test_registry_that_is_not_there_is_told_from_a_wrong_password(place: Place) -> None:
    with pytest.raises(RegistryUnreachable):
        registry.of(replace(place.settings, registry_port=9), place.state).ensure_login()


def test_outdated_images_go_unless_a_container_uses_them(place: Place, worker: Machine, built: dict[str, str]) -> None:
    registry.ensure_trust(place.settings, place.state, [worker])
    references, _ = distribute(place, worker, built)
    for name in ("cfiddle-common:older", "192.0.2.1:5000/cfiddle-common:older", "cfiddle-debian:trixie", "else:1"):
        worker.run(["docker", "tag", references["common"], name], timeout_s=30)
    used = worker.run(["docker", "image", "inspect", "--format", "{{.Id}}", references["registry"]], timeout_s=30)
    worker.run(["docker", "run", "--detach", references["registry"], "sleep", "infinity"], timeout_s=60)
    distribution.remove_outdated([worker], {"common": built["common"]})
    names = worker.run(["docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"], timeout_s=30).split()
    assert built["common"] in names
    assert {"cfiddle-debian:trixie", "else:1"} <= set(names)
    assert not [name for name in names if name.endswith("cfiddle-common:older")]
    assert built["registry"] not in names
    assert used in worker.run(["docker", "image", "ls", "--quiet", "--no-trunc"], timeout_s=30)
