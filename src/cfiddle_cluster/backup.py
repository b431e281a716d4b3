"""One file that holds what cannot be made again: accounting, Slurm's state, users and secrets. Homes are not in it.

The file is a tar archive: `manifest.json` first, then `users.json`, `secrets/…`, `accounting.sql.gz` and `slurm/…`.
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO

from cfiddle_cluster import engine, services, slurm, users
from cfiddle_cluster.commands import docker_cli
from cfiddle_cluster.config import STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import SECRETS, State
from cfiddle_cluster.wait import PATIENCE, wait_until

VERSION = 2
"""Of the archive's layout; another one is refused."""

DATABASE = "slurm_acct_db"
SLURM_UID = 802
DUMP_TIMEOUT_S = 3600
STOP_TIMEOUT_S = 60.0
START_TIMEOUT_S = 180.0

_STATE_VOLUMES = (f"{STACK}_mysql", f"{STACK}_slurm")  # as docker-compose.yml calls them
_MARKER = "restoring.json"


@dataclass(frozen=True)
class Archive:
    """A backup that can be restored here.

    Attributes:
        path: the file.
        id: tells it from every other backup.
        made: when it was made, in seconds since 1970.
    """

    path: Path
    id: str
    made: float


def create(config: Config, state: State, path: Path) -> None:
    """Write a backup into a file of mode 0600; slurmctld rests meanwhile, jobs go on.

    Raises:
        ClusterError: the cluster does not run, or the file cannot be written. A file that was there is left as it was.
    """
    missing = [name for name in ("mysql", "slurmctld") if services.container(name) is None]
    if missing:
        raise ClusterError(
            f"{' and '.join(missing)} do not run, so nothing can be written",
            "./invoke up, then this again",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise ClusterError(f"{path} cannot be a file", "name a file in a directory that exists")
    try:
        # Beside the file, so that it is there as a whole or not at all.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            _write(config, state, Path(scratch))
            os.replace(Path(scratch, "archive"), path)
    except OSError as error:
        raise ClusterError(f"{path} cannot be written: {error.strerror}", "name a file on a disk with room") from error


def examine(config: Config, path: Path) -> Archive:
    """Read what a file says of itself, and touch nothing.

    Raises:
        ClusterError: it is no backup, or one that this version cannot restore.
    """
    try:
        with tarfile.open(path) as archive:
            manifest = json.load(_member(archive, "manifest.json"))
            version = manifest["version"]
            if version == VERSION:
                names = set(archive.getnames())
                complete = {
                    "users.json",
                    "accounting.sql.gz",
                    "slurm",
                    *(f"secrets/{name}" for name in SECRETS),
                } <= names
                found = Archive(path, str(manifest["id"]), float(manifest["made"]))
    except FileNotFoundError:
        raise ClusterError(f"there is no file {path}", "name a file that ./invoke backup wrote") from None
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"{path} is no backup of a cluster", "name a file that ./invoke backup wrote") from error
    if version != VERSION:
        raise ClusterError(
            f"{path} is a backup of version {version}, and this is version {VERSION}",
            "restore it with the checkout that wrote it",
        )
    release = manifest.get("debian_release")
    if release != config.debian_release:
        raise ClusterError(
            f"{path} is of Debian {release} and its Slurm, and this is {config.debian_release}",
            f"set DEBIAN_RELEASE={release} in config.sh",
        )
    if not complete:
        raise ClusterError(f"{path} is not complete", "name a file that ./invoke backup wrote to its end")
    return found


def refuse_if_state_exists(state: State, archive: Archive) -> None:
    """Make sure that a restore overwrites nothing, unless it is the same one that was interrupted.

    Raises:
        ClusterError: there is a cluster, or what one left.
    """
    if state.read_json(_MARKER, {}).get("id") == archive.id:
        return
    volumes = {str(volume.name) for volume in engine.client().volumes.list()} if engine.is_running() else set()
    if state.exists or volumes & set(_STATE_VOLUMES):
        raise ClusterError(
            "there is a cluster on this machine, or the state of one, which a restore would overwrite",
            "./invoke backup FILE if it matters, ./invoke down --purge (which deletes the homes too), then this again",
        )


def restore_state(state: State, archive: Archive) -> None:
    """Put back secrets and the list of users, before anything is deployed that uses them."""
    state.path("secrets").mkdir(mode=0o700, parents=True, exist_ok=True)
    state.directory.chmod(0o700)
    state.write_json(_MARKER, {"id": archive.id})
    with tarfile.open(archive.path) as content:
        for name in SECRETS:
            state.write(f"secrets/{name}", _member(content, f"secrets/{name}").read().decode())
        state.write_json(users.LIST, json.load(_member(content, "users.json")))


def restore_services(state: State, archive: Archive) -> None:
    """Put back accounting and Slurm's state, once the stack runs; end the jobs that ran when the backup was made.

    Does nothing where that has been done already.
    """
    if state.read_json(_MARKER, {}).get("id") != archive.id:
        return
    with _stopped("slurmctld"), _stopped("slurmdbd"), tarfile.open(archive.path) as content:
        with gzip.open(_member(content, "accounting.sql.gz")) as dump:
            _load_accounting(dump)
        _load_slurm_state(content)
    wait_until(
        slurm.is_answering,
        timeout_s=START_TIMEOUT_S,
        interval_s=0.5,
        what="slurmctld to answer with the restored state",
    )
    _end_lost_jobs(archive)
    # slurmctld knows the workers by the addresses that they had; each tells its new one when its slurmd starts.
    services.restart("slurmd")
    state.path(_MARKER).unlink()


