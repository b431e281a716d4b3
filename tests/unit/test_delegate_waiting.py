"""What a person sees while a call waits: in a real terminal, and in stand-ins for a notebook and for srun."""

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import delegate_function
from delegate_function import Executor, SubprocessDelegate, TestClass, places, progress, reporting, screens, waiting
from delegate_function.places import Place, Places
from live import wait_until
from terminal import Terminal

SRC = Path(delegate_function.__file__).parents[1]
NOW = 1_795_636_568.0

WORDS = [
    (None, "job 412 waits"),
    (Place(), "job 412 waits"),
    (Place(3, 7), "job 412 waits: 3rd of 7"),
    (Place(1, 1, NOW + 40), "job 412 waits: 1st of 1, should start at 09:56 (in 40 s)"),
    (Place(12, 112, NOW + 120), "job 412 waits: 12th of 112, should start at 09:58 (in 2 min)"),
    (Place(22, 40, NOW + 4 * 3600), "job 412 waits: 22nd of 40, should start at 13:56 (in 4 h)"),
    (Place(2, 2, NOW + 48 * 3600), "job 412 waits: 2nd of 2, should start at Fri 09:56 (in 48 h)"),
    (Place(2, 2, NOW - 5), "job 412 waits: 2nd of 2"),
    (Place(None, 7, None, "JobHeldUser"), "job 412 waits: JobHeldUser"),
    (Place(start=NOW + 40, reason="Priority"), "job 412 waits: should start at 09:56 (in 40 s)"),
]


