"""What the tasks work out: shares that lose nothing, figures of the whole, numbers that come again."""

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from container_manager import task2
from container_manager.errors import ContainerError

PROGRAM = Path(__file__).resolve().parents[2] / "images/task/files/workspace/task2.py"
VALUES = st.floats(-1e6, 1e6)


def _in_container(file: Path, index: int, shares: int) -> str:
    argv = [sys.executable, PROGRAM, "--file", file, "--idx", str(index), "--of", str(shares)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def _figures(values: numpy.ndarray) -> task2.Figures:
    return task2.Figures(len(values), values.sum(), values.max(), values.min(), values.std())


@given(st.integers(0, 10**7), st.integers(1, 100))
def test_shares_lose_nothing_and_are_alike(size: int, shares: int) -> None:
    sizes = [task2.share_size(size, index, shares) for index in range(shares)]
    assert sum(sizes) == size
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.lists(VALUES, min_size=1, max_size=30), min_size=1, max_size=9))
def test_figures_of_all_shares_are_those_of_the_whole(shares: list[list[float]]) -> None:
    whole = numpy.concatenate(shares)
    found = task2.combined([_figures(numpy.array(share)) for share in shares])
    assert (found.count, found.max, found.min) == (len(whole), whole.max(), whole.min())
    assert found.sum == pytest.approx(whole.sum(), rel=1e-9, abs=1e-6)
    assert found.average == pytest.approx(whole.mean(), rel=1e-9, abs=1e-6)
    assert found.deviation == pytest.approx(whole.std(), rel=1e-6, abs=1e-3)


@pytest.mark.parametrize(("size", "shares"), [(1000, 4), (1001, 3), (7, 7), (10, 4), (1, 1)])
def test_program_of_the_containers_agrees_with_numpy(tmp_path: Path, size: int, shares: int) -> None:
    file = tmp_path / "data.csv"
    task2.write_numbers(file, size, seed=1)
    numbers = numpy.loadtxt(file, ndmin=1)
    said = [_in_container(file, index, shares) for index in range(shares)]
    first = 0
    for index, text in enumerate(said):
        count = task2.share_size(size, index, shares)
        share = numbers[first : first + count]
        first += count
        figures = task2.parsed(text, count)
        assert (figures.max, figures.min) == (share.max(), share.min())
        assert figures.sum == pytest.approx(share.sum(), rel=1e-12)
        assert figures.deviation == pytest.approx(share.std(), rel=1e-9, abs=1e-12)
    whole = task2.whole(said, size)
    expected = [numbers.sum(), numbers.mean(), numbers.max(), numbers.min(), numbers.std()]
    assert list(whole.values()) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_numbers_are_as_many_as_asked_for_and_come_again_with_the_same_seed(tmp_path: Path) -> None:
    def numbers(seed: int | None) -> str:
        task2.write_numbers(tmp_path / "data.csv", 500, seed)
        return (tmp_path / "data.csv").read_text()

    assert numbers(5) == numbers(5) != numbers(6)
    assert numbers(None) != numbers(None)
    found = numpy.loadtxt(tmp_path / "data.csv")
    assert len(found) == 500
    assert ((found >= 0) & (found < 1)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


def test_data_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(ContainerError, match=r"data\.csv cannot be written"):
        task2.write_numbers(tmp_path / "data/data.csv", 5, seed=1)


@pytest.mark.parametrize("text", ["", "Killed", "{'sum': 1}", "[]", "__import__('os').system('true')"])
def test_output_that_is_no_result(text: str) -> None:
    with pytest.raises(ContainerError, match="no result"):
        task2.parsed(text, 5)
