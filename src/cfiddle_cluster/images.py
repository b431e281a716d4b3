"""Build the cluster's images, each named by its content, and only those that are missing.

`images/NAME/Dockerfile` makes the image `cfiddle-NAME`. Its tag is a hash of that directory, of what else goes into the
build context, and of its parent's tag, so the same checkout always names the same images and a change names new ones.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cfiddle_cluster import engine, package_access
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.config import LABEL, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State

BUILD_TIMEOUT_S = 1800
_AT_ONCE = 3
"""A build waits for the network as often as for a CPU."""

BOOTSTRAP = "mmdebstrap"
"""The package that makes the Debian which the base is built on, where none can be pulled."""

_RELEASES = "releases.json"
"""What images said that were looked into, by their identities; a file of the state."""

TASK_IMAGE = "my_task_image:latest"
"""What the image `task` is called on an engine where people work without a cluster."""

_REMOVE = """
    set -eu
    {
        docker image ls --quiet --no-trunc --filter "label=$1"
        docker image ls --quiet --no-trunc cfiddle-debian
    } | sort --unique | xargs --no-run-if-empty docker image rm --force >/dev/null
    docker builder prune --all --force --filter "label=$1" >/dev/null
"""


@dataclass(frozen=True)
class Image:
    """An image of the cluster.

    Attributes:
        name: the name of its directory in images/.
        parent: the image that its Dockerfile's ARG BASE stands for; None for the one made on a bare Debian.
        sources: what is copied into the build context from the checkout, at the same path, beside images/NAME.
        roles: the roles of the machines whose engine runs it as a service of the swarm.
    """

    name: str
    parent: str | None = "common"
    sources: tuple[str, ...] = ()
    roles: frozenset[str] = frozenset()

    @property
    def repository(self) -> str:
        return f"cfiddle-{self.name}"


_HEAD = frozenset({"head"})
_WORKER = frozenset({"worker"})

# A parent stands before its children. The sandbox shares no more with the others than Debian itself: what two
# containers have in a common layer is in memory once, and how fast it is read tells one about the other.
IMAGES = {
    image.name: image
    for image in (
        Image("base", parent=None),
        Image("common", parent="base"),
        Image("mpi"),
        Image("machine"),
        Image("registry", roles=_HEAD),
        Image("mysql", roles=_HEAD),
        Image(
            "cluster",
            parent="mpi",
            sources=(
                "src/agent",
                "src/container_manager",
                "src/delegate_function",
                "requirements/worker.lock",
                "images/user/files/etc/cfiddle",
                "images/user/files/usr/local/bin/cm",
                "images/user/files/usr/local/lib/cfiddle/container-job",
            ),
            roles=_HEAD | _WORKER,
        ),
        Image("agent", sources=("src/agent",), roles=_WORKER),
        Image(
            "sandbox",
            parent="base",
            sources=(
                "src/agent/__init__.py",
                "src/agent/compact.py",
                "src/delegate_function",
                "requirements/sandbox.lock",
            ),
            roles=_WORKER,
        ),
        Image("compiler", parent="sandbox", roles=_WORKER),
        Image("task", parent="base", roles=_WORKER),
        Image(
            "user",
            parent="mpi",
            sources=(
                "src/agent",
                "src/container_manager",
                "src/delegate_function",
                "requirements/user.lock",
                "test_slurm.sh",
                "test_cfiddle.py",
                "notebooks",
            ),
            roles=_HEAD,
        ),
    )
}


def needed(config: Config) -> list[str]:
    """Return the names of the images that the cluster needs: that of a simulated machine where there are such."""
    return [name for name in IMAGES if name != "machine" or config.simulated]


def built(config: Config) -> dict[str, str]:
    """Return the references of the images that this checkout stands for, by name, whether they exist or not."""
    return {name: reference(config, name) for name in needed(config)}


def reference(config: Config, name: str) -> str:
    """Return `cfiddle-NAME:TAG`; the tag is a hash of all that goes into the image."""
    image = IMAGES[name]
    parent = reference(config, image.parent) if image.parent else debian(config).partition(":")[2]
    digest = hashlib.sha256(f"{parent}\0{LABEL}\0".encode())
    for path, source in _context_files(config.root, image):
        if source.is_symlink():
            kind, content = "link", os.fsencode(os.readlink(source))
        else:
            kind, content = oct(_mode(source)), source.read_bytes()
        digest.update(f"{path}\0{kind}\0{len(content)}\0".encode())
        digest.update(content)
    return f"{image.repository}:{digest.hexdigest()[:12]}"


def debian(config: Config) -> str:
    """Return the reference of the bare Debian that all images are made of."""
    return f"cfiddle-debian:{'-'.join(filter(None, (config.debian_release, config.packages_of)))}"


def build(config: Config, report: Callable[[str], None] = print, names: Iterable[str] | None = None) -> dict[str, str]:
    """Build those of the named images (and of their parents) that do not exist yet; return all references by name.

    Args:
        config: the administrator's settings.
        report: is told what is built.
        names: which; all that the cluster needs if left out.

    Raises:
        ClusterError: a build fails.
    """
    wanted = _with_parents(needed(config) if names is None else names)
    references = {name: reference(config, name) for name in wanted}
    there = existing()
    missing = [name for name in wanted if references[name] not in there]
    if missing:
        with tempfile.TemporaryDirectory(prefix="cfiddle-build-") as scratch:
            _build_all(config, missing, references, Path(scratch), report)
    return references


def needs_debian(config: Config) -> bool:
    """Tell whether a build would begin with the bare Debian; where the base was built or loaded it does not."""
    return reference(config, "base") not in existing()


def _build_all(
    config: Config, names: Iterable[str], references: dict[str, str], scratch: Path, report: Callable[[str], None]
) -> None:
    """Build images, some at once, each after its parent; where one fails, no further one is begun."""
    (scratch / "secrets").mkdir(mode=0o700)
    secrets = package_access.write_build_secrets(
        scratch / "secrets", release=config.debian_release, mounted_at="/run/secrets"
    )
    builds: dict[str, Future[None]] = {}

    def build_one(name: str) -> None:
        image = IMAGES[name]
        # A parent stands before its children, so that it is never one that waits for a thread.
        if image.parent in builds:
            builds[image.parent].result()
        report(f"building {references[name]}")
        _build(config, image, references, scratch, secrets)

    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        for name in names:
            builds[name] = pool.submit(build_one, name)
        try:
            for build_of_one in builds.values():
                build_of_one.result()
        finally:
            pool.shutdown(cancel_futures=True)


def ensure_task_image(config: Config, report: Callable[[str], None] = print) -> str:
    """Have the image of users' own containers on this machine, as TASK_IMAGE; return its reference.

    Raises:
        ClusterError: it cannot be built.
    """
    reference = build(config, report, ["task"])["task"]
    run([docker_cli(), "tag", reference, TASK_IMAGE], timeout_s=60)
    return reference


def ensure_one_python(references: Mapping[str, str], state: State) -> None:
    """Prove that all images are of one Debian release and have one and the same Python.

    A pickled function runs only where the interpreter is the same, and a library only where libc is.

    Raises:
        ClusterError: they are not; the message says which image has what.
    """
    found = releases(references, state)
    if len(set(found.values())) > 1:
        lines = "\n".join(f"  {references[name]}: {release}" for name, release in sorted(found.items()))
        raise ClusterError(
            f"the images are not of one Debian release with one Python:\n{lines}",
            "remove them with ./invoke down --purge (or the odd ones with `docker image rm`) and run: ./invoke build",
        )


def releases(references: Mapping[str, str], state: State) -> dict[str, str]:
    """Return what the images that are there say of their Debian release and their Python, by name.

    An image is looked into once: what it said is in the state. The base has no Python, and is left out.
    """
    ids = {name: engine.image_id(reference) for name, reference in references.items() if name != "base"}
    known: dict[str, str] = state.read_json(_RELEASES, {})
    unknown = {image: references[name] for name, image in ids.items() if image and image not in known}
    if unknown:
        known = {image: release for image, release in known.items() if image in ids.values()}
        known |= _look_into(unknown)
        if state.exists:
            state.write_json(_RELEASES, known)
    return {name: known[image] for name, image in ids.items() if image}


def _look_into(references: Mapping[str, str]) -> dict[str, str]:
    program = '. /etc/os-release; echo "$PRETTY_NAME, $(/usr/bin/python3 --version)"'

    def release(reference: str) -> str:
        argv = [
            docker_cli(),
            "run",
            "--rm",
            "--network",
            "none",
            "--label",
            LABEL,
            "--user",
            "65534",
            "--entrypoint",
            "/bin/sh",
        ]
        return run([*argv, reference, "-c", program], timeout_s=60).strip()

    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(references, pool.map(release, references.values()), strict=True))


def remove_images(machine: Machine) -> None:
    """Remove every image of the cluster from a machine's engine, and what building them left in its cache."""
    machine.script(_REMOVE, [LABEL], timeout_s=600)


