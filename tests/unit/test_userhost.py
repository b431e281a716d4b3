"""The shell on the users' node, and the address of JupyterLab."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cfiddle_cluster import userhost
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.users import User

CONFIG: Any = SimpleNamespace(head_addr="10.0.0.1", jupyter_port=8888)
STATE: Any = SimpleNamespace(secret=lambda name: f"the-{name}")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    argvs: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> Any:
        argvs.append(argv)
        return SimpleNamespace(returncode=23)

    monkeypatch.setattr(userhost.services, "container", lambda _service: SimpleNamespace(id="abc"))
    monkeypatch.setattr(userhost, "docker_cli", lambda: "docker")
    monkeypatch.setattr(userhost.subprocess, "run", run)
    monkeypatch.setattr(userhost, "run", run)
    return argvs


@pytest.mark.parametrize("terminal", [True, False])
def test_shell_has_a_terminal_where_there_is_one(
    called: list[list[str]], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(userhost.sys, stream, SimpleNamespace(isatty=lambda: terminal, flush=lambda: None))
    assert userhost.shell(CONFIG) == 23
    tty = ["--tty"] if terminal else []
    assert called == [["docker", "exec", "--interactive", *tty, "abc", "as-user", "jovyan", "bash", "--login"]]


def test_command_is_one_argument_whatever_is_in_it(called: list[list[str]]) -> None:
    userhost.shell(CONFIG, user="ada", command="echo 'two  words'; exit 3")
    assert called[0][-6:] == ["as-user", "ada", "bash", "--login", "-c", "echo 'two  words'; exit 3"]


def test_shell_without_a_cluster_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userhost.services, "container", lambda _service: None)
    with pytest.raises(ClusterError, match="invoke up"):
        userhost.shell(CONFIG)
    userhost.fill_homes([User("ada", 2003, 2003, "/home/ada")])
    userhost.end_sessions(User("ada", 2003, 2003, "/home/ada"))


def test_homes_are_filled_by_their_owners_and_sessions_ended_with_their_rights(called: list[list[str]]) -> None:
    ada = User("ada", 2003, 2004, "/home/ada")
    userhost.fill_homes([ada])
    userhost.end_sessions(ada)
    assert called[0][-3:] == ["as-user", "ada", "fill-home"]
    assert called[1][2:4] == ["--user", "2003:2004"]


def test_address_has_the_token_only_where_it_is_asked_for() -> None:
    assert userhost.url(CONFIG, STATE) == "http://10.0.0.1:8888/lab?token=the-jupyter-token"
    assert userhost.address(CONFIG) == "http://10.0.0.1:8888"
    nameless: Any = SimpleNamespace(head_addr="", jupyter_port=9000)
    assert userhost.address(nameless) == "http://localhost:9000"


def _locked(name: str) -> dict[str, str]:
    text = (Path(__file__).parents[2] / "requirements" / name).read_text()
    entries = re.findall(r"^([a-z0-9.-]+)==(\S+)(?: ;[^\\\n]*)? \\\n((?:    --hash=.*\n)+)", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[a-z0-9]", text, re.MULTILINE)), "every package has a version and hashes"
    return {package: version for package, version, _ in entries}


def test_notebooks_and_sandboxes_have_the_same_versions() -> None:
    user, sandbox = _locked("user.lock"), _locked("sandbox.lock")
    assert set(sandbox) <= set(user), "what a sandbox can open, a notebook can make"
    assert {name: user[name] for name in sandbox} == sandbox
