"""What is asked of this machine's engine, and in what order its containers are told."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from container_manager import interrupts
from container_manager.errors import ContainerError
from container_manager.files import written
from container_manager.local import Engine


class FakeApi:
    """An engine's API that keeps containers by id; `at` is called in the middle of each creation."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}
        self.created: dict[str, str] = {}
        self.at = lambda: None

    def create_host_config(self, **_options: Any) -> dict[str, Any]:
        return {}

    def create_container(self, _image: str, *, name: str, **_options: Any) -> dict[str, str]:
        self.made[f"id of {name}"] = name
        self.at()
        return {"Id": f"id of {name}"}

    def remove_container(self, id: str, **_options: Any) -> None:
        del self.made[id]

    def containers(self, **_options: Any) -> list[dict[str, str]]:
        return [{"Id": id} for id in self.made]

    def inspect_container(self, id: str) -> dict[str, Any]:
        return {
            "Config": {"Labels": {"container-manager.name": self.made[id]}},
            "Id": id,
            "Image": "sha256:1",
            "State": {"Status": "created"},
            "Created": self.created[id],
        }


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.chdir(tmp_path)
    found = Engine()
    found._api = FakeApi()
    return found


@pytest.mark.usefixtures("interruptible")
def test_interrupted_in_the_middle_of_a_creation(engine: Engine) -> None:
    def interrupt_the_second() -> None:
        if len(engine._api.made) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    engine._api.at = interrupt_the_second
    with pytest.raises(interrupts.Interrupted):
        engine.create(["my_task_container_0", "my_task_container_1", "my_task_container_2"])
    assert engine._api.made == {}


def test_newest_first_whatever_the_fraction_of_the_second(engine: Engine) -> None:
    moments = ["2024-02-15T02:59:35Z", "2024-02-15T02:59:35.1Z", "2024-02-15T02:59:35.15Z", "2024-02-15T02:59:35.159Z"]
    for number in (2, 0, 3, 1):
        id = engine._api.create_container("", name=f"my_task_container_{number}")["Id"]
        engine._api.created[id] = moments[number]
    assert [container.created for container in engine.containers()] == moments[::-1]


def test_file_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("before")

    def write_half() -> None:
        with written(file) as writing:
            writing.write("half")
            Path("/dev/full").write_text("there is no room")

    with pytest.raises(ContainerError, match="No space left"):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"data.csv": "before"}
