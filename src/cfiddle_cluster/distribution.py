"""Bring the images to the machines that run them: through a registry, by digest, or else over SSH."""

import subprocess
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from docker.errors import APIError

from cfiddle_cluster import engine, registry
from cfiddle_cluster.commands import CommandError, docker_cli
from cfiddle_cluster.config import LABEL, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.images import IMAGES
from cfiddle_cluster.machines import Machine, on_each
from cfiddle_cluster.registry import Registry, RegistryUnreachable
from cfiddle_cluster.state import State
from cfiddle_cluster.wait import PATIENCE

TRANSFER_TIMEOUT_S = 3600.0

_NO_ROOM = "no space left on device"

# Pulls what is missing of REFERENCE=NAME…; the name keeps an image that no container uses yet from being pruned.
_PULL = """
set -eu
umask 077
config=$(mktemp -d -p /dev/shm)
trap 'rm -rf "$config"' EXIT
cat >"$config/config.json" <<'END'
{docker_config}
END
pull() {
    docker image inspect "$1" >/dev/null 2>&1 || docker --config "$config" pull --quiet "$1"
    docker tag "$1" "$2"
}
pids=
for image in "$@"; do
    pull "${image%=*}" "${image#*=}" &
    pids="$pids $!"
done
status=0
for pid in $pids; do wait "$pid" || status=1; done
exit "$status"
"""

_HAS_ALL = 'for image in "$@"; do docker image inspect "$image" >/dev/null || exit 1; done'

# Removes the cluster's images but NAME…, also where they carry a registry's address; one that a container still uses
# stays, and goes the next time. The Debian that the others are made of stays.
_REMOVE_OUTDATED = """
set -eu
docker image ls --filter label="$1" --format '{{.Repository}}:{{.Tag}}' | while read -r image; do
    case " $* cfiddle-debian:${image##*:} " in *" ${image##*/} "*) continue ;; esac
    case "${image##*/}" in cfiddle-*:*) docker image rm "$image" >/dev/null 2>&1 || true ;; esac
done
docker image prune --force --filter label="$1" >/dev/null
"""


def distribute(
    config: Config,
    state: State,
    machines: Collection[Machine],
    built: Mapping[str, str],
    report: Callable[[str], None] = print,
    running: Collection[str] = (),
) -> dict[str, str]:
    """Have the images of its roles on every machine, and return by what reference the engines know each.

    Images that only the head runs stay where they were built and are known by their id, which Swarm never pulls. So are
    those that were never pushed, and that a worker has all the same, since somebody has carried them there in a file.
    A reference that services run by stays: under another one all of them would be replaced, when their jobs have ended.
    Where a machine cannot pull, only what is new to the services goes over SSH: what came that way has no digest there.

    Args:
        machines: the head and all workers.
        built: the references of the built images by name, as `images.build` returns them.
        report: is told of what is not as usual.
        running: by what references the services know the images that they run or start.

    Raises:
        ClusterError: the registry refuses the password, or a machine has no room, cannot be reached at all, or can
            neither pull what the services run by digest nor has it.
    """
    ids = {name: str(engine.client().images.get(built[name]).id) for name, image in IMAGES.items() if image.roles}
    remote = [machine for machine in machines if "head" not in machine.roles]
    travelling = [name for name in ids if any(IMAGES[name].roles & machine.roles for machine in remote)]
    if not travelling:
        return ids
    pushed: dict[str, str] = {}
    failures: list[str | None] = []
    try:
        target = registry.of(config, state)
        there = set[str]().union(*on_each(remote, image_ids))
        carried = {
            name
            for name in travelling
            if ids[name] in there and (ids[name] in running or not _pushed(target, name, built[name]))
        }
        pushed = push(target, {name: built[name] for name in travelling if name not in carried})
        failures = on_each(remote, lambda machine: pull(machine, target, _of_roles(machine, pushed), built))
        obstacle = next(filter(None, failures), None)
    except RegistryUnreachable as error:
        obstacle = error.message
    if obstacle:
        pushed = {name: reference for name, reference in pushed.items() if reference in running}
        for machine, failure in zip(remote, failures, strict=False):
            if failure and not _has_all(machine, _of_roles(machine, pushed)):
                raise ClusterError(
                    f"{failure}\nand it lacks images that the services run",
                    f"let it reach {target.address}; or take it out: ./invoke remove-worker {machine.name}",
                )
        report(f"over SSH, because {obstacle}")
    left = {name: image_id for name, image_id in ids.items() if name not in pushed}
    on_each(remote, lambda machine: copy(machine, {built[name]: ids[name] for name in _of_roles(machine, left)}))
    return ids | pushed


