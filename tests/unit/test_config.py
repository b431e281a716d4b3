"""config.sh: what it may say, and that everything wrong in it is told at once, with what would be right."""

import os
from pathlib import Path

import pytest

from cfiddle_cluster import config
from cfiddle_cluster.config import KNOBS, Config, from_settings, load
from cfiddle_cluster.errors import ClusterError
from samples import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def _load(tmp_path: Path, *lines: str) -> Config:
    """Load the real config.sh with lines added to its end."""
    text = (ROOT / "config.sh").read_text()
    (tmp_path / "config.sh").write_text(text + "".join(f"{line}\n" for line in lines))
    return load(tmp_path)


def _message(tmp_path: Path, *lines: str) -> str:
    with pytest.raises(ClusterError) as caught:
        _load(tmp_path, *lines)
    assert caught.value.remedy
    return caught.value.message


def test_config_sh_as_it_comes_is_a_laptop_with_two_workers(tmp_path: Path) -> None:
    found = _load(tmp_path)
    assert found.simulated
    assert found.local_workers == 2
    assert found.home_storage == "bind"
    assert found.home_root == Path("/srv/cfiddle-cluster/home")
    assert found.head_addr == config.SIMULATED_HEAD_ADDR
    assert found.jupyter_port == 8888
    assert found.ssh_port == 0
    assert found.debian_release == "trixie"
    assert found.root == tmp_path


def test_every_setting_stands_in_config_sh_with_a_comment() -> None:
    lines = (ROOT / "config.sh").read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if not line.startswith("#") and "=" in line]
    assert sorted(names) == sorted(KNOBS)
    for number, line in enumerate(lines):
        if line.partition("=")[0] in names:
            above = lines[number - 1]
            assert above.startswith("#") or above.partition("=")[0] in names, line


def test_config_is_plain_shell(tmp_path: Path) -> None:
    found = _load(tmp_path, "workers=3", "LOCAL_WORKERS=$((workers - 1 + 2))", 'HOME_ROOT="/srv/$(echo ab)c"')
    assert found.local_workers == 4
    assert found.home_root == Path("/srv/abc")


def test_home_directory_can_be_used_in_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("")
    monkeypatch.setattr(config, "_KEPT", [f"HOME={tmp_path}", f"PATH={os.environ['PATH']}"])
    assert _load(tmp_path, 'SSH_KEY="$HOME/key"').ssh_key == str(tmp_path / "key")


def test_environment_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORKERS", "7")
    monkeypatch.setenv("WORKER_ADDRS", "10.0.0.9")
    monkeypatch.setenv("BASH_ENV", "/nonexistent")
    monkeypatch.setenv("SOME_KNOB", "x")
    assert _load(tmp_path).local_workers == 2


def test_what_it_prints_disturbs_nothing(tmp_path: Path) -> None:
    assert _load(tmp_path, "echo LOCAL_WORKERS=9; printf 'x\\0y'").local_workers == 2


def test_syntax_error_is_told_with_its_line(tmp_path: Path) -> None:
    lines = len((ROOT / "config.sh").read_text().splitlines())
    message = _message(tmp_path, 'JUPYTER_PORT="8888')
    assert "config.sh cannot be read" in message
    assert f"line {lines + 1}" in message


def test_command_that_fails_in_it_is_told(tmp_path: Path) -> None:
    message = _message(tmp_path, "LOCAL_WORKERS=$UNHEARD_OF")
    assert "UNHEARD_OF: unbound variable" in message


def test_config_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "READ_TIMEOUT_S", 0.5)
    assert "does not end" in _message(tmp_path, "sleep 60")


def test_missing_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"config\.sh cannot be read:\n.*No such file"):
        load(tmp_path)


def test_unknown_setting_is_told_with_the_nearest(tmp_path: Path) -> None:
    message = _message(tmp_path, "LOCAL_WORKER=3", "FROBNICATE=1")
    assert "LOCAL_WORKER is no setting (did you mean LOCAL_WORKERS?)" in message
    assert "FROBNICATE is no setting" in message


