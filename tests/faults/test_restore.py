"""A backup brings everything back on a machine from which the cluster was purged."""

import contextlib
import json
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster import services
from live import LiveCluster, docker, invoke, snapshot

LABEL = "label=cfiddle.cluster=cfiddle"


@contextlib.contextmanager
def _homes_aside(cluster: LiveCluster) -> Iterator[None]:
    """Keep the homes while the cluster is purged: a backup does not hold them, and they may be somebody's."""
    homes = cluster.config.home_root
    aside = homes.with_name(f"{homes.name}.aside")
    homes.rename(aside)
    try:
        yield
    finally:
        if homes.exists():
            shutil.rmtree(homes)
        homes.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(homes)


@pytest.mark.slow
@pytest.mark.last
@pytest.mark.timeout(1200)
def test_backup_purge_restore(cluster: LiveCluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.backup"
    before = snapshot(cluster)
    cluster.user("echo kept > ~/.test-restore", "test_user1").ok()
    done = cluster.sbatch("sleep 2", "test_user1", f"-N{len(cluster.workers)}")
    cluster.wait_for_state(done, "COMPLETED")
    running = cluster.sbatch("sleep 3000", "test_user2", "-w", cluster.workers[0])
    cluster.wait_until_runs(running)
    records = cluster.slurm("sacct -X -a -n -P -S now-7days -o JobID,User,State,Start,End -s CD,F,CA").splitlines()

    images = tmp_path / "images.tar"
    invoke("save-images", str(images), timeout_s=300).ok()
    invoke("backup", str(file), timeout_s=120).ok()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    cluster.slurm(f"scancel {running}")
    invoke("down", timeout_s=180).ok()
    with _homes_aside(cluster):
        result = invoke("down", "--purge", timeout_s=240)
        result.ok()
        _nothing_is_left(cluster)
        assert invoke("down", "--purge", timeout_s=120).exit_status == 0, "never an error when there is nothing"
    invoke("load-images", str(images), timeout_s=300).ok()
    assert "building" not in invoke("restore", str(file), timeout_s=900).ok()

    cluster.wait_until_idle(timeout_s=120)
    assert snapshot(cluster) == before
    assert cluster.user("cat ~/.test-restore; rm ~/.test-restore", "test_user1").ok() == "kept\n"
    after = cluster.slurm("sacct -X -a -n -P -S now-7days -o JobID,User,State,Start,End").splitlines()
    assert set(records) <= set(after)
    lost = cluster.job(running)
    assert lost["state"].split()[0] not in ("RUNNING", "PENDING"), lost
    assert cluster.sbatch("true", "test_user1") > running, "the next job's number goes on"
    cluster.wait_until_idle(timeout_s=60)


def _nothing_is_left(cluster: LiveCluster) -> None:
    for kind in (["ps", "-a"], ["volume", "ls"], ["network", "ls"], ["images"]):
        assert docker(*kind, "-q", "--filter", LABEL).ok() == "", kind
    assert not cluster.config.state_dir.exists()
    assert not cluster.config.home_root.exists()


def test_backup_leaves_every_service_as_it_was_deployed(cluster: LiveCluster, tmp_path: Path) -> None:
    assert invoke("up", timeout_s=180).exit_status == 0
    before = _specifications()
    invoke("backup", str(tmp_path / "cluster.backup"), timeout_s=120).ok()
    assert _specifications() == before, "the next up has nothing to change"
    cluster.wait_until_idle(timeout_s=60)


def _specifications() -> dict[str, Any]:
    """Return what the swarm was told of each service; `docker service inspect` adds the engine's defaults."""
    return {str(service.name): service.attrs["Spec"] for service in services.services()}


def test_backup_of_another_version_is_refused(cluster: LiveCluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.backup"
    invoke("backup", str(file), timeout_s=120).ok()
    with tarfile.open(file) as archive:
        names = archive.getnames()
    manifest = next(name for name in names if name.endswith("manifest.json"))
    folder = tmp_path / "content"
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    content = json.loads((folder / manifest).read_text())
    content["version"] = 99
    (folder / manifest).write_text(json.dumps(content))
    with tarfile.open(file, "w") as archive:
        for name in names:
            archive.add(folder / name, name, recursive=False)
    _refused_restore(cluster, file, "99")


def test_restore_over_a_cluster_that_is_there_is_refused(cluster: LiveCluster, tmp_path: Path) -> None:
    file = tmp_path / "cluster.backup"
    invoke("backup", str(file), timeout_s=120).ok()
    _refused_restore(cluster, file, "purge")


def test_file_that_is_no_backup_is_refused(cluster: LiveCluster, tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_text("Dear cluster,")
    _refused_restore(cluster, file, "letter.txt")
    _refused_restore(cluster, tmp_path / "nowhere", "nowhere")


def _refused_restore(cluster: LiveCluster, file: Path, word: str) -> None:
    before = docker("ps", "-q", "--no-trunc").ok()
    result = invoke("restore", str(file), timeout_s=60)
    assert result.exit_status == 1
    assert word in result.output
    assert "Traceback" not in result.output
    assert docker("ps", "-q", "--no-trunc").ok() == before
    assert cluster.is_idle() == ""
