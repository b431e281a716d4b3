"""The users of the cluster: a list in the state directory, which homes, accounts and Slurm's associations follow.

Workers know no accounts: a job runs under its owner's uid, and names come from the accounts volume alone.
"""

import csv
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfiddle_cluster import engine, homes, services, slurm, user_containers, userhost
from cfiddle_cluster.config import LABEL, STACK, Config
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import Machine
from cfiddle_cluster.state import State

LIST = "users.json"
ACCOUNTS_VOLUME = f"{STACK}_accounts"
FIRST_FREE_UID = 2003
LAST_UID = 60000

_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")

# Users and groups of the images. An account of such a name would be hidden by the system's, or hide it.
_SYSTEM_NAMES = """
    root daemon bin sys sync games man lp mail news uucp proxy www-data backup list irc _apt nobody nogroup adm tty disk
    kmem dialout fax voice cdrom floppy tape sudo audio dip operator src shadow utmp video sasl plugdev staff users
    input sgx clock kvm render crontab messagebus sshd docker munge slurm mysql registry sandbox
"""


@dataclass(frozen=True)
class User:
    """An account. Everyone has a group of their own, but for jovyan, whose group is Jupyter's usual one."""

    name: str
    uid: int
    gid: int
    home: str


PROBE = User("probe", 2000, 2000, "/nonexistent")
"""Runs the jobs that prove a worker ready. Nobody logs in as it, and it has no home."""

_BUILT_IN = {"jovyan": 1000, "test_user1": 2001, "test_user2": 2002}


def listing(state: State) -> list[User]:
    """Return the people of the cluster, by uid."""
    uids: dict[str, int] = _read(state)["users"]
    return sorted((_user(name, uid) for name, uid in uids.items()), key=lambda user: user.uid)


def with_homes(state: State) -> list[str]:
    """Return the names of all whose homes the cluster has made, those who were removed too; nobody before `up`."""
    known: dict[str, Any] = state.read_json(LIST, {"users": {}, "former": {}})
    return [*known["users"], *known["former"]]


def find(state: State, name: str) -> User:
    """Return the user of that name.

    Raises:
        ClusterError: there is none.
    """
    users = {user.name: user for user in listing(state)}
    if name not in users:
        raise ClusterError(
            f"there is no user {name!r}; there are {', '.join(users)}", f"add one with: ./invoke add-user {name}"
        )
    return users[name]


def ensure_accounts(config: Config, state: State) -> None:
    """Bring the homes and the accounts that containers see to what the list says; the stack need not run."""
    state.write_json(LIST, _read(state))
    users = listing(state)
    for user in users:
        homes.ensure_home(config, user.name, uid=user.uid, gid=user.gid)
    _place_accounts([*users, PROBE])


def ensure_associations(state: State) -> None:
    """Let every user of the list submit jobs; slurmctld and slurmdbd must run."""
    slurm.ensure_users([PROBE.name, *(user.name for user in listing(state))])


def add(config: Config, state: State, name: str, *, uid: int | None = None) -> User:
    """Add one user; a uid is chosen unless given. Who was removed and comes back has their old uid.

    Raises:
        ClusterError: the name or the uid cannot be had; nothing has changed.
    """
    if name in _read(state)["users"]:
        raise ClusterError(f"the user {name!r} exists already", "choose another name; no user was added")
    (user,) = _add(config, state, [("", name, uid)])
    return user


def import_users(config: Config, state: State, path: Path) -> tuple[list[User], list[User]]:
    """Add every user of a CSV file with a column `name` and, where wanted, `uid`; those who are there stay as they are.

    Returns:
        Those who were added, and those who were there.

    Raises:
        ClusterError: with all that is wrong in the file; nothing has changed.
    """
    before = _read(state)["users"]
    users = _add(config, state, _rows(path))
    return [user for user in users if user.name not in before], [user for user in users if user.name in before]


def remove(
    config: Config, state: State, name: str, *, delete_home: bool = False, machines: Iterable[Machine] = ()
) -> None:
    """Remove a user, end their jobs and sessions; the home stays unless told otherwise.

    Args:
        config: the administrator's settings.
        state: where the list is.
        name: of the user.
        delete_home: whether the home goes too.
        machines: from which their containers go.

    Raises:
        ClusterError: there is no such user, or it is one that the cluster needs.
    """
    user = find(state, name)
    if name in _BUILT_IN:
        raise ClusterError(
            f"{name} belongs to the cluster and stays", "use `./invoke shell` to change what is in its home"
        )
    # Slurm's commands know people by name, so the account goes last; an interrupted removal may have taken it already.
    _place_accounts([*listing(state), PROBE])
    userhost.end_sessions(user)
    if services.container("slurmctld"):
        slurm.delete_user(name)
    _place_accounts([*(other for other in listing(state) if other != user), PROBE])
    userhost.end_sessions(user)
    for machine in machines:
        user_containers.remove_of(machine, uid=user.uid, user=name)
    if delete_home:
        homes.delete_home(config, name)
    known = _read(state)
    known["former"][name] = known["users"].pop(name)
    state.write_json(LIST, known)


def passwd(users: Iterable[User]) -> str:
    """Return the users as a passwd file (passwd(5)) for libnss-extrausers."""
    return "".join(
        f"{user.name}:x:{user.uid}:{user.gid}:{user.name}:{user.home}:"
        f"{'/usr/sbin/nologin' if user == PROBE else '/bin/bash'}\n"
        for user in users
    )


def group(users: Iterable[User]) -> str:
    """Return the users' own groups as a group file (group(5)) for libnss-extrausers."""
    return "".join(f"{user.name}:x:{user.gid}:\n" for user in users if user.gid == user.uid)


