"""What every user's container gets beside its shape: lines of options of `docker run` that an administrator may write.

They are: `-v`, `--volume SOURCE:TARGET[:ro]` for a directory of the machine's, `-e`, `--env NAME=VALUE`,
`--shm-size SIZE` in bytes or with k, m or g, and `--ulimit NAME=SOFT[:HARD]`.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from agent.checked import CLOSED_SOURCES, PolicyError, overlap, path_outside

# Beside those that are closed to all: what the machine itself and the cluster are made of.
_CLOSED_SOURCES = (*CLOSED_SOURCES, "/boot", "/etc", "/root", "/var/lib/cfiddle-cluster", "/srv/cfiddle-cluster")
_CLOSED_TARGETS = ("/proc", "/sys", "/dev", "/run", "/etc", "/home/me")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\x00-\x1f\x7f]*")
_OWN_VARIABLES = ("HOME", "USER", "LOGNAME", "CFIDDLE_COMMAND")
_SIZE = re.compile(r"([1-9][0-9]{0,11})([bkmg]?)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_ULIMIT = re.compile(r"([a-z]+)=(-1|[0-9]{1,18})(?::(-1|[0-9]{1,18}))?")
_ULIMITS = ("cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nofile", "rtprio", "rttime", "sigpending", "stack")


@dataclass(frozen=True)
class Volume:
    """A directory of the machine's in a container."""

    source: str
    target: str
    read_only: bool


@dataclass(frozen=True)
class Ulimit:
    """A limit of a container's processes; -1 for none."""

    name: str
    soft: int
    hard: int


@dataclass(frozen=True)
class Options:
    """What the lines come to; `shm_bytes` is 0 where none says anything of it."""

    volumes: tuple[Volume, ...] = ()
    environment: tuple[str, ...] = ()
    shm_bytes: int = 0
    ulimits: tuple[Ulimit, ...] = field(default=())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PolicyError(f"{message}; known: -v, --volume, -e, --env, --shm-size, --ulimit")


def parse(value: object, where: str) -> Options:
    """Return what a list of lines says.

    Raises:
        PolicyError: one says what is not in the list above; the message names it.
    """
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise PolicyError(f"{where} must be a list of lines")
    words = argparse.Namespace(volume=[], env=[], shm_size=[], ulimit=[])
    volumes: list[Volume] = []
    for number, line in enumerate(value, 1):
        try:
            found = _words(line)
            for kind, given in vars(found).items():
                getattr(words, kind).extend(given)
            for volume in map(_volume, found.volume):
                if any(overlap(volume.target, other.target) for other in volumes):
                    raise PolicyError(f"{volume.target} is another volume's, or in it")
                volumes.append(volume)
            _environment(found.env), _size(found.shm_size), _ulimits(found.ulimit)
        except PolicyError as error:
            raise PolicyError(f"{where}, line {number}, {line!r}: {error}") from error
    return Options(tuple(volumes), _environment(words.env), _size(words.shm_size), _ulimits(words.ulimit))


def _words(line: str) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for names in (("-v", "--volume"), ("-e", "--env"), ("--shm-size",), ("--ulimit",)):
        parser.add_argument(*names, action="append", default=[])
    try:
        return parser.parse_args(shlex.split(line))
    except ValueError as error:
        raise PolicyError(str(error)) from error


def _volume(word: str) -> Volume:
    source, _, rest = word.partition(":")
    target, _, mode = rest.partition(":")
    if mode not in ("", "ro", "rw"):
        raise PolicyError(f"{mode!r} is neither ro nor rw")
    return Volume(
        path_outside(source, "the volume's source", _CLOSED_SOURCES),
        path_outside(target, "the volume's target", _CLOSED_TARGETS),
        read_only=mode == "ro",
    )


def _environment(words: Sequence[str]) -> tuple[str, ...]:
    for word in words:
        if not _ENVIRONMENT.fullmatch(word):
            raise PolicyError(f"{word!r} is not NAME=VALUE")
        if word.partition("=")[0] in _OWN_VARIABLES:
            raise PolicyError(f"{word.partition('=')[0]} is set for each user")
    return tuple(words)


def _size(words: Sequence[str]) -> int:
    size = 0
    for word in words:
        found = _SIZE.fullmatch(word)
        if not found:
            raise PolicyError(f"{word!r} is no size as in 64m or 1g")
        size = int(found[1]) * _UNITS[found[2].lower()]
    return size


def _ulimits(words: Sequence[str]) -> tuple[Ulimit, ...]:
    limits = {}
    for word in words:
        found = _ULIMIT.fullmatch(word)
        if not found or found[1] not in _ULIMITS:
            raise PolicyError(f"{word!r} is not NAME=SOFT[:HARD] with a name of {', '.join(_ULIMITS)}")
        soft, hard = int(found[2]), int(found[3] or found[2])
        if hard != -1 and not -1 < soft <= hard:
            raise PolicyError(f"{word!r}: the soft limit is above the hard one")
        limits[found[1]] = Ulimit(found[1], soft, hard)
    return tuple(limits.values())
