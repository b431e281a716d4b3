"""Images in a file: all of this checkout's or none, and what is no such file is said to be none."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cfiddle_cluster import config, image_files, images
from cfiddle_cluster.commands import CommandError
from cfiddle_cluster.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = config.load(ROOT)
ALL = set(images.built(CONFIG).values())


class Docker:
    """A client that writes a file when it is told to save."""

    def __init__(self, *, works: bool = True) -> None:
        self.works = works
        self.commands: list[list[str]] = []

    def __call__(self, argv: Sequence[str | Path], **_options: object) -> str:
        words = [str(word) for word in argv]
        self.commands.append(words)
        if words[2] == "save":
            Path(words[words.index("--output") + 1]).write_text("half" if not self.works else "all")
        if not self.works:
            raise CommandError(words, 1, "no space left on device\n", "ended with status 1")
        return ""


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Docker:
    client = Docker()
    monkeypatch.setattr(image_files, "run", client)
    monkeypatch.setattr(images, "existing", lambda: ALL)
    return client


def test_all_images_are_saved(docker: Docker, tmp_path: Path) -> None:
    image_files.save(CONFIG, tmp_path / "images.tar")
    assert set(docker.commands[0][5:]) == ALL
    assert (tmp_path / "images.tar").read_text() == "all"


def test_nothing_is_saved_where_one_is_missing(docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = images.reference(CONFIG, "mysql")
    monkeypatch.setattr(images, "existing", lambda: ALL - {missing})
    with pytest.raises(ClusterError, match=f"not built yet: {missing}"):
        image_files.save(CONFIG, tmp_path / "images.tar")
    assert not docker.commands


def test_half_a_file_is_not_left(docker: Docker, tmp_path: Path) -> None:
    docker.works = False
    with pytest.raises(ClusterError, match="no space left"):
        image_files.save(CONFIG, tmp_path / "images.tar")
    assert not list(tmp_path.iterdir())


def test_loading_says_what_was_not_in_the_file(docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images.tar").touch()
    missing = images.reference(CONFIG, "user")
    monkeypatch.setattr(images, "existing", lambda: ALL - {missing})
    said: list[str] = []
    image_files.load(CONFIG, tmp_path / "images.tar", said.append)
    assert [missing in line for line in said] == [True]


def test_what_is_no_file_of_images_is_refused(docker: Docker, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="there is no file"):
        image_files.load(CONFIG, tmp_path / "none")
    (tmp_path / "text").touch()
    docker.works = False
    with pytest.raises(ClusterError, match="cannot be loaded"):
        image_files.load(CONFIG, tmp_path / "text")
