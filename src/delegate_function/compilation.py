"""Compile somewhere else: which files a source needs, and the `make` that runs there.

What comes back is plain data: nothing of what a compiler was given is ever executed or unpickled by who receives it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESOURCES = "CFIDDLE_RESOURCES"
"""Stands in a command for the directory of cfiddle's own makefile, headers and library where the command runs."""
_INCLUDE = re.compile(r"""^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]""", re.MULTILINE)


def needed(sources: Iterable[str], directories: Iterable[str]) -> list[str]:
    """Return the sources and what they include, and what that includes, as far as it is found there.

    Args:
        directories: where included files are looked for, beside the directory of the file that includes them.
    """
    found = list(dict.fromkeys(map(os.path.normpath, sources)))
    for source in found:  # grows meanwhile
        text = Path(source).read_text(errors="replace")
        for name in _INCLUDE.findall(text):
            for directory in (os.path.dirname(source), *directories):
                path = os.path.normpath(os.path.join(directory, name))
                if os.path.isfile(path) and not os.path.isabs(name):
                    if path not in found:
                        found.append(path)
                    break
    return found


def compile(files: dict[str, bytes], directory: str, command: list[str], wanted: list[str]) -> dict[str, Any]:
    """Run a command on files in a directory of their own, and return what it made.

    Args:
        files: their contents, by path.
        directory: where among them the command runs.
        command: in which `RESOURCES` stands for what it says.
        wanted: the files to bring back, as far as they were made, by path from that directory.

    Returns:
        `status`, `output` (of both streams), and `files`: contents by path.
    """
    resources = f"{_location('cfiddle')}/resources"
    with tempfile.TemporaryDirectory(prefix="compile-") as root:
        for path, content in files.items():
            target = Path(root, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        place = Path(root, directory)
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [word.replace(RESOURCES, resources) for word in command],
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        made = [path for path in wanted if (place / path).is_file()]
        return {
            "status": done.returncode,
            "output": done.stdout,
            "files": {path: (place / path).read_bytes() for path in made},
        }


def _location(package: str) -> str:
    """Return a package's directory without importing it, which takes longer than compiling."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin
    return os.path.dirname(found.origin)
