"""How this machine reaches Debian's and Python's packages, as files that a build mounts and never keeps."""

import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from cfiddle_cluster.commands import run
from cfiddle_cluster.wait import PATIENCE

DEBIAN_MIRROR = "http://deb.debian.org/debian"
DEBIAN_SECURITY_MIRROR = "http://deb.debian.org/debian-security"

# Of apt's settings, those that say how to get at packages. Names of files on this machine mean nothing in a build.
_APT_SETTING = re.compile(
    r'Acquire::((http|https)::|Check-Valid-Until|Check-Date|ForceIPv[46]|Retries)[^ ]* "(?!/).*";'
)

_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "timeout", "proxy")


def write_build_secrets(directory: Path, *, release: str, mounted_at: str) -> dict[str, Path]:
    """Write the files that a build step needs to install packages, and return them by the id of the secret.

    Arguments:
        directory: an existing directory that nobody else can read; a mirror may want a password.
        release: the Debian release whose packages the build installs.
        mounted_at: the directory in which the build sees the files.
    """
    ca = Path(ssl.get_default_verify_paths().cafile or ssl.get_default_verify_paths().openssl_cafile)
    contents = {
        "apt": "".join(f"{line}\n" for line in _apt_configuration(mounted_at)),
        "sources": "".join(f"{line}\n" for line in _apt_sources(release)),
        "netrc": "".join(f"{path.read_text()}\n" for path in _apt_passwords()),
        "pip": "".join(f"{line}\n" for line in _pip_configuration(mounted_at)),
        "ca": ca.read_text() if ca.is_file() else "",
    }
    paths = {}
    for name, text in contents.items():
        paths[name] = directory / name
        paths[name].write_text(text)
        paths[name].chmod(0o600)
    return paths


def _apt_configuration(mounted_at: str) -> Iterator[str]:
    if _is_debian():
        for line in run(["apt-config", "dump"], timeout_s=20).splitlines():
            if _APT_SETTING.fullmatch(line):
                yield line
    yield f'Acquire::https::CaInfo "{mounted_at}/ca";'
    yield f'Dir::Etc::SourceList "{mounted_at}/sources";'
    yield 'Dir::Etc::SourceParts "/dev/null";'
    yield f'Dir::Etc::Netrc "{mounted_at}/netrc";'
    # apt downloads as a user of its own otherwise, who cannot read these files.
    yield 'APT::Sandbox::User "root";'


def _apt_sources(release: str) -> Iterator[str]:
    mirror, security = _debian_mirrors()
    yield f"deb {mirror} {release} main"
    yield f"deb {mirror} {release}-updates main"
    yield f"deb {security} {release}-security main"


def _debian_mirrors() -> tuple[str, str]:
    """Return the mirrors of Debian and of its security suite that this machine uses, or the public ones."""
    mirror, security = DEBIAN_MIRROR, DEBIAN_SECURITY_MIRROR
    if _is_debian():
        form = "$(ORIGIN)|$(LABEL)|$(REPO_URI)"
        for line in run(
            ["apt-get", "indextargets", "--format", form, "Created-By: Packages"], timeout_s=20
        ).splitlines():
            origin, label, uri = line.split("|", 2)
            if origin == "Debian" and label == "Debian-Security":
                security = uri.rstrip("/")
            elif origin == "Debian" and label == "Debian":
                mirror = uri.rstrip("/")
    return mirror, security


def _is_debian() -> bool:
    try:
        release = Path("/etc/os-release").read_text()
    except FileNotFoundError:
        return False
    return re.search(r"^ID=debian$", release, re.MULTILINE) is not None


def _apt_passwords() -> list[Path]:
    files = [Path("/etc/apt/auth.conf"), *sorted(Path("/etc/apt/auth.conf.d").glob("*.conf"))]
    return [path for path in files if path.is_file()]


def _pip_configuration(mounted_at: str) -> Iterator[str]:
    yield "[global]"
    yield f"cert = {mounted_at}/ca"
    for name, value in _pip_settings().items():
        yield f"{name} = {value}"


def _pip_settings() -> dict[str, str]:
    """Return what pip on this machine knows of package indexes, from its files and its environment."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
        check=False,
    )
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        match = re.fullmatch(r"(?:global|install|:env:)\.([a-z-]+)='(.*)'", line)
        if match and match[1] in _PIP_SETTINGS:
            # A directory of this machine is no package index inside a build.
            values = [
                word
                for word in match[2].encode().decode("unicode_escape").split()
                if not word.startswith(("file:", "/"))
            ]
            if values:
                settings[match[1]] = " ".join(values)
    return settings
