"""Take what comes back of a call: its output as it is written, then its result."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from delegate_function import files, frames, inside
from delegate_function.callinfo import CallInfo
from delegate_function.errors import (
    RemoteError,
    RemoteTraceback,
    ResultNotReturned,
    from_wire,
)

_TAIL = 2000


class Result:
    """The result as it comes: its header, the bytes of its parts, files beside their names."""

    def __init__(self, outputs: Sequence[str], root: int) -> None:
        self.error: dict[str, Any] | None = None
        self.pickles: dict[str, bytearray] = {}
        self._outputs = outputs
        self._root = root
        self._files: list[files.NewFile] = []
        self._sinks: list[tuple[int, Callable[[bytes], object]]] = []

    def begin(self, header: dict[str, Any]) -> None:
        """Take the header; raise ProtocolError for a part that nobody asked for."""
        error = header.get("error")
        self.error = error if isinstance(error, dict) else None
        total = 0
        for part in header.get("parts", ()):
            kind, size = part.get("kind"), part.get("size")
            if not isinstance(size, int) or size < 0:
                raise frames.ProtocolError("a part of the result without a size")
            total += size
            if kind in ("value", "state", "exception") and kind not in self.pickles:
                sink = self.pickles[kind] = bytearray()
                self._sinks.append((size, sink.extend))
            elif kind == "output" and part.get("path") in self._outputs:
                new = files.NewFile(self._root, part["path"], int(part.get("mode", 0o644)))
                self._files.append(new)
                self._sinks.append((size, new.write))
            else:
                raise frames.ProtocolError(f"a part of the result that was not asked for: {kind!r}")
        if total > frames.MAX_TRANSFER:
            raise ResultNotReturned(f"the result has {total} bytes; at most {frames.MAX_TRANSFER} travel", size=total)
        self._skip_complete()

    def take(self, data: bytes) -> None:
        """Take bytes of the parts."""
        while data:
            if not self._sinks:
                raise frames.ProtocolError("more bytes than the result was said to have")
            left, sink = self._sinks[0]
            sink(data[:left])
            self._sinks[0] = (left - len(data[:left]), sink)
            data = data[left:]
            self._skip_complete()

    def _skip_complete(self) -> None:
        while self._sinks and self._sinks[0][0] == 0:
            del self._sinks[0]

    def finish(self) -> None:
        """Give the files their names, once all has come."""
        if self._sinks:
            raise frames.ProtocolError("a result that ends early")
        while self._files:
            self._files.pop(0).commit()

    def discard(self) -> None:
        """Take unfinished files away."""
        while self._files:
            self._files.pop().discard()


def tail(text: str) -> str:
    """Return the last lines of a text, without what a terminal would obey."""
    kept = "".join(c for c in text[-_TAIL:] if c in "\n\t" or c.isprintable())
    return "\n".join(kept.splitlines()[-20:])


class Output:
    """What the call writes, on its way to `sys.stdout` or `sys.stderr` of the thread that waits.

    `before` is told of each text before it is written.
    """

    def __init__(self, before: Callable[[str], None] = lambda text: None) -> None:
        self._before = before
        self._decoders = {
            kind: codecs.getincrementaldecoder("utf-8")(errors="replace") for kind in (frames.OUT, frames.ERR)
        }
        self._tail = ""

    def write(self, kind: bytes, data: bytes, *, final: bool = False) -> None:
        """Write bytes as text to the stream that has the name now (a notebook exchanges it)."""
        text = self._decoders[kind].decode(data, final)
        if not text:
            return
        stream: TextIO | None = sys.stdout if kind == frames.OUT else sys.stderr
        self._tail = (self._tail + text)[-_TAIL:]
        if stream is not None:
            self._before(text)
            stream.write(text)
            stream.flush()

    def finish(self) -> None:
        """Write what is left of a character that never became complete."""
        for kind in self._decoders:
            self.write(kind, b"", final=True)

    @property
    def tail(self) -> str:
        """The last lines, without what a terminal would obey."""
        return tail(self._tail)


def unpack(result: Result, obj: Any, info: CallInfo) -> Any:
    error = result.error
    try:
        if "state" in result.pickles:
            state, removed = inside.loads(result.pickles["state"], obj)
            vars(obj).update(state if isinstance(state, dict) else vars(state))
            for name in removed:
                vars(obj).pop(name, None)
        if error is None:
            return inside.loads(result.pickles["value"], obj)
    except Exception as failure:
        raise ResultNotReturned(
            f"the result cannot be unpickled here: {type(failure).__name__}: {failure}", where=info.where
        ) from failure
    remote = RemoteTraceback(info.where, str(error.get("traceback", "")))
    cause = remote if remote.text else None
    if error.get("failure"):
        known = {"code": error["failure"], "message": str(error.get("text")), "where": info.where}
        failed = from_wire(known)
        failed.call = info
        raise failed from cause
    if "exception" in result.pickles:
        try:
            exception = inside.loads(result.pickles["exception"], None)
        except Exception:
            exception = None  # its class cannot be made here: its text comes instead
        if isinstance(exception, Exception):
            raise exception from cause
    told = RemoteError(f"{error.get('type')}: {error.get('text')}", where=info.where, type=str(error.get("type")))
    told.call = info
    raise told from cause
