"""Make text that somebody else wrote harmless where it is shown."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor, keys (ECMA-48, 5.4)
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90-\x9f]*(?:\x07|\x1b\\|\x9c)"  # titles, links, clipboard (5.6)
    r"|\x1b[ -/]*[0-OQ-WYZ\\`-~]"  # the others (ECMA-35, 13.2)
)
_BEGUN = re.compile(r"[\x1b\x90\x98\x9b\x9d-\x9f][^\x1b\x90-\x9f]{0,255}\x1b?\Z")
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # but newline and tab
    "\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what changes a line's direction or ends it unseen
    "\ud800-\udfff]"  # no characters
)


def clean(text: str, *, limit: int | None = None) -> str:
    """Return text without what a terminal would obey, and no longer than the limit."""
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}…"
    return _OBEYED.sub("", _SEQUENCE.sub("", text))


class Cleaner:
    """The same for text that comes in pieces, which may end within a sequence."""

    def __init__(self) -> None:
        self._held = ""

    def __call__(self, text: str, *, final: bool = False) -> str:
        """Return what can be shown of the text so far."""
        text, self._held = self._held + text, ""
        text = _SEQUENCE.sub("", text)
        if not final and (begun := _BEGUN.search(text)):
            text, self._held = text[: begun.start()], begun.group()
        return _OBEYED.sub("", text)
