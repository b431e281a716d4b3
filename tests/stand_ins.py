"""Programs that stand in for commands, in tests of what is asked of them; and those of the images as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import delegate_function

SRC = Path(delegate_function.__file__).parents[1]


def program(directory: Path, name: str, text: str) -> Path:
    """Make a shell script in a directory, in the place of one that is there."""
    file = directory / name
    file.unlink(missing_ok=True)  # it may run
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


def hop_program(directory: Path) -> str:
    """Return a program that serves a hop with this checkout's package."""
    file = directory / "hop"
    file.write_text(
        f"#!{sys.executable} -I\nimport sys; sys.path.insert(0, {str(SRC)!r})\n"
        "from delegate_function.hop import main\nmain()\n"
    )
    file.chmod(0o755)
    return str(file)


def loaded(file: Path) -> ModuleType:
    """Return a fresh module of a Python file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
