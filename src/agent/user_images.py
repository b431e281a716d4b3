"""Images that users commit: each under its owner's uid in a registry of their own, from which every machine has them.

What the engine calls `HOST:PORT/u1000/name:tag`, its owner calls `name:tag`, and root `u1000/name:tag`.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from agent.container_shape import USER_LABEL
from agent.engine import Engine, EngineError
from agent.turns import Turns
from agent.wire import Refused, shown

ACCOUNT = "cfiddle"

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"({_PART}(?:/{_PART})*)(?::([A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}}))?")
_OWNED = re.compile(r"u([0-9]{1,10})/(.+)")
_MOST_LETTERS = 200
_MANIFESTS = (
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
)
_TIMEOUT_S = 30.0
_TURN_S = 600.0


@dataclass(frozen=True)
class Registry:
    """The users' registry: HOST:PORT, the password of ACCOUNT there, and who signed its certificate."""

    address: str
    password: str = field(repr=False)
    authority: Path

    @property
    def account(self) -> dict[str, str]:
        """The account as the engine takes it."""
        return {"username": ACCOUNT, "password": self.password, "serveraddress": self.address}

    def digest(self, repository: str, tag: str) -> str:
        """Return the digest of an image's manifest; "" if there is none. A repository is without the address."""
        status, digest = self._ask("HEAD", f"/v2/{repository}/manifests/{tag}")
        if status not in (200, 404):
            raise Refused("registry", f"the users' registry answers {status}")
        return digest if status == 200 else ""

    def delete(self, repository: str, digest: str) -> None:
        """Delete a manifest; one that is gone is as it should be."""
        status, _ = self._ask("DELETE", f"/v2/{repository}/manifests/{digest}")
        if status == 405:
            raise Refused("registry", "the users' registry is read-only while its space is freed; try again later")
        if status not in (202, 404):
            raise Refused("registry", f"the users' registry answers {status}")

    def _ask(self, method: str, path: str) -> tuple[int, str]:
        credential = base64.b64encode(f"{ACCOUNT}:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {credential}", "Accept": ", ".join(_MANIFESTS)}
        try:
            context = ssl.create_default_context(cafile=self.authority)
            connection = http.client.HTTPSConnection(self.address, timeout=_TIMEOUT_S, context=context)
            with contextlib.closing(connection):
                connection.request(method, path, headers=headers)
                answer = connection.getresponse()
                answer.read()
                return answer.status, answer.getheader("Docker-Content-Digest", "")
        except (OSError, http.client.HTTPException) as error:
            raise Refused("registry", f"the users' registry at {self.address} does not answer: {error}") from error


class Reference(NamedTuple):
    """An image of a user's.

    Attributes:
        repository: of the registry, without its address.
    """

    uid: int
    repository: str
    tag: str
    name: str


