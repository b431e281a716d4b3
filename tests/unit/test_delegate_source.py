"""Source code of others: it travels as text, runs at the end of the call alone, and fails with its own lines."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from delegate_function import (
    CallNotSent,
    ConfigurationError,
    RemoteError,
    ResultNotReturned,
    SourceCode,
    SubprocessDelegate,
    TrivialDelegate,
)

MEAN = """\
from dataclasses import dataclass
import os

@dataclass
class Total:
    value: float = 0

def mean(numbers, *, places=2):
    total = Total()
    for number in numbers:
        total.value += number
    return round(total.value / len(numbers), places)

def where():
    return os.getpid(), __name__, __file__
"""


def test_a_function_of_a_file_is_called_somewhere_else(tmp_path: Path) -> None:
    (tmp_path / "ada.py").write_text(MEAN)
    source = SourceCode(file=tmp_path / "ada.py")
    assert source.call(SubprocessDelegate(), "mean", [1, 2, 4], places=3) == 2.333
    pid, name, file = source.call(SubprocessDelegate(), "where")
    assert pid != os.getpid()
    assert (name, file) == ("submission", "ada.py")
    assert "submission" not in sys.modules


def test_it_never_runs_in_the_callers_process() -> None:
    with pytest.raises(ConfigurationError, match="this chain stays here"):
        SourceCode("import os; os._exit(1)").call(TrivialDelegate(), "f")


BROKEN: dict[str, tuple[str, str, list[str]]] = {
    "no Python": ("def mean(x:\n", r"SyntaxError: .*ada\.py, line 1", ['File "ada.py", line 1', "def mean(x:"]),
    "an exception while it is read": ("x = 1\nx / 0\n", "ZeroDivisionError", ['File "ada.py", line 2', "x / 0"]),
    "an exception of the function": (
        "def mean(x):\n    return missing\n",
        "NameError: name 'missing'",
        ['File "ada.py", line 2, in mean', "return missing"],
    ),
    "another function": ("def median(x): return 1\n", r"ada\.py defines no function 'mean'", []),
    "no function": ("mean = 1\n", "defines no function 'mean'", []),
    "an exit": ("raise SystemExit('enough')\n", "SystemExit: enough", ['File "ada.py", line 1']),
    "a NUL": ("def mean(x): return '\0'", "null bytes", []),
}


@pytest.mark.parametrize(("text", "message", "lines"), BROKEN.values(), ids=BROKEN.keys())
def test_what_is_wrong_comes_as_text_with_its_file_and_line(text: str, message: str, lines: list[str]) -> None:
    with pytest.raises(RemoteError, match=message) as raised:
        SourceCode(text, name="ada.py").call(SubprocessDelegate(), "mean", 1)
    for line in lines:
        assert line in str(raised.value.__cause__)


def test_what_is_no_data_is_not_returned() -> None:
    with pytest.raises(ResultNotReturned, match="result is a generator"):
        SourceCode("def f(): yield 1").call(SubprocessDelegate(), "f")


def test_files_go_with_it_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_text("text")
    source = SourceCode("def f(): open('out', 'w').write(open('in').read().upper())")
    source.call(SubprocessDelegate(), "f", inputs=["in"], outputs=["out"])
    assert (tmp_path / "out").read_text() == "TEXT"


def test_a_submission_that_is_no_text_in_a_file_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe")
    (tmp_path / "long.py").write_bytes(b"#" * 2_000_000)
    for name in ("link.py", "binary.py", "long.py", "missing.py", "."):
        with pytest.raises(CallNotSent):
            SourceCode(file=tmp_path / name)


@pytest.mark.parametrize("arguments", [{}, {"text": "x", "file": "y"}])
def test_either_text_or_a_file_is_given(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="either text or"):
        SourceCode(**arguments)
