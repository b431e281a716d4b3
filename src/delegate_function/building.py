"""CFiddle's way to a delegate that compiles."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from delegate_function import compilation, data, steps, terminal
from delegate_function.delegates import BaseDelegate
from delegate_function.errors import CallNotSent, also

# What of a build is brought back: the library, and the texts that an executable shows. Not .d, which make would read.
_BUILT = (".so", ".s", ".i", ".ii")


class BuildMethod:
    """CFiddle's way to a delegate that compiles. CFiddle calls it with each source and its parameters."""

    __name__ = "BuildMethod"

    def __init__(
        self, delegate: BaseDelegate, inputs: Iterable[str | os.PathLike[str]] = (), includes: bool = True
    ) -> None:
        self.delegate = delegate
        self._includes = includes
        self._inputs = [os.fspath(path) for path in inputs]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        from cfiddle.Exceptions import CFiddleException
        from cfiddle.MakeBuilder import MakeBuilder

        method = self

        class Builder(MakeBuilder):  # type: ignore[misc]
            """CFiddle's own, but for where its `make` runs."""

            def _invoke_make(self, command: list[str]) -> str:
                if not steps.leaves(method.delegate.compile()):
                    return str(super()._invoke_make(command))
                if self._rebuild:
                    shutil.rmtree(self.build_directory, ignore_errors=True)
                with also(CFiddleException):
                    return method.make(self, command)

        return Builder(*arguments, **keywords)

    def __deepcopy__(self, memo: dict[int, Any]) -> BuildMethod:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Where a pickled configuration is opened, there is no way back to the delegate.
        from cfiddle.MakeBuilder import MakeBuilder

        return functools.partial, (MakeBuilder,)

    def make(self, builder: Any, command: list[str]) -> str:
        """Do through the delegate what the command does here, and return what `make` said.

        Raises:
            cfiddle's BuildFailure: the compiler refuses the source; it holds the compiler's words.
        """
        from cfiddle.MakeBuilder import DATA_PATH, BuildFailure

        build, source = os.path.relpath(builder.build_directory), os.path.relpath(builder.source_file)
        own_makefile = None if builder._makefile.startswith(DATA_PATH) else os.path.relpath(builder._makefile)
        words = [f"{name}={value}" for name, value in builder.build_parameters.items()]
        more = str(builder.build_parameters.get("MORE_SRC", "")).split()
        files, directory = self._files([source, *more, *([own_makefile] if own_makefile else [])], words)
        there = ["make", "-R", "-f", own_makefile or f"{compilation.RESOURCES}/make/cfiddle.make", *words]
        there += [f"BUILD={build}", f"CFIDDLE_INCLUDE={compilation.RESOURCES}/include"]
        there += [f"CFIDDLE_VPATH={os.path.dirname(source) or '.'}:{build}"]
        there += [word for word in command if word.startswith("TARGET=")]
        there.append(f"{build}/{Path(source).stem}.so")
        wanted = [f"{build}/{Path(name).stem}{suffix}" for name in (source, *more) for suffix in _BUILT]
        made = self.delegate.call(compilation, "compile", (files, directory, there, wanted), results=data.DATA)
        output = terminal.clean(made["output"])
        if made["status"] != 0:
            raise BuildFailure(" ".join(command), output)
        os.makedirs(build, exist_ok=True)
        for path in set(wanted) & set(made["files"]):
            Path(path).write_bytes(made["files"][path])
        return output

    def _files(self, sources: list[str], parameters: Sequence[str]) -> tuple[dict[str, bytes], str]:
        """Return the contents of all files that travel, below the directory that has them all, and where we are."""
        words = " ".join(parameters).replace("=", " ").split()
        directories = [word[2:] for word in words if word.startswith("-I") and len(word) > 2]
        try:
            paths = [*sources, *self._inputs]
            if self._includes:
                paths = compilation.needed(paths, [".", *directories])
            root = os.path.commonpath([os.getcwd(), *map(os.path.abspath, paths)])
            return {os.path.relpath(path, root): Path(path).read_bytes() for path in paths}, os.path.relpath(".", root)
        except OSError as error:
            raise CallNotSent(f"a source cannot be read: {error}") from error
