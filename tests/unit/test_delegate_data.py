"""Results as data: what travels comes back equal, what does not is named, and what is forged is refused unopened."""

import contextlib
import io
import json
import math
import os
import pickle
import struct
import sys
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as some_arrays
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

import delegate_function
from delegate_function import (
    ConfigurationError,
    DelegateGenerator,
    HopFailed,
    RemoteError,
    ResultNotReturned,
    SandboxDelegate,
    SubprocessDelegate,
    TrivialDelegate,
    data,
    frames,
)
from delegate_function.data import MAX_DEPTH, NotData
from delegate_function.returned import Result

SRC = Path(delegate_function.__file__).parents[1]
Pair = namedtuple("Pair", "one two")


def _sent(value: Any) -> list[tuple[str, bytearray]]:
    return [(part.kind, bytearray(b"".join(part.pieces))) for part in data.encode(value)]


def _there_and_back(value: Any) -> Any:
    return data.decode(_sent(value))


# What travels.

VALUES = {
    "an int of 64 bits": -(2**63),
    "a longer int": 2**4000,
    "infinity": -math.inf,
    "a complex number": 1 - 2j,
    "a string with what is not ASCII": "é\x00\ud800\U0001f600",
    "a long string": "é" * 100_000,
    "bytes": bytes(range(256)),
    "long bytes": os.urandom(100_000),
    "lists": [[], [1, [2.5, None]], ["a", True]],
    "tuples": ((), (1, ("x",)), [(2,)]),
    "dicts": {"a": {"b": [{}]}, "": None},
    "keys that are no strings": {1: "one", 2.5: 0, "x": [1], None: 2, False: {}},
    "a dict that looks like the format": {"dict": {"tuple": [1]}, "pairs": [[1]]},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_values_come_back_equal_and_of_their_type(value: Any) -> None:
    back = _there_and_back(value)
    assert back == value
    assert type(back) is type(value)


def test_a_derived_type_comes_back_as_its_plain_one() -> None:
    back = _there_and_back([Pair(1, 2), Counter("aab"), np.str_("x"), bytearray(b"y")])
    assert back == [(1, 2), {"a": 2, "b": 1}, "x", b"y"]
    assert [type(one) for one in back] == [tuple, dict, str, bytes]


def test_not_a_number_comes_back() -> None:
    assert math.isnan(_there_and_back(math.nan))
    assert math.isnan(_there_and_back([math.nan, 1])[0])


_scalars = some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text() | some.binary()
_keys = some.text() | some.integers(-(2**63), 2**63 - 1) | some.none()
_values = some.recursive(
    _scalars,
    lambda inner: some.lists(inner) | some.tuples(inner, inner) | some.dictionaries(_keys, inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(_values)
def test_whatever_is_data_comes_back_equal(value: Any) -> None:
    back = _there_and_back(value)
    assert back == value
    assert repr(back) == repr(value)  # also -0.0, and True that is not 1


_dtypes = (
    some_arrays.boolean_dtypes()
    | some_arrays.integer_dtypes(endianness="?")
    | some_arrays.floating_dtypes(endianness="?")
    | some_arrays.complex_number_dtypes()
    | some_arrays.datetime64_dtypes()
    | some_arrays.timedelta64_dtypes()
    | some_arrays.unicode_string_dtypes(min_len=1)
    | some_arrays.byte_string_dtypes(min_len=1)
)


@settings(max_examples=200, deadline=None)
@given(some_arrays.arrays(_dtypes, some_arrays.array_shapes(min_dims=0, min_side=0)), some.booleans())
def test_whatever_array_comes_back_equal(array: Any, transposed: bool) -> None:
    array = array.T if transposed else array
    back = _there_and_back([array])[0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@settings(deadline=None)
@given(some_arrays.arrays(_dtypes.filter(lambda dtype: dtype.kind not in "SU"), ()))
def test_whatever_scalar_of_numpys_comes_back_equal(array: Any) -> None:
    back = _there_and_back({"x": array[()]})["x"]
    assert type(back) is type(array[()])
    assert back.tobytes() == array[()].tobytes()


def test_an_array_that_is_not_contiguous_comes_back_and_may_be_written_to() -> None:
    array = np.arange(24).reshape(2, 3, 4)[:, ::2, ::-1]
    back = _there_and_back(array)
    assert np.array_equal(back, array)
    back[0, 0, 0] = 7
    assert back[0, 0, 0] == 7


def _frames() -> dict[str, Any]:
    plain = pd.DataFrame(
        {
            "n": [1, 2, 3],
            "x": [0.5, math.nan, math.inf],
            "s": ["a", None, "c"],
            "mixed": [1, "one", 2.5],
            "when": pd.to_datetime(["2020-01-01", None, "2021-01-01"]),
            "yes": [True, False, True],
        }
    )
    return {
        "a plain one": plain,
        "strings of pandas' own": plain.astype({"s": "string"}),
        "an index of strings": plain.set_index("s"),
        "an index of several levels": plain.set_index(["n", "s"]),
        "a named range": plain.rename_axis(index="row", columns="column"),
        "columns of one name": pd.DataFrame(np.arange(6).reshape(2, 3), columns=["x", "x", 7]),
        "columns of several levels": plain.groupby("n").agg({"x": ["min", "max"], "yes": ["sum"]}),
        "no rows": plain.iloc[:0],
        "levels with what is missing": plain.set_index([pd.Index([0.5, math.nan, -1]), "mixed", "when", "yes"]),
        "levels of pandas' own strings": plain.astype({"s": "string"}).set_index(["s", "n"]),
        "no columns": plain[[]],
        "nothing": pd.DataFrame(),
    }


@pytest.mark.parametrize("name", _frames())
def test_frames_come_back_equal(name: str) -> None:
    frame = _frames()[name]
    pd.testing.assert_frame_equal(_there_and_back((frame,))[0], frame)


def test_series_come_back_equal() -> None:
    for series in (pd.Series([1.5, 2], name="x"), pd.Series(["a", "b"], index=[3, 5]), pd.Series([], dtype=int)):
        pd.testing.assert_series_equal(_there_and_back({"s": series})["s"], series)


def test_levels_come_back_in_their_order() -> None:
    labels = [f"{number * 7919 % 100_003}" for number in range(100_003)]
    frame = pd.DataFrame({"x": 1}, pd.MultiIndex.from_arrays([labels, range(100_003)]))
    back = _there_and_back(frame)
    assert back.index.levels[0].is_monotonic_increasing
    pd.testing.assert_frame_equal(back, frame)


def test_a_text_comes_back_whose_pieces_end_within_a_character() -> None:
    for text in ("a" + "\U0001f600" * 600_000, "ab" + "\ud800" * 700_000, "a" * 3_000_000):
        assert _there_and_back(text) == text


# What does not.


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NOT_DATA: dict[str, tuple[Any, str]] = {
    "a set in a list in a dict": ({"a": [0, 1, 2, {1}]}, r"result\['a'\]\[3\] is a set; as data travel numbers,"),
    "an object in a tuple": ((1, object()), r"result\[1\] is an object;"),
    "a key": ({"a": {(1, 2): 3}}, r"result\['a'\] has the key \(1, 2\), which is a tuple; only numbers and strings"),
    "a key of many bits": ({2**70: 1}, r"result has the key .* is too long"),
    "an array of objects": ({"x": np.array([{}])}, r"result\['x'\] is an array of object;"),
    "a structured array": (np.zeros(2, "i4,f8"), "result is an array of .*'f0'"),
    "a masked array": (np.ma.array([1]), "result is a MaskedArray"),
    "a column of categories": (pd.DataFrame({"c": pd.Categorical(["a"])}), r"result\['c'\] is a column of category"),
    "a column of bytes": (pd.Series(np.array([b"x"])), r"result is a column of \|S1; convert it with astype"),
    "an object in a column": (pd.DataFrame({"c": [1, {}]}), r"result\['c'\]\[1\] is a dict; only numbers"),
    "too deep": (_nested(MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels deep"),
    "a function": (len, "result is a builtin_function_or_method"),
}


@pytest.mark.parametrize(("value", "message"), NOT_DATA.values(), ids=NOT_DATA.keys())
def test_what_is_no_data_is_named_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(NotData, match=message):
        data.encode(value)


def test_a_list_that_holds_itself_is_too_deep() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NotData, match="levels deep"):
        data.encode(endless)


def test_as_deep_as_allowed_comes_back() -> None:
    assert _there_and_back(_nested(MAX_DEPTH)) == _nested(MAX_DEPTH)


def test_what_is_too_large_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_DOCUMENT", 1000)
    with pytest.raises(NotData, match=r"has 1\d\d\d bytes of JSON, at most 1000 travel; return long lists"):
        data.encode([10] * 400)
    monkeypatch.setattr(data, "MAX_PARTS", 3)
    with pytest.raises(NotData, match=r"result\[2\] is one array, .* too many; at most 2 travel"):
        data.encode([np.arange(3)] * 3)


def test_as_much_as_allowed_comes_back_and_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_VALUES", 100)
    assert _there_and_back([1] * 100) == [1] * 100
    with pytest.raises(NotData, match=r"has 101 values, .* at most 100 travel; return long lists"):
        data.encode([[1]] * 50 + [1])
    monkeypatch.setattr(data, "MAX_COLUMNS", 4)
    assert _there_and_back(pd.DataFrame({"a": ["x"]})).shape == (1, 1)
    with pytest.raises(NotData, match=r"is one column, .* too many; at most 4 travel"):
        data.encode(pd.DataFrame({"a": ["x"], "b": ["y"]}))
    monkeypatch.setattr(data, "MAX_WIDE", 140_000)
    wide = "é" * 70_000
    assert _there_and_back([wide, "a" * 200_000])[0] == wide
    with pytest.raises(NotData, match=r"result\[0\] is a text of 140001 bytes; at most 140000 travel of one that"):
        data.encode([wide + "a"])


def test_a_wide_text_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _sent("é" * 70_000)
    monkeypatch.setattr(data, "MAX_WIDE", 139_999)
    with pytest.raises(frames.ProtocolError, match="too large"):
        data.decode(parts)


# What is forged.


def _npy(descr: str, shape: str, content: bytes = b"", *, fortran: str = "False", length: int | None = None) -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) if length is None else length) + header + content


def _array(content: bytes) -> list[tuple[str, bytes]]:
    return [("data", b'{"array": 1}'), ("array", content)]


def _document(text: str) -> list[tuple[str, bytes]]:
    return [("data", text.encode())]


def _saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _series(index: str, column: str = "[1]") -> str:
    return f'{{"series": [[null], {index}, {column}]}}'


_RANGE = '{"range": [0, 1, 1], "names": [null]}'
_NONE = '{"range": [0, 0, 1], "names": [null]}'
_LABELS = '{"range": [0, 10001, 1], "names": [null]}'
_MANY = '{"range": [0, 100000000, 1], "names": [null]}'

FORGED: dict[str, list[tuple[str, bytes]]] = {
    "nothing": [],
    "no document": [("array", _npy("<f8", "(0,)"))],
    "no JSON": _document("{"),
    "no text": [("data", b"\xff\xfe")],
    "brackets without end": _document("[" * 1_000_000),
    "too deep": _document("[" * (MAX_DEPTH + 2) + '{"int": "1"}' + "]" * (MAX_DEPTH + 2)),
    "a number of more than 64 bits": _document("[1, 18446744073709551616]"),
    "a number of very many digits": _document("1" * 100_000),
    "an unknown object": _document('{"pickle": 1}'),
    "two objects": _document('{"int": "1", "text": 1}'),
    "no object": _document("{}"),
    "an int that is none": _document('{"int": "0x__import__"}'),
    "an int of a number": _document('{"int": 1}'),
    "base64 that is none": _document('{"base64": "*"}'),
    "a dict of a list": _document('{"dict": [1]}'),
    "pairs of one": _document('{"pairs": [[1]]}'),
    "a key that is a list": _document('{"pairs": [[[1], 2]]}'),
    "a tuple of a string": _document('{"tuple": "abc"}'),
    "a part that did not come": _document('{"text": 1}'),
    "a part by the wrong name": [("data", b'{"text": true}'), ("text", b"")],
    "a part of another kind": [("data", b'{"array": 1}'), ("bytes", _npy("<f8", "(0,)"))],
    "a part used twice": [("data", b'[{"text": 1}, {"text": 1}]'), ("text", b"x")],
    "a part that nothing uses": [("data", b"1"), ("text", b"x")],
    "text that is none": [("data", b'{"text": 1}'), ("text", b"\xff")],
    "an array without a header": _array(b""),
    "an array of objects, with its pickle": _array(_saved(np.array([print, {}], dtype=object))),
    "objects by their letter": _array(_npy("|O", "(1,)", bytes(8))),
    "a structured array": _array(_saved(np.zeros(1, "i4,f8"))),
    "bytes without a type": _array(_npy("|V8", "(1,)", bytes(8))),
    "an evaluated shape": _array(_npy("<f8", "(1+0,)", bytes(8))),
    "a shape of names": _array(_npy("<f8", "(len,)", bytes(8))),
    "a negative shape": _array(_npy("<f8", "(-1,)", bytes(8))),
    "more than came": _array(_npy("<f8", "(1000000000000,)", bytes(8))),
    "less than came": _array(_npy("<f8", "(1,)", bytes(16))),
    "nothing, times a great many": _array(_npy("<f8", "(0, 1000000000000)")),
    "sizes that overflow": _array(_npy("<f8", f"({2**32}, {2**32})", bytes(8))),
    "many dimensions": _array(_npy("<f8", f"({'1, ' * 100})", bytes(8))),
    "a size of 0": _array(_npy("<U0", "(1000000000,)")),
    "a great size": _array(_npy("<U999999999", "(1,)", bytes(8))),
    "another length of the header": _array(_npy("<f8", "(1,)", bytes(8), length=3)),
    "an unknown unit of time": _array(_npy("<M8[xx]", "(1,)", bytes(8))),
    "truth that is neither": _array(_npy("|b1", "(2,)", b"\x01\x02")),
    "a character that is none": _array(_npy("<U1", "(1,)", b"\xff\xff\xff\x7f")),
    "a scalar of another size": _document('{"scalar": ["<f8", "AAAA"]}'),
    "a scalar of objects": _document('{"scalar": ["|O8", "AAAAAAAAAAA="]}'),
    "a scalar of strings": _document('{"scalar": ["<U1", "AAAAAA=="]}'),
    "a series without values": _document('{"series": [[null], {"range": [0, 1, 1], "names": [null]}, []]}'),
    "a range without steps": _document('{"series": [[null], {"range": [0, 1, 0], "names": [null]}, [1]]}'),
    "a frame of very many rows": _document(
        '{"frame": [{"values": [], "names": [null]}, {"range": [0, 1000000000000, 1], "names": [null]}, []]}'
    ),
    "a frame of fewer columns": _document(
        '{"frame": [{"values": ["a"], "names": [null]}, {"range": [0, 0, 1], "names": [null]}, []]}'
    ),
    "an index of an unknown kind": _document('{"series": [[null], {"eval": [1], "names": [null]}, [1]]}'),
    "a column of an unknown kind": _document('{"series": [[null], {"values": [0], "names": [null]}, {"eval": 1}]}'),
    "a column with an object": _document('{"series": [[null], {"values": [0], "names": [null]}, [{"int": "1"}]]}'),
    "too many values": _document("[" + "[]," * 500_000 + "1]"),
    "too many columns": _document(f'{{"frame": [{_LABELS}, {_NONE}, [{"[]," * 10_000}[]]]}}'),
    "too many series": _document("[" + f"{_series(_RANGE)}, " * 5_001 + "1]"),
    "a document that is not ASCII": _document('"é"'),
    "a document in UTF-16": [("data", '"x"'.encode("utf-16"))],
    "a header of very many spaces": _array(
        _npy("<f8", "(0,)", length=1100).replace(b"}\n", b"}" + b" " * 1042 + b"\n"),
    ),
    "one cell for very many rows": [
        ("data", _series(_MANY, '{"array": 1}').encode()),
        ("array", _npy("<f8", "()", bytes(8))),
    ],
    "a frame of one cell for very many rows": [
        ("data", f'{{"frame": [{{"values": [1], "names": [1]}}, {_MANY}, [{{"array": 1}}]]}}'.encode()),
        ("array", _npy("<f8", "()", bytes(8))),
    ],
    "a column of characters": [
        ("data", _series(_RANGE, '{"array": 1}').encode()),
        ("array", _npy("<U1", "(1,)", bytes(4))),
    ],
    "a column of days": [
        ("data", _series(_RANGE, '{"array": 1}').encode()),
        ("array", _npy("<M8[D]", "(1,)", bytes(8))),
    ],
    "levels of different lengths": _document(_series('{"levels": [[1], []], "names": [null, null]}')),
    "strings that are none": _document(
        '{"series": [[null], {"values": [0], "names": [null]}, {"strings": [{"int": "1"}]}]}'
    ),
}


@pytest.mark.parametrize("parts", FORGED.values(), ids=FORGED.keys())
def test_forged_data_is_refused(parts: list[tuple[str, bytes]]) -> None:
    with pytest.raises(frames.ProtocolError, match="data that is none"):
        data.decode([(kind, bytearray(content)) for kind, content in parts])


def test_numbers_that_pandas_hashes_alike_are_no_trouble_in_a_level() -> None:
    high = np.arange(100_000, dtype="u8")  # of pandas' hash of 32 bits, a sum of shifted keys, these make nothing
    low = (high ^ (high << np.uint64(11)) ^ (high << np.uint64(22))) & np.uint64(0xFFFFFFFF)
    content = _npy("<i8", "(100000,)", ((high << np.uint64(33)) | low).tobytes())
    document = _series('{"levels": [{"array": 1}], "names": [null]}', '{"array": 2}')
    began = time.monotonic()
    series = data.decode([("data", bytearray(document.encode())), *[("array", bytearray(content))] * 2])
    assert time.monotonic() - began < 3  # with hashes it takes twenty
    assert series.index.get_level_values(0).to_numpy().tobytes() == series.to_numpy().tobytes()


_NUMBERS = json.dumps([number * 2_654_435_761 % 2**32 * (1 if number % 2 else 0.5) for number in range(225_000)])

SLOW: dict[str, list[tuple[str, bytes]]] = {
    "numbers": _document("[" + "1.2345678901234567e-300," * 450_000 + "1]"),
    "half characters": [("data", b'{"text": 1}'), ("text", b"\xed\xa0\x80" * 2_000_000)],
    "labels": _document(f'{{"frame": [{_NONE}, {{"names": [null], "levels": [{_NUMBERS}]}}, []]}}'),
}


def _longest_wait(parts: list[tuple[str, bytes]]) -> float:
    """Return for which part of the time that it takes to decode this, another thread has to wait at once."""
    seen: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    began = time.monotonic()
    watcher.start()
    try:
        data.decode([(kind, bytearray(content)) for kind, content in parts])
    finally:
        ended = time.monotonic()
        done.set()
        watcher.join()
    waits = [after - before for before, after in zip([began, *seen], [*seen, ended], strict=True)]
    return max(waits) / (ended - began)


@pytest.mark.parametrize("parts", SLOW.values(), ids=SLOW.keys())
def test_other_threads_run_while_data_is_decoded(parts: list[tuple[str, bytes]]) -> None:
    waits = [_longest_wait(parts) for _ in range(3)]
    assert min(waits) < 1 / 8  # a machine that does other things can prolong one or another


@settings(max_examples=500, deadline=None)
@given(_values | some.builds(np.arange, some.integers(0, 9)), some.data())
def test_whatever_was_changed_on_the_way_is_a_value_or_refused(value: Any, draw: some.DataObject) -> None:
    parts = _sent({"x": value})
    _, content = parts[draw.draw(some.integers(0, len(parts) - 1))]
    where = draw.draw(some.integers(0, len(content) - 1))
    content[where] = draw.draw(some.integers(0, 255))
    with contextlib.suppress(frames.ProtocolError):
        data.decode(parts)


# The same, through processes.


class Thing:
    """What the tests call; defined here, so that it travels by name."""

    def __init__(self) -> None:
        self.state = "before"

    def change(self, value: Any) -> Any:
        self.state = "after"
        return value

    def give(self, kind: str) -> Any:
        return {"a": [0, {"set": {1}}]} if kind == "set" else np.arange(3) if kind == "array" else pd.Series([1])

    def fail(self, text: str) -> None:
        self.state = "after"
        raise ValueError(text)

    def refuse(self) -> None:
        raise SystemExit(3)

    def say(self, *texts: str) -> None:
        for text in texts:
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stderr.write(texts[0])

    def pickled(self) -> Any:
        return Opened("never")


class Opened:
    """An object whose pickle leaves a trace when it is opened."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (self.path, os.O_CREAT)


def test_a_value_comes_as_data_and_the_object_stays_as_it_was() -> None:
    thing = Thing()
    value = {"a": [1, (2.5, None)], "b": np.arange(5), "c": "x" * 100_000}
    back = SubprocessDelegate(SubprocessDelegate()).call(thing, "change", [value], results="data")
    assert (back["a"], back["c"], back["b"].tolist()) == (value["a"], value["c"], [0, 1, 2, 3, 4])
    assert thing.state == "before"


def test_a_value_that_is_no_data_is_an_error_that_says_where() -> None:
    with pytest.raises(ResultNotReturned, match=r"^hop 1 of 1 .*: result\['a'\]\[1\]\['set'\] is a set;"):
        SubprocessDelegate().call(Thing(), "give", ["set"], results="data")


def test_a_result_that_is_too_large_is_refused_with_its_size() -> None:
    with pytest.raises(ResultNotReturned, match=rf"the result has \d{{10}} bytes; at most {frames.MAX_TRANSFER}"):
        SubprocessDelegate().call(np, "zeros", [frames.MAX_TRANSFER // 8], results="data")


def test_an_exception_comes_as_text_that_a_terminal_does_not_obey() -> None:
    thing = Thing()
    with pytest.raises(RemoteError, match=r"ValueError: red title $") as raised:
        SubprocessDelegate().call(thing, "fail", ["\x1b[31mred \x1b]0;gone\x07title\x08 \x9b1m"], results="data")
    assert raised.value.details["type"] == "ValueError"
    told = str(raised.value.__cause__)
    assert "in fail" in told
    assert "\x1b" not in told + str(raised.value)
    assert thing.state == "before"
    with pytest.raises(RemoteError, match="SystemExit: 3"):
        SubprocessDelegate().call(thing, "refuse", results="data")


def test_an_exception_with_a_long_text_is_cut() -> None:
    with pytest.raises(RemoteError) as raised:
        SubprocessDelegate().call(Thing(), "fail", ["\U0001f600" * 1_000_000], results="data")
    assert 5_000 < len(str(raised.value)) < 11_000


def test_output_loses_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("\x1b[1mbold\x1b", "[0m\tand\n", "\x1b]52;c;", "Z2V0\x07clip\r\x08board é\u202e\n", "\x1b[3")
    SubprocessDelegate().call(Thing(), "say", texts, results="data")
    said = capsys.readouterr()
    assert said.out == "bold\tand\nclipboard é\n[3"
    assert said.err == "bold"
    SubprocessDelegate().call(Thing(), "say", texts[:1])
    assert capsys.readouterr().out == "\x1b[1mbold\x1b", "output of code that is trusted stays as it is"


def test_a_sandbox_delegate_says_it_for_its_chain() -> None:
    text = "{version: 0.1, sequence: [{type: SlurmDelegate}, {type: SandboxDelegate, results: %s}]}"
    with pytest.raises(ConfigurationError, match="results is 'pickle' or 'data', not 'json'"):
        DelegateGenerator(yaml=text % "json")
    kinds = [step["type"] for step in DelegateGenerator(yaml=text % "data").compile()]
    assert kinds == ["slurm", "data", "sandbox"]
    assert [step["type"] for step in SandboxDelegate(results="pickle").compile()] == ["sandbox"]
    with pytest.raises(ConfigurationError, match="'pickle' or 'data', not 'yaml'"):
        SubprocessDelegate().call(Thing(), "change", [1], results="yaml")


def test_a_description_that_is_found_too_late_to_obey_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chain.yaml").write_text("{version: 0.1, sequence: [{type: SandboxDelegate, results: data}]}")
    monkeypatch.setenv("DELEGATE_FUNCTION_CONFIG", str(tmp_path / "chain.yaml"))
    late = DelegateGenerator(
        yaml="{version: 0.1, sequence: [{type: SubprocessDelegate}, {type: LateBoundYAMLDelegate}]}"
    )
    with pytest.raises(ConfigurationError, match="results='data', and it was found too late"):
        late.invoke(Thing(), "change", 1)


def test_code_that_is_not_trusted_does_not_run_here() -> None:
    thing = Thing()
    with pytest.raises(ConfigurationError, match="this chain stays here"):
        TrivialDelegate().call(thing, "change", [1], results="data")
    assert thing.state == "before"


def test_without_numpy_and_pandas_all_else_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numpy", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    value = {"a": [1, (2, b"x")]}
    assert SubprocessDelegate().call(Thing(), "change", [value], results="data") == value
    with pytest.raises(ResultNotReturned, match="the result needs numpy, which cannot be imported here"):
        SubprocessDelegate().call(Thing(), "give", ["array"], results="data")
    with pytest.raises(ResultNotReturned, match="the result needs pandas"):
        SubprocessDelegate().call(Thing(), "give", ["series"], results="data")


# A far side that lies.

LIAR = f"""#!{sys.executable} -I
import json, os, sys
sys.path.insert(0, {str(SRC)!r})
from delegate_function import frames
sys.stdin.buffer.read(1)
for kind, content in json.load(open(__file__ + ".json")):
    content = bytes.fromhex(content) if kind == "D" else json.dumps(content).encode()
    os.write(1, frames.encode(kind.encode(), content))
sys.stdin.buffer.read()
"""


def _lying(directory: Path, *said: tuple[str, Any]) -> SubprocessDelegate:
    """Return a delegate whose hop says this, whatever the call is."""
    program = directory / "liar"
    program.write_text(LIAR)
    program.chmod(0o755)
    shown = [(kind, content.hex() if isinstance(content, bytes) else content) for kind, content in (*said, ("Z", {}))]
    Path(f"{program}.json").write_text(json.dumps(shown))
    return SubprocessDelegate(delegate_executable_path=str(program))


@pytest.fixture
def no_pickle_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a pickle was opened")

    for name in ("loads", "load", "Unpickler", "_loads", "_load", "_Unpickler"):
        monkeypatch.setattr(pickle, name, opened)


@pytest.mark.usefixtures("no_pickle_is_opened")
@pytest.mark.parametrize("kind", ["value", "state", "exception"])
@pytest.mark.parametrize("error", [None, {"type": "E", "text": "x"}], ids=["returned", "raised"])
def test_a_pickle_that_comes_unasked_is_never_opened(tmp_path: Path, kind: str, error: Any) -> None:
    evil = pickle.dumps(Opened(str(tmp_path / "opened")))
    header = {"parts": [{"kind": kind, "size": len(evil)}], **({"error": error} if error else {})}
    liar = _lying(tmp_path, ("R", header), ("D", evil))
    thing = Thing()
    with pytest.raises(HopFailed, match=f"sent what does not belong there: a part .* not asked for: '{kind}'"):
        liar.call(thing, "change", [1], results="data")
    assert not (tmp_path / "opened").exists()
    assert thing.state == "before"


def test_the_same_pickle_is_opened_where_the_code_is_trusted(tmp_path: Path) -> None:
    evil = pickle.dumps(Opened(str(tmp_path / "opened")))
    os.close(
        _lying(tmp_path, ("R", {"parts": [{"kind": "value", "size": len(evil)}]}), ("D", evil)).invoke(Thing(), "x")
    )
    assert (tmp_path / "opened").exists()


@pytest.mark.usefixtures("no_pickle_is_opened")
def test_no_pickle_is_opened_in_an_honest_call(tmp_path: Path) -> None:
    assert SubprocessDelegate().call(Thing(), "change", [{"a": 1}], results="data") == {"a": 1}
    with pytest.raises(ResultNotReturned, match="result is an Opened"):
        SubprocessDelegate().call(Thing(), "pickled", results="data")


_ONE = {"kind": "data", "size": 1}
LIES: dict[str, tuple[list[tuple[str, Any]], str]] = {
    "no value": ([("R", {"parts": []})], "data that is none"),
    "no parts": ([("R", {})], "a result without parts"),
    "a part that is none": ([("R", {"parts": [1]})], "without a size"),
    "a size that is none": ([("R", {"parts": [{"kind": "data", "size": "9"}]})], "without a size"),
    "two results": ([("R", {"parts": [_ONE]}), ("R", {"parts": [_ONE]})], "a second result"),
    "two documents": ([("R", {"parts": [_ONE, _ONE]})], "a second document"),
    "a document of great size": (
        [("R", {"parts": [{"kind": "data", "size": data.MAX_DOCUMENT + 1}]})],
        "one that is too long",
    ),
    "too many parts": ([("R", {"parts": [_ONE, *[{"kind": "text", "size": 0}] * data.MAX_PARTS]})], "not asked for"),
    "data beside an error": ([("R", {"error": {"text": "x"}, "parts": [_ONE]})], "not asked for"),
    "a file that was not named": ([("R", {"parts": [{"kind": "output", "path": "x", "size": 0, "mode": 7}]})], "asked"),
    "the end without a result": ([], "ends early"),
    "bytes without a result": ([("D", b"1")], "more bytes than"),
    "fewer bytes": ([("R", {"parts": [_ONE]})], "ends early"),
    "more bytes": ([("R", {"parts": [_ONE]}), ("D", b"11")], "more bytes than"),
    "a failure that only the lease can tell": (
        [("R", {"error": {"failure": "lease-ended", "text": "nothing ran"}, "parts": []})],
        "not the call's to tell",
    ),
}


@pytest.mark.parametrize(("said", "found"), LIES.values(), ids=LIES.keys())
def test_a_lie_is_found_out(tmp_path: Path, said: list[tuple[str, Any]], found: str) -> None:
    with pytest.raises(HopFailed, match=f"sent what does not belong there: .*{found}"):
        _lying(tmp_path, *said).call(Thing(), "change", [1], results="data")


def test_a_file_comes_once(tmp_path: Path) -> None:
    root = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    result = Result(["x"], root, data.DATA)
    part = {"kind": "output", "path": "x", "size": 0, "mode": 0o600}
    with pytest.raises(frames.ProtocolError, match="not asked for: 'output'"):
        result.begin({"parts": [part, part]})
    result.discard()
    os.close(root)
    assert os.listdir(tmp_path) == []


def test_a_result_beyond_all_bounds_is_refused_before_it_comes(tmp_path: Path) -> None:
    parts = [_ONE, {"kind": "array", "size": frames.MAX_TRANSFER}]
    with pytest.raises(ResultNotReturned, match=f"has {frames.MAX_TRANSFER + 1} bytes; at most"):
        _lying(tmp_path, ("R", {"parts": parts})).call(Thing(), "change", [1], results="data")


def test_what_is_told_of_an_error_is_text_whatever_it_is(tmp_path: Path) -> None:
    error = {"type": ["\x1b[31m"] * 200, "text": {"\x1bc": 1}, "traceback": 7, "more": "x" * 1000}
    with pytest.raises(RemoteError) as raised:
        _lying(tmp_path, ("R", {"error": error, "parts": []})).call(Thing(), "change", [1], results="data")
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert str(raised.value.__cause__).endswith(":\n7")
