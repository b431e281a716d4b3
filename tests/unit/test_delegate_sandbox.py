"""The way into a sandbox, with a stand-in for the agent that starts the sandbox's process without a container.

What real agents and containers do is tested on the cluster.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import delegate_function
from delegate_function import (
    AgentAway,
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    LimitExceeded,
    ProcessDied,
    SandboxDelegate,
    SandboxRefused,
    SubprocessDelegate,
    TemporaryDirectoryDelegate,
    TestClass,
    TrivialDelegate,
    VersionMismatch,
    inside,
)
from delegate_function.delegates import BaseDelegate
from delegate_function.frames import SILENCE_S
from live import wait_until

# The far side has no tests to import.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SRC = Path(delegate_function.__file__).parents[1]
NODE = {"name": "c9"}
AGENT_S = SILENCE_S + 2
USAGE = {"wall_s": 0.25, "user_s": 0.125, "system_s": 0.0, "peak_memory_mb": 12.5}
STARTED = {
    "type": "started",
    "container": "feed",
    "node": NODE,
    "limits": {"seconds": 9, "memory_mb": 64, "output_mb": 1},
}


_IN_C = {"_json", "_signal", "_socket", "fcntl", "posix", "select", "time"}
"""What a hop may load besides: modules written in C, which some Pythons have loaded already when they start."""


class Guest:
    """What runs in the sandbox."""

    def where(self) -> tuple[int, str, dict[str, str]]:
        print("inside")
        return os.getppid(), str(Path.cwd()), dict(os.environ)

    def read(self) -> list[str]:
        return sys.stdin.readlines()

    def die(self, number: int) -> None:
        os.kill(os.getpid(), number)

    def flood(self) -> None:
        while True:
            os.write(1, b"x" * 65536)

    def forge(self) -> None:
        """Send what the call must not: frames that speak for the agent."""
        for fd in range(3, 20):
            try:
                os.write(fd, b"I\x00\x00\x00\x02{}\n")
            except OSError:
                continue

    def size(self, data: bytes) -> int:
        return len(data)

    def sleep(self) -> None:
        time.sleep(60)

    def loaded(self, *names: str) -> list[str]:
        return [name for name in names if name in sys.modules]


class Agent:
    """A stand-in for the agent: it serves one request after another the way `behave` says."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "agent.sock"
        self.inside_path = directory / "sandbox.sock"
        self.requests: list[dict[str, Any]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.prepares = True
        self.said: list[dict[str, Any]] = []
        self.behave: Callable[[socket.socket, list[int]], None] = self.run
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                message, descriptors, _, _ = socket.recv_fds(connection, 65536, 3)
                self.requests.append(json.loads(message))
                self.behave(connection, descriptors)
                for fd in descriptors:
                    os.close(fd)

    def start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start the sandbox's process; return it and the connection on which it said that it is ready."""
        self.inside_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.inside_path))
            listener.listen()
            program = (
                f"import sys; sys.path.insert(0, {str(SRC)!r}); sys.path.append({str(Path(__file__).parent)!r})\n"
                "from delegate_function import inside\n"
                f"inside.SOCKET = {str(self.inside_path)!r}\n"
                "inside.main(['--import', 'decimal'])\n"
            )
            process = subprocess.Popen([sys.executable, "-I", "-c", program], env={"SEALED": "yes"}, cwd="/")
            self.processes.append(process)
            connection, _ = listener.accept()
        assert json.loads(connection.recv(65536))["type"] == "connected"
        if self.prepares:
            connection.send(json.dumps({"type": "prepare"}).encode())
            assert json.loads(connection.recv(65536)) == {"type": "ready"}
        return process, connection

    def run(self, client: socket.socket, descriptors: list[int], reason: str = "exited") -> None:
        """Do as the agent: start, hand over, and tell the end; a client that leaves takes the sandbox with it."""
        process, connection = self.start()
        with connection:
            socket.send_fds(connection, [json.dumps({"type": "call"}).encode()], descriptors)
            client.send(json.dumps(STARTED).encode())
            self.started.set()
            while descriptors:
                os.close(descriptors.pop())
            done: dict[str, Any] = {}
            gone = threading.Thread(target=self._watch, args=(client, process))
            gone.start()
            with contextlib.suppress(ConnectionResetError):  # its client left, and it was killed
                while packet := connection.recv(65536):
                    self.said.append(json.loads(packet))
                    if self.said[-1]["type"] == "done":
                        done = self.said[-1]
                        break
        process.wait(10)
        ended = {"type": "ended", "reason": reason, "exit_status": done.get("status"), "detail": "", "usage": USAGE}
        if not self.cancelled.is_set():
            client.send(json.dumps({**ended, "node": NODE}).encode())
        gone.join(10)

    def _watch(self, client: socket.socket, process: subprocess.Popen[bytes]) -> None:
        client.recv(1)
        if process.poll() is None:
            self.cancelled.set()
            process.kill()

    def stop(self) -> None:
        self._listener.close()
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path)
    yield made
    made.stop()


