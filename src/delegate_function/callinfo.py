"""What is known of a call beyond its value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delegate_function.conversation import Exchange


class CallInfo:
    """What is known of a call beyond its value.

    Attributes: `hops` (one dict for each hop's process: where, node, pid, job), `usage` (wall_s, user_s, system_s,
    peak_memory_mb), `node` (the fingerprint of the node where it ran), `container` (the sandbox's id), `job_id` (of the
    last Slurm job on the way), `seconds` (what the caller waited), `where` (the hop in which it ran), `void` (why a
    measurement there is worth nothing; empty where nothing speaks against it).
    """

    def __init__(self) -> None:
        self.hops: list[dict[str, Any]] = []
        self.usage: dict[str, Any] = {}
        self.node: dict[str, Any] = {}
        self.container: str | None = None
        self.job_id: str | None = None
        self.seconds = 0.0
        self.where = "this process"
        self.exchange: Exchange | None = None
        self.void = ""

    def __repr__(self) -> str:
        return f"<call in {self.where}, {self.seconds:.3f} s, usage {self.usage}>"

    def cancel(self) -> None:
        """End the call, which another thread makes, if it is under way; it raises CallCancelled there."""
        if exchange := self.exchange:
            exchange.cancel()

    def greet(self, content: dict[str, Any]) -> None:
        """Take what a hop says of itself when it starts."""
        self.hops.append(content)
        self.where = str(content.get("where", self.where))
        if content.get("job"):
            self.job_id = str(content["job"])
        slurm, there = content.get("slurm_cpus") or 0, content.get("cpus") or 0
        if slurm > there > 0:
            self.void = f"{content.get('node')} has {there} CPUs and says to Slurm that it has {slurm}"

    def inform(self, content: dict[str, Any]) -> None:
        """Take what a hop says when the call has ended."""
        self.where = str(content.get("where", self.where))
        self.usage = content.get("usage") or self.usage
        self.node = content.get("node") or self.node
        self.container = content.get("container") or self.container
