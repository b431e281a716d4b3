"""Users' containers on this machine: each of a fixed shape, and running only inside a job of its owner's.

A container that runs is held by a connection: a step of the job asks for it and stays. When the step goes away or the
job ends, the container is stopped; when the container ends, the step is told. Containers that were created, or have
been stopped, are held by nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agent import container_shape, duty, gpus, ports, wire
from agent.container_policy import ContainerPolicy
from agent.container_shape import (
    IMAGE_LABEL,
    LABEL,
    NAME_LABEL,
    UID_LABEL,
    Owner,
    Wanted,
    configuration,
    engine_name,
    limits,
)
from agent.engine import Command, Engine, EngineError
from agent.grants import Grant, Grants
from agent.quiet import Quiet
from agent.turns import Turns
from agent.user_images import Registry, UserImages, full_name
from agent.wire import Refused

RUNNING = "running"

_CLUSTER_LABEL = "cfiddle.cluster"

_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_LOOK_S = 0.5
_GRACE_S = 1
_STOPPED_S = 10.0
_ALONE_S = 30.0
_ADOPTION_S = 5.0
_SWEEP_S = 2.0
_DISK_LOOK_S = 30.0
_DISK_GLANCE_S = 1.0
_DISK_PART = 4
_REMEMBERED_S = 120.0

log = logging.getLogger("agent")


class Outcome(NamedTuple):
    """What became of a job's request for a container: the container's id, or why there is none."""

    uid: int
    container: str
    refusal: Refused | None
    at: float


class _Held:
    """A container that runs in a job.

    Attributes:
        reason: why it is being stopped; "" as long as nobody does.
    """

    def __init__(self, job: int, uid: int) -> None:
        self.job = job
        self.uid = uid
        self.reason = ""


class Containers:
    """The users' containers on this machine; its methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        policy: ContainerPolicy,
        *,
        grants: Grants,
        quiet: Quiet,
        homes: Path,
        home_options: Callable[[str], Mapping[str, str]],
        network: str,
        own_image: str,
        registry: Registry | None = None,
    ) -> None:
        """Begin to see to it that no container runs that is in no job.

        Args:
            homes: where this process sees the users' home directories.
            home_options: returns the options of a volume that is the directory of this name there.
            network: the users' network.
            own_image: the one that this process runs in.
            registry: for what users commit.
        """
        self._engine = engine
        self._policy = policy
        self._grants = grants
        self._quiet = quiet
        self._homes = homes
        self._home_options = home_options
        self._network = network
        self._own_image = own_image
        self._user_images = UserImages(
            engine,
            registry,
            per_user=policy.images_per_user,
            most_mb=policy.images_mb,
            bases=policy.images.values(),
        )
        self._changed = threading.Condition()
        self._turns = Turns[str](self._changed)
        self._held: dict[str, _Held] = {}  # by the engine's name
        self._reporting = threading.Lock()
        self._giving = threading.Lock()  # ports and GPUs
        self._outcomes: dict[int, Outcome] = {}
        self._created: dict[str, str] = {}
        self._written_mb: dict[int, float] = {}
        self._unsure = True  # whether a container may run that nobody holds
        duty.begin(self._sweep, "sweep")
        duty.begin(self._watch_disk, "watch disk")

    # --- what a user can ask, over the network ------------------------------------------------------------------------

    def listed(self, uid: int) -> list[dict[str, Any]]:
        """Return the user's containers, the newest first; root gets everybody's."""
        found = self._listed_of(uid) if uid else self._engine.listed(LABEL)
        return [self._told(container) for container in found]

    def types(self) -> list[dict[str, Any]]:
        """Return what a container may be created with, in the administrator's order."""
        return [kind._asdict() for kind in self._policy.types]

    def images(self, uid: int) -> list[dict[str, Any]]:
        """Return the images that a user's containers can be made of here: the administrator's, then their own."""
        found = []
        for name, reference in self._policy.images.items():
            with contextlib.suppress(EngineError):
                known = self._engine.image(reference)
                found.append({"name": name, "owner": "", "id": known["Id"], "size": known["Size"]})
        return found + self._user_images.listed(uid)

    def amiss(self) -> dict[str, list[str]]:
        """Return the administrator's images that are not here, and the containers here that are not the cluster's."""
        here = [image["name"] for image in self.images(uid=0)]
        others = [one for one in self._engine.listed() if not (one["Labels"] or {}).get(_CLUSTER_LABEL)]
        return {
            "missing": [name for name in self._policy.images if name not in here],
            "foreign": sorted(str(one["Names"][0]).removeprefix("/") for one in others),
        }

    def commit(self, uid: int, name: str, image: str) -> None:
        """Make an image of a container, for its owner.

        Raises:
            Refused: the user has no such container, or the image's name cannot be had.
            EngineError: the engine does not do it; then there is no image.
        """
        found = self._engine.inspect(self._id(uid, name))
        if not found["State"]["Running"] and self._quiet.lasted_s() is None:
            raise Refused("busy", f"something is measured on {os.uname().nodename}, where {name} is; try again later")
        if full_name(image) in map(full_name, self._policy.images):
            raise Refused("name", f"there is an image {image} already; names of images are distinct")
        owner = int(found["Config"]["Labels"][UID_LABEL])
        self._check_disk(owner)
        self._user_images.commit(str(found["Id"]), owner, image)

    def fetch(self, uid: int, image: str) -> None:
        """Have a user's image on this machine; while something is measured it is left until a container needs it."""
        if self._quiet.lasted_s() is not None:
            self._user_images.ensure(uid, image)

    def forget(self, uid: int, image: str) -> None:
        """Remove a user's image from this machine and from the registry; Refused where a container is made of it."""
        for container in self._engine.listed(LABEL, *([f"{UID_LABEL}={uid}"] if uid else [])):
            labels = container["Labels"]
            used = labels.get(IMAGE_LABEL, "") if uid else f"u{labels[UID_LABEL]}/{labels.get(IMAGE_LABEL, '')}"
            if full_name(used) == full_name(image):
                raise Refused("in-use", f"container {labels[NAME_LABEL]} is made of {image}")
        if full_name(image) in map(full_name, self._policy.images):
            raise Refused("image", f"{image} is the administrator's")
        self._user_images.forget(uid, image)

    def gpu_report(self) -> str:
        """Return what nvidia-smi says of this machine's GPUs; Refused where it has none."""
        cards = gpus.found()
        if not cards:
            raise Refused("gpus", f"{os.uname().nodename} has no GPU")
        wanted = {
            "Image": self._own_image,
            "Entrypoint": ["nvidia-smi"],
            "Cmd": [],
            "Tty": True,
            "Labels": {"cfiddle.cluster": "cfiddle"},
            "HostConfig": {
                "CapDrop": ["ALL"],
                "DeviceRequests": container_shape.gpu_request([gpu.uuid for gpu in cards]),
                "NetworkMode": "none",
                "SecurityOpt": ["no-new-privileges"],
            },
        }
        with self._reporting:
            container = self._engine.create(f"cfiddle-nvidia-smi-{time.monotonic_ns()}", wanted)
            try:
                self._engine.start(container)
                self._engine.wait(container)
                return self._engine.logs(container).decode(errors="replace").replace("\r\n", "\n")
            finally:
                self._engine.remove(container)

    def inspected(self, uid: int, name: str) -> dict[str, Any]:
        """Return what the engine knows of a container; Refused if the user has none of that name."""
        return self._engine.inspect(self._id(uid, name))

    def create(self, uid: int, *, user: str, name: str, image: str) -> str:
        """Create a container that is to be started some time; return its id.

        Raises:
            Refused: the name is taken, the image unknown, the user's share used up.
            EngineError: the engine does not do it.
        """
        with self._alone(uid, name):
            return self._create(self._wanted(uid, user, name, image), grant=None)

    def stop(self, uid: int, name: str) -> None:
        """Stop a container, and with it its job; one that does not run is as it should be.

        Raises:
            Refused: the user has none of that name.
        """
        container, key = self._id(uid, name), _key(uid, name)
        with self._changed:
            if key in self._held:
                self._held[key].reason = "stopped"
        self._engine.stop(container, grace_s=_GRACE_S)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._held, _STOPPED_S)

    def delete(self, uid: int, name: str) -> None:
        """Remove a container; one that runs is Refused."""
        with self._alone(uid, name):
            container = self._id(uid, name)
            if self._engine.inspect(container)["State"]["Running"]:
                raise Refused("running", f"container {name} is running")
            self._engine.remove(container)
        if self._written_mb.get(uid, 0) > self._policy.disk_mb:
            self._look_at_disk()

    def outcome(self, uid: int, job: int, *, timeout_s: float) -> str | None:
        """Wait until it is known whether a job has its container, and return the container's id; None for not yet.

        Raises:
            Refused: it cannot have one; or the job is not the user's.
        """
        with self._changed:
            self._changed.wait_for(lambda: job in self._outcomes, timeout_s)
            found = self._outcomes.get(job)
        if found is None:
            return None
        if uid not in (0, found.uid):
            raise Refused("job", f"user {uid} has no job {job}")
        if found.refusal:
            raise found.refusal
        return found.container

    def execute(
        self, uid: int, name: str, argv: list[str], *, terminal: bool, size: tuple[int, int] | None = None, mark: str
    ) -> Command:
        """Run a command in a container that runs.

        Args:
            size: its terminal's rows and columns, as far as they are known.
            mark: by which `end_command` finds its processes.

        Raises:
            Refused: the user has no such container, or it does not run.
        """
        container = self._id(uid, name)
        wanted = {"Cmd": argv, "Tty": terminal, "Env": [f"CFIDDLE_COMMAND={mark}"]}
        try:
            streams = {"AttachStdin": True, "AttachStdout": True, "AttachStderr": True}
            return self._engine.execute(container, {**wanted, **streams}, size=size)
        except EngineError as error:
            if error.status == 409:
                raise Refused("stopped", f"container {name} is not running") from error
            raise

    def end_command(self, uid: int, name: str, mark: str) -> None:
        """Kill the processes of a command whose caller is gone, as far as the container has a shell for it."""
        program = 'for p in /proc/[0-9]*; do grep -qs "^CFIDDLE_COMMAND=$1" "$p/environ" && kill -9 "${p#/proc/}"; done'
        with contextlib.suppress(EngineError, Refused):
            wanted = {"Cmd": ["/bin/sh", "-c", f"{program} 2>/dev/null", "sh", mark], "AttachStdout": True}
            self._engine.execute(self._id(uid, name), wanted).close()

    # --- what a step of a job asks, on this machine -------------------------------------------------------------------

    def hold(self, connection: socket.socket, uid: int, request: Mapping[str, Any]) -> None:
        """Run a container in a job until the job, the step that asks, or the container ends.

        Args:
            connection: to the step, which is told `running` and at last `ended`, with the container's exit status; that
                is 0 where its owner stopped it.
            request: job, user, name, image, and `again` where the step had it from an earlier agent.
        """
        job, name = int(request["job"]), str(request["name"])
        grant = self._grants.find(job)
        if grant is None or grant.uid != uid:
            raise Refused("job", f"user {uid} has no job {job} here")
        try:
            with self._quiet.lease(job, grant), self._started(uid, request, grant) as (container, held):
                self._tell(job, Outcome(uid, container, None, time.monotonic()))
                wire.send(connection, {"type": "running", "container": container})
                status = self._watch(connection, container, held, grant)
            if held.reason == "stopped":
                status = 0
            log.info("container %s of user %d, job %d: ended with status %s", name, uid, job, status)
            with contextlib.suppress(OSError):
                wire.send(connection, {"type": "ended", "status": status, "reason": held.reason})
        except (Refused, EngineError) as error:
            refusal = error if isinstance(error, Refused) else Refused("engine", str(error))
            self._tell(job, Outcome(uid, "", refusal, time.monotonic()))
            raise refusal from error

    @contextlib.contextmanager
    def _started(self, uid: int, request: Mapping[str, Any], grant: Grant) -> Iterator[tuple[str, _Held]]:
        job, name = int(request["job"]), str(request["name"])
        key, held = _key(uid, name), _Held(job, uid)
        with self._alone(uid, name):
            with self._changed:
                if key in self._held:
                    raise Refused("running", f"container {name} runs already, in job {self._held[key].job}")
                if any(other.job == job for other in self._held.values()):
                    raise Refused("job", f"job {job} has a container already")
                self._held[key] = held
            try:
                container = self._running(uid, request, grant)
            except BaseException:
                self._let_go(key)
                raise
        try:
            yield container, held
        finally:
            try:
                self._engine.stop(container, grace_s=_GRACE_S)
            except EngineError as error:
                log.warning("container %.12s cannot be stopped yet: %s", container, error)
                self._unsure = True
            finally:
                self._let_go(key)

    def _running(self, uid: int, request: Mapping[str, Any], grant: Grant) -> str:
        """Return the id of the container that is asked for, which runs; it is created if there is none."""
        name, image = str(request["name"]), str(request["image"])
        try:
            found = self._engine.inspect(self._id(uid, name))
        except Refused:
            if request["again"] or not image:
                raise
            wanted = self._wanted(uid, str(request["user"]), name, image)
            return self._run(wanted, grant, number_of_ports=int(request["ports"]))
        container = str(found["Id"])
        if not found["State"]["Running"]:
            self._check_gpus(container_shape.gpus(found["Config"]), grant, but=_key(uid, name))
            if wanted_limits := limits(grant):
                self._engine.update(container, wanted_limits)
            self._check_disk(uid)
            try:
                self._engine.start(container)
            except EngineError as error:
                if in_use := ports.in_the_way(str(error), container_shape.ports(found["Config"])):
                    raise Refused("ports", f"something else listens on port {min(in_use)} of this machine") from error
                raise
        elif not request["again"]:
            raise Refused("running", f"container {name} is just being stopped")
        return container

    def _run(self, wanted: Wanted, grant: Grant, *, number_of_ports: int) -> str:
        """Create a container and start it, with ports that nothing else has; it is gone if it cannot be started."""
        in_use: set[int] = set()
        while True:
            with self._giving:
                given = self._free_ports(number_of_ports, in_use) if number_of_ports else []
                cards = gpus.chosen(grant.gpus, gpus.found(), taken=self._gpus_in_use(but="")) if grant.gpus else []
                container = self._create(wanted._replace(ports=given, gpus=cards), grant=grant)
            try:
                self._engine.start(container)
                return container
            except BaseException as error:
                self._engine.remove(container)
                found = ports.in_the_way(str(error), given) if isinstance(error, EngineError) else set()
                if not found:
                    raise
                in_use |= found

    def _free_ports(self, number: int, in_use: set[int]) -> list[int]:
        given = {port for container in self._engine.listed(LABEL) for port in container_shape.ports(container)}
        return ports.free(number, first=self._policy.first_port, taken=given | in_use)

    def _gpus_in_use(self, *, but: str) -> set[str]:
        """Return the uuids of the GPUs of containers that run or are about to, all but one."""
        found = set()
        for container in self._engine.listed(LABEL):
            labels = container["Labels"]
            key = engine_name(int(labels[UID_LABEL]), labels[NAME_LABEL])
            if key in self._held and key != but:
                found |= set(container_shape.gpus(container))
        return found

    def _check_gpus(self, uuids: list[str], grant: Grant, *, but: str) -> None:
        """Refuse to start a container with GPUs that its job does not have, or that another container has by now."""
        if not uuids:
            return
        models = {gpu.uuid: gpus.kind(gpu.model) for gpu in gpus.found()}
        if sorted(models.get(uuid, "") for uuid in uuids) != sorted(grant.gpus):
            raise Refused("gpus", "the job has not the GPUs that the container was made with")
        if taken := self._gpus_in_use(but=but) & set(uuids):
            raise Refused("gpus", f"another container has the GPU {min(taken)} that this one was made with")

    def _watch(self, connection: socket.socket, container: str, held: _Held, grant: Grant) -> int | None:
        """Wait until the container ends by itself, or has to be ended; return its status, None where it has to be."""
        ending = self._engine.ending(container)
        try:
            poller = select.poll()
            poller.register(connection, select.POLLIN)
            poller.register(ending, select.POLLIN)
            while True:
                ready = [fd for fd, _ in poller.poll(_LOOK_S * 1000)]
                if ending.fileno() in ready:
                    return ending.status()
                if connection.fileno() in ready:
                    held.reason = held.reason or "the job's step is gone"
                    return None
                if self._grants.find(held.job) != grant:
                    held.reason = held.reason or "the job ended"
                    return None
                if held.reason:  # it was stopped while it was being started
                    return None
        finally:
            ending.close()

    def _let_go(self, key: str) -> None:
        with self._changed:
            del self._held[key]
            self._changed.notify_all()

    def _tell(self, job: int, outcome: Outcome) -> None:
        with self._changed:
            old = [known for known, told in self._outcomes.items() if outcome.at - told.at > _REMEMBERED_S]
            for known in old:
                del self._outcomes[known]
            self._outcomes[job] = outcome
            self._changed.notify_all()

    # --- what both need -----------------------------------------------------------------------------------------------

    def _wanted(self, uid: int, user: str, name: str, image: str) -> Wanted:
        owner = self._owner(uid, user)
        return Wanted(owner, name, image, self._policy.images.get(image) or self._user_images.ensure(uid, image))

    def _create(self, wanted: Wanted, *, grant: Grant | None) -> str:
        owner, name = wanted.owner, wanted.name
        if self._others(owner.uid, name) >= self._policy.per_user:
            raise Refused("share", f"{self._policy.per_user} containers of yours are here, the most there may be")
        self._check_disk(owner.uid)
        asked = configuration(
            wanted,
            policy=self._policy,
            grant=grant,
            home=self._home_options(owner.user),
            network=self._network,
        )
        try:
            return self._engine.create(engine_name(owner.uid, name), asked)
        except EngineError as error:
            if error.status == 409:
                raise Refused("name", f"there is a container {name} already") from error
            if error.status == 404:
                raise Refused("image", f"the image {wanted.image} is not on this machine") from error
            raise

    def _others(self, uid: int, name: str) -> int:
        """Return how many other containers the user has, with those that are being created just now."""
        with self._changed:
            busy = {key for key in self._turns.taken if key.startswith(engine_name(uid, ""))}
        there = {engine_name(uid, found["Labels"][NAME_LABEL]) for found in self._listed_of(uid)}
        return len((busy | there) - {engine_name(uid, name)})

    def _listed_of(self, uid: int) -> list[dict[str, Any]]:
        return self._engine.listed(LABEL, f"{UID_LABEL}={uid}")

    def _id(self, uid: int, name: str) -> str:
        """Return the id of a user's container; root's may be called as the engine does, `uUID.NAME`."""
        try:
            found = self._engine.inspect(_key(uid, name))
        except EngineError as error:
            if error.status != 404:
                raise
            raise Refused("name", f"there is no container {name}") from error
        labels = found["Config"]["Labels"] or {}
        if LABEL not in labels or (uid and labels.get(UID_LABEL) != str(uid)):
            raise Refused("name", f"there is no container {name}")
        return str(found["Id"])

    def _owner(self, uid: int, user: str) -> Owner:
        """Return the user of that name; the home directory must be theirs, or it is not their name."""
        if _USER.fullmatch(user):
            with contextlib.suppress(OSError):
                home = (self._homes / user).lstat()
                if home.st_uid == uid and (home.st_mode & 0o170000) == 0o040000:
                    return Owner(uid, home.st_gid, user)
        raise Refused("user", f"user {uid} has no home directory {wire.shown(user)} here")

    def _alone(self, uid: int, name: str) -> contextlib.AbstractContextManager[None]:
        """Let nobody else create, start or remove this container meanwhile."""
        refusal = f"container {name} is being created, started or removed"
        return self._turns.take(_key(uid, name), timeout_s=_ALONE_S, refusal=refusal)

    def _told(self, container: Mapping[str, Any]) -> dict[str, Any]:
        identifier, labels = str(container["Id"]), container["Labels"]
        if identifier not in self._created:
            with contextlib.suppress(EngineError):  # it may be gone since
                self._created[identifier] = str(self._engine.inspect(identifier)["Created"])
        with self._changed:
            held = self._held.get(engine_name(int(labels[UID_LABEL]), labels[NAME_LABEL]))
        created = self._created.get(identifier, "")
        return container_shape.told(container, created=created, job=held.job if held else None)

    # --- what is seen to all the time ---------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Stop what runs in no job. The steps of an earlier agent's containers get some seconds to come.

        While something is measured the engine is left alone, unless a container may have been left running.
        """
        time.sleep(_ADOPTION_S)
        while True:
            if self._unsure or self._quiet.lasted_s() is not None:
                self._unsure = False
                if not self._is_swept():
                    self._unsure = True
            time.sleep(_SWEEP_S)

    def _is_swept(self) -> bool:
        try:
            there = self._engine.listed(LABEL)
            for gone in set(self._created) - {container["Id"] for container in there}:
                self._created.pop(gone, None)
            for container in there:
                self._stop_stray(container)
        except EngineError as error:
            log.warning("the engine does not say which containers run, or stops none: %s", error)
            return False
        return True

    def _stop_stray(self, container: Mapping[str, Any]) -> None:
        if container["State"] != RUNNING:
            return
        labels = container["Labels"]
        with self._changed:
            key = engine_name(int(labels[UID_LABEL]), labels[NAME_LABEL])
            if key in self._turns.taken or key in self._held:
                return
        log.warning("container %.12s runs in no job: it is stopped", container["Id"])
        self._engine.stop(container["Id"], grace_s=_GRACE_S)

    def _watch_disk(self) -> None:
        """Stop the containers of users who have written more than they may; an experiment's machine has none that run.

        A job of `shared` that holds no container counts as a measurement, and may be there beside them. The engine adds
        up file by file, so it is asked now and then; and at once when the disk has got fuller by a good part of what
        one user may write.
        """
        while True:
            free_mb = _free_mb()
            if self._held or self._quiet.lasted_s() is not None:
                self._look_at_disk()
            again, least_mb = time.monotonic() + _DISK_LOOK_S, free_mb - self._policy.disk_mb / _DISK_PART
            time.sleep(_DISK_GLANCE_S)
            while time.monotonic() < again and _free_mb() > least_mb:
                time.sleep(_DISK_GLANCE_S)

    def _look_at_disk(self) -> None:
        try:
            self._measure_disk()
        except EngineError as error:
            log.warning("the engine does not say what containers have written: %s", error)

    def _measure_disk(self) -> None:
        written: dict[int, float] = {}
        running: dict[int, list[str]] = {}
        for container in self._engine.listed(LABEL, sizes=True):
            uid = int(container["Labels"][UID_LABEL])
            written[uid] = written.get(uid, 0) + container.get("SizeRw", 0) / 2**20
            if container["State"] == RUNNING:
                running.setdefault(uid, []).append(container["Id"])
        self._written_mb = written
        for uid in [uid for uid, megabytes in written.items() if megabytes > self._policy.disk_mb]:
            for identifier in running.get(uid, []):
                log.warning("container %.12s is stopped: user %d has written too much", identifier, uid)
                self._engine.stop(identifier, grace_s=_GRACE_S)

    def _check_disk(self, uid: int) -> None:
        written = self._written_mb.get(uid, 0)
        if written > self._policy.disk_mb:
            raise Refused(
                "disk",
                f"your containers here have written {written:.0f} MB, more than the {self._policy.disk_mb} MB "
                "that they may; delete one",
            )


def _free_mb() -> float:
    """Return how much is free where the engine keeps containers, as it does this one."""
    found = os.statvfs("/")
    return found.f_bavail * found.f_frsize / 2**20


def _key(uid: int, name: str) -> str:
    """Return what the engine calls a container that a user calls so; root calls it as the engine does."""
    return name if uid == 0 else engine_name(uid, name)
