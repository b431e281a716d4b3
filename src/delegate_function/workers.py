"""Threads that make calls, one after another, each in a lease of its own."""

from __future__ import annotations

import atexit
import contextlib
import copy
import math
import operator
import os
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from delegate_function.callinfo import CallInfo
from delegate_function.delegates import BaseDelegate
from delegate_function.errors import LeaseEnded
from delegate_function.futures import Future
from delegate_function.waiting import Standing, show_together

_FRUITLESS = 10
_CLOSE_S = 5.0
_AGAIN_S = 0.1


class Place(Protocol):
    """Where a worker's calls are made, one at a time: a lease, or a chain without one."""

    @property
    def last_call(self) -> CallInfo | None:
        """Return what is known of the last call."""

    @property
    def job_id(self) -> str | None:
        """Return the number of the job that it is in, once there is one."""

    @property
    def is_over(self) -> bool:
        """Say whether no further call can be made here."""

    def start(self) -> None:
        """Begin to make it ready."""

    def wait(self) -> None:
        """Return when calls can be made."""

    def call(self, obj: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, results: str) -> Any:
        """Make a call."""

    def cancel(self) -> None:
        """End the call that runs now, if one does."""

    def close(self) -> None:
        """End all there is here, once the call that runs has ended; also what is being started."""


