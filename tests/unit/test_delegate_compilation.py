"""Which files a source needs. What compiles them is tested with cfiddle, in the images."""

from pathlib import Path

import pytest

from delegate_function import compilation


def _write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_includes_are_followed_through_the_directories_and_each_file_comes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(
        tmp_path,
        main_cpp='#include <vector>\n  #  include "a.h"\n#include <lib.h>\n// #include "unused.h"\n'
        '#include "/etc/passwd"\n',
        a_h='#include "b.h"\n#include "sub/c.h"\n',
        b_h='#include "a.h"\n',
        sub__c_h='#include "d.h"\n',
        sub__d_h="",
        inc__lib_h='#include "deep.h"',
        inc__deep_h="",
        unused_h="",
    )
    found = compilation.needed(["./main.cpp"], [".", "inc"])
    assert found == ["main.cpp", "a.h", "inc/lib.h", "b.h", "sub/c.h", "inc/deep.h", "sub/d.h"]


def test_a_file_beside_its_includer_comes_before_one_of_the_same_name_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, sub__main_c='#include "x.h"\n', sub__x_h="", x_h="")
    assert compilation.needed(["sub/main.c"], ["."]) == ["sub/main.c", "sub/x.h"]


def test_a_missing_source_is_an_error_and_a_missing_header_the_compiler_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path, main_c='#include "none.h"\n')
    assert compilation.needed(["main.c"], []) == ["main.c"]
    with pytest.raises(FileNotFoundError):
        compilation.needed(["none.c"], [])