@pytest.mark.parametrize(("place", "words"), WORDS, ids=[words for _, words in WORDS])
def test_how_a_job_waits_is_said_in_words(place: Place | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC+10")
    time.tzset()
    monkeypatch.setattr(waiting.time, "time", lambda: NOW)
    try:
        assert waiting.waits("412", place) == words
    finally:
        monkeypatch.undo()
        time.tzset()


# asking


def program(directory: Path, name: str, text: str) -> None:
    file = directory / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


@pytest.fixture
def bin_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory that is searched for programs first; there is no service for places."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setattr(places, "QUEUE_PLACE", str(tmp_path / "none"))
    return directory


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Give the socket on which the service would listen."""
    path = tmp_path / "queue-place"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)
        listener.settimeout(10)
        monkeypatch.setattr(places, "QUEUE_PLACE", str(path))
        yield listener


def known(asked: Places, *jobs: str) -> dict[str, Place]:
    return wait_until(lambda: asked.look(jobs), timeout_s=10, interval_s=0.01, what="an answer")


def test_the_service_s_answer_is_not_waited_for(service: socket.socket) -> None:
    asked = Places()
    began = time.monotonic()
    assert asked.look(["7", "no job"]) == {}
    assert time.monotonic() - began < 0.5
    connection, _ = service.accept()
    assert json.loads(connection.recv(4096)) == {"jobs": [7]}
    connection.send(b'{"of": 9, "jobs": {"7": {"place": 2, "reason": "Priority", "start": null}}}')
    assert known(asked, "7") == {"7": Place(2, 9, None, "Priority")}
    connection.close()
    asked.close()


def test_a_service_that_hangs_up_or_has_too_much_to_do_tells_nothing(
    bin_directory: Path, service: socket.socket
) -> None:
    program(bin_directory, "squeue", f"touch {bin_directory}/asked")
    asked = Places()
    assert asked.look(["7"]) == {}
    service.accept()[0].close()
    assert asked.look(["7"]) == {}
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            full = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            full.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                full.connect(places.QUEUE_PLACE)
        others = Places()
        for _ in range(20):
            assert others.look(["7"]) == {}
            time.sleep(0.01)
    asked.close()
    assert not (bin_directory / "asked").exists(), "Slurm itself is asked where there is no service"


def test_without_the_service_slurm_is_asked_when_the_job_should_start(bin_directory: Path) -> None:
    program(bin_directory, "squeue", f'echo "$SLURM_TIME_FORMAT $*" >>{bin_directory}/asked; echo "7|1795636568|None"')
    asked = Places()
    assert known(asked, "7", "8") == {"7": Place(start=NOW, reason="None")}
    assert (bin_directory / "asked").read_text() == "%s --noheader --start --jobs=7,8 --format=%A|%S|%r\n"


def test_a_squeue_that_hangs_is_ended(bin_directory: Path) -> None:
    program(bin_directory, "squeue", f"echo $$ >{bin_directory}/pid; exec sleep 60")
    asked = Places()
    asked.look(["7"])
    pid = int(wait_until(lambda: _read(bin_directory / "pid"), timeout_s=10, what="squeue runs"))
    asked.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_slurm_nothing_is_known(bin_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Places().look(["7"]) == {}


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


# a terminal

PROGRAM = """
import sys, time
sys.path[:0] = {path!r}
import cloudpickle
from delegate_function import SlurmDelegate, progress

class Steps:
    def run(self, steps, text, seconds):
        for step in range(steps):
            progress(step, steps)
            print(text, end="", flush=True)
            time.sleep(seconds)

cloudpickle.register_pickle_by_value(sys.modules["__main__"])
print("before", end="", flush=True)
try:
    SlurmDelegate(delegate_executable_path={hop!r}).invoke(Steps(), "run", *{arguments!r})
except KeyboardInterrupt:
    print("interrupted")
print("after")
"""


@pytest.fixture
def hop(bin_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a program that serves a hop with this checkout's package; its job waits for the file `go`."""
    monkeypatch.setenv("TERM", "xterm")
    program(bin_directory, "squeue", "echo '17|N/A|Licenses'")
    program(bin_directory, "scancel", f'echo "$@" >>{tmp_path}/cancelled')
    program(
        bin_directory,
        "srun",
        f"echo 'srun: job 17 queued and waiting for resources' >&2; trap 'echo 17 >>{tmp_path}/cancelled; exit' TERM\n"
        f"until [[ -e {tmp_path}/go ]]; do sleep 0.05; done\n"
        'while [[ $1 != -- ]]; do shift; done; shift; export SLURM_JOB_ID=17; exec "$@"',
    )
    file = tmp_path / "hop"
    file.write_text(
        f"#!{sys.executable} -I\nimport sys; sys.path.insert(0, {str(SRC)!r})\n"
        "from delegate_function.hop import main\nmain()\n"
    )
    file.chmod(0o755)
    return str(file)


def session(hop: str, *arguments: Any, columns: int = 80) -> Terminal:
    text = PROGRAM.format(path=[str(SRC)], hop=hop, arguments=arguments)
    return Terminal([sys.executable, "-c", text], columns=columns)


def test_a_waiting_call_is_shown_in_a_terminal_and_nothing_of_it_is_left(hop: str, tmp_path: Path) -> None:
    terminal = session(hop, 20, "", 0.1)
    terminal.wait_for("job 17 waits: Licenses")
    (tmp_path / "go").touch()
    terminal.wait_for(r"1\d of 20")
    assert terminal.end() == "beforeafter\n"
    node = os.uname().nodename
    assert terminal.shown[0].startswith("job 17 waits")
    assert any(re.fullmatch(rf"job 17 runs on {node} \(\d s\), \d+ of 20", line) for line in terminal.shown)


@pytest.mark.parametrize("text", ["x", "x\n"])
def test_output_of_the_call_comes_whole(hop: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "go").touch()
    terminal = session(hop, 15, text, 0.1)
    assert terminal.end() == f"before{15 * text}after\n"
    assert len(terminal.shown) > 1
    assert {line.startswith("  ") for line in terminal.shown[1:]} == {not text.endswith("\n")}


def test_what_is_shown_fits_the_terminal(hop: str, tmp_path: Path) -> None:
    terminal = session(hop, 1, "", 0, columns=16)
    terminal.wait_for("job 17 waits: …")
    (tmp_path / "go").touch()
    assert terminal.end() == "beforeafter\n"


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    class Stream:
        def fileno(self) -> int:
            raise OSError

        def write(self, text: str) -> None:
            said.append(text)

        def flush(self) -> None:
            pass

    said: list[str] = []
    screens.Terminal(Stream()).show("a\x1b[2Jb\r\n")  # type: ignore[arg-type]
    assert "".join(said) == "\x1b7\x1b[?7la?[2Jb??\x1b[K\x1b[?7h\x1b8"


@pytest.mark.parametrize("runs", [False, True], ids=["waits", "runs"])
def test_ctrl_c_ends_the_job_and_takes_the_line_away(hop: str, tmp_path: Path, runs: bool) -> None:
    if runs:
        (tmp_path / "go").touch()
    terminal = session(hop, 600, "", 0.1)
    terminal.wait_for("job 17 runs" if runs else "job 17 waits")
    terminal.press(b"\x03")
    began = time.monotonic()
    assert re.fullmatch(r"before(\^C)?interrupted\nafter\n", terminal.end())
    assert time.monotonic() - began < 2
    if not runs:
        assert _read(tmp_path / "cancelled") == "17"


@pytest.mark.parametrize(("name", "value"), [("DELEGATE_FUNCTION_PROGRESS", "no"), ("TERM", "dumb")])
def test_it_can_be_turned_off(hop: str, tmp_path: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (tmp_path / "go").touch()
    terminal = session(hop, 12, "", 0.1)
    assert terminal.end() == terminal.said.replace("\r\n", "\n") == "beforeafter\n"


def test_without_a_terminal_nothing_is_shown(hop: str, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    text = PROGRAM.format(path=[str(SRC)], hop=hop, arguments=(12, "", 0.1))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("beforeafter\n", "")


# a notebook


class Steps:
    """What is called."""

    def run(self, steps: int, pause_s: float = 0.1) -> int:
        for step in range(steps):
            progress(step, steps)
            time.sleep(pause_s)
        progress(steps, steps)
        return os.getpid()

    def from_children_and_threads(self) -> None:
        if (child := os.fork()) == 0:
            progress(1, 9)
            os._exit(0)
        os.waitpid(child, 0)
        late = threading.Thread(target=self._go_on, daemon=True)
        late.start()
        time.sleep(1.2)

    def _go_on(self) -> None:
        while True:
            progress(8, 8)

    def flood(self) -> None:
        end = time.monotonic() + 1.5
        frame = delegate_function.frames.encode_progress(5, 9)
        while time.monotonic() < end:
            os.write(_channel(), 1000 * frame)

    def forge(self) -> None:
        os.write(_channel(), delegate_function.frames.encode(b"P", struct.pack(">QQ", 2, 1)))
        time.sleep(10)


def _channel() -> int:
    """Return the descriptor over which a call's result goes."""
    return next(fd for fd in range(3, 50) if _is_socket(fd))


def _is_socket(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, str], bool]]:
    """Be a notebook; return what was published, each with whether it replaced what was there."""
    displays: list[tuple[dict[str, str], bool]] = []
    identifiers: list[str] = []

    def publish(data: dict[str, str], *, transient: dict[str, str], update: bool) -> None:
        known = transient["display_id"] in identifiers
        assert update == known
        identifiers.append(transient["display_id"])
        displays.append((data, update))

    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    display.publish_display_data = publish  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return displays


def test_a_notebook_shows_one_line_that_is_replaced_and_then_taken_away(published: list[Any]) -> None:
    SubprocessDelegate().invoke(Steps(), "run", 18)
    first, *others = published
    assert not first[1]
    assert all(update for _, update in others)
    assert len(others) > 2
    assert re.fullmatch(r"in hop 1 of 1 \(subprocess on \S+\) for 0 s.*", first[0]["text/plain"])
    assert any(
        re.search(r'<progress value="\d+" max="18"></progress> .*, \d+ of 18<', data.get("text/html", ""))
        for data, _ in others
    )
    assert published[-1] == ({}, True)


def test_what_a_notebook_would_obey_is_not_shown(published: list[Any]) -> None:
    screens.Notebook().show("<script>")
    assert "<script>" not in published[0][0]["text/html"]
    assert published[0][0]["text/plain"] == "<script>"


def test_a_short_call_publishes_nothing(published: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_QUIET_S", 30)
    SubprocessDelegate().invoke(Steps(), "run", 9)
    assert published == []


def test_other_threads_than_the_first_show_nothing(published: list[Any]) -> None:
    thread = threading.Thread(target=SubprocessDelegate().invoke, args=(Steps(), "run", 9))
    thread.start()
    thread.join()
    assert published == []


def test_a_notebook_is_quiet_where_that_was_set(published: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELEGATE_FUNCTION_PROGRESS", "no")
    SubprocessDelegate().invoke(Steps(), "run", 9)
    assert published == []


def test_calls_of_an_executor_are_shown_together(published: list[Any]) -> None:
    with Executor(SubprocessDelegate(), max_workers=2) as executor:
        list(executor.map(time.sleep, [0.6] * 4))
        wait_until(lambda: published and published[-1] == ({}, True), timeout_s=10, what="the line is taken away")
        texts = [data["text/plain"] for data, _ in published if data]
        assert "0 of 4 calls are done, 2 run" in texts
        assert any(re.fullmatch("[23] of 4 calls are done, [12] runs?", text) for text in texts), texts
        published.clear()
        executor.submit(time.sleep, 1.5)
        wait_until(lambda: published, timeout_s=10, what="the next calls are shown too")
        assert published[0][0]["text/plain"] == "0 of 1 calls are done, 1 runs"
    wait_until(lambda: published[-1] == ({}, True), timeout_s=10, what="the line is taken away again")


def test_of_an_executor_s_jobs_the_first_in_the_queue_is_told(
    service: socket.socket, published: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    standings = iter([waiting.Standing(3, 9, 0, ["7", "8"])] * 3)
    monkeypatch.setattr(waiting, "_QUIET_S", 0)
    monkeypatch.setattr(waiting, "_TICK_S", 0.2)
    waiting.show_together(lambda: next(standings, None))
    asked, _ = service.accept()
    with asked:
        assert json.loads(asked.recv(65536)) == {"jobs": [7, 8]}
        places = {"7": (5, None), "8": (2, None)}
        jobs = {job: {"place": place, "start": start, "reason": "None"} for job, (place, start) in places.items()}
        asked.send(json.dumps({"of": 6, "jobs": jobs}).encode())
    wait_until(lambda: published and published[-1] == ({}, True), timeout_s=10, what="the line is taken away")
    texts = [data["text/plain"] for data, _ in published if data]
    assert texts[-1] == "3 of 9 calls are done, job 8 waits: 2nd of 6"


# progress


def _steps(published: list[Any]) -> set[str]:
    return set(re.findall(r"(?<=, )\d of \d", " ".join(data.get("text/plain", "") for data, _ in published)))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Return the progress that came to this process."""
    told = []
    decode = delegate_function.frames.decode_progress

    def note(content: bytes) -> tuple[int, int]:
        told.append(decode(content))
        return told[-1]

    monkeypatch.setattr(delegate_function.frames, "decode_progress", note)
    return told


def test_the_call_s_own_process_tells_and_none_that_it_started(told: list[tuple[int, int]]) -> None:
    SubprocessDelegate().invoke(Steps(), "from_children_and_threads")
    assert set(told) == {(8, 8)}


def test_a_flood_of_progress_is_thinned_out_on_its_way(published: list[Any], told: list[tuple[int, int]]) -> None:
    SubprocessDelegate().invoke(Steps(), "flood")
    assert _steps(published) == {"5 of 9"}
    assert set(told) == {(5, 9)}
    assert 2 < len(told) < 30


def test_progress_that_cannot_be_ends_the_call() -> None:
    with pytest.raises(delegate_function.HopFailed, match=r"hop 2 of 2.*a progress of 2 in 1"):
        SubprocessDelegate(SubprocessDelegate()).invoke(Steps(), "forge")


@pytest.mark.parametrize(("done", "total", "kind"), [(2, 1, ValueError), (0.5, 1, TypeError), ("1", "2", TypeError)])
def test_progress_is_two_whole_numbers(done: Any, total: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        progress(done, total)


def test_progress_is_told_ten_times_a_second_and_at_the_end_and_while_the_call_runs() -> None:
    sent: list[bytes] = []
    with reporting.through(sent.append):
        for step in range(1001):
            progress(step, 1000)
    progress(1000, 1000)
    assert sent[0] == delegate_function.frames.encode_progress(0, 1000)
    assert sent[-1] == delegate_function.frames.encode_progress(1000, 1000)
    assert sent.count(sent[-1]) == 1
    assert len(sent) < 20


def test_where_no_call_runs_progress_does_nothing() -> None:
    progress(1, 2)
    assert delegate_function.TrivialDelegate().invoke(TestClass(), "hello") == os.getpid()
