"""A build learns how this machine reaches packages, and only that."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cfiddle_cluster import package_access

APT_CONFIG = """\
APT::Architecture "amd64";
Acquire::http::Proxy "http://proxy.example:3128/";
Acquire::https::CaInfo "/etc/ssl/certs/own.pem";
Acquire::Check-Valid-Until "false";
Acquire::IndexTargets::deb::Packages::Optional "0";
"""

INDEX_TARGETS = """\
Debian|Debian|https://mirror.example/debian/
Debian|Debian-Security|https://mirror.example/debian-security/
Somebody|Else|https://else.example/apt/
"""

PIP_CONFIG = """\
:env:.cert='/etc/ssl/certs/ca-certificates.crt'
global.find-links='/opt/wheels'
global.index-url='https://pypi.example/simple'
global.extra-index-url='file:///opt/simple https://more.example/simple'
"""


def run(argv: Sequence[str], **_options: object) -> str:
    return APT_CONFIG if argv[0] == "apt-config" else INDEX_TARGETS


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    listed = subprocess.CompletedProcess([], 0, stdout=PIP_CONFIG)
    monkeypatch.setattr(package_access, "run", run)
    monkeypatch.setattr(package_access, "_is_debian", lambda: True)
    monkeypatch.setattr(package_access.subprocess, "run", lambda *_args, **_options: listed)
    return package_access.write_build_secrets(tmp_path, release="trixie", mounted_at="/run/secrets")


def test_proxy_and_checks_travel_and_files_of_this_machine_do_not(secrets: dict[str, Path]) -> None:
    text = secrets["apt"].read_text()
    assert 'Acquire::http::Proxy "http://proxy.example:3128/";' in text
    assert 'Acquire::Check-Valid-Until "false";' in text
    assert "own.pem" not in text
    assert 'Acquire::https::CaInfo "/run/secrets/ca";' in text


def test_packages_come_from_this_machines_mirror_for_the_images_release(secrets: dict[str, Path]) -> None:
    assert secrets["sources"].read_text().splitlines() == [
        "deb https://mirror.example/debian trixie main",
        "deb https://mirror.example/debian trixie-updates main",
        "deb https://mirror.example/debian-security trixie-security main",
    ]


def test_package_indexes_travel_and_directories_of_this_machine_do_not(secrets: dict[str, Path]) -> None:
    assert secrets["pip"].read_text().splitlines() == [
        "[global]",
        "cert = /run/secrets/ca",
        "index-url = https://pypi.example/simple",
        "extra-index-url = https://more.example/simple",
    ]


def test_nobody_else_can_read_them(secrets: dict[str, Path]) -> None:
    assert {path.stat().st_mode & 0o777 for path in secrets.values()} == {0o600}


def test_another_distribution_uses_the_public_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_access, "_is_debian", lambda: False)
    secrets = package_access.write_build_secrets(tmp_path, release="trixie", mounted_at="/run/secrets")
    assert "deb http://deb.debian.org/debian-security trixie-security main" in secrets["sources"].read_text()
