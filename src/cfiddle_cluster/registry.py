"""The registry that the images go through: the cluster's own, on the head, or one where there is an account."""

import base64
import getpass
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from docker import DockerClient
from docker.errors import APIError, NotFound
from docker.types import ConfigReference, EndpointSpec, Healthcheck, Mount, RestartPolicy, SecretReference

from cfiddle_cluster import engine
from cfiddle_cluster.config import CLUSTER, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine, on_each
from cfiddle_cluster.services import health_check, is_manager, patience
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import wait_until

SERVICE = "cfiddle-registry"
VOLUME = "cfiddle-registry"
USER = "cfiddle"
UID = 804
DOCKER_HUB = "docker.io"
TOKEN_VARIABLE = "DOCKERHUB_TOKEN"
TOKEN_SECRET = "dockerhub-token"

CERTIFICATES = Path("/etc/docker/certs.d")
"""Where an engine looks for the authority of each registry, in a directory by its address."""

PORT_INSIDE = 5000
START_TIMEOUT_S = 90.0

_SECOND_NS = 1_000_000_000
_DEFINITION = "cfiddle.definition"
_LABELS = {"cfiddle.cluster": CLUSTER, "cfiddle.service": SERVICE}
# To be raised when the service's definition below changes, so that one that runs is made anew.
_VERSION = 2


@dataclass(frozen=True)
class Registry:
    """A registry and an account there.

    Attributes:
        address: HOST:PORT, or docker.io.
        namespace: what stands before each repository's name; empty, or ending with a slash.
    """

    address: str
    namespace: str
    username: str
    password: str = field(repr=False)

    def repository(self, name: str) -> str:
        """Return the repository of an image: HOST:PORT/cfiddle-NAME."""
        return f"{self.address}/{self.namespace}cfiddle-{name}"

    @property
    def auth_config(self) -> dict[str, str]:
        """The account as docker-py and the engine take it."""
        return {"username": self.username, "password": self.password, "serveraddress": self._server}

    @property
    def docker_config(self) -> str:
        """The content of a docker client's config.json that knows this account alone."""
        credential = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        return json.dumps({"auths": {self._server: {"auth": credential}}})

    @property
    def _server(self) -> str:
        return "https://index.docker.io/v1/" if self.address == DOCKER_HUB else self.address

    def ensure_login(self) -> None:
        """Prove that the registry takes this account.

        Raises:
            ClusterError: the password is wrong.
            RegistryUnreachable: the registry cannot be reached.
        """
        login = {"username": self.username, "password": self.password, "registry": self._server}
        try:
            engine.client().login(**login, reauth=True)
        except APIError as error:
            raise self.explain(str(error.explanation or error)) from error

    def explain(self, complaint: str) -> ClusterError:
        """Return the error that stands for what an engine says of this registry."""
        if any(
            sign in complaint.lower()
            for sign in ("401", "unauthorized", "denied", "no basic auth", "incorrect username")
        ):
            return ClusterError(f"{self.address} refuses the password of {self.username}", self._password_remedy)
        return RegistryUnreachable(f"{self.address} cannot be used: {complaint.strip()}")

    @property
    def _password_remedy(self) -> str:
        if self.username == USER and not self.namespace:
            return f"let it be made anew, with the right one: docker service rm {SERVICE}; then ./invoke up"
        return f"set {TOKEN_VARIABLE} to a password or access token of {self.username} and run: ./invoke distribute"


class RegistryUnreachable(ClusterError):
    """A registry does not answer, or not in a way that can be used. Images can still travel over SSH."""


def of(config: Config, state: State) -> Registry:
    """Return the registry that the configuration names: Docker Hub with `DOCKERHUB_USERNAME`, else the cluster's own.

    `DOCKERHUB_USERNAME=HOST:PORT/NAME` names an account at another registry.
    """
    if not config.dockerhub_username:
        address = f"{config.head_addr}:{config.registry_port}"
        return Registry(address, "", USER, state.secret("registry-password"))
    host, _, name = config.dockerhub_username.rpartition("/")
    return Registry(host or DOCKER_HUB, f"{name}/", name, _token(name, state))


