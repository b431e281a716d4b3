"""What a user may ask of the agent: the fields of a request, each of which is checked before anything is done."""

from __future__ import annotations

from typing import Any, NamedTuple

from agent.wire import VERSION, Refused, shown

_HEX = frozenset("0123456789abcdef")
_PROFILE = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_CALL_FIELDS = frozenset({"v", "type", "id", "job", "profile", "seconds", "memory_mb"})
_REQUIRED = ("id", "job", "profile")
_LEASE_FIELDS = frozenset({"v", "type", "job"})
_MAX_SECONDS = 10**7
_MAX_MEMORY_MB = 2**30


class CallRequest(NamedTuple):
    """A valid request for one call; None for a limit means the profile's own."""

    id: str
    job: int
    profile: str
    seconds: float | None
    memory_mb: int | None


def call_request(message: dict[str, Any]) -> CallRequest:
    """Return the request in a message of type `call` whose version was checked.

    Raises:
        Refused: a field is unknown, missing, or has a value that it cannot have.
    """
    _check_fields(message, _CALL_FIELDS, _REQUIRED)
    identifier, job, profile = (message[name] for name in _REQUIRED)
    seconds, memory_mb = message.get("seconds"), message.get("memory_mb")
    if not (isinstance(identifier, str) and len(identifier) == 32 and set(identifier) <= _HEX):
        raise Refused("field", f"id is {shown(identifier)}, not 32 hexadecimal digits")
    _check_job(job)
    if not (isinstance(profile, str) and 0 < len(profile) <= 32 and set(profile) <= _PROFILE and profile[0].isalnum()):
        raise Refused("field", f"profile is {shown(profile)}; a profile's name has up to 32 of a-z, 0-9, - and _")
    if seconds is not None and (type(seconds) not in (int, float) or not 0 < seconds <= _MAX_SECONDS):
        raise Refused("field", f"seconds is {shown(seconds)}, not a number above 0")
    if memory_mb is not None and (type(memory_mb) is not int or not 0 < memory_mb <= _MAX_MEMORY_MB):
        raise Refused("field", f"memory_mb is {shown(memory_mb)}, not a whole number above 0")
    return CallRequest(identifier, job, profile, seconds, memory_mb)


def lease_request(message: dict[str, Any]) -> int:
    """Return the job in a message of type `lease` whose version was checked; raise Refused as `call_request` does."""
    _check_fields(message, _LEASE_FIELDS, ("job",))
    job = message["job"]
    _check_job(job)
    return int(job)


def _check_fields(message: dict[str, Any], known: frozenset[str], required: tuple[str, ...]) -> None:
    unknown = sorted(set(message) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise Refused("field", f"unknown field {shown(unknown[0])} in version {VERSION}; known: {names}")
    for name in required:
        if name not in message:
            raise Refused("field", f"field {name} is missing")


def _check_job(job: object) -> None:
    if type(job) is not int or not 0 < job < 2**32:
        raise Refused("field", f"job is {shown(job)}, not a job's number")
