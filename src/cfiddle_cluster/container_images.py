"""Images of users' containers: those that the policy names, brought to all machines, and the space of deleted ones."""

import re
from collections.abc import Callable, Collection

import docker.errors

from agent import policy
from cfiddle_cluster import distribution, engine, registry, stack
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine, on_each
from cfiddle_cluster.services import container
from cfiddle_cluster.state import State

SERVICE = "user-registry"

_READ_ONLY = "REGISTRY_STORAGE_MAINTENANCE_READONLY"
_COLLECT = ["docker-registry", "garbage-collect", "--delete-untagged", "/etc/docker-registry/config.yml"]
# What uploads have left that came to no end.
_CLEAR = ["find", "/var/lib/registry", "-type", "d", "-name", "_uploads", "-prune", "-exec", "rm", "-r", "{}", "+"]
# What that says of a registry that nobody has pushed to.
_NEVER_USED = "Path not found: /docker/registry/v2/repositories"
_RESTART_TIMEOUT_S = 180
_COLLECT_TIMEOUT_S = 3600


def share(
    config: Config, state: State, machines: Collection[Machine], report: Callable[[str], None] = print
) -> list[str]:
    """Have every image that the policy names for users' containers on every machine, as it is on the head.

    Returns:
        The names of those images.

    Raises:
        ClusterError: policy.yaml is wrong, an image is not on the head, or cannot be brought to a machine.
    """
    rules = stack.load_policy(config.root, policy.own_images({}))
    named = [name for name in (rules.containers.images if rules.containers else {}) if name not in policy.OWN_IMAGES]
    if not named:
        return []
    for name in named:
        _must_be_here(name)
    built = {_key(name): name if ":" in name.rpartition("/")[2] else f"{name}:latest" for name in named}
    target = registry.of(config, state)
    remote = [machine for machine in machines if "head" not in machine.roles]
    pushed = distribution.push(target, built)
    for failure in filter(None, on_each(remote, lambda machine: distribution.pull(machine, target, pushed, built))):
        raise ClusterError(failure, "./invoke doctor")
    report(f"{', '.join(named)}: on {len(machines)} machines")
    return named


def free_space() -> str:
    """Free the space of users' images that were removed; until it is done, users can commit none.

    Returns:
        What the registry says that it has done.

    Raises:
        ClusterError: the registry does not run.
    """
    service = f"{STACK}_{SERVICE}"
    if container(SERVICE) is None:
        raise ClusterError("the registry of users' images does not run", "./invoke up starts it")
    _update(service, "--env-add", f'{_READ_ONLY}={{"enabled":true}}')
    try:
        found = container(SERVICE)
        if found is None:
            raise ClusterError("the registry of users' images did not come back read-only", "./invoke status")
        inside = [docker_cli(), "exec", str(found.id)]
        run([*inside, *_CLEAR], timeout_s=_COLLECT_TIMEOUT_S)
        return run([*inside, *_COLLECT], timeout_s=_COLLECT_TIMEOUT_S)
    except CommandError as error:
        if _NEVER_USED in error.output:
            return "no image was ever committed"
        raise
    finally:
        _update(service, "--env-rm", _READ_ONLY)


def _update(service: str, *options: str) -> None:
    run([docker_cli(), "service", "update", "--quiet", *options, service], timeout_s=_RESTART_TIMEOUT_S)


def _must_be_here(name: str) -> None:
    if "@" in name:
        raise ClusterError(f"{name} is named by its digest", "pull it on each machine, or name it by a tag")
    try:
        engine.client().images.get(name)
    except docker.errors.ImageNotFound as error:
        raise ClusterError(f"no image {name} on this machine", f"docker pull {name}") from error


def _key(name: str) -> str:
    """Return a name for the repository: of several tags each has its own."""
    return re.sub(r"[^a-z0-9/]+", "-", name.lower()).strip("-")
