"""The process in which a call runs: it opens the pickle, calls the method, sends the result, and ends.

In a sandbox it is started as `python3 -I -m delegate_function.inside [--import MODULE…]`: it connects to the agent's
socket, imports the modules if it is told to prepare itself, says that it is ready, and serves the one call whose
descriptors it is handed. Elsewhere a hop's process forks and serves the call with `serve`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from delegate_function import __version__, counters, data, files, frames, pickling, reporting, steps

SOCKET = "/run/cfiddle/sandbox.sock"
_TEXT_LIMIT = 10_000  # so that text and traceback fit a frame, even if JSON needs twelve bytes for each character
_PREPARE, _READY, _CALL, _RETURNED = b"p", b"r", b"c", b"e"  # between a sandbox's first process and the call's
_PICKLING = ("__getstate__", "__reduce__", "__reduce_ex__")


class Channel:
    """The last link of a call, seen from its end: blocking, without beats (the other side watches this process)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._sending = threading.Lock()
        self._decoder = frames.Decoder()
        self._waiting: list[tuple[bytes, bytes]] = []
        self._budget = frames.WINDOW
        self._payload = frames.Window(frames.PAYLOAD_STREAM)
        self.keys: list[bytes] = []
        os.set_blocking(fd, True)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def send(self, frame: bytes) -> None:
        """Write one frame."""
        view = memoryview(frame)
        with self._sending:
            while view:
                view = view[os.write(self._fd, view) :]

    def receive(self) -> tuple[bytes, bytes]:
        """Return the next frame; raise EOFError when the caller is gone."""
        while not self._waiting:
            self.pull()
        return self._waiting.pop(0)

    def pull(self) -> None:
        """Take what came, at least one byte: what is for standard input apart from the rest."""
        received = os.read(self._fd, frames.MAX_FRAME)
        if not received:
            raise EOFError("the caller is gone")
        self._decoder.feed(received)
        for kind, content in self._decoder:
            if kind == frames.KEYS:
                self.keys.append(content)
            else:
                self._waiting.append((kind, content))

    def receive_data(self, size: int) -> Iterator[bytes]:
        """Yield the next `size` bytes of the payload as they come."""
        while size:
            kind, content = self.receive()
            if kind == frames.CREDIT:
                self._take_credit(content)
                continue
            if kind != frames.DATA or len(content) > size:
                raise frames.ProtocolError(f"unexpected frame {kind!r} in the payload")
            size -= len(content)
            if credit := self._payload.used(len(content)):
                self.send(credit)
            yield content

    def send_data(self, content: bytes | memoryview) -> None:
        """Send bytes of the result, as far as the caller uses them up."""
        view = memoryview(content)
        while view:
            while not self._budget:
                kind, content = self.receive()
                if kind == frames.CREDIT:
                    self._take_credit(content)
            piece = view[: min(frames.CHUNK, self._budget)]
            self._budget -= len(piece)
            self.send(frames.encode(frames.DATA, piece))
            view = view[len(piece) :]

    def _take_credit(self, content: bytes) -> None:
        stream, count = frames.decode_credit(content)
        if stream == frames.RESULT_STREAM:
            self._budget += count


