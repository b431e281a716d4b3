"""Leases: one Slurm job that serves call after call, so that each needs no trip through the queue.

    with lease(seconds=300) as worker:
        for size in sizes:
            worker.invoke(experiment, "run", size)

It is an ordinary job of one step, which holds the node between calls, is charged for all of its time, and is given back
at the end of the block, after some idle seconds, when its time is up, or when Slurm wants the place for others. Each
call has a sandbox of its own all the same.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable
from typing import Any, Self

from delegate_function import __version__, frames, hop, processes, steps
from delegate_function.conversation import Conversation
from delegate_function.delegates import BaseDelegate, DelegateChain, SandboxDelegate, SlurmDelegate
from delegate_function.errors import ConfigurationError

QOS = "lease"
"""Slurm's quality of service for leases on this cluster: how many and how long, and that others come first."""


def lease(
    delegate: BaseDelegate | None = None, *, seconds: float = 600, idle_s: float = 30, qos: str | None = QOS
) -> Lease:
    """Return a lease, to be used in a `with` block or with `start` and `close`; arguments are those of `Lease`."""
    return Lease(delegate, seconds=seconds, idle_s=idle_s, qos=qos)


class Lease(BaseDelegate):
    """A delegate whose calls share one Slurm job, one at a time; a second thread waits its turn.

    Args:
        delegate: a chain that begins with SlurmDelegate; a sandbox on a worker, if none is given.
        seconds: how long it lasts at most, from its start. A call that runs then is ended.
        idle_s: it ends when no call came for so many seconds.
        qos: Slurm's quality of service, where the chain's SlurmDelegate names none; None for the user's own.

    Raises:
        ConfigurationError: the chain does not begin with a Slurm job, or a number is not above 0.
    """

    def __init__(
        self, delegate: BaseDelegate | None = None, *, seconds: float = 600, idle_s: float = 30, qos: str | None = QOS
    ) -> None:
        super().__init__()
        for name, value in (("seconds", seconds), ("idle_s", idle_s)):
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ConfigurationError(f"{name} is a number greater than 0, not {value!r}")
        self._chain = delegate if delegate is not None else DelegateChain(SlurmDelegate, SandboxDelegate)()
        self._terms = {"seconds": seconds, "idle_s": idle_s}
        self._turn = threading.Lock()
        self._process: int | None = None
        found = self._chain.compile()
        position = next((n for n, hop_ in enumerate(found) if steps.leaves([hop_])), None)
        if position is None or found[position]["type"] != "slurm":
            raise ConfigurationError("a lease is a Slurm job: its chain begins with SlurmDelegate")
        number = steps.count(found[: position + 1])
        self._spec = {
            "v": frames.VERSION,
            "version": __version__,
            "kind": "slurm",
            "hop": number,
            "of": steps.count(found),
            "sandbox": any(hop_["type"] == "sandbox" for hop_ in found),
            **self._terms,
        }
        options = {"time": math.ceil(seconds / 60) + 2, "job_name": "lease", "qos": qos}
        own = {name: value for name, value in options.items() if value is not None}
        job = found[position]
        self._hop = {**job, "options": {**own, **job.get("options", {})}, "lease": True}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Submit the job. A call waits until it runs; this does not."""
        if self._conversation is not None:
            raise ConfigurationError("a lease is started once")
        self._process = os.getpid()
        where = hop.describe("slurm", self._spec["hop"], self._spec["of"])
        self._conversation = Conversation(lambda: processes.start_process(self._hop, where), where, hold=self._spec)
        self._conversation.start()

    def wait(self) -> None:
        """Return when the job runs.

        Raises:
            DelegateFunctionException: it does not, and never will.
        """
        self._check_process()
        if self._conversation is None:
            self.start()
        assert self._conversation is not None
        self._conversation.decided.wait()
        if self._conversation.is_over:
            raise self._conversation.ended()

    def close(self) -> None:
        """Give the job back, when the call that runs, if there is one, has ended."""
        if self._conversation is None or self._is_elsewhere:
            return
        with self._turn:
            if self._conversation.greeted.is_set():
                self._conversation.give_back()
            else:
                self._conversation.close()

    def cancel(self) -> None:
        """End the call that another thread makes now, which raises CallCancelled there; the lease goes on.

        A lease whose job still waits in the queue is given up with its call.
        """
        if self._conversation is not None and not self._is_elsewhere:
            self._conversation.cancel_call()

    @property
    def job_id(self) -> str | None:
        """The job's number, once it is known, also while the job waits."""
        return self._conversation.job_id if self._conversation else None

    @property
    def is_over(self) -> bool:
        """Whether no more calls go this way."""
        return self._conversation is not None and self._conversation.is_over

    def call(
        self, obj: Any, method: str, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        """Do as `BaseDelegate.call`, in the lease's job.

        Raises:
            LeaseEnded: the lease was over before the call began, so that nothing ran.
            CallCancelled: `cancel` ended it.
            RuntimeError: this process was forked from the one that has the lease.
        """
        self._check_process()
        with self._turn:
            if self._conversation is None:
                self.start()
            return super().call(obj, method, args, kwargs, **options)

    def compile(self) -> list[dict[str, Any]]:
        """Return the hops of the chain."""
        return self._chain.compile()

    def hops(self) -> list[dict[str, Any]]:
        """Refuse to be a part of a chain, which would start a job of its own."""
        raise ConfigurationError("a lease is no part of a chain; make a lease of the whole chain")

    @property
    def _is_elsewhere(self) -> bool:
        return self._process not in (None, os.getpid())

    def _check_process(self) -> None:
        if self._is_elsewhere:
            raise RuntimeError("this process was forked from the one that has the lease; make another one here")
