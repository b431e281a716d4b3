"""Start the next hop of a call, watch it, and say how it ended.

Three kinds: a process that serves the rest of the chain over its standard streams (here or through srun), a process
forked from this one in which the call runs, and a sandbox that the node's agent starts.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import time

from delegate_function import frames, remote, slurm
from delegate_function.errors import (
    AgentAway,
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    LimitExceeded,
    ProcessDied,
    SandboxRefused,
)

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.call import Hold

_TAIL = 16 * 1024
_GRACE_S = 1.0
_LIMITS = {
    "time": ("seconds", "s"),
    "memory": ("memory_mb", "MB"),
    "processes": ("processes", "processes"),
    "output": ("output_mb", "MB"),
}
DEFAULT_OUTPUT_MB = 16
"""What a sandboxed call may write to standard output and standard error together, where the policy says nothing."""


class Next:
    """The next hop, as the relay and the caller see it."""

    link: frames.Link
    outputs: dict[int, bytes]
    wake_fd: int
    ended: bool
    output_limit: int | None = None

    def on_wake(self) -> None:
        """Take note of what `wake_fd` announced; `ended` may become true."""
        raise NotImplementedError

    def usage(self) -> dict[str, Any]:
        """Return what is known once the call has ended well."""
        raise NotImplementedError

    def explain(self) -> DelegateFunctionException:
        """Return why it ended without a result."""
        raise NotImplementedError

    def kill(self) -> None:
        """End it, and all that hangs on it, at once."""
        raise NotImplementedError

    def discard(self) -> None:
        """Leave nothing of it, in whatever way the call has ended."""
        self.kill()
        while self.outputs:
            os.close(self.outputs.popitem()[0])


def start(hop: dict[str, Any], where: str) -> Next:
    """Start a hop that is not the last; `where` names it in errors."""
    kind = hop.get("type")
    try:
        if kind in remote.KINDS:
            return Process(remote.argv(hop), where, functools.partial(remote.explain, hop))
        if kind == "slurm":
            return Job(slurm.srun_argv(hop), where, slurm.explain, environment=slurm.environment())
        if kind == "sandbox":
            return Sandbox(hop, where)
    except OSError as error:
        raise remote.cannot_start(hop, error, where) from error
    raise ConfigurationError(f"unknown kind of hop {kind!r}", where=where)


def start_process(hop: dict[str, Any], where: str) -> Process:
    """Start a hop that is a process, which the first one of a call always is."""
    started = start(hop, where)
    assert isinstance(started, Process)
    return started


def tell_agent_of_lease() -> Hold | None:
    """Tell this node's agent that the job is quiet between calls; return what keeps it so, if there is an agent."""
    from agent import call as agent

    try:
        return agent.hold(job=int(os.environ["SLURM_JOB_ID"]))
    except (OSError, agent.Refused):
        return None  # a call will say what is wrong; it does not depend on this


