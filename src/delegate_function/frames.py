"""Carry a call's bytes between two processes over a pair of streams.

A frame is one letter for its type, four bytes for its length (big endian), its content, and a newline. The newline is
there for srun: it passes a task's output on when it sees the end of a line, and holds it back until then.

Each side of a link sends a beat at least every half second; 1.5 s without a byte mean that the other side is dead (a
closed stream cannot be relied upon: srun killed with SIGKILL leaves its step running without an end of file). So that a
long output never holds a beat back, four streams have a window: payload, input, output and result. Who sends on one may
have `WINDOW` bytes under way, and goes on when the far end of the stream says, with a credit, that it has used them up.

Only the standard library is used, and little of it: this is loaded before every call.
"""

from __future__ import annotations

import fcntl
import posix as os
import select
import time

from agent import compact

TYPE_CHECKING = False  # the module `typing` takes longer to load than all that a hop needs
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

VERSION = 2

HELLO = b"H"  # up: a hop's process runs (JSON: hop, what, where, pid, job)
SPEC = b"S"  # down: the hops that remain and the parts of the payload (JSON)
DATA = b"D"  # both: bytes of the payload (down) or of the result (up)
RESULT = b"R"  # up: how the call ended and which parts follow (JSON)
OUT = b"O"  # up: bytes written to standard output
ERR = b"E"  # up: bytes written to standard error
INFO = b"I"  # up: usage and node of a hop (JSON)
ERROR = b"X"  # up, last: the call failed on its way (JSON)
END = b"Z"  # up, last: the result is complete
CREDIT = b"C"  # both: bytes of a stream that were used up
BEAT = b"B"  # both: still here
KEYS = b"K"  # down: bytes of the caller's standard input; none at its end
CANCEL = b"Q"  # down: the call that runs shall end (in a lease, which goes on)
HOLD = b"L"  # down, first: this is a lease, of which each call follows (JSON)
OVER = b"V"  # up, last of a lease, between two calls: no further one is taken (JSON: reason, text)
PROGRESS = b"P"  # up: how many of how many steps the call has done
TYPES = frozenset(
    (HELLO, SPEC, DATA, RESULT, OUT, ERR, INFO, ERROR, END, CREDIT, BEAT, KEYS, CANCEL, HOLD, OVER, PROGRESS)
)

PAYLOAD_STREAM = b"p"
OUTPUT_STREAM = b"o"
RESULT_STREAM = b"r"
INPUT_STREAM = b"i"

BEAT_S = 0.5
SILENCE_S = 1.5
CHUNK = 128 * 1024
WINDOW = 4 * 1024 * 1024
MAX_FRAME = 256 * 1024
MAX_TRANSFER = 1024**3
"""Payloads and results may have this many bytes."""

_HEADER_BYTES = 5
_CREDIT_BYTES = 5
_PROGRESS_BYTES = 16
_MOST_STEPS = 2**53  # whole numbers below it are exact as floating point too
_BACKLOG = WINDOW
_PIPE_BYTES = 1024 * 1024
_TRICKLE = 16 * 1024
_PAUSE_S = 0.002


class ProtocolError(Exception):
    """The other side sent what is no frame, or a frame that has no place there."""


_decode_json = compact.decoder()


def encode(kind: bytes, content: bytes | memoryview = b"") -> bytes:
    """Return one frame as bytes."""
    if len(content) > MAX_FRAME:
        raise ProtocolError(f"a frame of {len(content)} bytes (at most {MAX_FRAME})")
    return b"".join((kind, len(content).to_bytes(4), content, b"\n"))


def encode_json(kind: bytes, content: dict[str, Any]) -> bytes:
    """Return one frame whose content is JSON."""
    return encode(kind, compact.encode(content))


def decode_json(content: bytes) -> dict[str, Any]:
    """Return the JSON object in a frame's content."""
    try:
        value = _decode_json(content)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a frame that should hold JSON does not") from error
    if not isinstance(value, dict):
        raise ProtocolError("a frame that should hold a JSON object does not")
    return value


