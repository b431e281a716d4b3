"""What a policy says of users' containers, and the fields of a request: what is wrong is said, nothing is guessed."""

from typing import Any

import pytest

from agent.checked import PolicyError
from agent.container_policy import ContainerPolicy, Type, parse
from agent.container_request import field, hold_request, name_of
from agent.wire import Refused

GOOD = {"images": ["my_task_image"], "per_user": 3, "disk_mb": 10, "cpus": 1, "memory_mb": 64, "processes": 99}
HOLD = {"v": 2, "type": "container", "job": 7, "user": "me", "name": "a", "image": "", "ports": 0, "again": False}


def test_own_images_are_what_their_names_stand_for() -> None:
    found = parse({**GOOD, "images": ["my_task_image", "debian:12"]}, {"my_task_image": "registry/task@sha256:1"})
    assert found == ContainerPolicy(
        images={"my_task_image": "registry/task@sha256:1", "debian:12": "debian:12"},
        per_user=3,
        disk_mb=10,
        cpus=1,
        memory_mb=64,
        processes=99,
        types=(Type("1 CPUS", 1, 64),),
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (None, "containers"),
        ([], "containers"),
        ({**GOOD, "mounts": []}, "mounts"),
        ({key: value for key, value in GOOD.items() if key != "disk_mb"}, "disk_mb"),
        *(
            ({**GOOD, "images": images}, r"containers\.images")
            for images in (None, [], "my_task_image", [1], ["-v/:/host"], ["a b"], ["a\n"], [""], ["a" * 600], ["ä"])
        ),
        *(
            ({**GOOD, name: value}, name)
            for name in ("per_user", "disk_mb", "cpus", "memory_mb", "processes")
            for value in (0, -1, 1.5, "1", True, None, 2**40)
        ),
    ],
)
def test_what_is_wrong_is_said(entry: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        parse(entry, {})


@pytest.mark.parametrize(
    "name", ["a", "A.b-c_d", "0", "a" * 63, "my_task_container_0", "u2001.a"]
)  # the last is a name like any other to whoever is no administrator
def test_names_that_are_some(name: str) -> None:
    assert name_of({"name": name}, administrator=False) == name


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "_a", "a/b", "..", "a b", "a\n", "\na", "a\0", "a" * 64, "ä", "²", "a:b"]
)
def test_names_that_are_none(name: str) -> None:
    for administrator in (False, True):
        with pytest.raises(Refused) as caught:
            name_of({"name": name if not administrator else f"u1.{name}"}, administrator=administrator)
        assert caught.value.code == "name"


@pytest.mark.parametrize("name", ["a", "u.a", "u1a", "u-1.a", "u1.", "x1.a", "u12345678901.a", "cfiddle-sandbox-1"])
def test_administrator_s_names_are_the_engine_s(name: str) -> None:
    assert name_of({"name": "u2001.a"}, administrator=True) == "u2001.a"
    with pytest.raises(Refused, match="is no container's name"):
        name_of({"name": name}, administrator=True)


@pytest.mark.parametrize(
    ("kind", "value"), [(int, True), (int, "1"), (str, 1), (float, 1), (bool, 1), (list, "a"), (str, None)]
)
def test_field_of_another_type_is_refused(kind: type, value: object) -> None:
    with pytest.raises(Refused, match=f"not of type {kind.__name__}"):
        field({"f": value}, "f", kind)


def test_request_to_hold_a_container_is_taken() -> None:
    assert hold_request(dict(HOLD)) == HOLD


@pytest.mark.parametrize(
    "wrong",
    [
        {"mounts": []},
        {"uid": 0},
        *({"job": job} for job in (0, -1, 2**32, "7", True, 7.0, None)),
        {"user": None},
        {"image": 1},
        {"again": 0},
        *({"ports": ports} for ports in (-1, 65, "1", True, 1.0, None)),
        {"name": "-rf"},
        {"name": None},
    ],
)
def test_request_to_hold_what_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        hold_request({**HOLD, **wrong})


@pytest.mark.parametrize("missing", ["job", "user", "name", "image", "ports", "again"])
def test_request_must_say_everything(missing: str) -> None:
    with pytest.raises(Refused):
        hold_request({name: value for name, value in HOLD.items() if name != missing})
