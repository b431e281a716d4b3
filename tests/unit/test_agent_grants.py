"""Grants: only a plain file that root wrote, in the form that the prolog writes, is one."""

import os
from pathlib import Path

import pytest

from agent.grants import Grants


@pytest.fixture
def grants(tmp_path: Path) -> Grants:
    return Grants(tmp_path, owner=os.getuid())


@pytest.mark.parametrize(
    ("content", "uid", "cpus"),
    [("2001\n", 2001, ""), ("2001 0-3,8\n", 2001, "0-3,8"), ("2001", 2001, ""), ("0", 0, "")],
)
def test_grant_is_read(grants: Grants, tmp_path: Path, content: str, uid: int, cpus: str) -> None:
    (tmp_path / "7").write_text(content)
    found = grants.find(7)
    assert found is not None
    assert (found.uid, found.cpus) == (uid, cpus)
    assert grants.find(8) is None


@pytest.mark.parametrize(
    "content", ["", "\n", "x", "-1", "2001 0-3 more", "2001 all", "2001 ../x", "0x10", "²", "1" * 5000]
)
def test_anything_else_grants_nothing(grants: Grants, tmp_path: Path, content: str) -> None:
    (tmp_path / "7").write_text(content)
    assert grants.find(7) is None


def test_no_link_no_pipe_no_directory_and_no_file_of_another(grants: Grants, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("2001")
    (tmp_path / "1").symlink_to("real")
    os.mkfifo(tmp_path / "2")
    (tmp_path / "3").mkdir()
    assert [grants.find(job) for job in (1, 2, 3)] == [None] * 3
    (tmp_path / "4").write_text("2001")
    assert Grants(tmp_path, owner=os.getuid() + 1).find(4) is None


def test_directory_that_is_a_link_or_missing(grants: Grants, tmp_path: Path) -> None:
    assert Grants(tmp_path / "none").find(7) is None
    (tmp_path / "7").write_text("2001")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="link"):
        Grants(tmp_path / "link", owner=os.getuid()).find(7)


def test_grant_given_anew_is_another(grants: Grants, tmp_path: Path) -> None:
    (tmp_path / "7").write_text("2001")
    first = grants.find(7)
    assert first == grants.find(7)
    (tmp_path / ".7").write_text("2001")
    (tmp_path / ".7").rename(tmp_path / "7")
    assert grants.find(7) != first
