"""What keeps a process from counters: what each error of the kernel's stands for, and what this machine really says."""

import errno
from pathlib import Path

import pytest

from delegate_function import counters


@pytest.mark.parametrize(
    ("software", "hardware", "reason"),
    [
        (0, 0, None),
        (errno.EPERM, errno.EPERM, "policy: "),
        (errno.EACCES, errno.EACCES, "kernel: perf_event_paranoid is 3; "),
        (errno.ENOSYS, errno.ENOSYS, "kernel: it was built without"),
        (0, errno.ENOENT, "machine: "),
        (0, errno.ENODEV, "machine: "),
        (0, errno.EOPNOTSUPP, "machine: "),
        (0, errno.EIO, "machine: Input/output error"),
    ],
)
def test_reason_names_what_would_have_to_be_another(
    software: int, hardware: int, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paranoid").write_text("3\n")
    monkeypatch.setattr(counters, "_PARANOID", tmp_path / "paranoid")
    monkeypatch.setattr(counters, "error", lambda kind, _event: (hardware, software)[kind])
    found = counters.obstacle()
    assert found == reason or (reason and found and found.startswith(reason))


def test_this_kernel_is_asked_for_real() -> None:
    # Whatever it says: an attribute that is wrong would be EINVAL or E2BIG, and a call that is wrong ENOSYS.
    tried = {counters.error(counters._SOFTWARE, counters._DUMMY), counters.error()}
    assert tried <= {0, errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP}
    assert counters.error(99, 0) in (errno.ENOENT, errno.EPERM, errno.EACCES), "there is no such kind of event"


def test_a_name_that_is_unknown_is_not_the_machine_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "obstacle", lambda: "machine: none")
    monkeypatch.setattr(counters, "is_known", lambda name: name != "misspelt")
    assert counters.unavailable(["cycles"]) == "machine: none"
    assert counters.unavailable(["cycles", "misspelt"]) is None
