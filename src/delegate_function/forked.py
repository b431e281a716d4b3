"""The last hop where there is no sandbox: a process forked from this one, in which the call runs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import time
from typing import Any

from delegate_function import frames, remote
from delegate_function.errors import DelegateFunctionException, ProcessDied
from delegate_function.launch import Next


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
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if callable(signal.getsignal(signal.SIGUSR1)):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # in a lease it is for the hop, and Slurm sends it to all
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive the hop
    if os.getppid() != parent:
        os._exit(1)
