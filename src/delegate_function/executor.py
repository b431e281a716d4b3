"""Many calls at once, as futures that the standard library's functions take.

    with Executor() as executor:
        futures = [executor.submit(measure, size) for size in sizes]
        for future in concurrent.futures.as_completed(futures):
            print(future.result(), future.call.node["name"])

A chain that begins with SlurmDelegate is called through leases: each of a few threads holds one, and all calls go
through them. After a turn a lease is given back and queued for anew, so that others' jobs are not kept waiting.

    future = Executor(detached=True).submit(measure, size)
    print(future.job_id)
    # days later, in another process
    print(Executor.reattach(JOB_ID).result())
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import types
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from delegate_function import batches, shelf, steps
from delegate_function.batches import Batches, DetachedFuture
from delegate_function.delegates import BaseDelegate, DelegateChain, SandboxDelegate, SlurmDelegate, results_of
from delegate_function.errors import ConfigurationError
from delegate_function.futures import Future, Way
from delegate_function.leases import QOS, Lease
from delegate_function.shelf import DetachedCall
from delegate_function.workers import Unleased, Workers

P = ParamSpec("P")
T = TypeVar("T")

_SPARE_S = 30.0


class Executor(concurrent.futures.Executor):
    """Call functions through a chain of delegates, several at once.

    Args:
        delegate: the chain; without it, a sandbox on a worker. Functions travel as the delegate's objects do. What a
            call writes goes to `sys.stdout` and `sys.stderr` here.
        max_workers: how many calls run at once, at most. With Slurm, it has no more jobs than that in the queue.
        detached: whether each call is a batch job that goes on without this process; see `reattach`.
        results: how results travel, as for BaseDelegate.call.
        seconds: how long a lease may last; a call that runs then is ended.
        idle_s: a lease is given back when there was nothing to do for this time.
        turn_s: a lease is given back after this time, and another one is queued for if there is more to do.
        qos: of the leases, as for Lease.

    Where calls are detached, `max_workers` is how many tasks of one job array run at once; what is said of leases means
    nothing there. Their futures have a `job_id`. Calls and results stay in the user's home, for `reattach`, until
    `forget`, or until thirty days after the result came.

    As in the standard library, `shutdown` and the end of a `with` block wait for the calls; but an interrupt within
    the block or at its end, and the end of the interpreter, cancel them. Those that are detached go on.
    """

    def __init__(
        self,
        delegate: BaseDelegate | None = None,
        *,
        max_workers: int = 4,
        detached: bool = False,
        results: str | None = None,
        seconds: float = 600,
        idle_s: float = 1.0,
        turn_s: float = 10.0,
        qos: str | None = QOS,
    ) -> None:
        if delegate is None:
            delegate = DelegateChain(SlurmDelegate, SandboxDelegate)()
        if type(max_workers) is not int or max_workers < 1:
            raise ConfigurationError(f"max_workers is a whole number greater than 0, not {max_workers!r}")
        for name, value in (("seconds", seconds), ("idle_s", idle_s), ("turn_s", turn_s)):
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ConfigurationError(f"{name} is a number of seconds, not {value!r}")
        results, hops = results_of(delegate.compile(), results)
        if any(step["type"] == steps.TERMINAL for step in hops):
            raise ConfigurationError("calls that are made at once cannot share one standard input: interactive=True")
        self._way: Way
        leaving = [hop for hop in hops if steps.leaves([hop])]
        if detached:
            if not hops or hops[0]["type"] != "slurm":
                raise ConfigurationError("a detached call is a batch job: its chain begins with SlurmDelegate")
            self._way = Batches(hops, max_workers, results)
        elif leaving and leaving[0]["type"] == "slurm":
            new_lease = functools.partial(Lease, delegate, seconds=seconds, idle_s=idle_s + _SPARE_S, qos=qos)
            self._way = Workers(new_lease, max_workers, results=results, idle_s=idle_s, turn_s=turn_s)
        else:
            new_chain = functools.partial(Unleased, delegate)
            self._way = Workers(new_chain, max_workers, results=results, idle_s=idle_s, ends=bool(leaving))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have `fn(*args, **kwargs)` called; return its future."""
        return self._way.add(fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls.

        Args:
            wait: whether to return only when all calls are done and all leases given back.
            cancel_futures: whether to cancel the calls that did not begin.
        """
        self._way.finish(wait=wait, cancel=cancel_futures)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._way.abandon()
            return
        try:
            self.shutdown(wait=True)
        except BaseException:
            self._way.abandon()
            raise

    @staticmethod
    def reattach(job_id: str | int) -> DetachedFuture:
        """Return a future of a detached call, also of another process's, and long after its job ended.

        Raises:
            ConfigurationError: no such call can be found.
        """
        return batches.reattach(job_id)

    @staticmethod
    def detached_calls() -> list[DetachedCall]:
        """Return the detached calls that can be found, the latest first."""
        return shelf.found()

    @staticmethod
    def forget(job_id: str | int) -> None:
        """Remove the files of a detached call whose job is over.

        Raises:
            ConfigurationError: no such call can be found, or its job is not over.
        """
        shelf.forget(job_id)
