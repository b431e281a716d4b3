"""Commands: quiet when they succeed, complete when they fail, and gone with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cfiddle_cluster import commands
from cfiddle_cluster.commands import CommandError, run
from cfiddle_cluster.wait import wait_until

SRC = Path(commands.__file__).resolve().parents[1]


def test_standard_output_is_returned_and_errors_are_not() -> None:
    assert run(["sh", "-c", "echo out; echo err >&2"], timeout_s=10) == "out\n"


def test_input_arrives_as_text_and_as_bytes() -> None:
    assert run(["cat"], timeout_s=10, input="grün") == "grün"
    assert run(["wc", "-c"], timeout_s=10, input=b"\0\xff").strip() == "2"


def test_command_without_input_reads_nothing_of_ours() -> None:
    assert run(["cat"], timeout_s=10) == ""


def test_no_shell_reads_the_words() -> None:
    assert run(["printf", "%s|", "$HOME", "a b", "'", "*"], timeout_s=10) == "$HOME|a b|'|*|"


def test_environment_and_directory_are_as_told(tmp_path: Path) -> None:
    command = ["/bin/sh", "-c", "pwd; echo $A$HOME"]
    assert run(command, timeout_s=10, env={"A": "b", "PATH": os.environ["PATH"]}, cwd=tmp_path) == f"{tmp_path}\nb\n"


def test_failure_tells_command_status_and_last_lines() -> None:
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "seq 100; echo 'it broke' >&2; exit 3"], timeout_s=10)
    error = caught.value
    assert error.returncode == 3
    assert error.argv[0] == "sh"
    assert len(error.output.splitlines()) == commands.LAST_LINES
    assert error.output.endswith("100\n\nit broke")
    assert "ended with status 3" in str(error)
    assert "it broke" in str(error)


def test_input_is_in_no_error() -> None:
    with pytest.raises(CommandError) as caught:
        run(["false"], timeout_s=10, input="a-secret")
    assert "a-secret" not in str(caught.value)


def test_command_that_does_not_end_is_killed_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(CommandError, match="did not end in 0 s") as caught:
        run(["sh", "-c", "echo so far; exec sleep 60"], timeout_s=0.4)
    assert time.monotonic() - began < 5
    assert caught.value.returncode is None
    assert caught.value.output == "so far"


def test_command_has_more_time_where_machines_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 100.0)
    assert run(["sh", "-c", "sleep 0.3; echo done"], timeout_s=0.1) == "done\n"


def test_command_that_is_not_there_is_said_so() -> None:
    with pytest.raises(CommandError, match=r"no-such-command .*cannot be started: .*No such file"):
        run(["no-such-command", "x"], timeout_s=10)


def test_command_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        "import sys; from cfiddle_cluster.commands import run;"
        "run(['sh', '-c', 'echo $$ >\"$0\"; exec sleep 300', sys.argv[1]], timeout_s=300)"
    )
    argv = [sys.executable, "-c", program, str(pid_file)]
    with subprocess.Popen(argv, env=os.environ | {"PYTHONPATH": str(SRC)}) as parent:
        try:
            wait_until(lambda: pid_file.exists() and pid_file.read_text().strip(), timeout_s=10, what="the command")
            child = int(pid_file.read_text())
            os.kill(child, 0)
        finally:
            parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not _is_alive(child), timeout_s=5, what="the command to die")


def _is_alive(pid: int) -> bool:
    try:
        # What nobody has waited for yet is dead too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