def _token(username: str, state: State) -> str:
    """Return the password at Docker Hub: from the environment, or as it was given before, or asked for."""
    kept = state.path(f"secrets/{TOKEN_SECRET}")
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and kept.exists():
        return kept.read_text()
    if not token and sys.stdin.isatty():
        token = getpass.getpass(f"password or access token of {username}: ")
    if not token:
        raise ClusterError(
            f"no password for {username}, who is DOCKERHUB_USERNAME in config.sh",
            f"set {TOKEN_VARIABLE} in the environment, once; or empty DOCKERHUB_USERNAME to use the cluster's own",
        )
    state.write(f"secrets/{TOKEN_SECRET}", token)
    return token


def docker_config(config: Config, state: State) -> Path:
    """Return a directory for `docker --config` that knows the registry's account and nothing else."""
    directory = state.path("docker")
    directory.mkdir(mode=0o700, exist_ok=True)
    state.write("docker/config.json", of(config, state).docker_config)
    return directory


def ensure_registry(config: Config, state: State, machines: Iterable[Machine], image: str) -> None:
    """Run the cluster's registry on the head, have every machine trust it, and prove that the account is let in.

    Arguments:
        image: the reference of the image cfiddle-registry, as it was built.
    """
    ensure_trust(config, state, machines)
    if not config.dockerhub_username:
        _ensure_service(config, state, image)
    of(config, state).ensure_login()


def ensure_trust(config: Config, state: State, machines: Iterable[Machine]) -> None:
    """Let the engine of every machine know the authority that signed the registries' certificate."""
    script = """
        set -eu
        certificate=$(cat <<'END'
{certificate}
END
        )
        for address in "$@"; do
            directory={directory}/$address
            mkdir -p "$directory"
            printf '%s\\n' "$certificate" >"$directory/ca.crt.new"
            if cmp -s "$directory/ca.crt.new" "$directory/ca.crt"; then rm "$directory/ca.crt.new"
            else mv "$directory/ca.crt.new" "$directory/ca.crt"; fi
        done
    """.replace("{directory}", str(CERTIFICATES)).replace("{certificate}", state.path("ca.crt").read_text().strip())
    on_each(machines, lambda machine: machine.script(script, _addresses(config), timeout_s=60))


def remove_trust(config: Config, machines: Iterable[Machine]) -> None:
    """Let no engine trust the registries any longer."""
    script = f"""
        set -eu
        [ -d {CERTIFICATES} ] || exit 0
        for address in "$@"; do rm -rf {CERTIFICATES}/"$address"; done
        rmdir --ignore-fail-on-non-empty {CERTIFICATES}
    """
    on_each(machines, lambda machine: machine.script(script, _addresses(config), timeout_s=60))


def users_address(config: Config) -> str:
    """Return the address of the registry of what users commit, a service of the stack."""
    return f"{config.head_addr}:{config.user_registry_port}"


def _addresses(config: Config) -> list[str]:
    return [f"{config.head_addr}:{config.registry_port}", users_address(config)]


def remove_registry(*, purge: bool) -> None:
    """Take the registry's service away, and with `purge` the images that it keeps."""
    client = engine.client()
    if is_manager():
        _remove_service(client)
        _remove_unused(client, used=set())
    if purge:
        for volume in client.volumes.list(filters={"name": f"^{VOLUME}$"}):
            volume.remove()


def _ensure_service(config: Config, state: State, image: str) -> None:
    client = engine.client()
    secrets = {
        "registry-password": state.secret("registry-password").encode(),
        "registry-key": state.path("registry.key").read_bytes(),
    }
    certificate = state.path("registry.crt").read_bytes()
    names = {name: _named(name, data) for name, data in {**secrets, "registry-certificate": certificate}.items()}
    # By the image's id: Swarm asks no registry for it, and this one is not there yet.
    image_id = str(client.images.get(image).id)
    defined_by = [image_id, names, config.registry_port, health_check(), patience(), _VERSION]
    definition = hashlib.sha256(json.dumps(defined_by).encode()).hexdigest()[:12]
    try:
        current = client.services.get(SERVICE).attrs["Spec"]["Labels"].get(_DEFINITION)
    except NotFound:
        current = None
    if current != definition:
        _remove_service(client)
        for name, data in secrets.items():
            _ensure_secret(client, names[name], data)
        _ensure_config(client, names["registry-certificate"], certificate)
        _create_service(client, config, image_id, names, definition)
        _remove_unused(client, used=set(names.values()))
    wait_until(
        lambda: _is_healthy(client),
        timeout_s=START_TIMEOUT_S,
        what="the registry to become healthy",
        remedy=f"docker service ps --no-trunc {SERVICE} and docker service logs {SERVICE} show why it does not",
    )


