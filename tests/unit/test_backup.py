"""Backups: what is in the file, which files are refused, and how Slurm's state goes back."""

import io
import json
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import backup
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import SECRETS, State

CONFIG: Any = SimpleNamespace(debian_release="trixie")


@pytest.fixture
def state(tmp_path: Path) -> State:
    state = State(tmp_path / "state")
    state.path("secrets").mkdir(parents=True)
    for name in SECRETS:
        state.write(f"secrets/{name}", f"{name} of the first")
    state.write_json("users.json", {"users": {"ada": 2003}, "former": {}})
    return state


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """Make the directory of Slurm's state as slurmctld leaves it."""
    directory = tmp_path / "volume"
    (directory / "hash.1" / "job.11").mkdir(parents=True)
    (directory / "job_state").write_bytes(b"\0jobs")
    (directory / "hash.1" / "job.11" / "script").write_text("#!/bin/sh\n")
    return directory


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch, volume: Path) -> list[Any]:
    """Have a cluster that runs, with a database of one line; record what rests when."""
    did: list[Any] = []

    @contextmanager
    def stopped(service: str) -> Iterator[None]:
        did.append(("stop", service))
        yield
        did.append(("start", service))

    def dump(path: Path) -> None:
        did.append("dump")
        path.write_bytes(b"accounting")

    monkeypatch.setattr(backup, "_stopped", stopped)
    monkeypatch.setattr(backup, "_dump_accounting", dump)
    monkeypatch.setattr(backup, "_mountpoint", lambda _name: volume)
    monkeypatch.setattr(backup.services, "container", lambda _service: SimpleNamespace(id="x"))
    return did


@pytest.fixture
def file(state: State, scaled: list[Any], tmp_path: Path) -> Path:
    path = tmp_path / "cluster.backup"
    backup.create(CONFIG, state, path)
    return path


def _rewritten(file: Path, **changes: Any) -> Path:
    """Write the backup again with another manifest."""
    other = file.with_name("other.backup")
    with tarfile.open(file) as old, tarfile.open(other, "w:gz") as new:
        for member in old.getmembers():
            data = old.extractfile(member)
            if member.name == "manifest.json" and data:
                content = json.dumps({**json.load(data), **changes}).encode()
                member.size = len(content)
                data = io.BytesIO(content)  # type: ignore[assignment]
            new.addfile(member, data)
    return other