@pytest.fixture
def chain(tmp_path: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> BaseDelegate:
    """Return a chain as in a job: a process that may ask the agent, and the sandbox."""
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    step = tmp_path / "step"
    step.write_text(
        f"#!{sys.executable} -I\n"
        f"import sys; sys.path.insert(0, {str(SRC)!r})\n"
        "import functools, agent.call\n"
        f"agent.call.Call = functools.partial(agent.call.Call, socket_path={str(agent.path)!r})\n"
        f"from delegate_function import hop\nhop._AGENT_S = {AGENT_S}\nhop.main()\n"
    )
    step.chmod(0o755)
    return SubprocessDelegate(SandboxDelegate(seconds=7.5), delegate_executable_path=str(step))


def test_a_call_runs_in_the_sandbox_as_a_child_of_its_first_process(
    chain: BaseDelegate, agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    parent, directory, environment = chain.invoke(Guest(), "where")
    assert parent == agent.processes[0].pid
    assert capsys.readouterr().out == "inside\n"
    assert environment["SEALED"] == "yes"
    assert not Path(directory).exists()
    assert str(Path.cwd()) not in directory
    (request,) = agent.requests
    assert len(request.pop("id")) == 32
    assert request == {"v": 2, "type": "call", "job": 42, "profile": "default", "seconds": 7.5, "memory_mb": None}


def test_an_interactive_call_reads_in_the_sandbox_what_is_typed(
    chain: BaseDelegate, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"one\ntwo\n")
    os.close(write_fd)
    chain.interactive = True
    with open(read_fd) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert chain.invoke(Guest(), "read") == ["one\n", "two\n"]


def test_what_stands_after_a_sandbox_happens_in_it(
    chain: BaseDelegate, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELEGATE_FUNCTION_DEBUG_ENABLED", "yes")  # which does not reach a sandbox
    sandbox = chain._subdelegate
    assert sandbox is not None
    sandbox.set_subdelegate(TemporaryDirectoryDelegate(TrivialDelegate(debug_pre_hook=(Guest(), "read", (), {}))))
    chain.invoke(Guest(), "where")
    assert capsys.readouterr().err.startswith("TrivialDelegate: the debugging hook is disabled on ")


def test_packages_that_differ_are_named_before_the_call(chain: BaseDelegate, monkeypatch: pytest.MonkeyPatch) -> None:
    version = inside.package_version("cloudpickle")
    monkeypatch.setattr(cloudpickle, "__version__", "0.1")
    inside.package_version.cache_clear()
    with pytest.raises(VersionMismatch, match=rf"hop 3 of 3 \(sandbox on .*cloudpickle 0\.1 \(here {version}\)"):
        SubprocessDelegate(chain).invoke(Guest(), "die", signal.SIGKILL)
    inside.package_version.cache_clear()


def test_the_agents_word_on_usage_and_node_is_known_after_a_call(chain: BaseDelegate) -> None:
    chain.invoke(TestClass(), "set_value", 1)
    call = chain.last_call
    assert call is not None
    assert (call.usage, call.node, call.container) == (USAGE, NODE, "feed")
    assert call.where == f"hop 2 of 2 (sandbox on {os.uname().nodename})"


def test_each_call_has_a_sandbox_of_its_own(chain: BaseDelegate, agent: Agent) -> None:
    pids = {chain.invoke(Guest(), "where")[0] for _ in range(3)}
    assert len(pids) == 3
    assert len({request["id"] for request in agent.requests}) == 3


def test_what_is_imported_beforehand_a_call_that_waits_does_not_wait_for(chain: BaseDelegate, agent: Agent) -> None:
    assert chain.invoke(Guest(), "loaded", "decimal") == ["decimal"]
    agent.prepares = False
    assert chain.invoke(Guest(), "loaded", "decimal") == []


def test_a_call_that_comes_during_the_preparation_goes_before_the_modules_that_are_left(tmp_path: Path) -> None:
    first, last = tmp_path / "first_one.py", tmp_path / "last_one.py"
    begun = tmp_path / "begun"
    first.write_text(
        f"import os, time\nopen({str(begun)!r}, 'w')\nwhile os.path.exists({str(begun)!r}): time.sleep(0.01)"
    )
    last.write_text("")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = [str(SRC), str(tmp_path), str(Path(cloudpickle.__file__).parents[1])]
    program = (
        f"import socket, sys; sys.path[:0] = {path}\n"
        f"from delegate_function import inside\nuntil = socket.socket(fileno={theirs.fileno()})\n"
        "done = inside._prepare(['first_one', 'last_one'], until=until)\n"
        "print(done, [name in sys.modules for name in ('first_one', 'last_one')])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", program], pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True
    )
    wait_until(begun.exists, timeout_s=10, what="the first module is being imported")
    ours.send(b"c")
    begun.unlink()
    assert process.communicate(timeout=10)[0] == "False [True, False]\n"


def test_that_a_call_has_returned_is_said_before_its_process_has_ended(chain: BaseDelegate, agent: Agent) -> None:
    chain.invoke(Guest(), "loaded")
    wait_until(lambda: len(agent.said) == 2, timeout_s=5, what="both were said")
    assert agent.said == [{"type": "returned"}, {"type": "done", "status": 0}]
    with pytest.raises(ProcessDied):
        chain.invoke(Guest(), "die", signal.SIGKILL)
    assert agent.said[2:] == [{"type": "done", "status": -signal.SIGKILL}]


def test_a_hop_before_a_sandbox_loads_nothing_that_it_can_do_without(agent: Agent, tmp_path: Path) -> None:
    step, told = tmp_path / "step", tmp_path / "told"
    step.write_text(
        f"#!{sys.executable} -IS\nimport sys; before = set(sys.modules); sys.path.append({str(SRC)!r})\n"
        "import agent.call, delegate_function.hop as hop\n"
        f"agent.call.Call.__init__.__kwdefaults__['socket_path'] = {str(agent.path)!r}\n"
        "serve = hop.serve\n"
        "def watched(*descriptors):\n"
        "    serve(*descriptors)\n"
        f"    with open({str(told)!r}, 'w') as file: print(*sorted(set(sys.modules) - before), file=file)\n"
        "hop.serve = watched\nhop.main()\n"
    )
    step.chmod(0o755)
    program = (
        "import os; os.environ['SLURM_JOB_ID'] = '42'\n"
        "from delegate_function import SandboxDelegate, SubprocessDelegate\n"
        f"SubprocessDelegate(SandboxDelegate(), delegate_executable_path={str(step)!r}).invoke(dict(), '__len__')"
    )
    subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(SRC)}, check=True, timeout=30)
    own = {f"delegate_function.{name}" for name in ("hop", "frames", "launch", "errors", "sandboxed")}
    agents = {f"agent.{name}" for name in ("call", "wire", "compact")}
    loaded = set(wait_until(told.exists, timeout_s=5, what="the hop has ended") and told.read_text().split())
    assert loaded == {"__future__", "delegate_function", "agent", *own, *agents, *loaded & _IN_C}


