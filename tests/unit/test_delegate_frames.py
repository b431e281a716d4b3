"""Frames: whole ones come out however the bytes were cut, everything else is refused, and silence is noticed."""

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delegate_function import frames

FRAMES = st.lists(st.tuples(st.sampled_from(sorted(frames.TYPES)), st.binary(max_size=300)), max_size=8)


@given(FRAMES, st.integers(min_value=1, max_value=50))
def test_frames_survive_being_cut_anywhere(content: list[tuple[bytes, bytes]], piece: int) -> None:
    stream = b"".join(frames.encode(kind, data) for kind, data in content)
    decoder = frames.Decoder()
    found = []
    for start in range(0, len(stream), piece):
        decoder.feed(stream[start : start + piece])
        found += list(decoder)
    assert found == content
    assert not decoder.partial


def _decoded(stream: bytes) -> frames.Decoder:
    decoder = frames.Decoder()
    decoder.feed(stream)
    return decoder


def test_a_frame_ends_a_line_so_that_srun_passes_it_on() -> None:
    assert frames.encode(frames.BEAT).endswith(b"\n")


@pytest.mark.parametrize(
    "stream",
    [
        b"Traceback (most recent call last):\n",
        b"B\xff\xff\xff\xff",
        frames.encode(frames.OUT, b"abc")[:-1] + b"x",
    ],
    ids=["text", "endless frame", "frame without its end"],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    decoder = frames.Decoder()
    decoder.feed(stream)
    with pytest.raises(frames.ProtocolError):
        list(decoder)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(frames.ProtocolError):
        frames.decode_json(content)


@given(st.integers(0, 2**53 - 1), st.integers(0, 2**53 - 1))
def test_progress_comes_out_as_it_went_in(one: int, other: int) -> None:
    done, total = sorted((one, other))
    [(kind, content)] = list(_decoded(frames.encode_progress(done, total)))
    assert kind == frames.PROGRESS
    assert frames.decode_progress(content) == (done, total)


@pytest.mark.parametrize(("done", "total"), [(2, 1), (-1, 1), (0, 2**53)])
def test_progress_that_cannot_be_is_not_sent(done: int, total: int) -> None:
    with pytest.raises(ValueError, match="progress"):
        frames.encode_progress(done, total)


@pytest.mark.parametrize("content", [b"", bytes(15), bytes(17), struct.pack(">QQ", 2, 1), struct.pack(">QQ", 0, 2**53)])
def test_progress_that_cannot_be_is_refused(content: bytes) -> None:
    with pytest.raises(frames.ProtocolError):
        frames.decode_progress(content)


def test_a_frame_has_a_largest_size() -> None:
    with pytest.raises(frames.ProtocolError):
        frames.encode(frames.DATA, bytes(frames.MAX_FRAME + 1))


def test_a_window_gives_credit_for_what_was_used_and_refuses_more_than_it_allowed() -> None:
    window = frames.Window(frames.OUTPUT_STREAM)
    window.arrived(frames.WINDOW)
    credit = window.used(frames.WINDOW)
    ((kind, content),) = _decoded(credit)
    assert (kind, frames.decode_credit(content)) == (frames.CREDIT, (frames.OUTPUT_STREAM, frames.WINDOW))
    window.arrived(frames.WINDOW)
    with pytest.raises(frames.ProtocolError):
        window.arrived(1)


def _decoded(stream: bytes) -> list[tuple[bytes, bytes]]:
    decoder = frames.Decoder()
    decoder.feed(stream)
    return list(decoder)


@pytest.fixture
def link() -> Iterator[tuple[frames.Link, int, int]]:
    """Return a link, and the other side's descriptors to read and write."""
    read_fd, far_write = os.pipe()
    far_read, write_fd = os.pipe()
    yield frames.Link(read_fd, write_fd), far_read, far_write
    for fd in (read_fd, write_fd, far_read, far_write):
        os.close(fd)


def test_nobody_is_silent_before_the_first_byte(
    link: tuple[frames.Link, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _, _ = link
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    assert not near.silent
    near.beat()
    assert not near.pending


def test_silence_counts_from_the_last_byte(link: tuple[frames.Link, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    near, far_read, far_write = link
    os.write(far_write, frames.encode(frames.BEAT))
    assert near.receive() == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 1.0)
    assert not near.silent
    near.beat()
    assert _decoded(os.read(far_read, 100)) == [(frames.BEAT, b"")]
    monkeypatch.setattr(time, "monotonic", lambda: now + frames.SILENCE_S + 0.5)
    assert near.silent


def test_silence_is_noticed_when_it_has_lasted_long_enough(
    link: tuple[frames.Link, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _, _ = link
    monkeypatch.setattr(frames, "SILENCE_S", 0.05)
    near.watch()
    began = time.monotonic()
    poller = frames.Poller()
    while not near.silent:
        poller.wait([near.read_fd], [], [near])
    assert time.monotonic() - began < frames.BEAT_S / 2


def test_being_held_up_oneself_is_not_the_other_sides_silence(
    link: tuple[frames.Link, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _, far_write = link
    os.write(far_write, frames.encode(frames.BEAT))
    near.receive()
    poller = frames.Poller()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10)
    poller.wait([], [], [near])
    assert not near.silent


def test_a_link_says_when_too_much_waits_and_drops_what_nobody_can_read(link: tuple[frames.Link, int, int]) -> None:
    near, far_read, _ = link
    for _ in range(50):
        near.send(frames.encode(frames.DATA, bytes(frames.CHUNK)))
    assert near.congested
    os.dup2(os.open(os.devnull, os.O_RDONLY), far_read)
    near.flush()
    assert not near.pending
    assert not near.congested


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    # Theirs alone: threads that earlier tests have left sleep, too.
    monkeypatch.setattr(frames, "time", SimpleNamespace(monotonic=time.monotonic, sleep=made.append))
    return made


def test_a_long_frame_that_trickles_in_is_waited_for(link: tuple[frames.Link, int, int], pauses: list[float]) -> None:
    near, _, far_write = link
    long, short = (frames.encode(frames.DATA, bytes(size)) for size in (frames.CHUNK, 5000))
    poller = frames.Poller()
    for piece, expected in ((long[:1000], 1), (long[1000:60_000], 0), (long[60_000:], 0), (short[:1000], 0)):
        os.write(far_write, piece)
        near.receive()
        pauses.clear()
        poller.wait([near.read_fd], [], [near])
        poller.wait([near.read_fd], [], [near])
        assert len(pauses) == expected, len(piece)


def test_a_long_frame_that_trickles_out_is_waited_for(link: tuple[frames.Link, int, int], pauses: list[float]) -> None:
    near, far_read, _ = link
    poller = frames.Poller()
    near.send(frames.encode(frames.DATA, bytes(frames.CHUNK // 2)))  # much of the last one is left over then
    while not near.pending:
        near.send(frames.encode(frames.DATA, bytes(frames.CHUNK)))
    poller.wait([], [near.write_fd], [near])
    for room, expected in ((4096, 1), (65536, 0)):
        pauses.clear()
        os.read(far_read, room)
        near.flush()
        poller.wait([], [near.write_fd], [near])
        poller.wait([], [], [near])
        assert len(pauses) == expected, room


def test_a_pipe_holds_a_mebibyte_so_that_nobody_waits_for_a_pause(link: tuple[frames.Link, int, int]) -> None:
    near, _, _ = link
    for fd in (near.read_fd, near.write_fd):
        assert fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == 1024**2
