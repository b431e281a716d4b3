"""Values as data: what a call may return when its caller does not trust it.

A value travels as a document in JSON and parts beside it: arrays as `.npy` files without pickles, long strings and
bytes as they are. In the document numbers, strings, true, false, null and lists stand for themselves (NaN and Infinity
as Python writes them); an object has one item, whose name says what it is:

    dict, pairs      {"a": 1}, or [[1, "x"]] where some keys are no strings
    tuple, complex   lists of what is in them
    int              of more than 64 bits, as hexadecimal digits
    base64           bytes
    text, bytes      the number of the part that holds them
    array            the number of its part
    scalar           NumPy's: dtype and, as base64, the bytes
    series, frame    name or columns, index, and values: arrays, or lists of strings and numbers

Who decodes trusts nothing. Nothing is made whose size was not compared with the bytes that came, each part is used
once, and no document can choose a function to be called. Nothing holds the other threads of the caller's process up for
long: a second without beats would end their calls. NumPy and pandas are imported only if a value needs them.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import heapq
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from delegate_function import frames

PICKLE, DATA = "pickle", "data"
RESULTS = (PICKLE, DATA)
"""What results travel as."""

DOCUMENT, ARRAY, TEXT, BYTES = "data", "array", "text", "bytes"
MAX_DOCUMENT = 32 * 1024 * 1024
"""The document may have this many bytes. A list may take 20 times as much memory as its text."""
MAX_VALUES = 1_000_000
"""The document may have this many brackets and commas, and so about as many values. No other thread runs meanwhile."""
MAX_PARTS = 4000
MAX_COLUMNS = 10_000
"""The columns, indexes and levels of all frames and series. An empty one takes 100 times as much memory as its text."""
MAX_WIDE = 256 * 1024 * 1024
"""A text may have this many bytes if it is not ASCII: one character makes all of them take four bytes in memory."""
MAX_DEPTH = 50

_LONG = 64 * 1024
_PIECE = 256 * 1024
_NUMBER = 2**63
_CELLS = frozenset((bool, float, int, str, type(None)))
_AS_THEY_ARE = frozenset((bool, float, type(None)))
_KINDS = "biufcmM"
_DTYPE = re.compile(r"[<>|=][biufcmMSU][0-9]{1,9}(\[[0-9]{0,9}[a-zA-Z]{1,2}\])?")
_COLUMN = re.compile(r"[<>|=]([biufc][0-9]{1,2}|[mM]8\[[mun]?s\])")
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']{1,40})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,500})\), \} {0,100}\n",
    re.DOTALL,
)
_TRAVEL = "numbers, strings, bytes, True, False, None, lists, tuples, dicts, NumPy's arrays and pandas' frames"


class NotData(Exception):
    """A value, or something in it, that cannot travel as data."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem, path)
        self.problem = problem
        self.path = path

    def __str__(self) -> str:
        return f"result{self.path} {self.problem}"

    def within(self, step: str) -> NotData:
        """Return the same, seen from what the value is in."""
        return NotData(self.problem, step + self.path)


class Part:
    """Bytes to be sent, in pieces that lie where they are."""

    def __init__(self, kind: str, *pieces: memoryview) -> None:
        self.kind = kind
        self.pieces = pieces
        self.size = sum(len(piece) for piece in pieces)


def encode(value: Any) -> list[Part]:
    """Return a value as parts, first the document; raise NotData, which says where, for what cannot travel."""
    encoder = _Encoder()
    text = json.dumps(encoder.encode(value, 0), separators=(",", ":")).encode()
    advice = "return long lists of numbers as NumPy arrays"
    if len(text) > MAX_DOCUMENT:
        raise NotData(f"has {len(text)} bytes of JSON, at most {MAX_DOCUMENT} travel; {advice}")
    if (count := _value_count(text)) > MAX_VALUES:
        raise NotData(f"has {count} values, by their brackets and commas, at most {MAX_VALUES} travel; {advice}")
    return [Part(DOCUMENT, memoryview(text)), *encoder.parts]


