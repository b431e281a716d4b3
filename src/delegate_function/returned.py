"""Take what comes back of a call: its output as it is written, then its result."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from delegate_function import data, files, frames, pickling, terminal
from delegate_function.callinfo import CallInfo
from delegate_function.errors import (
    DelegateFunctionException,
    HopFailed,
    RemoteError,
    RemoteTraceback,
    ResultNotReturned,
    from_wire,
)

_TAIL = 2000
_PICKLES = ("value", "state", "exception")
_PARTS = (data.DOCUMENT, data.ARRAY, data.TEXT, data.BYTES)
_FAILURES = ("not-returned", "not-sent", "remote", "version")
_NAME, _TEXT = 200, 10_000


class Result:
    """The result as it comes: its header, the bytes of its parts, files beside their names.

    What was asked for as data may come from code that nobody trusts: nothing of it is opened as a pickle.
    """

    def __init__(self, outputs: Sequence[str], root: int, results: str = data.PICKLE) -> None:
        self.error: dict[str, Any] | None = None
        self.pickles: dict[str, bytearray] = {}
        self.data: list[tuple[str, bytearray]] = []
        self.as_data = results == data.DATA
        self._begun = False
        self._outputs = set(outputs)
        self._root = root
        self._files: list[files.NewFile] = []
        self._sinks: list[tuple[int, Callable[[bytes], object]]] = []

    def begin(self, header: dict[str, Any]) -> None:
        """Take the header; raise ProtocolError for a part that nobody asked for."""
        if self._begun:
            raise frames.ProtocolError("a second result")
        self._begun = True
        error, parts = header.get("error"), header.get("parts")
        self.error = error if isinstance(error, dict) else None
        if not isinstance(parts, list):
            raise frames.ProtocolError("a result without parts")
        total = 0
        for part in parts:
            size = part.get("size") if isinstance(part, dict) else None
            if not isinstance(size, int) or size < 0:
                raise frames.ProtocolError("a part of the result without a size")
            total += size
            self._sinks.append((size, self._sink(part, size)))
        if total > frames.MAX_TRANSFER:
            raise ResultNotReturned(f"the result has {total} bytes; at most {frames.MAX_TRANSFER} travel", size=total)
        self._skip_complete()

    def _sink(self, part: dict[str, Any], size: int) -> Callable[[bytes], object]:
        kind, path, mode = part.get("kind"), part.get("path"), part.get("mode")
        sink = bytearray()
        if kind in _PICKLES and not self.as_data and kind not in self.pickles:
            self.pickles[kind] = sink
        elif kind in _PARTS and self.as_data and not self.error and len(self.data) < data.MAX_PARTS:
            if kind == data.DOCUMENT and (self.data or size > data.MAX_DOCUMENT):
                raise frames.ProtocolError("a second document, or one that is too long")
            self.data.append((kind, sink))
        elif kind == "output" and isinstance(path, str) and path in self._outputs and isinstance(mode, int):
            self._outputs.remove(path)
            new = files.NewFile(self._root, path, mode & 0o777)
            self._files.append(new)
            return new.write
        else:
            raise frames.ProtocolError(f"a part of the result that was not asked for: {str(kind)[:_NAME]!r}")
        return sink.extend

    def take(self, content: bytes) -> None:
        """Take bytes of the parts."""
        while content:
            if not self._sinks:
                raise frames.ProtocolError("more bytes than the result was said to have")
            left, sink = self._sinks[0]
            sink(content[:left])
            self._sinks[0] = (left - len(content[:left]), sink)
            content = content[left:]
            self._skip_complete()

    def _skip_complete(self) -> None:
        while self._sinks and self._sinks[0][0] == 0:
            del self._sinks[0]

    def finish(self) -> None:
        """Give the files their names, once all has come."""
        if self._sinks or not self._begun:
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

    Args:
        before: is told of each text before it is written.
        clean: whether a terminal shall obey nothing of it.
    """

    def __init__(self, before: Callable[[str], None] = lambda text: None, *, clean: bool = False) -> None:
        self._before = before
        self._decoders = {
            kind: codecs.getincrementaldecoder("utf-8")(errors="replace") for kind in (frames.OUT, frames.ERR)
        }
        self._cleaners = {kind: terminal.Cleaner() for kind in self._decoders} if clean else {}
        self._tail = ""

    def write(self, kind: bytes, content: bytes, *, final: bool = False) -> None:
        """Write bytes as text to the stream that has the name now (a notebook exchanges it)."""
        text = self._decoders[kind].decode(content, final)
        if self._cleaners:
            text = self._cleaners[kind](text, final=final)
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
    """Return the value of a result, or raise its exception; bring the object up to date, unless it came as data."""
    if result.as_data:
        return _unpack_data(result, info)
    error = result.error
    try:
        if "state" in result.pickles:
            state, removed = pickling.loads(result.pickles["state"], obj)
            vars(obj).update(state if isinstance(state, dict) else vars(state))
            for name in removed:
                vars(obj).pop(name, None)
        if error is None:
            return pickling.loads(result.pickles["value"], obj)
    except Exception as failure:
        raise ResultNotReturned(
            f"the result cannot be unpickled here: {type(failure).__name__}: {failure}", where=info.where
        ) from failure
    if "exception" in result.pickles and not error.get("failure"):
        try:
            exception = pickling.loads(result.pickles["exception"], None)
        except Exception:
            exception = None  # its class cannot be made here: its text comes instead
        if isinstance(exception, Exception):
            raise exception from _traceback(error, info)
    raise _told(error, info) from _traceback(error, info)


def _unpack_data(result: Result, info: CallInfo) -> Any:
    if result.error is not None:
        error = {
            name: terminal.clean(str(text), limit=_NAME if name == "type" else _TEXT)
            for name, text in result.error.items()
            if name in ("failure", "text", "traceback", "type")
        }
        raise _told(error, info) from _traceback(error, info)
    try:
        return data.decode(result.data)
    except frames.ProtocolError as error:
        raise _out_of_place(str(error), info) from error
    except ImportError as error:
        raise ResultNotReturned(f"the result needs {error.name}, which cannot be imported here") from error


def _traceback(error: dict[str, Any], info: CallInfo) -> RemoteTraceback | None:
    text = str(error.get("traceback", ""))
    return RemoteTraceback(info.where, text) if text else None


def _told(error: dict[str, Any], info: CallInfo) -> DelegateFunctionException:
    """Return the exception for an error that comes as text."""
    failure, kind, text = error.get("failure"), str(error.get("type")), str(error.get("text"))
    if failure and failure not in _FAILURES:
        return _out_of_place("a failure that is not the call's to tell", info)
    if failure:
        told = from_wire({"code": failure, "message": text, "where": info.where})
    else:
        told = RemoteError(f"{kind}: {text}", where=info.where, type=kind)
    told.call = info
    return told


def _out_of_place(text: str, info: CallInfo) -> HopFailed:
    error = HopFailed(f"sent what does not belong there: {terminal.clean(text)}", where=info.where)
    error.call = info
    return error
