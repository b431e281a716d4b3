"""Start the next hop of a call, whatever it is: each kind is a module that is loaded only where it is needed."""

from __future__ import annotations

import posix as os

from delegate_function import frames
from delegate_function.errors import ConfigurationError, DelegateFunctionException

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from typing import Any


PROCESSES = ("subprocess", "sudo", "ssh", "docker", "slurm")
"""The kinds of hops that are processes behind a command."""
DEFAULT_OUTPUT_MB = 16
"""What a sandboxed call may write to standard output and standard error together, where the policy says nothing."""


class Next:
    """The next hop, as the relay and the caller see it."""

    link: frames.Link
    outputs: dict[int, bytes]
    wake_fd: int
    ended: bool
    output_limit: int | None = None
    job_id: str | None = None
    is_process = False
    """Whether it is itself a hop's process, with others behind it, or else where the call runs."""

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

    def close(self) -> None:
        """Let it end by itself after the call did, within bounds."""
        self.kill()

    def discard(self) -> None:
        """Leave nothing of it, in whatever way the call has ended."""
        self.kill()
        while self.outputs:
            os.close(self.outputs.popitem()[0])


def start(hop: dict[str, Any], where: str) -> Next:
    """Start a hop that is not the last; `where` names it in errors."""
    if hop.get("type") == "sandbox":
        from delegate_function.sandboxed import Sandbox

        return Sandbox(hop, where)
    if hop.get("type") not in PROCESSES:
        raise ConfigurationError(f"unknown kind of hop {hop.get('type')!r}", where=where)
    from delegate_function.processes import start_process

    return start_process(hop, where)
