"""What can go wrong in delegating a call.

Every error names the hop where it happened. Between processes an error travels as JSON with the `code` of its class.
"""

from __future__ import annotations

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any, ClassVar


class DelegateFunctionException(Exception):
    """A call could not be delegated, or did not come back.

    Attributes: `where` names the hop ("hop 2 of 2 (sandbox on c1)"), `output_tail` holds the end of what it wrote,
    `details` what else is known (job_id, state, limit, exit_status, …), `call` what is known of the call.
    """

    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, where: str = "", output_tail: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.output_tail = output_tail
        self.details = details
        self.call: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.where, self.output_tail, self.details)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        if self.output_tail:
            text += f"\nThe end of its output:\n{self.output_tail}"
        return text


def _rebuild(
    kind: type[DelegateFunctionException], message: str, where: str, tail: str, details: dict[str, Any]
) -> DelegateFunctionException:
    return kind(message, where=where, output_tail=tail, **details)


class also:
    """Make what is raised meanwhile an exception of another kind too, for who catches only such."""

    def __init__(self, kind: type[Exception]) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, raised: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DelegateFunctionException):
            own = type(error)
            error.__class__ = type(own.__name__, (own, self._kind), {"__doc__": own.__doc__})


class ConfigurationError(DelegateFunctionException, ValueError):
    """A delegate, a chain or its description in YAML is wrong."""

    code = "configuration"


class NotOffered(DelegateFunctionException):
    """Something of the interface that this version does not offer."""

    code = "not-offered"


class CallNotSent(DelegateFunctionException):
    """The call could not be packed: its arguments cannot be pickled, are too large, or a file cannot be read."""

    code = "not-sent"


class HopFailed(DelegateFunctionException):
    """A hop could not be started, or its process ended before the call did."""

    code = "hop"


class ConnectionLost(HopFailed):
    """A hop was not heard of for too long."""

    code = "lost"


class AgentAway(HopFailed):
    """The node's agent, which has the sandboxes, could not be asked for one: nothing ran."""

    code = "agent-away"


class JobError(HopFailed):
    """Slurm did not run the job, or ended it; `details` has `job_id` and `state` as far as they are known."""

    code = "job"


class JobRejected(JobError):
    """Slurm did not accept the job."""

    code = "job-rejected"


class JobCancelled(JobError):
    """The job was cancelled."""

    code = "job-cancelled"


class JobTimeout(JobError):
    """The job's time was up."""

    code = "job-timeout"


class NodeFailed(JobError):
    """The job's node failed."""

    code = "node-failed"


class CallCancelled(DelegateFunctionException):
    """The call was ended because its caller wanted that."""

    code = "cancelled"


class LeaseEnded(DelegateFunctionException):
    """The lease is over, and the call did not begin: it can go another way. `details["reason"]` has a word for why.

    The words: "idle", "time", "preempted" (others wait), "closed" (given back), "lost" (its job is gone).
    """

    code = "lease-ended"


class SandboxRefused(DelegateFunctionException):
    """The node's agent refused to start a sandbox; `details["reason"]` has its code."""

    code = "refused"


class LimitExceeded(DelegateFunctionException):
    """The call was ended because it went over a limit, named in `details["limit"]`."""

    code = "limit"


class ProcessDied(DelegateFunctionException):
    """The process in which the call ran ended without a result."""

    code = "died"


class VersionMismatch(DelegateFunctionException):
    """The two ends of a call run versions of Python or of this package that do not go together."""

    code = "version"


class CountersUnavailable(DelegateFunctionException):
    """The call asked for performance counters that cannot be had where it ran; `details["reason"]` says why.

    It begins with what would have to be another: "policy: …" (the sandbox's profile), "kernel: …" (a setting) or
    "machine: …".
    """

    code = "counters"


class RemoteError(DelegateFunctionException):
    """The call raised an exception that cannot be brought here as it is; its text stands in the message."""

    code = "remote"


class ResultNotReturned(DelegateFunctionException):
    """The call returned something that cannot be brought back: not picklable, too large, or a file is missing."""

    code = "not-returned"


class RemoteTraceback(Exception):
    """The traceback of an exception, as text, where it was raised; the cause of the exception that is raised here."""

    def __init__(self, where: str, text: str) -> None:
        super().__init__(where, text)
        self.where = where
        self.text = text

    def __str__(self) -> str:
        return f"in {self.where}:\n{self.text}"


def _classes(base: type[DelegateFunctionException]) -> dict[str, type[DelegateFunctionException]]:
    found = {base.code: base}
    for derived in base.__subclasses__():
        found.update(_classes(derived))
    return found


def from_wire(content: dict[str, Any], *, output_tail: str = "") -> DelegateFunctionException:
    """Return the exception that a frame of type ERROR describes."""
    kind = _classes(DelegateFunctionException).get(str(content.get("code")), DelegateFunctionException)
    details = content.get("details")
    known = {str(key): value for key, value in details.items()} if isinstance(details, dict) else {}
    for taken in ("message", "where", "output_tail"):
        known.pop(taken, None)
    return kind(str(content.get("message")), where=str(content.get("where") or ""), output_tail=output_tail, **known)


def to_wire(error: DelegateFunctionException) -> dict[str, Any]:
    """Return the content of a frame of type ERROR for an exception."""
    return {"code": error.code, "message": error.message, "where": error.where, "details": error.details}
