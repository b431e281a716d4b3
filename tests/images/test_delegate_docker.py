"""A call in a container of the caller's own engine, of the image in which sandboxed calls run.

The image's Python is not the caller's, so the caller is a container too, of the user's image, with the engine's socket.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster.commands import docker_cli, run
from cfiddle_cluster.wait import wait_until
from containers import Container, Start
from delegate_function import DockerDelegate, HopFailed, TestClass, VersionMismatch

LABEL = "cfiddle.test=docker-delegate"
OPTIONS = ["--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--label", LABEL]
SOCKET = Path("/var/run/docker.sock")


def _call(user: Container, program: str) -> str:
    imports = "import json, os, sys\nfrom delegate_function import *\n"
    return user.run("/opt/venv/bin/python3", "-I", "-c", imports + program, user="0", timeout_s=60)


@pytest.fixture(scope="module")
def user(start_for_all: Start) -> Container:
    """Return a container with a caller in it who has an engine."""
    client = f"{docker_cli()}:/usr/local/bin/docker:ro"
    options = ["--entrypoint", "sleep", "--user", "0", "--volume", client, "--volume", f"{SOCKET}:{SOCKET}"]
    return start_for_all("user", "1d", options=options)


def _delegate(image: str, options: list[str] = OPTIONS) -> str:
    return f"DockerDelegate({image!r}, docker_cmd_line_args={options!r})"


def _containers() -> str:
    return run([docker_cli(), "ps", "--all", "--quiet", "--filter", f"label={LABEL}"], timeout_s=30)


def test_a_call_runs_in_a_container_and_leaves_none(user: Container, image: Callable[[str], str]) -> None:
    program = (
        f"delegate = {_delegate(image('sandbox'))}\nthing = TestClass()\n"
        "delegate.invoke(thing, 'set_value', [1, 2])\n"
        "done = delegate.invoke(ShellCommandClass(['id', '-u'], capture_output=True, text=True), 'run')\n"
        "print(json.dumps([thing._value, done.stdout, delegate.last_call.where]))"
    )
    value, uid, where = json.loads(_call(user, program).splitlines()[-1])
    assert (value, uid) == ([1, 2], "65533\n")
    assert where.startswith("hop 1 of 1 (docker on ")
    wait_until(lambda: _containers() == "", timeout_s=10, what="no container is left")


def test_a_container_stands_inside_a_chain(user: Container, image: Callable[[str], str]) -> None:
    program = (
        f"docker = {_delegate(image('sandbox'))}\n"
        "docker.set_subdelegate(TemporaryDirectoryDelegate(SubprocessDelegate()))\n"
        "chain = SubprocessDelegate(docker)\n"
        "chain.invoke(ShellCommandClass(['pwd']), 'run')\n"
        "print([hop['kind'] for hop in chain.last_call.hops])"
    )
    directory, kinds = _call(user, program).splitlines()[-2:]
    assert directory.startswith("/tmp/call-")
    assert kinds == "['subprocess', 'docker', 'subprocess']"


def test_an_abandoned_call_leaves_no_container(user: Container, image: Callable[[str], str]) -> None:
    program = (
        "import signal, threading\n"
        "threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"try:\n    {_delegate(image('sandbox'))}.invoke(ShellCommandClass(['sleep', '60']), 'run')\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    assert _call(user, program).splitlines()[-1] == "interrupted"
    wait_until(lambda: _containers() == "", timeout_s=5, what="the call's container removed")


def test_another_python_is_named_before_the_call(image: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(docker_cli()).parent}:{os.environ['PATH']}")
    if sys.version_info[:2] == (3, 13):
        monkeypatch.setattr(sys, "version_info", (3, 2, 1))
    with pytest.raises(VersionMismatch, match=r"hop 1 of 1 \(docker on .*caller runs Python 3\.\d+, here it is 3\.13"):
        DockerDelegate(image("sandbox"), docker_cmd_line_args=OPTIONS).invoke(TestClass(), "hello")
    wait_until(lambda: _containers() == "", timeout_s=10, what="no container is left")


def test_an_image_that_is_not_there_is_told_in_the_engines_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(docker_cli()).parent}:{os.environ['PATH']}")
    with pytest.raises(HopFailed, match=r"docker run of cfiddle-nothing:none ended with status 125"):
        DockerDelegate("cfiddle-nothing:none", docker_cmd_line_args=["--pull", "never"]).invoke(TestClass(), "hello")
