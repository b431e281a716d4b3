"""This process's own terminal, or its pipes, as the streams of a command in a container."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from agent import letters
from container_manager.agents import Stream

_PIECE = 65536
_STDIN, _STDOUT = 0, 1


def has_terminal() -> bool:
    """Tell whether a command can have a terminal: both what it reads and what it writes come to one here."""
    return os.isatty(_STDIN) and os.isatty(_STDOUT)


def run(stream: Stream, *, terminal: bool) -> int | None:
    """Be the streams of a command until it ends; return its exit status, None if its container ended meanwhile."""
    if not terminal:
        threading.Thread(target=_pass_input_on, args=(stream,), daemon=True).start()
        return stream.relay(_write)
    with _raw(), _sizes_told(stream):
        threading.Thread(target=_pass_input_on, args=(stream,), daemon=True).start()
        return stream.relay(_write, terminal=True)


def _pass_input_on(stream: Stream) -> None:
    try:
        while content := os.read(_STDIN, _PIECE):
            stream.send(letters.INPUT, content)
    except OSError:
        pass  # a standard input that is closed, or cannot be read, is one that is at its end
    stream.send(letters.INPUT_ENDS)


def _write(descriptor: int, content: bytes) -> None:
    file = (sys.stdout if descriptor == _STDOUT else sys.stderr).buffer
    file.write(content)
    file.flush()


@contextmanager
def _raw() -> Iterator[None]:
    """Have each key go to the command, Ctrl-C too."""
    before = termios.tcgetattr(_STDIN)
    try:
        tty.setraw(_STDIN)
        yield
    finally:
        termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)


@contextmanager
def _sizes_told(stream: Stream) -> Iterator[None]:
    """Tell the command how large the terminal is, and again whenever that changes."""

    def tell(*_: object) -> None:
        size = shutil.get_terminal_size()
        stream.send(letters.SIZE, letters.encoded({"rows": size.lines, "columns": size.columns}))

    tell()
    before = signal.signal(signal.SIGWINCH, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
