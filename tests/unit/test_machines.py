"""Machines: what is run where, how it is quoted on the way, and what is said of one that cannot be reached."""

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cfiddle_cluster import machines
from cfiddle_cluster.commands import CommandError
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.machines import EngineError, Machine
from cfiddle_cluster.state import State
from samples import config, machine, reached_by

AWKWARD = ["a b", "$HOME", "'", '"', "*", "", "--", "\n", "`id`", "ü", "\\"]
# sshd gives the words after the destination to the user's shell, joined with blanks.
REMOTE_SHELL = ("sh", "-c", 'shift; exec sh -c "$*"', "ssh", "root@10.0.0.2")


def _executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def _fake_ssh(tmp_path: Path, said: str, status: int = machines.SSH_FAILED) -> Machine:
    text = f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(said)} >&2\nexit {status}\n"
    return reached_by(str(_executable(tmp_path / "ssh", text)), "-o", "UserKnownHostsFile=/known", "root@10.0.0.2")


def test_words_arrive_on_the_machine_as_they_were() -> None:
    assert machine("head").run(["printf", "%s|", *AWKWARD], timeout_s=10) == "|".join([*AWKWARD, ""])
    assert reached_by(*REMOTE_SHELL).run(["printf", "%s|", *AWKWARD], timeout_s=10) == "|".join([*AWKWARD, ""])


def test_command_on_this_machine_is_the_command() -> None:
    assert machine("head").argv(["rm", Path("/x")]) == ["rm", "/x"]


def test_command_elsewhere_is_one_word_for_ssh() -> None:
    assert reached_by("ssh", "root@c1").argv(["echo", "a b"]) == ["ssh", "root@c1", "echo 'a b'"]


def test_user_who_is_not_root_uses_sudo_that_asks_nothing() -> None:
    argv = reached_by("ssh", "me@c1", sudo=True).argv(["docker", "info"])
    assert argv == ["ssh", "me@c1", "sudo -n docker info"]


def test_script_travels_on_standard_input_and_gets_its_arguments() -> None:
    found = reached_by(*REMOTE_SHELL).script('printf "%s|" "$@"', AWKWARD, timeout_s=10)
    assert found == "|".join([*AWKWARD, ""])


def test_script_s_text_is_in_no_error() -> None:
    with pytest.raises(CommandError) as caught:
        reached_by(*REMOTE_SHELL).script("password=a-secret; exit 3", timeout_s=10)
    assert caught.value.returncode == 3
    assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "message", "remedy"),
    [
        ("ssh: connect to host 10.0.0.2 port 22: No route to host", "cannot be reached by SSH", "ssh root@10.0.0.2"),
        ("root@10.0.0.2: Permission denied (publickey).", "does not let root@10.0.0.2 in", "SSH_KEY"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "another host key than the known one",
            "ssh-keygen -f /known -R 10.0.0.2",
        ),
        (
            "No ED25519 host key is known for 10.0.0.2.\nHost key verification failed.",
            "is not known yet",
            "ssh-keyscan 10.0.0.2 >>/known",
        ),
    ],
)
def test_machine_that_cannot_be_reached_says_why_and_what_to_do(
    tmp_path: Path, said: str, message: str, remedy: str
) -> None:
    unreachable = _fake_ssh(tmp_path, said)
    for ask in (lambda: unreachable.run(["true"], timeout_s=10), lambda: unreachable.engine_get("/info")):
        with pytest.raises(ClusterError, match=message) as caught:
            ask()
        assert "10.0.0.2" in caught.value.message
        assert remedy in caught.value.remedy


def test_command_that_fails_there_is_not_an_unreachable_machine(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="ended with status 1"):
        _fake_ssh(tmp_path, "no", status=1).run(["false"], timeout_s=10)


def test_sudo_that_wants_a_password_is_said_so(tmp_path: Path) -> None:
    ssh = _fake_ssh(tmp_path, "sudo: a password is required", status=1).ssh
    with pytest.raises(ClusterError, match=r"cannot become root on 10\.0\.0\.2"):
        reached_by(*ssh, sudo=True).run(["true"], timeout_s=10)


# --- the engine, asked through a client that speaks for it ----------------------------------------------------------


