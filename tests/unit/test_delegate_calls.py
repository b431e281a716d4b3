"""Calls through real processes: what comes back, what streams, what ends, and what is refused."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from operator import le
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster.wait import wait_until
from delegate_function import (
    CallNotSent,
    ConnectionLost,
    DelegateChain,
    DelegateFunctionException,
    HopFailed,
    ProcessDied,
    RemoteError,
    RemoteTraceback,
    ResultNotReturned,
    ShellCommandClass,
    SubprocessDelegate,
    TestClass,
    TrivialDelegate,
    VersionMismatch,
    files,
    forked,
    frames,
)
from delegate_function.conversation import Conversation
from delegate_function.delegates import BaseDelegate
from delegate_function.processes import Process, start_process

SRC = Path(__file__).parents[2] / "src"


class Awkward(Exception):
    """An exception that its own pickle cannot make again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


class Thing:
    """What the tests call; defined here, so that it travels by name."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"calls": 0}
        self.extra = 1

    def add(self, a: int, b: int = 0) -> int:
        self.state["calls"] += 1
        return a + b

    def myself(self) -> tuple["Thing", int]:
        self.me = self
        del self.extra
        return self, os.getpid()

    def size(self, data: bytes, back: int) -> tuple[int, bytes]:
        return len(data), bytes(back)

    def speak(self, *lines: str, pause_s: float = 0) -> None:
        for line in lines:
            print(line)
            time.sleep(pause_s)
        print("done", file=sys.stderr)

    def flood(self, megabytes: int) -> None:
        for _ in range(megabytes):
            os.write(1, b"x" * 1024**2)

    def command(self, *argv: str) -> int:
        return subprocess.run(argv, check=False).returncode

    def fail(self, error: BaseException) -> None:
        self.state["calls"] = -1
        raise error

    def awkward(self) -> None:
        raise Awkward("first", "second")

    def lock(self) -> Any:
        return threading.Lock()

    def die(self, number: int) -> None:
        print("last words", flush=True)
        os.kill(os.getpid(), number)

    def leave(self, status: int) -> None:
        os._exit(status)

    def sleep(self, seconds: float) -> None:
        Path("pids").write_text(f"{os.getpid()} {os.getppid()}")
        time.sleep(seconds)

    def hold_interpreter(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pow(7, 2_000_000)

    def copy(self, source: str, target: str) -> str:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(Path(source).read_bytes())
        return str(Path.cwd())

    def link(self, target: str, name: str) -> None:
        Path(name).symlink_to(target)

    def fifo(self, name: str) -> None:
        os.mkfifo(name)

    def sparse(self, name: str, size: int) -> None:
        with open(name, "wb") as file:
            file.truncate(size)

    def leave_a_child(self) -> int:
        return subprocess.Popen(["sleep", "60"]).pid


CHAINS = {
    "one": SubprocessDelegate,
    "three": DelegateChain(SubprocessDelegate, TrivialDelegate, SubprocessDelegate, SubprocessDelegate),
}


@pytest.fixture(params=CHAINS.values(), ids=CHAINS.keys())
def delegate(request: pytest.FixtureRequest) -> BaseDelegate:
    made: BaseDelegate = request.param()
    return made


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_value_comes_back_and_state_is_brought_up_to_date(delegate: BaseDelegate) -> None:
    thing = Thing()
    assert delegate.invoke(thing, "add", 2, b=3) == 5
    assert thing.state == {"calls": 1}


def test_it_runs_in_another_process() -> None:
    assert SubprocessDelegate().invoke(TestClass(), "hello") != os.getpid()
    assert TrivialDelegate().invoke(TestClass(), "hello") == os.getpid()


def test_the_object_itself_is_the_same_here_and_in_what_comes_back() -> None:
    thing = Thing()
    returned, _ = SubprocessDelegate().invoke(thing, "myself")
    assert returned is thing
    assert thing.me is thing
    assert not hasattr(thing, "extra")


def test_a_class_that_says_what_travels_is_obeyed() -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()
            self.count = 0

        def __getstate__(self) -> int:
            return self.count

        def __setstate__(self, count: int) -> None:
            self.lock, self.count = threading.Lock(), count

        def step(self) -> int:
            with self.lock:
                self.count += 1
                return self.count

    locked = Locked()
    assert SubprocessDelegate().invoke(locked, "step") == 1
    assert SubprocessDelegate().invoke(locked, "step") == 2
    assert locked.count == 2


def test_a_function_and_a_class_that_are_defined_where_they_are_used_travel() -> None:
    class Local:
        def apply(self, function: Any, value: int) -> Any:
            return function(value), Local

    value, kind = SubprocessDelegate().invoke(Local(), "apply", lambda x: x * 2, 21)
    assert value == 42
    assert kind is Local


def test_output_is_written_to_what_is_sys_stdout_at_the_time(
    delegate: BaseDelegate, capsys: pytest.CaptureFixture[str]
) -> None:
    delegate.invoke(Thing(), "speak", "äöü €", "zwei")
    captured = capsys.readouterr()
    assert captured.out == "äöü €\nzwei\n"
    assert captured.err == "done\n"


def test_output_of_a_command_comes_too(capsys: pytest.CaptureFixture[str]) -> None:
    SubprocessDelegate().invoke(ShellCommandClass(["sh", "-c", "echo $GREETING"], env={"GREETING": "hello"}), "run")
    assert capsys.readouterr().out == "hello\n"


class Clocked(io.StringIO):
    """A stream that notes when something is written, and may take its time."""

    def __init__(self, first_takes_s: float = 0) -> None:
        super().__init__()
        self.times: list[float] = []
        self._first_takes_s = first_takes_s

    def write(self, text: str) -> int:
        if not self.times:
            time.sleep(self._first_takes_s)
        self.times.append(time.monotonic())
        return super().write(text)


def test_output_streams_while_it_is_written(delegate: BaseDelegate, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Clocked()
    monkeypatch.setattr(sys, "stdout", stream)
    delegate.invoke(Thing(), "speak", "one", "two", "three", pause_s=0.3)
    assert stream.getvalue() == "one\ntwo\nthree\n"
    assert stream.times[-1] - stream.times[0] > 0.4


def test_a_reader_that_takes_longer_than_the_silence_allowed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Clocked(first_takes_s=frames.SILENCE_S * 2)
    monkeypatch.setattr(sys, "stdout", stream)
    SubprocessDelegate().invoke(Thing(), "flood", 8)
    assert len(stream.getvalue()) == 8 * 1024**2


def test_a_call_that_does_not_let_go_of_its_interpreter_lives_on() -> None:
    SubprocessDelegate().invoke(Thing(), "hold_interpreter", frames.SILENCE_S * 1.5)


@pytest.mark.parametrize("megabytes", [0, 1, 40])
def test_large_values_travel_both_ways(delegate: BaseDelegate, megabytes: int) -> None:
    size = megabytes * 1024**2
    assert delegate.invoke(Thing(), "size", bytes(size), size) == (size, bytes(size))


def test_an_exception_is_raised_here_with_its_traceback_and_the_state(delegate: BaseDelegate) -> None:
    thing = Thing()
    with pytest.raises(KeyError, match="missing") as raised:
        delegate.invoke(thing, "fail", KeyError("missing"))
    cause = raised.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert "in fail" in str(cause)
    assert "hop " in str(cause)
    assert thing.state["calls"] == -1


def test_an_exception_that_cannot_be_made_again_comes_as_text() -> None:
    with pytest.raises(RemoteError, match="Awkward: first") as raised:
        SubprocessDelegate().invoke(Thing(), "awkward")
    assert raised.value.details["type"].endswith("Awkward")
    assert "in awkward" in str(raised.value.__cause__)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_would_end_the_caller_comes_as_text(error: BaseException) -> None:
    with pytest.raises(RemoteError, match=type(error).__name__):
        SubprocessDelegate().invoke(Thing(), "fail", error)


def test_a_result_that_cannot_be_pickled_is_said() -> None:
    with pytest.raises(ResultNotReturned, match=r"cannot be pickled.*lock"):
        SubprocessDelegate().invoke(Thing(), "lock")


def test_an_argument_that_cannot_be_pickled_is_said_before_anything_starts() -> None:
    with pytest.raises(CallNotSent, match="cannot be pickled"):
        SubprocessDelegate(delegate_executable_path="/nowhere").invoke(Thing(), "add", threading.Lock())


def test_a_call_that_is_too_large_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_TRANSFER", 1000)
    with pytest.raises(CallNotSent, match="at most 1000") as raised:
        SubprocessDelegate().invoke(Thing(), "size", bytes(2000), 0)
    assert raised.value.details["size"] > 2000


def test_a_method_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_like_it"):
        SubprocessDelegate().invoke(Thing(), "nothing_like_it")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_told_with_its_signal_and_the_last_output(delegate: BaseDelegate, number: signal.Signals) -> None:
    with pytest.raises(ProcessDied, match=number.name) as raised:
        delegate.invoke(Thing(), "die", number)
    assert raised.value.output_tail == "last words"
    assert "last words" in str(raised.value)
    assert raised.value.where.startswith("hop ")


def test_a_call_that_leaves_without_a_result_is_told_with_its_status() -> None:
    with pytest.raises(ProcessDied, match="status 7") as raised:
        SubprocessDelegate().invoke(Thing(), "leave", 7)
    assert raised.value.details["exit_status"] == 7


def test_usage_and_place_are_known_after_a_call(delegate: BaseDelegate) -> None:
    delegate.invoke(Thing(), "sleep", 0.1)
    call = delegate.last_call
    assert call is not None
    assert call.usage["wall_s"] >= 0.1
    assert call.usage["peak_memory_mb"] > 1
    assert call.seconds >= 0.1
    assert [hop["hop"] for hop in call.hops] == list(range(1, len(call.hops) + 1))
    assert call.where == call.hops[-1]["where"]


def test_errors_count_the_hops() -> None:
    chain = SubprocessDelegate(SubprocessDelegate(delegate_executable_path="/nowhere/at/all"))
    with pytest.raises(HopFailed, match=r"^hop 2 of 2 \(subprocess on .*\): cannot be started: .*/nowhere/at/all"):
        chain.invoke(Thing(), "add", 1)


def test_a_program_that_is_no_hop_is_found_out() -> None:
    with pytest.raises(HopFailed, match="not a frame"):
        SubprocessDelegate(delegate_executable_path="/usr/bin/id").invoke(Thing(), "add", 1)
    with pytest.raises(HopFailed, match="status 1"):
        SubprocessDelegate(delegate_executable_path="/bin/false").invoke(Thing(), "add", 1)


def test_another_version_of_python_is_named_before_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 2, 1))
    with pytest.raises(VersionMismatch, match=r"3\.2"):
        SubprocessDelegate().invoke(Thing(), "add", 1)


# What ends, and what ends with it.


def _pids(timeout_s: float = 10) -> list[int]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        text = Path("pids").read_text() if Path("pids").exists() else ""
        if len(text.split()) == 2:
            return [int(pid) for pid in text.split()]
        time.sleep(0.01)
    raise AssertionError("the call does not run")


def _alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _gone_within(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_an_interrupted_call_ends_at_once_with_its_processes(delegate: BaseDelegate) -> None:
    threading.Thread(target=lambda: (_pids(), os.kill(os.getpid(), signal.SIGINT))).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        delegate.invoke(Thing(), "sleep", 60)
    assert time.monotonic() - started < 5
    assert _gone_within(_pids(), 2)


def test_what_an_interrupted_call_started_ends_too(delegate: BaseDelegate) -> None:
    threading.Thread(target=lambda: (_pids(), os.kill(os.getpid(), signal.SIGINT))).start()
    with pytest.raises(KeyboardInterrupt):
        delegate.invoke(Thing(), "command", "sh", "-c", "echo $$ $$ >pids; sleep 60")
    assert _gone_within(_pids(), 2)


def test_a_stream_that_breaks_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("broken")

    monkeypatch.setattr(sys, "stdout", Broken())
    started = time.monotonic()
    with pytest.raises(OSError, match="broken"):
        SubprocessDelegate().invoke(Thing(), "speak", "one", "two", pause_s=30)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("where", ["start", "begin"])
def test_an_interrupt_while_a_call_is_started_leaves_no_process(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = {"start": threading.Thread, "begin": Conversation}[where]
    original = getattr(kind, where)
    processes: list[Process] = []

    def interrupted(*arguments: Any) -> None:
        original(*arguments)
        raise KeyboardInterrupt

    def noted(*arguments: Any) -> Process:
        processes.append(start_process(*arguments))
        return processes[0]

    monkeypatch.setattr("delegate_function.processes.start_process", noted)
    with monkeypatch.context() as patched:
        patched.setattr(kind, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            SubprocessDelegate().invoke(Thing(), "sleep", 60)
    assert all(process._process.returncode is not None for process in processes)
    assert not any(thread.name == "delegate_function call" for thread in threading.enumerate())


def test_a_thread_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="start new thread"):
        SubprocessDelegate().invoke(Thing(), "add", 1)


@pytest.mark.parametrize("chain", [1, 2])
def test_the_calls_processes_die_with_a_killed_caller(chain: int) -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(SRC)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_delegate_calls import Thing\n"
        "from delegate_function import DelegateChain, SubprocessDelegate\n"
        f"DelegateChain(*[SubprocessDelegate] * {chain})().invoke(Thing(), 'sleep', 60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        pids = _pids()
        caller.kill()
    assert _gone_within(pids, 2)


def test_the_calls_process_dies_with_a_stopped_caller_too() -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(SRC)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_delegate_calls import Thing\n"
        "from delegate_function import SubprocessDelegate\n"
        "SubprocessDelegate().invoke(Thing(), 'sleep', 60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as caller:
        pids = _pids()
        caller.send_signal(signal.SIGSTOP)
        assert _gone_within(pids, frames.SILENCE_S + 1)
        caller.kill()


def test_a_hop_that_falls_silent_is_given_up() -> None:
    threading.Thread(target=lambda: os.kill(_pids()[1], signal.SIGSTOP)).start()
    started = time.monotonic()
    with pytest.raises(ConnectionLost, match=rf"hop 1 of 1 .*was not heard of for {frames.SILENCE_S:g} s"):
        SubprocessDelegate().invoke(Thing(), "sleep", 60)
    assert time.monotonic() - started < frames.SILENCE_S + 3
    assert _gone_within(_pids(), 2)


@pytest.mark.parametrize("length", [1, 2])
def test_a_hop_that_is_killed_is_told(length: int) -> None:
    threading.Thread(target=lambda: os.kill(_pids()[1], signal.SIGKILL)).start()
    with pytest.raises(HopFailed, match=rf"hop {length} of {length} .*was killed by SIGKILL before the call did"):
        DelegateChain(*[SubprocessDelegate] * length)().invoke(Thing(), "sleep", 60)
    assert _gone_within(_pids(), 2)


def test_a_child_that_the_call_leaves_behind_is_ended_and_not_waited_for() -> None:
    started = time.monotonic()
    pid = SubprocessDelegate().invoke(Thing(), "leave_a_child")
    assert time.monotonic() - started < 5
    assert _gone_within([pid], 2)


def test_no_descriptor_and_no_thread_is_left_after_calls() -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    threads = threading.active_count()
    delegate = SubprocessDelegate()
    delegate.invoke(Thing(), "add", 1)
    # A call comes back before its first hop has quite ended.
    wait_until(lambda: threading.active_count() <= threads, timeout_s=10, what="the first call's thread is gone")
    before = held()
    for _ in range(3):
        delegate.invoke(Thing(), "add", 1)
        with pytest.raises(ProcessDied):
            delegate.invoke(Thing(), "leave", 1)
        with pytest.raises(HopFailed):
            SubprocessDelegate(delegate_executable_path="/bin/false").invoke(Thing(), "add", 1)
    # What earlier tests left may end meanwhile.
    wait_until(lambda: all(map(le, held(), before)), timeout_s=10, what="all is closed again")


def test_call_is_ended_before_its_process_got_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "_become_worker", lambda: time.sleep(30))
    worker = forked.Worker({}, "here")
    started = time.monotonic()
    worker.discard()
    assert time.monotonic() - started < 5


# Files.


def test_a_directory_that_another_call_makes_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def late(path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        mkdir(path, mode, dir_fd=dir_fd)

    root = os.open(tmp_path, os.O_RDONLY)
    with monkeypatch.context() as patched:
        patched.setattr(os, "mkdir", late)
        file = files.NewFile(root, "out/data", 0o644)
    file.write(b"here")
    file.commit()
    os.close(root)
    assert (tmp_path / "out/data").read_bytes() == b"here"


def test_files_travel_and_come_back(delegate: BaseDelegate, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/data").write_bytes(os.urandom(300_000))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/data").write_text("old")
    where = delegate.call(Thing(), "copy", ["in/data", "out/data"], inputs=["in/data"], outputs=[Path("out/data")])
    assert (tmp_path / "out/data").read_bytes() == (tmp_path / "in/data").read_bytes()
    assert where != str(tmp_path)
    assert not Path(where).exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data"]


def test_a_missing_output_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("old")
    with pytest.raises(ResultNotReturned, match="'out'"):
        SubprocessDelegate().call(Thing(), "add", [1], outputs=["out"])
    with pytest.raises(ResultNotReturned, match="nothing"):
        TrivialDelegate().call(Thing(), "add", [1], outputs=["nothing"])
    assert (tmp_path / "out").read_text() == "old"


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "", ".", "a\0b", 7])
def test_paths_that_lead_elsewhere_are_refused(path: Any) -> None:
    for named in ({"inputs": [path]}, {"outputs": [path]}):
        with pytest.raises((CallNotSent, TypeError)):
            SubprocessDelegate().call(Thing(), "add", [1], **named)


def test_an_input_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "dir").symlink_to("/etc")
    for path in ("link", "dir/passwd", "no/such"):
        with pytest.raises(CallNotSent, match=path):
            SubprocessDelegate().call(Thing(), "add", [1], inputs=[path])


def test_an_output_is_never_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    here = tmp_path / "here"
    here.mkdir()
    os.chdir(here)
    (here / "data").write_text("new")
    (here / "dir").symlink_to(outside)
    (here / "file").symlink_to(outside / "file")
    with pytest.raises(ResultNotReturned, match="'dir/x'"):
        SubprocessDelegate().call(Thing(), "copy", ["data", "dir/x"], inputs=["data"], outputs=["dir/x"])
    SubprocessDelegate().call(Thing(), "copy", ["data", "file"], inputs=["data"], outputs=["file"])
    assert not list(outside.iterdir())
    assert (here / "file").read_text() == "new"
    assert not (here / "file").is_symlink()


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("link", ["/etc/passwd", "out"]), ("fifo", ["out"]), ("sparse", ["out", 2 * 1024**4])],
    ids=["link", "fifo", "sparse"],
)
def test_outputs_that_are_traps_are_refused(method: str, arguments: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ResultNotReturned):
        SubprocessDelegate().call(Thing(), method, arguments, outputs=["out"])
    assert not (tmp_path / "out").exists()


def test_errors_can_be_pickled_themselves() -> None:
    import pickle

    error = ProcessDied("gone", where="hop 1 of 1 (subprocess)", output_tail="x", exit_status=7)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DelegateFunctionException)
    assert (str(again), again.details) == (str(error), error.details)
