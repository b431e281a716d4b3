"""What a chain does on its way without leaving a process: fresh directories, hooks, descriptions bound late; and what
the caller types."""

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfiddle_cluster.wait import wait_until
from delegate_function import (
    BaseDelegate,
    CallNotSent,
    ConfigurationError,
    DelegateChain,
    DelegateGenerator,
    LateBoundYAMLDelegate,
    NotOffered,
    ProcessDied,
    RemoteError,
    ResultNotReturned,
    SandboxDelegate,
    ShellCommandClass,
    SubprocessDelegate,
    TemporaryDirectoryDelegate,
    TestClass,
    TrivialDelegate,
    VersionMismatch,
    frames,
    inside,
    steps,
)

TWO = DelegateChain(SubprocessDelegate, SubprocessDelegate)


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Thing:
    """What the tests call."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, file: str = "left") -> str:
        self.seen.append(sorted(os.listdir()))
        Path(file).write_text("here")
        return str(Path.cwd())

    def fail(self) -> None:
        self.seen.append("failed")
        raise KeyError("missing")

    def crash(self) -> None:
        os._exit(9)

    def copy(self, source: str, target: str) -> None:
        Path(target).write_text(Path(source).read_text())

    def read(self) -> list[str]:
        print("ready")
        return [line.rstrip("\n") for line in sys.stdin]

    def ask(self) -> str:
        return input("name? ")

    def nap(self) -> None:
        time.sleep(0.1)


# Temporary directories.

AROUND = {
    "alone": TemporaryDirectoryDelegate,
    "first": DelegateChain(TemporaryDirectoryDelegate, SubprocessDelegate),
    "last": DelegateChain(SubprocessDelegate, TemporaryDirectoryDelegate),
    "between": DelegateChain(SubprocessDelegate, TemporaryDirectoryDelegate, SubprocessDelegate),
    "many": DelegateChain(*[TemporaryDirectoryDelegate, SubprocessDelegate] * 2, TemporaryDirectoryDelegate),
}


@pytest.fixture(params=AROUND.values(), ids=AROUND.keys())
def around(request: pytest.FixtureRequest) -> BaseDelegate:
    made: BaseDelegate = request.param()
    return made


def test_a_fresh_directory_is_entered_left_and_removed(around: BaseDelegate, tmp_path: Path) -> None:
    thing = Thing()
    first, second = around.invoke(thing, "look"), around.invoke(thing, "look")
    assert thing.seen == [[], []]
    assert first != second
    assert Path.cwd() == tmp_path
    # A call comes back before its hops have quite ended.
    wait_until(
        lambda: not any(map(os.path.exists, (first, second))) and not list(tmp_path.iterdir()),
        timeout_s=10,
        what="the directories are removed",
    )


def test_it_is_left_and_removed_after_an_exception_too(around: BaseDelegate, tmp_path: Path) -> None:
    thing = Thing()
    with pytest.raises(KeyError):
        around.invoke(thing, "fail")
    assert thing.seen == ["failed"]
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("name", ["first", "last", "between", "many"])
def test_it_is_removed_after_a_crash_too(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with pytest.raises(ProcessDied):
        AROUND[name]().invoke(Thing(), "crash")
    with pytest.raises(ProcessDied):
        SubprocessDelegate().call(Thing(), "crash", outputs=["out"])
    wait_until(lambda: not list((tmp_path / "tmp").iterdir()), timeout_s=10, what="the directories are removed")


def test_files_go_to_it_and_come_back(around: BaseDelegate, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("data")
    around.call(Thing(), "copy", ["in", "out"], inputs=["in"], outputs=["out"])
    assert (tmp_path / "out").read_text() == "data"
    with pytest.raises(CallNotSent, match="nothing"):
        around.call(Thing(), "copy", ["in", "out"], inputs=["nothing"])
    with pytest.raises(ResultNotReturned, match="other"):
        around.call(Thing(), "copy", ["in", "out"], inputs=["in"], outputs=["other"])


def test_only_its_user_may_enter_it() -> None:
    with steps.Directories() as directories:
        path = directories.make("here")
        assert os.stat(path).st_mode & 0o777 == 0o700


# Hooks.


@pytest.fixture
def enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELEGATE_FUNCTION_DEBUG_ENABLED", "yes")


class Witness:
    """A hook that tells where it runs."""

    def tell(self, text: str) -> None:
        print(text, os.getpid(), os.environ["DELEGATE_NAME"], os.environ["DELEGATE_FUNCTION_COMMAND"])

    def fail(self) -> None:
        raise KeyError("hook")


def hook(text: str) -> tuple[Any, str, tuple[Any, ...], dict[str, Any]]:
    return Witness(), "tell", (text,), {}


@pytest.mark.usefixtures("enabled")
def test_hooks_run_in_order_each_where_its_delegate_executes(capsys: pytest.CaptureFixture[str]) -> None:
    chain = TrivialDelegate(debug_pre_hook=hook("a"))
    second = SubprocessDelegate(debug_pre_hook=hook("c"))
    chain.set_subdelegate(SubprocessDelegate(second, debug_pre_hook=hook("b")))
    second.set_subdelegate(TrivialDelegate(debug_pre_hook=hook("d")))
    ran_in = chain.invoke(TestClass(), "hello")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[:4]]
    assert [line[0] for line in lines] == ["a", "b", "c", "d"]
    assert [line[2] for line in lines] == [
        "TrivialDelegate",
        "SubprocessDelegate",
        "SubprocessDelegate",
        "TrivialDelegate",
    ]
    assert [int(line[1]) == os.getpid() for line in lines] == [True, True, False, False]
    assert int(lines[3][1]) == ran_in != int(lines[2][1])
    assert not {"DELEGATE_NAME", "DELEGATE_FUNCTION_COMMAND"} & set(os.environ)


def test_hooks_that_are_not_enabled_say_so_where_they_would_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DELEGATE_FUNCTION_DEBUG_ENABLED", raising=False)
    chain = SubprocessDelegate(SubprocessDelegate(TrivialDelegate(debug_pre_hook=hook("b")), debug_pre_hook="SHELL"))
    chain.invoke(Thing(), "nap")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["SubprocessDelegate", "TrivialDelegate"]
    assert all(f"is disabled on {os.uname().nodename}" in line for line in lines)
    assert not said.out


@pytest.mark.usefixtures("enabled")
def test_a_hook_that_fails_ends_the_call() -> None:
    failing = (Witness(), "fail", (), {})
    with pytest.raises(KeyError):
        SubprocessDelegate(debug_pre_hook=failing).invoke(TestClass(), "hello")
    for inner in (TrivialDelegate(debug_pre_hook=failing), SubprocessDelegate(debug_pre_hook=failing)):
        with pytest.raises(RemoteError, match=r"debugging hook of \w+Delegate raised KeyError: 'hook'") as raised:
            SubprocessDelegate(inner).invoke(TestClass(), "hello")
        assert raised.value.where.startswith("hop 1 of ")


@pytest.mark.usefixtures("enabled")
def test_what_a_hook_writes_counts_towards_what_the_caller_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = 3 * frames.WINDOW + 17, 3 * frames.WINDOW

    class Slow(io.StringIO):
        """A stream that is slow when what the hook wrote has come."""

        def write(self, text: str) -> int:
            if self.tell() == first:
                time.sleep(0.7)
            return super().write(text)

    stream = Slow()
    monkeypatch.setattr(sys, "stdout", stream)
    talkative = (ShellCommandClass(["head", "-c", str(first), "/dev/zero"]), "run", (), {})
    flood = ShellCommandClass(["head", "-c", str(second), "/dev/zero"])
    SubprocessDelegate(SubprocessDelegate(debug_pre_hook=talkative)).invoke(flood, "run")
    assert len(stream.getvalue()) == first + second


@pytest.mark.usefixtures("enabled")
def test_a_hook_larger_than_a_header_is_refused() -> None:
    with pytest.raises(CallNotSent, match="hook of TrivialDelegate is larger"):
        SubprocessDelegate(TrivialDelegate(debug_pre_hook=hook("x" * 100_000))).invoke(TestClass(), "hello")


# What the caller types.


class Terminal:
    """A standard input with somebody who types."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read_fd, self.write_fd = os.pipe()
        self._file = open(read_fd)
        monkeypatch.setattr(sys, "stdin", self._file)

    def type(self, text: str | bytes, *, end: bool = True) -> None:
        """Type without being waited for."""

        def write() -> None:
            with open(self.write_fd, "wb", closefd=end) as file:
                file.write(text.encode() if isinstance(text, str) else text)

        self.thread = threading.Thread(target=write)
        self.thread.start()

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal(monkeypatch)
    yield made
    made.close()


