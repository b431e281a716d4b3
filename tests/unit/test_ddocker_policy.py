"""What an administrator says of users' containers: types, what is kept free, options; and an info.json taken over."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import container_options, container_policy
from agent.checked import PolicyError
from agent.container_options import Options, Ulimit, Volume
from agent.container_policy import Buffer, ContainerPolicy, Type
from cfiddle_cluster import info_json
from cfiddle_cluster.errors import ClusterError

SECTION = {"images": ["ubuntu:latest"], "per_user": 4, "disk_mb": 100, "cpus": 2, "memory_mb": 512, "processes": 64}
INFO: dict[str, Any] = {
    "master": {"host": "10.0.0.1", "user": "teacher"},
    "workers": [{"host": "10.0.0.2", "user": "teacher"}, {"host": "10.0.0.3", "user": "teacher"}],
    "type": {
        "12 CPUS, 64 GB": [12, 64, ""],
        "24 CPUS, 128 GB, 2 TITAN XP": [24, 128, "TITAN Xp,TITAN Xp"],
    },
    "buffer": {"cpu": 5, "mem": 10},
    "start_port_num": 25000,
    "additional_options": ["-v /home/jsikyoon:/home/jsikyoon"],
}


def _parse(**settings: Any) -> ContainerPolicy:
    return container_policy.parse({**SECTION, **settings}, {})


def _options(*lines: str) -> Options:
    return container_options.parse(list(lines), "containers.additional_options")


def test_types_are_those_of_the_administrator_in_their_order() -> None:
    types = _parse(types={"large": [24, 128, "TITAN Xp,TITAN Xp"], "small": [1, 0.5, ""]}).types
    assert types == (Type("large", 24, 131072, ("TITAN Xp", "TITAN Xp")), Type("small", 1, 512))


def test_without_types_there_is_what_containers_have_otherwise() -> None:
    assert _parse().types == (Type("2 CPUS", 2, 512),)


@pytest.mark.parametrize(
    ("types", "said"),
    [
        ({}, "at least one type"),
        (["a"], "at least one type"),
        ({"a": [1, 1]}, "'a' is not \\[CPUs, GB"),
        ({"a": [0, 1, ""]}, "CPUs is 0"),
        ({"a": ["2", 1, ""]}, "CPUs is '2'"),
        ({"a": [1, 0, ""]}, "0 is no number of gigabytes"),
        ({"a": [1, -1, ""]}, "-1 is no number"),
        ({"a": [1, True, ""]}, "True is no number"),
        ({"a": [1, float("nan"), ""]}, "nan is no number"),
        ({"a": [1, 1, None]}, "None is no list of GPU models"),
        ({"a": [1, 1, "TITAN Xp,"]}, "no list of GPU models"),
        ({"a\n": [1, 1, ""]}, "no name of a type"),
        ({1: [1, 1, ""]}, "no name of a type"),
    ],
)
def test_type_that_is_none_is_named(types: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        _parse(types=types)


def test_what_is_kept_free_is_nothing_unless_said() -> None:
    assert _parse().buffer == Buffer(0, 0)
    assert _parse(buffer={"cpu": 5, "mem": 10}).buffer == Buffer(5, 10240)


@pytest.mark.parametrize(
    "settings",
    [
        {"buffer": {"cpu": 1}},
        {"buffer": {"cpu": -1, "mem": 0}},
        {"buffer": {"cpu": 1, "mem": "10"}},
        {"start_port_num": 80},
        {"start_port_num": 65536},
        {"start_port_num": "25000"},
        {"images_per_user": -1},
        {"images_mb": 0},
        {"additional_options": "-v /data:/data"},
        {"additional_options": [1]},
        {"unheard_of": 1},
    ],
)
def test_wrong_setting_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=str(next(iter(settings)))):
        _parse(**settings)


def test_options_are_read_as_docker_reads_them() -> None:
    found = _options(
        "-v /data:/data:ro --volume=/home/jsikyoon:/home/jsikyoon",
        "-e 'A=b c' --env X=",
        "--shm-size 1g --ulimit nofile=1:2",
    )
    assert found.volumes == (Volume("/data", "/data", True), Volume("/home/jsikyoon", "/home/jsikyoon", False))
    assert found.environment == ("A=b c", "X=")
    assert found.shm_bytes == 2**30
    assert found.ulimits == (Ulimit("nofile", 1, 2),)
    assert _options() == Options()


@pytest.mark.parametrize(
    "line",
    [
        "--privileged",
        "--cap-add SYS_ADMIN",
        "--security-opt seccomp=unconfined",
        "--network host",
        "--pid=host",
        "--device /dev/sda",
        "--mount type=bind,source=/,target=/host",
        "--vol /data:/data",
        "-it",
        "ubuntu",
        "-v",
        "-v '/data:/data",
        "-v data:/data",
        "-v /data",
        "-v /data:/data:rshared",
        "-v /data:/data:ro:x",
        "-v /:/host",
        "-v /data/../etc:/x",
        "-v //etc:/x",
        "-v /etc:/x",
        "-v /root/.ssh:/x",
        "-v /run/docker.sock:/run/docker.sock",
        "-v /var/run/docker.sock:/x",
        "-v /var/lib/docker:/x",
        "-v /var:/x",
        "-v /proc/1:/x",
        "-v /sys:/x",
        "-v /dev/mem:/x",
        "-v /var/lib/cfiddle-cluster:/x",
        "-v /srv/cfiddle-cluster/home:/x",
        "-v /data:/",
        "-v /data:/etc",
        "-v /data:/proc",
        "-v /data:/home",
        "-v /data:/home/me/x",
        "-v /data:/x -v /other:/x/y",
        "-e HOME=/",
        "-e A",
        "-e 1=2",
        "--shm-size 0",
        "--shm-size 1t",
        "--shm-size -1",
        "--ulimit core=1",
        "--ulimit nproc=1",
        "--ulimit nofile",
        "--ulimit nofile=2:1",
    ],
)
def test_any_other_option_is_refused_and_its_line_named(line: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _options("-e A=b", line)
    assert f"containers.additional_options, line 2, {line!r}: " in str(caught.value)


def test_volume_over_one_of_another_line_is_refused() -> None:
    with pytest.raises(PolicyError, match=r"line 2.*another volume's"):
        _options("-v /data:/x", "-v /other:/x/y")


# --- info.json -------------------------------------------------------------------------------------------------------


def _section(tmp_path: Path, info: object) -> str:
    (tmp_path / "info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    return info_json.section(tmp_path / "info.json")


def test_info_json_becomes_a_part_of_the_policy(tmp_path: Path) -> None:
    text = _section(tmp_path, INFO)
    printed = yaml.safe_load("containers:\n" + text.partition("# In config.sh")[0])["containers"]
    taken = _parse(**printed)
    assert [kind.name for kind in taken.types] == list(INFO["type"])
    assert taken.types[1] == Type("24 CPUS, 128 GB, 2 TITAN XP", 24, 131072, ("TITAN Xp", "TITAN Xp"))
    assert taken.buffer == Buffer(5, 10240)
    assert taken.first_port == 25000
    assert taken.options.volumes == (Volume("/home/jsikyoon", "/home/jsikyoon", False),)
    assert 'HEAD_ADDR="10.0.0.1"\nWORKER_ADDRS="10.0.0.2 10.0.0.3"\n' in text


def test_all_of_an_info_json_that_cannot_be_taken_is_named(tmp_path: Path) -> None:
    options = [*INFO["additional_options"], "--privileged", "-v /run:/run"]
    with pytest.raises(ClusterError) as caught:
        _section(tmp_path, {**INFO, "buffer": {"cpu": -1, "mem": 0}, "additional_options": options, "more": 1})
    said = str(caught.value)
    for part in ("more: nothing is known of it", "buffer.cpu is -1", "'--privileged'", "'-v /run:/run'"):
        assert part in said
    assert "jsikyoon" not in said


@pytest.mark.parametrize("content", ["{", "[]", '{"master":{"host":,"user":}}'])
def test_file_that_is_no_info_json_is_told(tmp_path: Path, content: str) -> None:
    with pytest.raises(ClusterError, match=r"info\.json"):
        _section(tmp_path, content)


def test_info_json_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="No such file"):
        info_json.section(tmp_path / "none.json")
