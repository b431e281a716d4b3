"""The state: made once, root's alone, one command at a time, gone when purged."""

import os
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cfiddle_cluster import state as state_module
from cfiddle_cluster.commands import run
from cfiddle_cluster.errors import ClusterError
from cfiddle_cluster.state import SECRETS, State

SRC = Path(state_module.__file__).resolve().parents[1]
HEAD = "10.1.2.3"


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    found = State(tmp_path / f"state-{os.getpid()}")
    yield found
    Path(f"/run/{found.directory.name}.lock").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> State:
    """Return a state that was made under the most generous umask there is."""
    found = State(tmp_path_factory.mktemp("made") / "state")
    before = os.umask(0)
    try:
        found.ensure(HEAD)
    finally:
        os.umask(before)
    return found


def _contents(state: State) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in state.directory.rglob("*") if path.is_file()}


def test_state_is_made_once(made: State) -> None:
    before = _contents(made)
    made.ensure(HEAD)
    assert _contents(made) == before


def test_two_states_share_no_secret(made: State, state: State) -> None:
    state.ensure(HEAD)
    for name in SECRETS:
        assert made.secret(name) != state.secret(name)
        assert len(made.secret(name)) >= 64


def test_directories_and_whatever_is_secret_are_root_s_alone(made: State) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    directories = [made.directory, *(path for path in made.directory.rglob("*") if path.is_dir())]
    assert {mode(path) for path in directories} == {0o700}
    secret = [made.path(f"secrets/{name}") for name in SECRETS]
    secret += [made.path(name) for name in ("ssh/id_ed25519", "ca.key", "registry.key")]
    assert {mode(path) for path in secret} == {0o600}


def test_munge_key_has_a_length_that_munge_takes(made: State) -> None:
    assert 32 <= len(made.secret("munge-key").encode()) <= 1024


def test_ssh_key_is_ed25519_and_has_its_public_half(made: State) -> None:
    public = run(["ssh-keygen", "-y", "-f", made.path("ssh/id_ed25519")], timeout_s=10)
    assert public.split()[0] == "ssh-ed25519"
    assert public.split()[:2] == made.path("ssh/id_ed25519.pub").read_text().split()[:2]


def test_registry_s_certificate_is_the_authority_s_and_for_the_head(made: State) -> None:
    verify = ["openssl", "verify", "-CAfile", made.path("ca.crt")]
    run([*verify, "-verify_ip", HEAD, made.path("registry.crt")], timeout_s=10)
    with pytest.raises(ClusterError):
        run([*verify, "-verify_ip", "10.9.9.9", made.path("registry.crt")], timeout_s=10)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.path("registry.crt"), made.path("registry.key"))


def test_another_address_gets_another_certificate_from_the_same_authority(state: State) -> None:
    state.ensure(HEAD)
    authority = state.path("ca.crt").read_bytes()
    state.ensure("head.example.org")
    assert state.path("ca.crt").read_bytes() == authority
    verify = ["openssl", "verify", "-CAfile", state.path("ca.crt"), "-verify_hostname", "head.example.org"]
    run([*verify, state.path("registry.crt")], timeout_s=10)


@pytest.mark.parametrize(
    "lost", ["secrets/jupyter-token", "ssh/id_ed25519.pub", "registry.crt", "registry-address.json"]
)
def test_what_is_lost_is_made_anew_and_the_rest_stays(state: State, lost: str) -> None:
    state.ensure(HEAD)
    kept = state.secret("munge-key")
    state.path(lost).unlink()
    state.ensure(HEAD)
    assert state.path(lost).exists()
    assert state.secret("munge-key") == kept


def test_secret_of_no_cluster_is_said_so(state: State) -> None:
    with pytest.raises(ClusterError, match="no cluster on this machine"):
        state.secret("munge-key")
    assert not state.exists


def test_json_is_read_back_and_has_a_default(state: State) -> None:
    state.directory.mkdir()
    assert state.read_json("users.json", ["default"]) == ["default"]
    state.write_json("users.json", {"ada": 2003})
    assert state.read_json("users.json", None) == {"ada": 2003}
    assert stat.S_IMODE(state.path("users.json").stat().st_mode) == 0o600


def test_write_that_fails_leaves_the_old_content_and_no_rest(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    state.directory.mkdir()
    state.write("file", "old")

    def fail(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        state.write("file", "new")
    assert [path.name for path in state.directory.iterdir()] == ["file"]
    assert state.path("file").read_text() == "old"


def test_purge_leaves_nothing_and_can_be_done_again(state: State) -> None:
    state.ensure(HEAD)
    state.purge()
    assert not state.directory.exists()
    state.purge()


# --- the lock --------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys, time; from pathlib import Path; from cfiddle_cluster.state import State\n"
    "with State(Path(sys.argv[1])).lock('up'):\n"
    "    print('held', flush=True); time.sleep(300)"
)


def _holder(state: State) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HOLD, str(state.directory)]
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_second_command_is_told_who_is_at_work(state: State) -> None:
    with _holder(state) as process:
        try:
            with (
                pytest.raises(
                    ClusterError, match=rf"\./invoke up \(process {process.pid}\) is at work on this cluster"
                ),
                state.lock("down"),
            ):
                pytest.fail("two hold the lock")
        finally:
            process.kill()


def test_killed_command_holds_the_lock_no_longer(state: State) -> None:
    with _holder(state) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    with state.lock("down"):
        pass


def test_command_that_a_holder_started_does_not_hold_on(state: State) -> None:
    with state.lock("up"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with state.lock("down"):
            pass
    finally:
        child.kill()
        child.wait()


def test_lock_is_free_after_a_failure(state: State) -> None:
    with pytest.raises(ClusterError, match="it broke"), state.lock("up"):
        raise ClusterError("it broke")
    with state.lock("up"):
        pass


def test_lock_outlives_a_purge(state: State) -> None:
    """Whoever comes while state is being removed is still told that somebody is at work."""
    state.ensure(HEAD)
    with state.lock("down"):
        state.purge()
        with pytest.raises(ClusterError, match="is at work"), State(state.directory).lock("up"):
            pytest.fail("two hold the lock")
