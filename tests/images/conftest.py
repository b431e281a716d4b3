"""One image at a time, in a container that is removed after the test."""

import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cfiddle_cluster import config, images
from cfiddle_cluster.commands import docker_cli, run
from containers import Container, Start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def image() -> Callable[[str], str]:
    """Return what builds an image that is missing and returns its reference."""
    settings = config.load(ROOT)
    return lambda name: images.build(settings, lambda _text: None, [name])[name]


def _starter(image: Callable[[str], str]) -> Iterator[Start]:
    started: list[Container] = []

    def starter(name: str, *command: str, options: Sequence[str] = ()) -> Container:
        container = Container(f"cfiddle-test-{name}-{uuid.uuid4().hex[:8]}")
        argv = [docker_cli(), "run", "--detach", "--name", container.name, "--label", config.LABEL, *options]
        started.append(container)
        run([*argv, image(name), *command], timeout_s=60)
        return container

    yield starter
    for container in started:
        subprocess.run([docker_cli(), "rm", "--force", "--volumes", container.name], capture_output=True, check=False)


@pytest.fixture
def start(image: Callable[[str], str]) -> Iterator[Start]:
    """Return what starts a container that lives as long as the test."""
    yield from _starter(image)


@pytest.fixture(scope="module")
def start_for_all(image: Callable[[str], str]) -> Iterator[Start]:
    """Return what starts a container that the tests of a module share."""
    yield from _starter(image)


@pytest.fixture
def volume() -> Iterator[str]:
    """Return the name of an empty volume that is removed after the test."""
    name = f"cfiddle-test-{uuid.uuid4().hex[:8]}"
    run([docker_cli(), "volume", "create", "--label", config.LABEL, name], timeout_s=30)
    yield name
    subprocess.run([docker_cli(), "volume", "rm", "--force", name], capture_output=True, check=False)


@pytest.fixture(scope="module")
def secret_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return what writes a file that a container's user can read, as Swarm's secrets are."""

    def write(name: str, content: str) -> Path:
        path = tmp_path_factory.mktemp("secret") / name
        path.write_text(content)
        path.chmod(0o444)
        return path

    return write
