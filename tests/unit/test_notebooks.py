"""The notebooks' own code, where it meets what code returns that means no good."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import delegate_function

MARKING = Path(__file__).resolve().parents[2] / "notebooks/marking-a-class.ipynb"

ANSWERS: dict[str, Any] = {
    "ada": [3, 2, 5, 2.5, 2.5, 1.0],
    "empty": "",
    "number": 7,
    "nothing": None,
    "dict": {"a": [1]},
    "array": np.arange(6),
    "list": [True, np.arange(2), None, "2", [], {}],
}
VALUES: dict[str, Any] = {"ada": 6, "array": np.array([6, 6]), "truth": True, "text": "6", "nothing": None}


def _run(names: dict[str, Any], *cells: str) -> None:
    for cell in json.loads(MARKING.read_text())["cells"]:
        if cell["id"] in cells:
            exec("".join(cell["source"]), names)


class Source:
    """Stand for `SourceCode`: the first line of a text says what it returns."""

    def __init__(self, text: str) -> None:
        self.name = text.splitlines()[0]

    def call(self, *arguments: Any) -> Any:
        return ANSWERS[self.name]


def test_marking_goes_on_whatever_was_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delegate_function, "SourceCode", Source)
    monkeypatch.setattr(delegate_function, "lease", contextlib.nullcontext)
    names: dict[str, Any] = {"handed_in": {name: name for name in ANSWERS}}
    _run(names, "cell-03", "cell-05", "cell-07")
    assert [row["right"] for row in names["rows"]] == [6, 0, 0, 0, 0, 0, 0]
    assert [row["why"] for row in names["rows"]][:3] == [
        "",
        *[f"no list, but a value of {kind}" for kind in ("str", "int")],
    ]


def test_marking_c_goes_on_whatever_was_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(built: str, function: str, arguments: list[dict[str, int]]) -> list[Any]:
        return [SimpleNamespace(return_value=VALUES[built]) for _ in arguments]

    cfiddle: Any = SimpleNamespace(
        CFiddleException=ValueError,
        build=lambda source: source,
        cfiddle_config=lambda **settings: contextlib.nullcontext(),
        code=lambda text, language: text,
        run=run,
    )
    monkeypatch.setitem(sys.modules, "cfiddle", cfiddle)
    config: Any = SimpleNamespace(noop_progress_bar=None)
    monkeypatch.setitem(sys.modules, "cfiddle.config", config)
    names: dict[str, Any] = {
        **{"contextlib": contextlib, "io": io, "pd": pd},
        **{"lease": contextlib.nullcontext, "limited": delegate_function.SubprocessDelegate()},
    }
    _run(names, "cell-10")
    names["in_c"] = {name: name for name in VALUES}
    _run(names, "cell-11")
    assert [row["right"] for row in names["rows"]] == [2, 0, 0, 0, 0]
