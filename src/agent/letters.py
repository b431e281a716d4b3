"""What a user's commands and the agents say to each other over the network: letters, and streams of pieces.

A letter is 4 bytes of length and that many bytes. The agent begins with a nonce and its time, in the clear. A request
is a MUNGE credential that holds the request, the node that it is for and the agent's nonce: it cannot be read, changed,
sent to another node or a second time. So is the answer, which root on the node encodes for the one user, with the nonce
that the request brought. A nonce for the next request comes with each answer.

A command in a container has streams: after the answer, both sides send pieces: a byte that says what it is, and a
letter.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from agent import munge

VERSION = 1
PORT = 6831
MAX_LETTER = 1024 * 1024
"""MUNGE takes no more (MUNGE_MAXIMUM_REQ_LEN in its m_msg.h)."""

INPUT, INPUT_ENDS, SIZE = b"i", b"c", b"w"
"""Pieces to a command: bytes for its standard input, that there are no more, its terminal's rows and columns."""
OUTPUT, EXIT = b"o", b"x"
"""Pieces from a command: the engine's bytes, and at the end its exit status."""

_LENGTH = 4


class LetterError(Exception):
    """What came is no letter of this protocol, or not from whom it should be."""


def nonce() -> str:
    """Return what nobody can have foreseen."""
    return os.urandom(16).hex()


def send(connection: socket.socket, content: bytes) -> None:
    """Send a letter."""
    if len(content) > MAX_LETTER:
        raise LetterError(f"a letter of {len(content)} bytes (at most {MAX_LETTER})")
    connection.sendall(len(content).to_bytes(_LENGTH) + content)


def receive(connection: socket.socket) -> bytes:
    """Return the next letter.

    Raises:
        EOFError: the other side has closed the connection.
        LetterError: it is too long.
    """
    length = int.from_bytes(_exactly(connection, _LENGTH))
    if length > MAX_LETTER:
        raise LetterError(f"a letter of {length} bytes (at most {MAX_LETTER})")
    return _exactly(connection, length)


def send_piece(connection: socket.socket, kind: bytes, content: bytes = b"") -> None:
    """Send a piece of a stream."""
    connection.sendall(kind + len(content).to_bytes(_LENGTH) + content)


def receive_piece(connection: socket.socket) -> tuple[bytes, bytes]:
    """Return the kind and the content of the next piece; errors as of `receive`."""
    kind = _exactly(connection, 1)
    return kind, receive(connection)


def encoded(message: dict[str, Any]) -> bytes:
    """Return a message as bytes."""
    return json.dumps(message).encode()


def seal(message: dict[str, Any], *, reader: int | None = None) -> bytes:
    """Return a credential with a message; MungeError as `munge.encode`."""
    return munge.encode(encoded(message), reader=reader)


def unseal(content: bytes) -> tuple[dict[str, Any], int]:
    """Return the message in a credential, and the user id of whoever sealed it.

    Raises:
        LetterError: it is no credential that is good here, or holds no message.
    """
    try:
        payload, uid = munge.decode(content)
        return parse(payload), uid
    except munge.MungeError as error:
        raise LetterError(str(error)) from error


def parse(content: bytes) -> dict[str, Any]:
    """Return the JSON object that bytes hold; a LetterError if they hold anything else."""
    try:
        message = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise LetterError(f"a letter holds no JSON object: {error}") from error
    if not isinstance(message, dict):
        raise LetterError("a letter holds no JSON object")
    return message


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _exactly(connection: socket.socket, count: int) -> bytes:
    content = bytearray()
    while len(content) < count:
        piece = connection.recv(min(count - len(content), 65536))
        if not piece:
            raise EOFError("the other side closed the connection")
        content += piece
    return bytes(content)
