"""What `cmrun` does where its command line says nothing: from a file of the user's, and one of the administrator's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from container_manager.errors import ContainerError
from container_manager.slurm import printable

FILES = ("/etc/cfiddle/cmrun.yaml", "~/.config/cfiddle/cmrun.yaml")
"""A later one has the last word."""
NAMES = ("nodes", "clones", "partition", "time", "retries", "mpi")
_MOST_BYTES = 64 * 1024


def read(parameters: Sequence[click.Parameter], files: Sequence[str] = FILES) -> dict[str, object]:
    """Return the values in the files by the names of click's parameters, which also say what a value may be.

    Raises:
        ContainerError: a file cannot be read, or says what is not understood; with its name.
    """
    known = {parameter.name: parameter for parameter in parameters if parameter.name in NAMES}
    found: dict[str, object] = {}
    for file in files:
        path = Path(file).expanduser()
        try:
            with open(path, encoding="utf-8") as opened:
                text = opened.read(_MOST_BYTES)
        except FileNotFoundError:
            continue
        except (OSError, UnicodeError) as error:
            raise ContainerError(f"{path} cannot be read: {error}") from error
        for name, value in _entries(path, text).items():
            if name not in known:
                raise ContainerError(f"{path}: unknown key {printable(name)!r}", f"known are {', '.join(NAMES)}")
            try:
                found[name] = known[name].type.convert(value, None, None)
            except click.BadParameter as error:
                raise ContainerError(f"{path}: {name}: {error.message}") from error
    return found


def _entries(path: Path, text: str) -> dict[str, str]:
    import yaml

    try:
        # All values are text, as on the command line: 1:30 is no number of seconds.
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ContainerError(f"{path} is no YAML: {error}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict) or not all(isinstance(part, str) for pair in content.items() for part in pair):
        raise ContainerError(f"{path}: each line must be `KEY: VALUE`", f"known are {', '.join(NAMES)}")
    return content
