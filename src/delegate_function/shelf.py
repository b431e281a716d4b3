"""Where detached calls and their results lie in the user's home, and can be found again.

Everything of one submission lies in one directory below `~/.delegate_function/detached`, each of them of mode 0700: in
`job` is the job's number, in `calls` what is called and what results travel as, and `N.call`, `N.result` and `N.log`
belong to task N of the job array, or 0 where there is only one call.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delegate_function import caller, detached, files, frames, returned, slurm
from delegate_function.callinfo import CallInfo
from delegate_function.errors import ConfigurationError, DelegateFunctionException, HopFailed

KEPT_DAYS = 30
CALLS = "calls"


@dataclass(frozen=True)
class Record:
    """Where a call lies: its directory below the shelf, its number there, and its job."""

    directory: str
    number: int
    job_id: str

    def value(self, call: CallInfo) -> Any:
        """Return the value of a call that is done, or raise what it raised."""
        try:
            with opened(self.directory) as root:
                file = detached.open_to_read(root, f"{self.number}.result")
                described = _described(root)
                call.seconds = os.fstat(file.fileno()).st_mtime - described["submitted"]
        except (files.FileError, OSError) as error:
            raise HopFailed(f"the result of job {self.job_id} cannot be read: {error}") from error
        call.job_id = self.job_id
        with file:
            return caller.replay(detached.read(file), call, results=described["results"])

    def loss(self) -> DelegateFunctionException:
        """Return why there is no result and will be none."""
        log, heard = b"", bytearray()
        with contextlib.suppress(files.FileError, OSError), opened(self.directory) as root:
            for name in sorted(os.listdir(root)):
                if name == f"{self.number}.log":
                    with detached.open_to_read(root, name) as file:
                        log = file.read()
                elif name.startswith(f"{self.number}.partial."):
                    heard.clear()
                    with detached.open_to_read(root, name) as file, contextlib.suppress(frames.ProtocolError):
                        for kind, data in detached.read(file):  # as far as it reached the disk before a node died
                            heard += data if kind in (frames.OUT, frames.ERR) else b""
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


def path() -> Path:
    """Return the directory below which all of them are."""
    return Path.home() / ".delegate_function" / "detached"


@contextlib.contextmanager
def opened_shelf(*, create: bool = False) -> Iterator[int]:
    """Open that directory."""
    with contextlib.ExitStack() as stack:
        root = os.open(Path.home(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        for name in path().parts[-2:]:
            root = files.private_directory(name, root=root, create=create)
            stack.callback(os.close, root)
        yield root


@contextlib.contextmanager
def opened(directory: str) -> Iterator[int]:
    """Open the directory of a submission."""
    with opened_shelf() as shelf:
        root = files.private_directory(directory, root=shelf)
        try:
            yield root
        finally:
            os.close(root)


def names(directory: str) -> list[str]:
    """Return the names of the files of a submission."""
    try:
        with opened(directory) as root:
            return os.listdir(root)
    except (files.FileError, OSError):
        return []  # whoever removed it finds out when the job has ended


def _described(root: int) -> dict[str, Any]:
    with detached.open_to_read(root, CALLS) as file:
        described: dict[str, Any] = json.load(file)
        return described


def remove_old(shelf: int) -> None:
    """Remove the submissions in which nothing happened for too long."""
    for name in os.listdir(shelf):
        with contextlib.suppress(FileNotFoundError):  # it is being removed
            if os.stat(name, dir_fd=shelf, follow_symlinks=False).st_mtime < time.time() - KEPT_DAYS * 24 * 3600:
                shutil.rmtree(name, ignore_errors=True, dir_fd=shelf)


def _records() -> Iterator[tuple[Record, str, float, bool]]:
    """Yield the calls that can be found, the latest ones first, with function, time, and whether they are done."""
    try:
        with opened_shelf() as shelf:
            directories = sorted(os.listdir(shelf), reverse=True)
    except files.FileError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise ConfigurationError(f"detached calls cannot be looked for: {error}") from error
    for directory in directories:
        try:
            with opened(directory) as root:
                there = set(os.listdir(root))
                if not {detached.JOB, CALLS} <= there:
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


def find(job_id: str | int) -> tuple[Record, bool]:
    """Return where the call of a job lies, and whether it is done; raise ConfigurationError if it cannot be found."""
    wanted = slurm.checked_job(job_id)
    known = {record.job_id: (record, is_done) for record, _, _, is_done in reversed(list(_records()))}
    if wanted in known:
        return known[wanted]
    tasks = [task for task in known if task.startswith(f"{wanted}_")]
    if tasks:
        raise ConfigurationError(f"job {wanted} is an array: its calls are {tasks[-1]} to {tasks[0]}")
    raise ConfigurationError(f"no detached call of job {wanted} lies in {path()}")


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
    record, is_done = find(job_id)
    jobs = slurm.queued()
    if not is_done and (jobs is None or record.job_id in jobs):
        known = "Slurm does not say what became of it" if jobs is None else "cancel it first"
        raise ConfigurationError(f"job {record.job_id} is not over: {known}")
    with opened_shelf() as shelf:
        with opened(record.directory) as root:
            for name in os.listdir(root):
                if name.startswith(f"{record.number}."):
                    os.unlink(name, dir_fd=root)
            is_last = not any(name.endswith((".call", ".result")) for name in os.listdir(root))
        if is_last:
            shutil.rmtree(record.directory, dir_fd=shelf)