def decode(parts: Iterable[tuple[str, bytearray]]) -> Any:
    """Return the value of parts that came from somebody who is not trusted; their bytes become the arrays' memory.

    Raises:
        ProtocolError: they are nothing that `encode` makes.
        ImportError: NumPy or pandas is needed and cannot be imported here.
    """
    try:
        (kind, document), *others = parts
        if kind != DOCUMENT:
            raise ValueError("a document comes first")
        if _value_count(document) > MAX_VALUES:
            raise ValueError("too many values")
        decoder = _Decoder(others)
        text = document.decode("ascii")
        value = decoder.decode(json.loads(text, parse_int=_checked_int, parse_float=_float), 0)
        decoder.finish()
    except ImportError:
        raise
    except Exception as error:
        raise frames.ProtocolError(f"data that is none: {type(error).__name__}: {str(error)[:200]}") from error
    return value


def _value_count(document: bytes | bytearray) -> int:
    return document.count(b"[") + document.count(b"{") + document.count(b",")


def _float(digits: str) -> float:
    # That this is Python's and not C lets other threads run between two numbers, which may take a microsecond each.
    return float(digits)


def _checked_int(digits: str) -> int:
    number = int(digits)
    # Of longer ones many could be made that have the same hash.
    if not -_NUMBER <= number < _NUMBER:
        raise ValueError("a number of more than 64 bits")
    return number