def _with_parents(names: Iterable[str]) -> list[str]:
    wanted = set(names)
    for name in reversed(IMAGES):
        parent = IMAGES[name].parent
        if name in wanted and parent:
            wanted.add(parent)
    return [name for name in IMAGES if name in wanted]


def existing() -> set[str]:
    """Return the references of all images of the cluster on this machine's engine."""
    form = "{{.Repository}}:{{.Tag}}"
    return set(run([docker_cli(), "image", "ls", "--format", form, "--filter", f"label={LABEL}"], timeout_s=60).split())


def _build(
    config: Config, image: Image, references: dict[str, str], scratch: Path, secrets: Mapping[str, Path]
) -> None:
    directory = config.root / "images" / image.name
    try:
        parent = references[image.parent] if image.parent else _ensure_debian(config, scratch)
        context = scratch / image.name
        _copy_context(config.root, image, context)
        argv: list[str | Path] = [docker_cli(), "build", "--progress", "plain", "--label", LABEL]
        # The machine's own network: a resolver or a proxy on its loopback address cannot be reached from a bridge.
        argv += ["--network", "host", "--build-arg", f"BASE={parent}", "--tag", references[image.name]]
        for name, path in secrets.items():
            argv += ["--secret", f"id={name},src={path}"]
        run([*argv, context], timeout_s=BUILD_TIMEOUT_S, env=os.environ | {"DOCKER_BUILDKIT": "1"})
    except CommandError as error:
        raise ClusterError(
            f"the image {image.repository} could not be built:\n{error.output}",
            f"mend what it says ({directory.relative_to(config.root)}/ holds how it is built) and run: ./invoke build",
        ) from error


