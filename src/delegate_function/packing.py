"""Pack a call: its pickle, the files that go with it, and the hooks on its way."""

from __future__ import annotations

import base64
import os
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from delegate_function import files, frames, inside, steps
from delegate_function.errors import CallNotSent
from delegate_function.pickling import Pieces

_MAX_HOOK = 64 * 1024
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class Payload:
    """The call's pickle and its files, as parts and as the bytes that follow."""

    def __init__(self, call: list[memoryview], inputs: Sequence[str], root: int) -> None:
        self.parts: list[dict[str, Any]] = [{"kind": "call", "size": sum(map(len, call))}]
        self._call = call[::-1]
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
        """Yield the bytes of all parts in pieces that fit a frame, once: what was sent is not kept."""
        while self._call:
            piece = self._call.pop()
            for start in range(0, len(piece), frames.CHUNK):
                yield piece[start : start + frames.CHUNK]
        for fd, part in zip(self._files, self.parts[1:], strict=True):
            left = part["size"]
            while left:
                read = os.read(fd, min(left, frames.CHUNK)) or bytes(min(left, frames.CHUNK))
                left -= len(read)
                yield read

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())


def pack(
    obj: Any,
    method: str,
    arguments: Iterable[Any],
    keywords: dict[str, Any],
    packages: dict[str, str] | None = None,
) -> list[memoryview]:
    """Return the pickle of a call in pieces, which show what its arguments hold: those must not change meanwhile.

    Args:
        packages: is filled with the version of each package of which the pickle names something.
    """
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

    file = Pieces()
    try:
        Pickler(file, protocol=5).dump((obj, method, tuple(arguments), keywords))
    except Exception as error:
        raise CallNotSent(f"the call cannot be pickled: {type(error).__name__}: {error}") from error
    if packages is not None:
        by_value = {name.partition(".")[0] for name in cloudpickle.list_registry_pickle_by_value()}
        roots = {"cloudpickle", *(name.partition(".")[0] for name in modules)}  # what comes back needs cloudpickle
        known = {"__main__", "__mp_main__", __package__, *sys.stdlib_module_names, *by_value}
        for root in sorted(roots - known):
            if root in sys.modules and (version := inside.package_version(root)):
                packages[root] = version
    return file.pieces


def encoded(hops: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