@pytest.mark.parametrize("factory", [SubprocessDelegate, TWO, AROUND["many"]], ids=["one", "two", "directories"])
def test_an_interactive_call_reads_what_is_typed(
    factory: Any, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.type("first\nsecond\n")
    assert factory(interactive=True).invoke(Thing(), "read") == ["first", "second"]
    assert capsys.readouterr().out == "ready\n"


def test_an_interactive_call_need_not_read_all(terminal: Terminal) -> None:
    terminal.type("me\nmore\n", end=False)
    assert SubprocessDelegate(interactive=True).invoke(Thing(), "ask") == "me"
    SubprocessDelegate(interactive=True).invoke(Thing(), "nap")
    os.close(terminal.write_fd)


def test_much_more_than_a_window_can_be_typed(terminal: Terminal) -> None:
    lines = [f"{number:07}" * 20 for number in range(30_000)]
    terminal.type("\n".join(lines))
    assert TWO(interactive=True).invoke(Thing(), "read") == lines


def test_a_call_that_is_not_interactive_reads_nothing(terminal: Terminal) -> None:
    terminal.type("mine\n")
    assert SubprocessDelegate().invoke(Thing(), "read") == []
    terminal.thread.join()
    assert sys.stdin.readline() == "mine\n"


def test_an_interactive_call_without_a_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(NotOffered, match="terminal"):
        SubprocessDelegate(interactive=True).invoke(TestClass(), "hello")


@pytest.mark.usefixtures("enabled")
def test_a_shell_in_the_middle_of_a_chain_obeys_what_is_typed(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell = tmp_path / "shell"
    shell.write_text('#!/bin/sh\nread -r line\necho "$DELEGATE_NAME was told: $line"\n')
    shell.chmod(0o755)
    monkeypatch.setenv("SHELL", str(shell))
    chain = SubprocessDelegate(SubprocessDelegate(debug_pre_hook="SHELL", interactive=True))
    terminal.type("whoami\n", end=False)
    chain.invoke(Thing(), "nap")
    os.close(terminal.write_fd)
    assert capsys.readouterr().out == "SubprocessDelegate was told: whoami\n"


# Descriptions bound late.


def test_a_late_description_is_read_where_the_chain_has_come_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there.yaml"
    there.write_text(
        "version: 0.1\nsequence: [{type: SubprocessDelegate}, {type: TemporaryDirectoryDelegate}, "
        "{type: SubprocessDelegate, delegate_executable_path: /nowhere}]"
    )
    program = tmp_path / "hop"
    source = Path(inside.__file__).parents[1]
    program.write_text(
        f"#!{sys.executable} -I\nimport os, sys; sys.path.insert(0, {str(source)!r})\n"
        f"os.environ['DELEGATE_FUNCTION_CONFIG'] = {str(there)!r}\n"
        "from delegate_function.hop import main\nmain()\n"
    )
    program.chmod(0o755)
    monkeypatch.delenv("DELEGATE_FUNCTION_CONFIG", raising=False)
    chain = SubprocessDelegate(LateBoundYAMLDelegate(), delegate_executable_path=str(program))
    with pytest.raises(Exception, match=r"^hop 4 of 4 \(subprocess on .*/nowhere"):
        chain.invoke(TestClass(), "hello")
    there.write_text("version: 0.1\nsequence: [{type: SubprocessDelegate}]")
    chain.invoke(TestClass(), "hello")
    assert chain.last_call is not None
    assert [hop["hop"] for hop in chain.last_call.hops] == [1, 2]
    there.write_text("version: 0.1\nsequence: [{type: TrivialDelegate}]")
    assert chain.invoke(TestClass(), "hello") != os.getpid()
    there.write_text("version: 0.1\nsequence: [{type: LateBoundYAMLDelegate}]")
    with pytest.raises(ConfigurationError, match="by itself"):
        chain.invoke(TestClass(), "hello")


def test_a_late_description_that_is_missing_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELEGATE_FUNCTION_CONFIG", raising=False)
    chain = DelegateGenerator(
        yaml="version: 0.1\nsequence: [{type: SubprocessDelegate}, {type: LateBoundYAMLDelegate}]"
    )
    with pytest.raises(ConfigurationError, match=rf"does not name a file on {os.uname().nodename}"):
        chain.invoke(TestClass(), "hello")


def test_a_description_after_a_sandbox_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="comes last"):
        SandboxDelegate(LateBoundYAMLDelegate()).compile()
    assert SandboxDelegate(TemporaryDirectoryDelegate(TrivialDelegate())).compile()


# Versions.


def _package(directory: Path, version: str) -> Any:
    import importlib

    (directory / "demonstration").mkdir(exist_ok=True)
    (directory / "demonstration/__init__.py").write_text(
        f"__version__ = {version!r}\nclass Thing:\n    def go(self):\n        return 7\n"
    )
    sys.modules.pop("demonstration", None)
    inside.package_version.cache_clear()
    importlib.invalidate_caches()
    return importlib.import_module("demonstration")


@pytest.fixture
def demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield _package(tmp_path, "1.2")
    sys.modules.pop("demonstration", None)
    inside.package_version.cache_clear()


def test_packages_of_other_versions_are_named_before_the_call(demonstration: Any, tmp_path: Path) -> None:
    assert TWO().invoke(demonstration.Thing(), "go") == 7
    file = tmp_path / "demonstration/__init__.py"
    file.write_text(file.read_text().replace("1.2", "1.30"))
    with pytest.raises(VersionMismatch, match=r"hop 2 of 2 .*demonstration 1\.2 \(here 1\.30\)$"):
        TWO().invoke(demonstration.Thing(), "go")
    file.unlink()
    with pytest.raises(VersionMismatch, match=r"demonstration 1\.2 \(here it cannot be imported\)$"):
        TWO().invoke(demonstration.Thing(), "go")


def test_packages_that_the_call_does_not_name_may_differ(demonstration: Any, tmp_path: Path) -> None:
    def seven() -> int:
        return 7

    class Local:
        go = staticmethod(seven)

    Local.__module__ = seven.__module__ = demonstration.__name__  # as what a decorator of that package makes
    (tmp_path / "demonstration/__init__.py").write_text("__version__ = '3'")
    assert TWO().invoke(Local(), "go") == 7


def test_the_package_and_its_project_have_one_version() -> None:
    import tomllib

    import delegate_function

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == delegate_function.__version__