def test_a_crash_is_told_with_what_the_agent_knows(chain: BaseDelegate) -> None:
    with pytest.raises(ProcessDied, match=r"hop 2 of 2 \(sandbox on .*SIGSEGV") as raised:
        chain.invoke(Guest(), "die", signal.SIGSEGV)
    assert raised.value.details["usage"] == USAGE
    assert raised.value.details["exit_status"] == -signal.SIGSEGV


def test_a_limit_that_the_agent_saw_hit_is_named(chain: BaseDelegate, agent: Agent) -> None:
    agent.behave = lambda client, descriptors: agent.run(client, descriptors, reason="memory")
    with pytest.raises(LimitExceeded, match="killed, memory limit of 64 MB") as raised:
        chain.invoke(Guest(), "die", signal.SIGKILL)
    assert raised.value.details["limit"] == "memory"


def test_output_is_counted_outside_and_ends_the_call(
    chain: BaseDelegate, agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LimitExceeded, match="output limit of 1 MB"):
        chain.invoke(Guest(), "flood")
    assert len(capsys.readouterr().out) <= 1024**2 + 256 * 1024
    agent.processes[0].wait(2)  # ended by the agent, or by the output that nobody takes any more


def test_a_call_cannot_speak_for_the_agent(chain: BaseDelegate) -> None:
    with pytest.raises(HopFailed, match="does not belong there"):
        chain.invoke(Guest(), "forge")