def _engine(tmp_path: Path, answer: str, *, after: str = "") -> Machine:
    """Return a machine whose docker client writes down what it is told and gives one answer."""
    (tmp_path / "answer").write_bytes(answer.replace("\n", "\r\n").encode())
    # It reads as much as the request's length says and no more: the caller's end stays open, as with the real one.
    text = f"""#!/usr/bin/env python3
import sys
heading = b""
while not heading.endswith(b"\\r\\n\\r\\n"):
    heading += sys.stdin.buffer.read(1)
length = int(heading.split(b"Content-Length: ")[1].split(b"\\r")[0])
open({str(tmp_path / "request")!r}, "wb").write(heading + sys.stdin.buffer.read(length))
open({str(tmp_path / "argv")!r}, "w").write(" ".join(sys.argv))
sys.stdout.buffer.write(open({str(tmp_path / "answer")!r}, "rb").read())
sys.stdout.flush()
{after}
"""
    return reached_by(str(_executable(tmp_path / "ssh", text)), "root@10.0.0.2")


def test_engine_is_told_in_the_body_and_nothing_is_in_the_argument_list(tmp_path: Path) -> None:
    found = _engine(tmp_path, 'HTTP/1.1 200 OK\nContent-Length: 9\n\n{"a": 12}').engine_post("/x", {"token": "SECRET"})
    assert found == {"a": 12}
    request = (tmp_path / "request").read_text()
    assert request.startswith("POST /x HTTP/1.1\n")
    assert json.loads(request.partition("\n\n")[2]) == {"token": "SECRET"}
    assert "SECRET" not in (tmp_path / "argv").read_text()


def test_engine_s_chunks_are_put_together(tmp_path: Path) -> None:
    answer = 'HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n3\n["a\n2\n"]\n0\n\n'
    assert _engine(tmp_path, answer).engine_get("/x") == ["a"]


def test_answer_without_content_is_none(tmp_path: Path) -> None:
    assert _engine(tmp_path, "HTTP/1.1 200 OK\nContent-Length: 0\n\n").engine_post("/swarm/leave") is None


def test_engine_s_refusal_is_told_in_its_words(tmp_path: Path) -> None:
    answer = 'HTTP/1.1 503 Service Unavailable\nContent-Length: 29\n\n{"message":"This node is not"}'
    with pytest.raises(EngineError, match="the engine of c1 refuses: This node is not") as caught:
        _engine(tmp_path, answer.replace("29", "30")).engine_get("/x")
    assert caught.value.status == 503


def test_engine_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    began = time.monotonic()
    silent = _engine(tmp_path, "", after="import time; time.sleep(60)")
    with pytest.raises(ClusterError, match="no answer in"):
        silent.engine_get("/x", timeout_s=0.5)
    assert time.monotonic() - began < 10


# --- several machines ------------------------------------------------------------------------------------------------


def test_machines_are_asked_at_once_and_answer_in_order() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def ask(asked: Machine) -> str:
        meeting.wait()
        return asked.name

    assert machines.on_each([machine("c1"), machine("c2"), machine("c3")], ask) == ["c1", "c2", "c3"]


def test_every_machine_that_failed_is_named() -> None:
    def fail(asked: Machine) -> None:
        if asked.name != "c2":
            raise ClusterError("broke" if asked.name == "c3" else f"broke for {asked.name}", "mend it")

    with pytest.raises(ClusterError, match=r"^broke for c1\nc3: broke\n") as caught:
        machines.on_each([machine("c1"), machine("c2"), machine("c3")], fail)
    assert caught.value.remedy == "mend it"


def test_machines_whose_turn_has_not_come_are_left_alone_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machines, "PARALLEL", 1)
    asked: list[str] = []

    def ask(found: Machine) -> None:
        asked.append(found.name)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt):
        machines.on_each([machine("c1"), machine("c2"), machine("c3")], ask)
    assert asked == ["c1"]


