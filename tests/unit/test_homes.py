"""Home directories: who owns them, who may mount them, and links in their place."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import homes
from cfiddle_cluster.config import Config, from_settings
from cfiddle_cluster.errors import ClusterError
from samples import SETTINGS

UID = 2003


def _config(tmp_path: Path, **settings: str) -> Config:
    return from_settings(tmp_path, {**SETTINGS, "HOME_ROOT": str(tmp_path / "home"), **settings})


def _ensure(config: Config, name: str = "ada") -> Path:
    homes.ensure_home(config, name, uid=UID, gid=UID)
    return config.home_root / name


def test_home_is_its_owner_s_alone(tmp_path: Path) -> None:
    home = _ensure(_config(tmp_path))
    found = home.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (UID, UID, 0o700)
    assert home.parent.stat().st_mode & 0o7777 == 0o755


def test_home_that_is_there_stays_as_its_owner_left_it(tmp_path: Path) -> None:
    home = _ensure(_config(tmp_path))
    (home / "file").write_text("mine")
    home.chmod(0o755)
    assert _ensure(_config(tmp_path)).stat().st_mode & 0o777 == 0o755
    assert (home / "file").read_text() == "mine"


def test_home_whose_making_was_interrupted_is_finished(tmp_path: Path) -> None:
    config = _config(tmp_path)
    homes.ensure_root(config)
    (config.home_root / "ada").mkdir(mode=0o755)
    found = _ensure(config).stat()
    assert (found.st_uid, found.st_mode & 0o7777) == (UID, 0o700)


def test_link_in_the_place_of_a_home_is_not_followed(tmp_path: Path) -> None:
    config = _config(tmp_path)
    homes.ensure_root(config)
    target = tmp_path / "etc"
    target.mkdir(mode=0o755)
    (config.home_root / "ada").symlink_to(target)
    with pytest.raises(ClusterError, match="not the home of uid 2003"):
        _ensure(config)
    assert target.stat().st_uid == 0


def test_somebody_else_s_directory_is_not_given_away(tmp_path: Path) -> None:
    config = _config(tmp_path)
    homes.ensure_root(config)
    (config.home_root / "ada").mkdir()
    os.chown(config.home_root / "ada", 2001, 2001)
    with pytest.raises(ClusterError, match="belongs to uid 2001"):
        _ensure(config)


@pytest.mark.parametrize("spoil", [lambda root: root.chmod(0o777), lambda root: os.chown(root, 2001, 0)])
def test_home_root_that_others_can_write_is_refused(tmp_path: Path, spoil: Any) -> None:
    config = _config(tmp_path)
    homes.ensure_root(config)
    spoil(config.home_root)
    with pytest.raises(ClusterError, match="only root can write"):
        _ensure(config)


def test_delete_removes_links_and_leaves_what_they_point_to(tmp_path: Path) -> None:
    config = _config(tmp_path)
    home = _ensure(config)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (home / "link").symlink_to(precious)
    homes.delete_home(config, "ada")
    assert not home.exists()
    assert (precious / "file").read_text() == "kept"
    homes.delete_home(config, "ada")


def test_purge_deletes_homes_and_nothing_that_is_somebody_else_s(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (_ensure(config) / "file").write_text("ada's")
    _ensure(config, "eve")
    precious = config.home_root / "archive" / "file"
    precious.parent.mkdir()
    precious.write_text("kept")
    (config.home_root / "moved").symlink_to(precious.parent)
    assert homes.purge(config, ["ada", "eve", "moved", "gone"]) == ["archive", "moved"]
    assert sorted(os.listdir(config.home_root)) == ["archive", "moved"]
    assert precious.read_text() == "kept"


def test_purge_leaves_no_trace_of_the_usual_directory(tmp_path: Path) -> None:
    config = _config(tmp_path, HOME_ROOT=str(tmp_path / "cfiddle-cluster" / "home"))
    _ensure(config)
    assert homes.purge(config, ["ada"]) == []
    assert os.listdir(tmp_path) == []
    assert homes.purge(config, ["ada"]) == [], "and can be done again"


def test_purge_empties_a_disk_that_is_mounted_for_the_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        assert path == config.home_root
        raise OSError(errno.EBUSY, "Device or resource busy")

    config = _config(tmp_path)
    _ensure(config)
    monkeypatch.setattr(Path, "rmdir", refuse)
    assert homes.purge(config, ["ada"]) == []
    assert os.listdir(config.home_root) == []


def test_simulated_machines_bind_the_directory(tmp_path: Path) -> None:
    config = _config(tmp_path)
    assert homes.volume_options(config) == {"type": "none", "o": "bind", "device": str(tmp_path / "home")}


def test_workers_mount_the_head_s_directory_and_wait_for_it(tmp_path: Path) -> None:
    options = homes.volume_options(_config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3"))
    assert (options["type"], options["device"]) == ("nfs", f":{tmp_path}/home")
    words = options["o"].split(",")
    assert {"addr=10.0.0.1", "hard", "nosuid", "nodev"} <= set(words)
    assert "soft" not in words


def test_export_is_for_the_machines_of_the_cluster_alone(tmp_path: Path) -> None:
    line = homes.exports(_config(tmp_path, WORKER_ADDRS="10.0.0.2 10.0.0.3"))
    path, *clients = line.split()
    assert path == str(tmp_path / "home")
    assert [client.partition("(")[0] for client in clients] == ["10.0.0.2", "10.0.0.3", "10.0.0.1"]
    for client in clients:
        options = client.partition("(")[2].rstrip(")").split(",")
        assert "root_squash" in options
        assert "no_root_squash" not in options
        assert "insecure" not in options


def test_worker_that_is_the_head_too_stands_once_in_the_export(tmp_path: Path) -> None:
    line = homes.exports(_config(tmp_path, WORKER_ADDRS="10.0.0.1 10.0.0.2", HOME_STORAGE="nfs"))
    assert line.count("10.0.0.1(") == 1


def test_server_that_exists_already_is_mounted_and_left_alone(tmp_path: Path) -> None:
    config = _config(tmp_path, WORKER_ADDRS="10.0.0.2", HOME_STORAGE="nfs", HOME_SERVER="nas.example.org")
    assert "addr=nas.example.org" in homes.volume_options(config)["o"]
    homes.ensure_homes(config)
    _ensure(config)
    assert homes.purge(config, ["ada"]) == []
    assert not config.home_root.exists()
    with pytest.raises(ClusterError, match=r"nas\.example\.org"):
        homes.delete_home(config, "ada")


def test_kernel_without_an_nfs_server_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(homes, "kernel_has_nfs_server", lambda: False)
    with pytest.raises(ClusterError, match="HOME_SERVER"):
        homes.ensure_homes(_config(tmp_path, WORKER_ADDRS="10.0.0.2"))


@pytest.mark.parametrize("is_there", [True, False], ids=["a server was there", "a server is installed"])
def test_export_is_written_and_withdrawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    did: list[Any] = []
    monkeypatch.setattr(homes, "kernel_has_nfs_server", lambda: True)
    monkeypatch.setattr(homes, "ensure_packages", lambda names: did.append(names))
    monkeypatch.setattr(homes, "run", lambda argv, timeout_s: did.append(argv))
    monkeypatch.setattr(homes, "EXPORTS", tmp_path / "exports.d" / "cfiddle-cluster.exports")
    monkeypatch.setattr(homes, "SERVER", tmp_path / "nfs.conf.d" / "cfiddle-cluster.conf")
    monkeypatch.setattr(homes, "is_installed", lambda _package: is_there)
    config = _config(tmp_path, WORKER_ADDRS="10.0.0.2")
    homes.ensure_homes(config)
    assert homes.EXPORTS.read_text() == homes.exports(config)
    assert did == [["nfs-kernel-server"], ["exportfs", "-ra"]]
    # Somebody else's server is theirs.
    assert homes.SERVER.exists() != is_there
    assert is_there or "vers2=n\nvers3=n" in homes.SERVER.read_text()
    homes.purge(config, [])
    assert not homes.EXPORTS.parent.exists(), "no directory is left that was not there"
    assert not homes.SERVER.exists()
    assert did[2:] == [["exportfs", "-ra"]]
    assert not config.home_root.exists()