def _user(name: str, uid: int) -> User:
    return User(name, uid, 100 if name == "jovyan" else uid, f"/home/{name}")


def _read(state: State) -> dict[str, Any]:
    """Return the list: uids of users by name, and of those who were removed, so that nobody inherits their files."""
    known: dict[str, Any] = state.read_json(LIST, {"users": _BUILT_IN, "former": {}})
    return {"users": {**_BUILT_IN, **known["users"]}, "former": dict(known["former"])}


def _rows(path: Path) -> list[tuple[str, str, int | None]]:
    """Return where it stands, name and uid for each line of a CSV file that is not empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = [column.strip() for column in reader.fieldnames or []]
            if "name" not in columns or set(columns) - {"name", "uid"} or len(set(columns)) < len(columns):
                raise ClusterError(
                    f"{path} has the columns {', '.join(columns) or '(none)'}",
                    "its first line must be: name or: name,uid",
                )
            reader.fieldnames = columns
            rows: list[tuple[str, str, int | None]] = []
            for row in reader:
                where = f"line {reader.line_num}: "
                text = (row.get("uid") or "").strip()
                if None in row or row["name"] is None:
                    raise ClusterError(
                        f"{path}, {where}it has not {len(columns)} columns", "correct the line; no user was added"
                    )
                if not re.fullmatch("[0-9]{0,9}", text):
                    raise ClusterError(
                        f"{path}, {where}the uid {text!r} is no number", "correct the line; no user was added"
                    )
                rows.append((where, row["name"].strip(), int(text) if text else None))
    except FileNotFoundError:
        raise ClusterError(f"there is no file {path}", "name a CSV file with the columns name or name,uid") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ClusterError(f"{path} cannot be read as CSV: {error}", "save it as CSV in UTF-8") from error
    if not rows:
        raise ClusterError(f"{path} names no user", "write one name on each line after the first")
    return rows


def _add(config: Config, state: State, wanted: list[tuple[str, str, int | None]]) -> list[User]:
    known = _read(state)
    chosen = _choose_uids(known, wanted)
    users = [_user(name, uid) for name, uid in chosen.items()]
    for user in users:
        homes.ensure_home(config, user.name, uid=user.uid, gid=user.gid)
    known["users"].update(chosen)
    for name in chosen:
        known["former"].pop(name, None)
    state.write_json(LIST, known)
    _place_accounts([*listing(state), PROBE])
    if services.container("slurmctld"):
        slurm.ensure_users([user.name for user in users])
    userhost.fill_homes(users)
    return users


def _choose_uids(known: dict[str, Any], wanted: list[tuple[str, str, int | None]]) -> dict[str, int]:
    """Return a uid for each wanted user, for one of the list their own; or raise with all that is wrong."""
    users: dict[str, int] = known["users"]
    former: dict[str, int] = known["former"]
    owners = {
        PROBE.uid: PROBE.name,
        **{uid: name for name, uid in former.items()},
        **{uid: name for name, uid in users.items()},
    }
    # What is asked for by number is settled first, so that no number that is chosen gets in its way.
    taken = {**owners, **{uid: name for _, name, uid in wanted if uid is not None and uid not in owners}}
    chosen: dict[str, int] = {}
    faults: list[str] = []

    following = FIRST_FREE_UID
    for where, name, uid in wanted:
        fault = _fault(name, uid, users, former, chosen, owners)
        if fault:
            faults.append(where + fault)
            continue
        if uid is None:
            uid = users.get(name, former.get(name))
        if uid is None:
            while following in taken:
                following += 1
            uid = following
            if uid > LAST_UID:
                faults.append(f"{where}no uid up to {LAST_UID} is free for {name}")
                continue
        chosen[name] = uid
        owners[uid] = taken[uid] = name
    if faults:
        many = len(wanted) > 1
        raise ClusterError("\n".join(faults), f"correct {'these lines' if many else 'it'}; no user was added")
    return chosen


def _fault(
    name: str,
    uid: int | None,
    users: dict[str, int],
    former: dict[str, int],
    chosen: dict[str, int],
    owners: dict[int, str],
) -> str:
    """Return why a user cannot be added, or nothing."""
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name for a user: it must be 1 to 32 of a-z, 0-9, _ and -, and begin with a letter or _"
    if name in _SYSTEM_NAMES.split() or name == PROBE.name or name.startswith("systemd-"):
        return f"{name!r} is a name of the system"
    if name in chosen:
        return f"the user {name!r} stands here twice"
    if uid is None or users.get(name) == uid:
        return ""
    if name in users:
        return f"the user {name!r} exists already, with the uid {users[name]}"
    if not 1000 <= uid <= LAST_UID:
        return f"the uid {uid} of {name!r} is not between 1000 and {LAST_UID}"
    if owners.get(uid, name) != name:
        return f"the uid {uid} of {name!r} is that of {owners[uid]!r}"
    if former.get(name, uid) != uid:
        return f"{name!r} had the uid {former[name]} before, which owns the files; leave the number out"
    return ""


def _place_accounts(users: list[User]) -> None:
    """Write the accounts where slurmctld and userhost look them up, each file at once; root owns them."""
    volume = engine.client().volumes.create(ACCOUNTS_VOLUME, labels=dict([LABEL.split("=")]))
    directory = Path(volume.attrs["Mountpoint"])
    for name, text in (("group", group(users)), ("passwd", passwd(users))):
        new = directory / f"{name}.new"
        new.write_text(text)
        new.chmod(0o644)
        os.replace(new, directory / name)