def test_a_refusal_comes_with_its_reason(chain: BaseDelegate, agent: Agent) -> None:
    refusal = {"type": "refused", "code": "job", "message": "job 42 is not yours"}
    agent.behave = lambda client, _: client.send(json.dumps(refusal).encode()) and None
    with pytest.raises(SandboxRefused, match="job 42 is not yours") as raised:
        chain.invoke(TestClass(), "hello")
    assert raised.value.details["reason"] == "job"


def test_an_agent_that_goes_away_is_told(chain: BaseDelegate, agent: Agent) -> None:
    agent.behave = lambda client, _: client.send(json.dumps(STARTED).encode()) and None
    with pytest.raises(HopFailed, match="agent went away"):
        chain.invoke(TestClass(), "hello")


def test_an_agent_that_is_away_for_a_moment_is_waited_for(chain: BaseDelegate, agent: Agent) -> None:
    aside = agent.path.with_suffix(".aside")
    agent.path.rename(aside)
    threading.Timer(SILENCE_S + 0.5, aside.rename, [agent.path]).start()
    assert chain.invoke(Guest(), "size", b"x" * 4_000_000) == 4_000_000


def test_an_agent_that_stays_away_is_told(chain: BaseDelegate, agent: Agent) -> None:
    agent.path.unlink()
    began = time.monotonic()
    with pytest.raises(AgentAway, match="cannot be asked"):
        chain.invoke(TestClass(), "hello")
    assert AGENT_S < time.monotonic() - began < AGENT_S + 5


def test_a_killed_job_step_takes_the_sandbox_along(chain: BaseDelegate, agent: Agent) -> None:
    def kill_step() -> None:
        agent.started.wait(10)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                is_step = str(agent.path.parent / "step").encode() in path.read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if is_step:
                os.kill(int(path.parent.name), signal.SIGKILL)

    threading.Thread(target=kill_step).start()
    with pytest.raises(DelegateFunctionException, match="SIGKILL"):
        chain.invoke(Guest(), "sleep")
    assert agent.cancelled.wait(2)


def test_outside_a_job_a_sandbox_is_refused_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigurationError, match="put SlurmDelegate before"):
        SandboxDelegate().invoke(TestClass(), "hello")


def test_the_sandboxs_first_process_ends_with_the_agent(agent: Agent) -> None:
    process, connection = agent.start()
    connection.close()
    assert process.wait(2) == 1
