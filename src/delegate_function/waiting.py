"""What a person sees while calls wait: their place in the queue, then how far they are, then nothing any more.

Nothing is shown in the first half second, so a short call pays nothing for this. DELEGATE_FUNCTION_PROGRESS=no turns
it off.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from delegate_function.places import Place, Places
from delegate_function.screens import Notebook, Screen, screen

if TYPE_CHECKING:
    from delegate_function.callinfo import CallInfo
    from delegate_function.conversation import Conversation, Exchange

_QUIET_S = 0.5
_TICK_S = 0.5
_IN_LINE = ("None", "Priority", "Resources")


def waits(job_id: str, place: Place | None) -> str:
    """Return in words how a job waits: "job 412 waits: 3rd of 7, should start at 14:32 (in 2 min)"."""
    text = f"job {job_id} waits"
    if place is None:
        return text
    known = []
    if place.place and place.of:
        known.append(f"{_ordinal(place.place)} of {place.of}")
    elif place.reason not in _IN_LINE:
        known.append(place.reason)
    if place.start is not None and (left := place.start - time.time()) > 0:
        day = "%a " if left > 20 * 3600 else ""
        known.append(f"should start at {time.strftime(f'{day}%H:%M', time.localtime(place.start))} (in {_time(left)})")
    return f"{text}: {', '.join(known)}" if known else text


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _time(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.0f} h"


class Display:
    """How one call stands, shown while its caller waits for the next event.

    In other threads than the first nothing is shown: who runs many calls at once shows what they come to together.
    """

    def __init__(self, exchange: Exchange, conversation: Conversation, info: CallInfo, *, silent: bool = False) -> None:
        self._exchange = exchange
        self._conversation = conversation
        self._info = info
        self._began = time.monotonic()
        self._running_since: float | None = None
        self._places = Places()
        self._screen: Screen | None = None
        silent = silent or threading.current_thread() is not threading.main_thread()
        self._due = math.inf if silent else self._began + _QUIET_S

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._places.close()
        if self._screen is not None:
            self._screen.close()

    def next_event(self) -> Any:
        """Return the call's next event; show meanwhile how the call stands."""
        while True:
            left = self._due - time.monotonic()
            if left <= 0:
                self._tick()
                continue
            with contextlib.suppress(queue.Empty):
                return self._exchange.events.get(timeout=left if left < math.inf else None)

    def give_way(self, text: str) -> None:
        """Make room for output of the call."""
        if self._screen is not None:
            self._screen.give_way(text)

    def _tick(self) -> None:
        if self._screen is None:
            self._screen = screen()
        if self._screen is None:
            self._due = math.inf
            return
        self._screen.show(self._text(), self._exchange.progress)
        self._due = time.monotonic() + _TICK_S

    def _text(self) -> str:
        job_id = self._info.job_id or self._conversation.job_id
        if not self._info.hops and job_id:
            return waits(job_id, self._places.look([job_id]).get(job_id))
        now = time.monotonic()
        if not self._info.hops:
            return f"waits for {self._conversation.where}, {_time(now - self._began)}"
        if self._running_since is None:
            self._running_since = now
        elapsed = _time(now - self._running_since)
        if job_id:
            return f"job {job_id} runs on {self._info.hops[-1].get('node')} ({elapsed})"
        return f"in {self._info.where} for {elapsed}"


class Standing(NamedTuple):
    """How many of an executor's calls are done, of how many, how many run, and its jobs that wait in the queue."""

    done: int
    of: int
    running: int
    jobs: Sequence[str]


def show_together(standing: Callable[[], Standing | None]) -> None:
    """Show in a notebook how the calls of an executor stand together, until there is nothing to say any more.

    A thread does it: who has the futures may wait for them or not. In a terminal nothing is shown, for what the caller
    writes meanwhile would run into the line.
    """
    display = screen()
    if isinstance(display, Notebook):
        threading.Thread(target=_show_together, args=(standing, display), daemon=True).start()


def _show_together(standing: Callable[[], Standing | None], display: Screen) -> None:
    places = Places()
    time.sleep(_QUIET_S)
    try:
        while calls := standing():
            display.show(_together(calls, places))
            time.sleep(_TICK_S)
    finally:
        places.close()
        display.close()


def _together(calls: Standing, places: Places) -> str:
    parts = [f"{calls.done} of {calls.of} calls are done"]
    if calls.running:
        parts.append(f"{calls.running} run" if calls.running > 1 else "1 runs")
    if calls.jobs:
        known = places.look(calls.jobs)
        first = min(calls.jobs, key=lambda job: (known.get(job, Place()).place or math.inf, int(job)))
        parts.append(waits(first, known.get(first)))
    return ", ".join(parts)
