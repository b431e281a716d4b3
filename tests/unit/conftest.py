"""What tests of several modules need."""

import signal
import sys
from collections.abc import Iterator

import pytest

from container_manager import interrupts


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Have signals raise Interrupted, as they do in a command; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in interrupts._SIGNALS}
    hook = sys.unraisablehook
    for number in before:
        signal.signal(number, signal.SIG_DFL)  # nohup(1), for one, has us ignore some
    interrupts.raise_them()
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)