class _Input:
    """Standard input that the caller feeds, while something runs that may read it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        read_fd, self._write_fd = os.pipe()
        os.dup2(read_fd, 0)
        os.close(read_fd)
        os.set_blocking(self._write_fd, False)

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Feed it until this context is left."""
        stop_read, stop_write = os.pipe()
        thread = threading.Thread(target=self._feed, args=(stop_read,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.close(stop_write)
            thread.join()
            os.close(stop_read)

    def _feed(self, stop_fd: int) -> None:
        keys = self._channel.keys
        while True:
            writes = [self._write_fd] if keys and self._write_fd >= 0 else []
            ready, writable, _ = select.select([self._channel.fileno(), stop_fd], writes, [])
            if stop_fd in ready:
                return
            if ready:
                try:
                    self._channel.pull()
                except (EOFError, OSError, frames.ProtocolError):
                    return  # what started this process ends it
            if writable:
                self._write(keys)

    def _write(self, keys: list[bytes]) -> None:
        try:
            written = os.write(self._write_fd, keys[0]) if keys[0] else 0
        except BlockingIOError:
            return
        except OSError:
            written = 0
            keys[:] = [b""]  # nobody reads it any more
        keys[0] = keys[0][written:]
        if written:
            self._channel.send(frames.encode_credit(frames.INPUT_STREAM, written))
        else:
            os.close(self._write_fd)
            self._write_fd = -1
        if not keys[0]:
            del keys[0]


class _Failure(Exception):
    """The call cannot be served; `code` is that of the exception that the caller sees."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Part:
    """A part of the result: bytes in memory, in pieces that lie where they are, or a file."""

    def __init__(self, header: dict[str, Any], pieces: Sequence[memoryview] = (), fd: int = -1) -> None:
        self.header = header
        self._pieces = pieces
        self._fd = fd

    def send(self, channel: Channel) -> None:
        """Send the bytes that the header announced."""
        for kept in self._pieces:
            channel.send_data(kept)
        if self._fd < 0:
            return
        left = int(self.header["size"])
        while left:
            piece = os.read(self._fd, min(left, frames.CHUNK))
            # A file that shrinks while it is read is filled with zeros: its size is announced already.
            channel.send_data(piece or bytes(min(left, frames.CHUNK)))
            left -= len(piece) or min(left, frames.CHUNK)
        os.close(self._fd)


def serve(
    channel_fd: int,
    out_fd: int,
    err_fd: int,
    spec: dict[str, Any] | None = None,
    on_return: Callable[[], object] = lambda: None,
) -> NoReturn:
    """Serve one call over the channel with its output to the two descriptors, and end this process.

    Args:
        spec: the call's header where it was read already; otherwise it comes over the channel first.
        on_return: is called when all that comes of the call has been sent, and nothing is left but to end.
    """
    _take_output(out_fd, err_fd)
    channel = Channel(channel_fd)
    try:
        if spec is None:
            kind, content = channel.receive()
            if kind != frames.SPEC:
                raise frames.ProtocolError(f"unexpected frame {kind!r} at the start")
            spec = frames.decode_json(content)
        _Server(channel, spec).run()
        on_return()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        _flush()
        os._exit(1)
    os._exit(0)


def _take_output(out_fd: int, err_fd: int) -> None:
    for fd, target in ((out_fd, 1), (err_fd, 2)):
        if fd != target:
            os.dup2(fd, target)
            os.close(fd)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = open(fd, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
        setattr(sys, name, stream)
    _line_buffer_c_output()


def _line_buffer_c_output() -> None:
    """Let C and C++ code's output appear line by line too (into a pipe it would come at the end)."""
    import ctypes

    libc = ctypes.CDLL(None)
    with contextlib.suppress(ValueError):
        libc.setvbuf(ctypes.c_void_p.in_dll(libc, "stdout"), None, 1, 4096)  # 1: _IOLBF


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    import ctypes

    ctypes.CDLL(None).fflush(None)


class _Server:
    """One call at its end."""

    def __init__(self, channel: Channel, spec: dict[str, Any]) -> None:
        self._channel = channel
        self._spec = spec
        self._outputs = [str(path) for path in spec.get("outputs", ())]
        self._directory = ""
        self._error: dict[str, Any] | None = None
        self._attributes: frozenset[str] = frozenset()
        self._as_data = spec.get("results") == data.DATA
        self._input = _Input(channel) if spec.get("interactive") else None

    def run(self) -> None:
        """Receive, call, and send the result."""
        header: dict[str, Any] = {"python": list(sys.version_info[:3])}
        parts: list[_Part] = []
        try:
            self._check_versions()
            self._enter_directory()
            with self._input.flowing() if self._input else contextlib.nullcontext():
                self._take_steps()
            if not self._error and not self._spec.get("hook"):
                parts = self._call(self._receive())
                parts += self._output_parts()
            total = sum(int(part.header["size"]) for part in parts)
            if total > frames.MAX_TRANSFER:
                raise _Failure("not-returned", f"the result has {total} bytes; at most {frames.MAX_TRANSFER} travel")
        except (_Failure, files.FileError) as failure:
            code = failure.code if isinstance(failure, _Failure) else "not-returned"
            self._error = {"failure": code, "text": str(failure)}
            parts = []
        if self._error:
            header["error"] = self._error
        header["parts"] = [part.header for part in parts]
        _flush()
        self._channel.send(frames.encode_json(frames.RESULT, header))
        for part in parts:
            part.send(self._channel)
        if self._directory:
            os.chdir("/")
            shutil.rmtree(self._directory, ignore_errors=True)
        self._channel.send(frames.encode(frames.END))

    def _check_versions(self) -> None:
        theirs = tuple(self._spec.get("python", ())[:2])
        ours = sys.version_info[:2]
        caller = (self._spec.get("version"), self._spec.get("v"))
        if caller != (__version__, frames.VERSION):
            raise _Failure(
                "version",
                f"the caller has delegate_function {caller[0]} (frames {caller[1]}), here it is {__version__} (frames "
                f"{frames.VERSION})",
            )
        if theirs != ours:
            raise _Failure(
                "version",
                f"the caller runs Python {'.'.join(map(str, theirs))}, here it is {'.'.join(map(str, ours))}; "
                "compiled functions do not travel between them",
            )

    def _check_packages(self) -> None:
        """Compare the packages whose names stand in the call's pickle with those here."""
        if self._spec.get("hook"):
            return  # the call itself runs elsewhere
        differing = [
            f"{name} {theirs} (here {ours or 'it cannot be imported'})"
            for name, theirs in self._spec.get("packages", {}).items()
            if theirs != (ours := package_version(name))
        ]
        if differing:
            raise _Failure("version", f"packages of the caller's differ from those here: {', '.join(differing)}")

    def _enter_directory(self) -> None:
        """Go where the call runs: a new directory if files travel with it or nothing says where else."""
        directory = self._spec.get("directory")
        if directory is not None and not self._outputs and not self._inputs():
            with contextlib.suppress(OSError):
                os.chdir(directory)
                self._extend_path()
                self._check_packages()
                return
        self._make_directory()
        self._extend_path()
        self._check_packages()

    def _make_directory(self) -> None:
        self._directory = self._spec.get("temporary") or tempfile.mkdtemp(prefix="call-")
        os.chdir(self._directory)

    def _take_steps(self) -> None:
        """Take the last steps of the chain, which need no process of their own."""
        for step in self._spec["hops"]:
            if step["type"] == steps.DIRECTORY and not self._directory:
                self._make_directory()
            elif step["type"] == steps.HOOK:
                try:
                    if step["call"] != steps.SHELL:
                        import base64

                        step["call"] = pickle.loads(base64.b64decode(step["call"]))
                    steps.run_hook(step)
                except BaseException as error:
                    raised = self._error = _described(error)
                    text = f"the debugging hook of {step['name']} raised {raised['type']}: {raised['text']}"
                    raised.update(failure="remote", text=text)
                    return

    def _extend_path(self) -> None:
        """Find the modules that the caller finds, where this is a process of the caller's on a shared disk."""
        for entry in self._spec.get("path", ()):
            if entry not in sys.path and os.path.exists(entry):
                sys.path.append(entry)

    def _inputs(self) -> list[dict[str, Any]]:
        return [part for part in self._spec["parts"] if part["kind"] == "input"]

    def _receive(self) -> bytearray:
        call = bytearray()
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for part in self._spec["parts"]:
                pieces = self._channel.receive_data(int(part["size"]))
                if part["kind"] == "call":
                    for piece in pieces:
                        call += piece
                    continue
                [path] = files.checked([part["path"]])
                try:
                    new = files.NewFile(root, path, int(part["mode"]))
                    for piece in pieces:
                        new.write(piece)
                    new.commit()
                except files.FileError as error:
                    raise _Failure("not-sent", f"a file of the call cannot be written there: {error}") from error
        finally:
            os.close(root)
        return call

    def _call(self, call: bytearray) -> list[_Part]:
        """Open the pickle, call the method, pack what came of it."""
        try:
            obj, method, arguments, keywords = pickling.loads(call, None)
        except BaseException as error:
            self._error = _described(error)
            self._error["text"] = f"the call could not be unpickled: {self._error['type']}: {self._error['text']}"
            self._error["failure"] = "remote"
            return []
        self._attributes = frozenset(_attributes(obj) or ())
        try:
            flowing = self._input.flowing() if self._input else contextlib.nullcontext()
            with flowing, reporting.through(self._channel.send):
                value = getattr(obj, method)(*arguments, **keywords)
            del arguments, keywords
        except BaseException as error:
            self._error = _described(error)
            if self._as_data:
                return []
            # The state goes back after an exception too, where it can: what the method did until then is done.
            parts = [self._exception(error)]
            with contextlib.suppress(Exception):
                parts += self._state(obj)
            return [part for part in parts if part.header["size"]]
        try:
            if self._as_data:
                return [_Part({"kind": part.kind, "size": part.size}, part.pieces) for part in data.encode(value)]
            return [self._part("value", value, obj), *self._state(obj)]
        except data.NotData as error:
            raise _Failure("not-returned", str(error)) from error
        except Exception as error:
            self._error = _described(error)
            verb = "sent as data" if self._as_data else "pickled"
            self._error["text"] = f"the result cannot be {verb}: {self._error['type']}: {self._error['text']}"
            self._error["failure"] = "not-returned"
            return []

    def _part(self, kind: str, value: Any, obj: Any) -> _Part:
        pieces = pickling.dumps(value, obj)
        return _Part({"kind": kind, "size": sum(map(len, pieces))}, pieces)

    def _state(self, obj: Any) -> list[_Part]:
        """Return the object's state, and which of its attributes are gone."""
        state = _attributes(obj)
        if state is None:
            return []
        removed = sorted(self._attributes - state.keys())
        kind = type(obj)
        if all(getattr(kind, name) is getattr(object, name) for name in _PICKLING):
            return [self._part("state", (state, removed), obj)]
        # The class says itself what of an object travels, so the object does.
        return [self._part("state", (obj, removed), None)]

    def _exception(self, error: BaseException) -> _Part:
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                return self._part("exception", error, None)
        return _Part({"kind": "exception", "size": 0})

    def _output_parts(self) -> list[_Part]:
        """Return the files that were named and are there; a missing one is an error if the method returned."""
        parts: list[_Part] = []
        root = os.open(self._directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            for path in files.checked(self._outputs):
                try:
                    fd, status = files.open_to_read(root, path)
                except files.FileError:
                    if self._error is None:
                        raise
                    continue
                header = {"kind": "output", "path": path, "size": status.st_size, "mode": status.st_mode & 0o777}
                parts.append(_Part(header, fd=fd))
        finally:
            os.close(root)
        return parts


def _attributes(obj: Any) -> dict[str, Any] | None:
    """Return the attributes of an object that has a state of its own, which modules and functions have not."""
    state = getattr(obj, "__dict__", None)
    if not isinstance(state, dict) or isinstance(obj, types.ModuleType | types.FunctionType):
        return None
    return state


def _described(error: BaseException) -> dict[str, Any]:
    kind = type(error)
    try:
        text = str(error)
    except Exception:
        text = "(its text cannot be had)"
    # The first frame is this module's own.
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    lines = "".join(traceback.format_exception(kind, error, trace))
    return {
        "type": kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}",
        "text": text[:_TEXT_LIMIT],
        "traceback": lines[-_TEXT_LIMIT:],
    }


@functools.cache
def package_version(name: str) -> str | None:
    """Return a package's version as it says itself, else as its installation does; nothing for none of either."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what a package says of itself is no news to the caller
            version = getattr(importlib.import_module(name), "__version__", None)
    except Exception:
        return None
    if isinstance(version, str):
        return version
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> NoReturn:
    """Wait in a sandbox for its one call, and let a child of this process serve it.

    This process is the sandbox's first: when it ends, the kernel ends all others. It outlives the call, so that the
    agent can still look at what was used, and ends when the agent closes the connection or is gone. The child is there
    before the call is, with all that is imported, so that the call waits for no fork and its memory is its own.
    """
    modules = [name for option, name in zip(arguments[::2], arguments[1::2], strict=False) if option == "--import"]
    if len(modules) * 2 != len(arguments):
        sys.exit("usage: python3 -I -m delegate_function.inside [--import MODULE]…")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _wait_for_call(theirs, modules)
    theirs.close()
    _protect()
    agent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.connect(SOCKET)
    _say(agent, "connected", counters=counters.error())
    while True:
        ready, _, _ = select.select([agent, ours], [], [])
        if ours in ready:
            if not ours.recv(1):
                _, status = os.waitpid(child, 0)
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF or 1)
            _say(agent, "ready")
        if agent in ready:
            message, descriptors, _, _ = socket.recv_fds(agent, 65536, 3)
            if not message:
                os._exit(1)
            asked = json.loads(message).get("type")
            if asked == "call" and len(descriptors) == 3:
                break
            if asked != "prepare":
                sys.exit("the agent sent no call")
            ours.send(_PREPARE)
    socket.send_fds(ours, [_CALL], descriptors)
    for fd in descriptors:
        os.close(fd)
    _supervise(child, ours, agent)


def _say(agent: socket.socket, what: str, **more: Any) -> None:
    agent.send(json.dumps({"type": what, **more}).encode())


def _wait_for_call(first: socket.socket, modules: list[str]) -> NoReturn:
    """Do what the first process says: prepare, as far as the call leaves time for that; and serve the call."""
    while True:
        asked, descriptors, _, _ = socket.recv_fds(first, 1, 3)
        if asked == _PREPARE:
            if _prepare(modules, until=first):
                first.send(_READY)
        elif asked == _CALL and len(descriptors) == 3:
            serve(descriptors[0], descriptors[1], descriptors[2], on_return=lambda: _end_unnoticed(first))
        else:
            os._exit(1)


def _prepare(modules: list[str], *, until: socket.socket) -> bool:
    """Import what calls need; return whether that was all done, or else the call came."""
    gc.disable()  # imports make much and throw away little: to look for that took a fifth of their time
    for module in ("cloudpickle", "ctypes", *modules):
        if select.select([until], [], [], 0)[0]:
            break
        importlib.import_module(module)
        package_version(module.partition(".")[0])
    gc.freeze()
    gc.enable()
    return not select.select([until], [], [], 0)[0]


def _end_unnoticed(first: socket.socket) -> None:
    """Say that the call has returned, and let the rest wait for others.

    To take down a process that has imported cfiddle takes the kernel 15 ms. Nobody waits for that.
    """
    with contextlib.suppress(OSError):
        first.send(_RETURNED)
        os.nice(19)


def _protect() -> None:
    """Let nobody take the agent's connection out of this process."""
    import ctypes

    ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE


def _supervise(child: int, ours: socket.socket, agent: socket.socket) -> NoReturn:
    """Reap processes, tell the agent that the call has returned and how the child ended; end when the agent says so."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    watched = [wake_read, agent.fileno(), ours.fileno()]
    while True:
        for status in _reap(child):
            _say(agent, "done", status=status)
        ready, _, _ = select.select(watched, [], [])
        if agent.fileno() in ready:
            os._exit(0)
        if ours.fileno() in ready:
            said = ours.recv(1)
            if said == _RETURNED:
                _say(agent, "returned")
            if said != _READY:  # which had crossed the call
                watched.remove(ours.fileno())
        with contextlib.suppress(BlockingIOError):
            os.read(wake_read, 4096)


def _reap(child: int) -> Iterator[int]:
    """Reap all processes that ended; yield the child's status, negative for the signal that killed it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == child:
            yield os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(sys.argv[1:])
