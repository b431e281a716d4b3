"""The caller's side of a call: pack it, start the first hop, stream its output, and unpack what comes back.

One thread of its own talks with the first hop (and sends the beats), so that neither a slow `sys.stdout` nor a long
output holds a beat back; the thread that made the call writes the output and waits. Only Python code elsewhere in the
process that does not let go of the interpreter for 1.5 s can silence it.
"""

from __future__ import annotations

import base64
import codecs
import io
import os
import queue
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from delegate_function import __version__, files, frames, hop, inside, launch, remote, steps
from delegate_function.errors import (
    CallNotSent,
    DelegateFunctionException,
    HopFailed,
    NotOffered,
    RemoteError,
    RemoteTraceback,
    ResultNotReturned,
    from_wire,
)

_TAIL = 2000
_MAX_HOOK = 64 * 1024
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class CallInfo:
    """What is known of a call beyond its value.

    Attributes: `hops` (one dict for each hop's process: where, node, pid, job), `usage` (wall_s, user_s, system_s,
    peak_memory_mb), `node` (the fingerprint of the node where it ran), `container` (the sandbox's id), `job_id` (of the
    last Slurm job on the way), `seconds` (what the caller waited), `where` (the hop in which it ran).
    """

    def __init__(self) -> None:
        self.hops: list[dict[str, Any]] = []
        self.usage: dict[str, Any] = {}
        self.node: dict[str, Any] = {}
        self.container: str | None = None
        self.job_id: str | None = None
        self.seconds = 0.0
        self.where = "this process"

    def __repr__(self) -> str:
        return f"<call in {self.where}, {self.seconds:.3f} s, usage {self.usage}>"

    def greet(self, content: dict[str, Any]) -> None:
        """Take what a hop says of itself when it starts."""
        self.hops.append(content)
        self.where = str(content.get("where", self.where))
        if content.get("job"):
            self.job_id = str(content["job"])

    def inform(self, content: dict[str, Any]) -> None:
        """Take what a hop says when the call has ended."""
        self.where = str(content.get("where", self.where))
        self.usage = content.get("usage") or self.usage
        self.node = content.get("node") or self.node
        self.container = content.get("container") or self.container


class _Payload:
    """The call's pickle and its files, as parts and as the bytes that follow."""

    def __init__(self, call: bytes, inputs: Sequence[str], root: int) -> None:
        self.parts: list[dict[str, Any]] = [{"kind": "call", "size": len(call)}]
        self._call = call
        self._files: list[int] = []
        try:
            for path in inputs:
                fd, status = files.open_to_read(root, path)
                self._files.append(fd)
                self.parts.append(
                    {"kind": "input", "path": path, "size": status.st_size, "mode": status.st_mode & 0o777}
                )
        except files.FileError as error:
            self.close()
            raise CallNotSent(f"an input of the call cannot be read: {error}") from error
        total = sum(part["size"] for part in self.parts)
        if total > frames.MAX_TRANSFER:
            self.close()
            raise CallNotSent(f"the call has {total} bytes; at most {frames.MAX_TRANSFER} travel", size=total)

    def chunks(self) -> Iterator[memoryview | bytes]:
        """Yield the bytes of all parts in pieces that fit a frame."""
        call = memoryview(self._call)
        for start in range(0, len(call), frames.CHUNK):
            yield call[start : start + frames.CHUNK]
        for fd, part in zip(self._files, self.parts[1:], strict=True):
            left = part["size"]
            while left:
                piece = os.read(fd, min(left, frames.CHUNK)) or bytes(min(left, frames.CHUNK))
                left -= len(piece)
                yield piece

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())


class _Conversation:
    """The thread that talks with the first hop; what comes is put in `events`."""

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


class _Result:
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


class _Output:
    """What the call writes, on its way to `sys.stdout` or `sys.stderr` of the thread that waits."""

    def __init__(self) -> None:
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
            stream.write(text)
            stream.flush()

    def finish(self) -> None:
        """Write what is left of a character that never became complete."""
        for kind in self._decoders:
            self.write(kind, b"", final=True)

    @property
    def tail(self) -> str:
        """The last lines, without what a terminal would obey."""
        kept = "".join(c for c in self._tail if c in "\n\t" or c.isprintable())
        return "\n".join(kept.splitlines()[-20:])


def pack(
    obj: Any,
    method: str,
    arguments: Iterable[Any],
    keywords: dict[str, Any],
    packages: dict[str, str] | None = None,
) -> bytes:
    """Return the pickle of a call; note in `packages` the version of each package of which it names something."""
    import cloudpickle

    modules: set[str] = set()

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, candidate: Any) -> Any:
            reduced = super().reducer_override(candidate)
            if isinstance(candidate, types.ModuleType):
                modules.add(candidate.__name__)
            elif reduced is NotImplemented and isinstance(candidate, _NAMED):
                modules.add(str(candidate.__module__))  # it travels as its name
            return reduced

    buffer = io.BytesIO()
    try:
        Pickler(buffer, protocol=5).dump((obj, method, tuple(arguments), keywords))
    except Exception as error:
        raise CallNotSent(f"the call cannot be pickled: {type(error).__name__}: {error}") from error
    if packages is not None:
        by_value = {name.partition(".")[0] for name in cloudpickle.list_registry_pickle_by_value()}
        roots = {"cloudpickle", *(name.partition(".")[0] for name in modules)}  # what comes back needs cloudpickle
        known = {"__main__", "__mp_main__", __package__, *sys.stdlib_module_names, *by_value}
        for root in sorted(roots - known):
            if root in sys.modules and (version := inside.package_version(root)):
                packages[root] = version
    return buffer.getvalue()


