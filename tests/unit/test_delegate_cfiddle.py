"""What CFiddle's hooks are given, without CFiddle. What they do is tested with it, in the images and on the cluster."""

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from delegate_function import ConfigurationError, CountersUnavailable, ResultNotReturned, SubprocessDelegate
from delegate_function import cfiddle as hooks
from delegate_function.cfiddle import COLUMNS, build_method, execution_method


def test_a_column_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no column cpu, wall; there are: node, .*, counters"):
        execution_method(columns=["wall", "node", "cpu"])
    execution_method(columns=COLUMNS)
    execution_method(columns="node")


def test_cfiddle_copies_its_configuration_and_the_delegates_stay_the_same() -> None:
    for method in (execution_method(SubprocessDelegate()), build_method(SubprocessDelegate())):
        assert copy.deepcopy({"type": method})["type"] is method


def test_without_a_delegate_both_lead_into_a_sandbox_of_a_job() -> None:
    assert execution_method().delegate.compile() == [{"type": "slurm"}, {"type": "sandbox", "profile": "default"}]
    assert build_method().delegate.compile() == [
        {"type": "slurm", "options": {"partition": "shared"}},
        {"type": "sandbox", "profile": "build"},
    ]


@pytest.fixture
def cfiddle_exception(monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    class CFiddleException(Exception):
        pass

    monkeypatch.setitem(sys.modules, "cfiddle", ModuleType("cfiddle"))
    exceptions = SimpleNamespace(CFiddleException=CFiddleException)
    monkeypatch.setitem(sys.modules, "cfiddle.Exceptions", exceptions)  # type: ignore[arg-type]
    monkeypatch.setattr(hooks, "pack", lambda runner, invocations: {})
    return CFiddleException


class Saying(SubprocessDelegate):
    """A delegate whose call returns what it was given."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def call(self, *arguments: Any, **options: Any) -> Any:
        return self.said


def _told(said: Any, tmp_path: Any) -> Any:
    """Return what CFiddle finds in the file of the results."""
    command = ["cfiddle-run", "--runner", "x", "--results", str(tmp_path / "results")]
    written: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks.pickle, "dump", lambda value, file: written.append(value))
        execution_method(Saying(said), results="data").execute(command, SimpleNamespace(get_invocations=list))
    return written[0]


def test_what_is_told_of_an_error_does_nothing_to_a_terminal(cfiddle_exception: type[Exception], tmp_path: Any) -> None:
    told = _told({"error": ["CFiddleException", ["\x1b[31mred\x1b[0m\nline", "\x1b]0;title\x07b"]]}, tmp_path)
    assert type(told) is cfiddle_exception
    assert told.args == ("red\nline", "b")
    with pytest.raises(CountersUnavailable, match="no counter INST here, none") as raised:
        _told({"no counters": [["\x1b[31mINST"], "\x1b]52;c;Zm9v\x07none"]}, tmp_path)
    assert "\x1b" not in str(raised.value) + raised.value.details["reason"]


@pytest.mark.usefixtures("cfiddle_exception")
@pytest.mark.parametrize(
    "said", [{"error": ["CFiddleException", [7]]}, {"no counters": [[7], "x"]}, {"no counters": [["x"], 7]}]
)
def test_what_is_told_of_an_error_is_text(said: Any, tmp_path: Any) -> None:
    with pytest.raises(ResultNotReturned, match="no results of CFiddle's"):
        _told(said, tmp_path)
