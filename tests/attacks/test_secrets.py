"""Attack 14: no image holds a key, a password, or anything of the machine that built it: every layer is searched."""

import contextlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from cfiddle_cluster import config, images, package_access
from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.state import SECRETS, State

ROOT = Path(__file__).resolve().parents[2]
LARGEST_SEARCHED = 64 << 20

FORBIDDEN_PATHS = re.compile(
    r"(etc/ssh/ssh_host_\w+|etc/munge/munge\.key|etc/ssl/private/.+|(.*/)?id_(rsa|ecdsa|ed25519)|(.*/)?\.netrc"
    r"|(.*/)?\.docker/config\.json|(.*/)?pip\.conf|run/secrets/.+|etc/apt/auth\.conf(\.d/.+)?|(.*/)?jupyter_cookie_secret)"
)
# A key, and not the words that a program looks for.
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\r?\n[A-Za-z0-9+/=:, \r\n-]{80,}-----END")
# Keys that the authors of a library publish, for its tests and for what it tests of itself at its start.
PUBLISHED = re.compile(r".*/(site|dist)-packages/tornado/test/test\.key|usr/lib/[^/]+/libgnutls\.so\.[0-9.]+")
TELLING_NAME = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|CREDENTIAL|APIKEY|_KEY)\w*=.+", re.IGNORECASE)


def findings(references: list[str], needles: list[bytes]) -> Iterator[str]:
    """Search the layers of images as `docker save` writes them; yield where something is that must not be."""
    words = re.compile(b"|".join(re.escape(needle) for needle in needles)) if needles else None
    named: set[str] = set()
    seen: set[str] = set()
    with (
        subprocess.Popen([docker_cli(), "save", *references], stdout=subprocess.PIPE) as saving,
        tarfile.open(fileobj=saving.stdout, mode="r|", bufsize=1 << 20) as archive,
    ):
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content and member.name == "manifest.json":
                named = {layer for entry in json.load(content) for layer in entry["Layers"]}
            elif content:
                # What is no layer is JSON, and no archive.
                with (
                    contextlib.suppress(tarfile.ReadError),
                    tarfile.open(fileobj=io.BufferedReader(content, 1 << 20), mode="r|*") as files,
                ):
                    yield from _search_layer(files, words)
                    seen.add(member.name)
            elif member.issym():  # to a layer that another image has too
                seen.add(member.name)
    assert saving.returncode == 0
    assert named, "an image has layers"
    assert named <= seen


def _search_layer(files: tarfile.TarFile, words: re.Pattern[bytes] | None) -> Iterator[str]:
    for entry in files:
        path = str(PurePosixPath(entry.name.removeprefix("./")))
        if not entry.isfile():
            continue
        if entry.size and FORBIDDEN_PATHS.fullmatch(path):
            yield f"{path}: no such file belongs into an image"
        if not 0 < entry.size < LARGEST_SEARCHED:
            continue
        content = files.extractfile(entry)
        assert content
        data = content.read()
        if PRIVATE_KEY.search(data) and not PUBLISHED.fullmatch(path):
            yield f"{path}: a private key"
        if words and words.search(data):
            yield f"{path}: a secret of this cluster or of this machine"


def needles_of_this_machine(state: State, scratch: Path, release: str) -> list[bytes]:
    """Return what this cluster keeps secret, and what builds here are told about package sources."""
    found = []
    if state.exists:
        found = [state.secret(name).encode() for name in SECRETS]
        for name in ("ssh/id_ed25519", "ca.key", "registry.key"):
            found.append(state.path(name).read_bytes().splitlines()[1])
    # The addresses of mirrors and proxies that are not the public ones.
    written = package_access.write_build_secrets(scratch, release=release, mounted_at="/run/secrets")
    public = ("deb.debian.org", "pypi.org", "files.pythonhosted.org")
    for name in ("apt", "sources", "pip", "netrc"):
        for host in re.findall(r"https?://([^/\s\"]+)", written[name].read_text()):
            if host not in public:
                found.append(str(host).encode())
    return found


@pytest.fixture(scope="module")
def references() -> list[str]:
    return list(images.build(config.load(ROOT), lambda _text: None).values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_layer_holds_a_secret(references: list[str], tmp_path: Path) -> None:
    settings = config.load(ROOT)
    needles = needles_of_this_machine(State(settings.state_dir), tmp_path, settings.debian_release)
    assert list(findings(references, needles)) == []


def test_history_environment_and_labels_hold_no_secret(references: list[str]) -> None:
    for reference in references:
        inspected = json.loads(run([docker_cli(), "image", "inspect", reference], timeout_s=30))[0]["Config"]
        settings = inspected["Env"] + [f"{name}={value}" for name, value in inspected["Labels"].items()]
        assert [text for text in settings if TELLING_NAME.search(text)] == []
        history = run([docker_cli(), "history", "--no-trunc", "--format", "{{.CreatedBy}}", reference], timeout_s=30)
        # Build secrets are named there, by their mount, never by their content.
        assert [line for line in history.splitlines() if TELLING_NAME.search(line)] == []


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("etc/munge/munge.key", b"\0" * 128),
        ("opt/somewhere/settings", b"password = correct-horse-battery\n"),
        ("root/.ssh/id_ed25519", b"key"),
        ("opt/key.pem", b"-----BEGIN PRIVATE KEY-----\n" + b"MIIEvQIBADANBgkqhkiG9w0BAQEFAASC" * 4 + b"\n-----END"),
    ],
)
def test_search_finds_what_is_hidden_in_a_lower_layer(tmp_path: Path, path: str, content: bytes) -> None:
    """Prove on an image made for it, whose last layer removes the file again, that the search above can fail."""
    (tmp_path / "file").write_bytes(content)
    dockerfile = f"FROM scratch\nCOPY file /{path}\nCOPY empty /{path}\n"
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "Dockerfile").write_text(dockerfile)
    tag = "cfiddle-test-secrets:0"
    argv = [docker_cli(), "build", "--quiet", "--label", config.LABEL, "--tag", tag, tmp_path]
    subprocess.run(argv, env={"DOCKER_BUILDKIT": "1", "PATH": "/usr/bin"}, check=True, capture_output=True, timeout=60)
    try:
        found = list(findings([tag], [b"correct-horse-battery"]))
    finally:
        run([docker_cli(), "image", "rm", tag], timeout_s=60)
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")


def test_two_fresh_clusters_share_no_secret(tmp_path: Path) -> None:
    first, second = State(tmp_path / "first"), State(tmp_path / "second")
    for state in (first, second):
        state.ensure("192.0.2.1")
    for name in SECRETS:
        assert first.secret(name) != second.secret(name)
        assert len(first.secret(name)) >= 64
    for name in ("ssh/id_ed25519", "ca.key", "registry.key", "ca.crt"):
        assert first.path(name).read_bytes() != second.path(name).read_bytes()
        assert first.path(name).stat().st_mode & 0o777 == 0o600 or name == "ca.crt"
