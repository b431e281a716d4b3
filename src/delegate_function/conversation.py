"""The thread that talks with a call's first hop.

It sends the beats, so that neither a slow `sys.stdout` nor a long output holds one back; the thread that made the call
writes the output and waits. Only Python code elsewhere in the process that does not let go of the interpreter for 1.5 s
can silence it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator

from delegate_function import frames, hop, launch
from delegate_function.errors import DelegateFunctionException, HopFailed


class Conversation:
    """One call's talk with its first hop; what comes is put in `events`."""

    def __init__(
        self,
        process: launch.Process,
        where: str,
        number: int,
        chunks: Iterator[memoryview | bytes],
        keys_fd: int | None,
    ) -> None:
        self.events: queue.SimpleQueue[tuple[bytes, bytes] | DelegateFunctionException] = queue.SimpleQueue()
        self._process = process
        self._where = where
        self._number = number
        self._chunks = chunks
        self._budget = frames.WINDOW
        self._keys_fd = keys_fd
        self._keys_budget = frames.WINDOW
        self._output = frames.Window(frames.OUTPUT_STREAM)
        self._result = frames.Window(frames.RESULT_STREAM)
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._over = False
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._thread = threading.Thread(target=self._run, name="delegate_function call")
        self._thread.start()

    def used(self, kind: bytes, count: int) -> None:
        """Say that output or bytes of the result were used up."""
        window = self._result if kind == frames.DATA else self._output
        if credit := window.used(count):
            self._command(credit)

    def cancel(self) -> None:
        """End the call and all that hangs on it; return when this has been done."""
        self._command(None)
        self._thread.join()

    def join(self) -> None:
        """Wait for the first hop's process to end."""
        self._thread.join()

    def _command(self, command: bytes | None) -> None:
        self._commands.put(command)
        with self._lock:
            if not self._over:
                os.write(self._wake_write, b"!")

    def _run(self) -> None:
        try:
            self._talk()
        except frames.ProtocolError as error:
            self._fail(HopFailed(f"sent what does not belong there: {error}", where=self._where))
        except DelegateFunctionException as error:
            self._fail(error)
        except Exception as error:
            self._fail(HopFailed(f"the call broke off: {error!r}", where=self._where))
        finally:
            self._process.kill()
            with self._lock:
                self._over = True
                os.close(self._wake_read)
                os.close(self._wake_write)

    def _fail(self, error: DelegateFunctionException) -> None:
        self.events.put(error)

    def _talk(self) -> None:
        link, poller = self._process.link, frames.Poller()
        while True:
            self._send_payload()
            reads = [link.read_fd, self._wake_read] + ([] if self._process.ended else [self._process.wake_fd])
            if self._keys_fd is not None and self._keys_budget >= frames.CHUNK and not link.pending:
                reads.append(self._keys_fd)
            ready = poller.wait(reads, [link.write_fd] if link.pending else [], [link])
            if self._process.wake_fd in ready and not self._process.ended:
                self._process.on_wake()
            if self._wake_read in ready and not self._obey():
                return
            if link.read_fd in ready and not self._hear():
                return
            if self._keys_fd in ready:
                self._send_keys()
            link.flush()
            link.beat()
            if link.closed or link.silent:
                raise hop.explain(self._process, self._where)

    def _send_payload(self) -> None:
        link = self._process.link
        while self._budget >= frames.CHUNK and not link.pending:
            piece = next(self._chunks, None)
            if piece is None:
                return
            self._budget -= len(piece)
            link.send(frames.encode(frames.DATA, piece))

    def _send_keys(self) -> None:
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
        self._process.link.send(frames.encode(frames.KEYS, keys))

    def _obey(self) -> bool:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return True
        while not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            self._process.link.send(command)
        return True

    def _hear(self) -> bool:
        for kind, content in self._process.link.receive():
            if kind == frames.CREDIT:
                stream, count = frames.decode_credit(content)
                if stream == frames.PAYLOAD_STREAM:
                    self._budget += count
                elif stream == frames.INPUT_STREAM:
                    self._keys_budget += count
                continue
            if kind == frames.HELLO:
                greeting = frames.decode_json(content)
                if greeting.get("hop") == self._number:
                    self._where = str(greeting.get("where"))
                    self._process.job_id = greeting.get("job")
            elif kind in (frames.OUT, frames.ERR):
                self._output.arrived(len(content))
            elif kind == frames.DATA:
                self._result.arrived(len(content))
            elif kind not in (frames.RESULT, frames.INFO, frames.ERROR, frames.END):
                raise frames.ProtocolError(f"unexpected frame {kind!r}")
            self.events.put((kind, content))
            if kind in (frames.END, frames.ERROR):
                self._process.close()
                return False
        return True
