"""A batch job's part of a detached call: it takes the caller's place, and writes down what the caller would hear.

Run as `python3 -I -m delegate_function.detached DIRECTORY` in the job. In the directory, which is its user's alone,
`N.call` has the call's frames and `N.result` gets those that come back; N is the number of the job's task. The pickle
is not opened here.
"""

from __future__ import annotations

import contextlib
import os
import sys

from delegate_function import files, frames, hop, launch, processes
from delegate_function.conversation import Conversation, Exchange
from delegate_function.errors import ConfigurationError, DelegateFunctionException, HopFailed, to_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

KIND = "batch job"
JOB = "job"
_KEPT = launch.DEFAULT_OUTPUT_MB * 1024**2
_MOST = frames.MAX_TRANSFER + frames.WINDOW
"""What comes beside the output: the largest result, in its frames, and what hops say."""
_UNKEPT = f"\n(of the output, {launch.DEFAULT_OUTPUT_MB} MB were kept)\n".encode()


def read(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the frames in a file, as far as they are complete."""
    decoder = frames.Decoder()
    while data := file.read(frames.MAX_FRAME):
        decoder.feed(data)
        yield from decoder


def open_to_read(root: int, name: str) -> BinaryIO:
    """Return a file of the directory; raise FileError if there is none."""
    return open(files.open_to_read(root, name)[0], "rb")


def place(root: int, name: str, pieces: Iterable[bytes], *, beside: str) -> None:
    """Write a file under another name, and give it its own once it is complete; one that is there already stays."""
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=root), "wb") as file:
        for piece in pieces:
            file.write(piece)
            file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(beside, name, src_dir_fd=root, dst_dir_fd=root)
    os.unlink(beside, dir_fd=root)
    os.fsync(root)


def serve(root: int, number: int) -> None:
    """Make a call of the directory, unless an earlier try of this job came to its end."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ["SLURM_JOB_ID"]
    attempt = f"{number}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    if JOB not in os.listdir(root):  # whoever submitted the job may have been killed before they could note its number
        place(root, JOB, [job.encode()], beside=f"{JOB}.{attempt}")
    if f"{number}.result" in os.listdir(root):
        return
    with open_to_read(root, f"{number}.call") as file:
        call = read(file)
        kind, content = next(call, (b"", b""))
        if kind != frames.SPEC:
            raise ConfigurationError(f"{number}.call does not begin as a call does")
        spec = frames.decode_json(content)
        where = hop.describe(KIND, spec["hop"], spec["of"], os.uname().nodename)
        exchange = Exchange(spec, (content for _, content in call), None)
        conversation = Conversation(lambda: processes.start_process({"type": "subprocess"}, where), where)
        try:
            conversation.begin(exchange)
            place(root, f"{number}.result", _heard(exchange, where), beside=f"{number}.partial.{attempt}")
        except BaseException:
            exchange.cancel()  # for lack of space, say
            raise
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{number}.call", dir_fd=root)


def _heard(exchange: Exchange, where: str) -> Iterator[bytes]:
    """Yield the frames of a call as they come, without what is too much of its output; end one that sends too much."""
    written = others = results = 0
    while True:
        event = exchange.events.get()
        if isinstance(event, DelegateFunctionException):
            yield frames.encode_json(frames.ERROR, to_wire(event))
            return
        kind, content = event
        if kind in (frames.OUT, frames.ERR, frames.DATA):
            exchange.used(kind, len(content))
        frame = frames.encode(kind, content)
        if kind in (frames.OUT, frames.ERR):
            before, written = written, written + len(content)
            if written > _KEPT:
                if before <= _KEPT:
                    yield frames.encode(kind, content[: _KEPT - before]) + frames.encode(frames.ERR, _UNKEPT)
                continue
        else:
            others += len(frame)
            results += kind == frames.RESULT
        if others > _MOST or results > 1:
            exchange.cancel()
            error = HopFailed("sent what does not belong there: more than a result", where=where)
            yield frames.encode_json(frames.ERROR, to_wire(error))
            return
        yield frame
        if kind in (frames.END, frames.ERROR):
            return


def main(arguments: list[str]) -> None:
    """Make the call of this job."""
    if len(arguments) != 1:
        sys.exit("usage: python3 -I -m delegate_function.detached DIRECTORY")
    serve(files.private_directory(arguments[0]), int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")))


if __name__ == "__main__":
    main(sys.argv[1:])
