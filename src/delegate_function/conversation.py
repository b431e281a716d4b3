"""The thread that talks with the first hop, about one call or, in a lease, about one call after the other.

It sends the beats, so that neither a slow `sys.stdout` nor a long output holds one back; the thread that made the call
writes the output and waits. Only Python code elsewhere in the process that does not let go of the interpreter for 1.5 s
can silence it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from delegate_function import frames, hop
from delegate_function.errors import (
    CallCancelled,
    CallNotSent,
    DelegateFunctionException,
    HopFailed,
    LeaseEnded,
    from_wire,
)
from delegate_function.processes import Job, Process

_CANCELLED_S = 2.0
_GIVE_BACK = frames.encode(frames.OVER)


class Exchange:
    """One call's part of a conversation; what comes of it is put in `events`.

    Attributes:
        number: of the first hop, by which its greeting is known.
        progress: how many of how many steps the call has done, if it says so.
        conversation: what it is a part of, once it has begun.
    """

    def __init__(self, spec: dict[str, Any], chunks: Iterator[memoryview | bytes], keys_fd: int | None) -> None:
        self.events: queue.SimpleQueue[tuple[bytes, bytes] | DelegateFunctionException] = queue.SimpleQueue()
        self.progress: tuple[int, int] | None = None
        self.conversation: Conversation | None = None
        try:
            self.header = frames.encode_json(frames.SPEC, spec)
        except frames.ProtocolError as error:
            raise CallNotSent(f"what describes the call, its files' names above all, is too much: {error}") from error
        self.number: int = spec["hop"]
        self.ended = threading.Event()
        self._chunks = chunks
        self._budget = frames.WINDOW
        self._keys_fd = keys_fd
        self._keys_budget = frames.WINDOW
        self._output = frames.Window(frames.OUTPUT_STREAM)
        self._result = frames.Window(frames.RESULT_STREAM)

    def used(self, kind: bytes, count: int) -> None:
        """Say that output or bytes of the result were used up."""
        window = self._result if kind == frames.DATA else self._output
        if (credit := window.used(count)) and self.conversation:
            self.conversation.say(credit)

    def cancel(self) -> None:
        """End the call, wherever it is; return when nothing of it is under way any more."""
        if self.conversation:
            self.conversation.cancel(self)

    def input_fd(self) -> int | None:
        """Return the descriptor of the caller's standard input, if some of it may be sent now."""
        return self._keys_fd if self._keys_budget >= frames.CHUNK else None

    def send_keys(self, link: frames.Link) -> None:
        """Send some of the caller's standard input, or its end."""
        assert self._keys_fd is not None
        try:
            keys = os.read(self._keys_fd, frames.CHUNK)
        except BlockingIOError:
            return
        except OSError:
            keys = b""
        if not keys:
            self._keys_fd = None
        self._keys_budget -= len(keys)
        link.send(frames.encode(frames.KEYS, keys))

    def send_payload(self, link: frames.Link) -> None:
        """Send as much of the payload as may be under way."""
        while self._budget >= frames.CHUNK and not link.pending:
            piece = next(self._chunks, None)
            if piece is None:
                return
            self._budget -= len(piece)
            link.send(frames.encode(frames.DATA, piece))

    def hear(self, kind: bytes, content: bytes) -> bool:
        """Take a frame; return whether it is the call's last."""
        if kind == frames.CREDIT:
            stream, count = frames.decode_credit(content)
            if stream == frames.PAYLOAD_STREAM:
                self._budget += count
            elif stream == frames.INPUT_STREAM:
                self._keys_budget += count
            return False
        if kind == frames.PROGRESS:
            self.progress = frames.decode_progress(content)
            return False
        if kind in (frames.OUT, frames.ERR):
            self._output.arrived(len(content))
        elif kind == frames.DATA:
            self._result.arrived(len(content))
        elif kind not in (frames.HELLO, frames.RESULT, frames.INFO, frames.ERROR, frames.END):
            raise frames.ProtocolError(f"unexpected frame {kind!r}")
        self.events.put((kind, content))
        return kind in (frames.END, frames.ERROR)


