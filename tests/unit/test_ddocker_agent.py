"""The agent's side of ddocker that needs no engine: ports, GPUs, names of images, a container's shape."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agent import container_policy, container_request, container_shape, gpus, ports, user_images
from agent.container_shape import Owner, Wanted
from agent.engine import EngineError
from agent.gpus import Gpu
from agent.grants import Grant, Grants
from agent.wire import Refused

# As NVIDIA's driver 580.159.04 wrote it on a machine with an H200.
H200 = """Model: \t\t NVIDIA H200
IRQ:   \t\t 41
GPU UUID: \t GPU-e3bb196d-8dc6-69ca-84b3-a0835f6d2761
Video BIOS: \t 96.00.a5.00.1a
Bus Type: \t PCIe
DMA Size: \t 52 bits
DMA Mask: \t 0xfffffffffffff
Bus Location: \t 0000:00:06.0
Device Minor: \t 0
GPU Firmware: \t 580.159.04
GPU Excluded:\t No
"""
UUID = "GPU-e3bb196d-8dc6-69ca-84b3-a0835f6d2761"


def _driver(path: Path, *texts: str) -> Path:
    for number, text in enumerate(texts):
        (path / f"0000:0{number}:00.0").mkdir()
        (path / f"0000:0{number}:00.0" / "information").write_text(text)
    return path


def test_gpus_are_those_that_the_driver_tells_of(tmp_path: Path) -> None:
    second = H200.replace("Minor: \t 0", "Minor: \t 1").replace(UUID, "GPU-2").replace("NVIDIA H200", "NVIDIA TITAN Xp")
    found = gpus.found(_driver(tmp_path, second, H200))
    assert found == [Gpu(0, "NVIDIA H200", UUID), Gpu(1, "NVIDIA TITAN Xp", "GPU-2")]
    assert gpus.gres(found) == "gpu:h200:1,gpu:titan_xp:1"
    assert gpus.gres(found[:1] * 2) == "gpu:h200:2"


def test_gpu_that_is_excluded_is_none(tmp_path: Path) -> None:
    assert gpus.found(_driver(tmp_path, H200.replace("Excluded:\t No", "Excluded:\t Yes"))) == []


def test_machine_without_a_driver_has_no_gpu(tmp_path: Path) -> None:
    assert gpus.found(tmp_path / "none") == []
    assert gpus.gres([]) == ""


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("TITAN Xp", "titan_xp"),
        ("NVIDIA TITAN Xp", "titan_xp"),
        ("TITAN XP", "titan_xp"),
        ("NVIDIA GeForce RTX 3090", "rtx_3090"),
        ("Tesla V100-SXM2-16GB", "v100_sxm2_16gb"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_model_is_the_same_kind_whoever_writes_it(model: str, kind: str) -> None:
    assert gpus.kind(model) == kind


def test_gpu_is_given_to_one_at_a_time() -> None:
    here = [Gpu(0, "NVIDIA H200", "a"), Gpu(1, "NVIDIA H200", "b"), Gpu(2, "TITAN Xp", "c")]
    assert gpus.chosen(["titan_xp", "h200"], here, taken={"a"}) == [here[2], here[1]]
    with pytest.raises(Refused, match="no GPU h200 is free"):
        gpus.chosen(["h200", "h200"], here, taken={"a"})


def test_grant_says_which_gpus_a_job_has(tmp_path: Path) -> None:
    (tmp_path / "7").write_text("2001 * 2 1024 titan_xp:2,h200:1\n")
    found = Grants(tmp_path, owner=os.getuid()).find(7)
    assert found is not None
    assert found.gpus == ("titan_xp", "titan_xp", "h200")


@pytest.mark.parametrize("gpus", ["titan_xp", "titan_xp:", "titan_xp:x", ":1", "a:1,", "a:1000", "../x:1", "a:1 b:1"])
def test_anything_else_about_gpus_grants_nothing(tmp_path: Path, gpus: str) -> None:
    (tmp_path / "7").write_text(f"2001 * 2 1024 {gpus}\n")
    assert Grants(tmp_path, owner=os.getuid()).find(7) is None


def test_ports_are_the_lowest_that_are_free() -> None:
    assert ports.free(3, first=25000, taken={25000, 25002}) == [25001, 25003, 25004]
    assert ports.free(0, first=25000, taken=set()) == []
    with pytest.raises(Refused, match="no 2 ports free"):
        ports.free(2, first=65534, taken={65534})


@pytest.mark.parametrize(
    ("complaint", "found"),
    [
        (
            "Error starting userland proxy: listen tcp4 0.0.0.0:25001: bind: address already in use",
            {25001},
        ),
        ("driver failed … Bind for 0.0.0.0:25000 failed: port is already allocated", {25000}),
        ("failed to bind host port for 0.0.0.0:25001:172.17.0.2:25001/tcp: address already in use", {25001}),
        ("listen tcp4: bind: address already in use", {25000, 25001}),
        ("OCI runtime create failed: no such file or directory", set()),
        ("no space left on device", set()),
    ],
)
def test_engine_s_complaint_tells_which_port_is_in_the_way(complaint: str, found: set[int]) -> None:
    assert ports.in_the_way(complaint, [25000, 25001]) == found


def _image(size: int, *layers: str) -> dict[str, Any]:
    return {"Size": size, "RootFS": {"Layers": list(layers)}}


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ([], 0),
        ([_image(150, "a", "b", "c")], 50),
        ([_image(150, "a", "b", "c"), _image(170, "a", "b", "c", "d")], 70),
        ([_image(150, "a", "b", "c"), _image(150, "a", "b", "c")], 50),
        ([_image(150, "a", "b", "c"), _image(130, "a", "b", "x")], 80),
        ([_image(90, "y")], 90),
    ],
)
def test_image_adds_what_those_below_it_have_not(own: list[dict[str, Any]], added: int) -> None:
    assert user_images.added_bytes(own, [_image(100, "a", "b"), _image(40, "a")]) == added


class _FakeEngine:
    """An engine that makes images of 3 MB more than their base."""

    def __init__(self) -> None:
        self.there: dict[str, dict[str, Any]] = {"base": _image(2**20, "a")}
        self.pushed: list[str] = []
        self.pulled: list[str] = []

    def images(self) -> list[dict[str, Any]]:
        there = [name for name in self.there if name != "base"]
        return [{"Id": name, "Size": 0, "Labels": {}, "RepoTags": [name]} for name in there]

    def image(self, name: str) -> dict[str, Any]:
        if name not in self.there:
            raise EngineError(404, "no such image")
        return self.there[name]

    def pull(self, repository: str, tag: str, _account: object) -> None:
        self.pulled.append(f"{repository}:{tag}")
        self.there[f"{repository}:{tag}"] = _image(4 * 2**20, "a", repository)

    def commit(self, container: str, repository: str, tag: str, _changes: object) -> None:
        self.there[f"{repository}:{tag}"] = _image(4 * 2**20, "a", container)

    def push(self, repository: str, tag: str, _account: object) -> None:
        self.pushed.append(f"{repository}:{tag}")

    def remove_image(self, name: str) -> None:
        del self.there[name]


class _Registry:
    """A registry in which every user has images of these names."""

    address, account = "r:5001", {"username": "cfiddle"}

    def __init__(self, *names: str) -> None:
        self._names = names

    def digest(self, repository: str, tag: str) -> str:
        return "sha256:1" if repository.rpartition("/")[2] in self._names else ""


def _images(engine: _FakeEngine, registry: _Registry, *, per_user: int = 9, most_mb: int = 6) -> user_images.UserImages:
    return user_images.UserImages(
        engine,  # type: ignore[arg-type]
        registry,  # type: ignore[arg-type]
        per_user=per_user,
        most_mb=most_mb,
        bases=["base"],
    )


def test_image_that_is_more_than_a_user_may_have_is_gone_before_it_is_anywhere() -> None:
    engine = _FakeEngine()
    images = _images(engine, _Registry())
    for name in ("one", "two"):
        images.commit(name, 1000, name)
    with pytest.raises(Refused, match="would add 9 MB to what they are made of, more than the 6 MB") as caught:
        images.commit("three", 1000, "three")
    assert caught.value.code == "share"
    assert engine.pushed == ["r:5001/u1000/one:latest", "r:5001/u1000/two:latest"]
    assert sorted(engine.there) == ["base", *engine.pushed]
    images.commit("one", 1001, "one")


def test_images_of_one_user_become_more_one_by_one() -> None:
    class SlowEngine(_FakeEngine):
        def commit(self, container: str, repository: str, tag: str, changes: object) -> None:
            at_once.append(len(making))
            making.append(container)
            time.sleep(0.02)  # so that all have come before the first has done it
            super().commit(container, repository, tag, changes)
            making.remove(container)

    making: list[str] = []
    at_once: list[int] = []
    engine = SlowEngine()
    images = _images(engine, _Registry(), most_mb=90, per_user=3)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(images.commit, f"n{number}", 1000, f"n{number}") for number in range(8)]
    refused = [error for error in (one.exception() for one in asked) if error]
    assert [error.code for error in refused if isinstance(error, Refused)] == ["share"] * 5
    assert at_once == [0, 0, 0]
    assert len(engine.pushed) == 3


def test_image_that_the_registry_does_not_take_is_nowhere() -> None:
    class FullRegistry(_FakeEngine):
        def push(self, repository: str, tag: str, account: object) -> None:
            raise EngineError(0, "received unexpected HTTP status: 500 Internal Server Error")

    engine = FullRegistry()
    with pytest.raises(EngineError, match=r"its disk is nearly full: received unexpected HTTP status: 500"):
        _images(engine, _Registry()).commit("one", 1000, "one")
    assert list(engine.there) == ["base"]


def test_who_waits_too_long_for_another_image_of_theirs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_images, "_TURN_S", 0.01)
    engine = _FakeEngine()
    images = _images(engine, _Registry())
    with images._turn(1000):
        with pytest.raises(Refused, match="another image of yours") as caught:
            images.commit("one", 1000, "one")
        assert caught.value.code == "busy"
        images.commit("one", 1001, "one")


@pytest.mark.parametrize(("shares", "said"), [({"per_user": 1}, "1 images of yours are here"), ({}, "would add 6 MB")])
def test_image_that_is_fetched_is_in_the_user_s_share(shares: dict[str, int], said: str) -> None:
    engine, registry = _FakeEngine(), _Registry("one", "two")
    images = _images(engine, registry, most_mb=5, **shares)
    for _ in range(2):
        assert images.ensure(1000, "one") == "r:5001/u1000/one:latest"
    for uid, name in ((1000, "two"), (0, "u1000/two")):
        with pytest.raises(Refused, match=said) as caught:
            images.ensure(uid, name)
        assert caught.value.code == "share"
    assert sorted(engine.there) == ["base", "r:5001/u1000/one:latest"]
    assert images.ensure(1001, "two") == "r:5001/u1001/two:latest"
    with pytest.raises(Refused, match="there is no image three"):
        images.ensure(1000, "three")


def test_image_that_several_ask_for_at_once_is_fetched_once() -> None:
    class SlowEngine(_FakeEngine):
        def pull(self, repository: str, tag: str, account: object) -> None:
            time.sleep(0.05)  # so that all have come before the first has done it
            super().pull(repository, tag, account)

    engine = SlowEngine()
    images = _images(engine, _Registry("one"), per_user=1)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(images.ensure, [1000] * 4, ["one"] * 4)) == {"r:5001/u1000/one:latest"}
    assert engine.pulled == ["r:5001/u1000/one:latest"]


@pytest.mark.parametrize(
    ("uid", "name", "repository", "tag", "shown"),
    [
        (1000, "mine", "u1000/mine", "latest", "mine:latest"),
        (1000, "lab/mine:v1.0", "u1000/lab/mine", "v1.0", "lab/mine:v1.0"),
        (1000, "u1001/mine", "u1000/u1001/mine", "latest", "u1001/mine:latest"),
        (0, "u1001/mine:x", "u1001/mine", "x", "mine:x"),
    ],
)
def test_image_of_a_user_is_in_a_repository_of_theirs(
    uid: int, name: str, repository: str, tag: str, shown: str
) -> None:
    image = user_images._parsed(uid, name)
    assert (image.repository, image.tag, image.name) == (repository, tag, shown)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "../x",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        "-rf",
        "a b",
        "a:",
        ":x",
        "a:b:c",
        "a@sha256:0",
        "ü",
        "x" * 300,
        "a\n",
    ],
)
def test_name_of_no_image_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="no name of an image"):
        user_images._parsed(1000, name)


def test_root_says_whose_an_image_is() -> None:
    with pytest.raises(Refused):
        user_images._parsed(0, "mine")
    with pytest.raises(Refused):
        user_images._parsed(0, "u0/mine")


def test_size_of_a_terminal_is_taken_as_far_as_it_is_one() -> None:
    assert container_request.size_of({}) is None
    assert container_request.size_of({"rows": 25, "columns": 80}) == (25, 80)
    for rows, columns in ((0, 80), (25, -1), (25, 2**20), ("25", 80), (25, None), (True, 80)):
        with pytest.raises(Refused):
            container_request.size_of({"rows": rows, "columns": columns})


# --- the shape -------------------------------------------------------------------------------------------------------

SECTION = {"images": ["ubuntu"], "per_user": 4, "disk_mb": 100, "cpus": 2, "memory_mb": 512, "processes": 64}


def _asked(options: list[str], *, grant: Grant | None = None, **wanted: Any) -> dict[str, Any]:
    policy = container_policy.parse({**SECTION, "additional_options": options}, {})
    shape = Wanted(Owner(1000, 100, "ada"), "abc", "ubuntu", "sha256:1", **wanted)
    return container_shape.configuration(shape, policy=policy, grant=grant, home={"device": "/x"}, network="n")


def _entry(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the engine lists of a container that it was asked for."""
    return {"Id": "1", "Labels": asked["Labels"], "Image": "x", "ImageID": "y", "State": "running"}


