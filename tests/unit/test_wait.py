"""Waits end: with the value, or at their deadline."""

import time

import pytest

from cfiddle_cluster import wait
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.wait import wait_until, wait_until_none


def test_value_is_returned_as_soon_as_it_is_true() -> None:
    values = iter([None, "", 0, "there"])
    assert wait_until(lambda: next(values), timeout_s=5, interval_s=0, what="it") == "there"


def test_deadline_is_kept_and_names_what_was_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match="the engine to start") as caught:
        wait_until(lambda: False, timeout_s=0.3, interval_s=0.01, what="the engine to start", remedy="look")
    assert 0.3 <= time.monotonic() - began < 2
    assert caught.value.remedy == "look"


def test_who_is_left_at_the_deadline_is_named() -> None:
    answers = iter([["c1", "c2", "c3"], ["c1", "c3"]])
    with pytest.raises(ClusterError, match=r"in vain: c1, c3 to answer\n→ look"):
        wait_until_none(lambda: next(answers), timeout_s=0.1, what="{} to answer", remedy="look")
    answers = iter([["c1"], []])
    wait_until_none(lambda: next(answers), timeout_s=5, what="{} to answer")


def test_predicate_is_asked_when_there_is_no_time_at_all() -> None:
    assert wait_until(lambda: 1, timeout_s=0, what="it")


def test_predicate_is_asked_once_more_at_the_deadline() -> None:
    """A pause that passes the deadline does not hide what came true in it."""
    began = time.monotonic()
    assert wait_until(lambda: time.monotonic() - began > 0.15, timeout_s=0.1, interval_s=0.2, what="it")


def test_who_is_patient_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wait, "PATIENCE", 10.0)
    began = time.monotonic()
    assert wait_until(lambda: time.monotonic() - began > 0.3, timeout_s=0.1, interval_s=0.01, what="it")


def test_who_is_patient_looks_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(wait, "PATIENCE", 10.0)
    monkeypatch.setattr(wait.time, "sleep", pauses.append)
    looks = iter([False, True])
    assert wait_until(lambda: next(looks), timeout_s=1, interval_s=0.5, what="it")
    assert pauses == [5.0]