def test_defect_of_ours_is_not_dressed_up_as_a_machine_s() -> None:
    with pytest.raises(ZeroDivisionError):
        machines.on_each([machine("c1")], lambda _machine: 1 // 0)


def test_machines_that_answer_are_named_and_the_others_left_out(tmp_path: Path) -> None:
    found = machines.answering([_fake_ssh(tmp_path, "No route to host"), machine("unnamed")])
    assert [(m.name, m.addr) for m in found] == [(os.uname().nodename.partition(".")[0], "addr-unnamed")]


def test_machines_that_cannot_be_reached_are_told_with_the_reason(tmp_path: Path) -> None:
    changed = _fake_ssh(tmp_path, "REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.")
    there, [silent] = machines.reached([changed, machine("unnamed")])
    assert [found.addr for found in there] == ["addr-unnamed"]
    assert silent.machine == changed
    assert "another host key" in silent.error.message
    assert "ssh-keygen -f /known -R 10.0.0.2" in silent.error.remedy


# --- which machines there are ----------------------------------------------------------------------------------------


def test_head_that_stands_among_the_workers_is_both(tmp_path: Path) -> None:
    assert machines.head(config(tmp_path)).roles == {"head"}
    both = config(tmp_path, WORKER_ADDRS="10.0.0.1 10.0.0.2")
    assert machines.head(both).roles == {"head", "worker"}


def test_simulated_machine_takes_the_cluster_s_key_and_known_host_keys_only(tmp_path: Path) -> None:
    ssh = " ".join(machines.simulated_worker(State(tmp_path), "c1", "172.31.240.11").ssh)
    assert f"IdentityFile={tmp_path}/ssh/id_ed25519" in ssh
    assert "StrictHostKeyChecking=yes" in ssh
    assert "BatchMode=yes" in ssh
    assert f"UserKnownHostsFile={tmp_path}/ssh/known_hosts" in ssh
    assert ssh.endswith("root@172.31.240.11")


def test_real_machine_is_logged_in_to_as_config_says(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    settings = config(tmp_path, WORKER_ADDRS="10.0.0.2", SSH_USER="teacher", SSH_KEY=str(key))
    found = machines.real_worker(settings, State(tmp_path), "10.0.0.2")
    assert found.sudo
    assert found.ssh[-1] == "teacher@10.0.0.2"
    assert f"IdentityFile={key}" in found.ssh
    assert "IdentitiesOnly=yes" in found.ssh
    assert "StrictHostKeyChecking=yes" in found.ssh
    assert "PasswordAuthentication=no" in found.ssh


def test_without_a_key_of_its_own_ssh_s_and_its_agent_s_are_tried(tmp_path: Path) -> None:
    found = machines.real_worker(config(tmp_path, WORKER_ADDRS="10.0.0.2"), State(tmp_path), "10.0.0.2")
    assert not any(word.startswith("Identit") for word in found.ssh)
    assert not found.sudo


@pytest.mark.parametrize("ask", [machines.named, lambda listed: machines.reached(listed)[0]], ids=["named", "reached"])
@pytest.mark.parametrize(("has_terminal", "asked"), [(True, ["c2", "c3"]), (False, [])])
def test_unknown_host_keys_are_asked_about_one_by_one_where_there_is_a_terminal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_terminal: bool,
    asked: list[str],
    ask: Callable[[list[Machine]], list[Machine]],
) -> None:
    known = tmp_path / "known_hosts"
    known.write_text("c1 ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ8hQhP0Xk1Z0m3U4s6m2d5b1nJp4m6dX0m3U4s6m2d5\n")
    # In the place of ssh: says who asks whom, slowly enough for two at once to be seen.
    text = """#!/bin/sh
case "$*" in
    *"StrictHostKeyChecking=ask"*"StrictHostKeyChecking=yes"*)
        for last; do [ "$last" = true ] || host=$last; done
        mkdir "$(dirname "$0")/asking" || touch "$(dirname "$0")/two-at-once"
        sleep 0.1
        echo "$host" >>"$(dirname "$0")/asked"
        rmdir "$(dirname "$0")/asking" ;;
    *) echo "name-of-a-machine" ;;
esac
"""
    ssh = str(_executable(tmp_path / "ssh", text))
    words = ("-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes")
    real = [replace(reached_by(ssh, *words, name), addr=name) for name in ("c1", "c2", "c3")]
    monkeypatch.setattr(machines, "_has_terminal", lambda: has_terminal)
    found = ask([*real, replace(reached_by(ssh, *words, "c4"), addr="c4", simulated=True), machine("head")])
    log = tmp_path / "asked"
    assert (log.read_text().split() if log.exists() else []) == asked
    assert not (tmp_path / "two-at-once").exists()
    assert [machine.name for machine in found[:4]] == ["name-of-a-machine"] * 4
