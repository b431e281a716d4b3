"""The space of users' images that were removed is freed."""

from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import container_images
from cfiddle_cluster.commands import CommandError
from cfiddle_cluster.errors import ClusterError
from samples import config

EMPTY = "failed to garbage collect: failed to mark: filesystem: Path not found: /docker/registry/v2/repositories"


class Registry:
    """What free_space asks of the engine, and how its collector ends."""

    id = "abc"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, complaint: str) -> None:
        self.updates: list[str] = []
        self.complaint = complaint
        monkeypatch.setattr(container_images, "container", lambda _service: self)
        monkeypatch.setattr(container_images, "run", self._run)

    def _run(self, argv: list[str], **_: object) -> str:
        if "update" in argv:
            self.updates.append(argv[-3])
            return ""
        if "find" in argv:
            self.updates.append(f"{argv[1]} {argv[argv.index('-name') + 1]}")
            return ""
        raise CommandError(argv, 1, self.complaint, "ended with status 1")


def test_registry_that_nobody_has_pushed_to_has_nothing_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, EMPTY)
    assert container_images.free_space() == "no image was ever committed"
    assert registry.updates == ["--env-add", "exec _uploads", "--env-rm"], "it can be written to again"


def test_other_failure_is_said_and_the_registry_can_be_written_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(monkeypatch, "no space left on device")
    with pytest.raises(CommandError, match="no space left"):
        container_images.free_space()
    assert registry.updates == ["--env-add", "exec _uploads", "--env-rm"]


def test_wrong_policy_is_said_and_no_image_travels(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("profilse: {}\n")
    state: Any = None
    with pytest.raises(ClusterError, match="profilse") as caught:
        container_images.share(config(tmp_path), state, [])
    assert caught.value.remedy.startswith("correct policy.yaml")