def test_setting_that_is_missing_is_told(tmp_path: Path) -> None:
    assert "JUPYTER_PORT is ''" in _message(tmp_path, "unset JUPYTER_PORT")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("LOCAL_WORKERS=0", "LOCAL_WORKERS is '0'; it must be a whole number from 1 to 64"),
        ("LOCAL_WORKERS=-1", "LOCAL_WORKERS is '-1'"),
        ("LOCAL_WORKERS=two", "LOCAL_WORKERS is 'two'"),
        ("LOCAL_WORKERS=65", "LOCAL_WORKERS is '65'"),
        ("LOCAL_WORKERS=", "LOCAL_WORKERS is ''"),
        ("LOCAL_WORKERS=٣", "LOCAL_WORKERS is"),
        ("LOCAL_WORKER_CPUS=1.5", "LOCAL_WORKER_CPUS is '1.5'"),
        ("LOCAL_WORKER_MEMORY_MB=2G", "LOCAL_WORKER_MEMORY_MB is '2G'"),
        ("JUPYTER_PORT=0", "JUPYTER_PORT is '0'"),
        ("JUPYTER_PORT=65536", "JUPYTER_PORT is '65536'"),
        ("REGISTRY_PORT=https", "REGISTRY_PORT is 'https'"),
        ("REGISTRY_PORT=8888", "JUPYTER_PORT and REGISTRY_PORT are both 8888"),
        ("SSH_PORT=0", "SSH_PORT is '0'"),
        ("SSH_PORT=5000", "REGISTRY_PORT and SSH_PORT are both 5000"),
        ("WORKER_ADDRS='10.0.0.1 10.0.0.2;reboot'", "WORKER_ADDRS has '10.0.0.2;reboot'"),
        ("WORKER_ADDRS='-oProxyCommand=x'", "WORKER_ADDRS has '-oProxyCommand=x'"),
        ("WORKER_ADDRS='10.0.0.2 10.0.0.2'", "WORKER_ADDRS has 10.0.0.2 twice"),
        ("HEAD_ADDR='here there'", "HEAD_ADDR is 'here there'"),
        ("SSH_USER='-l root'", "SSH_USER is '-l root'"),
        ("SSH_KEY=/no/such/key", "SSH_KEY is '/no/such/key'; there is no such file"),
        ("HOME_ROOT=", "HOME_ROOT is ''"),
        ("HOME_ROOT=home", "HOME_ROOT is 'home'"),
        ("HOME_ROOT=/home", "HOME_ROOT is /home, which is the machine's own"),
        ("HOME_ROOT=/home/", "HOME_ROOT is /home/, which is the machine's own"),
        ("HOME_ROOT=/", "HOME_ROOT is '/'"),
        ("HOME_ROOT=//", "HOME_ROOT is //, which is the machine's own"),
        ("HOME_ROOT=/opt", "HOME_ROOT is /opt, which is the machine's own"),
        ("HOME_ROOT=/mnt/.", "HOME_ROOT is /mnt/., which is the machine's own"),
        ("HOME_ROOT=/homes", "two levels deep or more"),
        ("HOME_ROOT=/var/lib", "HOME_ROOT is /var/lib, which is the machine's own"),
        ("HOME_ROOT=/usr/local/homes", "HOME_ROOT is /usr/local/homes, which is the machine's own"),
        ("HOME_ROOT=/home; WORKER_ADDRS=10.0.0.2; HEAD_ADDR=10.0.0.1; HOME_SERVER=10.0.0.1", "HOME_ROOT is /home"),
        ("HOME_ROOT=/srv/../etc", "HOME_ROOT is '/srv/../etc'"),
        ("HOME_ROOT='/srv/a b'", "HOME_ROOT is '/srv/a b'"),
        ("HOME_STORAGE=cifs", "HOME_STORAGE is 'cifs'; it must be bind, nfs or empty"),
        ("HOME_STORAGE=bind; WORKER_ADDRS=10.0.0.2; HEAD_ADDR=10.0.0.1", "HOME_STORAGE=bind reaches no other machine"),
        ("HOME_STORAGE=bind; HOME_SERVER=nas", "HOME_SERVER is set, but HOME_STORAGE is bind"),
        ("HOME_SERVER='nas:/x'", "HOME_SERVER is 'nas:/x'"),
        ("DOCKERHUB_USERNAME='me:secret'", "DOCKERHUB_USERNAME is 'me:secret'"),
        ("DEBIAN_RELEASE='13 sid'", "DEBIAN_RELEASE is '13 sid'"),
        ("PACKAGES_OF=today", "PACKAGES_OF is 'today', which is no day"),
    ],
)
def test_wrong_value_is_told_with_what_would_be_right(tmp_path: Path, setting: str, words: str) -> None:
    assert words in _message(tmp_path, setting)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    message = _message(tmp_path, "LOCAL_WORKERS=0", "JUPYTER_PORT=x", "HOME_ROOT=home")
    assert [line.split()[-1 - line.split()[::-1].index("is") - 1] for line in message.splitlines()] == [
        "HOME_ROOT",
        "LOCAL_WORKERS",
        "JUPYTER_PORT",
    ]


def test_real_workers_take_their_homes_from_the_head() -> None:
    found = from_settings(ROOT, {**SETTINGS, "WORKER_ADDRS": "10.0.0.2  10.0.0.3\n"})
    assert found.worker_addrs == ("10.0.0.2", "10.0.0.3")
    assert not found.simulated
    assert found.home_storage == "nfs"


@pytest.mark.parametrize("root", ["/mnt/homes", "/home/cluster", "/var/lib/homes", "/srv/a/b"])
def test_homes_may_be_in_any_directory_of_their_own(root: str) -> None:
    assert from_settings(ROOT, {**SETTINGS, "HOME_ROOT": root}).home_root == Path(root)


def test_another_server_exports_what_it_likes() -> None:
    settings = {**SETTINGS, "WORKER_ADDRS": "10.0.0.2", "HOME_SERVER": "nas", "HOME_ROOT": "/export"}
    assert from_settings(ROOT, settings).home_root == Path("/export")


def test_head_can_be_the_only_worker_without_nfs() -> None:
    found = from_settings(ROOT, {**SETTINGS, "WORKER_ADDRS": "10.0.0.1", "HOME_STORAGE": "bind"})
    assert found.home_storage == "bind"


def test_head_finds_its_own_address_on_the_way_to_the_first_worker() -> None:
    found = from_settings(ROOT, {**SETTINGS, "HEAD_ADDR": "", "WORKER_ADDRS": "127.0.0.1"})
    assert found.head_addr == "127.0.0.1"


def test_account_at_another_registry_can_be_named() -> None:
    found = from_settings(ROOT, {**SETTINGS, "DOCKERHUB_USERNAME": "registry.example.org:5443/teacher"})
    assert found.dockerhub_username == "registry.example.org:5443/teacher"
