"""Hops that are processes, here or behind a command such as srun: each serves the rest of a chain over its streams."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from delegate_function import frames, remote, slurm
from delegate_function.errors import DelegateFunctionException
from delegate_function.launch import Next

_TAIL = 16 * 1024
_GRACE_S = 1.0


def start_process(hop: dict[str, Any], where: str) -> Process:
    """Start a hop that is a process, which the first one of a call always is; `where` names it in errors."""
    try:
        if hop["type"] == "slurm":
            return Job(slurm.srun_argv(hop), where, slurm.explain, environment=slurm.environment())
        return Process(remote.argv(hop), where, functools.partial(remote.explain, hop))
    except OSError as error:
        raise remote.cannot_start(hop, error, where) from error


class Process(Next):
    """A hop behind the standard streams of a process."""

    is_process = True

    def __init__(
        self,
        argv: list[str],
        where: str,
        explain: Callable[..., DelegateFunctionException],
        *,
        environment: dict[str, str] | None = None,
    ) -> None:
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
        with contextlib.suppress(OSError):
            self._stdin.close()
        deadline = time.monotonic() + 5
        while self._process.poll() is None and time.monotonic() < deadline:
            self._drain(0.05)
        self.kill()

    def _drain(self, seconds: float) -> None:
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
