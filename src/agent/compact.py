"""JSON without the package `json`, which needs `re`: to load the two takes longer than all else that a hop does.

The C functions are those of which `json` itself is made.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False  # the module `typing` takes longer to load than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_SPACE = " \t\n\r"


class _Settings:
    """What the scanner asks for, as of a `json.JSONDecoder`."""

    strict = True
    object_hook = None
    parse_float = float
    parse_int = int

    def __init__(
        self, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None, parse_constant: Callable[[str], Any]
    ) -> None:
        self.object_pairs_hook = object_pairs_hook
        self.parse_constant = parse_constant


def decoder(
    *,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_constant: Callable[[str], Any] = float,
) -> Callable[[bytes], Any]:
    """Return what decodes JSON in UTF-8; it raises ValueError for what is none. Arguments as for `json.loads`."""
    scan = make_scanner(_Settings(object_pairs_hook, parse_constant))  # type: ignore[arg-type]

    def decode(data: bytes) -> Any:
        text = data.decode().strip(_SPACE)
        try:
            value, end = scan(text, 0)
        except StopIteration as error:
            raise ValueError(f"no JSON at character {error.value}") from error
        if end != len(text):
            raise ValueError(f"something follows the JSON at character {end}")
        return value

    return decode


def encode(value: dict[str, Any]) -> bytes:
    """Return an object as JSON, in ASCII and without spaces; raise TypeError for what is none."""
    encoder = make_encoder({}, _refuse, encode_basestring_ascii, None, ":", ",", False, False, True)
    return "".join(encoder(value, 0)).encode()


def _refuse(value: object) -> Any:
    raise TypeError(f"{type(value).__name__} is nothing that JSON has")