class Conversation:
    """A process that is the first hop, and the thread that starts it and talks with it.

    It is that thread that starts the process: the kernel signals a parent's death when the thread dies which forked.

    Args:
        start: starts the hop's process.
        where: its name in errors, until it says a better one itself.
        hold: for a lease, what is agreed upon with the hop before the first call; it then serves several.
    """

    def __init__(self, start: Callable[[], Process], where: str, *, hold: dict[str, Any] | None = None) -> None:
        self.process: Process | None = None
        self.where = where
        self.greeted = threading.Event()
        self.decided = threading.Event()
        self.failure: DelegateFunctionException | None = None
        self._start = start
        self._hold = hold
        self._exchange: Exchange | None = None
        self._commands: queue.SimpleQueue[bytes | Exchange | None] = queue.SimpleQueue()
        self._over = False
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        # A lease that nobody gives back ends with the interpreter; a call is waited for if the thread that makes it is.
        daemon = True if hold is not None else None
        self._thread = threading.Thread(target=self._run, name="delegate_function call", daemon=daemon)

    def start(self) -> None:
        """Start the thread, and with it the process; an interrupt meanwhile leaves neither."""
        try:
            self._thread.start()
        except BaseException:
            self.close()
            raise

    def begin(self, exchange: Exchange) -> None:
        """Send a call; if it is not one of a lease's, start what serves it. Whoever is interrupted here cancels it.

        Raises:
            DelegateFunctionException: there is nobody to send it to: a LeaseEnded if there was.
        """
        exchange.conversation = self
        if self._hold is None:
            self.start()
        if not self._command(exchange):
            exchange.ended.set()
            raise self.ended()

    def ended(self) -> DelegateFunctionException:
        """Return why no more calls go this way."""
        if self.failure is None:
            return LeaseEnded("the lease is over: it was given back", where=self.where, reason="closed")
        if isinstance(self.failure, LeaseEnded) or not self.greeted.is_set():
            return self.failure
        error = LeaseEnded(f"the lease is over: {self.failure}", where=self.where, reason="lost")
        error.__cause__ = self.failure
        return error

    @property
    def job_id(self) -> str | None:
        """The number of the first hop's job, as soon as it is known, also while the job waits."""
        return self.process.number if isinstance(self.process, Job) else None

    @property
    def is_over(self) -> bool:
        """Say whether the process has ended, or is about to."""
        return self._over

    def say(self, frame: bytes) -> None:
        """Send a frame, unless nobody is there any more."""
        self._command(frame)

    def cancel(self, exchange: Exchange) -> None:
        """End a call: within a lease that has begun that alone, otherwise the process with all that hangs on it."""
        if exchange.ended.is_set():
            return
        try:
            if self._hold is not None and self.greeted.is_set():
                self.say(frames.encode(frames.CANCEL))
                exchange.ended.wait(_CANCELLED_S)
            else:
                when = "" if self.greeted.is_set() else " before it ran"
                exchange.events.put(CallCancelled(f"the call was cancelled{when}", where=self.where))
        finally:
            if not exchange.ended.is_set():
                self.close()

    def cancel_call(self) -> None:
        """End the call that is under way, if there is one."""
        if exchange := self._exchange:
            self.cancel(exchange)

    def close(self) -> None:
        """End the process and all that hangs on it; return when this has been done."""
        self._command(None)
        if self._thread.is_alive():  # after an interrupted start it may be yet to come, and obeys then
            self._thread.join()

    def give_back(self) -> None:
        """End a lease in which no call runs: its process and its job end by themselves."""
        self._command(_GIVE_BACK)
        self._thread.join()

    def _command(self, command: bytes | Exchange | None) -> bool:
        with self._lock:
            if self._over:
                return False
            self._commands.put(command)
            os.write(self._wake_write, b"!")
            return True

    def _run(self) -> None:
        try:
            self._talk()
        except frames.ProtocolError as error:
            self.failure = HopFailed(f"sent what does not belong there: {error}", where=self.where)
        except DelegateFunctionException as error:
            self.failure = error
        except Exception as error:
            self.failure = HopFailed(f"the call broke off: {error!r}", where=self.where)
        finally:
            try:
                if self.process:
                    self.process.kill()
            except Exception as error:
                self.failure = self.failure or HopFailed(f"could not be ended: {error}", where=self.where)
            with self._lock:
                self._over = True
                os.close(self._wake_read)
                os.close(self._wake_write)
            waiting = [self._exchange] if self._exchange else []
            while not self._commands.empty():
                command = self._commands.get()
                waiting += [command] if isinstance(command, Exchange) else []
            for exchange in waiting:
                exchange.events.put(self.failure or self.ended())
                exchange.ended.set()
            self.decided.set()

    def _talk(self) -> None:
        process = self.process = self._start()
        link, poller = process.link, frames.Poller()
        if self._hold is not None:
            link.send(frames.encode_json(frames.HOLD, self._hold))
        while True:
            keys_fd = None
            if self._exchange:
                self._exchange.send_payload(link)
                keys_fd = self._exchange.input_fd() if not link.pending else None
            reads = [link.read_fd, self._wake_read] + ([] if process.ended else [process.wake_fd])
            if keys_fd is not None:
                reads.append(keys_fd)
            ready = poller.wait(reads, [link.write_fd] if link.pending else [], [link])
            if process.wake_fd in ready and not process.ended:
                process.on_wake()
            if self._wake_read in ready and not self._obey(process):
                return
            if link.read_fd in ready and not self._hear(process):
                return
            if self._exchange and keys_fd in ready:
                self._exchange.send_keys(link)
            link.flush()
            link.beat()
            if link.closed or link.silent:
                raise hop.explain(process, self.where)

    def _obey(self, process: Process) -> bool:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return True
        while not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            if isinstance(command, Exchange):
                if self._exchange:  # what still comes of it would be taken for the next one's
                    self._commands.put(command)
                    text = "the lease is over: the call before was given up and did not end"
                    raise LeaseEnded(text, where=self.where, reason="lost")
                self._exchange, command = command, command.header
            process.link.send(command)
            if command is _GIVE_BACK:
                process.close()
                return False
        return True

    def _hear(self, process: Process) -> bool:
        for kind, content in process.link.receive():
            if kind == frames.HELLO and self._greet(process, frames.decode_json(content)):
                continue
            if kind == frames.OVER:
                process.close()
                said = frames.decode_json(content)
                text = f"the lease is over: {said.get('text')}"
                raise LeaseEnded(text, where=self.where, reason=str(said.get("reason")))
            if self._exchange is None:
                if kind == frames.ERROR:
                    process.close()
                    raise from_wire(frames.decode_json(content))
                continue  # it was under way when its call was cancelled
            if self._exchange.hear(kind, content):
                self._exchange.ended.set()
                self._exchange = None
                if self._hold is None:
                    process.close()  # the caller goes on meanwhile: Slurm takes 10 ms to end a job
                    return False
        return True

    def _greet(self, process: Process, greeting: dict[str, Any]) -> bool:
        """Take a hop's greeting; return whether it says only that a lease has begun."""
        if not self.greeted.is_set() or (self._exchange and greeting.get("hop") == self._exchange.number):
            self.where = str(greeting.get("where"))
            process.job_id = greeting.get("job")
            self.greeted.set()
            self.decided.set()
        return bool(greeting.get("lease"))