class Process(Next):
    """A hop behind the standard streams of a process."""

    def __init__(
        self,
        argv: list[str],
        where: str,
        explain: Callable[..., DelegateFunctionException],
        *,
        environment: dict[str, str] | None = None,
    ) -> None:
        import subprocess

        self.job_id: str | None = None
        self._where = where
        self._explain = explain
        self._tail = bytearray()
        self._said = 0
        self.ended = False
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is for the caller, who ends this in order
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self._stdin, self._stdout, self._stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self.link = frames.Link(self._stdout.fileno(), self._stdin.fileno())
        self.outputs: dict[int, bytes] = {}
        self.wake_fd = self._stderr.fileno()
        os.set_blocking(self.wake_fd, False)

    def on_wake(self) -> None:
        try:
            data = os.read(self.wake_fd, 65536)
        except BlockingIOError:
            return
        self._said += len(data)
        self._tail += data
        del self._tail[:-_TAIL]
        if not data:
            self.ended = True

    @property
    def diagnostics(self) -> str:
        """What the process itself wrote to standard error."""
        return bytes(self._tail).decode(errors="replace").strip()

    def usage(self) -> dict[str, Any]:
        return {}

    def explain(self) -> DelegateFunctionException:
        self._finish()
        return self._explain(self._process.returncode, self.diagnostics, self._where)

    def kill(self) -> None:
        for stream in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                stream.close()
        if self._process.poll() is None:
            with contextlib.suppress(PermissionError):  # another user's: it ends because its streams have
                self._process.terminate()
        self._finish()
        self.ended = True
        self._stderr.close()

    def close(self) -> None:
        """Let the process end by itself after the call did, within bounds."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            self._drain(0.05)
        self.kill()

    def _drain(self, seconds: float) -> None:
        import select

        if not self.ended and select.select([self.wake_fd], [], [], seconds)[0]:
            self.on_wake()
        elif self.ended:
            time.sleep(0.002)

    def _finish(self) -> None:
        deadline = time.monotonic() + _GRACE_S
        while self._process.poll() is None and time.monotonic() < deadline:
            self._drain(0.05)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            deadline = time.monotonic() + _GRACE_S
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
        before = -1
        while not self.ended and before != self._said:
            before = self._said
            self.on_wake()


class Job(Process):
    """A hop behind an srun, whose job must not outlive it."""

    _cancelled = False

    @property
    def number(self) -> str | None:
        """The job's number, as soon as its hop or srun has said it."""
        return self.job_id or slurm.job_named_in(self.diagnostics)

    def explain(self) -> DelegateFunctionException:
        self._finish()
        return self._explain(self._process.returncode, self.diagnostics, self._where, self.job_id)

    def kill(self) -> None:
        super().kill()
        if not self._cancelled and (self._process.returncode or 0) < 0:
            # srun was killed before it could take its job away.
            self._cancelled = True
            if job_id := self.number:
                slurm.cancel(job_id)


class Worker(Next):
    """The last process, forked from this one: here the pickle is opened and the call runs."""

    def __init__(self, spec: dict[str, Any], where: str) -> None:
        self._where = where
        self._started = time.monotonic()
        self._status: int | None = None
        self._usage: dict[str, Any] = {}
        ours, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _become_worker()
            from delegate_function import inside

            # Nothing of the hop's own may stay open in what the call starts, or srun would wait for that.
            first = 3
            for keep in sorted((theirs.fileno(), out_write, err_write)):
                os.closerange(first, keep)
                first = keep + 1
            os.closerange(first, os.sysconf("SC_OPEN_MAX"))
            inside.serve(theirs.detach(), out_write, err_write, spec)
        os.setpgid(self._pid, self._pid)  # both do it: a call may be ended before its process gets as far as that
        for fd in (out_write, err_write):
            os.close(fd)
        theirs.close()
        self._channel = ours
        self.link = frames.Link(ours.fileno(), ours.fileno(), beats=False)
        self.outputs = {out_read: frames.OUT, err_read: frames.ERR}
        self.wake_fd = os.pidfd_open(self._pid)
        self.ended = False

    def on_wake(self) -> None:
        pid, status, used = os.wait4(self._pid, os.WNOHANG)
        if pid == 0:
            return
        self.ended = True
        self._status = os.waitstatus_to_exitcode(status)
        self._usage = {
            "wall_s": round(time.monotonic() - self._started, 6),
            "user_s": used.ru_utime,
            "system_s": used.ru_stime,
            "peak_memory_mb": round(used.ru_maxrss / 1024, 3),
        }
        self._kill_group()

    def usage(self) -> dict[str, Any]:
        return {"usage": self._usage}

    def explain(self) -> DelegateFunctionException:
        return ProcessDied(
            f"the process of the call {remote.status_text(self._status)} without a result",
            where=self._where,
            exit_status=self._status,
        )

    def kill(self) -> None:
        if not self.ended:
            self._kill_group()
            os.waitpid(self._pid, 0)
            self.ended = True

    def discard(self) -> None:
        super().discard()
        os.close(self.wake_fd)
        self._channel.close()

    def _kill_group(self) -> None:
        # What the call left running has nobody who waits for it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)