def _ensure_debian(config: Config, scratch: Path) -> str:
    """Return a minimal Debian of the release; pull it, or make it from packages."""
    reference = debian(config)
    if not run([docker_cli(), "image", "ls", "--quiet", reference], timeout_s=60).strip():
        secrets = scratch / "bootstrap"
        secrets.mkdir(mode=0o700)
        package_access.write_build_secrets(secrets, release=config.debian_release, mounted_at=str(secrets))
        bootstrap = config.root / "images" / "base" / "bootstrap"
        environment = os.environ | {"DOCKER": str(docker_cli())}
        run([bootstrap, config.debian_release, reference, secrets], timeout_s=BUILD_TIMEOUT_S, env=environment)
    return reference


def _copy_context(root: Path, image: Image, destination: Path) -> None:
    """Copy what the image is built from; rights depend on nothing but the executable bit, whatever the umask was."""
    for path, source in _context_files(root, image):
        target = destination / path
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        else:
            shutil.copyfile(source, target)
            target.chmod(_mode(source))
    for directory in (
        destination,
        *(path for path in destination.rglob("*") if path.is_dir() and not path.is_symlink()),
    ):
        directory.chmod(0o755)


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _context_files(root: Path, image: Image) -> Iterator[tuple[str, Path]]:
    """Yield path in the build context and file, in a fixed order."""
    directory = root / "images" / image.name
    for path in _files_below(directory):
        yield path.relative_to(directory).as_posix(), path
    for source in image.sources:
        if not (root / source).exists():
            raise ClusterError(
                f"the image {image.repository} needs {source}, which this checkout lacks",
                "restore it, for example with git",
            )
        for path in _files_below(root / source):
            yield path.relative_to(root).as_posix(), path


def _files_below(path: Path) -> list[Path]:
    """Return the file itself, or all files below the directory but those that running the code leaves behind."""
    if not path.is_dir():
        return [path]
    found = (entry for entry in path.rglob("*") if entry.is_symlink() or entry.is_file())
    left_behind = ("__pycache__", ".ipynb_checkpoints")
    return sorted(entry for entry in found if not any(part in left_behind for part in entry.parts))