def encode_credit(stream: bytes, count: int) -> bytes:
    """Return the frame that says: `count` bytes of `stream` were used up."""
    return encode(CREDIT, stream + count.to_bytes(4))


def decode_credit(content: bytes) -> tuple[bytes, int]:
    """Return stream and count of a credit."""
    if len(content) != _CREDIT_BYTES:
        raise ProtocolError("a credit of the wrong length")
    return content[:1], int.from_bytes(content[1:])


def encode_progress(done: int, total: int) -> bytes:
    """Return the frame that says: `done` of `total` steps are done; raise ValueError for what cannot be so."""
    if not 0 <= done <= total < _MOST_STEPS:
        raise ValueError(f"of progress, 0 ≤ done ≤ total < 2**53; this is {done} in {total}")
    return encode(PROGRESS, done.to_bytes(8) + total.to_bytes(8))


def decode_progress(content: bytes) -> tuple[int, int]:
    """Return how many of how many steps are done."""
    if len(content) != _PROGRESS_BYTES:
        raise ProtocolError("a progress of the wrong length")
    done, total = int.from_bytes(content[:8]), int.from_bytes(content[8:])
    if not done <= total < _MOST_STEPS:
        raise ProtocolError(f"a progress of {done} in {total}")
    return done, total


class Decoder:
    """Cut a stream of bytes into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.missing = 0
        """How many bytes the frame that has begun lacks, as far as its header has come."""

    def feed(self, data: bytes) -> None:
        """Take bytes as they came."""
        self._buffer += data

    @property
    def partial(self) -> bool:
        """Say whether a frame has begun that is not complete."""
        return bool(self._buffer)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        buffer, start = self._buffer, 0
        self.missing = 0
        try:
            while len(buffer) - start >= _HEADER_BYTES:
                content_from = start + _HEADER_BYTES
                kind, length = bytes(buffer[start : start + 1]), int.from_bytes(buffer[start + 1 : content_from])
                if kind not in TYPES or length > MAX_FRAME:
                    raise ProtocolError(f"not a frame: {bytes(buffer[start : start + 80])!r}")
                end = content_from + length
                if len(buffer) <= end:
                    self.missing = end + 1 - len(buffer)
                    break
                if buffer[end] != 0x0A:
                    raise ProtocolError("a frame without its end")
                content = bytes(buffer[content_from:end])
                start = end + 1
                yield kind, content
        finally:
            del buffer[:start]


class Window:
    """Keep a consumer's account of a stream: what came, what was used up, and when to say so."""

    def __init__(self, stream: bytes) -> None:
        self._stream = stream
        # Each of these has one writer, so that the two may be different threads.
        self._arrived = 0
        self._credited = 0
        self._used = 0

    def arrived(self, count: int) -> None:
        """Note that bytes came; raise ProtocolError if more came than were allowed."""
        self._arrived += count
        if self._arrived - self._credited > WINDOW:
            raise ProtocolError("more bytes than the window allows")

    def used(self, count: int) -> bytes:
        """Note that bytes were used up; return a credit to send, or nothing yet."""
        self._used += count
        fresh = self._used - self._credited
        if fresh < WINDOW // 4:
            return b""
        self._credited = self._used
        return encode_credit(self._stream, fresh)


