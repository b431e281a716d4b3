"""Detached calls: batch jobs that go on without this process.

Calls that come while Slurm takes earlier ones become one job array.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import operator
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from delegate_function import caller, data, detached, files, frames, shelf, slurm
from delegate_function.callinfo import CallInfo
from delegate_function.errors import CallNotSent, DelegateFunctionException, HopFailed
from delegate_function.futures import Future
from delegate_function.packing import Payload, pack
from delegate_function.shelf import Record

_MOST_TASKS = 1000  # Slurm's MaxArraySize is 1001 where nobody changed it
_NAPS_S = (0.05, 0.5)
_ASK_S = 3.0
_cancelling = threading.Semaphore(4)


class DetachedFuture(Future[Any]):
    """The result of a detached call; cancelling it cancels its job."""

    def __init__(self, way: Batches) -> None:
        super().__init__(way)
        self.record: Record | None = None
        self._placed = threading.Event()

    @property
    def job_id(self) -> str:
        """The number of the call's job, as Slurm writes it: `12`, or `12_3` in a job array.

        Raises:
            why there is no job.
        """
        self._placed.wait()
        if self.record is None:
            error = self.exception()
            raise error if error is not None else CallNotSent("the call has no job")
        return self.record.job_id

    def place(self, record: Record | None) -> None:
        """Say where the call lies, or that it lies nowhere."""
        self.record = record
        self._placed.set()

    def fetch(self, record: Record) -> None:
        """Take the result, which is there."""
        call = CallInfo()
        try:
            value = record.value(call)
        except BaseException as error:
            self.settle(call, error=error)
        else:
            self.settle(call, value)


_Call = tuple[DetachedFuture, tuple[Any, ...], dict[str, Any]]


class Batches:
    """Make calls as batch jobs."""

    ends_running_calls = True

    def __init__(self, hops: list[dict[str, Any]], most: int, results: str) -> None:
        self._job, self._rest = hops[0], hops[1:]
        self._results = results
        self._most = most
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._futures: set[DetachedFuture] = set()
        self._submitter: threading.Thread | None = None
        self._finished = False
        self._process = os.getpid()

    def add(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> DetachedFuture:
        """Submit a call, together with those that wait for that already."""
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked from the one that has the executor; make another one here")
        future = DetachedFuture(self)
        future.add_done_callback(self._forget)
        with self._lock:
            if self._finished:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._futures.add(future)
            self._waiting.append((future, (function, *arguments), keywords))
            if self._submitter is None:
                # The interpreter waits for this thread before it ends: what was submitted, is.
                self._submitter = threading.Thread(target=self._submit_all, name="delegate_function submit")
                self._submitter.start()
        return future

    def end(self, future: Future[Any]) -> None:
        """Cancel the job of a call that was cancelled."""
        assert isinstance(future, DetachedFuture)
        if future.record is not None:
            # It takes a moment, and who cancels may be an event loop. The interpreter waits for the thread.
            job = future.record.job_id
            threading.Thread(target=_cancel, args=(job,), name="delegate_function cancel").start()

    def finish(self, *, wait: bool, cancel: bool) -> None:
        """Take no more calls."""
        with self._lock:
            self._finished = True
            submitter, futures = self._submitter, list(self._futures)
        for future in futures if cancel else ():
            if not future.running():
                future.cancel()
        if submitter is not None:
            submitter.join()
        if wait:
            concurrent.futures.wait(futures)

    def abandon(self) -> None:
        """Wait for no call any more; their jobs go on."""
        self.finish(wait=False, cancel=False)

    def _forget(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            self._futures.discard(future)

    def _submit_all(self) -> None:
        while True:
            with self._lock:
                batch, self._waiting = self._waiting[:_MOST_TASKS], self._waiting[_MOST_TASKS:]
                if not batch:
                    self._submitter = None
                    return
            try:
                self._submit(batch)
            except BaseException as error:
                for future, *_ in batch:
                    future.settle(None, error=error)
            finally:
                for future, *_ in batch:
                    if not future.record:
                        future.place(None)
            del batch

    def _submit(self, batch: list[_Call]) -> None:
        directory = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(4).hex()}"
        job = ""
        try:
            with shelf.opened_shelf(create=True) as above:
                shelf.remove_old(above)
                root = files.private_directory(directory, root=above, create=True)
                try:
                    futures = list(self._write(batch, root))
                    if futures:
                        path = str(shelf.path() / directory)
                        argv = slurm.sbatch_argv(self._job, path, tasks=len(futures), at_once=self._most)
                        job = slurm.submit(argv, self._script(path))
                        detached.place(root, detached.JOB, [job.encode()], beside=f"{detached.JOB}.submitted")
                except BaseException:
                    # A job that Slurm took without saying so finds nothing to do.
                    shutil.rmtree(directory, dir_fd=above)
                    if job:
                        _cancel(job)
                    raise
                finally:
                    os.close(root)
        except (files.FileError, OSError) as error:
            raise CallNotSent(f"the call cannot be written into {shelf.path()}: {error}") from error
        for number, future in enumerate(futures):
            record = Record(directory, number, job if len(futures) == 1 else f"{job}_{number}")
            future.place(record)
            if future.cancelled():
                _cancel(record.job_id)
            else:
                watcher.watch(future, record)

    def _write(self, batch: list[_Call], root: int) -> Iterator[DetachedFuture]:
        """Write the calls into their directory; yield the futures of those that are there now."""
        functions: list[str] = []
        for future, arguments, keywords in batch:
            if future.done():
                continue
            try:
                packages: dict[str, str] = {}
                payload = Payload(pack(operator, "call", arguments, keywords, packages), (), root)
            except DelegateFunctionException as error:
                future.settle(None, error=error)
                continue
            header = caller.header(self._rest, payload, packages, results=self._results, done=1)
            spec = {**header, "kind": detached.KIND}
            name = f"{len(functions)}.call"
            pieces = (frames.encode(frames.DATA, piece) for piece in payload.chunks())
            detached.place(root, name, (frames.encode_json(frames.SPEC, spec), *pieces), beside=f"{name}.new")
            functions.append(getattr(arguments[0], "__qualname__", type(arguments[0]).__qualname__))
            yield future
        described = json.dumps({"submitted": time.time(), "functions": functions, "results": self._results}).encode()
        detached.place(root, shelf.CALLS, [described], beside="calls.new")

    def _script(self, path: str) -> str:
        if self._job.get("executable"):
            command = [str(self._job["executable"]), "--detached"]
        else:
            command = ["python3", "-I", "-m", detached.__name__]
        return f"#!/bin/sh\nexec {shlex.join([*command, path])}\n"


def _cancel(job: str) -> None:
    """Cancel a job; where Slurm does not answer, nobody waits to hear that, and `shelf.found` still lists the job."""
    with _cancelling, contextlib.suppress(HopFailed):
        slurm.cancel(job)


class _Watcher:
    """One thread that looks for the results of all detached calls, and asks Slurm for their jobs now and then."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watched: dict[DetachedFuture, Record] = {}
        self._thread: threading.Thread | None = None

    def watch(self, future: DetachedFuture, record: Record) -> None:
        """Settle a future when its job has left a result, or can leave none any more."""
        with self._changed:
            self._watched[future] = record
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="delegate_function watch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _run(self) -> None:
        shortest, longest = _NAPS_S
        nap, asked = shortest, time.monotonic()
        while unsettled := self._unsettled():
            is_time = time.monotonic() - asked > _ASK_S
            try:
                has_news = _look(unsettled, slurm.queued() if is_time else None)
            except Exception as error:
                for future in unsettled:
                    future.settle(None, error=error)
                continue
            if is_time:
                asked = time.monotonic()
            nap = shortest if has_news else min(nap * 1.2, longest)
            with self._changed:
                if self._changed.wait(nap):
                    nap = shortest

    def _unsettled(self) -> dict[DetachedFuture, Record]:
        with self._changed:
            self._watched = {future: record for future, record in self._watched.items() if not future.done()}
            if not self._watched:
                self._thread = None
            return dict(self._watched)


watcher = _Watcher()


def _look(unsettled: dict[DetachedFuture, Record], jobs: dict[str, str] | None) -> bool:
    """Settle the futures whose results are there, and those whose jobs are gone without; return whether there are any.

    `jobs` is what Slurm said just before, if it was asked and answered: what a job leaves, it leaves before it is gone.
    """
    there: dict[str, list[str]] = {}
    for future, record in unsettled.items():
        try:
            if record.directory not in there:
                there[record.directory] = shelf.names(record.directory)
            if f"{record.number}.result" in there[record.directory]:
                future.fetch(record)
            elif jobs is not None:
                future.begun = jobs.get(record.job_id) == "RUNNING"
                if record.job_id not in jobs:
                    future.settle(None, error=record.loss())
        except Exception as error:
            future.settle(None, error=error)
    return any(future.done() for future in unsettled)


def reattach(job_id: str | int) -> DetachedFuture:
    """Return a future of a detached call, of this process or another, also if its job ended long ago."""
    record, _ = shelf.find(job_id)
    future = DetachedFuture(Batches([{"type": "slurm"}], 1, data.PICKLE))
    future.place(record)
    watcher.watch(future, record)
    return future
