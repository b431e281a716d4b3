"""Ctrl-C: it ends a command, but not in the middle of what must be whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from container_manager import interrupts
from container_manager.interrupts import Interrupted

LAUNCHERS = Path(__file__).resolve().parents[2] / "images/user/files/usr/local/bin"

pytestmark = pytest.mark.usefixtures("interruptible")

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", NUMBERS)
def test_signal_is_raised(number: int) -> None:
    with pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_status == 128 + number


def test_signal_waits_for_the_end_of_what_must_be_whole() -> None:
    done = []

    def whole() -> None:
        with interrupts.put_off():
            with interrupts.put_off():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("more")

    with pytest.raises(Interrupted):
        whole()
    assert done == ["inner", "outer"]


def test_signal_that_was_raised_is_not_raised_again() -> None:
    with pytest.raises(Interrupted), interrupts.put_off():
        os.kill(os.getpid(), signal.SIGINT)
    with interrupts.put_off():
        pass


def test_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.raise_them()
    os.kill(os.getpid(), signal.SIGHUP)


def test_second_signal_does_not_interrupt_what_the_first_began() -> None:
    done = []

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            done.append("put in order")

    with pytest.raises(Interrupted):
        interrupted()
    assert done == ["put in order"]


def test_signal_that_python_drops_comes_once_more() -> None:
    class Interrupts:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted() -> None:
        Interrupts()
        time.sleep(5)

    with pytest.raises(Interrupted):
        interrupted()


@pytest.mark.parametrize("command", ["cm", "ddocker", "cminfo", "cmrun", "cmkill"])
def test_command_that_has_not_begun_says_nothing_when_it_is_interrupted(tmp_path: Path, command: str) -> None:
    (tmp_path / "container_manager").mkdir()
    (tmp_path / "container_manager/__init__.py").touch()
    (tmp_path / f"container_manager/{command}.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    argv = [sys.executable, LAUNCHERS / command]
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