def _create_service(
    client: DockerClient, config: Config, image_id: str, names: dict[str, str], definition: str
) -> None:
    secret_ids = {item["Spec"]["Name"]: item["ID"] for item in client.api.secrets()}
    config_ids = {item["Spec"]["Name"]: item["ID"] for item in client.api.configs()}
    labels = {"cfiddle.cluster": CLUSTER}
    client.services.create(
        image_id,
        name=SERVICE,
        labels={**labels, _DEFINITION: definition},
        env=patience(),
        container_labels=labels,
        constraints=["node.labels.slurm_head==true"],
        endpoint_spec=EndpointSpec(
            mode="dnsrr",
            ports=[
                {
                    "Protocol": "tcp",
                    "TargetPort": PORT_INSIDE,
                    "PublishedPort": config.registry_port,
                    "PublishMode": "host",
                }
            ],
        ),
        mounts=[Mount("/var/lib/registry", VOLUME, type="volume", labels=labels)],
        secrets=[
            SecretReference(secret_ids[names[name]], names[name], filename=name, uid=str(UID), gid=str(UID), mode=0o400)
            for name in ("registry-password", "registry-key")
        ],
        configs=[
            ConfigReference(
                config_ids[names["registry-certificate"]],
                names["registry-certificate"],
                filename="/etc/docker-registry/registry.crt",
                uid=str(UID),
                gid=str(UID),
                mode=0o444,
            )
        ],
        healthcheck=Healthcheck(
            **{name: value * (1 if name == "retries" else _SECOND_NS) for name, value in health_check().items()}
        ),
        restart_policy=RestartPolicy(condition="any", delay=_SECOND_NS),
        stop_grace_period=10 * _SECOND_NS,
    )


def _remove_service(client: DockerClient) -> None:
    of_service = {"label": f"com.docker.swarm.service.name={SERVICE}"}
    with suppress(NotFound):
        client.services.get(SERVICE).remove()
    wait_until(
        # Listing looks at each container, of which one may be gone by then.
        lambda: not client.containers.list(all=True, filters=of_service, ignore_removed=True),
        timeout_s=60,
        what="the registry's container to be gone",
        remedy=f"docker ps --all --filter name={SERVICE} shows it",
    )


def _is_healthy(client: DockerClient) -> bool:
    tasks = client.api.tasks(filters={"service": SERVICE})
    for task in sorted(tasks, key=lambda task: str(task["UpdatedAt"]), reverse=True):
        error = task["Status"].get("Err", "")
        if "already in use" in error or "already allocated" in error:
            raise ClusterError(
                f"the registry cannot have its port: {error}",
                "set REGISTRY_PORT in config.sh to a free port, or end what uses this one (ss -ltnp shows it)",
            )
    return any(task["Status"]["State"] == "running" and task["DesiredState"] == "running" for task in tasks)


def _ensure_secret(client: DockerClient, name: str, data: bytes) -> None:
    if not client.secrets.list(filters={"name": name}):
        client.api.create_secret(name, data, labels=_LABELS)


def _ensure_config(client: DockerClient, name: str, data: bytes) -> None:
    if not client.configs.list(filters={"name": name}):
        client.api.create_config(name, data, labels=_LABELS)


def _remove_unused(client: DockerClient, *, used: set[str]) -> None:
    mine = {"label": f"cfiddle.service={SERVICE}"}
    for items, remove_one in (
        (client.api.secrets(filters=mine), client.api.remove_secret),
        (client.api.configs(filters=mine), client.api.remove_config),
    ):
        for item in items:
            if item["Spec"]["Name"] not in used:
                remove_one(item["ID"])


def _named(name: str, data: bytes) -> str:
    # The secrets are random and long: twelve digits of a hash tell nothing about them.
    return f"cfiddle_{name}-{hashlib.sha256(data).hexdigest()[:12]}"