class UserImages:
    """The users' images on this machine and in the registry; its methods may be called from any thread."""

    def __init__(
        self, engine: Engine, registry: Registry | None, *, per_user: int, most_mb: int, bases: Iterable[str]
    ) -> None:
        """Remember where they are.

        Args:
            registry: None where users can commit nothing.
            per_user: how many of one user a machine may have.
            most_mb: what these may add there to what they are made of.
            bases: the administrator's images, which are nobody's share.
        """
        self._engine = engine
        self._registry = registry
        self._per_user = per_user
        self._most_mb = most_mb
        self._bases = tuple(bases)
        self._turns = Turns[int](threading.Condition())

    def listed(self, uid: int) -> list[dict[str, Any]]:
        """Return the user's images on this machine, by name; root gets everybody's."""
        if self._registry is None:
            return []
        prefix = f"{self._registry.address}/u{uid}/" if uid else f"{self._registry.address}/u"
        hidden = prefix if uid else f"{self._registry.address}/"
        return [
            {
                "name": name.removeprefix(hidden),
                "id": image["Id"],
                "size": image["Size"],
                "owner": (image["Labels"] or {}).get(USER_LABEL, ""),
            }
            for image in self._engine.images()
            for name in sorted(image["RepoTags"] or [])
            if name.startswith(prefix)
        ]

    def commit(self, container: str, uid: int, name: str) -> None:
        """Make an image of a container, and push it to the registry.

        Args:
            container: the engine's id.
            uid: of its owner.
            name: what the owner is to call it.

        Raises:
            Refused: the name is illegal or taken, the share used up, or the registry does not answer.
            EngineError: the image cannot be made or pushed; then there is none.
        """
        registry, image = self._of_registry(), _parsed(uid, name)
        repository = f"{registry.address}/{image.repository}"
        with self._turn(uid):
            if registry.digest(image.repository, image.tag):
                raise Refused("name", f"there is an image {image.name} already; names of images are distinct")
            with self._one_more(uid, f"{repository}:{image.tag}"):
                self._engine.commit(container, repository, image.tag, {})
                self._check_share(uid)
                try:
                    self._engine.push(repository, image.tag, registry.account)
                except EngineError as error:
                    said = f"the users' registry does not take it, as where its disk is nearly full: {error}"
                    raise EngineError(error.status, said) from error

    def ensure(self, uid: int, name: str) -> str:
        """Return what the engine knows a user's image by, and pull it if it is not here.

        Raises:
            Refused: there is none, or it is more than may be here of its owner's.
        """
        if self._registry is None or not _NAME.fullmatch(name):
            raise Refused("image", f"there is no image {shown(name)}")
        image = _parsed(uid, name)
        repository = f"{self._registry.address}/{image.repository}"
        reference = f"{repository}:{image.tag}"
        if self._is_here(reference):
            return reference
        with self._turn(image.uid):
            if self._is_here(reference):  # by now
                return reference
            if not self._registry.digest(image.repository, image.tag):
                raise Refused("image", f"there is no image {image.name}")
            with self._one_more(image.uid, reference):
                self._engine.pull(repository, image.tag, self._registry.account)
                self._check_share(image.uid)
        return reference

    def forget(self, uid: int, name: str) -> None:
        """Remove a user's image from this machine and from the registry; one that is gone is as it should be.

        Raises:
            EngineError: a container is made of it.
        """
        registry, image = self._of_registry(), _parsed(uid, name)
        self._engine.remove_image(f"{registry.address}/{image.repository}:{image.tag}")
        if digest := registry.digest(image.repository, image.tag):
            registry.delete(image.repository, digest)

    def _turn(self, uid: int) -> contextlib.AbstractContextManager[None]:
        """Let the images of one user become more one by one: each is checked against all that are here."""
        refusal = "another image of yours is being made or fetched on this machine; try again later"
        return self._turns.take(uid, timeout_s=_TURN_S, refusal=refusal)

    @contextlib.contextmanager
    def _one_more(self, uid: int, reference: str) -> Iterator[None]:
        """Refuse one too many; where what makes it fails, it is gone."""
        if len(self.listed(uid)) >= self._per_user:
            raise Refused(
                "share", f"{self._per_user} images of yours are here, the most there may be; remove one: ddocker rmi"
            )
        try:
            yield
        except BaseException:
            self._engine.remove_image(reference)
            raise

    def _is_here(self, reference: str) -> bool:
        try:
            self._engine.image(reference)
        except EngineError as error:
            if error.status != 404:
                raise
            return False
        return True

    def _check_share(self, uid: int) -> None:
        own = self._inspected(image["id"] for image in self.listed(uid))
        added_mb = added_bytes(own, self._inspected(self._bases)) / 2**20
        if added_mb > self._most_mb:
            raise Refused(
                "share",
                f"your images would add {added_mb:.0f} MB to what they are made of, more than the {self._most_mb} MB "
                "that they may; remove one: ddocker rmi",
            )

    def _inspected(self, references: Iterable[str]) -> list[dict[str, Any]]:
        """Return what the engine tells of those images that are here."""
        found = []
        for reference in references:
            with contextlib.suppress(EngineError):
                found.append(self._engine.image(reference))
        return found

    def _of_registry(self) -> Registry:
        if self._registry is None:
            raise Refused("registry", "this machine knows no registry for users' images")
        return self._registry


def added_bytes(own: Sequence[Mapping[str, Any]], bases: Sequence[Mapping[str, Any]]) -> int:
    """Return what images add to those that they are made of, be these others of them; all as the engine has it."""
    known = {tuple(image["RootFS"]["Layers"]): int(image["Size"]) for image in (*bases, *own)}
    wanted = {tuple(image["RootFS"]["Layers"]) for image in own}

    def base(layers: tuple[str, ...]) -> int:
        return max(
            (size for below, size in known.items() if below == layers[: len(below)] and below != layers), default=0
        )

    return sum(known[layers] - base(layers) for layers in wanted)


def full_name(name: str) -> str:
    """Return an image's name with its tag."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def registry_of(environment: Mapping[str, str]) -> Registry | None:
    """Return the registry that the stack tells of, in USER_REGISTRY and files beside it; None if it tells of none."""
    address = environment.get("USER_REGISTRY", "")
    if not address:
        return None
    password = Path("/run/secrets/user-registry-password").read_text().strip()
    return Registry(address, password, Path("/etc/cfiddle/ca.crt"))


def _parsed(uid: int, name: str) -> Reference:
    """Return what a user's name for an image stands for; root's begins with the owner's uid."""
    owner, rest = uid, name
    if uid == 0 and (owned := _OWNED.fullmatch(name)):
        owner, rest = int(owned[1]), owned[2]
    found = _NAME.fullmatch(rest)
    if not found or len(rest) > _MOST_LETTERS or owner == 0:
        raise Refused("image", f"{shown(name)} is no name of an image: a-z, 0-9 and . _ - / between them, and a :tag")
    tag = found[2] or "latest"
    return Reference(owner, f"u{owner}/{found[1]}", tag, f"{found[1]}:{tag}")
