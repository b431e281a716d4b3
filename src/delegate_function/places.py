"""Ask where jobs stand in the queue, without waiting for the answer."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterable
from typing import NamedTuple

QUEUE_PLACE = "/run/queue-place/socket"
_ASK_EVERY_S = 1.5
_ASK_SLURM_EVERY_S = 5.0
_GIVE_UP_S = 10.0
_MAX_JOBS = 100


class Place(NamedTuple):
    """Where a job that waits stands in the queue, as far as it is known."""

    place: int | None = None
    of: int | None = None
    start: float | None = None
    reason: str = "None"


class Places:
    """Places in the queue, asked for now and then, and never waited for.

    The users' node of the cluster has a service that knows them. Another Slurm says when a job should start.
    """

    def __init__(self) -> None:
        self._known: dict[str, Place] = {}
        self._question: _ServiceQuestion | _SlurmQuestion | None = None
        self._asked = self._ask_from = -math.inf

    def look(self, jobs: Iterable[str]) -> dict[str, Place]:
        """Return what is known of those of the jobs that wait, and ask again if it is time to."""
        now = time.monotonic()
        if self._question is None and now >= self._ask_from:
            self._ask([job for job in jobs if job.isdecimal()][:_MAX_JOBS], now)
        if self._question is not None:
            answer = self._question.answer()
            if answer is not None or now - self._asked > _GIVE_UP_S:
                self._known = answer or {}
                self.close()
        return self._known

    def _ask(self, jobs: list[str], now: float) -> None:
        self._asked, self._ask_from = now, now + _ASK_EVERY_S
        try:
            self._question = _ServiceQuestion(jobs)
        except BlockingIOError:
            pass  # too many ask at this moment
        except OSError:
            self._ask_from = now + _ASK_SLURM_EVERY_S
            try:
                self._question = _SlurmQuestion(jobs)
            except OSError:
                self._ask_from = math.inf  # there is no squeue

    def close(self) -> None:
        """Wait for no answer any more."""
        if self._question is not None:
            self._question.close()
            self._question = None


class _ServiceQuestion:
    """A question to the cluster's own service (queue_place.py of the image `user`)."""

    def __init__(self, jobs: list[str]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            self._socket.connect(QUEUE_PLACE)
            self._socket.send(json.dumps({"jobs": [int(job) for job in jobs]}).encode())
        except OSError:
            self._socket.close()
            raise

    def answer(self) -> dict[str, Place] | None:
        try:
            told = json.loads(self._socket.recv(65536) or b"{}")
        except BlockingIOError:
            return None
        except OSError:
            return {}
        return {
            job: Place(known["place"], told["of"], known["start"], known["reason"])
            for job, known in told.get("jobs", {}).items()
        }

    def close(self) -> None:
        self._socket.close()


class _SlurmQuestion:
    """A question to Slurm itself."""

    def __init__(self, jobs: list[str]) -> None:
        import subprocess

        self._squeue = subprocess.Popen(
            ["squeue", "--noheader", "--start", f"--jobs={','.join(jobs)}", "--format=%A|%S|%r"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"},
            text=True,
            start_new_session=True,
        )

    def answer(self) -> dict[str, Place] | None:
        if self._squeue.poll() is None:
            return None
        assert self._squeue.stdout
        rows = [line.split("|", 2) for line in self._squeue.stdout.read().splitlines()]
        return {
            job: Place(start=float(start) if start.isdecimal() else None, reason=reason) for job, start, reason in rows
        }

    def close(self) -> None:
        self._squeue.kill()
        self._squeue.communicate()
