"""Pickle and unpickle what is large without holding more than one copy of it beside it.

A pickle is a list of pieces, in which large bytes and arrays lie where they are; unpickling uses its bytes up.
"""

from __future__ import annotations

import pickle
from typing import Any

_KEPT = 1024 * 1024


class Pieces:
    """A file for a pickler, which keeps what it is given where it lies."""

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []

    def write(self, data: bytes | bytearray | pickle.PickleBuffer) -> int:
        """Keep a piece; the pickler gives large bytes and the memory of arrays themselves, not copies."""
        view = data.raw() if isinstance(data, pickle.PickleBuffer) else memoryview(data)
        self.pieces.append(view)
        return len(view)


class _UsedUp:
    """A file for an unpickler, from which what was read is gone."""

    def __init__(self, data: bytearray) -> None:
        self._data = data
        self._position = 0

    def readinto(self, target: memoryview) -> int:
        with memoryview(self._data) as view:
            piece = view[self._position : self._position + len(target)]
            target[: len(piece)] = piece
            count = len(piece)
            piece.release()
        self._forget(count)
        return count

    def read(self, count: int) -> bytes:
        with memoryview(self._data) as view:
            piece = bytes(view[self._position : self._position + count])
        self._forget(len(piece))
        return piece

    def readline(self) -> bytes:
        end = self._data.find(b"\n", self._position)
        return self.read((end + 1 if end >= 0 else len(self._data)) - self._position)

    def _forget(self, count: int) -> None:
        self._position += count
        if self._position > _KEPT:
            del self._data[: self._position]
            self._position = 0


def dumps(value: Any, obj: Any) -> list[memoryview]:
    """Return the pickle of a value in which `obj`, the object of the call, stands for itself.

    The pieces show what the value holds: it must not change before they have been sent.
    """
    import cloudpickle

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, candidate: Any) -> str | None:
            return "object" if obj is not None and candidate is obj else None

    file = Pieces()
    Pickler(file, protocol=5).dump(value)
    return file.pieces


def loads(data: bytearray, obj: Any) -> Any:
    """Return the value of a pickle made by `dumps`, in which `obj` takes the place of the far side's object.

    The bytes are used up.
    """

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, identifier: Any) -> Any:
            if identifier != "object":
                raise pickle.UnpicklingError(f"unknown object {identifier!r}")
            return obj

    return Unpickler(_UsedUp(data)).load()
