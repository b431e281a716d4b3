"""The images that all others are made of: one Debian, one Python, nothing of the machine that built them."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cfiddle_cluster import config, images
from cfiddle_cluster.commands import CommandError, docker_cli, run
from cfiddle_cluster.state import State
from containers import Container, Start

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1800)
def test_all_images_are_of_one_release_and_have_one_python(tmp_path: Path) -> None:
    settings = config.load(ROOT)
    references = images.build(settings, lambda _text: None)
    found = images.releases(references, State(tmp_path))
    assert set(found) == set(references) - {"base"}
    assert len(set(found.values())) == 1, found
    assert settings.debian_release in found["sandbox"]
    assert "Python 3." in found["sandbox"]


def test_packages_come_from_debian_itself_and_not_from_the_builders_mirror(image: Callable[[str], str]) -> None:
    script = "cat /etc/apt/sources.list.d/* /etc/apt/apt.conf.d/*; ls -A /run/secrets /var/lib/apt/lists"
    text = run([docker_cli(), "run", "--rm", image("base"), "sh", "-c", script], timeout_s=60)
    uris = [line for line in text.splitlines() if line.startswith("URIs:")]
    assert uris == ["URIs: http://deb.debian.org/debian", "URIs: http://deb.debian.org/debian-security"]
    release = config.load(ROOT).debian_release
    assert f"Suites: {release} {release}-updates\n" in text
    assert f"Suites: {release}-security\n" in text
    assert "Proxy" not in text
    assert text.endswith("/run/secrets:\n\n/var/lib/apt/lists:\n") or "/run/secrets:" not in text


@pytest.fixture
def idle(start: Start) -> Container:
    return start("common", "sleep", "infinity")


def test_signal_ends_a_container_at_once(idle: Container) -> None:
    began = time.monotonic()
    idle.stop()
    assert time.monotonic() - began < 5


def test_health_check_that_fails_is_repeated_at_once(idle: Container) -> None:
    for _ in range(2):
        with pytest.raises(CommandError) as raised:
            idle.run("timeout", "5", "health", "false")
        assert raised.value.returncode == 1


def test_health_check_that_passed_sleeps_before_it_looks_again(idle: Container) -> None:
    idle.run("timeout", "5", "health", "true")
    with pytest.raises(CommandError) as raised:
        idle.run("timeout", "2", "health", "touch", "/tmp/looked")
    assert raised.value.returncode == 124
    with pytest.raises(CommandError):
        idle.run("test", "-e", "/tmp/looked")


def test_health_check_looks_at_once_after_a_restart(idle: Container) -> None:
    idle.run("timeout", "5", "health", "true")
    idle.restart()
    idle.run("timeout", "5", "health", "true")


def test_health_check_that_hangs_has_failed(idle: Container) -> None:
    with pytest.raises(CommandError) as raised:
        idle.run("health", "sleep", "60")
    assert raised.value.returncode == 1


def test_waiting_ends_when_the_command_succeeds_and_when_the_time_is_over(idle: Container) -> None:
    looks = "echo x >>/tmp/looks; test $(wc -l </tmp/looks) = 5"
    began = time.monotonic()
    idle.run("wait-until", "60", "sh", "-c", looks)
    assert time.monotonic() - began < 5
    with pytest.raises(CommandError) as raised:
        idle.run("env", "CFIDDLE_PATIENCE=3", "wait-until", "1", "sh", "-c", "date +%s.%N >>/tmp/times; false")
    assert raised.value.returncode == 1
    times = [float(line) for line in idle.run("cat", "/tmp/times").split()]
    assert 1.5 < times[-1] - times[0] < 5, "patience makes it longer"
    assert times[-1] - times[-2] > 2 * (times[1] - times[0]), "and pauses grow"
