"""Detached calls: batch jobs whose calls and results lie in the user's home, where they can be found again.

Calls that come while Slurm takes earlier ones become one job array. Everything of one submission lies in one directory
below `~/.delegate_function/detached`, each of them of mode 0700: `job` has the job's number, `calls` what is called,
`N.call`, `N.result` and `N.log` belong to the task N of the array (0 where there is only one call).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delegate_function import caller, detached, files, frames, returned, slurm
from delegate_function.callinfo import CallInfo
from delegate_function.errors import (
    CallNotSent,
    ConfigurationError,
    DelegateFunctionException,
    HopFailed,
)
from delegate_function.futures import Future
from delegate_function.packing import Payload, pack

KEPT_DAYS = 30
_MOST_TASKS = 1000  # Slurm's MaxArraySize is 1001 where nobody changed it
_NAPS_S = (0.05, 0.5)
_ASK_S = 3.0
_TAIL = 16 * 1024


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


@dataclass(frozen=True)
class Record:
    """Where a call lies: its directory below the shelf, its number there, and its job."""

    directory: str
    number: int
    job_id: str

    def value(self, call: CallInfo) -> Any:
        """Return the value of a call that is done, or raise what it raised."""
        try:
            with _opened(self.directory) as root:
                file = detached.open_to_read(root, f"{self.number}.result")
                call.seconds = os.fstat(file.fileno()).st_mtime - _described(root)["submitted"]
        except (files.FileError, OSError) as error:
            raise HopFailed(f"the result of job {self.job_id} cannot be read: {error}") from error
        call.job_id = self.job_id
        with file:
            return caller.replay(detached.read(file), call)

    def loss(self) -> DelegateFunctionException:
        """Return why there is no result and will be none."""
        log, heard = b"", b""
        with contextlib.suppress(files.FileError, OSError), _opened(self.directory) as root:
            for name in sorted(os.listdir(root)):
                if name == f"{self.number}.log":
                    with detached.open_to_read(root, name) as file:
                        log = file.read()
                elif name.startswith(f"{self.number}.partial."):
                    with detached.open_to_read(root, name) as file:
                        heard = b"".join(data for kind, data in detached.read(file) if kind in (frames.OUT, frames.ERR))
        said, output = (returned.tail(text.decode(errors="replace")) for text in (log, heard))
        error = slurm.explain_batch(self.job_id, said, f"{detached.KIND} {self.job_id}")
        error.output_tail = output
        return error


@dataclass(frozen=True)
class DetachedCall:
    """A detached call that can be found.

    Attributes: `job_id`; `function`, what was called; `submitted`, when (in seconds since 1970); `state`: "DONE" when
    there is a result, else what Slurm says of the job, "GONE" if it is over, "UNKNOWN" if Slurm does not answer.
    """

    job_id: str
    function: str
    submitted: float
    state: str


_Call = tuple[DetachedFuture, tuple[Any, ...], dict[str, Any]]


class Batches:
    """Make calls as batch jobs."""

    ends_running_calls = True

    def __init__(self, hops: list[dict[str, Any]], most: int) -> None:
        self._job, self._rest = hops[0], hops[1:]
        self._most = most
        self._lock = threading.Lock()
        self._waiting: list[_Call] = []
        self._futures: set[DetachedFuture] = set()
        self._submitter: threading.Thread | None = None
        self._finished = False

    def add(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> DetachedFuture:
        """Submit a call, together with those that wait for that already."""
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
            slurm.cancel(future.record.job_id)

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
            with _shelf(create=True) as shelf:
                _remove_old(shelf)
                root = files.private_directory(directory, root=shelf, create=True)
                try:
                    futures = list(self._write(batch, root))
                    if futures:
                        path = str(_path() / directory)
                        argv = slurm.sbatch_argv(self._job, path, tasks=len(futures), at_once=self._most)
                        job = slurm.submit(argv, self._script(path))
                        detached.place(root, detached.JOB, [job.encode()], beside=f"{detached.JOB}.submitted")
                except BaseException:
                    # A job that Slurm took without saying so finds nothing to do.
                    shutil.rmtree(directory, dir_fd=shelf)
                    if job:
                        slurm.cancel(job)
                    raise
                finally:
                    os.close(root)
        except (files.FileError, OSError) as error:
            raise CallNotSent(f"the call cannot be written into {_path()}: {error}") from error
        for number, future in enumerate(futures):
            record = Record(directory, number, job if len(futures) == 1 else f"{job}_{number}")
            future.place(record)
            if future.cancelled():
                self.end(future)
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
            spec = {**caller.header(self._rest, payload, packages, done=1), "kind": detached.KIND}
            name = f"{len(functions)}.call"
            pieces = (frames.encode(frames.DATA, piece) for piece in payload.chunks())
            detached.place(root, name, (frames.encode_json(frames.SPEC, spec), *pieces), beside=f"{name}.new")
            functions.append(getattr(arguments[0], "__qualname__", type(arguments[0]).__qualname__))
            yield future
        described = json.dumps({"submitted": time.time(), "functions": functions}).encode()
        detached.place(root, "calls", [described], beside="calls.new")

    def _script(self, path: str) -> str:
        if self._job.get("executable"):
            command = [str(self._job["executable"]), "--detached"]
        else:
            command = ["python3", "-I", "-m", detached.__name__]
        return f"#!/bin/sh\nexec {shlex.join([*command, path])}\n"


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
        if record.directory not in there:
            there[record.directory] = _names(record.directory)
        if f"{record.number}.result" in there[record.directory]:
            future.fetch(record)
        elif jobs is not None:
            future.begun = jobs.get(record.job_id) == "RUNNING"
            if record.job_id not in jobs:
                future.settle(None, error=record.loss())
    return any(future.done() for future in unsettled)


def _path() -> Path:
    return Path.home() / ".delegate_function" / "detached"


@contextlib.contextmanager
def _shelf(*, create: bool = False) -> Iterator[int]:
    """Open the directory below which all of them are."""
    with contextlib.ExitStack() as stack:
        root = os.open(Path.home(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        for name in _path().parts[-2:]:
            root = files.private_directory(name, root=root, create=create)
            stack.callback(os.close, root)
        yield root


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int]:
    with _shelf() as shelf:
        root = files.private_directory(directory, root=shelf)
        try:
            yield root
        finally:
            os.close(root)


def _names(directory: str) -> list[str]:
    try:
        with _opened(directory) as root:
            return os.listdir(root)
    except (files.FileError, OSError):
        return []  # whoever removed it finds out when the job has ended


def _described(root: int) -> dict[str, Any]:
    with detached.open_to_read(root, "calls") as file:
        described: dict[str, Any] = json.load(file)
        return described


def _remove_old(shelf: int) -> None:
    for name in os.listdir(shelf):
        if os.stat(name, dir_fd=shelf, follow_symlinks=False).st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
            shutil.rmtree(name, ignore_errors=True, dir_fd=shelf)


def _records() -> Iterator[tuple[Record, str, float, bool]]:
    """Yield the calls that can be found, the latest ones first, with function, time, and whether they are done."""
    try:
        with _shelf() as shelf:
            directories = sorted(os.listdir(shelf), reverse=True)
    except files.FileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise ConfigurationError(f"detached calls cannot be looked for: {error}") from error
    for directory in directories:
        try:
            with _opened(directory) as root:
                there = set(os.listdir(root))
                if not {detached.JOB, "calls"} <= there:
                    continue  # it is being submitted
                with detached.open_to_read(root, detached.JOB) as file:
                    job = file.read().decode()
                described = _described(root)
        except (files.FileError, OSError):
            continue  # it is being removed
        functions = described["functions"]
        for number, function in enumerate(functions):
            if {f"{number}.call", f"{number}.result"} & there:
                record = Record(directory, number, job if len(functions) == 1 else f"{job}_{number}")
                yield record, str(function), float(described["submitted"]), f"{number}.result" in there


def _find(job_id: str | int) -> tuple[Record, bool]:
    """Return where the call of a job lies, and whether it is done; raise ConfigurationError if it cannot be found."""
    wanted = slurm.checked_job(job_id)
    known = {record.job_id: (record, is_done) for record, _, _, is_done in reversed(list(_records()))}
    if wanted in known:
        return known[wanted]
    tasks = [task for task in known if task.startswith(f"{wanted}_")]
    if tasks:
        raise ConfigurationError(f"job {wanted} is an array: its calls are {tasks[-1]} to {tasks[0]}")
    raise ConfigurationError(f"no detached call of job {wanted} lies in {_path()}")


def reattach(job_id: str | int) -> DetachedFuture:
    """Return a future of a detached call, of this process or another, also if its job ended long ago."""
    record, _ = _find(job_id)
    future = DetachedFuture(Batches([{"type": "slurm"}], 1))
    future.place(record)
    watcher.watch(future, record)
    return future


def found() -> list[DetachedCall]:
    """Return the detached calls that can be found, the latest first."""
    jobs = slurm.queued()

    def state(job_id: str) -> str:
        return "UNKNOWN" if jobs is None else jobs.get(job_id, "GONE")

    return [
        DetachedCall(record.job_id, function, submitted, "DONE" if is_done else state(record.job_id))
        for record, function, submitted, is_done in _records()
    ]


def forget(job_id: str | int) -> None:
    """Remove what lies there of a call that is over."""
    record, is_done = _find(job_id)
    jobs = slurm.queued()
    if not is_done and (jobs is None or record.job_id in jobs):
        known = "Slurm does not say what became of it" if jobs is None else "cancel it first"
        raise ConfigurationError(f"job {record.job_id} is not over: {known}")
    with _shelf() as shelf:
        with _opened(record.directory) as root:
            for name in os.listdir(root):
                if name.startswith(f"{record.number}."):
                    os.unlink(name, dir_fd=root)
            is_last = not any(name.endswith((".call", ".result")) for name in os.listdir(root))
        if is_last:
            shutil.rmtree(record.directory, dir_fd=shelf)