def call(
    hops: list[dict[str, Any]],
    obj: Any,
    method: str,
    arguments: Iterable[Any],
    keywords: dict[str, Any],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    outputs: Iterable[str | os.PathLike[str]] = (),
    info: CallInfo,
    done: int = 0,
    directory: str | None = None,
    interactive: bool = False,
) -> Any:
    """Run `obj.method(*arguments, **keywords)` at the end of the hops and return its value.

    Args:
        hops: descriptions as the delegates give them, at least one.
        inputs, outputs: files, relative to the working directory, that go with the call and come back from it.
        info: is filled with what becomes known of the call.
        done: how many hops of the chain were taken in this process.
        directory: where the call runs, if that can be entered there; the working directory if it is not given.
        interactive: whether the call reads this process's standard input.

    Raises:
        what the method raised, with a RemoteTraceback as its cause, or a DelegateFunctionException.
    """
    started = time.monotonic()
    try:
        input_paths, output_paths = files.checked(inputs), files.checked(outputs)
    except files.FileError as error:
        raise CallNotSent(str(error)) from error
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    payload: _Payload | None = None
    result = _Result(output_paths, root)
    packages: dict[str, str] = {}
    try:
        payload = _Payload(pack(obj, method, arguments, keywords, packages), input_paths, root)
        spec = {
            "v": frames.VERSION,
            "version": __version__,
            "python": list(sys.version_info[:3]),
            "packages": packages,
            "hops": _encoded(hops),
            "hop": done,
            "of": done + steps.count(hops),
            "parts": payload.parts,
            "outputs": output_paths,
            "directory": directory or str(Path.cwd()),
            "path": [str(Path(entry).absolute()) for entry in sys.path],
            "interactive": interactive,
        }
        _travel(spec, payload, result, info)
        result.finish()
    except files.FileError as error:
        raise ResultNotReturned(f"an output of the call cannot be written: {error}") from error
    except frames.ProtocolError as error:
        raise HopFailed(f"sent what does not belong there: {error}", where=info.where) from error
    except DelegateFunctionException as error:
        error.call = info
        raise
    finally:
        result.discard()
        if payload is not None:
            payload.close()
        os.close(root)
        info.seconds = time.monotonic() - started
    return _unpack(result, obj, info)


def _encoded(hops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the hops as JSON can have them: hooks as pickles."""
    import cloudpickle

    encoded: list[dict[str, Any]] = []
    for step in hops:
        if step["type"] == steps.HOOK and step["call"] != steps.SHELL:
            try:
                packed = base64.b64encode(cloudpickle.dumps(step["call"], protocol=5)).decode()
            except Exception as error:
                raise CallNotSent(f"the debugging hook of {step['name']} cannot be pickled: {error}") from error
            if len(packed) > _MAX_HOOK:
                raise CallNotSent(f"the debugging hook of {step['name']} is larger than {_MAX_HOOK} bytes")
            step = {**step, "call": packed}
        encoded.append(step)
    return encoded


def _standard_input() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise NotOffered("interactive=True needs a terminal or a file as standard input; there is none here") from error


def _travel(spec: dict[str, Any], payload: _Payload, result: _Result, info: CallInfo) -> None:
    keys_fd = _standard_input() if spec["interactive"] else None
    first, *rest = spec["hops"]
    if first["type"] == "sandbox":
        # A sandbox is served by a hop's process; where none comes before it, one is started here.
        first = {"type": "subprocess"}
        spec = {**spec, "kind": first["type"]}
    else:
        spec = {**spec, "kind": first["type"], "hops": rest, "hop": spec["hop"] + 1}
    number = spec["hop"]
    header = frames.encode_json(frames.SPEC, spec)
    where = hop.describe(first["type"], number, spec["of"], remote.node(first))
    process = launch.start(first, where)
    assert isinstance(process, launch.Process)
    process.link.send(header)
    conversation = _Conversation(process, where, number, payload.chunks(), keys_fd)
    output = _Output()
    try:
        _consume(conversation, output, result, info)
    except BaseException:
        # Also Ctrl-C, and a stream that cannot be written: nobody waits for the call any more.
        conversation.cancel()
        raise
    conversation.join()


def _consume(conversation: _Conversation, output: _Output, result: _Result, info: CallInfo) -> None:
    while True:
        event = conversation.events.get()
        if isinstance(event, DelegateFunctionException):
            output.finish()
            event.output_tail = output.tail
            raise event
        kind, content = event
        if kind in (frames.OUT, frames.ERR):
            output.write(kind, content)
            conversation.used(kind, len(content))
        elif kind == frames.DATA:
            result.take(content)
            conversation.used(kind, len(content))
        elif kind == frames.RESULT:
            result.begin(frames.decode_json(content))
        elif kind == frames.HELLO:
            info.greet(frames.decode_json(content))
        elif kind == frames.INFO:
            info.inform(frames.decode_json(content))
        elif kind == frames.ERROR:
            output.finish()
            raise from_wire(frames.decode_json(content), output_tail=output.tail)
        elif kind == frames.END:
            output.finish()
            return


def _unpack(result: _Result, obj: Any, info: CallInfo) -> Any:
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
