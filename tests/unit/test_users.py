"""The list of users: names, uids, and files of them."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfiddle_cluster import homes, services, slurm, user_containers, userhost, users
from cfiddle_cluster.errors import ClusterError
from samples import machine


class FakeState:
    """A state directory that holds JSON files only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        return self.directory / name

    def read_json(self, name: str, default: Any) -> Any:
        return json.loads(self.path(name).read_text()) if self.path(name).exists() else default

    def write_json(self, name: str, data: Any) -> None:
        self.path(name).write_text(json.dumps(data))


@pytest.fixture
def did(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record what is done to homes, accounts, sessions and Slurm, in order, in place of doing it."""
    done: list[tuple[Any, ...]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda *arguments, **_: done.append((name, *arguments))

    monkeypatch.setattr(homes, "ensure_home", lambda _config, name, *, uid, gid: done.append(("home", name, uid, gid)))
    monkeypatch.setattr(homes, "delete_home", lambda _config, name: done.append(("delete home", name)))
    monkeypatch.setattr(
        users, "_place_accounts", lambda placed: done.append(("accounts", [user.name for user in placed]))
    )
    monkeypatch.setattr(userhost, "end_sessions", lambda user: done.append(("end sessions", user.name)))
    monkeypatch.setattr(userhost, "fill_homes", lambda filled: done.append(("fill", [user.name for user in filled])))
    monkeypatch.setattr(services, "container", lambda _service: SimpleNamespace(id="x"))
    monkeypatch.setattr(slurm, "ensure_users", record("ensure users"))
    monkeypatch.setattr(slurm, "delete_user", record("delete user"))
    monkeypatch.setattr(
        user_containers, "remove_of", lambda machine, *, uid, user: done.append(("containers", machine.name, uid, user))
    )
    return done


@pytest.fixture
def state(tmp_path: Path) -> Any:
    return FakeState(tmp_path)


CONFIG: Any = None


def _import(state: Any, tmp_path: Path, text: str) -> tuple[list[users.User], list[users.User]]:
    file = tmp_path / "class.csv"
    file.write_text(text)
    return users.import_users(CONFIG, state, file)


def test_first_users_have_their_fixed_ids(state: Any) -> None:
    assert [(user.name, user.uid, user.gid) for user in users.listing(state)] == [
        ("jovyan", 1000, 100),
        ("test_user1", 2001, 2001),
        ("test_user2", 2002, 2002),
    ]


def test_list_is_followed_by_homes_accounts_and_associations(state: Any, did: list[Any]) -> None:
    users.ensure_accounts(CONFIG, state)
    users.ensure_associations(state)
    assert did == [
        ("home", "jovyan", 1000, 100),
        ("home", "test_user1", 2001, 2001),
        ("home", "test_user2", 2002, 2002),
        ("accounts", ["jovyan", "test_user1", "test_user2", "probe"]),
        ("ensure users", ["probe", "jovyan", "test_user1", "test_user2"]),
    ]
    before = state.path("users.json").read_text()
    users.ensure_accounts(CONFIG, state)
    assert state.path("users.json").read_text() == before


def test_added_users_get_the_next_ids(state: Any, did: list[Any]) -> None:
    assert users.add(CONFIG, state, "ada").uid == 2003
    assert users.add(CONFIG, state, "grace").uid == 2004
    assert users.find(state, "ada").home == "/home/ada"
    assert ("fill", ["grace"]) in did
    assert ("ensure users", ["grace"]) in did


def test_removed_user_loses_sessions_jobs_and_account_and_keeps_uid_and_home(state: Any, did: list[Any]) -> None:
    uid = users.add(CONFIG, state, "ada").uid
    did.clear()
    users.remove(CONFIG, state, "ada")
    assert did == [
        ("accounts", ["jovyan", "test_user1", "test_user2", "ada", "probe"]),
        ("end sessions", "ada"),
        ("delete user", "ada"),
        ("accounts", ["jovyan", "test_user1", "test_user2", "probe"]),
        ("end sessions", "ada"),
    ]
    assert users.add(CONFIG, state, "eve").uid == uid + 1, "nobody inherits the files of who was removed"
    assert users.add(CONFIG, state, "ada").uid == uid, "who comes back finds their own"


def test_containers_of_a_removed_user_go_when_no_job_can_start_any(state: Any, did: list[Any]) -> None:
    uid = users.add(CONFIG, state, "ada").uid
    did.clear()
    users.remove(CONFIG, state, "ada", machines=[machine("c1"), machine("c2")])
    assert did[1:3] == [("end sessions", "ada"), ("delete user", "ada")]
    assert did[-2:] == [("containers", "c1", uid, "ada"), ("containers", "c2", uid, "ada")]


def test_home_is_deleted_only_when_asked(state: Any, did: list[Any]) -> None:
    users.add(CONFIG, state, "ada")
    users.remove(CONFIG, state, "ada", delete_home=True)
    assert ("delete home", "ada") in did


@pytest.mark.parametrize("name", ["jovyan", "test_user1", "test_user2"])
def test_users_that_the_cluster_needs_stay(state: Any, did: list[Any], name: str) -> None:
    with pytest.raises(ClusterError, match=name):
        users.remove(CONFIG, state, name)
    assert not did


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "no name for a user"),
        ("-rf", "no name for a user"),
        ("../etc", "no name for a user"),
        ("a b", "no name for a user"),
        ("a\nb", "no name for a user"),
        ("a:b", "no name for a user"),
        ("ada\0", "no name for a user"),
        ("Ada", "no name for a user"),
        ("1ada", "no name for a user"),
        ("bäcker", "no name for a user"),
        ("x" * 33, "no name for a user"),
        ("root", "name of the system"),
        ("users", "name of the system"),
        ("munge", "name of the system"),
        ("probe", "name of the system"),
        ("systemd-network", "name of the system"),
        ("jovyan", "exists already"),
        ("test_user1", "exists already"),
    ],
)
def test_name_that_cannot_be_is_refused_with_its_reason(state: Any, did: list[Any], name: str, reason: str) -> None:
    with pytest.raises(ClusterError, match=reason):
        users.add(CONFIG, state, name)
    assert not did
    assert not state.path("users.json").exists()


def test_import_adds_everyone_with_given_and_chosen_uids(state: Any, did: list[Any], tmp_path: Path) -> None:
    added, there = _import(state, tmp_path, "\ufeffname, uid\nada,\ngrace, 2003\n\nkatherine,5000\n")
    assert there == []
    assert {user.name: user.uid for user in added} == {"ada": 2004, "grace": 2003, "katherine": 5000}
    assert did.count(("ensure users", ["ada", "grace", "katherine"])) == 1


def test_import_without_uids(state: Any, did: list[Any], tmp_path: Path) -> None:
    assert [user.uid for user in _import(state, tmp_path, "name\nada\ngrace\n")[0]] == [2003, 2004]
    assert did


def test_import_is_done_again_with_latecomers(state: Any, did: list[Any], tmp_path: Path) -> None:
    """Also one that was interrupted, so that who is in the list may lack what else a user has."""
    before, _ = _import(state, tmp_path, "name,uid\nada,\ngrace,3000\n")
    did.clear()
    added, there = _import(state, tmp_path, "name,uid\nkatherine,\nada,\ngrace,3000\ntest_user1,2001\n")
    assert [(user.name, user.uid) for user in added] == [("katherine", 2004)]
    assert there == [*before, users.User("test_user1", 2001, 2001, "/home/test_user1")]
    names = ["katherine", "ada", "grace", "test_user1"]
    assert [name for act, name, *_ in did if act == "home"] == names
    assert ("ensure users", names) in did
    assert ("fill", names) in did
    text = state.path("users.json").read_text()
    assert _import(state, tmp_path, "name\nada\n") == ([], before[:1])
    assert state.path("users.json").read_text() == text


def test_import_that_gives_a_user_of_the_list_another_uid_changes_nothing(
    state: Any, did: list[Any], tmp_path: Path
) -> None:
    _import(state, tmp_path, "name\nada\n")
    text = state.path("users.json").read_text()
    did.clear()
    with pytest.raises(ClusterError, match="line 3: the user 'ada' exists already, with the uid 2003"):
        _import(state, tmp_path, "name,uid\ngrace,\nada,2004\n")
    assert state.path("users.json").read_text() == text
    assert not did


def test_homes_are_of_all_who_ever_were_users(state: Any, did: list[Any]) -> None:
    assert users.with_homes(state) == []
    users.add(CONFIG, state, "ada")
    users.add(CONFIG, state, "eve")
    users.remove(CONFIG, state, "ada")
    assert users.with_homes(state) == ["jovyan", "test_user1", "test_user2", "eve", "ada"]
    assert did


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("name\nada\nada\n", ["line 3", "twice"]),
        ("name,uid\n-rf,\ngood,\njovyan,1001\n", ["line 2", "no name for a user", "line 4", "exists already"]),
        ("name\njovyan\njovyan\n", ["line 3", "twice"]),
        ("name,uid\nada,2001\n", ["2001", "test_user1"]),
        ("name,uid\nada,2000\n", ["2000", "probe"]),
        ("name,uid\nada,0\n", ["between 1000"]),
        ("name,uid\nada,65533\n", ["between 1000"]),
        ("name,uid\nada,3000\neve,3000\n", ["line 3", "3000", "ada"]),
        ("name,uid\nada,-3\n", ["'-3' is no number"]),
        ("name,uid\nada,²\n", ["no number"]),
        ("name,uid\nada,1e3\n", ["no number"]),
        ("name,uid\nada,2005,x\n", ["line 2", "2 columns"]),
        ("nom\nada\n", ["nom"]),
        ("name,name\nada,eve\n", ["name, name"]),
        ("name,password\nada,x\n", ["password"]),
        ("name\n", ["names no user"]),
        ("", ["(none)"]),
        ('name\n"ada\n', ["CSV"]),
    ],
)
def test_import_with_a_fault_names_it_and_changes_nothing(
    state: Any, did: list[Any], tmp_path: Path, text: str, reasons: list[str]
) -> None:
    with pytest.raises(ClusterError) as raised:
        _import(state, tmp_path, text)
    for reason in reasons:
        assert reason in str(raised.value)
    assert not did
    assert not state.path("users.json").exists()


def test_import_of_what_is_no_text_is_refused(state: Any, did: list[Any], tmp_path: Path) -> None:
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\xff\xfe\0")
    with pytest.raises(ClusterError, match="CSV"):
        users.import_users(CONFIG, state, tmp_path / "picture.csv")
    with pytest.raises(ClusterError, match="no file"):
        users.import_users(CONFIG, state, tmp_path / "nowhere.csv")
    with pytest.raises(ClusterError, match="cannot be read"):
        users.import_users(CONFIG, state, tmp_path)
    assert not did


def test_uid_of_someone_removed_is_nobody_else_s(state: Any, did: list[Any], tmp_path: Path) -> None:
    uid = users.add(CONFIG, state, "ada").uid
    users.remove(CONFIG, state, "ada")
    with pytest.raises(ClusterError, match="is that of 'ada'"):
        _import(state, tmp_path, f"name,uid\neve,{uid}\n")
    with pytest.raises(ClusterError, match="had the uid"):
        _import(state, tmp_path, "name,uid\nada,4000\n")
    assert _import(state, tmp_path, f"name,uid\nada,{uid}\n")[0][0].uid == uid
    assert did


@given(st.lists(st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True), unique=True, max_size=20))
def test_no_two_users_ever_share_a_uid(names: list[str]) -> None:
    known = {"users": {"jovyan": 1000, "test_user1": 2001, "test_user2": 2002}, "former": {"zoe": 2003}}
    fault = users._fault
    wanted = [("", name, None) for name in names if name != "jovyan" and not fault(name, None, {}, {}, {}, {})]
    chosen = users._choose_uids(known, wanted)
    uids = [*known["users"].values(), users.PROBE.uid, *(uid for name, uid in chosen.items())]
    assert len(uids) == len(set(uids))
    assert set(chosen) == {name for _, name, _ in wanted}


def test_account_files_have_the_fields_that_the_library_reads() -> None:
    listed = [users.User("jovyan", 1000, 100, "/home/jovyan"), users.User("ada", 2003, 2003, "/home/ada"), users.PROBE]
    rows = list(csv.reader(io.StringIO(users.passwd(listed)), delimiter=":"))
    assert rows[0] == ["jovyan", "x", "1000", "100", "jovyan", "/home/jovyan", "/bin/bash"]
    assert rows[2] == ["probe", "x", "2000", "2000", "probe", "/nonexistent", "/usr/sbin/nologin"]
    assert users.group(listed) == "ada:x:2003:\nprobe:x:2000:\n"


def test_accounts_are_replaced_as_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = SimpleNamespace(attrs={"Mountpoint": str(tmp_path)})
    made: list[Any] = []

    def create(name: str, labels: dict[str, str]) -> Any:
        made.append((name, labels))
        return volume

    client = SimpleNamespace(volumes=SimpleNamespace(create=create))
    monkeypatch.setattr(users.engine, "client", lambda: client)
    (tmp_path / "passwd").write_text("old")
    inode = (tmp_path / "passwd").stat().st_ino
    users._place_accounts([users.PROBE])
    assert made == [("slurm-stack_accounts", {"cfiddle.cluster": "cfiddle"})]
    assert (tmp_path / "passwd").read_text() == users.passwd([users.PROBE])
    assert (tmp_path / "passwd").stat().st_ino != inode
    assert {path.name for path in tmp_path.iterdir()} == {"passwd", "group"}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in tmp_path.iterdir())
