"""Show one line to whoever waits, and take it away again: in a notebook, or in a terminal."""

from __future__ import annotations

import os
import sys
from typing import TextIO

SETTING = "DELEGATE_FUNCTION_PROGRESS"
_COLUMNS = 80


class Screen:
    """One line for a person, which is replaced as often as there is something new, and taken away at the end."""

    def show(self, text: str, progress: tuple[int, int] | None = None) -> None:
        """Show a line, with how many of how many steps are done."""
        raise NotImplementedError

    def give_way(self, text: str) -> None:
        """Make room for text that is about to be written."""

    def close(self) -> None:
        """Take the line away."""
        raise NotImplementedError


def screen() -> Screen | None:
    """Return where to show a line to whoever waits: in a notebook, in a terminal, or nowhere."""
    if os.environ.get(SETTING) == "no":
        return None
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is not None:
        return Notebook()
    try:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return None
    return Terminal(sys.stderr) if is_terminal and os.environ.get("TERM") != "dumb" else None


class Terminal(Screen):
    """What a terminal shows behind its cursor.

    The cursor stays where it is (DECSC, DECRC), and what does not fit is cut off rather than going on in the next line
    (DECAWM). So nothing is lost of a line that the caller or the call has begun to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = ""
        self._gap = ""

    def show(self, text: str, progress: tuple[int, int] | None = None) -> None:
        line = _cut(self._gap + _with_steps(text, progress), self._columns() - 1)
        if line != self._shown:
            self._write(f"\x1b7\x1b[?7l{line}\x1b[K\x1b[?7h\x1b8")
            self._shown = line

    def give_way(self, text: str) -> None:
        self.close()
        self._gap = "" if text.endswith("\n") else "  "

    def close(self) -> None:
        if self._shown:
            self._write("\x1b[K")
            self._shown = ""

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Notebook(Screen):
    """An output of a notebook's cell, apart from what the call writes."""

    def __init__(self) -> None:
        self._id = os.urandom(16).hex()
        self._shown: dict[str, str] = {}

    def show(self, text: str, progress: tuple[int, int] | None = None) -> None:
        import html

        line = _with_steps(text, progress)
        bar = f'<progress value="{progress[0]}" max="{progress[1] or 1}"></progress> ' if progress else ""
        self._publish(
            {"text/plain": line, "text/html": f'<small style="margin-left: 8px">{bar}{html.escape(line)}</small>'}
        )

    def close(self) -> None:
        if self._shown:
            self._publish({})

    def _publish(self, data: dict[str, str]) -> None:
        from IPython.display import publish_display_data

        if data != self._shown:
            publish_display_data(data, transient={"display_id": self._id}, update=bool(self._shown))
            self._shown = data


def _with_steps(text: str, progress: tuple[int, int] | None) -> str:
    return f"{text}, {progress[0]} of {progress[1]}" if progress else text


def _cut(text: str, width: int) -> str:
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean if len(clean) <= width else clean[: max(0, width - 1)] + "…"
