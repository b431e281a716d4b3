"""Text of others loses what a terminal obeys, however it is cut, and keeps all else."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from delegate_function.terminal import Cleaner, clean

OBEYED = {
    "\x1b[1;31mred\x1b[0m": "red",
    "\x9b31mred": "red",
    "\x1b[2J\x1b[Hclear": "clear",
    "\x1b]0;title\x07text": "text",
    "\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x9d52;c;Z2V0\x9ctext": "text",
    "\x1bPq#0;2;0\x1b\\picture": "picture",
    "\x1bcreset": "reset",
    "\x1b(0lines": "lines",
    "\x1b#8test": "test",
    "over\rwritten\x08\x7f\x00\x07": "overwritten",
    "left\u202eto\u2066right": "lefttoright",
    "one\u2028line": "oneline",
    "half\ud800": "half",
    "unfinished \x1b[31": "unfinished [31",
    "kept:\ttab\nline é 漢字 👍\u200d🔥\xa0space": "kept:\ttab\nline é 漢字 👍\u200d🔥\xa0space",
}


@pytest.mark.parametrize(("text", "shown"), OBEYED.items(), ids=repr)
def test_what_a_terminal_obeys_is_gone(text: str, shown: str) -> None:
    assert clean(text) == shown


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("text", OBEYED, ids=repr)
def test_it_is_gone_in_pieces_too(text: str, size: int) -> None:
    cleaner = Cleaner()
    pieces = [cleaner(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + cleaner("", final=True) == OBEYED[text]


def test_what_is_left_of_one_does_not_make_another() -> None:
    assert clean("\x1b\x1b[31m[31mtext") == "[31mtext"


def _is_obeyed(character: str) -> bool:
    return character not in "\n\t" and (character < " " or "\x7f" <= character <= "\x9f")


@settings(deadline=None)
@given(some.lists(some.text(some.sampled_from("\x1b\x9b\x9d\x07[]0;mP\\ \n\x00\ud800aé"))))
def test_no_piece_holds_anything_that_is_obeyed(texts: list[str]) -> None:
    cleaner = Cleaner()
    for shown in [*map(cleaner, texts), cleaner("", final=True), clean("".join(texts))]:
        assert not any(map(_is_obeyed, shown))
        shown.encode()


def test_what_is_too_long_is_cut() -> None:
    assert clean("x" * 50, limit=10) == "x" * 10 + "…"


def test_a_title_that_never_ends_is_shown_in_the_end() -> None:
    cleaner = Cleaner()
    assert cleaner("\x1b]0;") == ""
    assert "".join(cleaner("x" * 100) for _ in range(5)) == "]0;" + "x" * 500


@pytest.mark.parametrize("text", ["\x1b[", "\x1b]", "\x90", "\x1b[0", "\x1b", "\x1b]x\x1b"])
def test_no_text_takes_long(text: str) -> None:
    started = time.process_time()
    clean(text * 200_000)
    Cleaner()(text * 200_000)
    clean(text + "0" * 1_000_000)
    assert time.process_time() - started < 5
