"""Somebody's source code, to be run where it can do no harm.

    SourceCode(file="ada.py").call(delegate, "mean", [1, 2, 3])

The code is never imported or pickled by the caller: its text travels, is compiled where the call ends, and what it
returns comes back as data.
"""

from __future__ import annotations

import linecache
import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delegate_function import data
from delegate_function.errors import CallNotSent, ConfigurationError

if TYPE_CHECKING:
    from delegate_function.delegates import BaseDelegate

MAX_BYTES = 1024 * 1024
_MODULE = "submission"


class SourceCode:
    """A text of Python, from a file or as it is; nothing of it runs until a call has come to its end.

    Args:
        text: the code itself.
        file: or the file in which it stands; a link is not followed.
        name: what it is called in tracebacks; the file's name, if there is one.

    Raises:
        ConfigurationError: neither text nor file is given, or both.
        CallNotSent: the file cannot be read, is no text, or is too long.
    """

    def __init__(
        self, text: str | None = None, *, file: str | os.PathLike[str] | None = None, name: str | None = None
    ) -> None:
        if (text is None) == (file is None):
            raise ConfigurationError("give either text or the name of a file")
        self.text = text if text is not None else _read(Path(str(file)))
        self.name = name or (Path(str(file)).name if file is not None else f"{_MODULE}.py")

    def call(
        self, delegate: BaseDelegate, function: str, *args: Any, inputs: Any = (), outputs: Any = (), **kwargs: Any
    ) -> Any:
        """Run the code, and then its function with the arguments, through a delegate; return the value as data.

        Args:
            delegate: a chain that leaves this process, best one that ends in a sandbox.
            inputs, outputs: files, as in `BaseDelegate.call`.

        Raises:
            RemoteError: the code cannot be compiled, or raised an exception; its cause shows the lines.
            ResultNotReturned: what it returned is no data; the message says where.
        """
        arguments = (function, *args)
        return delegate.call(self, "run", arguments, kwargs, inputs=inputs, outputs=outputs, results=data.DATA)

    def run(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Run the code here, as a module of its own, and its function; `call` does this somewhere else."""
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.name] = (len(self.text), None, lines, self.name)  # a traceback shows its lines
        module = sys.modules[_MODULE] = types.ModuleType(_MODULE)
        module.__file__ = self.name
        exec(compile(self.text, self.name, "exec", dont_inherit=True), module.__dict__)
        if not callable(found := getattr(module, function, None)):
            raise AttributeError(f"{self.name} defines no function {function!r}")
        return found(*args, **kwargs)


def _read(path: Path) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise CallNotSent(f"{path} has more than {MAX_BYTES} bytes")
        return content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CallNotSent(f"{path} cannot be read: {error}") from error