def push(target: Registry, built: Mapping[str, str]) -> dict[str, str]:
    """Push images that the registry lacks; return their references by digest, by name.

    Raises:
        RegistryUnreachable: it does not answer.
        ClusterError: it refuses the password.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(built, pool.map(partial(_push, target), built, built.values()), strict=True))


def pull(machine: Machine, target: Registry, references: Mapping[str, str], built: Mapping[str, str]) -> str | None:
    """Have a machine pull those images that it lacks, all at once, and of each the layers that it lacks.

    The registry's password travels in the script, which goes over standard input, into a file in memory.

    Returns:
        Why the machine cannot use the registry, if so; images can still be copied to it.

    Raises:
        ClusterError: it cannot be reached, it has no room, or the registry refuses the password.
    """
    if not references:
        return None
    script = _PULL.replace("{docker_config}", target.docker_config)
    arguments = [f"{reference}={built[name]}" for name, reference in references.items()]
    try:
        machine.script(script, arguments, timeout_s=TRANSFER_TIMEOUT_S)
    except CommandError as error:
        if _NO_ROOM in error.output:
            raise _no_room(machine) from error
        explanation = target.explain(error.output)
        if not isinstance(explanation, RegistryUnreachable):
            raise explanation from error
        return f"{machine.name} cannot pull from {target.address}: {error.output.rpartition(chr(10))[2]}"
    return None


def copy(machine: Machine, images: Mapping[str, str]) -> None:
    """Copy images over SSH to a machine that lacks them.

    Args:
        images: reference and id of each.

    Raises:
        ClusterError: it fails; the message holds what the other engine said.
    """
    there = image_ids(machine) if images else set()
    missing = [reference for reference, image_id in images.items() if image_id not in there]
    if not missing:
        return
    # One archive, so that a layer that they share travels once.
    with (
        subprocess.Popen([docker_cli(), "save", *missing], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as save,
        subprocess.Popen(
            machine.argv(["docker", "load", "--quiet"]),
            stdin=save.stdout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as load,
    ):
        assert save.stdout
        assert save.stderr
        save.stdout.close()
        try:
            said, _ = load.communicate(timeout=TRANSFER_TIMEOUT_S * PATIENCE)
        except subprocess.TimeoutExpired as error:
            load.kill()
            save.kill()
            raise ClusterError(
                f"copying images to {machine.name} took over {TRANSFER_TIMEOUT_S * PATIENCE:.0f} s"
            ) from error
        complaint = save.stderr.read()
    if load.returncode or save.returncode:
        output = (complaint + said).decode(errors="replace").strip()
        if _NO_ROOM in output:
            raise _no_room(machine)
        raise ClusterError(f"images could not be copied to {machine.name} over SSH:\n{output}", "./invoke doctor")


def image_ids(machine: Machine) -> set[str]:
    """Return the ids of the images that a machine's engine has."""
    return set(machine.run(["docker", "image", "ls", "--quiet", "--no-trunc"], timeout_s=60).split())


def remove_outdated(machines: Collection[Machine], built: Mapping[str, str]) -> None:
    """Remove the cluster's images that are not of this checkout, except those that a container still uses."""
    on_each(machines, lambda machine: machine.script(_REMOVE_OUTDATED, [LABEL, *built.values()], timeout_s=300))


def _pushed(target: Registry, name: str, reference: str) -> list[str]:
    """Return by what references the registry has been given an image, whether it still has it or not."""
    known = engine.client().images.get(reference).attrs["RepoDigests"]
    return [digest for digest in known if digest.startswith(f"{target.repository(name)}@")]


def _push(target: Registry, name: str, reference: str) -> str:
    for known in _pushed(target, name, reference):
        if _has(target, known):
            return known
    client = engine.client()
    repository = target.repository(name)
    image = client.images.get(reference)
    tag = reference.rpartition(":")[2]
    image.tag(repository, tag)
    for event in client.api.push(repository, tag, auth_config=target.auth_config, stream=True, decode=True):
        if "error" in event:
            raise target.explain(str(event["error"]))
        if "Digest" in event.get("aux", {}):
            return f"{repository}@{event['aux']['Digest']}"
    raise RegistryUnreachable(f"{target.address} did not say that it has {repository}")


def _has(target: Registry, reference: str) -> bool:
    try:
        engine.client().api.inspect_distribution(reference, auth_config=target.auth_config)
    except APIError:
        # Pushing it finds out why, and says so.
        return False
    return True


def _has_all(machine: Machine, references: Mapping[str, str]) -> bool:
    """Tell whether Swarm finds all of these on a machine: pulled by digest, since one that was loaded has none."""
    try:
        machine.script(_HAS_ALL, list(references.values()), timeout_s=60)
    except CommandError:
        return False
    return True


def _of_roles(machine: Machine, references: Mapping[str, str]) -> dict[str, str]:
    return {name: reference for name, reference in references.items() if IMAGES[name].roles & machine.roles}


def _no_room(machine: Machine) -> ClusterError:
    return ClusterError(
        f"the disk of {machine.name} is full: there is no room for the images",
        "free some, for example with `docker system prune` there, then run: ./invoke up",
    )