class Unleased:
    """A chain, taken anew for each call."""

    def __init__(self, delegate: BaseDelegate) -> None:
        self._delegate = copy.copy(delegate)  # for `last_call`, which is one thread's

    @property
    def last_call(self) -> CallInfo | None:
        return self._delegate.last_call

    @property
    def job_id(self) -> str | None:
        return None

    @property
    def is_over(self) -> bool:
        return False

    def start(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def call(self, obj: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, results: str) -> Any:
        return self._delegate.call(obj, method, args, kwargs, results=results)

    def cancel(self) -> None:
        if call := self.last_call:
            call.cancel()

    def close(self) -> None:
        pass


class _Task:
    """A call that waits for its turn, and how many leases ended before it began."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.arguments = (function, *arguments)
        self.keywords = keywords
        self.fruitless = 0


class Workers:
    """A few threads, started as calls come, that have a place each and make one call after another there."""

    def __init__(
        self,
        new_place: Callable[[], Place],
        most: int,
        *,
        results: str,
        idle_s: float,
        turn_s: float = math.inf,
        ends: bool = True,
    ) -> None:
        self.new_place = new_place
        self.results = results
        self.idle_s = idle_s
        self.turn_s = turn_s
        self.ends_running_calls = ends
        self._wanted = self._most = most
        self._refusal: BaseException | None = None
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Future[Any], _Task] = OrderedDict()
        self._workers: set[_Worker] = set()
        self._finished = False
        self._shown_calls = 0
        self._process = os.getpid()
        _all.add(self)

    def add(self, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Future[Any]:
        """Make a call as soon as a worker is free."""
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked from the one that has the executor; make another one here")
        future: Future[Any] = Future(self)
        with self._changed:
            if self._finished:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting[future] = _Task(function, arguments, keywords)
            self._shown_calls += 1
            if self._shown_calls == 1:
                show_together(self._standing)
            free = sum(worker.future is None or worker.future.done() for worker in self._workers)
            if len(self._waiting) > free and len(self._workers) < self._most:
                worker = _Worker(self)
                worker.start()
                self._workers.add(worker)
            self._changed.notify_all()
        return future

    def end(self, future: Future[Any]) -> None:
        """End a call that was cancelled; give up at once what nobody needs any more."""
        with self._changed:
            self._waiting.pop(future, None)
            workers = [worker for worker in self._workers if worker.future is future]
            given_up = self._give_up()
        if not workers and not given_up:
            return

        def end() -> None:
            for worker in workers:
                worker.end(future)
            for worker in given_up:
                worker.let_go()

        # It takes a moment, and who cancels may be an event loop.
        threading.Thread(target=end, name="delegate_function cancel", daemon=True).start()

    def finish(self, *, wait: bool, cancel: bool) -> None:
        """Take no more calls."""
        with self._changed:
            self._finished = True
            cancelled = self._take_all() if cancel else []
            workers, given_up = list(self._workers), self._give_up()
            self._changed.notify_all()
        for future in cancelled:
            future.settle_as_cancelled()
        for worker in given_up:
            worker.let_go()
        if wait:
            for worker in workers:
                worker.join()

    def abandon(self) -> None:
        """Cancel all calls, give all places back, and wait for that within bounds."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._finished = True
            workers = list(self._workers)
            cancelled = self._take_all() + [worker.future for worker in workers if worker.future is not None]
            for worker in workers:
                worker.given_up = True
            self._changed.notify_all()
        for future in cancelled:
            future.settle_as_cancelled()
        for worker in workers:
            worker.let_go()
        deadline = time.monotonic() + _CLOSE_S
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))

    def _standing(self) -> Standing | None:
        """Return how the calls stand that were added since there was none; nothing when all are done."""
        with self._changed:
            running = sum(worker.future is not None and not worker.future.done() for worker in self._workers)
            open_ = running + len(self._waiting)
            if not open_:
                self._shown_calls = 0
                return None
            jobs = [job for worker in self._workers if not worker.has_place and (job := worker.job_id)]
            return Standing(self._shown_calls - open_, self._shown_calls, running, jobs)

    # for the workers

    def settle_in(self, worker: _Worker) -> bool:
        """Note that a worker got a place; return whether it is still to use it."""
        with self._changed:
            worker.has_place = not worker.given_up
        self._tell_refusal()
        return worker.has_place

    def take(self, worker: _Worker, idle_s: float) -> _Task | None:
        """Return the next call, or nothing if there was none for this time or there is to be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._finished, idle_s)
            if self._waiting and not worker.given_up:
                worker.future, task = self._waiting.popitem(last=False)
                worker.future.begun = True
                return task
            given_up = self._give_up()
        for other in given_up:
            other.let_go()
        return None

    def put_back(self, worker: _Worker, task: _Task, error: LeaseEnded) -> None:
        """Let another lease have the call before which this one ended."""
        task.fruitless += 1
        with self._changed:
            future, worker.future = worker.future, None
            assert future is not None
            future.begun = False
            if not future.done() and task.fruitless < _FRUITLESS:
                self._waiting[future] = task
                self._waiting.move_to_end(future, last=False)
                return
        future.settle(None, error=error)

    def leave(self, worker: _Worker) -> None:
        """Note that a worker's call is over."""
        with self._changed:
            worker.future = None
            self._changed.notify_all()

    def refuse(self, worker: _Worker, error: BaseException) -> None:
        """Make do with the other workers where one could get no place; if there are none, fail the calls that wait."""
        with self._changed:
            self._workers.discard(worker)
            self._most = len(self._workers) or self._wanted
            self._refusal = error if self._workers else None
            refused = [] if self._workers else self._take_all()
        for future in refused:
            future.settle(None, error=copy.copy(error))
        self._tell_refusal()

    def _tell_refusal(self) -> None:
        with self._changed:
            if self._refusal is None or not any(worker.has_place for worker in self._workers):
                return
            error, self._refusal = self._refusal, None
        text = f"calls are made {self._most} at a time, for no further lease is to be had: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def go_on(self, worker: _Worker) -> bool:
        """Say whether a worker is needed for another turn; strike it off otherwise."""
        with self._changed:
            worker.given_up = False
            if self._waiting and worker in self._workers:
                return True
            self._workers.discard(worker)
            return False

    def wait(self, predicate: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so, at most for this time."""
        with self._changed:
            self._changed.wait_for(predicate, seconds)

    def _take_all(self) -> list[Future[Any]]:
        futures = list(self._waiting)
        self._waiting.clear()
        return futures

    def _give_up(self) -> list[_Worker]:
        """Mark and return the workers that have no place yet, if no call waits for one."""
        given_up = [] if self._waiting else [worker for worker in self._workers if not worker.has_place]
        for worker in given_up:
            worker.given_up = True
        return given_up


class _Worker(threading.Thread):
    """A thread with one place at a time.

    Attributes: `future` of the call that it makes, `has_place`, and `given_up` when its place is not needed any more.
    """

    def __init__(self, workers: Workers) -> None:
        # Threads that are no daemons are waited for before anybody is told that the interpreter ends.
        super().__init__(name="delegate_function worker", daemon=True)
        self.future: Future[Any] | None = None
        self.has_place = False
        self.given_up = False
        self._workers = workers
        self._place: Place | None = None
        self._leaving = threading.Lock()  # so that who cancels a call does not hit the next one

    @property
    def job_id(self) -> str | None:
        """The number of the job that its place is in."""
        place = self._place
        return place.job_id if place else None

    def run(self) -> None:
        """Take turns as long as calls wait."""
        while True:
            self._take_turn()
            if not self._workers.go_on(self):
                return

    def end(self, future: Future[Any]) -> None:
        """End a call that is made, or about to be."""
        while self.future is future:
            with self._leaving:
                if self.future is future and (place := self._place):
                    place.cancel()
            self._workers.wait(lambda: self.future is not future, _AGAIN_S)

    def let_go(self) -> None:
        """End the place of a worker that was given up, also one that is only being started."""
        deadline, place = time.monotonic() + _CLOSE_S, self._place
        while place and self._place is place and time.monotonic() < deadline:
            with self._leaving:
                place.cancel()
            if self.future is None:
                place.close()
            self._workers.wait(lambda: self._place is not place, _AGAIN_S)

    def _take_turn(self) -> None:
        try:
            self._place = self._workers.new_place()
            try:
                if not self.given_up:
                    self._place.start()
                    with contextlib.suppress(LeaseEnded):  # the first call finds that out, and is counted for it
                        self._place.wait()
                    if self._workers.settle_in(self):
                        self._make_calls(self._place)
            finally:
                self.has_place = False
                self._place.close()
                self._place = None
        except BaseException as error:
            if not self.given_up:
                self._workers.refuse(self, error)

    def _make_calls(self, place: Place) -> None:
        ends, idle_s = time.monotonic() + self._workers.turn_s, self._workers.idle_s
        while time.monotonic() < ends and (task := self._workers.take(self, idle_s)):
            try:
                idle_s = self._workers.idle_s if self._make_call(place, task) else 0
            except LeaseEnded as error:
                with self._leaving:
                    self._workers.put_back(self, task, error)
                return
            finally:
                del task  # with the arguments in it
                with self._leaving:
                    self._workers.leave(self)
            if place.is_over:
                return

    def _make_call(self, place: Place, task: _Task) -> bool:
        """Make a call; return whether somebody wanted it to its end."""
        future = self.future
        assert future is not None
        if future.done():
            return False
        try:
            # A module has no state that would come back after the call.
            value = place.call(operator, "call", task.arguments, task.keywords, results=self._workers.results)
        except BaseException as error:  # also one that would end a process: it is for who asked for the call
            if isinstance(error, LeaseEnded) and place.is_over:  # otherwise the call itself raised it
                raise
            future.settle(place.last_call, error=error)
        else:
            future.settle(place.last_call, value)
        return not future.cancelled()


_all: weakref.WeakSet[Workers] = weakref.WeakSet()


@atexit.register
def _abandon_all() -> None:
    for workers in list(_all):
        workers.abandon()
