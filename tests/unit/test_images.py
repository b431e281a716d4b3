"""Images are named by all that goes into them, and built only where they are missing."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from cfiddle_cluster import config, images, package_access
from cfiddle_cluster.commands import CommandError
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import State

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> config.Config:
    """Return the configuration of a checkout that has a Dockerfile and the sources of every image."""
    for image in images.IMAGES.values():
        directory = tmp_path / "images" / image.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "Dockerfile").write_text(f"FROM {image.name}\n")
        for source in image.sources:
            path = tmp_path / source
            if path.suffix:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(source)
            else:
                path.mkdir(parents=True, exist_ok=True)
                (path / "module.py").write_text(source)
    return replace(config.load(ROOT), root=tmp_path)


class FakeDocker:
    """A docker client of ours that knows some images and remembers what was asked of it."""

    def __init__(self, existing: Sequence[str] = (), releases: Sequence[str] = ("Debian, Python 3",)) -> None:
        self.existing = list(existing)
        self.releases = releases
        self.commands: list[list[str]] = []
        self.failing = ""
        self.context_rights: dict[str, int] = {}

    def __call__(self, argv: Sequence[str | Path], **_options: object) -> str:
        words = [str(word) for word in argv]
        self.commands.append(words)
        if words[1:3] == ["image", "ls"]:
            return "\n".join(self.existing)
        if words[1] == "build":
            tag = words[words.index("--tag") + 1]
            context = Path(words[-1])
            self.context_rights = {
                path.relative_to(context).as_posix(): path.stat().st_mode & 0o777 for path in context.rglob("*")
            }
            if self.failing and self.failing in tag:
                raise CommandError(words, 1, "#7 0.2 E: Unable to locate package nonesuch\n", "ended with status 100")
            self.existing.append(tag)
        if words[1] == "run":
            return self.releases[sum(command[1] == "run" for command in self.commands) % len(self.releases)]
        return ""

    @property
    def built(self) -> list[str]:
        return [
            command[command.index("--tag") + 1].partition(":")[0] for command in self.commands if "build" in command
        ]


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    fake = FakeDocker(["cfiddle-debian:trixie"])
    monkeypatch.setattr(images, "run", fake)
    monkeypatch.setattr(
        images.package_access, "write_build_secrets", lambda *_args, **_options: {"apt": Path("/x/apt")}
    )
    return fake


def test_same_content_has_the_same_name_whatever_its_age_and_rights(checkout: config.Config) -> None:
    before = images.built(checkout)
    for path in checkout.root.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
            path.chmod(0o600)
    assert images.built(checkout) == before


def test_change_renames_the_image_and_its_children_alone(checkout: config.Config) -> None:
    before = images.built(checkout)
    (checkout.root / "images/common/Dockerfile").write_text("FROM something else\n")
    after = images.built(checkout)
    assert {name for name in before if before[name] != after[name]} == {
        "common", "mpi", "machine", "registry", "mysql", "cluster", "agent", "user",
    }  # fmt: skip


def test_change_of_an_extra_source_renames_the_images_that_hold_it(checkout: config.Config) -> None:
    before = images.built(checkout)
    (checkout.root / "src/agent/new.py").write_text("")
    after = images.built(checkout)
    assert {name for name in before if before[name] != after[name]} == {"cluster", "agent", "user"}


@pytest.mark.parametrize("change", ["executable", "renamed", "link"])
def test_every_kind_of_change_counts(checkout: config.Config, change: str) -> None:
    before = images.reference(checkout, "mysql")
    dockerfile = checkout.root / "images/mysql/Dockerfile"
    if change == "executable":
        dockerfile.chmod(0o755)
    elif change == "renamed":
        dockerfile.rename(dockerfile.with_name("Containerfile"))
    else:
        dockerfile.with_name("link").symlink_to("Dockerfile")
    assert images.reference(checkout, "mysql") != before


@pytest.mark.parametrize("other", [{"debian_release": "forky"}, {"packages_of": "2026-11-26"}])
def test_another_debian_renames_every_image(checkout: config.Config, other: dict[str, str]) -> None:
    before = images.built(checkout)
    after = images.built(replace(checkout, **other))
    assert images.debian(checkout) != images.debian(replace(checkout, **other))
    assert all(before[name] != after[name] for name in before)


def test_what_running_the_code_leaves_behind_does_not_count(checkout: config.Config) -> None:
    before = images.built(checkout)
    cache = checkout.root / "src/agent/__pycache__"
    cache.mkdir()
    (cache / "module.cpython-313.pyc").write_bytes(b"\0")
    assert images.built(checkout) == before


def test_missing_source_is_named(checkout: config.Config) -> None:
    (checkout.root / "test_slurm.sh").unlink()
    with pytest.raises(ClusterError, match=r"cfiddle-user needs test_slurm\.sh"):
        images.built(checkout)


def test_parents_are_built_first_and_nothing_twice(checkout: config.Config, docker: FakeDocker) -> None:
    references = images.build(checkout, lambda _text: None, ["agent", "sandbox"])
    assert sorted(docker.built) == ["cfiddle-agent", "cfiddle-base", "cfiddle-common", "cfiddle-sandbox"]
    for parent, child in (("base", "common"), ("common", "agent"), ("base", "sandbox")):
        assert docker.built.index(f"cfiddle-{parent}") < docker.built.index(f"cfiddle-{child}")
    assert set(references) == {"base", "common", "agent", "sandbox"}
    docker.commands.clear()
    assert images.build(checkout, lambda _text: None, ["agent", "sandbox"]) == references
    assert docker.built == []


def test_only_what_changed_is_built(checkout: config.Config, docker: FakeDocker) -> None:
    images.build(checkout, lambda _text: None)
    docker.commands.clear()
    (checkout.root / "images/mysql/Dockerfile").write_text("FROM something else\n")
    images.build(checkout, lambda _text: None)
    assert docker.built == ["cfiddle-mysql"]


def test_debian_is_needed_until_the_base_is_there(checkout: config.Config, docker: FakeDocker) -> None:
    assert images.needs_debian(checkout)
    images.build(checkout, lambda _text: None, ["base"])
    assert not images.needs_debian(checkout)


def test_machine_that_is_simulated_is_built_only_where_workers_are(checkout: config.Config, docker: FakeDocker) -> None:
    real = replace(checkout, worker_addrs=("192.0.2.2",))
    assert "machine" not in images.build(real, lambda _text: None)
    assert "machine" not in images.built(real)
    assert "cfiddle-machine" not in docker.built
    assert "machine" in images.build(checkout, lambda _text: None)
    assert docker.built[-1] == "cfiddle-machine"


def test_context_is_readable_by_everyone_whatever_the_umask_was(checkout: config.Config, docker: FakeDocker) -> None:
    entrypoint = checkout.root / "images/mysql/files/entrypoint"
    entrypoint.parent.mkdir(mode=0o700)
    entrypoint.write_text("#!/bin/sh\n")
    entrypoint.chmod(0o700)
    (checkout.root / "images/mysql/Dockerfile").chmod(0o600)
    images.build(checkout, lambda _text: None, ["mysql"])
    assert docker.context_rights == {"Dockerfile": 0o644, "files": 0o755, "files/entrypoint": 0o755}


def test_context_holds_extra_sources_at_their_path(checkout: config.Config, docker: FakeDocker) -> None:
    images.build(checkout, lambda _text: None, ["sandbox"])
    assert {"Dockerfile", "src/delegate_function/module.py", "requirements/sandbox.lock"} <= set(docker.context_rights)


def test_failing_build_names_the_image_and_says_what_to_do(checkout: config.Config, docker: FakeDocker) -> None:
    docker.failing = "cfiddle-mysql"
    with pytest.raises(ClusterError) as raised:
        images.build(checkout, lambda _text: None)
    assert "cfiddle-mysql could not be built" in raised.value.message
    assert "Unable to locate package nonesuch" in raised.value.message
    assert "images/mysql/" in raised.value.remedy
    assert "./invoke build" in raised.value.remedy


@pytest.fixture
def state(tmp_path: Path, docker: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> State:
    """Return the state of a cluster whose engine has the images that docker knows."""
    state = State(tmp_path / "state")
    state.path("secrets").mkdir(parents=True)
    monkeypatch.setattr(
        images.engine, "image_id", lambda reference: f"id of {reference}" if reference in docker.existing else ""
    )
    return state


def test_two_pythons_are_refused_by_name(checkout: config.Config, docker: FakeDocker, state: State) -> None:
    docker.releases = ["Debian 13, Python 3.13.5", "Debian 13, Python 3.13.9"]
    references = images.build(checkout, lambda _text: None)
    with pytest.raises(ClusterError, match=r"cfiddle-common:.*Python 3\.13\.[59]"):
        images.ensure_one_python(references, state)


def test_an_image_is_looked_into_once(docker: FakeDocker, state: State) -> None:
    def looked_into(*names: str) -> list[str]:
        docker.commands.clear()
        images.ensure_one_python({name: f"cfiddle-{name}:1" for name in ("base", *names)}, state)
        return [word for command in docker.commands for word in command if word.startswith("cfiddle-")]

    docker.existing += [f"cfiddle-{name}:1" for name in ("base", "user", "sandbox", "agent")]
    assert sorted(looked_into("user", "sandbox")) == ["cfiddle-sandbox:1", "cfiddle-user:1"]
    assert looked_into("user", "sandbox", "agent", "absent") == ["cfiddle-agent:1"]
    assert not looked_into("user", "sandbox", "agent")


def test_every_image_of_the_checkout_has_a_dockerfile_and_is_known() -> None:
    directories = {path.parent.name for path in (ROOT / "images").glob("*/Dockerfile")}
    assert directories == set(images.IMAGES)


def _bootstrap(tmp_path: Path, secrets: Path, **tools: str) -> subprocess.CompletedProcess[str]:
    """Run bootstrap where no image can be pulled, with shell scripts in the place of tools."""
    for name, script in {"docker": 'case "$*" in *import*) cat >/dev/null;; *) exit 1;; esac', **tools}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for tool in ("bash", "cat", "dirname", "timeout"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    return subprocess.run(
        [ROOT / "images/base/bootstrap", "trixie", "image", secrets],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_bootstrap_says_what_is_missing_where_nothing_can_be_pulled_or_made(tmp_path: Path) -> None:
    done = _bootstrap(tmp_path, tmp_path)
    assert done.returncode == 1
    assert "apt-get install mmdebstrap" in done.stderr


def test_debian_is_made_as_this_machine_reaches_its_packages(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    package_access.write_build_secrets(secrets, release="trixie", mounted_at=str(secrets))
    done = _bootstrap(tmp_path, secrets, mmdebstrap=f'printf "%s\\n" "$@" >{tmp_path}/told')
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text().splitlines()
    [settings] = [word.removeprefix("--aptopt=") for word in told if word.startswith("--aptopt=")]
    assert f'Dir::Etc::SourceList "{secrets}/sources";' in Path(settings).read_text()
    assert told[-1] == f"{secrets}/sources"