class _Encoder:
    """Make a document of a value, and the parts beside it."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._columns = 0
        # What has not been imported has made no value.
        self._numpy, self._pandas = sys.modules.get("numpy"), sys.modules.get("pandas")

    def encode(self, value: Any, depth: int) -> Any:
        """Return what stands for a value in the document."""
        if value is None or value is True or value is False:
            return value
        if depth > MAX_DEPTH:
            raise NotData(f"is more than {MAX_DEPTH} levels deep")
        if self._numpy and isinstance(value, (self._numpy.generic, self._numpy.ndarray)):
            return self._scalar(value) if isinstance(value, self._numpy.generic) else self._array(value)
        if self._pandas and isinstance(value, (self._pandas.Series, self._pandas.DataFrame)):
            return self._series(value) if isinstance(value, self._pandas.Series) else self._frame(value)
        if isinstance(value, int):
            return int(value) if -_NUMBER <= value < _NUMBER else {"int": f"{value:x}"}
        if isinstance(value, float):
            return float(value)
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, str):
            return str(value) if len(value) <= _LONG else self._text(value)
        if isinstance(value, bytes | bytearray):
            if len(value) > _LONG:
                return self._beside(BYTES, value)
            return {"base64": base64.b64encode(value).decode()}
        if isinstance(value, list):
            return self._items(value, depth)
        if isinstance(value, tuple):
            return {"tuple": self._items(value, depth)}
        if isinstance(value, dict):
            return self._dict(value, depth)
        raise NotData(f"is {_a(type(value).__name__)}; as data travel {_TRAVEL}")

    def _text(self, value: str) -> dict[str, int]:
        text = value.encode(errors="surrogatepass")
        if len(text) > MAX_WIDE and not text.isascii():
            raise NotData(f"is a text of {len(text)} bytes; at most {MAX_WIDE} travel of one that is not ASCII")
        return self._beside(TEXT, text)

    def _beside(self, kind: str, *pieces: Any) -> dict[str, int]:
        self.parts.append(Part(kind, *(memoryview(piece) for piece in pieces)))
        if len(self.parts) >= MAX_PARTS:
            raise NotData(f"is one array, long string or long bytes too many; at most {MAX_PARTS - 1} travel")
        return {kind: len(self.parts)}

    def _items(self, values: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        if set(map(type, values)) <= _AS_THEY_ARE:
            return list(values)
        items = []
        for number, value in enumerate(values):
            try:
                items.append(self.encode(value, depth + 1))
            except NotData as error:
                raise error.within(f"[{number}]") from None
        return items

    def _dict(self, values: dict[Any, Any], depth: int) -> dict[str, Any]:
        pairs = []
        for key, value in values.items():
            try:
                cell = self._cell(key)
            except NotData as error:
                raise NotData(f"has the key {_short(key)}, which {error.problem}") from None
            try:
                pairs.append((cell, self.encode(value, depth + 1)))
            except NotData as error:
                raise error.within(f"[{_short(key)}]") from None
        if all(type(key) is str for key, _ in pairs):
            return {"dict": dict(pairs)}
        return {"pairs": pairs}

    def _cell(self, value: Any) -> Any:
        """Return a value that stands for itself: a key, a label, an item of a column."""
        if self._numpy and isinstance(value, self._numpy.generic):
            value = value.item()
        if not isinstance(value, str | int | float | None):
            raise NotData(f"is {_a(type(value).__name__)}; only numbers and strings can stand there")
        found = self.encode(value, 0)
        if isinstance(found, dict):
            raise NotData("is too long to stand there")
        return found

    def _array(self, array: Any) -> dict[str, int]:
        import numpy

        if type(array) is not numpy.ndarray:
            raise NotData(f"is {_a(type(array).__name__)}; of arrays only numpy.ndarray itself travels")
        if not _DTYPE.fullmatch(array.dtype.str) or not array.dtype.itemsize:
            raise NotData(f"is an array of {str(array.dtype)[:80]}; as data travel those of numbers, times and strings")
        if not array.flags.c_contiguous and not array.flags.f_contiguous:
            array = array.copy()
        header = io.BytesIO()
        numpy.lib.format.write_array_header_1_0(header, numpy.lib.format.header_data_from_array_1_0(array))
        return self._beside(ARRAY, header.getvalue(), array.ravel(order="K").view(numpy.uint8))

    def _scalar(self, scalar: Any) -> Any:
        if scalar.dtype.kind in "SU":
            return self.encode(scalar.item(), 0)
        if scalar.dtype.kind not in _KINDS:
            raise NotData(f"is a scalar of {str(scalar.dtype)[:80]}; as data travel those of numbers and times")
        return {"scalar": [scalar.dtype.str, base64.b64encode(scalar.tobytes()).decode()]}

    def _series(self, series: Any) -> dict[str, Any]:
        return {"series": [self._labels([series.name]), self._index(series.index), self._column(series)]}

    def _frame(self, frame: Any) -> dict[str, Any]:
        columns = []
        for number, label in enumerate(frame.columns):
            try:
                columns.append(self._column(frame.iloc[:, number]))
            except NotData as error:
                raise error.within(f"[{_short(label)}]") from None
        return {"frame": [self._index(frame.columns), self._index(frame.index), columns]}

    def _index(self, index: Any) -> dict[str, Any]:
        assert self._pandas
        self._count()
        kind = "levels"
        if isinstance(index, self._pandas.MultiIndex):
            values: Any = [self._column(index.get_level_values(number)) for number in range(index.nlevels)]
        elif isinstance(index, self._pandas.RangeIndex):
            kind, values = "range", [index.start, index.stop, index.step]
        else:
            kind, values = "values", self._column(index)
        return {kind: values, "names": self._labels(index.names)}

    def _labels(self, labels: Iterable[Any]) -> list[Any]:
        try:
            return [self._cell(label) for label in labels]
        except NotData as error:
            raise error.within(".name") from None

    def _column(self, column: Any) -> Any:
        """Return what stands for the values of a series or an index: an array, or a list of what they are."""
        import numpy

        self._count()
        if isinstance(column.dtype, numpy.dtype) and _COLUMN.fullmatch(column.dtype.str):
            return self._array(column.to_numpy())
        if column.dtype == "string":
            return {"strings": [value if isinstance(value, str) else None for value in column]}
        if column.dtype != object:
            raise NotData(f"is a column of {column.dtype}; convert it with astype to numbers or strings")
        cells = []
        for number, value in enumerate(column):
            try:
                cells.append(self._cell(value))
            except NotData as error:
                raise error.within(f"[{number}]") from None
        return cells

    def _count(self) -> None:
        self._columns += 1
        if self._columns > MAX_COLUMNS:
            raise NotData(f"is one column, index or level of a frame too many; at most {MAX_COLUMNS} travel")


class _Decoder:
    """Make a value of a document and the parts beside it, all of which may be forged."""

    def __init__(self, parts: list[tuple[str, bytearray]]) -> None:
        self._parts = dict(enumerate(parts, 1))
        self._columns = 0

    def finish(self) -> None:
        """Raise an error unless each part was used."""
        if self._parts:
            raise ValueError("parts that nothing refers to")

    def decode(self, item: Any, depth: int) -> Any:
        """Return the value for which an item of the document stands."""
        if type(item) in _CELLS:
            return item
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        if isinstance(item, list):
            if set(map(type, item)) <= _CELLS:
                return item
            return [self.decode(one, depth + 1) for one in item]
        ((kind, content),) = item.items()
        return self._known[kind](self, content, depth)

    def _dict(self, content: Any, depth: int) -> dict[str, Any]:
        return {key: self.decode(value, depth + 1) for key, value in _checked(content, dict).items()}

    def _pairs(self, content: Any, depth: int) -> dict[Any, Any]:
        return {_cell(key): self.decode(value, depth + 1) for key, value in _checked(content, list)}

    def _tuple(self, content: Any, depth: int) -> tuple[Any, ...]:
        return tuple(self.decode(_checked(content, list), depth))

    def _complex(self, content: Any, depth: int) -> complex:
        real, imaginary = content
        return complex(_checked(real, float), _checked(imaginary, float))

    def _int(self, content: Any, depth: int) -> int:
        return int(_checked(content, str), 16)

    def _base64(self, content: Any, depth: int) -> bytes:
        return base64.b64decode(_checked(content, str), validate=True)

    def _part(self, kind: str, number: Any) -> bytearray:
        found, data = self._parts.pop(_checked(number, int))
        if found != kind:
            raise ValueError(f"{kind} in a part of another kind")
        return data

    def _text(self, content: Any, depth: int) -> str:
        data = self._part(TEXT, content)
        if len(data) > MAX_WIDE and not data.isascii():
            raise ValueError("too large")
        # In pieces, between which other threads run: half a character takes a hundred times as long as a whole one.
        pieces = (bytes(data[start : start + _PIECE]) for start in range(0, len(data), _PIECE))
        return "".join(codecs.iterdecode(pieces, "utf-8", "surrogatepass"))

    def _bytes(self, content: Any, depth: int) -> bytes:
        return bytes(self._part(BYTES, content))

    def _array(self, content: Any, depth: int) -> Any:
        import numpy

        data = self._part(ARRAY, content)
        header = _NPY.match(data)
        if not header or int.from_bytes(header[1], "little") + 10 != header.end():
            raise ValueError("no array")
        dtype = _dtype(header[2].decode("ascii"))
        shape = tuple(int(size) for size in header[4].decode().split(",") if size.strip())
        # Compared before anything is made. A length of 0 must not hide another that is beyond all bounds.
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > frames.MAX_TRANSFER:
            raise ValueError("too large")
        if math.prod(shape) * dtype.itemsize != len(data) - header.end():
            raise ValueError("an array that does not have the size of its shape")
        order: Any = "F" if header[3] == b"True" else "C"
        array = numpy.ndarray(shape, dtype, data, header.end(), order=order)
        _check_content(dtype, array)
        return array

    def _scalar(self, content: Any, depth: int) -> Any:
        import numpy

        descr, encoded = content
        dtype, data = _dtype(_checked(descr, str)), base64.b64decode(_checked(encoded, str), validate=True)
        if dtype.kind not in _KINDS or len(data) != dtype.itemsize:
            raise ValueError("no scalar")
        array = numpy.frombuffer(data, dtype)
        _check_content(dtype, array)
        return array[0]

    def _series(self, content: Any, depth: int) -> Any:
        import pandas

        (name,), rows, column = content
        index = self._index(rows)
        return pandas.Series(self._column(column, len(index)), index, name=_cell(name), copy=False)

    def _frame(self, content: Any, depth: int) -> Any:
        import pandas

        labels, rows, columns = content
        index = self._index(rows)
        values = {number: self._column(column, len(index)) for number, column in enumerate(_checked(columns, list))}
        frame = pandas.DataFrame(values, index, copy=False)
        frame.columns = self._index(labels)
        return frame

    def _index(self, content: Any) -> Any:
        import pandas

        self._count()
        names = [_cell(name) for name in content.pop("names")]
        ((kind, values),) = content.items()
        if kind == "levels":
            first = self._column(values[0])
            columns = [first, *(self._column(level, len(first)) for level in values[1:])]
            levels, codes = zip(*map(_level, columns), strict=True)
            return pandas.MultiIndex(levels, codes, names=names, verify_integrity=False)
        (name,) = names
        if kind == "values":
            return pandas.Index(self._column(values), name=name)
        if kind != "range":
            raise ValueError("no index")
        start, stop, step = (_checked(number, int) for number in values)
        if len(range(start, stop, step)) > frames.MAX_TRANSFER // 8:
            raise ValueError("too large")
        return pandas.RangeIndex(start, stop, step, name=name)

    def _column(self, content: Any, length: int | None = None) -> Any:
        """Return the values of a series or an index; pandas would repeat a single one to any length."""
        self._count()
        column = self._values(content)
        if column.ndim != 1 or length not in (None, len(column)):
            raise ValueError("a column of another shape")
        return column

    def _values(self, content: Any) -> Any:
        import pandas

        if isinstance(content, list):
            return pandas.Series([_cell(value) for value in content], dtype=object).array
        ((kind, values),) = content.items()
        if kind == "strings":
            return pandas.array([value and _checked(value, str) for value in values], dtype="string")
        array = self._array({ARRAY: values}[kind], 0)
        if not _COLUMN.fullmatch(array.dtype.str):
            raise ValueError("an array that pandas would convert")
        return array

    def _count(self) -> None:
        self._columns += 1
        if self._columns > MAX_COLUMNS:
            raise ValueError("too many columns")

    _known: ClassVar[dict[str, Callable[[_Decoder, Any, int], Any]]] = {
        "dict": _dict,
        "pairs": _pairs,
        "tuple": _tuple,
        "complex": _complex,
        "int": _int,
        "base64": _base64,
        "text": _text,
        "bytes": _bytes,
        "array": _array,
        "scalar": _scalar,
        "series": _series,
        "frame": _frame,
    }


def _dtype(descr: str) -> Any:
    import numpy

    if not _DTYPE.fullmatch(descr):
        raise ValueError("a dtype that does not travel")
    dtype = numpy.dtype(descr)
    if not dtype.itemsize:
        raise ValueError("a dtype without a size")
    return dtype


def _check_content(dtype: Any, array: Any) -> None:
    """Raise an error for bytes that are no values of their type."""
    import numpy

    order = "F" if array.flags.f_contiguous else "C"
    flat = array.ravel(order=order)
    if dtype.kind == "b" and (flat.view(numpy.uint8) > 1).any():
        raise ValueError("a truth value that is neither true nor false")
    if dtype.kind == "U" and (flat.view(numpy.dtype("u4").newbyteorder(dtype.byteorder)) > sys.maxunicode).any():
        raise ValueError("a character that is none")


def _level(column: Any) -> tuple[Any, Any]:
    """Return the distinct values of an index's level and their numbers.

    As `pandas.factorize`, but without its hashes: for a million numbers of one hash it takes half an hour.
    """
    import numpy
    import pandas

    there = ~pandas.isna(column)
    codes = numpy.full(len(column), -1)
    if isinstance(column, numpy.ndarray):
        values, codes[there] = numpy.unique(column[there], return_inverse=True)
        return pandas.Index(values), codes
    values = list(dict.fromkeys(column[there]))
    with contextlib.suppress(TypeError):  # numbers and strings have no order
        values = list(heapq.merge(*(sorted(values[start : start + _LONG]) for start in range(0, len(values), _LONG))))
    numbers = {value: number for number, value in enumerate(values)}
    codes[there] = [numbers[value] for value in column[there]]
    return pandas.Index(values, dtype=str(column.dtype)), codes


def _checked(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{_a(type(value).__name__)} in the place of {_a(kind.__name__)}")
    return value


def _cell(value: Any) -> Any:
    if type(value) not in _CELLS:
        raise ValueError(f"{_a(type(value).__name__)} in the place of a number or a string")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _a(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
