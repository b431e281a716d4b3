"""What a long command shows, on a terminal and elsewhere, and what it says when a step fails."""

import errno
import io

import pytest

from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.report import Report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Flushed(io.StringIO):
    """Knows what was to be seen by others: what was flushed."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def test_each_step_is_a_line_with_its_seconds() -> None:
    stream = io.StringIO()
    report = Report(again="./invoke up", stream=stream)
    with report.step("swarm"):
        report.note("c1 joins")
    begun, note, ended = stream.getvalue().splitlines()
    assert begun.split() == ["swarm", "…"]
    assert note.strip() == "c1 joins"
    assert ended.split() == ["swarm", "0.0", "s"]


def test_step_is_seen_when_it_begins() -> None:
    stream = Flushed()
    with Report(again="./invoke up", stream=stream).step("images"):
        assert "images" in stream.seen
    assert "0.0 s" in stream.seen


def test_terminal_sees_one_line_that_is_overwritten() -> None:
    stream = Terminal()
    with Report(again="./invoke up", stream=stream).step("swarm"):
        pass
    before, after = stream.getvalue().split("\r")
    assert before.strip() == "swarm"
    assert after.split() == ["swarm", "0.0", "s"]
    assert stream.getvalue().count("\n") == 1


def test_failure_names_the_step_the_remedy_and_the_command_that_goes_on() -> None:
    stream = io.StringIO()
    with pytest.raises(ClusterError) as caught, Report(again="./invoke up", stream=stream).step("registry"):
        raise ClusterError("port 5000 is in use", "end what holds it")
    assert str(caught.value) == "registry: port 5000 is in use\n→ end what holds it\n→ then run again: ./invoke up"
    assert stream.getvalue().endswith("s  failed\n")


def test_failure_without_a_remedy_says_where_to_look() -> None:
    report = Report(again="./invoke up", stream=io.StringIO())
    with pytest.raises(ClusterError, match=r"\./invoke doctor"), report.step("registry"):
        raise ClusterError("it broke")


def test_interrupted_step_is_shown_as_such_and_what_interrupts_goes_on() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Report(again="./invoke up", stream=stream).step("images"):
        raise KeyboardInterrupt
    assert stream.getvalue().endswith("s  interrupted\n")


def test_full_disk_is_a_failure_like_any_other() -> None:
    stream = io.StringIO()
    with pytest.raises(ClusterError, match="images: the disk is full") as caught:
        _fail_with(Report(again="./invoke up", stream=stream), OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.remedy.endswith("→ then run again: ./invoke up")
    assert stream.getvalue().endswith("failed\n")


def _fail_with(report: Report, error: Exception) -> None:
    with report.step("images"):
        raise error