def test_container_gets_what_its_job_has_and_tells_of_it() -> None:
    asked = _asked([], grant=Grant(1000, "", (0, 0, 0), 3, 2048), ports=[25000, 25001])
    assert asked["HostConfig"]["NanoCpus"] == 3 * 10**9
    assert asked["HostConfig"]["Memory"] == asked["HostConfig"]["MemorySwap"] == 2**31
    assert asked["HostConfig"]["PortBindings"]["25001/tcp"] == [{"HostIp": "0.0.0.0", "HostPort": "25001"}]
    told = container_shape.told(_entry(asked), created="now", job=7)
    assert (told["cpus"], told["memory_mb"], told["ports"]) == (3, 2048, [25000, 25001])
    assert (told["name"], told["user"], told["uid"], told["image"]) == ("abc", "ada", 1000, "ubuntu")


def test_gpus_are_asked_for_by_uuid() -> None:
    asked = _asked([], gpus=[Gpu(0, "NVIDIA TITAN Xp", "GPU-1"), Gpu(1, "NVIDIA TITAN Xp", "GPU-2")])
    [request] = asked["HostConfig"]["DeviceRequests"]
    assert (request["Driver"], request["DeviceIDs"]) == ("nvidia", ["GPU-1", "GPU-2"])
    entry = _entry(asked)
    assert container_shape.gpus(entry) == ["GPU-1", "GPU-2"]
    assert container_shape.told(entry, created="", job=None)["gpus"] == ["NVIDIA TITAN Xp"] * 2
    assert _asked([])["HostConfig"]["DeviceRequests"] == []


def test_options_of_the_administrator_give_no_right_and_take_no_home_away() -> None:
    lines = ["-v /data:/data:ro", "-v /other:/home/ada/x", "-v /home/bob:/home/bob", "-e A=b", "--ulimit nofile=1:2"]
    host = _asked(lines)["HostConfig"]
    binds = [mount for mount in host["Mounts"] if mount["Type"] == "bind"]
    assert [(mount["Source"], mount["Target"], mount["ReadOnly"]) for mount in binds] == [
        ("/data", "/data", True),
        ("/home/bob", "/home/bob", False),
    ]
    assert (host["CapDrop"], host["Privileged"], host["SecurityOpt"]) == (["ALL"], False, ["no-new-privileges"])
    assert {"Name": "core", "Soft": 0, "Hard": 0} in host["Ulimits"]
    assert _asked(lines)["Env"][0] == "A=b"