def _become_worker() -> None:
    import ctypes

    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if callable(signal.getsignal(signal.SIGUSR1)):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in a lease it is for the hop, and Slurm sends it to all
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the hop
    if os.getppid() != parent:
        os._exit(1)


class Sandbox(Next):
    """A sandbox that the node's agent started for this call."""

    def __init__(self, hop: dict[str, Any], where: str) -> None:
        job = os.environ.get("SLURM_JOB_ID", "")
        if not job.isdigit():
            raise ConfigurationError(
                "a sandbox runs in a Slurm job, and this process is in none; put SlurmDelegate before SandboxDelegate",
                where=where,
            )
        from agent import call as agent

        self._where = where
        self._started: dict[str, Any] = {}
        self._ended: agent.Ended | None = None
        self._error: DelegateFunctionException | None = None
        self.ended = False
        self.output_limit = DEFAULT_OUTPUT_MB * 1024**2
        self._channel, theirs = socket.socketpair()
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        try:
            self._call = agent.Call(
                job=int(job),
                profile=str(hop.get("profile", "default")),
                seconds=hop.get("seconds"),
                memory_mb=hop.get("memory_mb"),
                channel=theirs,
                stdout=out_write,
                stderr=err_write,
            )
        except OSError as error:
            for fd in (out_read, err_read):
                os.close(fd)
            self._channel.close()
            raise AgentAway(f"the sandbox's agent cannot be asked: {error}", where=where) from error
        finally:
            theirs.close()
            for fd in (out_write, err_write):
                os.close(fd)
        self.wake_fd = self._call.fileno()
        self.link = frames.Link(self._channel.fileno(), self._channel.fileno(), beats=False)
        self.outputs = {out_read: frames.OUT, err_read: frames.ERR}

    def on_wake(self) -> None:
        from agent import call as agent

        try:
            said = self._call.take()
        except agent.Refused as refusal:
            self._error = SandboxRefused(str(refusal), where=self._where, reason=refusal.code)
        except OSError as error:
            self._error = HopFailed(f"the sandbox's agent is gone: {error}", where=self._where)
        else:
            if isinstance(said, dict):
                self._on_started(said)
                return
            self._ended = said
        self.ended = True

    def _on_started(self, message: dict[str, Any]) -> None:
        self._started = message
        limits = message.get("limits") or {}
        if limits.get("output_mb"):
            self.output_limit = int(limits["output_mb"] * 1024**2)

    def usage(self) -> dict[str, Any]:
        known: dict[str, Any] = {"container": self._started.get("container")}
        if self._ended is not None:
            known.update(usage=self._ended.usage, node=self._ended.node)
        return known

    def explain(self) -> DelegateFunctionException:
        if self._error is not None:
            return self._error
        assert self._ended
        reason = self._ended.reason
        details: dict[str, Any] = {"reason": reason, **self.usage()}
        detail = f" ({self._ended.detail})" if self._ended.detail else ""
        if reason in _LIMITS:
            field, unit = _LIMITS[reason]
            size = (self._started.get("limits") or {}).get(field)
            limit = f"{reason} limit" + (f" of {size} {unit}" if size else "")
            text = f"killed, {limit}" if self._ended.detail == limit else f"killed, {limit}{detail}"
            return LimitExceeded(text, where=self._where, limit=reason, **details)
        if reason == "exited":
            status = self._ended.exit_status
            return ProcessDied(
                f"the process of the call {remote.status_text(status)} without a result{detail}",
                where=self._where,
                exit_status=status,
                **details,
            )
        return HopFailed(f"the sandbox ended: {reason}{detail}", where=self._where, **details)

    def kill(self) -> None:
        self._call.close()  # the agent destroys the sandbox of whoever is gone

    def discard(self) -> None:
        super().discard()
        self._channel.close()