def _write(config: Config, state: State, scratch: Path) -> None:
    dump = scratch / "accounting.sql.gz"
    with _stopped("slurmctld"):
        _dump_accounting(dump)
        _write_archive(config, state, scratch / "archive", dump)


def _write_archive(config: Config, state: State, path: Path, dump: Path) -> None:
    manifest = {
        "version": VERSION,
        "id": uuid.uuid4().hex,
        "made": datetime.now().timestamp(),
        "debian_release": config.debian_release,
    }
    with (
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
        tarfile.open(fileobj=file, mode="w") as archive,
    ):
        _add(archive, "manifest.json", json.dumps(manifest, indent=2).encode())
        _add(archive, "users.json", json.dumps(state.read_json(users.LIST, {})).encode())
        for name in SECRETS:
            _add(archive, f"secrets/{name}", state.secret(name).encode())
        archive.add(dump, "accounting.sql.gz")
        archive.add(_mountpoint(f"{STACK}_slurm"), "slurm")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.mode = 0o600
    archive.addfile(entry, io.BytesIO(data))


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file


@contextmanager
def _stopped(service: str) -> Iterator[None]:
    """Have no container of a service of the head for a while; it saves what it knows when it ends."""
    services.scale(service, 0)
    try:
        wait_until(lambda: services.container(service) is None, timeout_s=STOP_TIMEOUT_S, what=f"{service} to stop")
        yield
    finally:
        services.scale(service, 1)
    name = f"{STACK}_{service}"
    wait_until(
        lambda: name not in services.unhealthy(),
        timeout_s=START_TIMEOUT_S,
        what=f"{service} to run again",
        remedy=f"./invoke logs {service} shows why not; ./invoke up goes on",
    )


def _mountpoint(volume: str) -> Path:
    return Path(engine.client().volumes.get(volume).attrs["Mountpoint"])


def _in_mysql(*argv: str, interactive: bool = False) -> list[str]:
    container = services.container("mysql")
    if container is None:
        raise ClusterError("mysql does not run", "./invoke logs mysql shows why; ./invoke up starts it")
    return [docker_cli(), "exec", *(["--interactive"] if interactive else []), str(container.id), *argv]


def _dump_accounting(path: Path) -> None:
    """Stream the accounting database into a file; its administrator needs no password on its own socket."""
    argv = _in_mysql("mariadb-dump", "--single-transaction", "--add-drop-database", "--databases", DATABASE)
    with tempfile.TemporaryFile() as errors, subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors) as process:
        assert process.stdout
        with (
            _deadline(process),
            open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed,
        ):
            shutil.copyfileobj(process.stdout, packed)
        _check(process, errors, "the accounting could not be dumped")


def _load_accounting(dump: IO[bytes] | gzip.GzipFile) -> None:
    argv = _in_mysql("mariadb", interactive=True)
    with tempfile.TemporaryFile() as errors, subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=errors) as process:
        assert process.stdin
        with _deadline(process), suppress(BrokenPipeError):  # its exit status and its words say why
            shutil.copyfileobj(dump, process.stdin)
            process.stdin.close()
        _check(process, errors, "the accounting could not be loaded")


@contextmanager
def _deadline(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Kill a process that takes too long to take or give what is copied meanwhile."""
    late = threading.Timer(DUMP_TIMEOUT_S * PATIENCE, process.kill)
    late.start()
    try:
        yield
    finally:
        late.cancel()


def _check(process: "subprocess.Popen[bytes]", errors: IO[bytes], what: str) -> None:
    status = process.wait(timeout=DUMP_TIMEOUT_S * PATIENCE)
    if status:
        errors.seek(0)
        raise ClusterError(
            f"{what}: {errors.read().decode(errors='replace').strip()}", "./invoke logs mysql may show more"
        )


def _load_slurm_state(content: tarfile.TarFile) -> None:
    """Replace what slurmctld saved by what the backup holds; everything in it is slurm's own."""
    directory = _mountpoint(f"{STACK}_slurm")
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()

    for member in content.getmembers():
        path = PurePosixPath(member.name)
        if path.parts[0] != "slurm" or len(path.parts) < 2 or ".." in path.parts:
            continue
        target = directory.joinpath(*path.parts[1:])
        if member.isdir():
            target.mkdir(mode=0o700)
        else:
            with target.open("xb") as file:
                shutil.copyfileobj(_member(content, member.name), file)
            target.chmod(member.mode & 0o700)
        os.chown(target, SLURM_UID, SLURM_UID)


def _end_lost_jobs(archive: Archive) -> None:
    """End the jobs that slurmctld believes to run since before the backup: nothing of them lives."""
    made = datetime.fromtimestamp(archive.made)
    reason = f"ended: it ran when the backup of {made:%Y-%m-%d %H:%M} was made"
    lost = [job for job in _running() if job.start <= made]
    for job in lost:
        slurm.slurm(["scontrol", "update", f"jobid={job.id}", f"admincomment={reason}"])
    if lost:
        slurm.slurm(["scancel", *(job.id for job in lost)])
        remaining = {job.id for job in lost}
        wait_until(
            lambda: not remaining & {job.id for job in _running()},
            timeout_s=60,
            interval_s=0.5,
            what="the jobs of before the backup to end",
        )


@dataclass(frozen=True)
class _Running:
    id: str
    start: datetime


def _running() -> list[_Running]:
    lines = slurm.slurm(
        ["squeue", "--all", "--noheader", "--states=running,suspended,stopped", "--format=%A|%S"]
    ).splitlines()
    return [_Running(line.split("|")[0], datetime.fromisoformat(line.split("|")[1])) for line in lines]
