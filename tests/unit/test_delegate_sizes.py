"""Large payloads and results: how often they are held in memory, and what is refused before it is sent."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import delegate_function
from delegate_function import CallNotSent, SubprocessDelegate, frames, pickling

SRC = Path(delegate_function.__file__).parents[1]
MEGABYTES = 96
TWICE = 2.2
"""Two copies, and what else a process needs meanwhile."""

HOP = f"""#!{sys.executable} -I
import os, posix, sys
sys.path[:0] = [{str(SRC)!r}]
leave, hop = os._exit, os.getpid()
def noted(status):
    if os.getpid() == hop:  # and not the process of the call, which is forked from it
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
        open(__file__ + ".new", "w").write(peak.split()[1])
        os.rename(__file__ + ".new", __file__ + ".peak")
    leave(status)
os._exit = posix._exit = noted
from delegate_function.hop import main
main()
"""
CALLER = f"""
import json, pathlib, sys
sys.path[:0] = [{str(SRC)!r}, {str(Path(__file__).parent)!r}]
import numpy
from test_delegate_sizes import Echo, made
from delegate_function import SubprocessDelegate
from cfiddle_cluster.wait import wait_until

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM:")).split()[1]) / 1024

hop, kind, results = sys.argv[1:]
delegate = SubprocessDelegate(delegate_executable_path=hop)

def peaks(megabytes):
    delegate.call(Echo(), "echo", [made(kind, megabytes)], results=results)
    far = delegate.last_call.usage["peak_memory_mb"]
    caller = peak()
    noted = pathlib.Path(hop + ".peak")
    wait_until(noted.exists, timeout_s=10, what="the hop has ended and noted its peak")
    hops = int(noted.read_text()) / 1024
    noted.unlink()
    return {{"caller": caller, "far": far, "hop": hops}}

before, after = peaks(1), peaks({MEGABYTES})
print(json.dumps({{who: after[who] - before[who] for who in before}}))
"""


class Echo:
    """What the tests call; the value is a new one."""

    def echo(self, value: Any) -> Any:
        kind = "str" if isinstance(value, str) else "bytes" if isinstance(value, bytes) else "array"
        size = len(value) // 1024**2 if kind != "array" else value.nbytes // 1024**2
        del value
        return made(kind, size)


def made(kind: str, megabytes: int) -> Any:
    """Return a value of so many megabytes."""
    if kind == "array":
        return np.arange(megabytes * 1024**2 // 8)
    return (b"x" if kind == "bytes" else "x") * (megabytes * 1024**2)


@pytest.mark.parametrize(
    ("kind", "results"),
    [("bytes", "pickle"), ("str", "pickle"), ("array", "pickle"), ("bytes", "data"), ("array", "data")],
)
def test_neither_side_holds_more_than_two_copies(tmp_path: Path, kind: str, results: str) -> None:
    hop = tmp_path / "hop"
    hop.write_text(HOP)
    hop.chmod(0o755)
    argv = [sys.executable, "-c", CALLER, str(hop), kind, results]
    grown = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout)
    # The argument of the call is one more in the caller, which holds it while the result comes.
    assert grown["caller"] < (TWICE + 1) * MEGABYTES, grown
    assert grown["far"] < TWICE * MEGABYTES, grown
    assert grown["hop"] < 24, grown


def test_a_call_that_is_too_large_is_refused_with_its_size_before_it_is_copied_or_sent() -> None:
    zeros = np.zeros(frames.MAX_TRANSFER // 8)  # pages that nobody wrote to take no memory
    before = _peak_mb()
    with pytest.raises(
        CallNotSent, match=rf"the call has \d{{10}} bytes; at most {frames.MAX_TRANSFER} travel"
    ) as raised:
        SubprocessDelegate(delegate_executable_path="/nowhere").invoke(Echo(), "echo", zeros)
    assert raised.value.details["size"] > frames.MAX_TRANSFER
    assert _peak_mb() - before < 100


def _peak_mb() -> float:
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


VALUES: dict[str, Any] = {
    "small": {"a": [1, None, ("x", b"y")]},
    "large bytes": b"x" * 3_000_000,
    "large strings": ["é" * 1_000_000] * 2 + ["y" * 2_000_000],
    "many small ones": [os.urandom(8) for _ in range(100_000)],
    "a bytearray": bytearray(3_000_000),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_pickle_in_pieces_is_the_value(value: Any) -> None:
    received = bytearray(b"".join(pickling.dumps(value, None)))
    assert pickling.loads(received, None) == value
    assert len(received) <= 1024**2 + 16, "it was used up"


def test_arrays_of_any_order_are_pickled_and_share_what_they_shared() -> None:
    array = np.arange(600_000).reshape(600, 1000)
    value = {"c": array, "f": np.asfortranarray(array), "part": array[::2, ::-1], "again": array}
    back = pickling.loads(bytearray(b"".join(pickling.dumps(value, None))), None)
    assert all(np.array_equal(back[name], value[name]) for name in value)
    assert back["again"] is back["c"]


def test_large_values_are_not_copied_into_their_pickle() -> None:
    value = bytes(3_000_000)
    assert any(piece.obj is value for piece in pickling.dumps([value], None))


def test_pickles_of_other_protocols_are_opened_too() -> None:
    for protocol in range(5):
        assert pickling.loads(bytearray(pickle.dumps([1, "two", Echo], protocol)), None) == [1, "two", Echo]


def test_a_pickle_that_is_cut_off_is_an_error() -> None:
    whole = b"".join(pickling.dumps({"a": b"x" * 3_000_000}, None))
    for length in (0, 5, 1000, len(whole) - 1):
        with pytest.raises((EOFError, pickle.UnpicklingError)):
            pickling.loads(bytearray(whole[:length]), None)
