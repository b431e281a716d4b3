"""Users are added, removed and imported while the cluster runs."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from live import LiveCluster, invoke, wait_until


@pytest.fixture
def name(cluster: LiveCluster) -> Iterator[str]:
    """Give a user name that nobody has; the user is removed afterwards."""
    name = f"t{uuid.uuid4().hex[:8]}"
    yield name
    if name in json.loads(_listed(cluster))["users"]:
        invoke("remove-user", name, "--delete-home").ok()


def _listed(cluster: LiveCluster) -> str:
    return (cluster.config.state_dir / "users.json").read_text()


def _users_on_userhost(cluster: LiveCluster) -> list[str]:
    return cluster.user("getent passwd | cut -d: -f1").ok().split()


def _left_as_it_was(cluster: LiveCluster, before: str) -> None:
    assert _listed(cluster) == before


def test_added_user_works_at_once_and_removed_one_is_gone(cluster: LiveCluster, name: str) -> None:
    invoke("add-user", name).ok()
    there = cluster.user("cd ~ && srun -J test bash -c 'id -u; pwd; touch was-here'", name).ok().split()
    assert there == [str(cluster.ids(name)[0]), f"/home/{name}"]
    home = cluster.config.home_root / name
    assert (home / "was-here").exists()
    assert home.stat().st_mode & 0o7777 == 0o700
    assert home.stat().st_uid == cluster.ids(name)[0] >= 2003

    job = cluster.sbatch("sleep 100", name, "-p", "shared", "--mem=64")
    cluster.wait_until_runs(job)
    uid = cluster.ids(name)[0]
    cluster.user(["cm", "run", "--cmd", "true"], name).ok()
    cluster.user(["cm", "create", "1"], name).ok()
    assert sorted(found.state for found in cluster.containers(name)) == ["created", "running"]
    invoke("remove-user", name).ok()
    assert [found for found in cluster.containers() if found.uid == uid] == []
    volumes = [cluster.on_worker(worker, ["docker", "volume", "ls", "-q"]).ok() for worker in cluster.workers]
    assert f"cfiddle-home-{name}-" not in "".join(volumes)
    assert name not in _users_on_userhost(cluster)
    assert cluster.wait_for_state(job, "CANCELLED", timeout_s=30)
    assert name not in cluster.slurm("sacctmgr -n -P show user format=User").split()
    assert (home / "was-here").exists(), "the home directory stays unless told otherwise"

    invoke("add-user", name).ok()
    assert cluster.user("cat /home/$USER/was-here; id -u", name).ok().split() == [str(uid)], "again, with the same home"
    invoke("remove-user", name, "--delete-home").ok()
    assert not home.exists()


def test_import_adds_every_user_of_a_file(cluster: LiveCluster, tmp_path: Path) -> None:
    names = [f"t{uuid.uuid4().hex[:8]}" for _ in range(3)]
    file = tmp_path / "class.csv"
    file.write_text("name\n" + "\n".join(names) + "\n")
    try:
        invoke("import-users", str(file)).ok()
        for name in names:
            assert cluster.user(["srun", "id", "-u"], name).ok().strip() == str(cluster.ids(name)[0])
    finally:
        for name in names:
            invoke("remove-user", name, "--delete-home")
    wait_until(lambda: not set(names) & set(_users_on_userhost(cluster)), timeout_s=20, what="they are gone")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("name\ntwice\ntwice\n", "twice"),
        ("name\ngood1\n../../etc\n", "../../etc"),
        ("name\ngood1\n-rf\n", "-rf"),
        ("name\ngood1\nroot\n", "root"),
        ("name,uid\ngood1,\ntest_user1,2009\n", "test_user1"),
        ("name\ngood1\nBäcker\n", "Bäcker"),
        ("name,uid\ngood1,2001\n", "2001"),
        ("name,uid\ngood1,0\n", "0"),
        ("nom\ngood1\n", "name"),
        ("", "name"),
    ],
)
def test_import_with_one_wrong_line_adds_nobody(cluster: LiveCluster, tmp_path: Path, content: str, named: str) -> None:
    before = _listed(cluster)
    file = tmp_path / "class.csv"
    file.write_text(content)
    result = invoke("import-users", str(file))
    assert result.exit_status == 1
    assert named in result.output
    assert "Traceback" not in result.output
    _left_as_it_was(cluster, before)
    assert "good1" not in _users_on_userhost(cluster)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["add-user", "test_user1"], "test_user1"),
        (["add-user", "jovyan"], "jovyan"),
        (["add-user", "root"], "root"),
        (["add-user", "slurm"], "slurm"),
        (["add-user", "two words"], "two words"),
        (["add-user", "x" * 40], "x" * 40),
        (["add-user", "a;id"], "a;id"),
        (["add-user", "../up"], "../up"),
        (["remove-user", "nobody-has-this-name"], "nobody-has-this-name"),
        (["import-users", "/nowhere/class.csv"], "/nowhere/class.csv"),
    ],
)
def test_wrong_user_is_refused_with_one_message(cluster: LiveCluster, arguments: list[str], named: str) -> None:
    before = _listed(cluster)
    result = invoke(*arguments)
    assert result.exit_status == 1
    assert named in result.output
    assert "Traceback" not in result.output
    assert len(result.output.splitlines()) <= 4, result.output
    _left_as_it_was(cluster, before)
