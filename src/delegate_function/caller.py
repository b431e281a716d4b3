"""The caller's side of a call: pack it, start the first hop, stream its output, and unpack what comes back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from delegate_function import __version__, data, files, frames, hop, processes, remote, steps, terminal
from delegate_function.callinfo import CallInfo
from delegate_function.conversation import Conversation, Exchange
from delegate_function.errors import (
    CallNotSent,
    DelegateFunctionException,
    HopFailed,
    NotOffered,
    ResultNotReturned,
    from_wire,
)
from delegate_function.packing import Payload, encoded, pack
from delegate_function.returned import Output, Result, unpack
from delegate_function.waiting import Display


def call(
    hops: list[dict[str, Any]],
    obj: Any,
    method: str,
    arguments: Iterable[Any],
    keywords: dict[str, Any],
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    outputs: Iterable[str | os.PathLike[str]] = (),
    results: str = data.PICKLE,
    info: CallInfo,
    done: int = 0,
    directory: str | None = None,
    interactive: bool = False,
    conversation: Conversation | None = None,
) -> Any:
    """Run `obj.method(*arguments, **keywords)` at the end of the hops and return its value.

    Args:
        hops: descriptions as the delegates give them, at least one.
        inputs, outputs: files, relative to the working directory, that go with the call and come back from it.
        results: "data" for a value of code that is not trusted: nothing that comes is opened as a pickle, exceptions
            come as text, `obj` stays as it is.
        info: is filled with what becomes known of the call.
        done: how many hops of the chain were taken in this process.
        directory: where the call runs, if that can be entered there; the working directory if it is not given.
        interactive: whether the call reads this process's standard input.
        conversation: of the lease within which the call is made, if it is.

    Raises:
        what the method raised, with a RemoteTraceback as its cause, or a DelegateFunctionException.
    """
    started = time.monotonic()
    try:
        input_paths, output_paths = files.checked(inputs), files.checked(outputs)
    except files.FileError as error:
        raise CallNotSent(str(error)) from error
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    payload: Payload | None = None
    result = Result(output_paths, root, results)
    packages: dict[str, str] = {}
    try:
        payload = Payload(pack(obj, method, arguments, keywords, packages), input_paths, root)
        spec = header(
            hops,
            payload,
            packages,
            outputs=output_paths,
            results=results,
            done=done,
            directory=directory,
            interactive=interactive,
        )
        _travel(spec, payload, result, info, conversation)
        result.finish()
    except files.FileError as error:
        raise ResultNotReturned(f"an output of the call cannot be written: {error}") from error
    except frames.ProtocolError as error:
        raise HopFailed(f"sent what does not belong there: {error}", where=info.where) from error
    except DelegateFunctionException as error:
        error.call = info
        if result.as_data:
            error.message = terminal.clean(error.message)
        raise
    finally:
        result.discard()
        if payload is not None:
            payload.close()
        os.close(root)
        info.seconds = time.monotonic() - started
    return unpack(result, obj, info)


def header(
    hops: list[dict[str, Any]],
    payload: Payload,
    packages: dict[str, str],
    *,
    outputs: Sequence[str] = (),
    results: str = data.PICKLE,
    done: int = 0,
    directory: str | None = None,
    interactive: bool = False,
) -> dict[str, Any]:
    """Return what goes before a payload: all that hops and the far side are told of a call; arguments as for `call`."""
    return {
        "v": frames.VERSION,
        "version": __version__,
        "python": list(sys.version_info[:3]),
        "packages": packages,
        "hops": encoded(hops),
        "hop": done,
        "of": done + steps.count(hops),
        "parts": payload.parts,
        "outputs": list(outputs),
        "results": results,
        "directory": directory or str(Path.cwd()),
        "path": [str(Path(entry).absolute()) for entry in sys.path],
        "interactive": interactive,
    }


def replay(heard: Iterator[tuple[bytes, bytes]], info: CallInfo, *, results: str) -> Any:
    """Return the value of a call of which all that was heard is written down, or raise what it raised."""
    result = Result((), -1, results)
    output = Output(clean=result.as_data)
    try:
        for event in heard:
            if _take(event, output, result, info):
                break
        else:
            raise frames.ProtocolError("a call without its end")
        result.finish()
    except frames.ProtocolError as error:
        raise HopFailed(f"what is written down of the call is no call: {error}", where=info.where) from error
    except DelegateFunctionException as error:
        error.call = info
        raise
    return unpack(result, None, info)


def _standard_input() -> int:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError) as error:
        raise NotOffered("interactive=True needs a terminal or a file as standard input; there is none here") from error


def _travel(
    spec: dict[str, Any], payload: Payload, result: Result, info: CallInfo, conversation: Conversation | None
) -> None:
    keys_fd = _standard_input() if spec["interactive"] else None
    first, *rest = spec["hops"]
    if first["type"] == "sandbox":
        # A sandbox is served by a hop's process; where none comes before it, one is started here.
        first = {"type": "subprocess"}
        spec = {**spec, "kind": first["type"]}
    else:
        spec = {**spec, "kind": first["type"], "hops": rest, "hop": spec["hop"] + 1}
    exchange = Exchange(spec, payload.chunks(), keys_fd)
    if conversation is None:
        where = hop.describe(first["type"], spec["hop"], spec["of"], remote.node(first))
        conversation = Conversation(lambda: processes.start_process(first, where), where)
    try:
        conversation.begin(exchange)
        info.exchange = exchange
        with Display(exchange, conversation, info, silent=spec["interactive"]) as display:
            _consume(exchange, display, result, info)
    except BaseException:
        # Also Ctrl-C, and a stream that cannot be written: nobody waits for the call any more.
        exchange.cancel()
        raise
    finally:
        info.exchange = None


def _consume(exchange: Exchange, display: Display, result: Result, info: CallInfo) -> None:
    output = Output(display.give_way, clean=result.as_data)
    while True:
        event = display.next_event()
        if isinstance(event, DelegateFunctionException):
            output.finish()
            event.output_tail = output.tail
            raise event
        is_last = _take(event, output, result, info)
        if event[0] in (frames.OUT, frames.ERR, frames.DATA):
            exchange.used(event[0], len(event[1]))
        if is_last:
            return


def _take(event: tuple[bytes, bytes], output: Output, result: Result, info: CallInfo) -> bool:
    """Take one frame of what comes back; return whether it was the last."""
    kind, content = event
    if kind in (frames.OUT, frames.ERR):
        output.write(kind, content)
    elif kind == frames.DATA:
        result.take(content)
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
        return True
    return False