def test_backup_is_one_file_for_root_alone_with_everything_in_it(file: Path, scaled: list[Any]) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with tarfile.open(file) as archive:
        names = archive.getnames()
    assert names[0] == "manifest.json"
    assert {"users.json", "accounting.sql.gz", "slurm/job_state", "slurm/hash.1/job.11/script"} <= set(names)
    assert {f"secrets/{name}" for name in SECRETS} <= set(names)
    assert scaled == [("stop", "slurmctld"), "dump", ("start", "slurmctld")], "nothing changes while it is copied"
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_backup_that_fails_leaves_the_old_file(file: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def fail(_path: Path) -> None:
        raise ClusterError("the disk is full")

    monkeypatch.setattr(backup, "_dump_accounting", fail)
    with pytest.raises(ClusterError, match="disk is full"):
        backup.create(CONFIG, state, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_backup_needs_a_cluster_that_runs_and_a_place(
    state: State, scaled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ClusterError, match="cannot be a file"):
        backup.create(CONFIG, state, tmp_path)
    with pytest.raises(ClusterError, match="cannot be a file"):
        backup.create(CONFIG, state, tmp_path / "nowhere" / "file")
    monkeypatch.setattr(backup.services, "container", lambda _service: None)
    with pytest.raises(ClusterError, match="mysql and slurmctld do not run"):
        backup.create(CONFIG, state, tmp_path / "file")
    assert scaled == []


def test_examined_backup_is_the_one_that_was_written(file: Path) -> None:
    first = backup.examine(CONFIG, file)
    assert first == backup.examine(CONFIG, file)
    assert backup.examine(CONFIG, _rewritten(file)).id == first.id, "packed or not"


def test_backup_of_another_version_or_release_is_refused(file: Path) -> None:
    with pytest.raises(ClusterError, match="version 99"):
        backup.examine(CONFIG, _rewritten(file, version=99))
    with pytest.raises(ClusterError, match="bookworm"):
        backup.examine(CONFIG, _rewritten(file, debian_release="bookworm"))


def test_what_is_no_backup_is_refused(file: Path, tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear cluster,")
    other = tmp_path / "other.tar"
    with tarfile.open(other, "w") as archive:
        archive.add(letter, "letter.txt")
    cut = tmp_path / "cut.backup"
    cut.write_bytes(file.read_bytes()[:3000])
    for path in (letter, other, cut, tmp_path):
        with pytest.raises(ClusterError, match=r"no backup|not complete"):
            backup.examine(CONFIG, path)
    with pytest.raises(ClusterError, match="no file"):
        backup.examine(CONFIG, tmp_path / "nowhere")


def test_restore_overwrites_no_state_but_goes_on_with_its_own(
    file: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup.engine, "is_running", lambda: False)
    archive = backup.examine(CONFIG, file)
    with pytest.raises(ClusterError, match="overwrite"):
        backup.refuse_if_state_exists(state, archive)
    fresh = State(tmp_path / "fresh")
    backup.refuse_if_state_exists(fresh, archive)
    backup.restore_state(fresh, archive)
    backup.refuse_if_state_exists(fresh, archive)
    other = backup.Archive(file, "another", 0)
    with pytest.raises(ClusterError, match="overwrite"):
        backup.refuse_if_state_exists(fresh, other)


def test_volumes_of_a_cluster_are_not_overwritten(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = SimpleNamespace(list=lambda: [SimpleNamespace(name="slurm-stack_slurm")])
    monkeypatch.setattr(backup.engine, "is_running", lambda: True)
    monkeypatch.setattr(backup.engine, "client", lambda: SimpleNamespace(volumes=volumes))
    with pytest.raises(ClusterError, match="overwrite"):
        backup.refuse_if_state_exists(State(tmp_path / "fresh"), backup.examine(CONFIG, file))


def test_secrets_and_users_come_back_for_root_alone(file: Path, state: State, tmp_path: Path) -> None:
    fresh = State(tmp_path / "fresh")
    backup.restore_state(fresh, backup.examine(CONFIG, file))
    for name in SECRETS:
        assert fresh.secret(name) == state.secret(name)
        assert stat.S_IMODE(fresh.path(f"secrets/{name}").stat().st_mode) == 0o600
    assert fresh.read_json("users.json", None) == state.read_json("users.json", 0)
    assert stat.S_IMODE(fresh.directory.stat().st_mode) == 0o700


def test_services_come_back_once(
    file: Path, volume: Path, scaled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = State(tmp_path / "fresh")
    archive = backup.examine(CONFIG, file)
    backup.restore_services(fresh, archive)
    assert scaled.count(("stop", "slurmdbd")) == 0, "nothing to do before the state is there"
    backup.restore_state(fresh, archive)
    (volume / "job_state").write_bytes(b"of the new cluster")
    (volume / "left").mkdir()
    loaded: list[bytes] = []
    monkeypatch.setattr(backup, "_load_accounting", lambda _dump: loaded.append(b"accounting"))
    monkeypatch.setattr(backup.slurm, "is_answering", lambda: True)
    monkeypatch.setattr(backup, "_end_lost_jobs", lambda _archive: scaled.append("end lost jobs"))
    monkeypatch.setattr(backup.services, "restart", lambda service: scaled.append(f"restart {service}"))
    scaled.clear()
    for _ in range(2):
        backup.restore_services(fresh, archive)
    assert loaded == [b"accounting"]
    assert scaled[:2] == [("stop", "slurmctld"), ("stop", "slurmdbd")]
    assert scaled[2:4] == [("start", "slurmdbd"), ("start", "slurmctld")]
    assert scaled[4:] == ["end lost jobs", "restart slurmd"]
    assert (volume / "job_state").read_bytes() == b"\0jobs"
    assert not (volume / "left").exists()
    script = volume / "hash.1" / "job.11" / "script"
    assert script.read_text() == "#!/bin/sh\n"
    assert (script.stat().st_uid, script.parent.stat().st_uid) == (802, 802)


def test_jobs_that_ran_at_the_backup_are_ended_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = ["7|2026-01-02T03:00:00", "9|2026-01-02T05:00:00"]
    said: list[list[str]] = []

    def slurm(argv: list[str]) -> str:
        if argv[0] == "squeue":
            return "\n".join(queue)
        said.append(argv)
        if argv[0] == "scancel":
            queue.pop(0)
        return ""

    monkeypatch.setattr(backup.slurm, "slurm", slurm)
    made = backup.datetime(2026, 1, 2, 4).timestamp()
    backup._end_lost_jobs(backup.Archive(Path("x"), "id", made))
    assert [argv[0] for argv in said] == ["scontrol", "scancel"]
    assert said[0][2] == "jobid=7"
    assert "2026-01-02 04:00" in said[0][3]
    assert said[1] == ["scancel", "7"], "one that began since is left alone"
