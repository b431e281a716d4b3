"""What a long command shows: each step with its name and seconds, readable with and without a terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from cfiddle_cluster.errors import FOREIGN, ClusterError, explained


@dataclass
class Report:
    """Prints one line a step when it ends; on a terminal the line stands there, without seconds, from its beginning.

    Attributes:
        stream: where it prints.
        again: the command that goes on after a failure.
    """

    again: str
    stream: TextIO = field(default_factory=lambda: sys.stderr)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show a step; a failure in it names the step and the command that goes on.

        Raises:
            ClusterError: whatever fails in the step, with the step's name in front.
        """
        began = time.monotonic()
        self._show(f"  {name:<60}" if self.stream.isatty() else f"  {name} …\n")
        try:
            yield
        except (ClusterError, *FOREIGN) as failure:
            self._end(name, began, "failed")
            error = failure if isinstance(failure, ClusterError) else explained(failure)
            remedy = error.remedy or "see ./invoke doctor and ./invoke logs"
            raise ClusterError(f"{name}: {error.message}", f"{remedy}\n→ then run again: {self.again}") from failure
        except BaseException:
            self._end(name, began, "interrupted")
            raise
        self._end(name, began, "")

    def note(self, text: str) -> None:
        """Show something that happens within a step."""
        self._show(f"\n      {text}" if self.stream.isatty() else f"      {text}\n")

    def _end(self, name: str, began: float, how: str) -> None:
        took = f"{time.monotonic() - began:6.1f} s"
        rest = f"{took}{'  ' + how if how else ''}\n"
        self._show(f"\r  {name:<60}{rest}" if self.stream.isatty() else f"  {name:<60}{rest}")

    def _show(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone is no reason to leave things half done
            self.stream.write(text)
            self.stream.flush()
