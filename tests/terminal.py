"""A program in a terminal of its own, as a person sees it: what is shown behind the cursor, and what is left."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
from collections.abc import Sequence
from typing import Any

from live import wait_until

_SHOWN = re.compile(r"\x1b7\x1b\[\?7l(.*?)\x1b\[K\x1b\[\?7h\x1b8")


class Terminal:
    """A program that runs in a terminal.

    Attributes:
        said: all that it wrote.
    """

    def __init__(self, argv: Sequence[str], *, columns: int = 80) -> None:
        self.said = ""
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvp(argv[0], argv)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))

    def read(self) -> bool:
        """Take what it wrote; return whether it goes on."""
        while select.select([self._terminal], [], [], 0.05)[0]:
            try:
                self.said += os.read(self._terminal, 4096).decode()
            except OSError:
                return False
        return True

    def wait_for(self, pattern: str, *, timeout_s: float = 20) -> str:
        """Return what the pattern matches in all that was written, as soon as it does."""

        def seen() -> Any:
            goes_on = self.read()
            found = re.search(pattern, self.said)
            assert found or goes_on, f"ended without {pattern!r}: {self.said!r}"
            return found

        return str(wait_until(seen, timeout_s=timeout_s, interval_s=0, what=f"{pattern!r} in {self.said!r}")[0])

    def press(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._terminal, keys)

    def end(self, *, timeout_s: float = 30) -> str:
        """Wait for its end; return what is left on the terminal."""
        try:
            wait_until(lambda: not self.read(), timeout_s=timeout_s, interval_s=0, what=f"its end: {self.said!r}")
        finally:
            self.kill()
        return self.left

    def kill(self) -> None:
        """End it if it still runs."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            os.close(self._terminal)
            self._pid = 0

    @property
    def shown(self) -> list[str]:
        """What was shown behind the cursor, one after the other."""
        return _SHOWN.findall(self.said)

    @property
    def left(self) -> str:
        """What is left on the terminal; what was shown must have been cleared before anything else was written."""
        pieces = re.split(r"\x1b\[K", _SHOWN.sub("\0", self.said))
        for piece in pieces[:-1]:
            assert re.fullmatch(r"[^\0]*\0+(\^C)?", piece), repr(self.said)
        assert "\0" not in pieces[-1], repr(self.said)
        return "".join(pieces).replace("\0", "").replace("\r\n", "\n")
