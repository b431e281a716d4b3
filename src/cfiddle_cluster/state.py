"""What is kept of a cluster on its head, in /var/lib/cfiddle-cluster: secrets, keys, users, and a lock.

All of it is root's alone. It is made at the first `up`, outlives `down`, and is gone with `down --purge`.
"""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfiddle_cluster.commands import run
from cfiddle_cluster.errors import ClusterError

MUNGE_KEY_CHARACTERS = 128
"""MUNGE takes keys of 32 to 1024 bytes; its own tool makes 128."""
TOKEN_BYTES = 32
CERTIFICATE_DAYS = 3650

SECRETS = (
    "munge-key",
    "database-password",
    "jupyter-token",
    "registry-password",
    "user-registry-password",
    "ssh-authority",
)


class State:
    """The directory, and access to what is in it.

    Args:
        directory: its path; made by `ensure`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """Return the path of a file or directory in the state."""
        return self.directory / name

    @property
    def exists(self) -> bool:
        """Whether a cluster was ever made here."""
        return self.path("secrets").is_dir()

    def ensure(self, head_addr: str) -> None:
        """Make the directory and whatever secret, key or certificate it lacks.

        Args:
            head_addr: the address that the registry's certificate is for.
        """
        for directory in (self.directory, self.path("secrets"), self.path("ssh")):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
        for name in SECRETS:
            path = self.path(f"secrets/{name}")
            if not path.exists():
                self.write(f"secrets/{name}", new_secret(name))
        self._ensure_ssh_key()
        self._ensure_certificates(head_addr)

    def secret(self, name: str) -> str:
        """Return a secret by its name.

        Raises:
            ClusterError: there is none of that name, or it cannot be read.
        """
        try:
            return self.path(f"secrets/{name}").read_text()
        except PermissionError as error:
            raise ClusterError(f"{error.filename} is root's alone", "run it as root, or with sudo") from error
        except FileNotFoundError as error:
            raise ClusterError("there is no cluster on this machine", "./invoke up makes one") from error

    def read_json(self, name: str, default: Any) -> Any:
        """Return what a JSON file of the state holds, or the default if there is none."""
        try:
            return json.loads(self.path(name).read_text())
        except FileNotFoundError:
            return default

    def write_json(self, name: str, data: Any) -> None:
        """Write a JSON file of the state; a reader sees the old content or the new, never a part."""
        self.write(name, json.dumps(data, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of mode 0600; a reader sees the old content or the new, never a part."""
        path = self.path(name)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(descriptor, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @contextmanager
    def lock(self, what: str) -> Iterator[None]:
        """Hold the cluster's lock, so that two commands do not change it at once.

        The lock is this process's: commands that it starts do not inherit it, and a killed process holds it no longer.

        Args:
            what: the command, for whoever comes second.

        Raises:
            ClusterError: another command holds it.
        """
        # In a directory that `purge` does not remove, so that nobody can hold a lock that is no more.
        path = Path("/run") / f"{self.directory.name}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with open(descriptor, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = file.read().strip() or "another command"
                raise ClusterError(f"{holder} is at work on this cluster", "wait until it has ended") from error
            file.seek(0)
            file.truncate()
            file.write(f"./invoke {what} (process {os.getpid()})")
            file.flush()
            try:
                yield
            finally:
                file.seek(0)
                file.truncate()
                file.flush()

    def purge(self) -> None:
        """Remove the state."""
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def _ensure_ssh_key(self) -> None:
        key = self.path("ssh/id_ed25519")
        if not key.exists() or not key.with_suffix(".pub").exists():
            key.unlink(missing_ok=True)
            key.with_suffix(".pub").unlink(missing_ok=True)
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cfiddle-cluster", "-f", key], timeout_s=30)

    def _ensure_certificates(self, head_addr: str) -> None:
        authority, authority_key = self.path("ca.crt"), self.path("ca.key")
        if not authority.exists():
            self._make(
                ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
                + ["-days", str(CERTIFICATE_DAYS), "-subj", "/CN=cfiddle-cluster"]
                + ["-addext", "basicConstraints=critical,CA:TRUE,pathlen:0"]
                + ["-addext", "keyUsage=critical,keyCertSign,cRLSign"],
                key=authority_key,
                certificate=authority,
            )
        certificate, key = self.path("registry.crt"), self.path("registry.key")
        if not certificate.exists() or self.read_json("registry-address.json", None) != head_addr:
            kind = "IP" if head_addr.replace(".", "").isdigit() or ":" in head_addr else "DNS"
            request = self.path("registry.csr")
            run(
                ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
                + ["-subj", "/CN=cfiddle-registry", "-addext", f"subjectAltName={kind}:{head_addr}"]
                + ["-keyout", key, "-out", request],
                timeout_s=30,
            )
            run(
                ["openssl", "x509", "-req", "-sha256", "-days", str(CERTIFICATE_DAYS), "-copy_extensions", "copy"]
                + ["-in", request, "-CA", authority, "-CAkey", authority_key, "-CAcreateserial", "-out", certificate],
                timeout_s=30,
            )
            request.unlink()
            self.write_json("registry-address.json", head_addr)

    def _make(self, arguments: list[str], *, key: Path, certificate: Path) -> None:
        """Make a key and a certificate; the certificate appears last, so its presence means that both are whole."""
        unfinished = certificate.with_suffix(".new")
        run(["openssl", *arguments, "-keyout", key, "-out", unfinished], timeout_s=30)
        os.replace(unfinished, certificate)


def new_secret(name: str) -> str:
    """Return a new secret of that name: for the authority over hosts a private key of OpenSSH, for others digits."""
    if name == "ssh-authority":
        with tempfile.TemporaryDirectory() as scratch:
            key = Path(scratch, "key")
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cfiddle-cluster", "-f", key], timeout_s=30)
            return key.read_text()
    length = MUNGE_KEY_CHARACTERS // 2 if name == "munge-key" else TOKEN_BYTES
    return secrets.token_hex(length)
