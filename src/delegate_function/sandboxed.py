"""The last hop where there is a sandbox, which the node's agent has; and what else the agent is told.

This is loaded before every call (see `hop`).
"""

from __future__ import annotations

import _socket as socket
import posix as os

from agent import call as agent
from delegate_function import frames
from delegate_function.errors import (
    AgentAway,
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
    LimitExceeded,
    ProcessDied,
    SandboxRefused,
)
from delegate_function.launch import DEFAULT_OUTPUT_MB, Next

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LIMITS = {
    "time": ("seconds", "s"),
    "memory": ("memory_mb", "MB"),
    "processes": ("processes", "processes"),
    "output": ("output_mb", "MB"),
}


def tell_agent_of_lease() -> agent.Hold | None:
    """Tell this node's agent that the job is quiet between calls; return what keeps it so, if there is an agent."""
    try:
        return agent.hold(job=int(os.environ[b"SLURM_JOB_ID"]))
    except (OSError, agent.Refused):
        return None  # a call will say what is wrong; it does not depend on this


class Sandbox(Next):
    """A sandbox that the node's agent started for this call."""

    def __init__(self, hop: dict[str, Any], where: str) -> None:
        job = os.environ.get(b"SLURM_JOB_ID", b"")
        if not job.isdigit():
            raise ConfigurationError(
                "a sandbox runs in a Slurm job, and this process is in none; put SlurmDelegate before SandboxDelegate",
                where=where,
            )
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
            from delegate_function import remote

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
