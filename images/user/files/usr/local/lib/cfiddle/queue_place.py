"""Tell users where their jobs stand in the queue, of which Slurm shows them their own jobs alone.

Runs as SlurmUser, who sees all jobs. Over a Unix socket a user sends one packet, `{"jobs": [412]}`, and gets one,
`{"of": 7, "jobs": {"412": {"place": 3, "reason": "Priority", "start": 1795636568}}}`: how many jobs wait for room, and
of each job that was named, is the user's (the kernel says who that is) and waits, its place among them or null, Slurm's
reason, and when Slurm expects it to start or null. Of the jobs of others nothing is told but how many wait.

What a user sends is a list of numbers that are looked up; whoever sends something else is hung up on.
"""

import contextlib
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

SOCKET = Path("/run/queue-place/socket")
SQUEUE = ["squeue", "--noheader", "--all", "--array", "--states=PENDING", "--sort=-Q,i", "--format=%A|%U|%S|%r"]
WAITING_FOR_ROOM = ("None", "Priority", "Resources")
MAX_REQUEST = 4096
MAX_JOBS = 100
MAX_CONNECTIONS = 256
MAX_CONNECTIONS_OF_USER = 8
PATIENCE_S = 2.0
FRESH_S = 1.0
SQUEUE_S = 3.0


class Queue:
    """The jobs that wait, as Slurm said a second ago or less."""

    def __init__(self) -> None:
        self._read_at = -FRESH_S
        self._of = 0
        self._jobs: dict[tuple[int, int], dict[str, Any]] = {}

    def answer(self, uid: int, jobs: list[int]) -> dict[str, Any]:
        """Return what is told to a user of jobs."""
        if time.monotonic() - self._read_at >= FRESH_S:
            self._read()
            self._read_at = time.monotonic()
        return {"of": self._of, "jobs": {str(job): self._jobs[uid, job] for job in jobs if (uid, job) in self._jobs}}

    def _read(self) -> None:
        self._of, self._jobs = 0, {}
        environment = {"PATH": os.defpath, "SLURM_TIME_FORMAT": "%s"}
        try:
            done = subprocess.run(SQUEUE, capture_output=True, text=True, timeout=SQUEUE_S, check=True, env=environment)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"queue-place: {error}", file=sys.stderr, flush=True)
            return
        for line in done.stdout.splitlines():
            job, uid, start, reason = line.split("|", 3)
            place = None
            if reason in WAITING_FOR_ROOM:
                self._of += 1
                place = self._of
            told = {"place": place, "reason": reason, "start": int(start) if start.isdigit() else None}
            self._jobs.setdefault((int(uid), int(job)), told)  # of an array, its first task


def requested(packet: bytes) -> list[int]:
    """Return the jobs that a request names; raise ValueError for what is no request."""
    if len(packet) > MAX_REQUEST:
        raise ValueError("too long")
    try:
        request = json.loads(packet)
    except RecursionError as error:
        raise ValueError("too deep") from error
    jobs = request.get("jobs") if isinstance(request, dict) and len(request) == 1 else None
    if not isinstance(jobs, list) or len(jobs) > MAX_JOBS or not all(type(job) is int for job in jobs):
        raise ValueError("no list of jobs")
    return jobs


class Server:
    """The socket, and the connections on which a request is awaited."""

    def __init__(self, path: Path, queue: Queue) -> None:
        self._queue = queue
        self._uids: dict[socket.socket, int] = {}
        self._deadlines: dict[socket.socket, float] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path.unlink(missing_ok=True)
        self._listener.bind(os.fspath(path))
        path.chmod(0o666)
        self._listener.listen(MAX_CONNECTIONS)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Answer for ever."""
        while True:
            for key, _ in self._selector.select(PATIENCE_S if self._deadlines else None):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._serve(key.fileobj)
            now = time.monotonic()
            for connection in [one for one, deadline in self._deadlines.items() if deadline <= now]:
                self._close(connection)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = struct.unpack("iII", credentials)[1]
        if len(self._uids) >= MAX_CONNECTIONS or Counter(self._uids.values())[uid] >= MAX_CONNECTIONS_OF_USER:
            connection.close()
            return
        connection.setblocking(False)
        self._uids[connection], self._deadlines[connection] = uid, time.monotonic() + PATIENCE_S
        self._selector.register(connection, selectors.EVENT_READ)

    def _serve(self, connection: Any) -> None:
        try:
            jobs = requested(connection.recv(MAX_REQUEST + 1))
        except (OSError, ValueError):
            jobs = None
        if jobs is not None:
            answer = json.dumps(self._queue.answer(self._uids[connection], jobs)).encode()
            with contextlib.suppress(OSError):  # whoever asked is gone
                connection.send(answer)
        self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._uids[connection], self._deadlines[connection]
        connection.close()


if __name__ == "__main__":
    Server(SOCKET, Queue()).run()
