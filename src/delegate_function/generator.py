"""Chains described in YAML.

    version: 0.1
    sequence:
      - type: SlurmDelegate
        partition: normal
      - type: SandboxDelegate
        seconds: 30

Each item has the name of a delegate's class and that class's arguments; `$VARIABLES` in strings are expanded. A
description is read with the safe loader; it may neither refer to itself nor be large or deep, so that reading one that
somebody else wrote costs little.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml as pyyaml

from delegate_function import steps
from delegate_function.delegates import (
    BaseDelegate,
    DockerDelegate,
    Hook,
    SandboxDelegate,
    SlurmDelegate,
    SSHDelegate,
    SubprocessDelegate,
    SuDockerDelegate,
    SudoDelegate,
    TemporaryDirectoryDelegate,
    TrivialDelegate,
)
from delegate_function.errors import ConfigurationError

VERSION = 0.1
_MAX_BYTES = 64 * 1024
_MAX_DEPTH = 16
_MAX_FILES = 16
_open_files: ContextVar[int] = ContextVar("_open_files", default=0)


class DelegateGenerator(BaseDelegate):
    """The chain that YAML describes; give the file's name or the text itself.

    Raises:
        ConfigurationError: the text is not such a description.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str] | None = None,
        yaml: str | None = None,
        subdelegate: BaseDelegate | None = None,
        debug_pre_hook: Hook | str | None = None,
        interactive: bool = False,
    ) -> None:
        if (filename is None) == (yaml is None):
            raise ConfigurationError("give either the name of a file or YAML")
        super().__init__(subdelegate, debug_pre_hook, interactive)
        self._chain = parse(_read(filename) if filename is not None else str(yaml))

    def hops(self) -> list[dict[str, Any]]:
        """Return the hops that are described."""
        return self._chain.gather()


class YAMLDelegate(DelegateGenerator):
    """The chain that a file describes.

    Args:
        configuration_file: its name.
    """

    def __init__(
        self,
        configuration_file: str | os.PathLike[str],
        subdelegate: BaseDelegate | None = None,
        interactive: bool = False,
    ) -> None:
        super().__init__(filename=configuration_file, subdelegate=subdelegate, interactive=interactive)


class LateBoundYAMLDelegate(BaseDelegate):
    """The chain in the file that DELEGATE_FUNCTION_CONFIG names when a call comes here and where it comes from.

    After a delegate that leads to another process, that is the environment and the file which that process finds.
    """

    def hops(self) -> list[dict[str, Any]]:
        """Return what stands for the chain until then."""
        return [{"type": steps.LATE}]


def described_late() -> list[dict[str, Any]]:
    """Return the hops that the file which DELEGATE_FUNCTION_CONFIG names describes now."""
    filename = os.environ.get("DELEGATE_FUNCTION_CONFIG")
    if not filename:
        raise ConfigurationError(f"DELEGATE_FUNCTION_CONFIG does not name a file on {os.uname().nodename}")
    return parse(_read(filename)).gather()


DELEGATES: dict[str, type[BaseDelegate]] = {
    kind.__name__: kind
    for kind in (
        TrivialDelegate,
        TemporaryDirectoryDelegate,
        SubprocessDelegate,
        SudoDelegate,
        SSHDelegate,
        SlurmDelegate,
        SandboxDelegate,
        DockerDelegate,
        SuDockerDelegate,
        YAMLDelegate,
        LateBoundYAMLDelegate,
    )
}


def parse(text: str) -> BaseDelegate:
    """Return the chain that a YAML text describes; raise ConfigurationError if it describes none."""
    description = _load(text)
    if not isinstance(description, dict) or set(description) != {"version", "sequence"}:
        raise ConfigurationError("a chain in YAML is a mapping of `version` and `sequence`")
    if description["version"] != VERSION:
        raise ConfigurationError(f"version {description['version']!r} of a chain is unknown; this is {VERSION}")
    sequence = description["sequence"]
    if not isinstance(sequence, list) or not sequence:
        raise ConfigurationError("`sequence` is a list of delegates")
    if _open_files.get() >= _MAX_FILES:
        raise ConfigurationError(f"more than {_MAX_FILES} descriptions within each other; one of them names itself")
    chain: BaseDelegate | None = None
    level = _open_files.set(_open_files.get() + 1)
    try:
        for item in reversed(sequence):
            chain = _make(item, chain)
    finally:
        _open_files.reset(level)
    assert chain is not None
    return chain


def _make(item: Any, subdelegate: BaseDelegate | None) -> BaseDelegate:
    if not isinstance(item, dict) or not all(isinstance(name, str) for name in item):
        raise ConfigurationError("each item of `sequence` is a mapping with a `type`")
    name = item.get("type")
    if not isinstance(name, str) or name not in DELEGATES:
        raise ConfigurationError(f"Illegal delegate name {name!r}; known are {', '.join(DELEGATES)}")
    arguments = {key: _expanded(value) for key, value in item.items() if key != "type"}
    if {"subdelegate", "debug_pre_hook"} & arguments.keys() and not isinstance(arguments.get("debug_pre_hook"), str):
        raise ConfigurationError(f"{name}: objects cannot be described in YAML")
    try:
        return DELEGATES[name](subdelegate=subdelegate, **arguments)
    except TypeError as error:
        raise ConfigurationError(f"{name}: {error}") from error


def _expanded(value: Any) -> Any:
    if isinstance(value, str):
        return os.path.expandvars(value)
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    return value


def _read(filename: str | os.PathLike[str]) -> str:
    try:
        with Path(filename).open("rb") as file:
            return file.read(_MAX_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{os.fspath(filename)} cannot be read: {error}") from error


def _load(text: str) -> Any:
    if len(text) > _MAX_BYTES:
        raise ConfigurationError(f"a chain in YAML has at most {_MAX_BYTES} bytes")
    try:
        depth = 0
        for event in pyyaml.parse(text, Loader=pyyaml.SafeLoader):
            if isinstance(event, pyyaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigurationError("a chain in YAML has no anchors and aliases")
            depth += isinstance(event, pyyaml.CollectionStartEvent) - isinstance(event, pyyaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigurationError("a chain in YAML is not that deep")
        return pyyaml.safe_load(text)
    except pyyaml.YAMLError as error:
        raise ConfigurationError(f"this is no YAML that describes a chain: {error}") from error