class Link:
    """One side of a link between two processes, never blocking, with beats and their watch."""

    def __init__(self, read_fd: int, write_fd: int, *, beats: bool = True) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.closed = False
        self._beats = beats
        self._decoder = Decoder()
        self._pending: list[memoryview] = []
        self._backlog = 0
        self._heard: float | None = None
        self._sent = time.monotonic()
        self._trickled = False
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        for fd in (read_fd, write_fd):
            try:  # noqa: SIM105  (`contextlib` would be loaded before every call)
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            except OSError:  # no pipe, or the user has too many of that size
                pass

    def receive(self) -> list[tuple[bytes, bytes]]:
        """Return the frames that have come, without beats; set `closed` at the end of the stream."""
        try:
            data = os.read(self.read_fd, MAX_FRAME)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return []
        self.watch()
        self._decoder.feed(data)
        received = [frame for frame in self._decoder if frame[0] != BEAT]
        self._trickled |= len(data) < _TRICKLE < self._decoder.missing
        return received

    def send(self, *frames: bytes) -> None:
        """Queue frames and write what the stream takes at once."""
        for frame in frames:
            self._pending.append(memoryview(frame))
            self._backlog += len(frame)
        self.flush()

    def flush(self) -> None:
        """Write what the stream takes now; what cannot be written because the other side is gone is dropped."""
        while self._pending:
            try:
                written = os.write(self.write_fd, self._pending[0])
            except BlockingIOError:
                return
            except OSError:
                self._pending.clear()
                self._backlog = 0
                return
            self._sent = time.monotonic()
            self._backlog -= written
            if written == len(self._pending[0]):
                del self._pending[0]
            else:
                self._pending[0] = self._pending[0][written:]
                self._trickled |= written < _TRICKLE < len(self._pending[0])

    @property
    def pending(self) -> bool:
        """Say whether frames wait to be written."""
        return bool(self._pending)

    @property
    def congested(self) -> bool:
        """Say whether so much waits to be written that nothing should be added."""
        return self._backlog > _BACKLOG

    def trickled(self) -> bool:
        """Say whether since the last time little of a long frame came or went at once, and forget it."""
        trickled, self._trickled = self._trickled, False
        return trickled

    def watch(self) -> None:
        """Count silence from now on."""
        self._heard = time.monotonic()

    @property
    def silent(self) -> bool:
        """Say whether nothing was heard for too long, since the first byte or `watch`."""
        return self.until_silent() <= 0

    def until_silent(self) -> float:
        """Return the seconds until the silence is too long."""
        return SILENCE_S - (time.monotonic() - self._heard) if self._beats and self._heard is not None else SILENCE_S

    def beat(self) -> None:
        """Send a beat if it is time for one and the other side was heard (before, nobody would read it)."""
        if not self._beats or self._heard is None or self._pending:
            return
        if self.until_beat() <= 0:
            self.send(encode(BEAT))

    def until_beat(self) -> float:
        """Return the seconds until the next beat is due."""
        return BEAT_S * 0.8 - (time.monotonic() - self._sent) if self._beats and self._heard is not None else BEAT_S


class Poller:
    """Wait for descriptors, and find out when this process itself was held up."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def wait(self, reads: list[int], writes: list[int], links: list[Link]) -> set[int]:
        """Return the descriptors that are ready within a fraction of a beat.

        A link is not blamed for silence while this process could not listen (it was stopped, or starved): each gets a
        fresh allowance then.
        """
        now = time.monotonic()
        held_up = now - self._last > BEAT_S
        trickled = [link.trickled() for link in links]
        if any(trickled):
            # srun takes and hands on 1 KiB at a time. To wake up for each of them would cost more than all else.
            time.sleep(_PAUSE_S)
        poll = select.poll()
        masks: dict[int, int] = {}
        for fd in reads:
            masks[fd] = masks.get(fd, 0) | select.POLLIN
        for fd in writes:
            masks[fd] = masks.get(fd, 0) | select.POLLOUT
        for fd, mask in masks.items():
            poll.register(fd, mask)
        # Who is silent already is no reason to hurry.
        silences = (left for link in links if (left := link.until_silent()) > 0)
        timeout_s = min([BEAT_S / 2, *silences, *(link.until_beat() for link in links if not link.pending)])
        ready = {fd for fd, _ in poll.poll(max(1, int(timeout_s * 1000)))}
        after = time.monotonic()
        if held_up or after - now > 2 * BEAT_S:
            for link in links:
                if link._heard is not None:
                    link.watch()
        self._last = after
        return ready
