"""How containers are called."""

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from container_manager import names
from container_manager.errors import ContainerError

NUMBERS = st.sets(st.integers(0, 60))


@pytest.mark.parametrize("name", ["a", "my_task_container_0", "A.b-c_9", "9", "x" * 63])
def test_legal_names(name: str) -> None:
    assert names.is_legal(name)


@pytest.mark.parametrize(
    "name", ["", "../x", "-rf", "a b", "x" * 64, "x" * 300, "ä", "٣", "a\n", "a/b", ".a", "_a", "a;b", "a\0"]
)
def test_illegal_names(name: str) -> None:
    assert not names.is_legal(name)


def test_lowest_free_numbers_come_next() -> None:
    taken = ["my_task_container_0", "my_task_container_2", "my_task_container_x", "other_1"]
    assert names.next_names(taken, 3) == ["my_task_container_1", "my_task_container_3", "my_task_container_4"]


@given(NUMBERS, st.integers(1, 20))
def test_names_are_new_distinct_and_leave_no_gap_below(taken: set[int], number: int) -> None:
    before = {f"{names.PREFIX}_{count}" for count in taken}
    new = names.next_names(before, number)
    assert len(set(new)) == number
    assert not set(new) & before
    last = int(new[-1].rpartition("_")[2])
    assert {f"{names.PREFIX}_{count}" for count in range(last + 1)} <= before | set(new)
    assert all(names.is_legal(name) and names.is_managed(name) for name in new)


def _give(held: Event, let_go: Event) -> None:
    with names.giving():
        held.set()
        let_go.wait(30)


def test_nobody_else_gives_names_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    context = multiprocessing.get_context("fork")
    held, let_go = context.Event(), context.Event()
    other = context.Process(target=_give, args=(held, let_go))
    other.start()
    assert held.wait(30)
    with pytest.raises(ContainerError, match=r"fuser .*names\.lock"), names.giving(timeout_s=0.1):
        pytest.fail("two give names at the same time")
    let_go.set()
    with names.giving(timeout_s=30):
        pass
    other.join(30)
    assert other.exitcode == 0


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ContainerError, match="no lock can be kept"), names.giving():
        pytest.fail("names are given without a lock")


def test_the_tenth_comes_after_the_ninth() -> None:
    found = ["my_task_container_10", "my_task_container_9", "my_task_container", "other"]
    assert sorted(found, key=names.in_order) == [
        "my_task_container",
        "my_task_container_9",
        "my_task_container_10",
        "other",
    ]
